"""SQLite, with Python's driver: files, in-memory databases, codes, and when a transaction begins."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final, Literal
from uuid import uuid4

from sqlalchemy import event

from .answers import read_attribute
from .driver import Driver
from .failure import Failure
from .server import Code, Server

if TYPE_CHECKING:
    from sqlalchemy import URL, Connection, Dialect, Engine

__all__ = [
    "SQLite",
    "SQLite3",
    "SQLiteDriver",
    "can_share_memory",
    "is_memory",
    "keeps_memory",
    "share_memory",
    "sqlite_file",
]

# "Result and Error Codes" (sqlite.org/rescode.html), the primary code. A file that cannot be opened, read or written
# (CANTOPEN, IOERR, FULL, READONLY, CORRUPT) is not here: the disk is this machine's own and needs to be repaired, and a
# 503 would promise that waiting helps.
CODES: Final[Mapping[Code, Failure]] = {
    5: Failure.TRANSIENT,  # SQLITE_BUSY, and with it BUSY_RECOVERY, BUSY_SNAPSHOT, BUSY_TIMEOUT
    6: Failure.TRANSIENT,  # SQLITE_LOCKED, LOCKED_SHAREDCACHE
    15: Failure.TRANSIENT,  # SQLITE_PROTOCOL: the race for a lock of the WAL was lost dozens of times
}

#: SQLite's memdb is shared between connections since 3.36.0 (SQLite's release history).
MEMDB_SINCE: Final = (3, 36, 0)

#: A statement that SQLite always refuses: while another one is active for that reason, and else for what is no name of
#: a file ("VACUUM INTO", since 3.27.0). A trace of the application's shows its text.
_REFUSED: Final = "VACUUM INTO 0 -- is a statement active?"
_REFUSED_WHEN_IDLE: Final = "non-text filename"


class SQLite(Server):
    """SQLite."""

    names = ("sqlite",)
    is_networked = False
    locks_by_process = True
    serializable_on_replicas = True
    second_phase = ()
    failures = CODES
    cancelled = (9,)  # SQLITE_INTERRUPT
    can_tell_writes = True
    read_only_statement = "PRAGMA query_only = ON"
    integer_bits = 63  # Whatever their type is called ("Datatypes In SQLite").

    def begin_explaining(self, cursor: Any, is_read: bool, analyze: bool, seconds: int) -> str | None:
        cursor.execute("PRAGMA query_only = ON")
        return None if analyze else "EXPLAIN QUERY PLAN "

    @contextmanager
    def creating(self, connection: Connection) -> Iterator[None]:
        """The file's own lock for writing. Without it, sqlite3 commits each table by itself."""
        connection.begin()  # The application may have a listener that sends BEGIN.
        driver_connection: Any = connection.connection.dbapi_connection
        in_transaction = getattr(driver_connection, "in_transaction", None)
        if in_transaction is None:
            yield
            return
        # A transaction that has begun without IMMEDIATE may find at its first write that its snapshot is outdated.
        if in_transaction:
            driver_connection.execute("COMMIT")
        try:
            driver_connection.execute("BEGIN IMMEDIATE")
        except Exception:
            if in_transaction:
                driver_connection.execute("BEGIN")
        end = "ROLLBACK"
        try:
            yield
            end = "COMMIT"
        finally:
            # On autocommit, neither commit() nor rollback() has to end anything. With ``autocommit=False`` the driver
            # has begun the next transaction.
            if driver_connection.in_transaction and getattr(driver_connection, "autocommit", None) is not False:
                driver_connection.execute(end)

    def dropping(self, connection: Connection) -> AbstractContextManager[None]:
        """No lock: in a transaction, a listener of ``before_drop`` could not turn off the foreign keys."""
        return nullcontext()


class SQLiteDriver(Driver):
    """Any driver of SQLite that is like Python's."""

    server = compatible_server = SQLite()

    def code_of(self, error: object) -> Code:
        code = read_attribute(error, "sqlite_errorcode")
        return code & 0xFF if type(code) is int else None

    def cancel(self, driver_connection: Any, connect: Callable[[], Any]) -> bool:
        driver_connection.interrupt()
        return True

    def cut(self, driver_connection: Any) -> None:
        """There is no server that could be silent."""

    def limit_waits(self, driver_connection: Any, seconds: float) -> object:
        before: int = driver_connection.execute("PRAGMA busy_timeout").fetchone()[0]
        milliseconds = max(int(seconds * 1000), 1)
        if before <= milliseconds:
            return None
        driver_connection.execute(f"PRAGMA busy_timeout = {milliseconds}")
        return before

    def restore_waits(self, driver_connection: Any, before: Any) -> None:
        driver_connection.execute(f"PRAGMA busy_timeout = {before}")

    def has_written(self, connection: Connection) -> bool:
        if connection.closed or connection.invalidated:
            return False
        # The sqlite3 module begins a transaction before the first statement that writes (its "Transaction control").
        return bool(getattr(connection.connection.dbapi_connection, "in_transaction", True))

    def has_open_cursor(self, connection: Connection) -> bool:
        """Each cursor is one, until its last row was fetched."""
        if connection.closed or connection.invalidated:
            return False
        return _has_active_statement(connection.connection.dbapi_connection)

    def has_nothing_to_lose(self, connection: Connection) -> bool:
        if connection.closed or connection.invalidated:
            return True
        driver_connection: Any = connection.connection.dbapi_connection
        if getattr(driver_connection, "in_transaction", True):
            return False
        return not _has_active_statement(driver_connection)

    def waits_of_end(self, driver_connection: Any, kind: Literal["commit", "rollback"]) -> int:
        return int(getattr(driver_connection, "in_transaction", True))

    def begin_writing(self, connection: Connection, always: bool = False) -> None:
        driver_connection: Any = connection.connection.dbapi_connection
        # With an isolation_level of None the application begins its transactions itself.
        level = driver_connection.isolation_level
        if not driver_connection.in_transaction and (always or level is not None):
            driver_connection.execute(f"BEGIN {level or ''}")

    def file_number(self, driver_connection: Any) -> int | None:
        return None

    def prepare_ping(self, arguments: list[Any], options: dict[str, Any], seconds: int) -> None:
        path = arguments[0] if arguments else None
        # SQLite creates a file that is not there, and an empty database would answer the ping.
        if type(path) is str and path not in ("", ":memory:") and not options.get("uri") and not os.path.exists(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


class SQLite3(SQLiteDriver):
    """Python's sqlite3."""

    name = "pysqlite"
    module = "sqlite3"


def _has_active_statement(driver_connection: Any) -> bool:
    """Ask by what SQLite does not do while a statement is active. It gives no other sign of it."""
    try:
        driver_connection.execute(_REFUSED)
    except Exception as error:
        if str(error) == _REFUSED_WHEN_IDLE:
            return False
    # Another SQLite may have other words for it. No function is redefined either, but if it is, each statement that the
    # driver keeps has to be compiled again.
    try:
        driver_connection.create_function("sqlasession_idle", 0, int)
        driver_connection.create_function("sqlasession_idle", 0, int)
    except Exception:
        return True
    return False


def sqlite_file(url: URL) -> str | None:
    """The path of the SQLite file that a URL names; None of any other database, one in memory, and a ``file:`` URI."""
    path = url.database
    if url.get_backend_name() not in SQLite.names or not path or path == ":memory:" or path.startswith("file:"):
        return None
    return path


def is_memory(url: URL) -> bool:
    """Whether a URL names an in-memory database without a name, of which each connection would have its own."""
    return url.drivername in ("sqlite", "sqlite+pysqlite") and url.database in (None, "", ":memory:")


def keeps_memory(url: URL) -> bool:
    """Whether a URL names a database in the memory of this process."""
    named = (url.database or "").startswith("file:") and re.search("mode=memory|vfs=memdb", str(url))
    return is_memory(url) or bool(named)


def can_share_memory() -> bool:
    """Whether several connections can open one in-memory database, with transactions of their own."""
    return sqlite3.sqlite_version_info >= MEMDB_SINCE


def share_memory(engine: Engine) -> None:
    """Let all connections of an engine open one in-memory database, which lives until the engine is disposed of."""
    name = f"file:/{uuid4().hex}?vfs=memdb"
    # SQLite drops the database with its last connection, and a pool may close any of its own.
    keepers: list[Any] = []

    @event.listens_for(engine, "do_connect")
    def open_shared(dialect: Dialect, record: Any, arguments: list[Any], options: dict[str, Any]) -> None:
        arguments[0] = name
        options["uri"] = True
        if not keepers:
            keepers.append(dialect.connect(*arguments, **options))

    @event.listens_for(engine, "engine_disposed")
    def drop(engine: Engine) -> None:
        while keepers:
            keepers.pop().close()
