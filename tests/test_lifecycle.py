"""Every kind of body, ended in every way, on every database (G2, G3, G4)."""

from __future__ import annotations

import gc
import io
import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any
from wsgiref.util import FileWrapper

import pytest
from gevent import GreenletExit
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.orm import Session
from webob import Response as WebObResponse
from werkzeug.wrappers import Response as WerkzeugResponse

from sqlasession_middleware import SQLASessionMiddleware, application, local, session
from sqlasession_middleware._lifecycle.response import ListScopeIterator
from sqlasession_middleware._scope.scope import current, outwards
from tests.conftest import DATABASES
from tests.wsgi import Chunks, Environ, RecordedSession, StartResponse, assert_given_back, environ, select_one
from tests.wsgi import start_response as send_nothing


def generator(chunks: Chunks) -> Iterator[bytes]:
    try:
        for chunk in chunks:  # noqa: UP028  # "yield from" would call close() by itself.
            yield chunk
    finally:
        chunks.close()


def write_all(chunks: Chunks, write: Callable[[bytes], None]) -> list[bytes]:
    for chunk in chunks:
        write(chunk)
    return []


# kind -> (chunks, environ, start_response) -> body
BODIES: dict[str, Callable[[Chunks, Environ, StartResponse], Iterable[bytes]]] = {
    "list": lambda chunks, environ, start: [b"a", b"b"],
    "tuple": lambda chunks, environ, start: (b"a", b"b"),
    "empty": lambda chunks, environ, start: [],
    "HEAD": lambda chunks, environ, start: [] if environ["REQUEST_METHOD"] == "HEAD" else [b"body"],
    "generator": lambda chunks, environ, start: generator(chunks),
    "iterator with close": lambda chunks, environ, start: chunks,
    "Werkzeug response": lambda chunks, environ, start: WerkzeugResponse(chunks)(environ, start),
    "WebOb response": lambda chunks, environ, start: WebObResponse(app_iter=chunks)(environ, start),
    "file_wrapper": lambda chunks, environ, start: environ["wsgi.file_wrapper"](io.BytesIO(b"file")),
    "write()": lambda chunks, environ, start: write_all(chunks, start("200 OK", [])),
}
# The kinds whose body runs code of the application, and where that can fail.
CODE_IN_STEPS = {"generator", "iterator with close", "Werkzeug response", "WebOb response"}
FAULTS = {
    "iter": CODE_IN_STEPS,
    "first step": CODE_IN_STEPS,
    "later step": CODE_IN_STEPS,
    "close": CODE_IN_STEPS,
    "call": set(BODIES),
    "": set(BODIES),
}
ERRORS: dict[str, Callable[[], BaseException]] = {
    "Exception": lambda: RuntimeError("the application's own"),
    "GreenletExit": GreenletExit,
    "SystemExit": lambda: SystemExit(3),
}


def take_all(result: Iterable[bytes]) -> None:
    for _ in result:
        pass


def take_one(result: Iterable[bytes]) -> None:
    next(iter(result), None)


def close(result: Any) -> None:
    if hasattr(result, "close"):
        result.close()


# How the server ends a response: what it does with it, one thing after the other.
SERVERS: dict[str, list[Callable[[Any], None]]] = {
    "normal end": [take_all, close],
    "client leaves after the first chunk": [take_one, close],
    "generator never started": [close],
    "close() twice": [take_all, close, close],
}


def serve(app: SQLASessionMiddleware, request: Environ, server: str) -> None:
    result = app(request, send_nothing)
    for step in SERVERS[server]:
        step(result)


# A fault that the server's way never reaches would test nothing. Whether an error is an Exception is told before any
# database is: SQLite shows it of those that are none.
CASES = [
    pytest.param(
        database,
        kind,
        fault,
        error,
        server,
        id=f"{database}-{kind}-{fault or 'no fault'}-{error if fault else ''}-{server}",
    )
    for database, kind, fault, error, server in product(DATABASES, BODIES, FAULTS, ERRORS, SERVERS)
    if kind in FAULTS[fault]
    and ((fault and database == "sqlite") or error == "Exception")
    and (fault in ("", "close") or server == "normal end")
    and not (fault == "close" and server == "generator never started" and kind == "generator")
]


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = create_engine(database_url)
    yield engine
    engine.dispose()


def wrap(engine: Engine, kind: str, fault: str = "", error: BaseException | None = None) -> SQLASessionMiddleware:
    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        select_one()
        local.mark = session()
        if fault == "call":
            assert error is not None
            raise error
        chunks = Chunks(fault, error)
        environ["test.chunks"].append(chunks)
        if kind in ("list", "tuple", "empty", "HEAD", "generator", "iterator with close", "file_wrapper"):
            start("200 OK", [("Content-Type", "text/plain")])
        return BODIES[kind](chunks, environ, start)

    return SQLASessionMiddleware(app, engine, session_options={"class_": RecordedSession})


def request(kind: str, chunks: list[Chunks]) -> Environ:
    method = "HEAD" if kind == "HEAD" else "GET"
    return environ(method, **{"wsgi.file_wrapper": FileWrapper, "test.chunks": chunks})


@pytest.mark.parametrize(("database_url", "kind", "fault", "error", "server"), CASES, indirect=["database_url"])
def test_nothing_survives_the_end(engine: Engine, kind: str, fault: str, error: str, server: str) -> None:
    """Whatever happened, the session is gone, the connection is back, and the server sees the application's error."""
    raised = ERRORS[error]()
    chunks: list[Chunks] = []
    app = wrap(engine, kind, fault, raised)
    local.before = "the caller's own"
    seen: BaseException | None = None
    try:
        serve(app, request(kind, chunks), server)
    except BaseException as caught:
        seen = caught
    assert seen is (raised if fault else None)
    assert_given_back(engine)
    assert dict(local) == {"before": "the caller's own"}
    del local.before
    if kind in CODE_IN_STEPS and chunks and not (kind == "generator" and server == "generator never started"):
        assert chunks[0].closed == 1


@pytest.mark.parametrize("kind", sorted(CODE_IN_STEPS))
@pytest.mark.parametrize("fault", ["iter", "first step", "later step"])
def test_scope_has_ended_when_a_step_raised_and_nobody_calls_close(engine: Engine, kind: str, fault: str) -> None:
    """Some servers (Twisted's) drop a response that raised. The response is still alive here."""
    chunks: list[Chunks] = []
    result = wrap(engine, kind, fault)(request(kind, chunks), send_nothing)
    with pytest.raises(RuntimeError, match=fault):
        take_all(result)
    assert_given_back(engine)
    assert dict(local) == {}
    assert chunks[0].closed == 1
    close(result)
    assert chunks[0].closed == 1


@pytest.mark.parametrize("steps", ["none", "one", "all"])
@pytest.mark.parametrize("kind", [kind for kind in BODIES if kind != "file_wrapper"])
def test_dropped_response_frees_the_connection_when_close_is_never_called(
    engine: Engine, kind: str, steps: str
) -> None:
    result = wrap(engine, kind)(request(kind, []), send_nothing)
    {"none": len, "one": take_one, "all": take_all}[steps]([] if steps == "none" else result)
    assert engine.pool.checkedout() == (0 if isinstance(result, ListScopeIterator) else 1)
    gc.disable()  # The response has to go by itself: no cycle may keep it until the collector comes.
    try:
        with pytest.warns(ResourceWarning, match="dropped with its session open"):
            del result
    finally:
        gc.enable()
    assert_given_back(engine)
    assert dict(local) == {}


def test_scope_lasts_when_only_the_iterator_is_kept(engine: Engine) -> None:
    """``for chunk in app(environ, start_response)`` in some middleware keeps nothing else."""
    checked_out: list[int] = []

    def step_through(result: Iterable[bytes]) -> None:
        iterator = iter(result)
        del result
        checked_out.extend(engine.pool.checkedout() for _ in iterator)

    with pytest.warns(ResourceWarning, match="dropped with its session open"):
        step_through(wrap(engine, "generator")(request("generator", []), send_nothing))
    assert checked_out == [1, 1, 1]
    assert_given_back(engine)
    assert dict(local) == {}


def test_dropped_response_says_nothing_when_it_had_no_session(recwarn: pytest.WarningsRecorder) -> None:
    app = SQLASessionMiddleware(lambda environ, start: [b"x"], "sqlite://")
    take_all(app(environ(), send_nothing))
    assert not recwarn.list


def test_abandoned_request_is_not_taken_for_an_outer_application(sqlite_engine: Engine) -> None:
    app = wrap(sqlite_engine, "generator")
    abandoned = app(request("generator", []), send_nothing)
    take_one(abandoned)
    other = app(request("generator", []), send_nothing)
    assert list(outwards(other._scope)) == [other._scope]  # type: ignore[attr-defined]
    take_all(other)
    close(other)
    with pytest.warns(ResourceWarning):
        del abandoned
    assert_given_back(sqlite_engine)
    assert dict(local) == {}


def kill_connection(engine: Engine) -> None:
    """Make the next word on the session's connection fail, as a restarted server does."""
    if engine.name == "sqlite":
        session.connection().connection.dbapi_connection.close()
        return
    statements = {
        "postgresql": ("SELECT pg_backend_pid()", "SELECT pg_terminate_backend({})"),
        "mysql": ("SELECT connection_id()", "KILL {}"),
        "mariadb": ("SELECT connection_id()", "KILL {}"),
    }
    which, kill = statements[engine.name]
    ident = session.execute(text(which)).scalar_one()
    with create_engine(engine.url).connect() as killer:
        killer.execute(text(kill.format(ident)))
    killer.engine.dispose()


# Each body in each way that servers end one on SQLite; a database server's driver is shown all bodies, and all ways.
@pytest.mark.parametrize(
    ("database_url", "kind", "server"),
    [
        pytest.param(database, kind, server, id=f"{database}-{server}-{kind}")
        for database, server, kind in product(DATABASES, SERVERS, BODIES)
        if database == "sqlite" or server == "normal end" or kind == "generator"
    ],
    indirect=["database_url"],
)
def test_pool_slot_is_freed_when_close_fails_on_a_killed_connection(
    engine: Engine, kind: str, server: str, caplog: pytest.LogCaptureFixture
) -> None:
    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        select_one()
        local.mark = session()
        body = BODIES[kind](Chunks(), environ, start)
        kill_connection(engine)
        return body

    wrapped = SQLASessionMiddleware(app, engine, session_options={"class_": RecordedSession})
    with caplog.at_level(logging.ERROR, "sqlasession_middleware"):
        serve(wrapped, request(kind, []), server)
    assert_given_back(engine)
    assert dict(local) == {}
    # PyMySQL notices only that the socket is gone where it has to read from it; either way the slot is free.
    for record in caplog.records:
        assert record.application is wrapped
        assert record.finisher == "session.remove"
    with wrapped.context():
        assert select_one() == 1


def test_application_error_is_seen_when_the_close_of_its_connection_fails_too(engine: Engine) -> None:
    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        select_one()
        kill_connection(engine)
        raise LookupError("the application's own")

    wrapped = SQLASessionMiddleware(app, engine, session_options={"class_": RecordedSession})
    with pytest.raises(LookupError, match="the application's own"):
        wrapped(environ(), send_nothing)
    assert_given_back(engine)


def test_body_close_error_is_only_logged_when_a_step_has_failed(
    sqlite_engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    class Both(Chunks):
        def close(self) -> None:
            raise ValueError("in close()")

    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        local.mark = session()
        return Both("later step", LookupError("in a step"))

    wrapped = SQLASessionMiddleware(app, sqlite_engine)
    with pytest.raises(LookupError, match="in a step"):
        take_all(wrapped(environ(), send_nothing))
    assert [record.finisher for record in caplog.records] == ["the body's close()"]
    assert_given_back(sqlite_engine)


def test_kill_during_the_cleanup_ends_the_request_and_goes_on_to_the_server(sqlite_engine: Engine) -> None:
    """A greenlet's kill may arrive while the session closes: it must be neither swallowed nor stop the cleanup."""

    class Killed(RecordedSession):
        def close(self) -> None:
            raise GreenletExit

    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        select_one()
        return [b"x"]

    wrapped = SQLASessionMiddleware(app, sqlite_engine, session_options={"class_": Killed})
    result = wrapped(environ(), send_nothing)
    with pytest.raises(GreenletExit):
        result.close()
    assert sqlite_engine.pool.checkedout() == 0
    assert not session.registry.has()
    assert dict(local) == {}


def test_session_opened_while_the_session_closes_is_closed_too(sqlite_engine: Engine) -> None:
    """An event of the closing session may use the global one again."""

    closed: list[Session] = []

    class Touching(RecordedSession):
        def close(self) -> None:
            super().close()
            closed.append(self)
            if len(closed) == 1:
                assert application.engine is sqlite_engine
                select_one()

    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        select_one()
        return [b"x"]

    wrapped = SQLASessionMiddleware(app, sqlite_engine, session_options={"class_": Touching})
    wrapped(environ(), send_nothing).close()
    assert_given_back(sqlite_engine)
    assert len(closed) == 2


def test_step_after_close_ends_the_iteration(sqlite_engine: Engine) -> None:
    for kind in CODE_IN_STEPS:
        result = wrap(sqlite_engine, kind)(request(kind, []), send_nothing)
        take_one(result)
        close(result)
        assert next(result, None) is None
        assert next(iter(result), None) is None
    assert_given_back(sqlite_engine)


@pytest.mark.parametrize("by", [iter, lambda result: result], ids=["iterator", "next()"])
@pytest.mark.parametrize("then", ["yield", "raise", "end"])
def test_response_is_over_when_it_is_closed_in_its_own_step(sqlite_engine: Engine, by: Any, then: str) -> None:
    """Or by another thread during a step: the step must not bring the scope back to life."""

    class ClosesItself(Chunks):
        def __next__(self) -> bytes:
            responses[0].close()
            if then == "raise":
                raise LookupError("after close()")
            if then == "end":
                raise StopIteration
            return b"too late"

    responses: list[Any] = []

    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        local.mark = session()
        select_one()
        return ClosesItself()

    responses.append(SQLASessionMiddleware(app, sqlite_engine)(environ(), send_nothing))
    steps = by(responses[0])
    if then == "raise":
        with pytest.raises(LookupError, match="after close"):
            next(steps)
    else:
        assert next(steps, None) is None
    assert_given_back(sqlite_engine)
    assert next(steps, None) is None
    responses[0].close()
    assert dict(local) == {}


def test_nothing_of_an_ended_request_is_put_back_when_requests_overlap(sqlite_engine: Engine) -> None:
    """The second one found the first one's scope, and must not leave it there again."""
    first, second = (wrap(sqlite_engine, "generator")(request("generator", []), send_nothing) for _ in range(2))
    first.close()
    second.close()
    assert type(current.get()) is dict
    assert_given_back(sqlite_engine)


def test_failing_close_is_logged_when_the_response_was_dropped(
    sqlite_engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    result = wrap(sqlite_engine, "iterator with close", "close")(request("iterator with close", []), send_nothing)
    with pytest.warns(ResourceWarning, match="dropped with its session open"):
        del result
    assert "that was never closed" in caplog.text
    assert_given_back(sqlite_engine)


def test_session_is_out_of_its_scope_when_its_close_fails_without_a_connection(sqlite_engine: Engine) -> None:
    class Failing(Session):
        def close(self) -> None:
            raise ValueError("close")

    app = SQLASessionMiddleware(lambda *_: [], sqlite_engine, session_options={"class_": Failing})
    with app.context():
        session()
        with pytest.raises(ValueError, match="close"):
            session.remove()
        assert not session.registry.has()


def test_other_connections_are_given_back_when_one_cannot_even_be_given_up(
    sqlite_engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Session):
        def close(self) -> None:
            raise ValueError("close")

    def refuse(connection: Connection) -> None:
        raise ValueError("invalidate")

    app = SQLASessionMiddleware(lambda *_: [], sqlite_engine, session_options={"class_": Failing})
    with app.context():
        connection = session.connection()
        monkeypatch.setattr(connection, "invalidate", lambda: refuse(connection), raising=False)
    assert "could not be invalidated either" in caplog.text
    connection.close()
