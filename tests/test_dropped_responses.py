"""Responses that a server drops without ``close()``, whatever refers to them (G4)."""

from __future__ import annotations

import contextvars
import gc
import io
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from weakref import ref
from wsgiref.util import FileWrapper

import gevent
import gevent.event
import pytest
from flask import Flask
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from webob import Response as WebObResponse
from werkzeug.test import create_environ
from werkzeug.wrappers import Response as WerkzeugResponse

from sqlasession_middleware import SQLASessionMiddleware, local, session
from sqlasession_middleware._scope.scope import Scope
from sqlasession_middleware.models import SavesItself, transient_objects
from sqlasession_middleware.testing import isolated
from tests.wsgi import Environ, StartResponse, consume, environ, select_one
from tests.wsgi import start_response as send_nothing

# Where a test fails, what it did not free is freed after it.
pytestmark = pytest.mark.filterwarnings("ignore:.*was dropped with its session open:ResourceWarning")


class Base(DeclarativeBase):
    pass


class Note(SavesItself, Base):
    __tablename__ = "dropped_note"
    id: Mapped[int] = mapped_column(primary_key=True)


# -- servers, and what they do with a response before they drop it


class Server:
    """A server as wsgiref's and many others: the ``start_response`` that the application gets leads to the response."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.environ: Environ = create_environ()
        self.environ.update({"wsgi.file_wrapper": FileWrapper, "test.app": app})
        self.result: Any = None
        self.steps: Any = None

    def call(self) -> None:
        self.result = self.app(self.environ, self.start_response)

    def start_response(self, status: str, headers: Any, exc_info: Any = None) -> Callable[[bytes], None]:
        return self.write

    def write(self, data: bytes) -> None:
        pass


class ServerInEnviron(Server):
    def call(self) -> None:
        self.environ["test.server"] = self
        self.result = self.app(self.environ, send_nothing)


class ResponseInEnviron(Server):
    def call(self) -> None:
        self.result = self.environ["test.response"] = self.app(self.environ, send_nothing)


def step_once(server: Server) -> None:
    server.steps = iter(server.result)
    next(server.steps, None)


def step_twice(server: Server) -> None:
    step_once(server)
    next(server.steps, None)


def step_by_next(server: Server) -> None:
    if hasattr(server.result, "__next__"):  # A file has none.
        next(server.result, None)


def step_in_copied_contexts(server: Server) -> None:
    """As a server does that hands each step to a pool of threads."""
    server.steps = iter(server.result)
    for _ in range(2):
        contextvars.copy_context().run(next, server.steps, None)


def read_all(server: Server) -> None:
    server.steps = iter(server.result)
    for _ in server.steps:
        pass


SERVERS: dict[str, type[Server]] = {
    "start_response": Server,
    "server in environ": ServerInEnviron,
    "response in environ": ResponseInEnviron,
}
STEPS: dict[str, Callable[[Server], object]] = {
    "untouched": lambda server: None,
    "one step": step_once,
    "two steps": step_twice,
    "next()": step_by_next,
    "copied contexts": step_in_copied_contexts,
    "read": read_all,
}


# -- applications


def chunks() -> Iterator[bytes]:
    for _ in range(3):
        select_one()
        yield b"chunk"


class Sized:
    """A body with a length, which is its own iterator."""

    def __init__(self) -> None:
        self.steps = chunks()

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self.steps)


def answer(make: Callable[[Environ], Iterable[bytes]], content_type: str = "text/plain") -> Any:
    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        select_one()
        start("200 OK", [("Content-Type", content_type)])
        return make(environ)

    return app


def flask() -> Any:
    site = Flask(__name__)

    @site.get("/")
    def stream() -> Iterator[bytes]:
        select_one()
        return chunks()

    return site.wsgi_app


def writing(environ: Environ, start: StartResponse) -> Iterable[bytes]:
    select_one()
    start("200 OK", [])(b"written")
    return chunks()


def generator_as_application(environ: Environ, start: StartResponse) -> Iterator[bytes]:
    select_one()
    start("200 OK", [])
    yield from chunks()


def stored_on_the_local(environ: Environ) -> Iterable[bytes]:
    local.request = environ
    return chunks()


def stored_in_the_session(environ: Environ) -> Iterable[bytes]:
    session.info["request"] = environ
    Note().request = environ  # type: ignore[attr-defined]  # The session has the new object.
    return (b"chunk" for _ in range(3))


def caught_a_failure(environ: Environ) -> Iterable[bytes]:
    """The error leads to the frames of the application, and the scope to the error."""
    try:
        session.execute(text("SELECT * FROM nowhere"))
    except SQLAlchemyError as error:
        session.info["failure"] = error
        session.rollback()
    return chunks()


def left_a_context_open(environ: Environ) -> Iterator[bytes]:
    with environ["test.app"].context():
        local.request = environ
        yield from chunks()


def left_a_block_open(environ: Environ) -> Iterator[bytes]:
    with transient_objects():
        for chunk in chunks():
            Note()
            yield chunk


def call_again(environ: Environ, start: StartResponse) -> Iterable[bytes]:
    """The application is met a second time with the same environ, and the response is a joined one."""
    select_one()
    if environ.setdefault("test.calls", 0) == 1:
        start("200 OK", [])
        return chunks()
    environ["test.calls"] += 1
    return SQLASessionMiddleware(environ["test.app"], environ["test.app"].engine)(environ, start)


APPLICATIONS: dict[str, Any] = {
    "generator": answer(lambda environ: chunks()),
    "list": answer(lambda environ: [b"x"]),
    "sized": answer(lambda environ: Sized()),
    "events": answer(lambda environ: chunks(), "text/event-stream"),
    "file": answer(lambda environ: environ["wsgi.file_wrapper"](io.BytesIO(b"file"))),
    "write()": writing,
    "generator as application": generator_as_application,
    "Flask": flask(),
    "Werkzeug": answer(lambda environ: WerkzeugResponse(chunks())(environ, send_nothing)),
    "WebOb": answer(lambda environ: WebObResponse(app_iter=chunks())(environ, send_nothing)),
    "on the Local": answer(stored_on_the_local),
    "in the session": answer(stored_in_the_session),
    "failure": answer(caught_a_failure),
    "open context": answer(left_a_context_open),
    "open block": answer(left_a_block_open),
    "joined": call_again,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "transaction": {"transaction": True},
    "attempts": {"transaction": {"attempts": 3}},
    "unavailable": {"unavailable": True},
    "all": {"transaction": {"attempts": 3}, "unavailable": True, "report_leaks": True},
    "replicas": {"replicas": True, "binds": {"other": "sqlite://"}},
}


# -- where the server runs. Each stays, with its context, until the end of the block.


@contextmanager
def here() -> Iterator[Callable[..., Any]]:
    yield lambda function: function()


@contextmanager
def thread() -> Iterator[Callable[..., Any]]:
    with ThreadPoolExecutor(1) as pool:
        yield lambda function: pool.submit(function).result()


@contextmanager
def greenlet() -> Iterator[Callable[..., Any]]:
    over = gevent.event.Event()

    def run(function: Callable[[], None]) -> None:
        returned = gevent.event.AsyncResult()

        def serve() -> None:
            returned.set(function())
            over.wait()

        greenlets.append(gevent.spawn(serve))
        returned.get()

    greenlets: list[Any] = []
    yield run
    over.set()
    gevent.joinall(greenlets, raise_error=True)


@contextmanager
def kept_context() -> Iterator[Callable[..., Any]]:
    yield contextvars.Context().run


@contextmanager
def app_context() -> Iterator[Callable[..., Any]]:
    with SQLASessionMiddleware(APPLICATIONS["list"], "sqlite://").context():
        select_one()
        yield lambda function: function()


@contextmanager
def another_request() -> Iterator[Callable[..., Any]]:
    """The call of an application that serves others, such as a test client in a view."""

    def app(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        while True:
            select_one()
            work.pop()()
            yield b"done"

    def run(function: Callable[[], None]) -> None:
        work.append(function)
        assert next(steps) == b"done"

    work: list[Callable[[], None]] = []
    result: Any = SQLASessionMiddleware(app, "sqlite://")(environ(), send_nothing)
    steps = iter(result)
    yield run
    result.close()


PLACES = {each.__name__: each for each in (here, thread, greenlet, kept_context, app_context, another_request)}


@pytest.fixture
def engine(sqlite_url: str) -> Iterator[Engine]:
    engine = create_engine(sqlite_url, pool_size=1, max_overflow=-1)
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


def wrap(name: str, engine: Engine, options: str = "plain") -> SQLASessionMiddleware:
    chosen = dict(OPTIONS[options])
    if "replicas" in chosen:
        chosen["replicas"] = [engine.url]
    return SQLASessionMiddleware(APPLICATIONS[name], engine, metadata=Base.metadata, **chosen)


def drop(app: Any, kind: type[Server], take_steps: Callable[[Server], object]) -> ref[Server]:
    """Have a server call an application, take some steps, and drop everything."""
    server = kind(app)
    server.call()
    take_steps(server)
    return ref(server)


def assert_one_collection_frees_all(
    app: SQLASessionMiddleware,
    drop_one: Callable[[], ref[Server]],
    times: int,
    run: Callable[..., Any] = lambda function: function(),
    held: int = 0,
) -> list[warnings.WarningMessage]:
    """Drop responses, collect garbage once, and check that nothing of them is left.

    :param run: calls a function where the server is.
    :param held: the connections that others hold.
    :returns: the warnings.
    """
    dropped: list[ref[Server]] = []
    seen = dict(local)

    def drop_and_look() -> None:
        before = dict(local)
        dropped.append(drop_one())
        assert dict(local) == before

    gc.disable()
    gc.freeze()  # The collection is not to look at what was there before.
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", ResourceWarning)
            for _ in range(times):
                run(drop_and_look)
            gc.collect()
        scopes = sum(isinstance(each, Scope) for each in gc.get_objects())
        assert (sum(server() is not None for server in dropped), scopes, connections_out(app)) == (0, 0, held)
    finally:
        gc.unfreeze()
        gc.enable()
    assert dict(local) == seen
    return [each for each in warned if "dropped with its session open" in str(each.message)]


def connections_out(app: SQLASessionMiddleware) -> int:
    return sum(getattr(engine.pool, "checkedout", int)() for engine in app.engines.values())


CASES = [
    *((server, name, "plain", "one step") for server in SERVERS for name in APPLICATIONS),
    *((server, "generator", "plain", steps) for server in SERVERS for steps in STEPS),
    *(("start_response", name, "plain", steps) for name in APPLICATIONS for steps in STEPS),
    *(("start_response", name, options, "one step") for name in APPLICATIONS for options in OPTIONS),
]


@pytest.mark.parametrize(("server", "name", "options", "steps"), dict.fromkeys(CASES))
def test_dropped_responses_are_freed_by_one_collection(
    engine: Engine, server: str, name: str, options: str, steps: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = wrap(name, engine, options)
    assert_one_collection_frees_all(app, lambda: drop(app, SERVERS[server], STEPS[steps]), 3)
    assert [record for record in caplog.records if record.levelname == "ERROR" and name != "failure"] == []
    app.dispose()


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("between", ["nothing", "list", "generator", "file", "error"])
def test_a_hundred_are_freed_when_they_were_dropped_in_one_thread(engine: Engine, server: str, between: str) -> None:
    """Each leads to nothing of the one before, also when complete requests come in between."""
    app = wrap("generator", engine)

    def fail(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        raise LookupError

    def drop_one() -> ref[Server]:
        dropped = drop(app, SERVERS[server], step_once)
        if between == "error":
            with pytest.raises(LookupError):
                SQLASessionMiddleware(fail, engine)(environ(), send_nothing)
        elif between != "nothing":
            consume(wrap(between, engine)(environ(**{"wsgi.file_wrapper": FileWrapper}), send_nothing))
        return dropped

    warned = assert_one_collection_frees_all(app, drop_one, 100)
    assert len(warned) == 100


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("steps", ["untouched", "one step", "read"])
def test_dropped_responses_are_freed_while_their_server_goes_on(
    engine: Engine, server: str, place: str, steps: str
) -> None:
    app = wrap("generator", engine)
    with PLACES[place]() as run:
        warned = assert_one_collection_frees_all(app, lambda: drop(app, SERVERS[server], STEPS[steps]), 10, run)
    assert len(warned) == 10


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("steps", ["untouched", "one step", "read"])
@pytest.mark.parametrize("options", OPTIONS)
def test_dropped_responses_are_freed_when_applications_are_nested(
    engine: Engine, server: str, steps: str, options: str
) -> None:
    inner = wrap("generator", engine, options)

    def middle(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        select_one()
        return inner(environ, start)

    outer = SQLASessionMiddleware(middle, engine)
    warned = assert_one_collection_frees_all(outer, lambda: drop(outer, SERVERS[server], STEPS[steps]), 3)
    assert len(warned) == 6
    assert connections_out(inner) == 0
    inner.dispose()


@pytest.mark.parametrize("name", ["generator", "list"])
def test_dropped_responses_are_freed_when_they_are_isolated(engine: Engine, name: str) -> None:
    app = wrap(name, engine)
    with isolated(app):
        consume(app(environ(), send_nothing))
        assert connections_out(app) == 1  # The isolation's own.
        assert_one_collection_frees_all(app, lambda: drop(app, Server, step_once), 3, held=1)


class TakesConnection:
    """Is finalized before the response, and takes the connection that the pool has got back: another request may."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.itself = self
        self.taken: list[Any] = []

    def __del__(self) -> None:
        connection = self.engine.connect()
        connection.execute(text("INSERT INTO dropped_note (id) VALUES (1)"))
        self.taken.append(connection)


@pytest.mark.parametrize("name", ["generator", "list"])
@pytest.mark.parametrize("options", ["plain", "transaction"])
def test_connection_that_another_has_by_now_is_left_alone(database_url: str, name: str, options: str) -> None:
    """The pool hears from the collector first. The end of the response must not roll back what has begun since."""
    engine = create_engine(database_url, pool_size=1, max_overflow=0)
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    app = wrap(name, engine, options)
    first = TakesConnection(engine)
    taken = first.taken
    server = Server(app)
    server.environ["test.first"] = first
    del first
    server.call()
    step_once(server)
    del server
    gc.collect()
    (connection,) = taken
    assert engine.pool.checkedout() == 1
    connection.commit()
    assert connection.execute(text("SELECT id FROM dropped_note")).scalars().all() == [1]
    connection.close()
    Base.metadata.drop_all(engine)
    engine.dispose()
