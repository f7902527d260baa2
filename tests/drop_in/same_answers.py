"""Asks two copies of a web application the same requests and compares the answers: bare, and moved by one line.

.. code-block:: console

    $ python tests/drop_in/same_answers.py bare moved main:app postgresql+psycopg://…/bare postgresql+psycopg://…/moved

Each folder is served by gunicorn with ``DATABASE_URL``. Links are followed and forms are sent as they are, each once,
until there are enough requests. The two databases have to hold the same. It prints the statuses, and fails if an answer
differs, if a connection is idle in a transaction at the end, or if the server has more sessions open than its pool.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from html.parser import HTMLParser
from http.client import HTTPConnection
from http.cookies import SimpleCookie
from urllib.parse import urlencode, urljoin, urlsplit

from sqlalchemy import NullPool, create_engine, text

REQUESTS = 200
PORT = 18080
#: What differs each time: signed tokens, and the seconds of dates.
VARYING = re.compile(r"(?<=value=\")[\w.-]{60,}(?=\")|\d\d:\d\d:\d\d(\.\d+)?|nonce-?[\w=+/-]+")


class Page(HTMLParser):
    """The links and the forms of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.forms: list[tuple[str, str, dict[str, str]]] = []
        self._select = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif tag == "form":
            self.forms.append((found.get("method", "get").upper(), found.get("action", ""), {}))
        elif self.forms and tag in ("input", "textarea") and found.get("name"):
            is_off = found.get("type") in ("checkbox", "radio") and "checked" not in found
            if not is_off and found.get("type") not in ("file", "submit"):
                self.forms[-1][2][found["name"]] = found.get("value", "")
        elif tag == "select":
            self._select = found.get("name", "")
        elif self.forms and tag == "option" and self._select and "selected" in found:
            self.forms[-1][2][self._select] = found.get("value", "")


Answer = tuple[str, str, int, str | None, str]


class Browser:
    """One user, who may log in by the first form that asks for a password."""

    def __init__(self, login: dict[str, str]) -> None:
        self.cookies: SimpleCookie = SimpleCookie()
        self.login = login

    def ask(self, method: str, path: str, form: dict[str, str]) -> Answer:
        connection = HTTPConnection("127.0.0.1", PORT, timeout=60)
        cookie = "; ".join(f"{name}={morsel.value}" for name, morsel in self.cookies.items())
        headers = {"Cookie": cookie, "Content-Type": "application/x-www-form-urlencoded"}
        connection.request(method, path, urlencode(form) if form else None, headers)
        response = connection.getresponse()
        for header in response.headers.get_all("Set-Cookie", ()):
            self.cookies.load(header)
        page = response.read().decode(errors="replace")
        connection.close()
        return method, path, response.status, response.headers["Location"], page

    def crawl(self, start: str) -> list[Answer]:
        answers: list[Answer] = []
        waiting, known = deque([("GET", start, {})]), set()
        while waiting and len(answers) < REQUESTS:
            method, path, form = waiting.popleft()
            key = (method, path, tuple(sorted(form)))
            if key in known or "logout" in path:
                continue
            known.add(key)
            method, path, status, location, page = self.ask(method, path, form)
            answers.append((method, path, status, location, VARYING.sub("…", page)))
            found = Page(page) if "<" in page[:500] else Page("")
            targets = [*found.links, *([location] if location else [])]
            following = [("GET", target, {}) for target in targets]
            for how, action, fields in found.forms:
                if "password" in fields and self.login:
                    following.insert(0, (how, action, {**fields, **self.login}))
                else:
                    following.append((how, action, fields))
            for how, target, fields in following:
                url = urlsplit(urljoin(f"http://127.0.0.1:{PORT}{path}", target))
                if url.netloc == f"127.0.0.1:{PORT}" and not url.path.startswith("/static"):
                    waiting.append((how, url.path + (f"?{url.query}" if url.query else ""), fields))
        return answers


def run(folder: str, app: str, url: str, start: str, login: dict[str, str]) -> list[Answer]:
    """Serve one copy and ask it everything."""
    command = [sys.executable, "-m", "gunicorn", app, "--bind", f"127.0.0.1:{PORT}", "--threads", "4"]
    environ = {**os.environ, "DATABASE_URL": url}
    with open(os.path.join(folder, "log"), "wb") as log:
        server = subprocess.Popen(command, cwd=folder, env=environ, stdout=log, stderr=log)
    try:
        for _ in range(600):
            try:
                Browser({}).ask("GET", start, {})
                break
            except OSError:
                assert server.poll() is None, f"see {folder}/log"
                time.sleep(0.1)
        answers = Browser(login).crawl(start)
        with create_engine(url, poolclass=NullPool).connect() as connection:
            idle = text("SELECT state, count(*) FROM pg_stat_activity WHERE datname = current_database() GROUP BY 1")
            states = {str(state): count for state, count in connection.execute(idle)}
        print(folder, len(answers), "requests", dict(Counter(each[2] for each in answers)), "sessions", states)
        assert "idle in transaction" not in states, states
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)
    return answers


def main(bare: str, moved: str, app: str, bare_url: str, moved_url: str, start: str = "/", *login: str) -> int:
    """:param login: fields of the form that asks for a password, ``username=admin``."""
    fields = dict(each.split("=", 1) for each in login)
    before = run(bare, app, bare_url, start, fields)
    after = run(moved, app, moved_url, start, fields)
    different = [(one, other) for one, other in zip(before, after, strict=False) if one != other]
    for one, other in different:
        print("different:", one[:4], other[:4])
    return bool(different) or len(before) != len(after)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
