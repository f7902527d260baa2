"""Exactly once under contention: many clients write the same rows, and each 200 is one increment (G9, G11)."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from uuid import uuid4
from wsgiref.types import StartResponse, WSGIEnvironment

import pytest
from sqlalchemy import Connection, Engine, create_engine, event, func, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware.failures import Failure, classify

from ..conftest import DATABASES_SEEN
from .servers import PATIENCE

CLIENTS = 16
INCREMENTS = 50
RUN = uuid4().hex[:12]


class Base(DeclarativeBase):
    pass


class Number(Base):
    """What is counted."""

    __tablename__ = f"contention_{RUN}"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    n: Mapped[int]


class Entry(Base):
    """Which request has counted: one that counts twice is here twice."""

    __tablename__ = f"contention_{RUN}_entry"
    id: Mapped[int] = mapped_column(primary_key=True)
    client: Mapped[int]
    number: Mapped[int]


# In words, because the time goes where most of the attempts are: into SQLAlchemy.
READ = text(f"SELECT n FROM {Number.__tablename__} WHERE id = :id")
LOCK = text(f"SELECT n FROM {Number.__tablename__} WHERE id = :id FOR UPDATE")
WRITE = text(f"UPDATE {Number.__tablename__} SET n = :n WHERE id = :id")
NOTE = text(f"INSERT INTO {Entry.__tablename__} (client, number) VALUES (:client, :number)")


def increment_one(client: int) -> None:
    """Read, add, write: lost without an isolation level or lock that forbids it."""
    n = session.scalars(READ, {"id": 1}).one()
    session.execute(WRITE, {"id": 1, "n": n + 1})


def increment_two(client: int) -> None:
    """The same with two rows, locked by every second client in the opposite order."""
    for ident in (1, 2) if client % 2 else (2, 1):
        n = session.scalars(LOCK, {"id": ident}).one()
        session.execute(WRITE, {"id": ident, "n": n + 1})


class Counting:
    """The application: one increment a request.

    :param increment: called with the number of the client.
    """

    def __init__(self, increment: Callable[[int], None]) -> None:
        self.increment = increment

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        client, number = map(int, environ["PATH_INFO"].split("/")[1:])
        self.increment(client)
        session.execute(NOTE, {"client": client, "number": number})
        start_response("200 OK", [("X-Attempt", str(environ["sqlasession.attempt"]))])
        return [b"counted"]


class Clients:
    """What the clients were answered."""

    def __init__(self, app: SQLASessionMiddleware) -> None:
        self.app = app
        #: (client, number) of each request that was answered with 200
        self.counted: list[tuple[int, int]] = []
        #: how often a 200 has taken how many attempts; what became of the others
        self.attempts: Counter[int] = Counter()
        self.failures: Counter[str] = Counter()
        self.start = threading.Barrier(CLIENTS, timeout=PATIENCE)

    def run(self) -> None:
        with ThreadPoolExecutor(CLIENTS) as threads:
            for done in [threads.submit(self.run_one, client) for client in range(CLIENTS)]:
                done.result()

    def run_one(self, client: int) -> None:
        self.start.wait()
        browser = Client(self.app)
        for number in range(INCREMENTS):
            try:
                response = browser.post(f"/{client}/{number}", buffered=True)
            except DBAPIError as error:
                # The last attempt's, which a server would make a 500 of.
                self.failures[f"{classify(error)} {type(error.orig).__name__}"] += 1
            else:
                assert (response.status_code, response.data) == (200, b"counted")
                self.counted.append((client, number))
                self.attempts[int(response.headers["X-Attempt"])] += 1


@contextmanager
def counters(engine: Engine) -> Iterator[Engine]:
    Base.metadata.create_all(engine)
    try:
        with engine.begin() as connection:
            connection.execute(insert(Number), [{"id": ident, "n": 0} for ident in (1, 2)])
        yield engine
    finally:
        Base.metadata.drop_all(engine)
        engine.dispose()


def assert_counted_once(engine: Engine, increment: Callable[[int], None], attempts: int, backoff: float) -> Clients:
    app = SQLASessionMiddleware(
        Counting(increment),
        engine,
        transaction={"attempts": attempts, "backoff_base": backoff, "backoff_cap": 16 * backoff},
    )
    clients = Clients(app)
    clients.run()
    print(f"{engine.dialect.name}: attempts {sorted(clients.attempts.items())}, failures {dict(clients.failures)}")
    with engine.connect() as connection:
        totals = connection.scalars(select(Number.n).order_by(Number.id)).all()
        entries = [tuple(row) for row in connection.execute(select(Entry.client, Entry.number))]
        assert connection.scalars(select(func.max(Number.id))).one() == 2
    assert totals == [len(clients.counted), len(clients.counted) if increment is increment_two else 0]
    assert sorted(entries) == sorted(clients.counted)
    assert all(name.startswith(str(Failure.TRANSIENT)) for name in clients.failures), clients.failures
    assert len(clients.counted) + clients.failures.total() == CLIENTS * INCREMENTS
    assert engine.pool.checkedout() == 0
    # Else the test has shown nothing.
    assert max(clients.attempts) > 1
    assert len(clients.counted) > CLIENTS * INCREMENTS / 2
    return clients


def make_engine(url: str, **options: Any) -> Engine:
    return create_engine(url, pool_size=CLIENTS, max_overflow=0, pool_timeout=PATIENCE, **options)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """A traceback is logged for each attempt that failed; writing thousands of them takes longer than the test."""
    caplog.set_level(logging.ERROR, "sqlasession_middleware")


def test_increments_are_counted_once_when_postgresql_serializes() -> None:
    # How soon a commit is on the disk is not what is tested.
    options = {"options": "-c synchronous_commit=off"}
    url = DATABASES_SEEN.url("postgresql", "")
    with counters(make_engine(url, isolation_level="SERIALIZABLE", connect_args=options)) as engine:
        assert_counted_once(engine, increment_one, attempts=20, backoff=0.02)


def test_increments_are_counted_once_when_mariadb_has_deadlocks() -> None:
    url = DATABASES_SEEN.url("mariadb", "")
    with counters(make_engine(url, isolation_level="REPEATABLE READ")) as engine:
        assert_counted_once(engine, increment_two, attempts=20, backoff=0.02)


@pytest.fixture
def immediate_engine(sqlite_url: str) -> Engine:
    """Each transaction begins with BEGIN IMMEDIATE, as SQLAlchemy's documentation of pysqlite has it."""
    engine = make_engine(DATABASES_SEEN.url("sqlite", sqlite_url), connect_args={"timeout": 0})

    @event.listens_for(engine, "connect")
    def leave_transactions_alone(connection: Any, record: object) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA synchronous = OFF")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def test_increments_are_counted_once_when_sqlite_is_busy(immediate_engine: Engine) -> None:
    with counters(immediate_engine) as engine:
        assert_counted_once(engine, increment_one, attempts=20, backoff=0.02)
