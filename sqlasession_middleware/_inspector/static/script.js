"use strict";

// Renews the list of requests, and opens the statement that the address names. All texts become text nodes.

const live = document.getElementById("live");
const SECOND = 1000;

function milliseconds(seconds) {
  const value = seconds * 1000;
  return `${value.toFixed(value >= 100 ? 0 : value >= 10 ? 1 : 2)} ms`;
}

function element(name, content, className) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(content);
  return made;
}

function marked(value, isMarked, className) {
  return isMarked ? element("span", String(value), className) : String(value);
}

function statusOf(data) {
  if (data.raised) return element("span", `raised ${data.raised}`, "bad");
  if (data.is_running && !data.status) return element("span", "running", "running");
  const kind = data.status[0] === "5" ? "bad" : data.status[0] === "4" ? "warn" : "good";
  const shown = document.createElement("span");
  shown.append(element("span", data.status || "no response", kind));
  if (data.is_running) shown.append(" ", element("span", "running", "running"));
  return shown;
}

const OUTCOMES = {
  committed: "good", "outcome unknown": "bad", "rolled back": "warn", vetoed: "warn", doomed: "warn",
};

function rowOf(data, root) {
  const row = document.createElement("tr");
  row.dataset.id = data.id;
  const link = document.createElement("a");
  link.href = `${root}/r/${data.id}`;
  link.append(element("b", data.method), ` ${data.path}`);
  const path = element("td", link, "path");
  if (data.query.length) path.append(" ", element("span", `?${data.query.join("&")}`, "quiet"));
  if (data.tenant) path.append(" ", element("span", `of ${data.tenant}`, "quiet"));
  row.append(
    element("td", new Date(data.at * 1000).toTimeString().slice(0, 8)),
    path,
    element("td", statusOf(data)),
    element("td", milliseconds(data.seconds), "number"),
    element("td", milliseconds(data.database + data.fetched), "number"),
    element("td", String(data.queries), "number"),
    element("td", String(data.trips), "number"),
    element("td", milliseconds(data.waited), "number"),
    element("td", milliseconds(data.held), "number"),
    element("td", marked(data.warnings, data.warnings, "bad"), "number"),
    element("td", marked(data.attempts, data.attempts > 1, "warn"), "number"),
    element("td", element("span", data.outcome, OUTCOMES[data.outcome] || "quiet")),
  );
  return row;
}

function show(requests) {
  const body = document.getElementById("requests");
  const known = new Map([...body.rows].map((row) => [row.dataset.id, row]));
  const rows = requests.map((data) => {
    const before = known.get(data.id);
    if (before && !before.dataset.running && !data.is_running) return before; // It may have the focus.
    const row = rowOf(data, live.dataset.root);
    if (data.is_running) row.dataset.running = "yes";
    if (!before) row.classList.add("new");
    return row;
  });
  const focused = document.activeElement && document.activeElement.closest("tr");
  const isSame = rows.length === body.rows.length && rows.every((row, index) => row === body.rows[index]);
  if (!isSame) {
    body.replaceChildren(...rows);
    if (focused) {
      const again = rows.find((row) => row.dataset.id === focused.dataset.id);
      if (again) again.querySelector("a").focus({ preventScroll: true });
    }
  }
  document.getElementById("none").hidden = rows.length > 0;
}

async function renew() {
  let next = SECOND;
  if (!document.hidden) {
    try {
      const response = await fetch(live.dataset.requests, { credentials: "same-origin", cache: "no-store" });
      if (!response.ok) throw new Error(response.statusText);
      show(await response.json());
      live.textContent = "The last ones come first. New ones appear by themselves.";
    } catch {
      live.textContent = "The application does not answer. It is asked again.";
      next = 5 * SECOND;
    }
  }
  setTimeout(renew, next);
}

if (live) renew();

function openNamed() {
  const named = location.hash && document.getElementById(location.hash.slice(1));
  if (named instanceof HTMLDetailsElement) {
    named.open = true;
    named.scrollIntoView();
  }
}
addEventListener("hashchange", openNamed);
openNamed();
