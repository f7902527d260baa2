"""What the guides of docs/ say of PostgreSQL and MariaDB, asked of them. The code on the pages runs on SQLite."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import pytest
from sqlalchemy import Engine, String, create_engine, event, func, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, PendingRollbackError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, release, session

from .wsgi import Environ, StartResponse

#: Seconds for what has to happen soon.
PATIENCE = 30


class Base(DeclarativeBase):
    pass


class Message(Base):
    __tablename__ = "guides_message"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    text: Mapped[str] = mapped_column(String(20))


@pytest.fixture
def other(server_url: str) -> Iterator[Engine]:
    """Another client of the database, which has one message."""
    engine = create_engine(server_url)
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(Message).values(id=1, text="old"))
    yield engine
    Base.metadata.drop_all(engine)
    engine.dispose()


# docs/retries.rst, "A query that is killed"


class Kill(NamedTuple):
    """How the query is ended on PostgreSQL and on MariaDB, and whether it comes again."""

    postgresql: str
    mariadb: str
    is_repeated: bool


KILLS = {
    "connection": Kill("SELECT pg_terminate_backend({})", "KILL CONNECTION {}", True),
    "query": Kill("SELECT pg_cancel_backend({})", "KILL QUERY {}", False),
}


@pytest.mark.parametrize("what", KILLS)
def test_query_is_repeated_only_if_its_connection_was_killed(what: str, server_url: str, other: Engine) -> None:
    postgresql = other.dialect.name == "postgresql"
    number = text("SELECT pg_backend_pid()" if postgresql else "SELECT connection_id()")
    waits = text("SELECT pg_sleep(60)" if postgresql else "SELECT sleep(60) FROM guides_message")
    running = (
        "SELECT count(*) FROM pg_stat_activity WHERE pid = {} AND query LIKE '%pg_sleep%' AND state = 'active'"
        if postgresql
        else "SELECT count(*) FROM information_schema.processlist WHERE id = {} AND info LIKE '%sleep%'"
    )
    kill = KILLS[what].postgresql if postgresql else KILLS[what].mariadb
    attempts = []

    def kill_it(victim: int) -> None:
        until = time.monotonic() + PATIENCE
        with other.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            while not connection.scalar(text(running.format(victim))) and time.monotonic() < until:
                time.sleep(0.01)
            connection.execute(text(kill.format(victim)))

    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        attempts.append(environ["sqlasession.attempt"])
        victim = session.scalar(number)
        if len(attempts) == 1:
            killer = threading.Thread(target=kill_it, args=(victim,))
            killer.start()
            try:
                session.execute(waits)
            finally:
                killer.join()
        start("200 OK", [("Content-Type", "text/plain")])
        return [b"done"]

    database = SQLASessionMiddleware(app, server_url, transaction={"attempts": 3}, unavailable=True)
    try:
        if KILLS[what].is_repeated:
            assert Client(database).get("/", buffered=True).text == "done"
            assert attempts == [1, 2]
        else:
            with pytest.raises(OperationalError):
                Client(database).get("/", buffered=True)
            assert attempts == [1]
    finally:
        database.dispose()


# docs/timeouts.rst, "Idle in transaction"


def test_transaction_that_is_idle_for_too_long_is_repeated(server_url: str, other: Engine) -> None:
    """Also after its first statement, which psycopg sends together with BEGIN."""
    postgresql = other.dialect.name == "postgresql"
    limit = {"options": "-c idle_in_transaction_session_timeout=100"}
    if not postgresql:
        limit = {"init_command": "SET SESSION idle_transaction_timeout = 1"}
    idle = (
        "SELECT count(*) FROM pg_stat_activity WHERE state = 'idle in transaction' AND datname = current_database()"
        if postgresql
        else "SELECT count(*) FROM information_schema.processlist WHERE db = database() AND id <> connection_id()"
    )
    attempts = []

    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        attempts.append(environ["sqlasession.attempt"])
        session.execute(insert(Message).values(id=2, text="new"))
        if len(attempts) == 1:
            until = time.monotonic() + PATIENCE
            with other.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                while connection.scalar(text(idle)) and time.monotonic() < until:
                    time.sleep(0.01)
        session.execute(insert(Message).values(id=3, text="new"))
        start("200 OK", [("Content-Type", "text/plain")])
        return [b"done"]

    options = {"connect_args": limit}
    database = SQLASessionMiddleware(app, server_url, transaction={"attempts": 2}, engine_options=options)
    assert Client(database).get("/", buffered=True).text == "done"
    database.dispose()
    assert attempts == [1, 2]


# docs/websockets.rst, "Long polling"


@pytest.mark.parametrize(
    ("level", "is_released", "rows_seen", "text_seen"),
    [
        ("READ COMMITTED", False, 2, "old"),
        ("REPEATABLE READ", False, 1, "old"),
        ("READ COMMITTED", True, 2, "new"),
        ("REPEATABLE READ", True, 2, "new"),
    ],
)
def test_long_poll_sees_what_is_new_after_release(
    level: str, is_released: bool, rows_seen: int, text_seen: str, server_url: str, other: Engine
) -> None:
    seen: list[Any] = []

    def poll(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        kept = session.get_one(Message, 1)
        if is_released:
            assert release()
            assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]  # It is a QueuePool.
        with other.begin() as connection:
            connection.execute(insert(Message).values(id=2, text="new"))
            connection.execute(update(Message).values(text="new"))
        seen.append(session.scalar(select(func.count(Message.id))))
        assert session.scalars(select(Message).filter_by(id=1)).one() is kept
        seen.append(kept.text)
        start("200 OK", [("Content-Type", "text/plain")])
        return [b""]

    database = SQLASessionMiddleware(poll, server_url, engine_options={"isolation_level": level})
    Client(database).get("/", buffered=True)
    database.dispose()
    assert seen == [rows_seen, text_seen]


# docs/error_pages.rst, "What the page finds without the rollback"


@pytest.mark.parametrize("by_flush", [True, False])
def test_error_page_can_query_after_a_rollback(by_flush: bool, server_url: str, other: Engine) -> None:
    count = select(func.count(Message.id))
    found: list[Any] = []

    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        try:
            if by_flush:
                session.add(Message(id=1, text="again"))
                session.flush()
            else:
                session.execute(text("INSERT INTO guides_message VALUES (1, 'again')"))
        except IntegrityError:
            try:
                found.append(session.scalar(count))
            except PendingRollbackError as error:
                found.append(type(error).__name__)
            except DBAPIError as error:
                found.append(type(error.orig).__name__)
            session.rollback()
            found.append(session.scalar(count))
        start("409 Conflict", [("Content-Type", "text/plain")])
        return [b"taken"]

    database = SQLASessionMiddleware(app, server_url, transaction={"attempts": 3})
    assert Client(database).get("/", buffered=True).status_code == 409
    database.dispose()
    if by_flush:
        assert found == ["PendingRollbackError", 1]
    elif other.dialect.name == "postgresql":
        assert found == ["InFailedSqlTransaction", 1]
    else:
        assert found == [1, 1]


# docs/production.rst, "Rotating passwords"


def test_account_of_do_connect_is_asked_for_at_each_new_connection(server_url: str, other: Engine) -> None:
    postgresql = other.dialect.name == "postgresql"
    asked = []

    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        start("200 OK", [("Content-Type", "text/plain")])
        return [str(session.scalar(text("SELECT current_user" if postgresql else "SELECT current_user()"))).encode()]

    database = SQLASessionMiddleware(app, other.url.set(username="nobody_has_this_name"))

    @event.listens_for(database.engine, "do_connect")
    def read_account(dialect: Any, record: Any, arguments: Any, options: dict[str, Any]) -> None:
        asked.append(options["user"])
        options["user"] = other.url.username

    for _ in range(2):
        assert Client(database).get("/", buffered=True).text.startswith(str(other.url.username))
    assert len(asked) == 1
    database.engine.dispose()
    assert Client(database).get("/", buffered=True).status_code == 200
    # SQLAlchemy 2.0 hands the dict on, with what the listener has put into it.
    assert len(asked) == 2
    assert asked[0] == "nobody_has_this_name"
    database.dispose()
