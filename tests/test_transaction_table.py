"""The truth table of ``integration/truth_app.py`` through a server made of function calls, which looks at the database.

It looks from another connection, at each moment in which a real server would let go of something: when it gets the
head, and when it gets what completes the response. What frameworks make of the table is here as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from typing import Any, NamedTuple
from uuid import uuid4

import falcon
import flask
import pytest
import webob.dec
import werkzeug
from werkzeug.test import EnvironBuilder
from werkzeug.wsgi import FileWrapper

from sqlasession_middleware import session

from .conftest import DATABASES, DATABASES_SEEN
from .integration.truth_app import (
    ANYTHING,
    BODY,
    CUT,
    DECISIONS,
    ERROR,
    KINDS,
    LEAVES,
    MORE_KINDS,
    ROWS,
    WHOLE,
    WORKS,
    Case,
    Kind,
    Observer,
    Request,
    Truth,
    observing,
    table,
    without_repetitions,
)

WORKING = Case("2xx", KINDS["list"], WORKS)


def flask_app(request: Request) -> Any:
    """A text, of which Flask makes an iterator with a Content-Length."""
    app = flask.Flask("truth")
    app.config["PROPAGATE_EXCEPTIONS"] = False

    @app.get("/")
    def view() -> Any:
        request.call()
        return b"".join(request.steps()).decode(), request.case.status, request.headers()

    return app


def webob_app(request: Request) -> Any:
    """A list."""

    @webob.dec.wsgify
    def app(asked: webob.Request) -> webob.Response:
        request.call()
        return webob.Response(b"".join(request.steps()), request.case.status, request.headers(len(BODY)))

    return app


def werkzeug_app(request: Request) -> Any:
    """A stream of unknown length."""

    @werkzeug.Request.application
    def app(asked: werkzeug.Request) -> werkzeug.Response:
        request.call()
        return werkzeug.Response(request.steps(), request.case.status, request.headers())

    return app


def falcon_app(request: Request) -> Any:
    """The same."""

    class Resource:
        def on_get(self, asked: falcon.Request, response: falcon.Response) -> None:
            request.call()
            response.status = request.case.status
            response.set_headers(request.headers())
            response.stream = request.steps()

    app = falcon.App()
    app.add_route("/", Resource())
    return app


def no_content_app(request: Request) -> Any:
    """A body where there must be none, which an application learns from its server's complaints."""

    def app(environ: Any, start_response: Any) -> Any:
        request.call()
        start_response(request.case.status, request.headers())
        return request.steps()

    return app


MORE_APPS: dict[str, Callable[[Request], Any]] = {
    "no-content-body": no_content_app,
    "flask": flask_app,
    "webob": webob_app,
    "werkzeug-stream": werkzeug_app,
    "falcon-stream": falcon_app,
}


class Exchange:
    """One request through a server, and what the database held when the server got the head and the rest.

    :param leaves: whether the client leaves after the first chunk.
    :param look: what is stored for the request.
    """

    def __init__(self, method: str, leaves: bool, look: Callable[[], set[str]]) -> None:
        self.method = method
        self.look = look
        self.leaves = leaves
        self.status = 0
        self.length: int | None = None
        self.body = b""
        #: stored when the server got the head; and when it had all of the response, None if it never had
        self.at_head: set[str] | None = None
        self.at_end: set[str] | None = None
        self.failed_with: BaseException | None = None

    @property
    def seen(self) -> tuple[bool, int]:
        """Whether the client has a complete response, and its status, which is 0 where nothing came."""
        return self.at_end is not None, self.status

    def start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        if exc_info is not None and self.body:
            raise exc_info[1]
        assert exc_info is not None or not self.status
        self.status = int(status[:3])
        lengths = [int(value) for name, value in headers if name.lower() == "content-length"]
        self.length = lengths[0] if lengths else None
        self.at_head = self.look()
        if self.length == 0 or self.status in (204, 304) or self.method == "HEAD":
            self.at_end = self.at_head
        return self.write

    def write(self, chunk: bytes) -> None:
        assert self.status
        if self.leaves and self.body:
            raise BrokenPipeError
        self.body += chunk
        if self.at_end is None and self.length is not None and len(self.body) >= self.length:
            self.at_end = self.look()

    def run(self, app: Any, environ: dict[str, Any]) -> None:
        """Do what a server does; where an error comes before the first byte, it makes a 500 of it."""
        try:
            body = app(environ, self.start_response)
            try:
                for chunk in body:
                    if chunk:
                        self.write(chunk)
                        if self.leaves:
                            break
                else:
                    if self.length is None and self.at_end is None:
                        self.at_end = self.look()
            finally:
                close = getattr(body, "close", None)
                if close is not None:
                    close()
        except Exception as error:
            self.failed_with = error
            if not self.body:
                self.status, self.at_end = 500, self.look()
        except BaseException as error:
            self.failed_with = error


class Tried(NamedTuple):
    """An application, and who sees what it stores."""

    truth: Truth
    observer: Observer

    def ask(self, case: Case, **more: str) -> tuple[Exchange, set[str]]:
        """Make a request; say also what is stored afterwards."""
        ident = uuid4().hex
        exchange = Exchange(case.kind.method, case.fault == LEAVES, lambda: self.observer.stored(ident))
        environ = EnvironBuilder(
            "/", method=case.kind.method, query_string=case.query(ident, unseen="yes", **more)
        ).get_environ()
        environ["wsgi.file_wrapper"] = FileWrapper
        exchange.run(self.truth, environ)
        assert self.truth.engine.pool.checkedout() == 0
        assert not session.registry.has()
        assert self.truth.calls[ident] == 1
        return exchange, self.observer.stored(ident)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Tried]]:
    """Each database's application, made where it is first asked for."""
    with ExitStack() as stack:

        @cache
        def start(database: str) -> Tried:
            folder = tmp_path_factory.mktemp(database)
            observer = stack.enter_context(observing(DATABASES_SEEN.url(database, f"sqlite:///{folder}/test.db")))
            truth = Truth(observer.engine.url, {"attempts": 3, "backoff_base": 0.001}, MORE_APPS)
            stack.callback(truth.app.dispose)
            return Tried(truth, observer)

        yield start


@pytest.fixture
def tried(database: str, started: Callable[[str], Tried]) -> Tried:
    return started(database)


def cases_of(database: str) -> list[Case]:
    """The whole table, on the database with the most faults."""
    whole = table(database, [*KINDS.values(), *MORE_KINDS.values()])
    return whole if database == "postgresql" else without_repetitions(whole)


# The database is a part of the case: not each has every fault.
CASES = [pytest.param(database, case, id=f"{database}-{case}") for database in DATABASES for case in cases_of(database)]


@pytest.mark.parametrize(("database", "case"), CASES)
def test_success_is_durable_before_it_is_complete_when(tried: Tried, case: Case) -> None:
    exchange, stored = tried.ask(case)
    expected, is_stored = case.outcome
    assert stored == (ROWS if is_stored else set())
    complete, status = exchange.seen
    if not case.documented:
        assert (complete and status < 400) == bool(stored)
    if complete and status < 400:
        # This is G9: whoever sees a complete success can look, and finds what it tells of.
        assert exchange.at_end == ROWS
        assert exchange.at_head == (set() if case.kind.streamed else ROWS)
    if expected is not ANYTHING:
        whole = int(case.status[:3])
        assert exchange.seen == {WHOLE: (True, whole), CUT: (False, whole), ERROR: (True, 500)}[expected]
    if case.is_unknown:
        assert b"not known whether" in exchange.body
    # The next request finds nothing amiss.
    exchange, stored = tried.ask(WORKING)
    assert (exchange.seen, exchange.body, stored) == ((True, 201), BODY, ROWS)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("status_class", "asked", "is_stored"), DECISIONS.values(), ids=DECISIONS)
@pytest.mark.parametrize("database", ["sqlite"])
def test_application_has_the_last_word_where(
    tried: Tried, kind: Kind, status_class: str, asked: dict[str, str], is_stored: bool
) -> None:
    case = Case("2xx" if kind.bodiless else status_class, kind, WORKS)
    exchange, stored = tried.ask(case, **asked)
    assert exchange.seen == (True, int(case.status[:3]))
    assert exchange.at_end == stored == (ROWS if is_stored else set())
