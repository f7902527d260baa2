"""A connection is lost in a request that reads: its client is in doubt only of what it may have written (G11)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, get_args
from uuid import uuid4
from wsgiref.types import StartResponse, WSGIEnvironment

import pytest
from sqlalchemy import URL, Column, Integer, MetaData, Table, create_engine, exists, func, insert, select, text
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, on_primary, session

from ..drivers import Row, rows_of
from .faulty_ways import Gate
from .proxy import Cut, Message, Proxy, When

NAME = f"lost_{uuid4().hex[:12]}"
ITEMS = Table(NAME, MetaData(), Column("n", Integer))
PORTS = {"postgresql": 5432, "mariadb": 3306}
ATTEMPTS = {"attempts": 3, "backoff_base": 0}

#: A function that writes, and a view of it.
WRITING = f"""
CREATE FUNCTION {NAME}_write() RETURNS integer LANGUAGE sql VOLATILE AS 'INSERT INTO {NAME} VALUES (1) RETURNING 1';
CREATE VIEW {NAME}_view AS SELECT {NAME}_write() AS n;
"""


def read() -> object:
    return session.scalars(select(ITEMS.c.n)).all()


READS: dict[str, Callable[[], object]] = {
    "a table": read,
    "the time": lambda: session.scalar(select(func.now())),
    "the server's port": lambda: session.execute(select(func.inet_server_port(), exists().where(ITEMS.c.n == 1))).all(),
}

#: What may write. A view is seen to do so where it is tried in a read-only transaction, with lazy_begin.
WRITES: dict[str, Callable[[], object]] = {
    "a row": lambda: session.execute(insert(ITEMS).values(n=1)),
    "a function of its own": lambda: session.scalar(select(getattr(func, f"{NAME}_write")())),
    "a view": lambda: session.execute(select(Table(f"{NAME}_view", MetaData(), Column("n", Integer)))).all(),
    "a connection in hand": lambda: session.connection().execute(select(ITEMS.c.n)).all(),
    "a lock": lambda: session.scalars(select(ITEMS.c.n).with_for_update()).all(),
}

#: Where a request reads, with the options that lead there through the proxy.
PLACES: dict[str, Callable[[URL, URL], dict[str, Any]]] = {
    "the only server": lambda direct, through: {"bind": through},
    "the primary": lambda direct, through: {"bind": through, "replicas": [direct]},
    "a replica": lambda direct, through: {"bind": direct, "replicas": [through]},
}


class World:
    """An application with a proxy before its database.

    :param url: of the database.
    :param options: by its own URL and the proxy's.
    """

    def __init__(
        self, stack: ExitStack, url: URL, work: Callable[[], object], options: Callable[[URL, URL], dict[str, Any]]
    ) -> None:
        backend = url.get_backend_name()
        self.work = work
        self.calls = 0
        self.proxy = stack.enter_context(Proxy(backend, str(url.host), url.port or PORTS[backend]))
        # The same messages each time, and none in TLS, which the proxy cannot read.
        connect_args = {"psycopg": {"prepare_threshold": None}, "pymysql": {"ssl_disabled": True}}
        self.app = SQLASessionMiddleware(
            self,
            engine_options={
                "pool_size": 1,
                "max_overflow": 0,
                "connect_args": connect_args.get(url.get_driver_name(), {}),
            },
            unavailable={"breaker_failures": 0},
            **options(url, url.set(host=self.proxy.host, port=self.proxy.port)),
        )
        stack.callback(self.app.dispose)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        self.calls += 1
        self.work()
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"done"]

    def ask(self) -> str:
        response = Client(self.app).get("/", buffered=True)
        return "unknown" if "not known" in response.text else response.status[:3]

    def messages(self) -> list[Message]:
        """Those of one request, on a connection that is in the pool."""
        for _ in range(3):  # The first ones of an engine and of a connection ask more.
            self.proxy.watch()
            assert self.ask() == "200"
        return list(self.proxy.messages)

    def ask_and_cut(self, cut: Cut) -> str:
        """The answer to a request whose connection is cut. Another one is in the pool then."""
        self.proxy.watch(cut)
        answer = self.ask()
        assert self.proxy.hits == 1
        self.proxy.wait_until_severed()
        self.proxy.watch()
        assert self.ask() == "200"
        return answer


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Each fault is logged with its traceback; writing hundreds of them takes longer than the tests."""
    for name in ("sqlasession_middleware", "sqlalchemy.pool"):
        caplog.set_level(logging.CRITICAL, name)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def postgresql() -> Iterator[URL]:
    url = rows_of("psycopg")[0].values[0].url()
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    ITEMS.create(engine)
    with engine.connect() as connection:
        connection.exec_driver_sql(WRITING)
        yield url
        connection.exec_driver_sql(f"DROP VIEW {NAME}_view; DROP FUNCTION {NAME}_write()")
    ITEMS.drop(engine)
    engine.dispose()


@pytest.mark.parametrize("transaction", [True, ATTEMPTS], ids=["once", "attempts"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("what", READS)
@pytest.mark.parametrize(("driver", "lazy_begin"), [("psycopg", True), ("psycopg", False), ("psycopg2", False)])
def test_nobody_is_in_doubt_of_a_read_wherever_its_connection_breaks(
    stack: ExitStack, postgresql: URL, driver: str, lazy_begin: bool, what: str, place: str, transaction: Any
) -> None:
    """In the middle of each message, and at both ends of those of the COMMIT."""

    def options(direct: URL, through: URL) -> dict[str, Any]:
        chosen = PLACES[place](direct, through)
        # A replica is passed over as long as it has not answered again.
        retry = {"replica_retry": 0} if "replicas" in chosen else {}
        return {**chosen, **retry, "transaction": transaction, "lazy_begin": lazy_begin}

    def work() -> None:
        if place == "the primary":
            on_primary()
        READS[what]()

    world = World(stack, postgresql.set(drivername=f"postgresql+{driver}"), work, options)
    for message in world.messages():
        for when in get_args(When) if message.commit else ("during",):
            answer = world.ask_and_cut(Cut(message.sender, message.number, when))
            # Nothing that may have been committed is repeated, also if only a view can have written.
            is_repeated = transaction is not True and (is_alone(what, lazy_begin) or not message.commit)
            assert answer in (("200",) if is_repeated else ("200", "503")), (message, when)


def is_alone(what: str, lazy_begin: bool) -> bool:
    """Whether the statement has a transaction of its own, in which the server refuses to write."""
    return lazy_begin and what == "a table"


@pytest.mark.parametrize("what", WRITES)
def test_client_is_in_doubt_of_what_may_have_written(stack: ExitStack, postgresql: URL, what: str) -> None:
    world = World(stack, postgresql, read, lambda direct, through: {"bind": through, "transaction": ATTEMPTS})
    world.messages()
    world.work, world.calls = WRITES[what], 0
    # A view is tried alone first, with a COMMIT of five messages.
    world.proxy.watch(Cut("client", 6 if what == "a view" else 1, "after", commit=True))
    assert (world.ask(), world.calls, world.proxy.hits) == ("unknown", 1, 1)


def test_client_is_in_doubt_when_something_was_written_on_another_database(stack: ExitStack, postgresql: URL) -> None:
    """Its COMMIT may have taken place before that of the transaction that has only read."""

    def work() -> None:
        session.execute(insert(ITEMS).values(n=1))
        session.scalar(select(func.now()), bind_arguments={"bind_key": "read"})

    def options(direct: URL, through: URL) -> dict[str, Any]:
        return {"bind": direct, "binds": {"read": through}, "transaction": True}

    world = World(stack, postgresql, work, options)
    world.messages()
    world.proxy.watch(Cut("client", 1, "after", commit=True))
    assert (world.ask(), world.proxy.hits) == ("unknown", 1)


@pytest.mark.parametrize("transaction", [True, ATTEMPTS], ids=["once", "attempts"])
@pytest.mark.parametrize("row", rows_of("pymysql", "MySQLdb"))  # The other one would block the proxy.
def test_nobody_is_in_doubt_when_a_replica_of_mariadb_is_lost(
    stack: ExitStack, postgresql: URL, row: Row, transaction: Any
) -> None:
    def options(direct: URL, through: URL) -> dict[str, Any]:
        return {"bind": direct, "replicas": [through], "replica_retry": 0, "transaction": transaction}

    world = World(stack, row.url(), lambda: session.scalar(text("SELECT 1")), options)
    commits = [message.number for message in world.messages() if message.commit and message.sender == "client"]
    for number in commits:
        for when in get_args(When):
            assert world.ask_and_cut(Cut("client", number, when)) == ("503" if transaction is True else "200")


@pytest.mark.parametrize(("what", "answer"), [("the time", "503"), ("a row", "unknown")])
def test_deadline_leaves_nobody_in_doubt_of_a_read(stack: ExitStack, postgresql: URL, what: str, answer: str) -> None:
    """A server falls silent as COMMIT is sent."""
    gate = stack.enter_context(Gate(str(postgresql.host), postgresql.port or PORTS["postgresql"]))
    work = {**READS, **WRITES}[what]

    def options(direct: URL, through: URL) -> dict[str, Any]:
        bind = direct.set(host="127.0.0.1", port=gate.port)
        return {"bind": bind, "transaction": True, "deadline": 0.7}

    world = World(stack, postgresql, work, options)
    assert world.ask() == "200"
    gate.shuts_at = b"COMMIT"
    assert world.ask() == answer
