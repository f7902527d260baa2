"""Real frameworks, wrapped without a change to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from wsgiref.util import FileWrapper

import pytest
from sqlalchemy import select, text
from webtest import TestApp as WebTestApp
from werkzeug.exceptions import NotFound
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import EnvironBuilder

from sqlasession_middleware import SQLASessionMiddleware, application, local, session
from sqlasession_middleware.errors import ScopeError

from .framework_apps import FILE, FRAMEWORKS, Base, BrokenError, Guest, seen

Wrap = Callable[..., SQLASessionMiddleware]


class Case(NamedTuple):
    """A request, its response, and the names in the database afterwards."""

    method: str
    path: str
    status: int
    body: bytes | None
    stored: list[str]


CASES = {
    "a view commits": Case("POST", "/write", 200, b"Ada", ["Ada"]),
    "a view does not commit": Case("POST", "/forget", 200, b"Nobody", []),
    "a view only reads": Case("GET", "/names", 200, b"", []),
    "a generator uses the session in each step": Case("GET", "/stream", 200, b"Guests 0\nGuests 1\nGuests 2\n", []),
    "the framework makes an error page": Case("GET", "/fail", 500, None, []),
    "the method is HEAD": Case("HEAD", "/write", 200, None, ["Ada"]),
    "the method is HEAD and the body a generator": Case("HEAD", "/stream", 200, None, []),
    "the body is empty": Case("GET", "/empty", 204, b"", []),
    "the body is a file": Case("GET", "/file", 200, FILE.read_bytes(), []),
}


@pytest.fixture(params=FRAMEWORKS)
def framework(request: pytest.FixtureRequest) -> Callable[[bool], Any]:
    return FRAMEWORKS[request.param]


@pytest.fixture
def wrap() -> Iterator[Wrap]:
    """Wraps an application, with empty tables."""
    made: list[SQLASessionMiddleware] = []

    def wrap(app: Any, url: str) -> SQLASessionMiddleware:
        made.append(SQLASessionMiddleware(app, url, metadata=Base.metadata))
        made[-1].init_database()
        return made[-1]

    seen.clear()
    yield wrap
    seen.clear()
    for app in made:
        app.drop_database()
        app.dispose()


def assert_over(app: SQLASessionMiddleware) -> None:
    """No request of ``app`` is open, and nothing of one is left."""
    assert app.engine.pool.checkedout() == 0
    assert list(local) == []
    assert not application
    with pytest.raises(ScopeError, match=r"^No (application is bound|SQLASessionMiddleware is around)"):
        session.execute(text("SELECT 1"))


def stored(app: SQLASessionMiddleware) -> list[str]:
    with app.context():
        return list(session.scalars(select(Guest.name).order_by(Guest.id)))


def request(app: Any, case: Case) -> None:
    """Make the request of ``case`` through WebTest and its lint, and check the response."""
    # "Errors" are all statuses from 400 on, and whatever is on wsgi.errors: some frameworks log there.
    response = WebTestApp(app, lint=True).request(case.path, method=case.method, expect_errors=True)
    assert response.status_int == case.status
    assert case.body is None or response.body == case.body


# Most frameworks send one, wrapped or not.
@pytest.mark.filterwarnings("ignore:Content-Type header found in a 204 response")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_scope_is_the_requests_when(framework, case: Case, wrap: Wrap, sqlite_url: str) -> None:
    app = wrap(framework(False), sqlite_url)
    request(app, case)
    assert seen.count(app) == len(seen)
    assert seen or case.method == "HEAD"
    assert_over(app)
    assert stored(app) == case.stored


def test_committed_row_is_read_back_when_written_to_any_database(framework, wrap: Wrap, database_url: str) -> None:
    app = wrap(framework(False), database_url)
    for case in (CASES["a view commits"], CASES["a view does not commit"]._replace(body=b"Ada Nobody")):
        request(app, case)
        assert_over(app)
        assert stored(app) == ["Ada"]


@pytest.mark.parametrize("path", ["/fail", "/broken-stream"])
def test_error_reaches_the_server_when_the_framework_lets_it(framework, path: str, wrap: Wrap, sqlite_url: str) -> None:
    app = wrap(framework(True), sqlite_url)
    with pytest.raises(BrokenError):
        WebTestApp(app, lint=True).get(path)
    assert seen
    assert_over(app)
    assert stored(app) == []


def test_session_is_open_between_chunks_when_streaming(framework, wrap: Wrap, sqlite_url: str) -> None:
    """And is closed when the client leaves after the first of them."""
    app = wrap(framework(False), sqlite_url)
    body = app(EnvironBuilder("/stream").get_environ(), lambda status, headers, exc_info=None: None)
    assert next(iter(body)) == b"Guests 0\n"
    assert app.engine.pool.checkedout() == 1
    body.close()
    assert_over(app)
    assert stored(app) == []


def test_server_gets_its_own_file_wrapper_when_a_file_is_sent(framework, wrap: Wrap, sqlite_url: str) -> None:
    """The very object, so that it can use sendfile; the scope is over before the first byte."""
    app = wrap(framework(False), sqlite_url)
    environ = EnvironBuilder("/file").get_environ()
    environ["wsgi.file_wrapper"] = FileWrapper
    body = app(environ, lambda status, headers, exc_info=None: None)
    try:
        assert type(body) is FileWrapper
        assert_over(app)
        assert b"".join(body) == FILE.read_bytes()
    finally:
        body.close()
    assert seen == [app]
    assert stored(app) == []


def test_every_framework_has_its_own_database_when_all_are_mounted_in_one_process(wrap: Wrap, tmp_path) -> None:
    apps = {f"/{name}": wrap(factory(False), f"sqlite:///{tmp_path}/{name}.db") for name, factory in FRAMEWORKS.items()}
    mounted = WebTestApp(DispatcherMiddleware(NotFound(), apps), lint=True)
    for count, (mount, app) in enumerate(apps.items(), 1):
        for _ in range(count):
            mounted.post(f"{mount}/write")
        assert seen[-1] is app
        assert_over(app)
    assert [len(stored(app)) for app in apps.values()] == list(range(1, len(apps) + 1))
