"""The truth table of a transaction: status × body × fault, the expected outcomes, and the application to test.

The query string of a request says what the request does and what fails. Two tests share the table: ``test_truth.py``
uses real servers, ``tests/test_transaction_table.py`` a minimal one.

Run as a program, this module is a server.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode
from uuid import uuid4
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from sqlalchemy import (
    Connection,
    Engine,
    ForeignKeyConstraint,
    NullPool,
    String,
    create_engine,
    event,
    insert,
    select,
    text,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from werkzeug.wsgi import ClosingIterator, FileWrapper

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware.transaction import doom

#: ``token`` of the run, ``url`` of the database and name of the ``table``.
SETTINGS: dict[str, Any] = json.loads(os.environ.get("SERVED", "{}"))
#: Seconds to wait for anything that should happen soon. Long, because only a failing test waits this long.
PATIENCE = 60.0
POOL_SIZE = 3
THREADS = 6

CHUNK = b"0123456789abcdef" * 64
BODY = 3 * CHUNK
#: For a stream that a client leaves: larger than the buffers of any server or kernel.
LARGE_CHUNK = CHUNK * 64
LARGE_CHUNKS = 4096

STATUSES = {"2xx": "201 Created", "3xx": "303 See Other", "4xx": "409 Conflict", "5xx": "503 Service Unavailable"}
BODILESS = {"2xx": "204 No Content", "3xx": "304 Not Modified"}


@dataclass(frozen=True)
class Kind:
    """A kind of response.

    :param streamed: whether the client gets a part of it before the application has finished.
    :param closable: whether its body has a ``close()`` that can fail.
    :param bodiless: whether it has its own statuses, which exist only in some classes.
    """

    name: str
    streamed: bool = False
    closable: bool = False
    method: str = "GET"
    bodiless: bool = False


KINDS = {
    kind.name: kind
    for kind in (
        Kind("list"),
        Kind("empty"),
        Kind("nothing", closable=True),
        Kind("no-content", closable=True, bodiless=True),
        Kind("whole", closable=True),
        Kind("length", streamed=True, closable=True),
        Kind("generator", streamed=True, closable=True),
        Kind("late", streamed=True),
        Kind("write", streamed=True),
        Kind("write-length", streamed=True),
        Kind("write-generator", streamed=True, closable=True),
        Kind("file"),
        Kind("head", closable=True, method="HEAD"),
    )
}

#: Kinds that a test adds: the responses of frameworks, and a body in a response without one, which servers dislike.
MORE_KINDS = {
    kind.name: kind
    for kind in (
        Kind("no-content-body", bodiless=True),
        Kind("flask"),
        Kind("webob"),
        Kind("werkzeug-stream", streamed=True),
        Kind("falcon-stream", streamed=True),
    )
}

WORKS = "commit works"
COMMIT_FAILS = "commit fails"
#: The connection is lost before COMMIT is sent. MariaDB, without deferred constraints, has this failure instead.
COMMIT_LOST = "commit is lost"
#: COMMIT takes place, but the connection is lost before the database's answer arrives.
ANSWER_LOST = "answer to the commit is lost"
FLUSH_FAILS = "flush fails"
#: The application ignores the error and continues.
FLUSH_SWALLOWED = "flush fails and is ignored"
#: A statement fails and the application continues, but PostgreSQL will not commit.
GIVEN_UP = "statement fails and is ignored"
BODY_FAILS = "body fails half-way"
CLOSE_FAILS = "close fails"
LEAVES = "client leaves half-way"
KILLED = "killed in the call"
EXITS = "exits in a step"

ANYWHERE = (WORKS, FLUSH_FAILS, FLUSH_SWALLOWED, BODY_FAILS, CLOSE_FAILS, LEAVES, KILLED, EXITS)
FAULTS = {
    "sqlite": (COMMIT_FAILS, *ANYWHERE),
    "postgresql": (COMMIT_FAILS, COMMIT_LOST, ANSWER_LOST, GIVEN_UP, *ANYWHERE),
    "mariadb": (COMMIT_LOST, ANSWER_LOST, *ANYWHERE),
}
#: Faults that have an effect only if the application asks for a commit.
AT_COMMIT = (WORKS, COMMIT_FAILS, COMMIT_LOST, ANSWER_LOST, FLUSH_FAILS, FLUSH_SWALLOWED, GIVEN_UP)

#: The rows that a request stores.
ROWS = {"call", "step"}

# What a client gets: the whole response with the application's status, a whole 500, or a visibly incomplete response.
WHOLE, ERROR, CUT = "whole", "500", "cut"
#: The client has left; or the request was killed, which servers answer as they like.
ANYTHING = "anything"
STORED, NOTHING = True, False

#: The outcome of a success, by fault: for a response that is held back until the commit, and for a streamed one.
OUTCOMES = {
    WORKS: ((WHOLE, STORED), (WHOLE, STORED)),
    COMMIT_FAILS: ((ERROR, NOTHING), (CUT, NOTHING)),
    COMMIT_LOST: ((ERROR, NOTHING), (CUT, NOTHING)),
    ANSWER_LOST: ((ERROR, STORED), (CUT, STORED)),
    FLUSH_FAILS: ((ERROR, NOTHING), (CUT, NOTHING)),
    FLUSH_SWALLOWED: ((ERROR, NOTHING), (CUT, NOTHING)),
    GIVEN_UP: ((ERROR, NOTHING), (CUT, NOTHING)),
    BODY_FAILS: ((ERROR, NOTHING), (CUT, NOTHING)),
    CLOSE_FAILS: ((ANYTHING, STORED), (ANYTHING, STORED)),
    LEAVES: ((ANYTHING, STORED), (ANYTHING, NOTHING)),
    KILLED: ((ANYTHING, NOTHING), (ANYTHING, NOTHING)),
    EXITS: ((ANYTHING, NOTHING), (ANYTHING, NOTHING)),
}
#: Cases in which a failure may have stored something, or a success nothing.
DOCUMENTED = {
    "answer lost": "nobody can know what became of a COMMIT whose answer was lost, and the 500 says so",
    "close failed": "all of the body was there and is committed when a server calls close(), and some cut it then",
    "client left": "all of a response that is held back is committed before the client can see any of it",
}


class Case(NamedTuple):
    """A line of the table."""

    status_class: str
    kind: Kind
    fault: str

    def __str__(self) -> str:
        return f"{self.status_class}-{self.kind.name}-{self.fault.replace(' ', '_')}"

    @property
    def status(self) -> str:
        return (BODILESS if self.kind.bodiless else STATUSES)[self.status_class]

    @property
    def succeeds(self) -> bool:
        return self.status_class in ("2xx", "3xx")

    @property
    def outcome(self) -> tuple[str, bool]:
        """What the client gets, and whether anything is stored."""
        seen, stored = OUTCOMES[self.fault][self.kind.streamed]
        if not self.succeeds and self.fault in AT_COMMIT:
            seen = WHOLE
        return seen, stored and self.succeeds

    @property
    def is_unknown(self) -> bool:
        """Whether the client has to be told that it is not known whether anything was stored."""
        lost = self.fault in (COMMIT_LOST, ANSWER_LOST)
        return lost and self.succeeds and not self.kind.streamed and self.kind.method != "HEAD"

    @property
    def documented(self) -> str | None:
        """The reason, from DOCUMENTED, why this failure may have stored something."""
        if self.succeeds and self.fault == ANSWER_LOST:
            return DOCUMENTED["answer lost"]
        if self.succeeds and self.fault == CLOSE_FAILS:
            return DOCUMENTED["close failed"]
        if self.succeeds and self.fault == LEAVES and not self.kind.streamed:
            return DOCUMENTED["client left"]
        return None

    def query(self, ident: str, **more: str) -> str:
        """The query string that asks for this case."""
        return urlencode({"ident": ident, "case": "/".join((self.status_class, self.kind.name, self.fault)), **more})

    @classmethod
    def of(cls, text: str) -> Case:
        status_class, kind, fault = text.split("/")
        return cls(status_class, {**KINDS, **MORE_KINDS}[kind], fault)


def table(database: str, kinds: Iterable[Kind] = KINDS.values()) -> list[Case]:
    """The lines for a database."""
    return [
        Case(status_class, kind, fault)
        for status_class in STATUSES
        for kind in kinds
        if not kind.bodiless or status_class in BODILESS
        for fault in FAULTS[database]
        if fault != CLOSE_FAILS or kind.closable
    ]


def without_repetitions(cases: Iterable[Case]) -> list[Case]:
    """The lines with 2xx and 4xx, and those with 3xx and 5xx where nothing fails.

    The other lines have the same outcome, because the status is examined in one place only.
    """
    return [case for case in cases if case.status_class in ("2xx", "4xx") or case.fault == WORKS]


#: Requests whose decision differs from the status: status class, further parameters, what is stored.
DECISIONS = {
    "a failure asks for a commit": ("4xx", {"x_tm": "commit"}, STORED),
    "a success asks for a rollback": ("2xx", {"x_tm": "rollback"}, NOTHING),
    "a success is doomed": ("2xx", {"doom": "yes"}, NOTHING),
}


class Base(DeclarativeBase):
    pass


class Row(Base):
    """Each request stores one row in the call, and one in the steps of the body."""

    # Other test runs may share the database servers.
    __tablename__ = SETTINGS.get("table", f"truth_{uuid4().hex[:8]}")
    __table_args__ = (
        ForeignKeyConstraint(["parent_id"], [f"{__tablename__}.id"], deferrable=True, initially="DEFERRED").ddl_if(
            dialect=("sqlite", "postgresql")
        ),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    ident: Mapped[str] = mapped_column(String(40))
    part: Mapped[str] = mapped_column(String(10))
    parent_id: Mapped[int | None]


class Observer:
    """Looks at the database from outside of any transaction."""

    def __init__(self, url: str) -> None:
        self.engine = create_engine(url, isolation_level="AUTOCOMMIT", pool_size=1, max_overflow=0)
        hurry(self.engine)

    def stored(self, ident: str) -> set[str]:
        """The committed rows of a request."""
        with self.engine.connect() as connection:
            return set(connection.scalars(select(Row.part).where(Row.ident == ident)))


@contextmanager
def observing(url: str) -> Iterator[Observer]:
    """Create the table, yield an observer of the database, and drop the table."""
    observer = Observer(url)
    Base.metadata.create_all(observer.engine)
    try:
        yield observer
    finally:
        Base.metadata.drop_all(observer.engine)
        observer.engine.dispose()


class OnPurposeError(Exception):
    """The error that the application raises on purpose."""


class Killed(BaseException):
    """Ends a greenlet. It is not an Exception."""


class Request:
    """What one request does, and how it fails.

    The query string has ``case`` and ``ident``. It may have ``x_tm`` (a header's value), ``doom``, and ``unseen`` if
    the client leaves by closing the body, so that the request cannot wait for it to leave.
    """

    def __init__(self, truth: Truth, environ: WSGIEnvironment) -> None:
        self.truth = truth
        self.environ = environ
        self.asked = dict(parse_qsl(environ["QUERY_STRING"]))
        self.ident = self.asked["ident"]
        self.case = Case.of(self.asked["case"])
        self.kind, self.fault = self.case.kind, self.case.fault

    @property
    def leaves(self) -> bool:
        return self.fault == LEAVES and "unseen" not in self.asked

    def headers(self, length: int | None = None) -> list[tuple[str, str]]:
        found = [] if self.kind.bodiless else [("Content-Type", "text/plain; charset=utf-8")]
        if length is not None:
            if self.leaves and self.kind.streamed:
                length += LARGE_CHUNKS * len(LARGE_CHUNK)
            found.append(("Content-Length", str(length)))
        if "x_tm" in self.asked:
            found.append(("X-Tm", self.asked["x_tm"]))
        return found

    def call(self) -> None:
        """The work before the body."""
        self.truth.calls[self.ident] += 1
        self.store("call")
        if "doom" in self.asked:
            doom()
        if self.fault == KILLED:
            self.truth.tell(self.ident, "killed")
            raise Killed
        if self.leaves and not self.kind.streamed:
            self.wait_until_left()

    def steps(self) -> Iterator[bytes]:
        """The body, in three chunks. With write(), the server gets the first chunk together with the second."""
        yield CHUNK
        yield CHUNK
        if self.fault == BODY_FAILS:
            raise OnPurposeError
        if self.fault == EXITS:
            self.truth.tell(self.ident, "killed")
            raise SystemExit
        if self.leaves and self.kind.streamed:
            yield from self.large_chunks()
        self.store("step")
        self.sabotage()
        yield CHUNK

    def body(self, chunks: Iterable[bytes]) -> Iterable[bytes]:
        return ClosingIterator(chunks, self.fail) if self.fault == CLOSE_FAILS else chunks

    def fail(self) -> None:
        raise OnPurposeError

    def large_chunks(self) -> Iterator[bytes]:
        """Continue until the server stops reading, which is soon after the client has left."""
        yield LARGE_CHUNK
        self.wait_until_left()
        for _ in range(1, LARGE_CHUNKS):
            yield LARGE_CHUNK
        self.truth.problems.append(f"{self.case}: the server never noticed that the client had left")

    def wait_until_left(self) -> None:
        self.truth.tell(self.ident, "reached")
        if not self.truth.wait(self.ident, "left"):
            self.truth.problems.append(f"{self.case}: the client never left")

    def store(self, part: str) -> None:
        session.add(Row(ident=self.ident, part=part))
        session.flush()

    def sabotage(self) -> None:
        """Make the commit fail, if the case asks for it. Nothing else may fail before the commit."""
        if self.fault == COMMIT_FAILS:
            session.add(Row(ident=self.ident, part="orphan", parent_id=-1))
            session.flush()
        elif self.fault == FLUSH_FAILS:
            session.add(Row(part="nobody's"))
        elif self.fault == FLUSH_SWALLOWED:
            session.add(Row(part="nobody's"))
            with suppress(IntegrityError):
                session.flush()
        elif self.fault == GIVEN_UP:
            with suppress(IntegrityError):
                session.execute(insert(Row.__table__).values(part="nobody's"))
        elif self.fault in (COMMIT_LOST, ANSWER_LOST):
            session.connection().info["truth"] = self.fault


class Truth:
    """The application in its middleware.

    :param apps: functions that make an application for a request, by kind, for kinds without a function in this module.
    """

    def __init__(
        self,
        url: str,
        transaction: bool | dict[str, Any] = True,
        apps: dict[str, Callable[[Request], WSGIApplication]] | None = None,
    ) -> None:
        self.url = url
        self.apps = {**APPS, **(apps or {})}
        self.calls: Counter[str] = Counter()
        self.problems: list[str] = []
        self.told: set[tuple[str, str]] = set()
        self.news = threading.Condition()
        options = {"pool_size": POOL_SIZE, "max_overflow": 0, "pool_timeout": 5}
        self.app = SQLASessionMiddleware(
            self.respond, url, engine_options=options, metadata=Base.metadata, transaction=transaction
        )
        prepare(self.engine)

    @property
    def engine(self) -> Engine:
        return self.app.engine

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """The application for the server. It returns the middleware's result without a wrapper."""
        if environ["PATH_INFO"].startswith("/admin/"):
            return self.admin(environ, start_response)
        return self.app(environ, start_response)

    def respond(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        request = Request(self, environ)
        return self.apps[request.kind.name](request)(environ, start_response)

    def tell(self, ident: str, what: str) -> None:
        with self.news:
            self.told.add((ident, what))
            self.news.notify_all()

    def wait(self, ident: str, what: str) -> bool:
        """Wait until ``what`` was told. Returns False after ``PATIENCE``."""
        with self.news:
            return self.news.wait_for(lambda: (ident, what) in self.told, PATIENCE)

    def admin(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """``/admin/`` reports the state, ``/admin/left`` tells that the client left, ``/admin/reached`` waits."""
        query = dict(parse_qsl(environ["QUERY_STRING"]))
        if environ["PATH_INFO"] == "/admin/left":
            self.tell(query["ident"], "left")
        if environ["PATH_INFO"] == "/admin/reached" and not self.wait(query["ident"], "reached"):
            self.problems.append(f"{query['ident']} was never reached")
        found = {
            "token": SETTINGS["token"],
            "checked out": self.engine.pool.checkedout(),
            "problems": self.problems,
            "calls": self.calls[query.get("ident", "")],
            "killed": (query.get("ident", ""), "killed") in self.told,
        }
        body = json.dumps(found).encode()
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]


def of_list(request: Request, start_response: StartResponse) -> Iterable[bytes]:
    request.call()
    start_response(request.case.status, request.headers())
    return list(request.steps())


def of_empty(request: Request, start_response: StartResponse) -> Iterable[bytes]:
    request.call()
    start_response(request.case.status, request.headers(0))
    for _ in request.steps():
        pass
    return []


def of_nothing(request: Request, start_response: StartResponse) -> Iterable[bytes]:
    request.call()
    start_response(request.case.status, request.headers())
    return request.body(b"" for _ in request.steps())


def of_whole(request: Request, start_response: StartResponse) -> Iterable[bytes]:
    request.call()
    start_response(request.case.status, request.headers(len(BODY)))
    return request.body(map(b"".join, [request.steps()]))  # One chunk, made in the first step.


def of_length(request: Request, start_response: StartResponse) -> Iterable[bytes]:
    request.call()
    start_response(request.case.status, request.headers(len(BODY)))
    return request.body(request.steps())


def of_generator(request: Request, start_response: StartResponse) -> Iterable[bytes]:
    request.call()
    start_response(request.case.status, request.headers())
    return request.body(request.steps())


def of_late(request: Request, start_response: StartResponse) -> Iterable[bytes]:
    """The application itself is a generator, so all of its code runs in the steps of the body."""
    yield from of_generator(request, start_response)


def of_write(request: Request, start_response: StartResponse) -> Iterable[bytes]:
    request.call()
    write = start_response(request.case.status, request.headers())
    for chunk in request.steps():
        write(chunk)
    return []


def of_write_length(request: Request, start_response: StartResponse) -> Iterable[bytes]:
    request.call()
    write = start_response(request.case.status, request.headers(len(BODY)))
    for chunk in request.steps():
        write(chunk)
    return []


def of_write_generator(request: Request, start_response: StartResponse) -> Iterable[bytes]:
    request.call()
    write = start_response(request.case.status, request.headers())
    steps = request.steps()
    write(next(steps))
    return request.body(steps)


def of_file(request: Request, start_response: StartResponse) -> Iterable[bytes]:
    request.call()
    file = BytesIO(b"".join(request.steps()))
    start_response(request.case.status, request.headers(len(BODY)))
    return request.environ.get("wsgi.file_wrapper", FileWrapper)(file, len(BODY))


Handler = Callable[[Request, StartResponse], Iterable[bytes]]
HANDLERS: dict[str, Handler] = {
    "list": of_list,
    "empty": of_empty,
    "nothing": of_nothing,
    "no-content": of_nothing,
    "whole": of_whole,
    "length": of_length,
    "generator": of_generator,
    "late": of_late,
    "write": of_write,
    "write-length": of_write_length,
    "write-generator": of_write_generator,
    "file": of_file,
    "head": of_length,
}


def application_of(handler: Handler) -> Callable[[Request], WSGIApplication]:
    return lambda request: lambda environ, start_response: handler(request, start_response)


APPS = {kind: application_of(handler) for kind, handler in HANDLERS.items()}


def hurry(engine: Engine) -> None:
    """Do not wait for the disk, because no power failure is tested, and do not read the system's certificates."""

    @event.listens_for(engine, "do_connect")
    def connecting(dialect: Any, record: Any, arguments: list[Any], options: dict[str, Any]) -> None:
        if dialect.driver == "pymysql":
            options["ssl_disabled"] = True

    @event.listens_for(engine, "connect")
    def connected(connection: Any, record: Any) -> None:
        if engine.dialect.name == "sqlite":
            connection.execute("PRAGMA synchronous = OFF")
        elif engine.dialect.name == "postgresql":
            with connection.cursor() as cursor:
                cursor.execute("SET synchronous_commit = off")
            connection.commit()


def prepare(engine: Engine) -> None:
    """Have SQLite check foreign keys, and lose connections at their COMMIT if the case asks for it."""
    hurry(engine)

    @event.listens_for(engine, "connect")
    def check_foreign_keys(connection: Any, record: Any) -> None:
        if engine.dialect.name == "sqlite":
            connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "commit")
    def lose(connection: Connection) -> None:
        fault = connection.info.pop("truth", None)
        if fault is not None:
            lose_connection(connection, fault)

    @event.listens_for(engine, "checkin")
    def forget(connection: Any, record: Any) -> None:
        record.info.pop("truth", None)


def lose_connection(connection: Connection, fault: str) -> None:
    """Have the database end this connection. Returns when the connection has ended."""
    if connection.dialect.name == "postgresql":
        ask = "SELECT pg_backend_pid()"
        kill = "SELECT pg_terminate_backend(:number)"
        look = "SELECT count(*) FROM pg_stat_activity WHERE pid = :number"
    else:
        ask = "SELECT CONNECTION_ID()"
        kill = "KILL :number"
        look = "SELECT count(*) FROM information_schema.processlist WHERE id = :number"
    driver_connection: Any = connection.connection.dbapi_connection
    with driver_connection.cursor() as cursor:
        cursor.execute(ask)
        number = {"number": cursor.fetchone()[0]}
        if fault == ANSWER_LOST:
            driver_connection.commit()
            cursor.execute(ask)  # psycopg sends no COMMIT if no transaction is open.
    killer = create_engine(connection.engine.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    hurry(killer)
    deadline = time.monotonic() + PATIENCE
    with killer.connect() as other:
        other.execute(text(kill), number)
        while other.execute(text(look), number).scalar_one():
            assert time.monotonic() < deadline, f"{number} lives on"
            time.sleep(0.001)


def served() -> Truth:
    """The application for the servers."""
    return Truth(SETTINGS["url"])


def serve_waitress(port: int) -> None:
    import waitress

    waitress.serve(
        served(),
        host="127.0.0.1",
        port=port,
        threads=THREADS,
        # Otherwise, it would buffer a whole stream for a slow reader.
        outbuf_high_watermark=1 << 20,
        # It keeps the connection of a request that was killed.
        connection_limit=1000,
    )


def serve_cheroot(port: int) -> None:
    from cheroot.wsgi import Server

    Server(("127.0.0.1", port), served(), numthreads=THREADS, timeout=60).safe_start()


def serve_werkzeug(port: int) -> None:
    from werkzeug.serving import run_simple

    run_simple("127.0.0.1", port, served(), threaded=True)


def serve_a2wsgi(port: int) -> None:
    import uvicorn
    from a2wsgi import WSGIMiddleware

    uvicorn.run(WSGIMiddleware(served(), workers=THREADS), host="127.0.0.1", port=port)


if __name__ == "__main__":
    globals()[f"serve_{sys.argv[1]}"](int(sys.argv[2]))
