"""What each driver says of its connections, their transactions and its errors."""

from __future__ import annotations

import ast
import json
import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Column, Engine, Integer, MetaData, Table, create_engine, event, insert, select, text
from sqlalchemy.dialects.mysql.pymysql import MySQLDialect_pymysql
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.dialects.postgresql.psycopg2 import PGDialect_psycopg2
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import DBAPIError

from sqlasession_middleware import SQLASessionMiddleware, release, session
from sqlasession_middleware._drivers.driver import Driver
from sqlasession_middleware._drivers.failure import Failure
from sqlasession_middleware._drivers.libpq import LibpqDriver
from sqlasession_middleware._drivers.mariadb import MariaDBConnector, minding_class
from sqlasession_middleware._drivers.mysql import CompatibleWithMySQL, MySQL, MySQLDriver
from sqlasession_middleware._drivers.postgresql import CompatibleWithPostgreSQL, PostgreSQL, PostgreSQLDriver
from sqlasession_middleware._drivers.psycopg2 import Psycopg2
from sqlasession_middleware._drivers.pymysql import PyMySQL
from sqlasession_middleware._drivers.registry import (
    DRIVERS,
    UNKNOWN,
    driver_by_dialect,
    driver_of,
    driver_that_made,
    server_of_url,
)
from sqlasession_middleware._drivers.server import MAX_CONNECTIONS, Server
from sqlasession_middleware._drivers.sqlite import SQLite, SQLite3, SQLiteDriver
from sqlasession_middleware.errors import TransactionAborted

from .drivers import ROWS, Row, fake, rows_on, under_another_name
from .sources import module_files, parse
from .test_unavailable import call, kill
from .wsgi import Environ, StartResponse


def test_connection_that_is_closed_has_nothing_to_keep(database_url: str) -> None:
    engine = create_engine(database_url)
    connection = engine.connect()
    connection.close()
    assert not driver_of(connection).is_aborted(connection)
    assert not driver_of(connection).has_written(connection)
    assert not driver_of(connection).has_open_cursor(connection)
    engine.dispose()


def test_transaction_ends_when_its_connection_was_lost_and_the_application_went_on(server_url: str) -> None:
    app = SQLASessionMiddleware(lambda environ, start: [], server_url)
    with app.context():
        session.execute(select(1))
        kill(server_url)
        with pytest.raises(DBAPIError):
            session.execute(select(1))
        assert release() is True
        assert session.scalar(select(2)) == 2
    assert app.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    app.dispose()


def test_error_passes_when_the_connection_was_lost_unnoticed(server_url: str) -> None:
    app = SQLASessionMiddleware(lambda environ, start: [], server_url)
    with app.context():
        session.execute(select(1))
        kill(server_url)
        try:
            release()
        except DBAPIError as error:
            assert error.connection_invalidated  # noqa: PT017  # It may pass unnoticed as well: by then it is over.
        session.rollback()
        assert session.scalar(select(2)) == 2
    assert app.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    app.dispose()


def test_position_that_nobody_tells_any_more(server_url: str) -> None:
    """What was committed stays so, whatever becomes of the connection."""
    app = SQLASessionMiddleware(lambda environ, start: [], server_url)
    with app.context():
        session.execute(select(1))
        kill(server_url)
        assert driver_of(session.connection()).written_position(session.connection()) is None
    app.dispose()


@pytest.mark.parametrize("row", rows_on("mariadb"))
@pytest.mark.parametrize("name", ["mysql", "mariadb"])
@pytest.mark.parametrize("options", [{"stream_results": True}, {"yield_per": 1}])
def test_connection_is_kept_until_the_last_row_whatever_the_driver(row: Row, name: str, options: Any) -> None:
    url = row.url().set(drivername=row.dialect.replace("mariadb+", f"{name}+"))
    app = SQLASessionMiddleware(lambda environ, start: [], url)
    with app.context():
        rows = session.execute(text("SELECT 1 UNION SELECT 2 UNION SELECT 3"), execution_options=options)
        next(rows)
        assert release() is False
        assert len(rows.all()) == 2
        assert release() is True
        rows = session.execute(text("SELECT 1 UNION SELECT 2"), execution_options=options)
        next(rows)
        assert release() is False
        rows.close()
        assert release() is True
        assert session.scalar(select(1)) == 1
    app.dispose()


# The table: what each driver answers


@pytest.fixture(params=ROWS, ids=str)
def engine(request: pytest.FixtureRequest, sqlite_url: str) -> Iterator[Engine]:
    """An engine of each driver in turn."""
    made = create_engine(request.param.url(sqlite_url))
    yield made
    made.dispose()


@pytest.fixture
def table(engine: Engine) -> Iterator[Table]:
    """A table that no other run uses."""
    made = Table(f"drivers_{os.getpid()}", MetaData(), Column("n", Integer))
    made.create(engine)
    yield made
    made.drop(engine)


def test_each_driver_has_a_row() -> None:
    assert [driver.module for driver in DRIVERS] == [row.module for row in ROWS]


def test_driver_is_found_by_dialect_connection_and_error(engine: Engine) -> None:
    driver = driver_of(engine)
    assert driver in DRIVERS
    assert (driver.name, engine.dialect.name in driver.server.names) == (engine.dialect.driver, True)
    with engine.connect() as connection:
        assert driver_of(connection) is driver_of(engine.dialect) is driver
        assert driver_by_dialect[type(engine.dialect)] is driver
        assert driver_that_made(connection.connection.dbapi_connection) is driver
        with pytest.raises(DBAPIError) as caught:
            connection.exec_driver_sql("SELEKT 1")
    assert driver_that_made(caught.value.orig) is driver
    assert server_of_url(engine.url) is driver.server


def test_socket_is_found(engine: Engine) -> None:
    with engine.connect() as connection:
        number = driver_of(engine).file_number(connection.connection.dbapi_connection)
        if not driver_of(engine).server.is_networked:
            assert number is None
            return
        assert number is not None
        assert stat.S_ISSOCK(os.fstat(number).st_mode)
        assert UNKNOWN.file_number(connection.connection.dbapi_connection) == number
        closed = connection.connection.dbapi_connection
        connection.invalidate()
    assert driver_of(engine).file_number(closed) is None


def test_autocommit_of_the_driver_is_seen(engine: Engine) -> None:
    with engine.connect() as connection:
        assert driver_of(engine).has_autocommit(connection) is False
        if driver_of(engine).server.is_networked:
            connection.execution_options(isolation_level="AUTOCOMMIT")
            assert driver_of(engine).has_autocommit(connection) is True


def test_time_to_connect_is_limited(engine: Engine) -> None:
    argument = driver_of(engine).connect_timeout
    assert (argument is not None) is driver_of(engine).server.is_networked
    if argument is not None:
        limited = create_engine(engine.url, connect_args={argument: 3})
        limited.connect().close()
        limited.dispose()


def test_connection_that_is_read_only_refuses_to_write(engine: Engine, table: Table) -> None:
    reading = create_engine(engine.url)
    event.listen(reading, "connect", lambda made, record: driver_of(reading).make_read_only(made))
    with reading.connect() as connection:
        assert connection.execute(select(table)).all() == []
        with pytest.raises(DBAPIError) as caught:
            connection.execute(insert(table).values(n=1))
    reading.dispose()
    assert driver_of(reading).refuses_write(caught.value.orig)
    assert driver_of(reading).refuses_write(ValueError("what is written is wrong")) is False


def test_transaction_tells_that_it_has_written(engine: Engine, table: Table) -> None:
    driver = driver_of(engine)
    with engine.connect() as connection:
        connection.execute(select(table)).all()
        assert driver.has_written(connection) is not driver.server.can_tell_writes
        connection.execute(insert(table).values(n=1))
        assert driver.has_written(connection) is True


def test_transaction_tells_that_a_cursor_is_open(engine: Engine, table: Table) -> None:
    driver = driver_of(engine)
    with engine.begin() as connection:
        connection.execute(insert(table), [{"n": number} for number in range(3)])
    with engine.connect() as connection:
        assert driver.has_open_cursor(connection) is False
        with connection.execution_options(stream_results=True, max_row_buffer=1).execute(select(table)) as result:
            result.fetchone()
            assert driver.has_open_cursor(connection) is driver.server.can_tell_writes
        assert driver.has_open_cursor(connection) is False


def test_what_a_rollback_would_lose_is_told(engine: Engine, table: Table) -> None:
    driver = driver_of(engine)
    can_tell = driver.server.can_tell_writes
    with engine.begin() as connection:
        connection.execute(insert(table), [{"n": number} for number in range(3)])
    with engine.connect() as connection:
        # Before the first statement libpq and SQLite know by themselves that there is nothing.
        assert driver.has_nothing_to_lose(connection) is can_tell
        with connection.execution_options(stream_results=True, max_row_buffer=1).execute(select(table)) as result:
            result.fetchone()
            assert driver.has_something_to_lose(connection) is True
            assert driver.has_nothing_to_lose(connection) is False
        connection.execution_options(stream_results=False)
        assert driver.has_something_to_lose(connection) is not can_tell
        # PostgreSQL would have to be asked what the transaction has done.
        assert driver.has_nothing_to_lose(connection) is (can_tell and not driver.server.asks_for_writes)
        connection.execute(insert(table).values(n=1))
        assert driver.has_something_to_lose(connection) is True
        assert driver.has_nothing_to_lose(connection) is False
        connection.rollback()
        assert driver.has_nothing_to_lose(connection) is can_tell
        connection.invalidate()
        assert driver.has_nothing_to_lose(connection) is True
        assert driver.has_something_to_lose(connection) is False


@pytest.mark.parametrize("row", rows_on("postgresql", "mariadb"))
def test_cursor_tells_that_it_is_closed(row: Row) -> None:
    engine = create_engine(row.url())
    with engine.connect() as connection:
        cursor = connection.connection.cursor()
        assert driver_of(engine).is_cursor_closed(cursor) is False
        cursor.close()
        assert driver_of(engine).is_cursor_closed(cursor) is True
    engine.dispose()


def test_aborted_transaction_is_seen_and_what_follows_is_a_consequence(engine: Engine) -> None:
    driver = driver_of(engine)
    aborts = "postgresql" in driver.server.names
    with engine.connect() as connection:
        with pytest.raises(DBAPIError) as cause:
            connection.exec_driver_sql("SELECT * FROM drivers_missing")
        assert driver.is_aborted(connection) is aborts
        assert driver.is_consequence(cause.value.orig) is False
        if aborts:
            with pytest.raises(DBAPIError) as consequence:
                connection.execute(select(1))
            assert driver.is_consequence(consequence.value.orig) is True
            assert driver.has_written(connection) is driver.has_open_cursor(connection) is False
            assert driver.has_something_to_lose(connection) is False
            assert driver.has_nothing_to_lose(connection) is False
        connection.rollback()
        assert driver.is_aborted(connection) is False


#: What the servers say, by the names that the tests have for them: an error that rolls back the transaction, the limit
#: of connections, and the words of a second phase.
SERVERS: dict[str, tuple[Any, bool, tuple[str, ...]]] = {
    "postgresql": ("40P01", True, ("COMMIT PREPARED",)),
    "mariadb": (1213, True, ("XA COMMIT",)),
    "sqlite": (5, False, ()),
}


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_server_says(row: Row, sqlite_url: str) -> None:
    deadlock, has_limits, second_phase = SERVERS[row.server]
    engine = create_engine(row.url(sqlite_url))
    driver = driver_of(engine)
    assert driver.code_of(row.error(deadlock)) == deadlock
    assert driver.has_rolled_back(row.error(deadlock)) is (row.server == "mariadb")
    assert driver.has_rolled_back(row.error(1205)) is False  # a lock timeout
    assert driver.server.second_phase == second_phase
    with engine.connect() as connection:
        names = [limit.name for limit in driver.server.limits(connection)]
        assert names[:1] == ([MAX_CONNECTIONS] if has_limits else [])
        connection.rollback()
        position = driver.written_position(connection)
        assert (position is not None) is driver.server.has_positions
        assert driver.replayed_position(connection) is None  # It is no standby.
    engine.dispose()


class OtherSQLite(sqlite3.Connection):
    """As it is with an SQLite that cannot vacuum into a file, or has other words for it."""

    def execute(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
        return super().execute(statement.replace("INTO", "OUT OF"), *parameters)


@pytest.mark.parametrize("kind", [sqlite3.Connection, OtherSQLite])
def test_any_sqlite_tells_that_a_statement_is_active(kind: type, tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/any.db", connect_args={"factory": kind})
    with engine.connect() as connection:
        driver, driver_connection = driver_of(connection), connection.connection.dbapi_connection
        cursor = connection.connection.cursor()
        for _ in range(2):
            cursor.execute("SELECT 1 UNION SELECT 2")
            cursor.fetchone()
            assert driver.has_open_cursor(connection) is True
            cursor.fetchall()
            assert driver.has_open_cursor(connection) is False
        assert isinstance(driver_connection, kind)
        assert os.listdir(tmp_path) == ["any.db"]
    engine.dispose()


# Drivers and servers that are not known


def dialect_of(name: str, driver: str) -> Any:
    return type("Dialect", (), {"name": name, "driver": driver})()


class Fake:
    """As much of a Connection as is asked for."""

    closed = invalidated = False

    def __init__(self, name: str, driver: str, driver_connection: Any) -> None:
        self.dialect = dialect_of(name, driver)
        self.connection = type("Fairy", (), {"dbapi_connection": driver_connection})


def has_written(connection: Any) -> bool:
    return driver_of(connection).has_written(connection)


def has_open_cursor(connection: Any) -> bool:
    return driver_of(connection).has_open_cursor(connection)


def test_database_that_cannot_be_asked_may_have_written() -> None:
    assert has_written(Fake("oracle", "oracledb", None))
    assert not has_open_cursor(Fake("oracle", "oracledb", None))
    yugabyte = type("Connection", (), {})()
    yugabyte.info = type(
        "Info", (), {"parameter_status": staticmethod(lambda name: "11.2-YB-2.20.0"), "transaction_status": 2}
    )
    psycopg2: Any = Fake("postgresql", "psycopg2", yugabyte)
    assert has_written(psycopg2)
    assert driver_of(psycopg2).has_something_to_lose(psycopg2)
    assert has_written(Fake("postgresql", "unheard_of", object()))


@pytest.mark.parametrize(
    ("name", "driver", "kind", "server"),
    [
        ("postgresql", "psycopg2", Psycopg2, PostgreSQL),
        ("postgresql", "unheard_of", PostgreSQLDriver, PostgreSQL),
        ("cockroachdb", "psycopg2", Psycopg2, CompatibleWithPostgreSQL),
        ("mysql", "unheard_of", MySQLDriver, MySQL),
        ("mariadb", "pymysql", PyMySQL, MySQL),
        ("starrocks", "pymysql", PyMySQL, CompatibleWithMySQL),
        ("spatial", "pysqlite", SQLite3, SQLite),
        ("sqlite", "pysqlcipher", SQLiteDriver, SQLite),
        ("oracle", "oracledb", Driver, Server),
        ("oracle", None, Driver, Server),
    ],
)
def test_dialect_gets_what_is_known(name: str, driver: Any, kind: type[Driver], server: type[Server]) -> None:
    found = driver_of(dialect_of(name, driver))
    assert (type(found), type(found.server)) == (kind, server)


@pytest.mark.parametrize(
    ("base", "name", "driver", "kind", "server"),
    [
        (PGDialect_psycopg2, "redshift", "psycopg2", Psycopg2, CompatibleWithPostgreSQL),
        (PGDialect_psycopg2, "postgresql", "tracing", Psycopg2, PostgreSQL),
        (PGDialect, "redshift", "redshift_connector", PostgreSQLDriver, CompatibleWithPostgreSQL),
        (MySQLDialect_pymysql, "tidb", "tidb", PyMySQL, CompatibleWithMySQL),
    ],
)
def test_dialect_gets_what_is_known_of_those_that_it_is_derived_from(
    base: type[Dialect], name: str, driver: str, kind: type[Driver], server: type[Server]
) -> None:
    found = driver_by_dialect[type("Derived", (base,), {"name": name, "driver": driver})]
    assert (type(found), type(found.server)) == (kind, server)


#: What a dialect of another server calls itself and its driver. None is the driver's usual name.
OTHER_NAMES = pytest.mark.parametrize("driver_name", [None, "tracing"], ids=["", "another driver"])


@OTHER_NAMES
@pytest.mark.parametrize("row", rows_on("postgresql"))
def test_aborted_transaction_is_an_error_when_the_dialect_has_another_name(row: Row, driver_name: str | None) -> None:
    """As CockroachDB's and Redshift's dialects do: the driver's connection knows, whatever the server."""

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        session.execute(text("SELECT 1"))
        with pytest.raises(DBAPIError):
            session.execute(text("SELECT * FROM drivers_missing"))
        start("201 Created", [])
        return []

    wrapped = SQLASessionMiddleware(app, under_another_name(row.url(), driver=driver_name), transaction=True)
    with pytest.raises(TransactionAborted):
        call(wrapped)
    wrapped.dispose()


@OTHER_NAMES
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_driver_says_the_same_when_the_dialect_has_another_name(
    row: Row, driver_name: str | None, sqlite_url: str
) -> None:
    usual = driver_of(create_engine(row.url(sqlite_url)))
    engine = create_engine(under_another_name(row.url(sqlite_url), driver=driver_name))
    driver = driver_of(engine)
    deadlock, _, second_phase = SERVERS[row.server]
    assert driver.connect_timeout == usual.connect_timeout
    assert driver.failure_of(row.error(deadlock)) is usual.failure_of(row.error(deadlock)) is Failure.TRANSIENT
    assert driver.has_rolled_back(row.error(deadlock)) is usual.has_rolled_back(row.error(deadlock))
    assert driver.server.accepts_nul is usual.server.accepts_nul
    assert driver.server.second_phase == usual.server.second_phase == second_phase
    assert driver.server.locks_by_process is usual.server.locks_by_process
    with engine.connect() as connection:
        assert driver.is_aborted(connection) is driver.has_autocommit(connection) is False
        assert driver.is_consequence(row.error("25P02")) is usual.is_consequence(row.error("25P02"))
    engine.dispose()


def test_driver_of_mysql_that_is_not_known_has_numbers_in_one_of_two_places() -> None:
    driver = driver_of(dialect_of("mysql", "mysqlconnector"))
    assert driver.has_rolled_back(fake("mysql.connector", "words", errno=1213))
    assert driver.has_rolled_back(fake("pyodbc", 1213, "words"))
    assert not driver.has_rolled_back(fake("pyodbc", "1213", "words"))


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_driver_with_a_server_that_is_not_known_says_what_the_driver_knows(row: Row, sqlite_url: str) -> None:
    """As a dialect of CockroachDB on psycopg2."""
    engine = create_engine(row.url(sqlite_url))
    driver = driver_of(engine).working_with(Server())
    with engine.connect() as connection:
        connection.execute(select(1))
        assert driver.is_aborted(connection) is False
        assert driver.has_written(connection) is (row.server != "sqlite")
        assert driver.written_position(connection) is driver.replayed_position(connection) is None
        assert driver.server.written_position(None) is None
        assert driver.server.limits(connection) == []
        driver.begin_writing(connection)
    engine.dispose()


def test_error_of_a_driver_that_is_not_known_says_nothing() -> None:
    class Unreadable(type):
        @property
        def __module__(cls) -> str:  # type: ignore[override]
            raise RuntimeError

    for made in (ValueError(1213), None, Unreadable("Error", (Exception,), {})()):
        driver = driver_that_made(made)
        assert driver is UNKNOWN
        assert driver.failure_of(made) is driver.failure_in_commit(made) is None
        assert driver.is_consequence(made) is driver.has_rolled_back(made) is False
    connection: Any = Fake("oracle", "oracledb", type("Connection", (), {"get_autocommit": lambda self: 1})())
    assert UNKNOWN.has_autocommit(connection) is True
    assert UNKNOWN.parameter_status(None, "server_version") is UNKNOWN.file_number(None) is None
    UNKNOWN.make_read_only(None)
    assert UNKNOWN.is_made_read_only(None) is False
    assert UNKNOWN.module_without_idle_rollbacks(ast) is ast
    assert UNKNOWN.server.has_become_read_only(UNKNOWN, None, None) is False
    UNKNOWN.begin_writing(connection)
    assert [UNKNOWN.waits_of_end(None, kind) for kind in ("commit", "rollback")] == [1, 1]
    assert UNKNOWN.cancel(None, lambda: None) is True


def test_only_the_drivers_modules_ask_for_the_name_of_a_dialect() -> None:
    """``dialect.name``, ``dialect.driver`` and ``get_backend_name()`` may be shown elsewhere, and not compared."""
    found = [
        f"{module}:{node.lineno}"
        for module, path in module_files().items()
        if "._drivers" not in module
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Compare | ast.Match)
        and any(
            isinstance(part, ast.Attribute)
            and (
                part.attr == "get_backend_name"
                or (part.attr in ("name", "driver") and "dialect" in ast.unparse(part.value))
            )
            for part in ast.walk(node)
        )
    ]
    assert not found


class OfAnotherModule(PyMySQL):
    module = "json"


def test_class_of_connections_is_known_only_of_the_drivers_own_module() -> None:
    """PyMySQL may be installed as MySQLdb, and a version may have its classes elsewhere."""
    pymysql = pytest.importorskip("pymysql")
    assert PyMySQL().class_of_connections(pymysql) is not None
    assert PyMySQL().class_of_connections(ast) is None
    assert OfAnotherModule().class_of_connections(json) is None
    assert OfAnotherModule().class_of_connections(pymysql) is None


def test_connection_that_notes_no_statements_is_never_at_rest() -> None:
    connection = SimpleNamespace()
    MariaDBConnector().note_rest(connection)
    assert vars(connection) == {}


def test_what_nobody_can_ask_any_more() -> None:
    """A connection that is closed has not become read-only; a server that does not say so may have."""
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        pass
    assert driver_of(engine).has_become_read_only(connection, Exception()) is False
    engine.dispose()
    maria = driver_of(create_engine("mariadb+pymysql://"))
    assert maria.server.has_become_read_only(maria, object(), 1792) is True
    assert LibpqDriver().libpq_version(object()) == 0
    options: dict[str, Any] = {}
    for driver in (Driver(), MySQLDriver()):  # Nobody knows how they limit their waits.
        driver.prepare_ping([], options, 1)
    assert options == {}


class Unbuffered:
    """A cursor whose rows end too early."""

    arraysize = 1

    def __init__(self) -> None:
        self.ends: list[bool] = []
        self.rows: list[int] = [1, 2, 3, 4]

    def check_rows(self, is_end: bool) -> None:
        self.ends.append(is_end)

    def fetchone(self) -> int | None:
        return self.rows.pop(0) if self.rows else None

    def fetchmany(self, size: int = 0) -> list[int]:
        return [self.rows.pop(0) for _ in range(min(size or self.arraysize, len(self.rows)))]

    def fetchall(self) -> list[int]:
        rows, self.rows = self.rows, []
        return rows


def test_end_of_unbuffered_rows_is_looked_at_however_they_are_fetched() -> None:
    cursor = minding_class(Unbuffered)()
    assert (cursor.fetchone(), cursor.fetchmany(), cursor.fetchmany(2)) == (1, [2], [3, 4])
    assert (cursor.fetchmany(2), cursor.fetchone(), cursor.fetchall()) == ([], None, [])
    assert cursor.ends == [False, False, False, True, True, True]
