"""What the connection of a driver says of the transaction that is open on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = [
    "begin_writing",
    "can_tell_writes",
    "has_open_cursor",
    "has_written",
    "is_aborted",
    "is_autocommitting",
    "make_read_only",
    "replayed_position",
    "written_position",
]

#: libpq's PQTRANS_INERROR, which psycopg and psycopg2 hand on as it is ("Connection Status Functions").
IN_ERROR = 3

# Asked at once, for each costs a round trip. A transaction gets its number with its first write or row lock
# (PostgreSQL's "Transaction ID and Snapshot Information Functions"). A cursor without a name is the driver's own for
# this very query; of those with a name the driver has made one for each result that it does not fetch at once.
ASK_POSTGRESQL = (
    "SELECT txid_current_if_assigned() IS NOT NULL, EXISTS (SELECT 1 FROM pg_catalog.pg_cursors WHERE name <> '')"
)

# Where the next record of the write-ahead log goes: after whatever was committed before. And up to where a standby has
# replayed it; a server that is none, or no more, tells nothing ("System Administration Functions").
ASK_WRITTEN = "SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint"
ASK_REPLAYED = "SELECT CASE WHEN pg_is_in_recovery() THEN (pg_last_wal_replay_lsn() - '0/0')::bigint END"


def can_tell_writes(dialect: str) -> bool:
    """Whether :func:`has_written` can tell by itself for ``dialect``."""
    return dialect in ("postgresql", "sqlite")


def is_aborted(connection: Connection) -> bool:
    """Whether PostgreSQL has given up the transaction: it will answer a COMMIT with a ROLLBACK, and no error."""
    if connection.dialect.name != "postgresql" or _is_gone(connection):
        return False
    info = getattr(_driver_connection(connection), "info", None)
    return bool(getattr(info, "transaction_status", None) == IN_ERROR)


def begin_writing(connection: Connection, always: bool = False) -> None:
    """Begin the transaction that Python's sqlite3 would begin before the first statement that writes.

    :param always: also where the application begins its transactions itself.
    """
    driver_connection = _driver_connection(connection)
    # An isolation_level of None is the application's word that it begins its transactions itself.
    level = driver_connection.isolation_level
    if not driver_connection.in_transaction and (always or level is not None):
        driver_connection.execute(f"BEGIN {level or ''}")


def is_autocommitting(connection: Connection) -> bool:
    """Whether the driver itself was told to commit each statement, behind SQLAlchemy's back."""
    driver_connection = _driver_connection(connection)
    ask = getattr(driver_connection, "get_autocommit", None)  # PyMySQL, mysqlclient
    return bool(ask()) if ask is not None else getattr(driver_connection, "autocommit", None) is True


def has_written(connection: Connection) -> bool:
    """Whether the open transaction has something in it that a rollback would lose, locks included.

    True where it cannot be known: see :func:`can_tell_writes`.
    """
    if _is_gone(connection) or is_aborted(connection):
        return False
    driver_connection = _driver_connection(connection)
    if connection.dialect.name == "sqlite":
        # The sqlite3 module begins a transaction before the first statement that writes (its "Transaction control").
        return bool(getattr(driver_connection, "in_transaction", True))
    if connection.dialect.name == "postgresql" and not _is_yugabyte(driver_connection):
        return _ask_postgresql(driver_connection)[0]
    return True


def has_open_cursor(connection: Connection) -> bool:
    """Whether rows are still to be fetched from a server-side cursor (``stream_results``, ``yield_per``).

    In SQLite each cursor is one, until its last row was fetched. False where that cannot be known: the drivers of MySQL
    and MariaDB do not tell, and to ask one of them with a query breaks the cursor.
    """
    if _is_gone(connection) or is_aborted(connection):
        return False
    if connection.dialect.name == "sqlite":
        return _has_active_statement(_driver_connection(connection))
    return connection.dialect.name == "postgresql" and _ask_postgresql(_driver_connection(connection))[1]


def _is_gone(connection: Connection) -> bool:
    return connection.closed or connection.invalidated


def _has_active_statement(driver_connection: Any) -> bool:
    """SQLite lets no function be redefined while a statement is active, and gives no other sign of it."""
    try:
        for _ in range(2):
            driver_connection.create_function("sqlasession_idle", 0, int)
    except Exception:
        return True
    return False


def _driver_connection(connection: Connection) -> Any:
    return connection.connection.dbapi_connection


def _is_yugabyte(driver_connection: Any) -> bool:
    # It speaks PostgreSQL's protocol, but its transactions are numbered otherwise.
    ask = getattr(getattr(driver_connection, "info", None), "parameter_status", None)
    return ask is None or "YB" in (ask("server_version") or "")


def _ask_postgresql(driver_connection: Any) -> tuple[bool, bool]:
    """Whether the transaction has written, and whether it has an open cursor."""
    try:
        written, is_open = _ask(driver_connection, ASK_POSTGRESQL)
        return written, is_open
    except Exception:
        return False, False  # A connection that does not answer has nothing that could be kept.


def _ask(driver_connection: Any, statement: str) -> Any:
    # By the driver itself: the application's events and logs are for its own statements.
    cursor = driver_connection.cursor()
    try:
        cursor.execute(statement)
        return cursor.fetchone()
    finally:
        cursor.close()


def written_position(connection: Connection) -> int | None:
    """After a commit on ``connection``: how many bytes of PostgreSQL's write-ahead log hold it, and all before it.

    None where the database has no such thing, or does not answer.
    """
    if connection.dialect.name != "postgresql" or _is_gone(connection):
        return None
    try:
        return _ask_alone(connection, ASK_WRITTEN)
    except Exception:
        return None  # What was committed is, whatever has happened since.


def replayed_position(connection: Connection) -> int | None:
    """How many bytes of the primary's write-ahead log a standby of PostgreSQL has replayed; None if it is no standby.

    :raises Exception: the driver's, if it does not answer.
    """
    return _ask_alone(connection, ASK_REPLAYED)


def _ask_alone(connection: Connection, statement: str) -> int | None:
    """Ask outside of a transaction, and leave none open: that takes one round trip."""
    driver_connection = _driver_connection(connection)
    before = driver_connection.autocommit
    driver_connection.autocommit = True
    try:
        position: int | None = _ask(driver_connection, statement)[0]
    finally:
        driver_connection.autocommit = before
    return position


def make_read_only(driver_connection: Any, dialect: str) -> None:
    """Have a new connection refuse to write, as far as its database can be told so."""
    if dialect == "sqlite":
        _run(driver_connection, "PRAGMA query_only = ON")
    elif dialect in ("mysql", "mariadb"):
        _run(driver_connection, "SET SESSION TRANSACTION READ ONLY")
    elif hasattr(type(driver_connection), "read_only"):
        driver_connection.read_only = True  # psycopg: part of the BEGIN that it sends anyway
    elif hasattr(type(driver_connection), "readonly"):  # pragma: no branch
        driver_connection.readonly = True  # psycopg2: likewise


def _run(driver_connection: Any, statement: str) -> None:
    cursor = driver_connection.cursor()
    try:
        cursor.execute(statement)
    finally:
        cursor.close()
