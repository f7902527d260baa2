"""The application that the servers of these tests serve, twice with the middleware and once without.

``/a`` and ``/b`` are two instances with an engine each. ``/bare`` answers like ``/a``, but has no middleware.
``/admin``, outside of both, reports what their requests have left behind. An application checks in every step that the
scope is its own, and ``/admin`` also reports the problems that it finds.

Run as a program, this module starts one of the servers that have no command of their own.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, ClassVar
from urllib.parse import parse_qs
from weakref import WeakSet
from wsgiref.types import StartResponse, WSGIEnvironment

from sqlalchemy import NullPool, column, create_engine, func, literal_column, select, table, text
from sqlalchemy.orm import Session
from werkzeug.wsgi import FileWrapper

from sqlasession_middleware import SQLASessionMiddleware, application, local, session
from sqlasession_middleware._scope.scope import NOTHING, current

#: Threads of every server that has threads: for eight streams at once, and for ``/admin``.
THREADS = 10
#: Connections of each engine.
POOL_SIZE = 5
#: A stream is larger than the kernel's buffers for a socket (tcp_wmem and a small receive buffer), so a reader that
#: waits makes the server wait.
STREAM_STEPS = 96
CHUNK = 128 * 1024

TEXT = ("Content-Type", "text/plain; charset=utf-8")


#: ``token`` of the run, database ``urls`` and ``tables`` by instance, the ``file`` to send.
SETTINGS: dict[str, Any] = json.loads(os.environ.get("SERVED", '{"urls": {}}'))


class OnPurposeError(Exception):
    """The error that the application raises on purpose."""


class CountedSession(Session):
    """A Session that is counted until it is closed, and recorded until it is garbage collected."""

    open: ClassVar[set[int]] = set()
    alive: ClassVar[WeakSet[CountedSession]] = WeakSet()
    opened = 0

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        CountedSession.opened += 1
        self.number = CountedSession.opened
        self.open.add(self.number)
        self.alive.add(self)

    def close(self) -> None:
        try:
            super().close()
        finally:
            self.open.discard(self.number)


class Failures(logging.Handler):
    """The finishers that failed. Records are not kept: their tracebacks would keep the session."""

    seen: ClassVar[list[str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record.getMessage())


class Body:
    """A body whose ``close()`` checks its scope, and may fail.

    :param close: called when the body is closed.
    """

    open: ClassVar[set[int]] = set()
    made = 0

    def __init__(self, chunks: Iterable[bytes], close: Callable[[], None]) -> None:
        Body.made += 1
        self.number = Body.made
        self.open.add(self.number)
        self.chunks = chunks
        self.on_close = close

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.chunks)

    def close(self) -> None:
        self.open.discard(self.number)
        self.on_close()


class SizedBody(Body):
    """The same with a length."""

    def __len__(self) -> int:
        return 1


class Served:
    """The application. A route is a method; ``ident`` identifies the request and is unique."""

    problems: ClassVar[list[str]] = []

    def __init__(self, name: str) -> None:
        self.name = name
        self.table = named_table(SETTINGS["tables"][name])

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        query = {name: values[0] for name, values in parse_qs(environ["QUERY_STRING"]).items()}
        route = environ["PATH_INFO"].strip("/").replace("-", "_")
        self.begin(query["ident"])
        handler: Callable[..., Iterable[bytes]] = getattr(self, f"route_{route}")
        return handler(environ, start_response, **query)

    def begin(self, ident: str) -> None:
        local.ident = ident
        session.info["ident"] = ident
        local.steps = []

    def check(self, ident: str) -> None:
        """Check that the scope has this request's values."""
        mine = WRAPPED[self.name]
        found = local.ident, session.info.get("ident"), application._get_current_object(), session.get_bind()
        if found != (ident, ident, mine, mine.engine):
            self.problems.append(f"{self.name} {ident} found {found}")
            raise AssertionError(self.problems[-1])

    def scalar(self, statement: Any) -> Any:
        return session.execute(statement).scalar_one()

    def answer(self, ident: str, step: object = 0) -> bytes:
        """A line that only this request gets, with a value from its database."""
        self.check(ident)
        owner = self.scalar(select(self.table.c.owner).where(self.table.c.id == 1))
        self.check(ident)
        return f"{owner} {ident} {step}\n".encode()

    def route_list(self, environ: WSGIEnvironment, start_response: StartResponse, ident: str) -> Iterable[bytes]:
        start_response("200 OK", [TEXT])
        return [self.answer(ident)]

    def route_list_long(self, environ: WSGIEnvironment, start_response: StartResponse, ident: str) -> Iterable[bytes]:
        start_response("200 OK", [TEXT])
        return [self.answer(ident, step) for step in range(3)]

    def route_list_empty(self, environ: WSGIEnvironment, start_response: StartResponse, ident: str) -> Iterable[bytes]:
        self.answer(ident)
        start_response("200 OK", [TEXT])
        return []

    def route_length(self, environ: WSGIEnvironment, start_response: StartResponse, ident: str) -> Iterable[bytes]:
        answer = self.answer(ident)
        start_response("200 OK", [TEXT, ("Content-Length", str(len(answer)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else (answer,)

    def route_empty(self, environ: WSGIEnvironment, start_response: StartResponse, ident: str) -> Iterable[bytes]:
        self.answer(ident)
        start_response("204 No Content", [])
        return []

    def route_echo(self, environ: WSGIEnvironment, start_response: StartResponse, ident: str) -> Iterable[bytes]:
        sent = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        start_response("200 OK", [TEXT])
        return [self.answer(ident), sent]

    def route_local(self, environ: WSGIEnvironment, start_response: StartResponse, ident: str) -> Iterable[bytes]:
        start_response("200 OK", [TEXT])
        return Body(self.remember(ident), partial(self.check, ident))

    def route_sized(self, environ: WSGIEnvironment, start_response: StartResponse, ident: str) -> Iterable[bytes]:
        start_response("200 OK", [TEXT])
        return SizedBody([self.answer(ident)], partial(self.check, ident))

    def remember(self, ident: str) -> Iterator[bytes]:
        for step in range(5):
            yield self.answer(ident, step)
            local.steps.append(step)
        yield repr(local.steps).encode()

    def route_stream(self, environ: WSGIEnvironment, start_response: StartResponse, ident: str) -> Iterable[bytes]:
        start_response("200 OK", [TEXT])
        chunks = (self.answer(ident, step).ljust(CHUNK, b".") for step in range(STREAM_STEPS))
        return Body(chunks, partial(self.check, ident))

    def route_late(self, environ: WSGIEnvironment, start_response: StartResponse, ident: str) -> Iterable[bytes]:
        """The head comes in the first step, which PEP 3333 allows, and the first chunks are empty."""
        yield b""
        start_response("200 OK", [TEXT, ("X-Late", "yes")])
        yield b""
        yield self.answer(ident)

    def route_write(self, environ: WSGIEnvironment, start_response: StartResponse, ident: str) -> Iterable[bytes]:
        write = start_response("200 OK", [TEXT])
        write(self.answer(ident, 0))
        write(self.answer(ident, 1))
        return [self.answer(ident, 2)]

    def route_file(self, environ: WSGIEnvironment, start_response: StartResponse, ident: str) -> Iterable[bytes]:
        self.answer(ident)
        file = open(SETTINGS["file"], "rb")  # noqa: SIM115  # The server closes it.
        size = os.fstat(file.fileno()).st_size
        start_response("200 OK", [("Content-Type", "application/octet-stream"), ("Content-Length", str(size))])
        environ["served.body"] = environ.get("wsgi.file_wrapper", FileWrapper)(file, 8192)
        return environ["served.body"]

    def route_error(self, environ: WSGIEnvironment, start_response: StartResponse, ident: str) -> Iterable[bytes]:
        self.answer(ident)
        raise OnPurposeError("call")

    def route_error_late(self, environ: WSGIEnvironment, start_response: StartResponse, ident: str) -> Iterable[bytes]:
        self.answer(ident)
        start_response("200 OK", [TEXT])
        raise OnPurposeError("call, after start_response")

    def route_error_page(self, environ: WSGIEnvironment, start_response: StartResponse, ident: str) -> Iterable[bytes]:
        """An error that the application turns into a page of its own."""
        start_response("200 OK", [TEXT])
        try:
            self.answer(ident)
            raise OnPurposeError("handled")
        except OnPurposeError:
            start_response("500 Sorry", [TEXT], sys.exc_info())
        return [b"sorry"]

    def route_error_first(self, environ: WSGIEnvironment, start_response: StartResponse, ident: str) -> Iterable[bytes]:
        start_response("200 OK", [TEXT])
        self.answer(ident)
        raise OnPurposeError("first step")
        yield b""

    def route_error_mid(self, environ: WSGIEnvironment, start_response: StartResponse, ident: str) -> Iterable[bytes]:
        """The Content-Length is longer than the answer, which breaks off."""
        start_response("200 OK", [TEXT, ("Content-Length", "1000000")])
        return self.break_off(ident)

    def break_off(self, ident: str) -> Iterator[bytes]:
        yield self.answer(ident)
        raise OnPurposeError("later step")

    def route_error_close(self, environ: WSGIEnvironment, start_response: StartResponse, ident: str) -> Iterable[bytes]:
        answer = self.answer(ident)
        start_response("200 OK", [TEXT, ("Content-Length", str(len(answer)))])
        return Body([answer], self.fail)

    def fail(self) -> None:
        raise OnPurposeError("close")

    def route_killed(
        self, environ: WSGIEnvironment, start_response: StartResponse, ident: str, then: str
    ) -> Iterable[bytes]:
        """The database ends this request's connection. Then the response ends, or executes another statement."""
        self.answer(ident)
        kill_connection(self.scalar(select(connection_number())))
        if then == "error":
            self.answer(ident)
        start_response("200 OK", [TEXT])
        return (self.answer(ident, step) for step in range(3)) if then == "error-mid" else [b"killed"]

    def route_timeout(self, environ: WSGIEnvironment, start_response: StartResponse, ident: str) -> Iterable[bytes]:
        """A greenlet's timeout, which is not an Exception, is raised while the driver waits for the database."""
        import gevent

        sleep = func.sleep if session.get_bind().dialect.name in ("mysql", "mariadb") else func.pg_sleep
        with gevent.Timeout(0.1):
            self.scalar(select(sleep(60)))
        raise AssertionError("there was no timeout")


class Bare(Served):
    """The same answers without the middleware, and so without a session or a Local."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.engine = create_engine(SETTINGS["urls"][name])

    def begin(self, ident: str) -> None:
        """Do nothing, because there is no scope."""

    def check(self, ident: str) -> None:
        """Do nothing, because there is no scope."""

    def remember(self, ident: str) -> Iterator[bytes]:
        for step in range(5):
            yield self.answer(ident, step)
        yield repr(list(range(5))).encode()

    def scalar(self, statement: Any) -> Any:
        with self.engine.connect() as connection:
            return connection.execute(statement).scalar_one()


def named_table(name: str) -> Any:
    return table(name, column("id"), column("owner"))


def connection_number() -> Any:
    name = session.get_bind().dialect.name
    return literal_column("pg_backend_pid()" if name == "postgresql" else "CONNECTION_ID()")


def kill_connection(number: int) -> None:
    """Have the database end a connection. Returns when the connection has ended."""
    engine = create_engine(SETTINGS["urls"]["a"], poolclass=NullPool, isolation_level="AUTOCOMMIT")
    if engine.dialect.name == "postgresql":
        kill = "SELECT pg_terminate_backend(:number)"
        look = "SELECT count(*) FROM pg_stat_activity WHERE pid = :number"
    else:
        kill = "KILL :number"
        look = "SELECT count(*) FROM information_schema.processlist WHERE id = :number"
    deadline = time.monotonic() + 10
    with engine.connect() as connection:
        connection.execute(text(kill), {"number": number})
        while connection.execute(text(look), {"number": number}).scalar_one():
            assert time.monotonic() < deadline, f"{number} lives on"
            time.sleep(0.01)


def admin(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    for name in ("last_exc", "last_type", "last_value", "last_traceback"):
        # A server that prints errors as the interpreter does keeps the last one here, with the objects of its frames.
        sys.__dict__.pop(name, None)
    gc.collect()
    found = {
        "token": SETTINGS["token"],
        "checked out": {name: each.engine.pool.checkedout() for name, each in WRAPPED.items()},
        "open": len(CountedSession.open),
        "alive": len(CountedSession.alive),
        "opened": CountedSession.opened,
        "bodies": len(Body.open),
        "problems": Served.problems,
        "failures": Failures.seen,
        "unwrapped": UNWRAPPED,
    }
    body = json.dumps(found).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


def wrapped(name: str) -> SQLASessionMiddleware:
    return SQLASessionMiddleware(
        Served(name),
        SETTINGS["urls"][name],
        engine_options={"pool_size": POOL_SIZE, "max_overflow": 0, "pool_timeout": 20},
        session_options={"class_": CountedSession},
    )


#: Whether a request's file reached the server unchanged, by ident.
UNWRAPPED: dict[str, bool] = {}
WRAPPED = {name: wrapped(name) for name in SETTINGS["urls"]}
MOUNTS: dict[str, Callable[[WSGIEnvironment, StartResponse], Iterable[bytes]]] = {"admin": admin, **WRAPPED}
if WRAPPED:
    MOUNTS["bare"] = Bare("a")
    # Python hides these warnings by default. Here each of them is a response that was not closed.
    warnings.filterwarnings("always", "A response or context of", ResourceWarning)
    logging.getLogger("sqlasession_middleware").addHandler(Failures())


def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """The application for the server. It returns the middleware's result without a wrapper."""
    left = current.get(NOTHING)
    if left is not NOTHING:
        Served.problems.append(f"a request before {environ['PATH_INFO']} left {left} on the Local")
    mount, _, path = environ["PATH_INFO"].lstrip("/").partition("/")
    environ["SCRIPT_NAME"] += f"/{mount}"
    environ["PATH_INFO"] = f"/{path}"
    body = MOUNTS[mount](environ, start_response)
    if "served.body" in environ and "wsgi.file_wrapper" in environ:
        UNWRAPPED[parse_qs(environ["QUERY_STRING"])["ident"][0]] = body is environ["served.body"]
    return body


def serve_waitress(port: int) -> None:
    import waitress

    # Otherwise, it would buffer a whole stream for a slow reader.
    waitress.serve(app, host="127.0.0.1", port=port, threads=THREADS, outbuf_high_watermark=1 << 20)


def serve_cheroot(port: int) -> None:
    from cheroot.wsgi import Server

    Server(("127.0.0.1", port), app, numthreads=THREADS, timeout=60).safe_start()


def serve_werkzeug(port: int) -> None:
    from werkzeug.serving import run_simple

    run_simple("127.0.0.1", port, app, threaded=True)


def serve_a2wsgi(port: int) -> None:
    import uvicorn
    from a2wsgi import WSGIMiddleware

    uvicorn.run(WSGIMiddleware(app, workers=THREADS), host="127.0.0.1", port=port)


if WRAPPED:
    # The present objects stay alive, so /admin/ does not have to search them for garbage at every request.
    gc.collect()
    gc.freeze()

if __name__ == "__main__":
    globals()[f"serve_{sys.argv[1]}"](int(sys.argv[2]))
