"""The inspector in a browser: Debian's chromium, driven by Selenium."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from sqlalchemy import ForeignKey, String, select, text, update
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from werkzeug.serving import make_server

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware.inspector import InspectorMiddleware

from ..ports import free_port
from ..wsgi import Environ, StartResponse

try:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    MISSING = next((name for name in ("chromium", "chromedriver") if shutil.which(name) is None), None)
except ImportError:
    MISSING = "selenium"

PATIENCE = 30
EVIL = '<script>window.pwned = 1</script><img src=x onerror="window.pwned = 1">'
SECRET = "hunter2-s3cret"
SIZES = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]
PAGE = (
    """<!doctype html><html><head><title>shop</title><link rel="icon" href="data:,"></head><body>shop</body></html>"""
)
#: Another site's page, which sends a form to this one.
ATTACK = """<!doctype html><html><head><link rel="icon" href="data:,"></head><body>
<form method="post" action="%s"><input name="token" value="%s"><button>Win</button></form></body></html>"""

#: Tells of what a Content-Security-Policy keeps a page from.
NOTE_VIOLATIONS = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective));
"""
#: The elements with text whose contrast with the ground behind them is too small (WCAG 2, 1.4.3).
LOW_CONTRAST = """
const channels = (color) => (color.match(/[\\d.]+/g) || []).map(Number);
const luminance = (color) => {
  const [r, g, b] = channels(color).slice(0, 3).map((value) => {
    value /= 255;
    return value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (element) => {
  for (; element; element = element.parentElement) {
    const color = getComputedStyle(element).backgroundColor;
    if (channels(color)[3] !== 0) return color;
  }
};
return [...document.querySelectorAll("main *, nav *")].filter((element) => {
  const hasText = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!hasText || element.closest("svg") || !element.checkVisibility()) return false;
  const [a, b] = [luminance(getComputedStyle(element).color), luminance(ground(element))].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05) < 4.5;
}).map((element) => element.outerHTML.slice(0, 200));
"""


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "browser_author"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50))
    password: Mapped[str] = mapped_column(String(50))
    books: Mapped[list[Book]] = relationship()


class Book(Base):
    __tablename__ = "browser_book"
    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey(Author.id))


def shop(environ: Environ, start: StartResponse) -> list[bytes]:
    path = environ["PATH_INFO"]
    if path.startswith("/_sqlasession"):
        start("404 Not Found", [("Content-Type", "text/plain")])
        return [b"not found in the shop"]
    content = PAGE
    if path == "/attack":
        content = ATTACK % (attack["address"], attack["token"])
    elif path == "/update":
        session.execute(update(Author).where(Author.id == 1).values(name="Lin", password=SECRET))
        session.rollback()
    else:
        for author in session.scalars(select(Author).where(Author.name != EVIL)):
            len(author.books)
        session.execute(text(f"SELECT '{EVIL.replace(':', '')}', :evil").bindparams(evil=EVIL))
        session.execute(text("SELECT :password").bindparams(password=SECRET))
    start("200 OK", [("Content-Type", "text/html")])
    return [content.encode()]


#: What the page of another site sends.
attack = {"address": "", "token": ""}


class Site:
    """The application, served with its inspector."""

    def __init__(self, folder: Path) -> None:
        options = {"transaction": True, "server_timing": True, "metadata": Base.metadata}
        self.database = SQLASessionMiddleware(shop, f"sqlite:///{folder}/shop.db", **options)
        self.database.init_database()
        with self.database.context() as own:
            own.add_all([Author(name=f"Ada {number}", password=SECRET, books=[Book()]) for number in range(5)])
            own.commit()
        self.inspector = InspectorMiddleware(self.database)
        self.port = free_port()
        self.server = make_server("127.0.0.1", self.port, self.inspector, threaded=True)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.port}"

    def last(self, path: str) -> dict[str, Any]:
        """What is kept of the last request for a path."""
        number = next(each["id"] for each in self.inspector._watch.summaries() if each["path"] == path)
        kept = self.inspector._watch.find(number)
        assert kept is not None
        return kept.data

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
        self.database.dispose()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("browser"))
    yield site
    site.close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if MISSING is not None:
        if os.environ.get("CI"):
            pytest.fail(f"there is no {MISSING}, and CI is set")
        pytest.skip(f"there is no {MISSING}")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"):
        options.add_argument(argument)
    options.add_argument("--disable-dev-shm-usage")
    options.add_argument("--host-resolver-rules=MAP evil.example 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.set_page_load_timeout(PATIENCE)
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": NOTE_VIOLATIONS})
    yield driver
    driver.quit()


class Browser:
    """A browser that has asked for a page of the shop, and been at the inspector."""

    def __init__(self, driver: Any, site: Site) -> None:
        self.driver = driver
        self.site = site
        self.resize(1280, "light")
        driver.get(f"{site.url}/")
        driver.get(site.inspector.url(site.url))
        assert driver.current_url == f"{site.url}/_sqlasession/"
        self.driver.get_log("browser")

    def resize(self, width: int, scheme: str) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def wait(self, until: Any) -> Any:
        return WebDriverWait(self.driver, PATIENCE).until(until)

    def find(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def open(self, path: str) -> dict[str, Any]:
        """Open the page of the last request for a path."""
        data = self.site.last(path)
        self.driver.get(f"{self.site.url}/_sqlasession/r/{data['id']}")
        return data

    def pages(self) -> Iterator[str]:
        """Each kind of page in turn."""
        root = f"{self.site.url}/_sqlasession"
        number = self.site.last("/")["id"]
        for page in (f"{root}/", f"{root}/r/{number}", f"{root}/pools"):
            self.driver.get(page)
            yield page
        self.open("/")
        self.run("document.querySelector('details').open = true")
        self.find("details form button").click()
        self.wait(lambda driver: "Plan of statement" in driver.title)
        yield "plan"


@pytest.fixture
def browser(chromium: Any, site: Site) -> Browser:
    return Browser(chromium, site)


def test_pages_break_no_policy_and_log_no_error(browser: Browser) -> None:
    for page in browser.pages():
        if page.endswith("/"):
            browser.wait(lambda driver: "appear by themselves" in driver.find_element(By.ID, "live").text)
        assert browser.run("return violations") == [], page
        assert browser.driver.get_log("browser") == [], page
    # That it would be noted: a page may not do this.
    browser.run("document.head.append(Object.assign(document.createElement('style'), {textContent: 'p {color: red}'}))")
    assert browser.wait(lambda _: browser.run("return violations")) == ["style-src-elem"]
    assert browser.driver.get_log("browser") != []


def test_markup_in_statements_values_and_paths_stays_text(browser: Browser) -> None:
    path = f"/{EVIL}"
    browser.driver.get(f"{browser.site.url}{quote(path)}")
    browser.driver.get(f"{browser.site.url}/_sqlasession/")
    assert EVIL in browser.find("tbody").text
    # The script makes the rows of those that come later.
    browser.run("fetch(arguments[0])", quote(f"{path}2"))
    browser.wait(lambda _: f"{EVIL}2" in browser.find("tbody").text)
    assert browser.run("return [window.pwned, document.querySelectorAll('img').length]") == [None, 0]
    browser.open(path)
    browser.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    shown = browser.find("main").text
    assert EVIL in browser.find("h1").text
    assert shown.count("<script>window.pwned") >= 3
    assert browser.run("return [window.pwned, document.querySelectorAll('img').length]") == [None, 0]
    assert [each for each in browser.driver.get_log("browser") if "Content Security" in each["message"]] == []


def test_fetch_appears_in_the_list_without_a_reload(browser: Browser) -> None:
    browser.driver.get(f"{browser.site.url}/_sqlasession/")
    inspector = browser.driver.current_window_handle
    browser.run("window.mark = 'still here'")
    browser.driver.switch_to.new_window("tab")
    browser.driver.get(f"{browser.site.url}/")
    browser.run("fetch('/fetched?page=1&token=none', {method: 'POST', body: 'x'})")
    browser.driver.close()
    browser.driver.switch_to.window(inspector)
    browser.wait(lambda _: "POST /fetched ?page&token" in browser.find("tbody").text)
    assert browser.run("return window.mark") == "still here"
    browser.find("tbody a").click()
    browser.wait(lambda driver: driver.title == "POST /fetched")


def test_server_timing_is_that_of_the_record(browser: Browser) -> None:
    browser.driver.get(f"{browser.site.url}/timed")
    told = browser.run("""
        return performance.getEntriesByType("navigation")[0].serverTiming.map(
            (each) => [each.name, each.duration, each.description]);
    """)
    data = browser.site.last("/timed")
    timing = {name: (duration, description) for name, duration, description in told}
    asked = (data["database"] + data["fetched"]) * 1000
    assert timing["db"] == (round(asked, 1), f"{data['queries']} queries")
    assert timing["db-commit"][0] == round(data["committing"] * 1000, 1)
    assert timing["db-wait"][0] == round(data["waited"] * 1000, 1)


def test_explain_of_an_update_leaves_the_row(browser: Browser) -> None:
    browser.driver.get(f"{browser.site.url}/update")
    browser.open("/update")
    browser.find("summary").click()
    assert [each.text for each in browser.driver.find_elements(By.CSS_SELECTOR, "button")] == ["Explain"]
    browser.find("details form button").click()
    browser.wait(lambda driver: driver.title == "Plan of statement 1")
    assert "browser_author USING INTEGER PRIMARY KEY" in browser.find("main").text
    with browser.site.database.context() as own:
        assert own.get(Author, 1).name == "Ada 0"
    browser.find("main a").click()
    browser.wait(lambda driver: driver.current_url.endswith("#q1"))
    browser.wait(lambda _: browser.run("return document.getElementById('q1').open"))


def test_strangers_get_the_application_s_answer(browser: Browser) -> None:
    site, driver = browser.site, browser.driver
    number = site.last("/")["id"]
    driver.get(f"http://evil.example:{site.port}/_sqlasession/")
    assert browser.find("body").text == "not found in the shop"
    driver.get(site.inspector.url(f"http://evil.example:{site.port}"))
    assert browser.find("body").text == "not found in the shop"
    # With the right token, of which the other site knows nothing.
    attack.update(address=f"{site.url}/_sqlasession/r/{number}/q/0/explain", token=site.inspector._access.form_token)
    driver.get(f"http://evil.example:{site.port}/attack")
    browser.find("button").click()
    browser.wait(lambda _: driver.current_url.startswith(site.url))
    assert browser.find("body").text == "not found in the shop"
    # From the same origin it is admitted.
    driver.get(f"{site.url}/attack")
    browser.find("button").click()
    browser.wait(lambda _: driver.title == "Plan of statement 1")
    driver.delete_all_cookies()
    driver.get(f"{site.url}/_sqlasession/")
    assert browser.find("body").text == "not found in the shop"


def test_script_cannot_read_the_cookie(browser: Browser) -> None:
    assert browser.run("return document.cookie") == ""
    (cookie,) = browser.driver.get_cookies()
    assert (cookie["httpOnly"], cookie["sameSite"], cookie["path"]) == (True, "Strict", "/_sqlasession/")


def test_planted_password_is_on_no_page(browser: Browser) -> None:
    browser.driver.get(f"{browser.site.url}/update")
    for page in browser.pages():
        browser.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        assert SECRET not in browser.driver.page_source, page
    for path in ("/", "/update"):
        browser.driver.get(f"{browser.site.url}/_sqlasession/r/{browser.site.last(path)['id']}.json")
        assert SECRET not in browser.driver.page_source
        assert "***" in browser.driver.page_source


@pytest.mark.parametrize("width", [1280, 390])
def test_widths_of_the_timeline_add_up(browser: Browser, width: int) -> None:
    browser.resize(width, "light")
    data = browser.open("/")
    whole, parts, lane, held, sent = browser.run("""
        const width = (element) => element.getBBox().width * element.getScreenCTM().a;
        const sum = (selector) => [...document.querySelectorAll(selector)].map(width).reduce((a, b) => a + b, 0);
        const last = [...document.querySelectorAll("svg.lane")].at(-1);
        last.id = "last";
        const inLast = (kind) => sum(`#last [data-kind=${kind}]`);
        return [
            document.querySelector("svg.sum").getBoundingClientRect().width, sum("svg.sum rect"),
            last.getBoundingClientRect().width, inLast("hold"), inLast("statement"),
        ];
    """)
    assert parts == pytest.approx(whole, abs=0.5)
    assert held == pytest.approx(lane * data["held"] / data["seconds"], abs=0.5)
    assert sent == pytest.approx(lane * data["database"] / data["seconds"], abs=0.5)
    assert sent < held < lane


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_pages_fit_and_can_be_read(browser: Browser, width: int, scheme: str) -> None:
    browser.resize(width, scheme)
    grounds = set()
    for page in browser.pages():
        browser.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        is_wide = "return document.documentElement.scrollWidth > document.documentElement.clientWidth"
        assert not browser.run(is_wide), page
        assert browser.run(LOW_CONTRAST) == [], page
        grounds.add(browser.run("return getComputedStyle(document.body).backgroundColor"))
        # What is wider scrolls in its own box.
        outside = "return [...document.querySelectorAll('table')].filter((each) => !each.closest('.scroll')).length"
        assert browser.run(outside) == 0, page
    assert grounds == {"rgb(20, 24, 31)" if scheme == "dark" else "rgb(255, 255, 255)"}
    if width == 390:
        browser.driver.get(f"{browser.site.url}/_sqlasession/")
        scrolls = (
            "const box = document.querySelector('.scroll'); return [box.scrollWidth, box.clientWidth, box.tabIndex]"
        )
        inner, outer, index = browser.run(scrolls)
        assert inner > outer
        assert index == 0


def test_all_is_reached_by_the_keyboard(browser: Browser) -> None:
    browser.driver.get(f"{browser.site.url}/_sqlasession/")
    seen: list[str] = []
    for _ in range(10):
        browser.driver.switch_to.active_element.send_keys(Keys.TAB)
        name, style, width = browser.run("""
            const found = document.activeElement, style = getComputedStyle(found);
            return [found.textContent.trim().slice(0, 40), style.outlineStyle, parseFloat(style.outlineWidth)];
        """)
        assert (style, width >= 2) == ("solid", True), name
        seen.append(name)
        if name.startswith("GET /"):
            break
    assert seen[:3] == ["Skip to the content", "Requests", "Pools"]
    browser.driver.switch_to.active_element.send_keys(Keys.ENTER)
    browser.wait(lambda driver: driver.title.startswith("GET /"))
    browser.run("document.querySelector('summary').focus()")
    browser.driver.switch_to.active_element.send_keys(Keys.SPACE)
    assert browser.run("return document.querySelector('details').open")
    for _ in range(10):
        browser.driver.switch_to.active_element.send_keys(Keys.TAB)
        if browser.run("return document.activeElement.tagName") == "BUTTON":
            break
    browser.driver.switch_to.active_element.send_keys(Keys.ENTER)
    browser.wait(lambda driver: driver.title == "Plan of statement 1")


def test_pages_work_without_scripts(browser: Browser) -> None:
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.driver.get(f"{browser.site.url}/_sqlasession/")
        assert "Load the page again" in browser.find("main").text
        browser.find("tbody a").click()
        browser.wait(lambda driver: driver.title.startswith("GET /"))
        browser.find("summary").click()
        browser.find("details form button").click()
        browser.wait(lambda driver: driver.title == "Plan of statement 1")
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
