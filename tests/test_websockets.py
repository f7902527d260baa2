"""Requests that become websockets, as each kind of server and library has them: none is the transaction's.

tests/integration/test_websockets.py asks the same of real servers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Integer, String, func, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqlasession_middleware import SQLASessionMiddleware, application, doom, release, session
from sqlasession_middleware.errors import ScopeError

from .wsgi import Environ, StartResponse, assert_given_back, consume, environ

UPGRADE = {"HTTP_UPGRADE": "WebSocket", "HTTP_CONNECTION": "Upgrade"}
OPTIONS: dict[str, dict[str, Any]] = {
    "a transaction": {"transaction": True},
    "attempts": {"transaction": {"attempts": 3, "backoff_base": 0}},
    "a transaction and the 503": {"transaction": True, "unavailable": True},
}


class Base(DeclarativeBase):
    pass


class Message(Base):
    __tablename__ = "websocket_message"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    text: Mapped[str] = mapped_column(String(40))


class Deadlock(Exception):  # noqa: N818
    """What a driver raises when the database wants the transaction to be repeated."""

    sqlstate = "40001"


Deadlock.__module__ = "psycopg.errors"


class Socket:
    """A server's."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, data: bytes) -> int:
        self.sent.append(data)
        return len(data)

    def fileno(self) -> int:
        return 5


Handler = Callable[[], object]


def of_gunicorn(handler: Handler) -> Any:
    def app(environ: Environ, start: StartResponse) -> Any:
        environ["gunicorn.socket"].send(b"HTTP/1.1 101 Switching Protocols")
        handler()
        raise StopIteration

    return app


def of_werkzeug(handler: Handler) -> Any:
    """Flask-Sock answers a 200 that nobody gets."""

    def app(environ: Environ, start: StartResponse) -> Any:
        environ["werkzeug.socket"].send(b"HTTP/1.1 101 Switching Protocols")
        handler()
        start("200 OK", [])
        return [b""]

    return app


def of_socketio(handler: Handler) -> Any:
    """Engine.IO raises what ends Werkzeug's connection."""

    def app(environ: Environ, start: StartResponse) -> Any:
        environ["werkzeug.socket"].send(b"HTTP/1.1 101 Switching Protocols")
        handler()
        raise ConnectionError

    return app


def of_gevent(handler: Handler) -> Any:
    def app(environ: Environ, start: StartResponse) -> Any:
        handler()
        return []

    return app


def of_generator(handler: Handler) -> Any:
    def app(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        handler()
        yield from ()

    return app


GUNICORN, WERKZEUG, GEVENT = {"gunicorn.socket": Socket}, {"werkzeug.socket": Socket}, {"wsgi.websocket": Socket}
#: How an application serves a websocket, what its server has in environ, what it raises, and what the server gets.
ENDINGS: dict[str, tuple[Any, dict[str, Any], type[Exception] | None, list[str]]] = {
    "Flask-Sock on gunicorn": (of_gunicorn, GUNICORN, StopIteration, []),
    "Flask-Sock on Werkzeug": (of_werkzeug, WERKZEUG, None, ["200 OK"]),
    "Flask-SocketIO on gunicorn": (of_gunicorn, GUNICORN, StopIteration, []),
    "Flask-SocketIO on Werkzeug": (of_socketio, WERKZEUG, ConnectionError, []),
    "gevent": (of_gevent, {}, None, []),
    "gevent, from a generator": (of_generator, {}, None, []),
    "gevent-websocket": (of_gevent, GEVENT, None, []),
    "gevent-websocket, from a generator": (of_generator, GEVENT, None, []),
}


@pytest.fixture
def make(sqlite_url: str) -> Iterator[Callable[..., SQLASessionMiddleware]]:
    made: list[SQLASessionMiddleware] = []

    def make(app: Any, **options: Any) -> SQLASessionMiddleware:
        made.append(SQLASessionMiddleware(app, sqlite_url, metadata=Base.metadata, **options))
        made[-1].init_database()
        return made[-1]

    yield make
    for each in made:
        assert_given_back(each.engine)
        each.dispose()


def call(app: Any, more: dict[str, Any], **headers: Any) -> list[str]:
    """The statuses that the server gets."""
    statuses: list[str] = []
    made = {key: value() for key, value in more.items()}
    consume(app(environ(**headers, **made), lambda status, headers, exc_info=None: statuses.append(status)))
    return statuses


def serve(app: Any, more: dict[str, Any], error: type[Exception] | None, **headers: Any) -> list[str]:
    if error is None:
        return call(app, more, **headers)
    with pytest.raises(error):
        call(app, more, **headers)
    return []


def texts(app: SQLASessionMiddleware) -> list[str]:
    with app.context():
        return list(session.scalars(select(Message.text).order_by(Message.id)))


def add(name: str) -> None:
    session.add(Message(text=name))


def insert(name: str) -> None:
    add(name)
    session.flush()


def insert_and_commit() -> None:
    insert("committed")
    session.commit()


def read() -> None:
    session.scalar(select(func.count(Message.id)))


def message_by_message() -> None:
    read()
    assert release()
    for name in ("one", "two"):
        assert application.engine.pool.checkedout() == 0
        with application.context():
            insert(name)
            session.commit()


#: What a handler does, what is stored, and what the log says is not.
HANDLERS: dict[str, tuple[Handler, list[str], str]] = {
    "does not flush": (lambda: add("lost"), [], "unsaved objects (Message)"),
    "does not commit": (lambda: insert("lost"), [], "uncommitted changes"),
    "commits": (insert_and_commit, ["committed"], ""),
    "only reads": (read, [], ""),
    "does nothing": (lambda: None, [], ""),
    "has a scope for each message": (message_by_message, ["one", "two"], ""),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("ending", ENDINGS)
def test_websocket_is_none_of_the_transactions_when(
    make: Any, ending: str, handler: str, options: Any, caplog: pytest.LogCaptureFixture
) -> None:
    serving, more, error, statuses = ENDINGS[ending]
    run, stored, left = HANDLERS[handler]
    app = make(serving(run), **options)
    with caplog.at_level(logging.WARNING, "sqlasession_middleware"):
        assert serve(app, more, error, **UPGRADE) == statuses
    assert texts(app) == stored
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == bool(left)
    assert all(message.startswith(f"The websocket at '/' has ended, and its session is rolled back with {left}: ")
               for message in messages)  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"unavailable": True}], ids=["nothing", "the 503"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_websocket_ends_as_its_server_wants_it_when_there_is_no_transaction(
    make: Any, ending: str, options: Any
) -> None:
    serving, more, error, statuses = ENDINGS[ending]
    app = make(serving(insert_and_commit), **options)
    assert serve(app, more, error, **UPGRADE) == statuses
    assert texts(app) == ["committed"]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("status", ["200 OK", "404 Not Found"])
@pytest.mark.parametrize("more", [GUNICORN, WERKZEUG, {}], ids=["gunicorn", "werkzeug", "other"])
@pytest.mark.parametrize("lazy", [False, True], ids=["list", "generator"])
def test_response_is_the_transactions_when_a_websocket_was_asked_for_and_not_made(
    make: Any, options: Any, status: str, more: Any, lazy: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Any client can ask for one, of any URL."""

    def answer(start: StartResponse) -> Iterator[bytes]:
        insert("stored")
        start(status, [])
        yield b"done"
        insert("stored, too")

    def app(environ: Environ, start: StartResponse) -> Any:
        for key in more:
            assert environ[key].fileno() == 5  # It is looked at, and not written to.
        return answer(start) if lazy else list(answer(start))

    wrapped = make(app, **options)
    assert call(wrapped, more, **UPGRADE) == [status]
    assert texts(wrapped) == (["stored", "stored, too"] if status == "200 OK" else [])
    assert caplog.records == []


@pytest.mark.parametrize("ending", [of_gunicorn, of_werkzeug])
@pytest.mark.parametrize("swallowed", [False, True])
def test_websocket_is_not_repeated_when_its_handler_fails(make: Any, ending: Any, swallowed: bool) -> None:
    """Its socket cannot be opened again."""
    calls: list[int] = []

    def handler() -> None:
        calls.append(1)
        insert("lost")
        raise Deadlock

    serving = ending(handler)

    def app(environ: Environ, start: StartResponse) -> Any:
        try:
            return serving(environ, start)
        except Deadlock:
            if not swallowed:
                raise
            start("500 Internal Server Error", [])
            return []

    wrapped = make(app, transaction={"attempts": 3, "backoff_base": 0}, unavailable=True)
    more = GUNICORN if ending is of_gunicorn else WERKZEUG
    assert serve(wrapped, more, None if swallowed else Deadlock, **UPGRADE) == (
        ["500 Internal Server Error"] if swallowed else []
    )
    assert calls == [1]
    assert texts(wrapped) == []


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_body_is_closed_when_it_fails_as_a_websocket_of_the_server(make: Any, options: Any) -> None:
    closed: list[bool] = []

    def app(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        try:
            insert("lost")
            yield b""
            raise Deadlock
        finally:
            closed.append(True)

    wrapped = make(app, **options)
    assert serve(wrapped, GEVENT, Deadlock, **UPGRADE) == []
    assert closed == [True]
    assert texts(wrapped) == []


def test_page_of_the_503_is_not_sent_when_the_socket_is_a_websocket(make: Any) -> None:
    lost = type("OperationalError", (Exception,), {"__module__": "psycopg", "sqlstate": "57P03"})

    def handler() -> None:
        raise lost

    app = make(of_gunicorn(handler), transaction=True, unavailable=True)
    assert serve(app, GUNICORN, lost, **UPGRADE) == []
    before = make(lambda environ, start: handler(), transaction=True, unavailable=True)
    assert call(before, GUNICORN, **UPGRADE) == ["503 Service Unavailable"]


def test_no_transaction_can_be_doomed_when_the_server_has_made_the_websocket(make: Any) -> None:
    def handler() -> None:
        with pytest.raises(ScopeError):
            doom()

    assert call(make(of_gevent(handler), transaction=True), GEVENT, **UPGRADE) == []


@pytest.mark.parametrize("options", [*OPTIONS.values(), {"unavailable": True}], ids=[*OPTIONS, "the 503"])
@pytest.mark.parametrize("headers", [{}, {"HTTP_UPGRADE": "h2c"}], ids=["none", "another"])
def test_end_without_a_head_is_an_error_when_no_websocket_was_asked_for(make: Any, options: Any, headers: Any) -> None:
    with pytest.raises(AssertionError, match="it has not called start_response"):
        call(make(of_gevent(read), **options), {}, **headers)
    with pytest.raises(StopIteration):
        call(make(of_gunicorn(read), **options), GUNICORN, **headers)


def test_failed_session_is_not_looked_at_when_the_websocket_ends(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    def handler() -> None:
        with pytest.raises(Exception, match="no such table"):
            session.execute(text("SELECT * FROM nowhere"))
        insert("first")
        session.add(Message(id=1, text="second"))
        with pytest.raises(Exception, match="UNIQUE"):
            session.flush()

    app = make(of_gevent(handler), transaction=True)
    assert call(app, {}, **UPGRADE) == []
    assert caplog.records == []


def test_websocket_ends_as_before_when_its_connection_is_lost(
    make: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The database cannot tell any more what was not committed."""

    def ask(*arguments: object) -> bool:
        raise ConnectionResetError

    app = make(of_gunicorn(read), transaction=True)
    monkeypatch.setattr("sqlasession_middleware._drivers.sqlite.SQLiteDriver.has_written", ask)
    assert serve(app, GUNICORN, StopIteration, **UPGRADE) == []
    assert [record.levelname for record in caplog.records] == ["WARNING"]
