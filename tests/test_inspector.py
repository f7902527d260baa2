"""The inspector: who may see it, what it shows, and what it does not."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import ForeignKey, StaticPool, String, create_engine, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.orm.exc import StaleDataError
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.test import Client, EnvironBuilder, TestResponse, run_wsgi_app
from werkzeug.wrappers import Request
from werkzeug.wsgi import FileWrapper

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware._inspector.access import Access
from sqlasession_middleware._inspector.sql import first_words, highlighted
from sqlasession_middleware._inspector.timeline import draw, summed
from sqlasession_middleware.errors import ConfigurationError
from sqlasession_middleware.inspector import InspectorMiddleware

from .wsgi import Environ, StartResponse, consume, environ, start_response

pytestmark = pytest.mark.usefixtures("disposes")

TOKEN = "a-token-of-the-tests"
SECRET = "hunter2-s3cret"
LOOPBACK = {"REMOTE_ADDR": "127.0.0.1"}
PATH = "/_sqlasession"
#: what the cookie for the token is called
COOKIE = Access(TOKEN, (), (), False).cookie({}, "/").partition("=")[0]
NOT_FOUND = b"the application's own 404"


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = f"author_{uuid4().hex[:12]}"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50), default="Ada")
    password: Mapped[str] = mapped_column(String(50), default="x")
    books: Mapped[list[Book]] = relationship(back_populates="author")


class Book(Base):
    __tablename__ = f"book_{uuid4().hex[:12]}"
    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey(Author.id))
    author: Mapped[Author] = relationship(back_populates="books")


def shop(environ: Environ, start: StartResponse) -> Any:
    """Does what the test wants, and has a page of its own for all other paths."""
    if environ["PATH_INFO"].startswith(PATH):
        start("404 Not Found", [("Content-Type", "text/plain")])
        return [NOT_FOUND, environ["wsgi.input"].read()]
    work = environ.get("work")
    body = None if work is None else work()
    start(environ.get("status", "200 OK"), [("Content-Type", "text/plain")])
    return [b"done"] if body is None else body


def read() -> None:
    session.execute(select(Author.id).where(Author.name == "Ada"))


class Site:
    """An application with its inspector, and a browser that has its cookie."""

    def __init__(self, app: Any, database: SQLASessionMiddleware | None = None) -> None:
        self.app = app
        self.database = database
        # The tests send the cookie themselves, also under names of the site that the client has none for.
        self.browser = Client(app, use_cookies=False)
        self.sent = dict(LOOPBACK)

    @property
    def inspector(self) -> InspectorMiddleware:
        app = self.app
        while not isinstance(app, InspectorMiddleware):
            app = app.app
        return app

    def log_in(self) -> None:
        response = self.browser.get(f"{PATH}/?token={TOKEN}", environ_overrides=LOOPBACK)
        assert (response.status_code, response.location) == (303, f"{PATH}/")
        self.sent["HTTP_COOKIE"] = response.headers["Set-Cookie"].partition(";")[0]

    def ask(self, path: str, **more: Any) -> TestResponse:
        """A GET of a page, as it is sent."""
        sent = {"HTTP_HOST": "localhost", **self.sent, **more}
        request = EnvironBuilder(path).get_environ()
        body, status, headers = run_wsgi_app(self.app, {**request, **sent}, buffered=True)
        return TestResponse(body, status, headers, Request(request))

    def work(self, work: Callable[[], Any] | None = None, path: str = "/", **more: Any) -> TestResponse:
        overrides = {"work": work, **more}
        return self.browser.get(path, buffered=True, environ_overrides=overrides)

    def page(self, path: str, **more: Any) -> str:
        response = self.browser.get(f"{PATH}{path}", environ_overrides={**self.sent, **more})
        assert response.status_code == 200, response.text
        return response.text

    def requests(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.page("/requests.json"))
        return found

    def last(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.page(f"/r/{self.requests()[0]['id']}.json"))
        return found

    def form_token(self) -> str:
        page = self.page(f"/r/{self.requests()[0]['id']}")
        token = self.inspector._access.form_token
        assert ("<form" not in page) or f'name="token" value="{token}"' in page
        return token

    def explain(self, number: int, analyze: bool = False, accept: str = "application/json", **more: Any) -> Any:
        data = {"token": self.form_token(), **({"analyze": "1"} if analyze else {})}
        headers = {"Origin": "http://localhost", "Accept": accept}
        path = f"{PATH}/r/{self.requests()[0]['id']}/q/{number}/explain"
        response = self.browser.post(path, data=data, headers=headers, environ_overrides=self.sent)
        assert response.status_code == 200
        return response.json if accept == "application/json" else response.text


@pytest.fixture
def make(sqlite_url: str) -> Iterator[Callable[..., Site]]:
    """Makes sites, and drops the tables of the first one."""
    made: list[SQLASessionMiddleware] = []

    def make(bind: Any = sqlite_url, app: Any = shop, *, options: Any = None, **more: Any) -> Site:
        database = SQLASessionMiddleware(app, bind, metadata=Base.metadata, **(options or {}))
        if not made:
            database.init_database()
        made.append(database)
        site = Site(InspectorMiddleware(database, token=TOKEN, **more), database)
        site.log_in()
        return site

    yield make
    if made:
        made[0].drop_database()


# -- who may see it

#: What is wrong with a request, and the check that finds it.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no cookie": ({"HTTP_COOKIE": ""}, "has_cookie"),
    "another cookie": ({"HTTP_COOKIE": f"{COOKIE}=guessed"}, "has_cookie"),
    "the token as a cookie": ({"HTTP_COOKIE": f"{COOKIE}={TOKEN}"}, "has_cookie"),
    "another machine": ({"REMOTE_ADDR": "192.0.2.1"}, "_is_peer"),
    "no peer": ({"REMOTE_ADDR": ""}, "_is_peer"),
    "a mapped address of another machine": ({"REMOTE_ADDR": "::ffff:192.0.2.1"}, "_is_peer"),
    "another host": ({"HTTP_HOST": "evil.example"}, "_is_host"),
    "a host that begins like a trusted one": ({"HTTP_HOST": "localhost.evil.example"}, "_is_host"),
    "a host that ends like a trusted one": ({"HTTP_HOST": "evil-localhost"}, "_is_host"),
    "a host with what is none": ({"HTTP_HOST": "localhost:80@evil.example"}, "_is_host"),
    "another address": ({"HTTP_HOST": "[::2]:8000"}, "_is_host"),
    "a wrong address": ({"HTTP_HOST": "[:::::1]:8000"}, "_is_host"),
    "no host": ({"HTTP_HOST": ""}, "_is_host"),
    "Forwarded": ({"HTTP_FORWARDED": "for=127.0.0.1"}, "forwarded"),
    "X-Forwarded-For": ({"HTTP_X_FORWARDED_FOR": "127.0.0.1"}, "forwarded"),
    "X-Forwarded-Host": ({"HTTP_X_FORWARDED_HOST": "localhost"}, "forwarded"),
    "X-Real-IP": ({"HTTP_X_REAL_IP": "127.0.0.1"}, "forwarded"),
    "Via": ({"HTTP_VIA": "1.1 proxy"}, "forwarded"),
}


def take_out(monkeypatch: pytest.MonkeyPatch, check: str) -> None:
    if check == "forwarded":
        monkeypatch.setattr("sqlasession_middleware._inspector.access._is_forwarded", lambda environ: False)
    else:
        monkeypatch.setattr(Access, check, lambda self, *given: True)


@pytest.mark.parametrize("page", ["", "/", "/requests.json", "/pools", "/static/style.css", "/nothing"])
@pytest.mark.parametrize("case", REFUSED)
def test_refusal_is_the_answer_of_the_application(make: Any, case: str, page: str) -> None:
    changes, _ = REFUSED[case]
    site = make()
    response = site.ask(f"{PATH}{page}", **changes)
    assert (response.status_code, response.data) == (404, NOT_FOUND)
    assert "Content-Security-Policy" not in response.headers


@pytest.mark.parametrize("case", REFUSED)
def test_each_refusal_is_that_of_one_check(make: Any, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Without the check the page would be there: so the case tests nothing else."""
    changes, check = REFUSED[case]
    site = make()
    take_out(monkeypatch, check)
    assert site.ask(f"{PATH}/", **changes).status_code == 200


ADMITTED: dict[str, dict[str, str]] = {
    "another address of this machine": {"REMOTE_ADDR": "127.8.9.10"},
    "IPv6": {"REMOTE_ADDR": "::1", "HTTP_HOST": "[::1]"},
    "IPv6 with a port": {"REMOTE_ADDR": "::1", "HTTP_HOST": "[::1]:8000"},
    "IPv6 at length": {"REMOTE_ADDR": "::1", "HTTP_HOST": "[0:0:0:0:0:0:0:1]:8000"},
    "a scope of IPv6": {"REMOTE_ADDR": "::1%lo"},
    "IPv4 in IPv6": {"REMOTE_ADDR": "::ffff:127.0.0.1"},
    "a port": {"HTTP_HOST": "127.0.0.1:8000"},
    "a name": {"HTTP_HOST": "localhost:8000"},
}


@pytest.mark.parametrize("case", ADMITTED)
def test_developers_of_this_machine_are_admitted(make: Any, case: str) -> None:
    site = make()
    assert site.ask(f"{PATH}/", **ADMITTED[case]).status_code == 200


def test_token_is_swapped_for_a_cookie(make: Any) -> None:
    site = make()
    site.log_in()
    response = Client(site.app).get(site.inspector.url(""), environ_overrides=LOOPBACK)
    cookie = response.headers["Set-Cookie"]
    assert TOKEN not in cookie
    assert TOKEN not in response.location
    assert {"HttpOnly", "SameSite=Strict", f"Path={PATH}/"} <= set(cookie.split("; "))
    assert "Secure" not in cookie
    secure = Client(site.app).get(site.inspector.url(""), "https://localhost", environ_overrides=LOOPBACK)
    assert "Secure" in secure.headers["Set-Cookie"]


@pytest.mark.parametrize("token", ["", "x", TOKEN[:-1], f"{TOKEN}x", TOKEN.upper(), "ä"])
def test_another_token_is_refused(make: Any, token: str) -> None:
    site = make()
    response = Client(site.app).get(f"{PATH}/", query_string={"token": token}, environ_overrides=LOOPBACK)
    assert (response.status_code, response.data) == (404, NOT_FOUND)
    assert "Set-Cookie" not in response.headers


def test_tokens_are_compared_in_constant_time(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site = make()
    compared = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return True

    monkeypatch.setattr("hmac.compare_digest", compare)
    assert Client(site.app).get(f"{PATH}/?token=guess", environ_overrides=LOOPBACK).status_code == 303
    assert compared == [(b"guess", TOKEN.encode())]
    name = site.sent["HTTP_COOKIE"].partition("=")[0]
    assert site.ask(f"{PATH}/", HTTP_COOKIE=f"{name}=guess").status_code == 200
    assert compared[1][0] == b"guess"


def test_token_is_made_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    first, second = InspectorMiddleware(shop), InspectorMiddleware(shop)
    assert first.url("http://127.0.0.1:8000/").startswith(f"http://127.0.0.1:8000{PATH}/?token=")
    assert first.url("") != second.url("")
    assert len(first.url("").partition("=")[2]) >= 32
    assert [each.message for each in caplog.records] == [
        f"What requests do to databases is shown at {each.url('')}" for each in (first, second)
    ]
    consume(first(environ(), start_response))
    assert len(caplog.records) == 2


def test_headers_let_a_page_load_its_own_files_only(make: Any) -> None:
    site = make()
    site.work(read)
    number = site.requests()[0]["id"]
    for page in (
        "",
        "/",
        "/requests.json",
        f"/r/{number}",
        f"/r/{number}.json",
        "/pools",
        "/static/script.js",
        "/none",
    ):
        headers = site.ask(f"{PATH}{page}").headers
        policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
        assert {policy[name] for name in ("script-src", "style-src", "connect-src", "form-action")} == {"'self'"}
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
        has_forms = page == f"/r/{number}"  # Theirs would have no origin.
        assert headers["Referrer-Policy"] == ("same-origin" if has_forms else "no-referrer")


def test_pages_have_no_script_and_no_style_within(make: Any) -> None:
    site = make()
    site.work(read)
    for page in ("/", f"/r/{site.requests()[0]['id']}", "/pools"):
        html = site.page(page)
        assert re.findall(r"<script(?! src=)|<style|\sstyle=|\son\w+=|javascript:", html) == []


#: What is wrong with a POST, and the check that finds it.
REFUSED_POSTS: dict[str, tuple[dict[str, str], dict[str, str], str]] = {
    "no token": ({}, {}, "has_form_token"),
    "the token of the address": ({"token": TOKEN}, {}, "has_form_token"),
    "no origin": ({"token": "right"}, {"Origin": ""}, "is_same_origin"),
    "another origin": ({"token": "right"}, {"Origin": "http://evil.example"}, "is_same_origin"),
    "another port": ({"token": "right"}, {"Origin": "http://localhost:1"}, "is_same_origin"),
    "another scheme": ({"token": "right"}, {"Origin": "https://localhost"}, "is_same_origin"),
    "a page without an origin": ({"token": "right"}, {"Origin": "null"}, "is_same_origin"),
}


@pytest.mark.parametrize("is_taken_out", [False, True])
@pytest.mark.parametrize("case", REFUSED_POSTS)
def test_post_needs_a_token_of_its_own_and_the_same_origin(
    make: Any, monkeypatch: pytest.MonkeyPatch, case: str, is_taken_out: bool
) -> None:
    data, headers, check = REFUSED_POSTS[case]
    site = make()
    site.work(read)
    path = f"{PATH}/r/{site.requests()[0]['id']}/q/0/explain"
    form = {name: site.form_token() if value == "right" else value for name, value in data.items()} or {"a": "b"}
    if is_taken_out:
        take_out(monkeypatch, check)
    headers = {"Origin": "http://localhost", **headers}
    response = site.browser.post(path, data=form, headers=headers, environ_overrides=site.sent)
    if is_taken_out:
        assert response.status_code == 200
        assert "Plan of statement 1" in response.text
    else:
        # The application can read the form.
        assert (response.status_code, response.data) == (
            404,
            NOT_FOUND + b"&".join(f"{name}={value}".encode() for name, value in form.items()),
        )


def test_post_elsewhere_is_the_application_s(make: Any) -> None:
    site = make()
    for path in ("/", "/r/abc/q/0/explain"):
        for data, length in (("token=x", None), ("x" * 5000, None), ("", ""), ("", "x")):
            response = site.browser.post(
                f"{PATH}{path}",
                data=data,
                headers={"Origin": "http://localhost"},
                environ_overrides={**site.sent, **({} if length is None else {"CONTENT_LENGTH": length})},
            )
            assert (response.status_code, response.data[: len(NOT_FOUND)]) == (404, NOT_FOUND)
    assert site.browser.put(f"{PATH}/", environ_overrides=site.sent).data == NOT_FOUND


def test_others_are_admitted_when_the_options_say_so(make: Any) -> None:
    app = SQLASessionMiddleware(shop, "sqlite://")
    inspector = InspectorMiddleware(
        app, token=TOKEN, path="/debug/sql/", hosts=["dev.example", "[2001:db8::1]"], peers=["10.0.0.0/8"], proxied=True
    )
    site = Site(ProxyFix(inspector, x_for=1, x_host=1))
    told = {"REMOTE_ADDR": "127.0.0.1", "HTTP_X_FORWARDED_FOR": "10.1.2.3", "HTTP_X_FORWARDED_HOST": "dev.example"}
    assert inspector.url("") == f"/debug/sql/?token={TOKEN}"
    response = site.browser.get(inspector.url(""), environ_overrides=told)
    assert response.location == "/debug/sql/"
    cookie = response.headers["Set-Cookie"].partition(";")[0]
    for changes, is_admitted in (
        ({}, True),
        ({"HTTP_X_FORWARDED_HOST": "[2001:db8::1]:443"}, True),
        ({"HTTP_X_FORWARDED_HOST": "localhost"}, False),
        ({"HTTP_X_FORWARDED_FOR": "127.0.0.1"}, False),
    ):
        response = site.ask("/debug/sql/", **{**told, "HTTP_COOKIE": cookie, **changes})
        assert ("Content-Security-Policy" in response.headers) == is_admitted, changes


def test_no_host_is_trusted_when_none_is_named() -> None:
    assert not Access(TOKEN, [], ["127.0.0.1"], False).admits({**LOOPBACK, "HTTP_HOST": "localhost"})


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "path": ({"path": "debug"}, "path"),
    "whole site": ({"path": "/"}, "path"),
    "short token": ({"token": "x"}, "token"),
    "token with a space": ({"token": "a b c d e f g h i j"}, "token"),
    "token of bytes": ({"token": b"x" * 20}, "token"),
    "one host": ({"hosts": "localhost"}, "hosts"),
    "host with a port": ({"hosts": ["localhost:80"]}, "hosts"),
    "host of numbers": ({"hosts": [1]}, "hosts"),
    "wrong address": ({"hosts": ["[::x]"]}, "hosts"),
    "peer": ({"peers": ["localhost"]}, "peers"),
    "proxied": ({"proxied": "yes"}, "proxied"),
    "requests": ({"requests": 0}, "requests"),
    "memory": ({"memory": "16 MiB"}, "memory"),
    "store": ({"store": 1}, "store"),
    "applications": ({"applications": [shop]}, "applications"),
    "app": ({"app": None}, "app"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_refused(case: str) -> None:
    options, parameter = WRONG[case]
    with pytest.raises(ConfigurationError) as raised:
        InspectorMiddleware(options.pop("app", shop), **options)
    assert raised.value.parameter == parameter


# -- what is seen


def test_list_shows_what_requests_did(make: Any) -> None:
    site = make(options={"transaction": True})
    site.work(lambda: session.add(Author(books=[Book()])), "/write?q=1&token=abc&bare")
    site.work(read, "/read", status="404 Not Found")
    missing, written = site.requests()
    assert (missing["method"], missing["path"], missing["status"]) == ("GET", "/read", "404 Not Found")
    assert (written["outcome"], missing["outcome"]) == ("committed", "vetoed")
    assert written["query"] == ["q", "token"]
    assert "abc" not in site.page("/")
    assert "bare" not in site.page("/")
    assert written["queries"] == 2
    assert written["seconds"] > written["database"] > 0
    assert (written["warnings"], written["attempts"], written["is_running"]) == (0, 1, False)
    page = site.page("/")
    assert page.index("/read") < page.index("/write")


def test_request_is_shown_with_its_statements(make: Any) -> None:
    site = make(options={"transaction": True})
    site.work(lambda: session.add_all([Author(name="Grace"), Author(name="Lin")]))
    site.work(lambda: (read(), session.scalars(select(Author)).all()))
    data = site.last()
    first, second = data["statements"]
    assert first["parameters"] == [[["name_1", "'Ada'"]]]
    assert "in read\n    session.execute(select(Author.id)" in first["stack"]
    assert (first["engine"], first["connection"], first["attempt"], first["error"]) == ("default", 1, 1, None)
    assert second["rows"] in (2, -1)
    assert data["objects"] == {f"{__name__}.Author": 2}
    assert data["ends"][0]["kind"] == "commit"
    page = site.page(f"/r/{data['id']}")
    assert '<span class="k">SELECT</span>' in page
    assert f"{__name__}.Author" in page


def test_n_plus_one_is_named_with_its_remedy(make: Any) -> None:
    site = make()

    def write() -> None:
        session.add_all([Author(books=[Book()]) for _ in range(4)])
        session.commit()

    def load() -> None:
        for author in session.scalars(select(Author)):
            len(author.books)

    site.work(write)
    site.work(load)
    data = site.last()
    assert data["warnings"] == 1
    (repeat,) = data["repeats"]
    assert repeat["relationship"] == "Author.books"
    assert len(repeat["statements"]) == 4
    page = site.page(f"/r/{data['id']}")
    assert "<code>Author.books</code>" in page
    assert ".options(selectinload(Author.books))" in page
    assert "Statements that come more than once" in page


def test_statements_with_the_same_values_are_counted(make: Any) -> None:
    site = make()
    site.work(lambda: [session.execute(text("SELECT :a"), {"a": value}) for value in (1, 1, 2)])
    page = site.page(f"/r/{site.last()['id']}")
    assert re.search(r'<td class="number">3</td><td class="number">1</td>', page)


def test_texts_stay_texts(make: Any) -> None:
    site = make()
    evil = "<script>alert(1)</script>"
    site.work(
        lambda: session.execute(text(f"SELECT '{evil}', :evil"), {"evil": evil}),
        f"/{evil}?{evil}=1",
    )
    number = site.requests()[0]["id"]
    for page in ("/", f"/r/{number}"):
        assert evil not in site.page(page)
        assert "&lt;script&gt;" in site.page(page)


def test_widths_add_up(make: Any) -> None:
    site = make(options={"transaction": {"attempts": 2, "backoff_base": 0}})
    seen: list[int] = []

    def work() -> None:
        read()
        seen.append(1)
        if len(seen) == 1:
            raise StaleDataError

    site.work(work)
    data = site.last()
    assert data["attempts"] == 2
    page = site.page(f"/r/{data['id']}")
    lanes = [
        {kind: [float(width) for found, width in bars if found == kind] for kind in {kind for kind, _ in bars}}
        for bars in (
            re.findall(r'<rect class="(\w+)" x="[\d.]+" y="\d+" width="([\d.]+)"', lane)
            for lane in re.findall(r"<svg class=\"lane.*?</svg>", page, re.DOTALL)
        )
    ]
    total, attempts, *_ = lanes
    assert sum(sum(widths) for widths in total.values()) == pytest.approx(1000, abs=0.1)
    assert len(attempts["attempt"]) == 2
    last = lanes[-1]
    sent = sum(each["seconds"] for each in data["statements"]) / data["seconds"] * 1000
    assert sum(last["statement"]) == pytest.approx(sent, abs=0.1)
    held = sum(each["end"] - each["begin"] for each in data["holds"]) / data["seconds"] * 1000
    assert sum(last["hold"]) == pytest.approx(held, abs=0.1)
    assert sum(last["hold"]) > sum(last["statement"]) + sum(last.get("commit", [])) + sum(last.get("rollback", []))
    assert "<h3>Attempt 2</h3>" in page


def test_attempts_are_one_request_where_the_inspector_is_inside(make: Any) -> None:
    seen: list[int] = []

    def work() -> None:
        read()
        seen.append(1)
        if len(seen) == 1:
            raise StaleDataError

    database = SQLASessionMiddleware(
        InspectorMiddleware(shop, token=TOKEN), "sqlite://", transaction={"attempts": 2, "backoff_base": 0}
    )
    site = Site(database)
    site.log_in()
    before = len(site.requests())
    site.work(lambda: session.execute(text("SELECT 1")))
    seen.clear()
    site.work(lambda: (session.execute(text("SELECT 1")), seen.append(1), _raise_first(seen)))
    found = site.requests()[0]
    assert len(site.requests()) == before + 2
    # The commit comes after the response of the inspector.
    assert (found["attempts"], found["outcome"], found["queries"]) == (2, "committed", 2)


def _raise_first(seen: list[int]) -> None:
    if len(seen) == 1:
        raise StaleDataError


def test_failures_are_shown(make: Any) -> None:
    site = make()

    def fail() -> None:
        with suppress(DBAPIError):
            session.execute(text("SELECT nothing FROM nowhere"))
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError):
        site.work(fail)
    data = site.last()
    assert (data["raised"], data["status"]) == ("RuntimeError", "")
    assert "OperationalError" in data["statements"][0]["error"]
    assert "raised RuntimeError" in site.page("/")
    assert "OperationalError" in site.page(f"/r/{data['id']}")


def test_stream_grows_until_it_is_closed(make: Any) -> None:
    site = make()

    def work() -> Iterator[bytes]:
        for _ in range(3):
            read()
            yield b"chunk"

    body = site.app(environ(work=work), start_response)
    step = iter(body)
    seen = []
    for _ in range(3):
        next(step)
        running = site.requests()[0]
        seen.append((running["is_running"], running["queries"]))
        assert "running" in site.page(f"/r/{running['id']}")
    body.close()
    assert seen == [(True, 1), (True, 2), (True, 3)]
    done = site.requests()[0]
    assert (done["is_running"], done["queries"], done["id"]) == (False, 3, running["id"])


def test_stream_that_fails_or_is_dropped_has_ended(make: Any) -> None:
    site = make()

    def work() -> Iterator[bytes]:
        read()
        yield b"chunk"
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError):
        consume(site.app(environ(work=work), start_response))
    assert site.requests()[0]["raised"] == "RuntimeError"
    body = site.app(environ(work=work), start_response)
    step = iter(body)
    next(step)
    with pytest.warns(ResourceWarning):
        step = body = None
    dropped = site.requests()[0]
    assert (dropped["is_running"], dropped["raised"]) == (False, None)


def test_bodies_are_handed_on_as_they_are(make: Any, tmp_path: Path) -> None:
    site = make()
    path = tmp_path / "file"
    path.write_bytes(b"file")
    inspector = InspectorMiddleware(lambda environ, start: environ["body"](start), token=TOKEN)

    def answer(body: Any) -> Any:
        def call(start: StartResponse) -> Any:
            start("200 OK", [])
            return body

        return inspector(environ(body=call, **{"wsgi.file_wrapper": FileWrapper}), start_response)

    for body in ([b"a"], (b"a", b"b"), FileWrapper(path.open("rb"))):
        assert answer(body) is body
    body.close()
    assert consume(answer(iter([b"a", b"b"]))) == b"ab"
    assert site is not None


def test_several_and_nested_applications_are_seen(make: Any, tmp_path: Path) -> None:
    inner = SQLASessionMiddleware(shop, f"sqlite:///{tmp_path}/inner.db")

    def around(environ: Environ, start: StartResponse) -> Any:
        session.execute(text("SELECT 'outer'"))
        return inner(environ, start)

    around.__wrapped__ = inner  # type: ignore[attr-defined]  # as a decorator does
    outer = SQLASessionMiddleware(around, "sqlite://", binds={"audit": "sqlite://"}, server_timing=True)
    third = SQLASessionMiddleware(shop, f"sqlite:///{tmp_path}/third.db")
    mounted = DispatcherMiddleware(outer, {"/third": third})
    site = Site(InspectorMiddleware(mounted, token=TOKEN))
    site.log_in()
    site.work(lambda: session.execute(text("SELECT 'inner'")))
    names = {each["sql"]: each["engine"] for each in site.last()["statements"]}
    assert set(names) == {"SELECT 'outer'", "SELECT 'inner'"}
    assert len(set(names.values())) == 2
    site.work(lambda: session.execute(text("SELECT 'third'")), "/third/")
    assert site.last()["path"] == "/third/"
    assert site.explain(0)["problem"] == ""
    pools = json.loads(site.page("/pools.json"))
    assert len({each["engine"] for each in pools}) == len(pools) == 4


def test_applications_that_cannot_be_found_are_given(make: Any) -> None:
    hidden = SQLASessionMiddleware(shop, "sqlite://")
    site = Site(InspectorMiddleware(lambda *call: hidden(*call), token=TOKEN, applications=[hidden]))
    site.log_in()
    site.work(lambda: session.execute(text("SELECT 1")))
    assert site.requests()[0]["queries"] == 1


def test_record_of_an_application_that_is_not_known_is_shown_without_values(make: Any) -> None:
    hidden = SQLASessionMiddleware(shop, "sqlite://", server_timing=True)
    site = Site(InspectorMiddleware(lambda *call: hidden(*call), token=TOKEN))
    site.log_in()
    site.work(lambda: session.execute(text("SELECT :value"), {"value": "shown"}))
    assert site.last()["statements"][0]["parameters"] == [[["value", "***"]]]
    assert site.explain(0)["problem"] == "There are 0 engines of the name 'default'."
    assert "No engine is known" in site.page("/pools")


def test_pools_are_shown(make: Any) -> None:
    site = make(options={"binds": {"audit": create_engine("sqlite://", poolclass=StaticPool)}})
    site.work(read)
    default, audit = json.loads(site.page("/pools.json"))
    assert (default["engine"], default["used"], default["idle"], default["most"]) == ("default", 0, 1, 15)
    assert (audit["engine"], audit["used"], audit["pool"]) == ("audit", None, "StaticPool")
    assert "StaticPool" in site.page("/pools")
    unlimited = make(options={"engine_options": {"max_overflow": -1}})
    unlimited.work(read)
    assert json.loads(unlimited.page("/pools.json"))[0]["most"] is None


def test_page_of_a_request_that_is_not_kept_any_more(make: Any) -> None:
    site = make(requests=1)
    site.work(read)
    first, token = site.requests()[0]["id"], site.form_token()
    site.work(read)
    response = site.ask(f"{PATH}/r/{first}")
    assert (response.status_code, "not kept any more" in response.text) == (404, True)
    response = site.browser.post(
        f"{PATH}/r/{first}/q/0/explain",
        data={"token": token},
        headers={"Origin": "http://localhost"},
        environ_overrides=site.sent,
    )
    assert response.status_code == 404


def test_site_may_be_below_a_path(make: Any) -> None:
    site = make()
    site.work(read)
    below = {**LOOPBACK, "SCRIPT_NAME": "/shop"}
    browser = Client(site.app)
    response = browser.get(f"{PATH}/?token={TOKEN}", environ_overrides=below)
    assert response.location == f"/shop{PATH}/"
    cookie = response.headers["Set-Cookie"]
    assert f"Path=/shop{PATH}/" in cookie
    page = site.ask(f"{PATH}/", **{**below, "HTTP_COOKIE": cookie.partition(";")[0]}).text
    assert f'href="/shop{PATH}/static/style.css"' in page


def test_inspector_inside_of_a_request_uses_the_record_that_is_there() -> None:
    inspector = InspectorMiddleware(shop, token=TOKEN)

    def with_a_copy(environ: Environ, start: StartResponse) -> Any:
        return inspector(dict(environ), start)

    for options in ({"server_timing": True}, {}):
        database = SQLASessionMiddleware(with_a_copy, "sqlite://", **options)
        site = Site(database)
        site.sent["HTTP_COOKIE"] = inspector._access.cookie({}, "/").partition(";")[0]
        # The engine is known from the first request on.
        response = site.work(lambda: session.execute(text("SELECT 1")))
        response = site.work(lambda: session.execute(text("SELECT 1")))
        assert site.requests()[0]["queries"] == 1
        if options:
            assert '1 query"' in response.headers["Server-Timing"]


def test_failed_commit_is_shown(make: Any) -> None:
    engine = create_engine("sqlite://")
    driver_error = engine.dialect.loaded_dbapi.OperationalError

    def do_commit(connection: Any) -> None:
        raise driver_error("database is locked")

    engine.dialect.do_commit = do_commit  # type: ignore[method-assign]
    database = SQLASessionMiddleware(shop, engine, transaction=True)
    site = Site(InspectorMiddleware(database, token=TOKEN))
    site.log_in()
    with suppress(DBAPIError):
        site.work(lambda: session.execute(text("SELECT 1")))
    data = site.last()
    assert [each["error"] for each in data["ends"] if each["kind"] == "commit"] == ["OperationalError"]
    assert '<span class="bad">OperationalError</span>' in site.page(f"/r/{data['id']}")


def span(begin: float, end: float, **more: Any) -> dict[str, Any]:
    return {"engine": "default", "connection": 1, "attempt": 1, "begin": begin, "end": end, **more}


def test_moments_of_the_sum_belong_to_one_thing() -> None:
    """Two connections at the same time, one held to the end of the request, and rows that were fetched."""
    data = {
        "seconds": 10.0,
        "attempts": 1,
        "waits": [span(0, 1, kind="pool"), span(1, 2, kind="connect")],
        "holds": [span(2, 8), span(3, None, connection=2)],
        "statements": [
            {**span(3, 0), "seconds": 2.0, "fetched": 1.0, "sql": "SELECT 1"},
            {**span(4, 0, connection=2), "seconds": 2.0, "fetched": 0.0, "sql": "SELECT 2"},
        ],
        "ends": [span(7, 7.5, kind="commit"), span(9, 9.5, kind="rollback", engine="other")],
    }
    found = {part.kind: part.seconds for part in summed(data)}
    assert found == {"commit": 0.5, "rollback": 0.5, "statement": 3, "connect": 1, "pool": 1, "hold": 4}
    assert sum(part.bar.width for part in summed(data)) == pytest.approx(1000)
    lanes = {lane.title: [bar.kind for bar in lane.bars] for lane in draw(data)}
    assert lanes == {
        "waits": ["pool", "connect"],
        "default, connection 1": ["hold", "statement", "fetch"],
        "default, connection 2": ["hold", "statement", "commit"],
        "other, connection ?": ["rollback"],
    }
    assert summed({**data, "seconds": 0.0, "waits": [], "holds": [], "statements": [], "ends": []}) == []


def test_statement_that_cannot_be_laid_out_is_shown(make: Any) -> None:
    deep = f"SELECT {'(' * 2000}1{')' * 2000}"
    assert str(highlighted(deep)).count("(") == 2000
    assert highlighted("<b>" * 3000) == "&lt;b&gt;" * 3000
    assert first_words("SELECT a.id, a.name, a.password, a.further FROM a") == "SELECT … FROM a"
    assert len(first_words(f"UPDATE a SET b = {'1' * 500}")) == 161


def test_requests_of_threads_are_kept_apart(make: Any, tmp_path: Path) -> None:
    site = make(options={"binds": {"audit": f"sqlite:///{tmp_path}/audit.db"}})
    together = threading.Barrier(8)

    def ask(number: int) -> None:
        def work() -> None:
            together.wait(60)
            for _ in range(number + 1):
                session.execute(text(f"SELECT {number}"))
            session.execute(text("SELECT 'audit'"), bind_arguments={"bind": site.database.engines["audit"]})

        consume(site.app(environ(work=work, PATH_INFO=f"/{number}"), start_response))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    found = {each["path"]: site.inspector._watch.find(each["id"]).data for each in site.requests()}
    assert len(found) == 8
    for number in range(8):
        sent = [(each["engine"], each["sql"]) for each in found[f"/{number}"]["statements"]]
        assert sent == [("default", f"SELECT {number}")] * (number + 1) + [("audit", "SELECT 'audit'")]


def test_request_is_answered_when_it_cannot_be_kept(
    make: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site = make()
    monkeypatch.setattr("sqlasession_middleware._inspector.watch.keep", lambda *given: 1 / 0)
    assert site.work(read).data == b"done"
    assert [(each.message, each.levelname) for each in caplog.records[-1:]] == [("A request cannot be kept", "ERROR")]
    monkeypatch.undo()
    assert site.requests() == []


def test_pages_show_the_others_when_one_that_runs_cannot_be_kept(
    make: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site = make()
    site.work(read)
    body = site.app(environ(work=lambda: iter([b"one", b"two"])), start_response)
    step = iter(body)
    next(step)
    running = site.requests()[0]["id"]
    monkeypatch.setattr("sqlasession_middleware._inspector.watch.keep", lambda *given: 1 / 0)
    assert [each["is_running"] for each in site.requests()] == [False]
    assert site.browser.get(f"{PATH}/r/{running}", environ_overrides=site.sent).status_code == 404
    assert {each.message for each in caplog.records} >= {"A request cannot be kept"}
    monkeypatch.undo()
    body.close()


def test_error_that_the_application_hands_on_reaches_the_server() -> None:
    seen = []

    def start(status: str, headers: Any, exc_info: Any = None) -> Any:
        seen.append((status, exc_info))

    def fails(environ: Environ, start: StartResponse) -> list[bytes]:
        start("200 OK", [])
        start("500 Oops", [], exc_info=("a", "b", "c"))
        return [b"oops"]

    inspector = InspectorMiddleware(fails)
    consume(inspector(environ(), start))
    assert seen == [("200 OK", None), ("500 Oops", ("a", "b", "c"))]
    assert inspector._watch.summaries()[0]["status"] == "500 Oops"
