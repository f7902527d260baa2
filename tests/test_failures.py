"""Which error means what: every code of the tables, and the real errors of real drivers on real databases."""

from __future__ import annotations

import gc
import os
import socket
import sqlite3
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import URL, Connection, Engine, NullPool, QueuePool, create_engine, event, exc, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.orm.exc import StaleDataError

from sqlasession_middleware.failures import Failure, classify
from tests.drivers import ROWS, Row, fake, rows_on
from tests.ports import free_port

LOST, TRANSIENT, UNAVAILABLE, UNKNOWN = Failure.LOST, Failure.TRANSIENT, Failure.UNAVAILABLE, Failure.UNKNOWN

# Fake errors: every code


def wrapped(error: BaseException, invalidated: bool = False) -> exc.DBAPIError:
    return exc.OperationalError("SELECT 1", {}, error, connection_invalidated=invalidated)


SQLSTATES: dict[Failure | None, str] = {
    TRANSIENT: "40000 40001 40P01 55P03",
    LOST: "08000 08003 08006 25P03 25P04 57P01 57P02 57P05",
    UNAVAILABLE: "08001 08004 25006 53300 57P03 58C00",
    UNKNOWN: "08007 40003 XXA00",
    # integrity, schema, login, aborted transaction, cancelled, disk full, internal error, program
    None: "0A000 40002 23505 42P01 28000 28P01 3D000 25P02 57014 53100 XX000 P0001",
}
MYSQL_CODES: dict[Failure | None, str] = {
    TRANSIENT: "1020 1205 1213 1412 1614 1615 3101 3572",
    LOST: "0 1053 1158 1159 1160 1161 1927 2006 2013 2055 4031",
    UNAVAILABLE: "1040 1047 1129 1203 1226 1792 1836 2002 2003 2005 2012 9001 9002 9004 9005 9006 9007 9501",
    # duplicate, missing table, login, unknown database, cancelled, statement timeouts, TLS, internal, not supported
    None: "1062 1146 1044 1045 1130 1698 1049 1317 1969 3024 2026 1815 9003",
}
SQLITE_CODES: dict[Failure | None, str] = {
    TRANSIENT: "5 261 517 773 6 262 15",
    # error, read-only, interrupted, I/O, corrupt, full, cannot open, schema, constraint
    None: "1 8 9 10 11 13 14 17 19",
}


#: Each code of each server, a string or a number as its drivers have it.
CODES: dict[str, dict[Failure | None, list[Any]]] = {
    "postgresql": {failure: line.split() for failure, line in SQLSTATES.items()},
    "mariadb": {failure: [int(code) for code in line.split()] for failure, line in MYSQL_CODES.items()},
    "sqlite": {failure: [int(code) for code in line.split()] for failure, line in SQLITE_CODES.items()},
}


def assert_all_ways(error: Exception, failure: Failure | None) -> None:
    """The same verdict on the driver's error, on SQLAlchemy's, and with what handle_error knows."""
    for each in (error, wrapped(error)):
        assert classify(each) is failure
        assert classify(each, connected=True, disconnected=False) is failure
        assert classify(each, connected=False) is (UNAVAILABLE if failure is LOST else failure)
        assert classify(each, committing=True) is (UNKNOWN if failure is LOST else failure)


@pytest.mark.parametrize(
    ("row", "code", "failure"),
    [
        pytest.param(row, code, failure, id=f"{row}-{code}")
        for row in ROWS
        for failure, codes in CODES[row.server].items()
        for code in codes
    ],
)
def test_code(row: Row, code: Any, failure: Failure | None) -> None:
    assert_all_ways(row.error(code), failure)


@pytest.mark.parametrize("row", rows_on("mariadb"))
def test_commit_of_a_node_that_was_cut_off(row: Row) -> None:
    """Galera's others may have it. Anywhere else than in COMMIT the number says nothing of this."""
    error = row.error(1180)
    for each in (error, wrapped(error)):
        assert classify(each) is None
        assert classify(each, committing=True) is UNKNOWN


@pytest.mark.parametrize(
    ("words", "failure"),
    [
        ("query_wait_timeout", UNAVAILABLE),
        ("server login has been failing, try again later (server_login_retry)", UNAVAILABLE),
        ("invalid message format", None),
    ],
)
def test_bouncer_without_a_server(words, failure):
    """PgBouncer says so on a connection that is open, and then closes it: to repeat at once would wait again."""
    for error in (fake("psycopg.errors", words, sqlstate="08P01"), fake("psycopg2.errors", words, pgcode="08P01")):
        assert classify(error) is failure
        assert classify(error, disconnected=True) is (failure or LOST)


#: What psycopg has of an error beside its code and words.
CACHED = SimpleNamespace(source_function="RevalidateCachedQuery")
AT = 'connection to server at "127.0.0.1", port 5432 failed: '


@pytest.mark.parametrize(
    ("words", "failure"),
    [
        # The server has answered.
        (AT + "FATAL:  the database system is starting up\n", UNAVAILABLE),
        (
            AT + "FATAL:  the database system is not yet accepting connections\nDETAIL:  Consistent recovery …",
            UNAVAILABLE,
        ),
        ("FATAL:  the database system is shutting down\n", UNAVAILABLE),  # libpq before 14
        (AT + "FATAL:  sorry, too many clients already", UNAVAILABLE),
        (AT + "FATAL:  remaining connection slots are reserved for roles with the SUPERUSER attribute", UNAVAILABLE),
        (AT + 'FATAL:  too many connections for database "shop"', UNAVAILABLE),
        (AT + "FATAL:  terminating connection due to administrator command", UNAVAILABLE),
        (AT + "FATAL:  no more connections allowed (max_client_conn)", UNAVAILABLE),
        (AT + "FATAL:  server login has been failing, cached error: connect failed (server_login_retry)", UNAVAILABLE),
        (AT + "FATAL:  server login has been failing, cached error: server conn crashed? (…)", UNAVAILABLE),
        (AT + "FATAL:  server login has been failing, cached error: no such user (server_login_retry)", None),
        (AT + "FATAL:  query_wait_timeout", UNAVAILABLE),
        (AT + "FATAL:  client_login_timeout (server down)", UNAVAILABLE),
        (AT + "ERROR:  pgbouncer cannot connect to server", UNAVAILABLE),
        (AT + "FATAL:  MaxClientsInSessionMode: max clients reached - in Session mode max clients are …", UNAVAILABLE),
        (AT + "FATAL:  (EMAXCONNSESSION) max clients reached in session mode - max clients are …", UNAVAILABLE),
        (AT + "FATAL:  Max client connections reached", UNAVAILABLE),
        (AT + "FATAL:  (EMAXCONN) max client connections reached, limit: 200", UNAVAILABLE),
        (AT + "FATAL:  (EMAXPROXYCONN) max proxy connections reached, limit: 200", UNAVAILABLE),
        (AT + "FATAL:  (ECHECKOUTTIMEOUT) Pool checkout timeout. Request was dropped after 60000ms", UNAVAILABLE),
        (AT + "FATAL:  Tenant or user not found", None),
        (AT + "FATAL:  failed to create a backend connection", UNAVAILABLE),
        (AT + "FATAL:  pgpool: all backend nodes are down, pgpool requires at least one valid node", UNAVAILABLE),
        (AT + "FATAL:  Timed-out waiting to acquire database connection", UNAVAILABLE),
        (AT + "ERROR:  server is not accepting clients, try another node", UNAVAILABLE),
        (AT + 'FATAL:  password authentication failed for user "shop"', None),
        (AT + 'FATAL:  no pg_hba.conf entry for host "10.0.0.1", user "shop", database "shop", no encryption', None),
        (AT + "FATAL:  Passwort-Authentifizierung für Benutzer »shop« fehlgeschlagen", None),
        (AT + "FATAL:  zu viele Verbindungen von Rolle »shop«", None),  # the limit: see the docs
        (AT + 'ВАЖНО:  пользователь "shop" не прошёл проверку подлинности (по паролю)', None),
        (
            f'{AT}Connection refused\n\tIs the server running on that host …?\n{AT}FATAL:  role "shop" does not exist',
            None,
        ),
        (
            f"{AT}Connection refused\n\tIs the server running …?\n{AT}FATAL:  the database system is starting up",
            UNAVAILABLE,
        ),
        # It has not.
        (
            AT + "Connection refused\n\tIs the server running on that host and accepting TCP/IP connections?",
            UNAVAILABLE,
        ),
        ("could not connect to server: Connection refused\n\tIs the server running on host …?", UNAVAILABLE),
        (AT + "timeout expired", UNAVAILABLE),
        ("connection timeout expired", UNAVAILABLE),
        ('could not translate host name "db" to address: Temporary failure in name resolution', UNAVAILABLE),
        ("failed to resolve host 'db': [Errno -2] Name or service not known", UNAVAILABLE),
        (AT + "session is read-only", UNAVAILABLE),
        (AT + "session is not read-only", UNAVAILABLE),
        (AT + "server is not in hot standby mode", UNAVAILABLE),
        (AT + "server closed the connection unexpectedly\n\tThis probably means …", UNAVAILABLE),
        ('connection to server on socket "/s" failed: could not receive data from server: reset', UNAVAILABLE),
        (AT + "server does not support SSL, but SSL was required", None),
        (AT + "SSL error: unexpected eof while reading", UNAVAILABLE),
        (AT + "SSL error: certificate verify failed", None),
        (AT + "SSL error: tlsv1 alert unknown ca", None),
        (AT + "fe_sendauth: no password supplied", None),
        ('connection is bad: invalid sslmode value: "nonsense"', None),
        # There was a connection.
        ("server closed the connection unexpectedly\n\tThis probably means …", LOST),
        ("FATAL:  terminating connection due to administrator command\nSSL connection has been closed", LOST),
        ("consuming input failed: SSL connection has been closed unexpectedly", LOST),
        ("consuming input failed: SSL SYSCALL error: EOF detected", LOST),
        ("consuming input failed: SSL error: unexpected eof while reading", LOST),
        ("sending query failed: could not send data to server: Broken pipe", LOST),
        ("the connection is lost", LOST),
        ("connection socket closed", LOST),
        ("the connection is closed", LOST),
        ("connection already closed", LOST),
        ("", None),
    ],
)
def test_libpq_without_sqlstate(words, failure):
    """Connections that libpq could not make have no SQLSTATE, and with psycopg2 those that it lost have none either."""
    for error in (fake("psycopg", words, sqlstate=None), fake("psycopg2", words, pgcode=None)):
        assert classify(error) is failure
        assert classify(wrapped(error)) is failure
        assert classify(wrapped(error), connected=False) is (UNAVAILABLE if failure is LOST else failure)


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (fake("psycopg", "schema version mismatch for table 42: expected 1, got 0", sqlstate="XX000"), TRANSIENT),
        (fake("psycopg", "Catalog Version Mismatch: A DDL occurred while …", sqlstate="XX000"), TRANSIENT),
        (fake("psycopg", "schema version mismatch", sqlstate="42P01"), None),
        (fake("psycopg", "cached plan must not change result type", sqlstate="0A000"), TRANSIENT),
        (fake("psycopg2", "cached plan must not change result type", pgcode="0A000"), TRANSIENT),
        (fake("psycopg", "gecachter Plan darf den Ergebnistyp nicht ändern", sqlstate="0A000", diag=CACHED), TRANSIENT),
        (fake("psycopg", "cached plan must not change result type", sqlstate="42P01"), None),
        (fake("psycopg", "FOR UPDATE is not allowed with aggregate functions", sqlstate="0A000"), None),
        (fake("psycopg", "(ECHECKOUTTIMEOUT) Pool checkout timeout. Request …", sqlstate="XX000"), UNAVAILABLE),
        (fake("psycopg2", "(EMAXCONN) max client connections reached, limit: 200", pgcode="XX000"), UNAVAILABLE),
        (fake("pymysql.err", 1815, "Internal error: Session creation failed"), UNAVAILABLE),
        (fake("MySQLdb", 1815, "Failed to create new router session for service 'rw'"), UNAVAILABLE),
        (fake("pymysql.err", 1815, "Internal error: Lost connection to backend server: network error"), UNAVAILABLE),
        (fake("pymysql.err", 1815, "Internal error: System is not ready yet. Please try again."), UNAVAILABLE),
        (fake("pymysql.err", 1815, "Internal error: st_distance_sphere"), None),
        (fake("MySQLdb", 2026, "TLS/SSL error: self-signed certificate in certificate chain"), None),
        (fake("mariadb", "TLS/SSL error: tlsv1 alert protocol version", errno=2026), None),
        (fake("pymysql.err", 1290, "The MariaDB server is running with the --read-only option so …"), UNAVAILABLE),
        (fake("pymysql.err", 1290, "The MySQL server is running with the --super-read-only option so …"), UNAVAILABLE),
        (fake("mariadb", "… with the --read_only option so …", errno=1290), UNAVAILABLE),
        (fake("pymysql.err", 1290, "The MySQL server is running with the --secure-file-priv option so …"), None),
    ],
)
def test_code_that_only_the_message_explains(error, failure):
    assert classify(error) is failure
    assert classify(wrapped(error), committing=True) is failure


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_connection_that_only_the_dialect_knows_to_be_dead(row: Row) -> None:
    error = fake(row.module, "words that no table knows")
    assert classify(wrapped(error)) is None
    assert classify(wrapped(error, invalidated=True)) is LOST
    assert classify(wrapped(error, invalidated=True), disconnected=False) is None
    assert classify(wrapped(error), disconnected=True) is LOST
    assert classify(wrapped(error), disconnected=True, committing=True) is UNKNOWN
    assert classify(wrapped(error), disconnected=True, connected=False, committing=True) is UNAVAILABLE


@pytest.mark.parametrize("failure", [TRANSIENT, UNAVAILABLE, UNKNOWN])
def test_what_the_server_said_counts_for_more_than_that_it_hung_up(failure):
    for code in SQLSTATES[failure].split():
        assert classify(wrapped(fake("psycopg", "words", sqlstate=code), invalidated=True)) is failure


def test_error_derived_from_a_driver_s():
    base = type(fake("pymysql.err"))
    assert classify(type("Deadlock", (base,), {"__module__": "shop.database"})(1213, "words")) is TRANSIENT


@pytest.mark.parametrize(
    ("error", "failure", "failure_in_commit"),
    [
        (exc.TimeoutError("QueuePool limit of size 5 overflow 10 reached"), UNAVAILABLE, UNAVAILABLE),
        (
            StaleDataError("UPDATE statement on table expected to update 1 row(s); 0 were matched."),
            TRANSIENT,
            TRANSIENT,
        ),
        (exc.DisconnectionError("checked out of a dead server"), LOST, UNKNOWN),
        (exc.InvalidatePoolError("the server has restarted"), LOST, UNKNOWN),
        (exc.PendingRollbackError("Can't reconnect until invalid transaction is rolled back."), None, None),
        (exc.StatementError("a bind processor failed", "SELECT 1", {}, ValueError("ten")), None, None),
        (exc.NoSuchModuleError("Can't load plugin"), None, None),
        (TimeoutError("timed out"), None, None),
        (ConnectionRefusedError(111, "Connection refused"), None, None),
        (fake("pymysqlish", 1213, "words"), None, None),
        (fake("unheard.of", "words", sqlstate="40001"), None, None),
        (KeyboardInterrupt(), None, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_error_of_nobody_s_driver(error, failure, failure_in_commit):
    assert classify(error) is failure
    assert classify(error, committing=True) is failure_in_commit


def raising(self: object) -> Any:
    raise RuntimeError("this cannot be read")


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_error_that_cannot_be_read(row: Row) -> None:
    unreadable = dict.fromkeys(["sqlstate", "pgcode", "errno", "args", "sqlite_errorcode"], property(raising))
    error = fake(row.module, __str__=raising, **unreadable)
    assert classify(error) is None
    assert classify(error, disconnected=True) is LOST


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.just(property(raising)),
    st.tuples(st.one_of(st.none(), st.integers(), st.text())), st.lists(st.integers()), st.builds(object),
    st.sampled_from(["40001", "XX000", 1290, 1213, -1, 2**40, classify]),
)  # fmt: skip
NAMES = ("sqlstate", "pgcode", "errno", "sqlite_errorcode", "args", "orig", "connection_invalidated")
ATTRIBUTES = st.sampled_from([*NAMES, "diag", "__str__", "__class__", "__cause__", "__getattribute__"])
MODULES = st.sampled_from(["psycopg.errors", "psycopg2", "pymysql.err", "MySQLdb", "mariadb", "sqlite3", "", None, 7])
UNSURE = st.sampled_from([None, True, False])


@given(
    MODULES, st.dictionaries(ATTRIBUTES, ANYTHING), st.sampled_from([Exception, BaseException, exc.DBAPIError]),
    st.booleans(), st.booleans(), UNSURE, UNSURE,
)  # fmt: skip
def test_never_raises(module, attributes, base, wrap, committing, connected, disconnected):
    kind = type("OperationalError", (base,), {**attributes, "__module__": module})
    error = kind.__new__(kind, "words")
    if wrap:
        outer = exc.DBAPIError("SELECT 1", {}, RuntimeError())
        outer.orig = error
        error = outer
    found = classify(error, committing=committing, connected=connected, disconnected=disconnected)
    assert found is None or type(found) is Failure


# Real errors

#: Two rows that a test may do anything with. Two runs at the same time do not share it.
TABLE = f"failures_of_{os.getpid()}"
#: A role or user that a test makes.
ACCOUNT = f"failures_of_{os.getpid()}"


class Provoked:
    """An engine, and what ``handle_error`` has said of each of its errors.

    :param url: of the server; every connection is a new one.
    """

    def __init__(self, url: URL | str, **options: Any) -> None:
        self.engine = create_engine(url, **{"poolclass": NullPool, **options})
        self.seen: list[tuple[BaseException | None, dict[str, bool]]] = []
        event.listen(self.engine, "handle_error", self.note)

    def note(self, context: Any) -> None:
        facts = {"connected": context.connection is not None, "disconnected": context.is_disconnect}
        self.seen.append((context.sqlalchemy_exception, facts))

    def error_of(self, action: Callable[[], object]) -> exc.DBAPIError:
        with pytest.raises(exc.DBAPIError) as caught:
            action()
        return caught.value

    def verdicts(self, error: exc.DBAPIError, committing: bool = False) -> set[Failure | None]:
        """On the driver's error, on SQLAlchemy's, and with what ``handle_error`` knows: they ought to be one."""
        assert error.orig is not None
        [facts] = [facts for seen, facts in self.seen if seen is error]
        return {
            classify(error.orig, committing=committing),
            classify(error, committing=committing),
            classify(error, committing=committing, **facts),
        }

    def assert_connecting_is(self, failure: Failure | None) -> None:
        assert self.verdicts(self.error_of(self.engine.connect)) == {failure}


@contextmanager
def table_on(url: URL | str, **options: Any) -> Iterator[Provoked]:
    provoked = Provoked(url, **options)
    drop = text(f"DROP TABLE IF EXISTS {TABLE}")
    try:
        with provoked.engine.begin() as connection:
            connection.execute(drop)
            connection.execute(text(f"CREATE TABLE {TABLE} (id INTEGER PRIMARY KEY, n INTEGER)"))
            connection.execute(text(f"INSERT INTO {TABLE} VALUES (1, 0), (2, 0)"))
        yield provoked
        with provoked.engine.begin() as connection:
            connection.execute(drop)
    finally:
        provoked.engine.dispose()


@pytest.fixture(params=rows_on("postgresql", "mariadb"))
def any_server(request) -> URL:
    return request.param.url()


@pytest.fixture
def rows(any_server) -> Iterator[Provoked]:
    with table_on(any_server) as provoked:
        yield provoked


@pytest.fixture(params=rows_on("postgresql"))
def postgresql(request) -> Iterator[Provoked]:
    with table_on(request.param.url()) as provoked:
        yield provoked


@pytest.fixture(params=rows_on("mariadb"))
def mariadb(request) -> Iterator[Provoked]:
    with table_on(request.param.url()) as provoked:
        yield provoked


def read(connection: Connection, row: int = 1) -> None:
    connection.execute(text(f"SELECT n FROM {TABLE} WHERE id = :row"), {"row": row}).scalar_one()


def write(connection: Connection, row: int = 1) -> None:
    connection.execute(text(f"UPDATE {TABLE} SET n = n + 1 WHERE id = :row"), {"row": row})


def test_deadlock(rows):
    """Each of two transactions waits for the row that the other one has written."""
    meeting = threading.Barrier(2, timeout=30)

    def cross(first: int, second: int) -> exc.DBAPIError | None:
        with rows.engine.connect() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SET LOCAL deadlock_timeout = '10ms'"))
            write(connection, first)
            meeting.wait()
            try:
                write(connection, second)
            except exc.DBAPIError as error:
                return error
            return None

    with ThreadPoolExecutor(2) as threads:
        errors = [error for error in threads.map(cross, (1, 2), (2, 1)) if error is not None]
    assert len(errors) == 1
    assert rows.verdicts(errors[0]) == {TRANSIENT}


def test_lock_timeout(rows):
    postgresql = rows.engine.dialect.name == "postgresql"
    limit = "SET LOCAL lock_timeout = '10ms'" if postgresql else "SET SESSION innodb_lock_wait_timeout = 0"
    with rows.engine.connect() as holder, rows.engine.connect() as waiter:
        write(holder)
        waiter.execute(text(limit))
        assert rows.verdicts(rows.error_of(lambda: write(waiter))) == {TRANSIENT}


def test_lock_that_is_not_waited_for(rows):
    query = text(f"SELECT n FROM {TABLE} WHERE id = 1 FOR UPDATE NOWAIT")
    with rows.engine.connect() as holder, rows.engine.connect() as waiter:
        write(holder)
        assert rows.verdicts(rows.error_of(lambda: waiter.execute(query))) == {TRANSIENT}


def test_row_that_has_changed_since_it_was_read(rows):
    """PostgreSQL's 40001, MariaDB's 1020."""
    engine = rows.engine.execution_options(isolation_level="REPEATABLE READ")
    with engine.connect() as slow, engine.connect() as fast:
        if engine.dialect.name != "postgresql":
            slow.execute(text("SET SESSION innodb_snapshot_isolation = ON"))
        read(slow)
        write(fast)
        fast.commit()
        assert rows.verdicts(rows.error_of(lambda: write(slow))) == {TRANSIENT}


def test_serialization_failure_that_commit_reports(postgresql):
    """The server has said that it undid the transaction: the outcome is known."""
    engine = postgresql.engine.execution_options(isolation_level="SERIALIZABLE")
    with engine.connect() as one, engine.connect() as other:
        for connection, row in ((one, 1), (other, 2)):
            connection.execute(text(f"SELECT sum(n) FROM {TABLE}")).scalar_one()
            write(connection, row)
        one.commit()
        assert postgresql.verdicts(postgresql.error_of(other.commit), committing=True) == {TRANSIENT}


def kill(engine: Engine, victim: Connection) -> None:
    """End the server's side of a connection of this test, and wait until it has ended."""
    if engine.dialect.name == "postgresql":
        number = victim.execute(text("SELECT pg_backend_pid()")).scalar_one()
        with engine.connect() as killer:
            assert killer.execute(text("SELECT pg_terminate_backend(:number, 10000)"), {"number": number}).scalar_one()
        return
    number = victim.execute(text("SELECT connection_id()")).scalar_one()
    query = text("SELECT count(*) FROM information_schema.processlist WHERE id = :number")
    deadline = time.monotonic() + 10
    with engine.connect() as killer:
        killer.execute(text(f"KILL {number}"))
        while killer.execute(query, {"number": number}).scalar_one():
            assert time.monotonic() < deadline
            time.sleep(0.005)


def test_connection_killed_in_a_transaction(rows):
    with rows.engine.connect() as connection:
        write(connection)
        kill(rows.engine, connection)
        assert rows.verdicts(rows.error_of(lambda: read(connection))) == {LOST}


def test_connection_killed_before_commit(rows):
    """The client cannot tell this from a COMMIT whose answer was lost."""
    with rows.engine.connect() as connection:
        write(connection)
        kill(rows.engine, connection)
        assert rows.verdicts(rows.error_of(connection.commit), committing=True) == {UNKNOWN}


def test_query_that_kills_its_own_connection(rows):
    """The server's last words reach the client: MariaDB's 1927."""
    with rows.engine.connect() as connection:
        query = "SELECT pg_terminate_backend(pg_backend_pid())"
        if connection.dialect.name != "postgresql":
            query = f"KILL {connection.execute(text('SELECT connection_id()')).scalar_one()}"
        assert rows.verdicts(rows.error_of(lambda: connection.execute(text(query)))) == {LOST}


def test_connection_refused(any_server):
    Provoked(any_server.set(port=free_port())).assert_connecting_is(UNAVAILABLE)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_such_socket(any_server, tmp_path):
    option = "host" if any_server.get_backend_name() == "postgresql" else "unix_socket"
    path = {option: str(tmp_path if option == "host" else tmp_path / "socket")}
    url = URL.create(any_server.drivername, any_server.username, database=any_server.database)
    Provoked(url, connect_args=path).assert_connecting_is(UNAVAILABLE)
    gc.collect()  # PyMySQL does not close the socket that it could not connect: the warning must come here.


def test_host_unknown(any_server):
    Provoked(any_server.set(host="host.invalid")).assert_connecting_is(UNAVAILABLE)


#: As much of MariaDB's greeting as asks for TLS ("Initial Handshake Packet").
GREETING = (
    b"\x0a5.5.5-10.11.19-MariaDB\0"
    + struct.pack("<I8sxHBHHB10x12sx", 7, b"nonsense", 0xAA0B, 45, 2, 0x0F, 21, b"and nonsense")
    + b"mysql_native_password\0"
)


def hang_up_at_once(accepted: socket.socket) -> None:
    pass


def hang_up_in_postgresqls_handshake(accepted: socket.socket) -> None:
    accepted.recv(8)
    accepted.sendall(b"S")
    accepted.recv(4096)


def hang_up_in_mariadbs_handshake(accepted: socket.socket) -> None:
    accepted.sendall(len(GREETING).to_bytes(4, "little") + GREETING)
    accepted.recv(36)
    accepted.recv(4096)


@contextmanager
def hanging_up(after: Callable[[socket.socket], None] = hang_up_at_once) -> Iterator[int]:
    """The port of a server that accepts a connection and closes it.

    :param after: what it does before.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)

        def hang_up() -> None:
            try:
                while True:
                    accepted, _ = listener.accept()
                    with accepted, suppress(OSError):
                        after(accepted)
            except OSError:
                pass

        thread = threading.Thread(target=hang_up)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_server_that_hangs_up_on_new_connections(any_server):
    with hanging_up() as port:
        provoked = Provoked(any_server.set(port=port))
        error = provoked.error_of(provoked.engine.connect)
    [(_, facts)] = provoked.seen
    assert classify(error, **facts) is UNAVAILABLE


HANDSHAKES = {"postgresql": hang_up_in_postgresqls_handshake, "mariadb": hang_up_in_mariadbs_handshake}
#: What makes a driver ask for TLS.
TLS: dict[str, dict[str, Any]] = {
    "psycopg": {"sslmode": "require"},
    "psycopg2": {"sslmode": "require"},
    "pymysql": {"ssl": {"check_hostname": False}},
    "MySQLdb": {"ssl_mode": "REQUIRED"},
    "mariadb": {"ssl": True},
}


@pytest.mark.parametrize("row", rows_on("postgresql", "mariadb"))
def test_server_that_hangs_up_in_the_handshake_of_tls(row: Row) -> None:
    """As the load balancer of a server that is restarting does."""
    with hanging_up(HANDSHAKES[row.server]) as port:
        url = row.url().set(host="127.0.0.1", port=port)
        provoked = Provoked(url, connect_args=TLS[row.module])
        error = provoked.error_of(provoked.engine.connect)
    [(_, facts)] = provoked.seen
    assert classify(error, **facts) is UNAVAILABLE


def test_login_as_nobody(any_server):
    Provoked(any_server.set(username=f"{ACCOUNT}_nobody")).assert_connecting_is(None)


def test_wrong_password(mariadb):
    """PostgreSQL asks for none where it trusts everybody, as test servers do: its words are in the table above."""
    Provoked(mariadb.engine.url.set(password="wrong")).assert_connecting_is(None)


def test_no_such_database(any_server):
    Provoked(any_server.set(database=f"{ACCOUNT}_nothing")).assert_connecting_is(None)


def test_too_many_connections_of_a_role(postgresql):
    with postgresql.engine.begin() as connection:
        connection.execute(text(f"CREATE ROLE {ACCOUNT} LOGIN CONNECTION LIMIT 0"))
    try:
        Provoked(postgresql.engine.url.set(username=ACCOUNT)).assert_connecting_is(UNAVAILABLE)
    finally:
        with postgresql.engine.begin() as connection:
            connection.execute(text(f"DROP ROLE {ACCOUNT}"))


def test_too_many_connections_of_a_user(mariadb):
    name = f"'{ACCOUNT}'@'%'"
    with mariadb.engine.begin() as connection:
        connection.execute(text(f"CREATE USER {name} IDENTIFIED BY 'secret' WITH MAX_USER_CONNECTIONS 1"))
        connection.execute(text(f"GRANT SELECT ON {TABLE} TO {name}"))
    try:
        provoked = Provoked(mariadb.engine.url.set(username=ACCOUNT, password="secret"))
        with provoked.engine.connect():
            provoked.assert_connecting_is(UNAVAILABLE)
    finally:
        with mariadb.engine.begin() as connection:
            connection.execute(text(f"DROP USER {name}"))


def test_write_in_a_read_only_transaction(rows):
    """What a standby answers to a write, provoked in the way that cannot be told from it."""
    with rows.engine.connect() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SET TRANSACTION READ ONLY"))
        else:
            connection.execute(text("SET SESSION TRANSACTION READ ONLY"))
            connection.commit()
        assert rows.verdicts(rows.error_of(lambda: write(connection))) == {UNAVAILABLE}


@pytest.mark.parametrize(
    "statement",
    [
        pytest.param(f"INSERT INTO {TABLE} VALUES (1, 1)", id="unique violation"),
        pytest.param(f"SELECT * FROM {TABLE}_missing", id="missing table"),
        pytest.param(f"SELECT missing FROM {TABLE}", id="missing column"),
        pytest.param("SELEKT 1", id="syntax error"),
    ],
)
def test_mistake_of_the_program(rows, statement):
    with rows.engine.connect() as connection:
        assert rows.verdicts(rows.error_of(lambda: connection.execute(text(statement)))) == {None}


def test_query_that_took_too_long(rows):
    with rows.engine.connect() as connection:
        query = "SET STATEMENT max_statement_time = 0.01 FOR SELECT sleep(5)"
        if connection.dialect.name == "postgresql":
            connection.execute(text("SET LOCAL statement_timeout = '10ms'"))
            query = "SELECT pg_sleep(5)"
        assert rows.verdicts(rows.error_of(lambda: connection.execute(text(query)))) == {None}


def test_aborted_transaction(postgresql):
    """25P02 is a consequence; the error that caused it has been classified before."""
    with postgresql.engine.connect() as connection:
        postgresql.error_of(lambda: connection.execute(text("SELECT 1 / 0")))
        assert postgresql.verdicts(postgresql.error_of(lambda: read(connection))) == {None}


def test_constraint_that_commit_checks(postgresql):
    with postgresql.engine.connect() as connection:
        connection.execute(text(f"CREATE TEMPORARY TABLE {TABLE}_t (n INTEGER UNIQUE DEFERRABLE INITIALLY DEFERRED)"))
        connection.execute(text(f"INSERT INTO {TABLE}_t VALUES (1), (1)"))
        assert postgresql.verdicts(postgresql.error_of(connection.commit), committing=True) == {None}


# SQLite and SQLAlchemy


@pytest.fixture
def sqlite(sqlite_url) -> Iterator[Provoked]:
    with table_on(sqlite_url, connect_args={"timeout": 0}) as provoked:
        yield provoked


def test_sqlite_busy(sqlite):
    with sqlite.engine.connect() as one, sqlite.engine.connect() as other:
        write(one)
        error = sqlite.error_of(lambda: write(other))
    assert error.orig.sqlite_errorcode == sqlite3.SQLITE_BUSY
    assert sqlite.verdicts(error) == {TRANSIENT}


def test_sqlite_busy_in_commit(sqlite):
    """A reader is in the way. The transaction stays open, so its outcome is known."""
    with sqlite.engine.connect() as reader, sqlite.engine.connect() as writer:
        reader.exec_driver_sql("BEGIN")
        read(reader)
        write(writer)
        error = sqlite.error_of(writer.commit)
        writer.rollback()
    assert sqlite.verdicts(error, committing=True) == {TRANSIENT}


def test_sqlite_busy_snapshot(sqlite):
    with sqlite.engine.connect() as slow, sqlite.engine.connect() as fast:
        slow.exec_driver_sql("PRAGMA journal_mode = WAL")
        slow.exec_driver_sql("BEGIN")
        read(slow)
        write(fast)
        fast.commit()
        error = sqlite.error_of(lambda: write(slow))
    assert error.orig.sqlite_errorcode == sqlite3.SQLITE_BUSY_SNAPSHOT
    assert sqlite.verdicts(error) == {TRANSIENT}


def test_sqlite_locked(tmp_path):
    url = f"sqlite:///file:{tmp_path}/shared.db?cache=shared&uri=true"
    with table_on(url, connect_args={"timeout": 0}) as sqlite:
        with sqlite.engine.connect() as one, sqlite.engine.connect() as other:
            write(one)
            error = sqlite.error_of(lambda: read(other))
        assert error.orig.sqlite_errorcode == sqlite3.SQLITE_LOCKED_SHAREDCACHE
        assert sqlite.verdicts(error) == {TRANSIENT}


@pytest.mark.parametrize(
    "statement",
    [
        pytest.param(f"INSERT INTO {TABLE} VALUES (1, 1)", id="unique violation"),
        pytest.param(f"SELECT * FROM {TABLE}_missing", id="missing table"),
    ],
)
def test_sqlite_mistake_of_the_program(sqlite, statement):
    with sqlite.engine.connect() as connection:
        assert sqlite.verdicts(sqlite.error_of(lambda: connection.execute(text(statement)))) == {None}


def test_sqlite_file_that_cannot_be_opened(tmp_path):
    Provoked(f"sqlite:///{tmp_path}/missing/test.db").assert_connecting_is(None)


def test_sqlite_connection_closed_by_the_program(sqlite):
    """The driver's error has no code; SQLAlchemy knows it by its words."""
    with sqlite.engine.connect() as connection:
        connection.connection.driver_connection.close()
        error = sqlite.error_of(lambda: read(connection))
    [(_, facts)] = sqlite.seen
    assert classify(error) is classify(error, **facts) is LOST


def test_pool_exhausted(sqlite_url):
    engine = create_engine(sqlite_url, poolclass=QueuePool, pool_size=1, max_overflow=0, pool_timeout=0.01)
    with engine.connect(), pytest.raises(exc.TimeoutError) as caught:
        engine.connect()
    engine.dispose()
    assert classify(caught.value) is UNAVAILABLE
    assert classify(caught.value, committing=True) is UNAVAILABLE


def test_stale_data(sqlite_engine):
    """A row whose version_id_col has moved on since it was loaded."""

    class Base(DeclarativeBase):
        pass

    class Item(Base):
        __tablename__ = "failures_item"
        id: Mapped[int] = mapped_column(primary_key=True)
        n: Mapped[int]
        version: Mapped[int] = mapped_column()
        __mapper_args__: ClassVar[dict[str, Any]] = {"version_id_col": version}

    Base.metadata.create_all(sqlite_engine)
    with Session(sqlite_engine) as session:
        session.add(Item(id=1, n=0))
        session.commit()
        item = session.get_one(Item, 1)
        session.connection().execute(text("UPDATE failures_item SET version = version + 1"))
        item.n = 1
        with pytest.raises(StaleDataError) as caught:
            session.commit()
    assert classify(caught.value) is TRANSIENT
    assert classify(caught.value, committing=True) is TRANSIENT
