"""PostgreSQL: codes of its errors, and questions in SQL.

CockroachDB, YugabyteDB, Redshift and others speak its protocol and have its codes, with some of their own. YugabyteDB
is used with SQLAlchemy's dialect of PostgreSQL, the others with dialects of other names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import text

from .answers import ask, read_attribute, text_of
from .driver import Driver
from .failure import Failure
from .server import MAX_CONNECTIONS, Code, Limit, Server, ServersDriver

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["CompatibleWithPostgreSQL", "PostgreSQL", "PostgreSQLDriver"]

# PostgreSQL: "PostgreSQL Error Codes" (Appendix A) and "Serialization Failure Handling" (13.5).
# CockroachDB: "Transaction Retry Error Reference", "Common Errors", pkg/sql/pgwire/pgcode/codes.go.
# YugabyteDB: "Transaction error codes in YSQL", "Transaction retries in YSQL".
SQLSTATES: Final[Mapping[Code, Failure]] = {
    "40000": Failure.TRANSIENT,  # transaction_rollback
    "40001": Failure.TRANSIENT,  # serialization_failure; CockroachDB's "restart transaction"
    "40P01": Failure.TRANSIENT,  # deadlock_detected
    "55P03": Failure.TRANSIENT,  # lock_not_available: lock_timeout, NOWAIT
    # 40002 is not here: an integrity constraint that a repetition would violate again.
    "08000": Failure.LOST,  # connection_exception
    "08003": Failure.LOST,  # connection_does_not_exist
    "08006": Failure.LOST,  # connection_failure
    "25P03": Failure.LOST,  # idle_in_transaction_session_timeout: FATAL, and psycopg2 can only see the lost connection
    "25P04": Failure.LOST,  # transaction_timeout (PostgreSQL 17), likewise
    "57P01": Failure.LOST,  # admin_shutdown; CockroachDB's node that drains
    "57P02": Failure.LOST,  # crash_shutdown
    "57P05": Failure.LOST,  # idle_session_timeout
    "08001": Failure.UNAVAILABLE,  # sqlclient_unable_to_establish_sqlconnection: also a foreign server's
    "08004": Failure.UNAVAILABLE,  # sqlserver_rejected_establishment_of_sqlconnection
    "25006": Failure.UNAVAILABLE,  # read_only_sql_transaction: what a hot standby answers to a write
    "53300": Failure.UNAVAILABLE,  # too_many_connections
    "57P03": Failure.UNAVAILABLE,  # cannot_connect_now
    "58C00": Failure.UNAVAILABLE,  # CockroachDB's RangeUnavailable: all replicas of some data are away
    "08007": Failure.UNKNOWN,  # transaction_resolution_unknown
    "40003": Failure.UNKNOWN,  # statement_completion_unknown; CockroachDB's "result is ambiguous"
    "XXA00": Failure.UNKNOWN,  # CockroachDB's TransactionCommittedWithSchemaChangeFailure: committed, but in part
}

# YugabyteDB, "How to Troubleshoot Database Transaction Retryable Errors": up to 2.25 these come as XX000, an internal
# error; then as 40001.
INTERNAL_ERROR: Final = "XX000"
YUGABYTEDB_RETRYABLE: Final = re.compile("(schema|catalog) version mismatch", re.IGNORECASE)

# Supavisor has this code for all errors of its own ("lib/supavisor/error.ex"), also on a connection that is open.
SUPAVISOR_UNAVAILABLE: Final = re.compile("max clients reached|max (client|proxy) connections reached|checkout timeout")

# What a standby answers to a write, and a primary that is fenced by its configuration. Since 14, the server reports
# these settings with each change ("Protocol Flow", Asynchronous Operations). If both are off, the application has made
# the transaction read-only.
READ_ONLY_TRANSACTION: Final = "25006"
READ_ONLY_STATES: Final = ("in_hot_standby", "default_transaction_read_only")

# PgBouncer says so on a connection that is open, as a violation of the protocol, when it has no server connection.
PROTOCOL_VIOLATION: Final = "08P01"
BOUNCER_UNAVAILABLE: Final = re.compile("query_wait_timeout|server login has been failing")

# A prepared statement keeps the columns of its result, and a migration has changed them ("PREPARE"). psycopg prepares
# what it has executed some times, and forgets it at a ROLLBACK. The code is that of any feature that there is not. The
# function, in the server's source plancache.c, does not depend on the language of the server.
FEATURE_NOT_SUPPORTED: Final = "0A000"
CACHED_PLAN: Final = "cached plan must not change result type"
CACHED_PLAN_FUNCTION: Final = "RevalidateCachedQuery"

# What a CREATE says that has lost a race, and a DROP. Of two that look before either has created, the second one meets
# a unique index of the catalog: "duplicate key value violates unique constraint "pg_type_typname_nsp_index"". The name
# of the index does not depend on the language of the server.
EXISTS: Final[Collection[Code]] = (
    "42P06",  # duplicate_schema
    "42P07",  # duplicate_table, also of indexes and sequences
    "42701",  # duplicate_column
    "42710",  # duplicate_object: types, constraints, extensions
    "42723",  # duplicate_function
)
IS_GONE: Final[Collection[Code]] = (
    "42P01",  # undefined_table
    "42704",  # undefined_object: types, constraints
    "3F000",  # invalid_schema_name
)
UNIQUE_VIOLATION: Final = "23505"
OF_THE_CATALOG: Final = re.compile(r"\bpg_\w+_index\b")
# An internal error, of two that change or drop the same thing.
CONCURRENTLY: Final = re.compile("tuple concurrently (updated|deleted)|cache lookup failed|could not open relation")

# The key of the lock of those that create tables, in each database. It is the same in all versions of this library.
CREATING: Final = int.from_bytes(b"sqlasess", "big")
# With the locks of the transaction, because a pooler between may give each transaction to another session. A snapshot
# from before the lock would not show what the others have created meanwhile.
LOCK_CREATION: Final = (
    "SET TRANSACTION ISOLATION LEVEL READ COMMITTED",
    f"SELECT pg_catalog.pg_advisory_xact_lock({CREATING})",
)

# One query for both, because each costs a round trip. A transaction gets its number with its first write or row lock
# ("Transaction ID and Snapshot Information Functions"). A cursor without a name is the driver's own for this very
# query; the driver names one for each result that it does not fetch at once.
ASK_TRANSACTION: Final = (
    "SELECT txid_current_if_assigned() IS NOT NULL, EXISTS (SELECT 1 FROM pg_catalog.pg_cursors WHERE name <> '')"
)

# The position of the next record of the write-ahead log: all that was committed is before it. And the position up to
# which a standby has replayed it; NULL of a server that is no standby, or no more ("System Administration Functions").
ASK_WRITTEN: Final = "SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint"
ASK_REPLAYED: Final = "SELECT CASE WHEN pg_is_in_recovery() THEN (pg_last_wal_replay_lsn() - '0/0')::bigint END"

# Some connections are kept for superusers and, since 16, for roles that are granted them ("Connection Settings").
ASK_LIMITS: Final = """
    SELECT sum(setting::int) FILTER (WHERE name = 'max_connections'),
           sum(setting::int) FILTER (WHERE name <> 'max_connections')
    FROM pg_catalog.pg_settings
    WHERE name IN ('max_connections', 'superuser_reserved_connections', 'reserved_connections')
"""

# "CREATE ROLE", "CREATE DATABASE": -1 is no limit, and superusers have none.
ASK_LIMITS_OF_ITS_OWN: Final = """
    SELECT 'CONNECTION LIMIT of the role ' || rolname, rolconnlimit
    FROM pg_catalog.pg_roles WHERE rolname = session_user AND NOT rolsuper
    UNION ALL
    SELECT 'CONNECTION LIMIT of the database ' || datname, datconnlimit
    FROM pg_catalog.pg_database, pg_catalog.pg_roles
    WHERE datname = current_database() AND rolname = session_user AND NOT rolsuper
"""


class CompatibleWithPostgreSQL(Server):
    """Any server that speaks PostgreSQL's protocol."""

    second_phase = ("COMMIT PREPARED",)
    failures = SQLSTATES
    consequences = ("25P02",)  # in_failed_sql_transaction
    cancelled = ("57014",)  # query_canceled: also statement_timeout; COMMIT is undone by it until it is durable
    # A text cannot have a NUL ("Character Types"), and a parameter that has one fails the transaction.
    accepts_nul = False

    def failure_of(self, code: Code, error: object) -> Failure | None:
        if code == INTERNAL_ERROR and YUGABYTEDB_RETRYABLE.search(text_of(error)):
            return Failure.TRANSIENT
        if code == INTERNAL_ERROR and SUPAVISOR_UNAVAILABLE.search(text_of(error).lower()):
            return Failure.UNAVAILABLE
        if code == PROTOCOL_VIOLATION and BOUNCER_UNAVAILABLE.search(text_of(error)):
            return Failure.UNAVAILABLE
        if self.outdates_connections(code, error):
            return Failure.TRANSIENT
        return self.failures.get(code)

    def outdates_connections(self, code: Code, error: object) -> bool:
        if code != FEATURE_NOT_SUPPORTED:
            return False
        function = read_attribute(read_attribute(error, "diag"), "source_function")
        return function == CACHED_PLAN_FUNCTION or CACHED_PLAN in text_of(error)

    def says_exists(self, code: Code, error: object) -> bool:
        if code == UNIQUE_VIOLATION:
            return OF_THE_CATALOG.search(text_of(error)) is not None
        return code in EXISTS or (code == INTERNAL_ERROR and CONCURRENTLY.search(text_of(error)) is not None)

    def says_gone(self, code: Code, error: object) -> bool:
        return code in IS_GONE or (code == INTERNAL_ERROR and CONCURRENTLY.search(text_of(error)) is not None)

    def has_become_read_only(self, driver: ServersDriver, driver_connection: Any, code: Code) -> bool:
        if code != READ_ONLY_TRANSACTION or driver.is_made_read_only(driver_connection):
            return False
        states = [driver.parameter_status(driver_connection, name) for name in READ_ONLY_STATES]
        return states != ["off", "off"]


class PostgreSQL(CompatibleWithPostgreSQL):
    """PostgreSQL itself, which has the tables and functions that the questions need."""

    names = ("postgresql",)
    default_port = 5432
    can_tell_writes = True
    can_begin_lazily = True
    asks_for_writes = True
    has_positions = True

    @contextmanager
    def creating(self, connection: Connection) -> Iterator[None]:
        """An advisory lock, until the end of the transaction.

        On autocommit there is none: CREATE INDEX CONCURRENTLY, which requires it, would wait for those that wait for a
        lock of the session, and a pooler would keep such a lock for ever.
        """
        driver_connection: Any = connection.connection.dbapi_connection
        if getattr(driver_connection, "autocommit", None) is False:
            try:
                cursor = driver_connection.cursor()
                for statement in LOCK_CREATION:
                    cursor.execute(statement)
                cursor.close()
            except Exception:  # YugabyteDB may have no such locks, and there may be a timeout.
                with suppress(Exception):
                    driver_connection.rollback()
        yield

    def begin_explaining(self, cursor: Any, is_read: bool, analyze: bool, seconds: int) -> str | None:
        # With the driver's autocommit the first one, else the second one.
        cursor.execute("SET default_transaction_read_only = on")
        cursor.execute("SET transaction_read_only = on")
        cursor.execute(f"SET statement_timeout = '{seconds}s'")
        return "EXPLAIN (ANALYZE, BUFFERS) " if analyze else "EXPLAIN "

    def has_written(self, driver: ServersDriver, driver_connection: Any) -> bool:
        return not _numbers_transactions(driver, driver_connection) or _ask_transaction(driver_connection)[0]

    def has_something_to_lose(self, driver: ServersDriver, driver_connection: Any) -> bool:
        """The answers to both questions, which are one query."""
        return not _numbers_transactions(driver, driver_connection) or any(_ask_transaction(driver_connection))

    def has_open_cursor(self, driver_connection: Any) -> bool:
        return _ask_transaction(driver_connection)[1]

    def written_position(self, driver_connection: Any) -> int | None:
        return ask_alone(driver_connection, ASK_WRITTEN)

    def replayed_position(self, driver_connection: Any) -> int | None:
        return ask_alone(driver_connection, ASK_REPLAYED)

    def limits(self, connection: Connection) -> list[Limit]:
        maximum, reserved = connection.execute(text(ASK_LIMITS)).one()
        own = [Limit(*row) for row in connection.execute(text(ASK_LIMITS_OF_ITS_OWN))]
        return [Limit(MAX_CONNECTIONS, maximum, reserved), *(limit for limit in own if limit.maximum >= 0)]


class PostgreSQLDriver(Driver):
    """Any driver of PostgreSQL."""

    server = PostgreSQL()
    compatible_server = CompatibleWithPostgreSQL()

    def has_something_to_lose(self, connection: Connection) -> bool:
        server: Any = self.server  # one that can tell
        if connection.closed or connection.invalidated or self.is_idle(connection) or self.is_aborted(connection):
            return False
        return bool(server.has_something_to_lose(self, connection.connection.dbapi_connection))


def _numbers_transactions(driver: ServersDriver, driver_connection: Any) -> bool:
    """Whether a transaction has a number since its first write; YugabyteDB numbers its transactions otherwise."""
    version = driver.parameter_status(driver_connection, "server_version")
    return version is not None and "YB" not in version


def _ask_transaction(driver_connection: Any) -> tuple[bool, bool]:
    """Whether the transaction has written, and whether it has an open cursor."""
    try:
        written, is_open = ask(driver_connection, ASK_TRANSACTION)
        return written, is_open
    except Exception:
        return False, False  # A connection that does not answer has nothing that could be kept.


def ask_alone(driver_connection: Any, statement: str) -> int | None:
    """Ask outside of a transaction, and leave none open: that takes one round trip."""
    before = driver_connection.autocommit
    driver_connection.autocommit = True
    try:
        position: int | None = ask(driver_connection, statement)[0]
    finally:
        driver_connection.autocommit = before
    return position
