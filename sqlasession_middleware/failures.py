"""What a database error means for the request that met it.

In: an error of SQLAlchemy or of a driver. Out: a :class:`Failure`, or None for an error that stays what it is: a
constraint, a missing table, a wrong password, a mistake in the program. Imports no driver and asks no database.

The tables below follow the documentation of the servers and drivers. The limits:

- libpq gives no SQLSTATE for a connection that it could not make, so psycopg and psycopg2 leave only the message. That
  the server has answered is seen in any language; what it has answered only in English. From a server with another
  ``lc_messages``, "starting up" and "too many clients" are None, as a wrong password is.
- A write in a transaction that the application itself made read-only looks like a write on a read-only server.
- Statement timeouts and cancelled queries are None: somebody has set that limit, and a repetition would meet it again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Final

from sqlalchemy import exc
from sqlalchemy.orm.exc import StaleDataError

__all__ = ["Failure", "classify"]


class Failure(Enum):
    """What happened to the transaction."""

    #: The database gave it up for a reason that a repetition may not meet: a serialization failure, a deadlock, a lock
    #: timeout, stale data. ROLLBACK comes first: some databases undo only the statement.
    TRANSIENT = "transient"
    #: The connection died under it. A repetition on a fresh connection may work, else the database is out of reach.
    LOST = "lost"
    #: There is no database to do it now: refused, starting up, too many connections, pool exhausted, host unknown, or
    #: a write that went to a read-only server. Nothing was committed.
    UNAVAILABLE = "unavailable"
    #: COMMIT was sent and nobody knows whether it took effect, or it did in part. Never to be repeated.
    UNKNOWN = "unknown"


# PostgreSQL: "PostgreSQL Error Codes" (Appendix A) and "Serialization Failure Handling" (13.5).
# CockroachDB: "Transaction Retry Error Reference", "Common Errors", pkg/sql/pgwire/pgcode/codes.go.
# YugabyteDB: "Transaction error codes in YSQL", "Transaction retries in YSQL".
_SQLSTATES: Final[Mapping[str, Failure]] = {
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
_YUGABYTEDB_RETRYABLE: Final = re.compile("(schema|catalog) version mismatch", re.IGNORECASE)

# PgBouncer says so on a connection that is open, as a violation of the protocol: it has no server's to give.
_BOUNCER_UNAVAILABLE: Final = re.compile("query_wait_timeout|server login has been failing")

# What a server answers, instead of a connection, in words. PostgreSQL's canAcceptConnections() and InitProcess(),
# PgBouncer's and CockroachDB's sources. Any other answer is None: of these the most are about logins.
_ANSWERS: Final[Mapping[str, Failure]] = {
    "the database system is ": Failure.UNAVAILABLE,  # starting up, shutting down, in recovery mode, not (yet) accepting
    "too many clients already": Failure.UNAVAILABLE,
    "too many connections for ": Failure.UNAVAILABLE,  # role, database
    "connection slots are reserved": Failure.UNAVAILABLE,
    "server is not accepting clients": Failure.UNAVAILABLE,  # CockroachDB's node that drains
    "no more connections allowed": Failure.UNAVAILABLE,  # PgBouncer's max_client_conn
    "query_wait_timeout": Failure.UNAVAILABLE,  # PgBouncer had no server connection to give
    "cached error: connect ": Failure.UNAVAILABLE,  # PgBouncer's server_login_retry; other cached errors are passed on
    "cached error: server conn crashed": Failure.UNAVAILABLE,
    "terminating connection": Failure.LOST,
}

# What libpq ("fe-connect.c", "fe-misc.c", "fe-secure.c"), psycopg and psycopg2 say when no server has answered. They
# say it in English unless the program calls setlocale() for LC_MESSAGES, which Python by itself does not. The rest is
# None: certificates, missing passwords, misspelt connection options.
_SILENCE: Final[Mapping[str, Failure]] = {
    "Is the server running": Failure.UNAVAILABLE,  # follows every connect() that failed: refused, no route, no socket
    "could not translate host name": Failure.UNAVAILABLE,
    "failed to resolve host": Failure.UNAVAILABLE,  # psycopg
    "timeout expired": Failure.UNAVAILABLE,
    "session is read-only": Failure.UNAVAILABLE,  # target_session_attrs: no server is of the wanted kind
    "session is not read-only": Failure.UNAVAILABLE,
    "in hot standby mode": Failure.UNAVAILABLE,
    "closed the connection unexpectedly": Failure.LOST,
    "connection has been closed unexpectedly": Failure.LOST,  # with TLS
    "SSL SYSCALL error": Failure.LOST,
    "could not receive ": Failure.LOST,
    "could not send ": Failure.LOST,
    "the connection is lost": Failure.LOST,  # psycopg
    "the connection is closed": Failure.LOST,  # psycopg
    "connection already closed": Failure.LOST,  # psycopg2
}

# libpq writes a server's message as "SEVERITY:  message", with two spaces, whatever the language of the severity.
_ANSWERED: Final = ":  "
_ATTEMPT: Final = re.compile("connection to server (at|on socket) .+ failed: ")

# MySQL: "Server Error Message Reference", "Client Error Message Reference", "InnoDB Error Handling".
# MariaDB: "MariaDB Error Code Reference". Galera Cluster: "Server Error Log", "Two-Node Clusters".
_MYSQL: Final[Mapping[int, Failure]] = {
    1020: Failure.TRANSIENT,  # ER_CHECKREAD: MariaDB's snapshot isolation, the default since 11.6.2
    1205: Failure.TRANSIENT,  # ER_LOCK_WAIT_TIMEOUT; MariaDB's NOWAIT
    1213: Failure.TRANSIENT,  # ER_LOCK_DEADLOCK; Galera's certification failure, also in COMMIT
    1412: Failure.TRANSIENT,  # ER_TABLE_DEF_CHANGED: "please retry transaction"
    1614: Failure.TRANSIENT,  # ER_XA_RBDEADLOCK
    3101: Failure.TRANSIENT,  # ER_TRANSACTION_ROLLBACK_DURING_COMMIT: MySQL's Group Replication
    3572: Failure.TRANSIENT,  # ER_LOCK_NOWAIT: MySQL's NOWAIT
    0: Failure.LOST,  # PyMySQL on a connection that was closed before: (0, '')
    1053: Failure.LOST,  # ER_SERVER_SHUTDOWN
    1158: Failure.LOST,  # ER_NET_READ_ERROR
    1159: Failure.LOST,  # ER_NET_READ_INTERRUPTED
    1160: Failure.LOST,  # ER_NET_ERROR_ON_WRITE
    1161: Failure.LOST,  # ER_NET_WRITE_INTERRUPTED
    1927: Failure.LOST,  # ER_CONNECTION_KILLED
    2006: Failure.LOST,  # CR_SERVER_GONE_ERROR
    2013: Failure.LOST,  # CR_SERVER_LOST
    2055: Failure.LOST,  # CR_SERVER_LOST_EXTENDED
    # MySQL's ER_CLIENT_INTERACTION_TIMEOUT. MariaDB gave the number to a trigger that is missing, and as SQLAlchemy
    # drops the connection for either, it is lost.
    4031: Failure.LOST,
    1040: Failure.UNAVAILABLE,  # ER_CON_COUNT_ERROR: too many connections
    1047: Failure.UNAVAILABLE,  # ER_UNKNOWN_COM_ERROR: Galera's node that is not ready
    1129: Failure.UNAVAILABLE,  # ER_HOST_IS_BLOCKED: after too many connections that broke
    1203: Failure.UNAVAILABLE,  # ER_TOO_MANY_USER_CONNECTIONS
    1226: Failure.UNAVAILABLE,  # ER_USER_LIMIT_REACHED: the account's connections or queries are used up
    1290: Failure.UNAVAILABLE,  # ER_OPTION_PREVENTS_STATEMENT, where the option is read-only
    1792: Failure.UNAVAILABLE,  # ER_CANT_EXECUTE_IN_READ_ONLY_TRANSACTION, SQLSTATE 25006
    1836: Failure.UNAVAILABLE,  # ER_READ_ONLY_MODE
    2002: Failure.UNAVAILABLE,  # CR_CONNECTION_ERROR
    2003: Failure.UNAVAILABLE,  # CR_CONN_HOST_ERROR
    2005: Failure.UNAVAILABLE,  # CR_UNKNOWN_HOST
    2012: Failure.UNAVAILABLE,  # CR_SERVER_HANDSHAKE_ERR
}
# ER_ERROR_DURING_COMMIT: of Galera's node that was cut off from the others, which may have it or not (wsrep-lib,
# "transaction.cpp": the provider's error_connection_failed).
_MYSQL_IN_COMMIT: Final = (1180,)
_OPTION_PREVENTS_STATEMENT: Final = 1290
_READ_ONLY_OPTION: Final = re.compile("--[a-z-]*read[-_]only")

# SQLite: "Result and Error Codes" (sqlite.org/rescode.html), the primary code. No file that cannot be opened, read or
# written (CANTOPEN, IOERR, FULL, READONLY, CORRUPT) is here: the disk is this machine's own, somebody has to mend it,
# and a 503 would promise that waiting helps.
_SQLITE: Final[Mapping[int, Failure]] = {
    5: Failure.TRANSIENT,  # SQLITE_BUSY, and with it BUSY_RECOVERY, BUSY_SNAPSHOT, BUSY_TIMEOUT
    6: Failure.TRANSIENT,  # SQLITE_LOCKED, LOCKED_SHAREDCACHE
    15: Failure.TRANSIENT,  # SQLITE_PROTOCOL: the race for a lock of the WAL was lost dozens of times
}


def classify(
    error: BaseException,
    *,
    committing: bool = False,
    connected: bool | None = None,
    disconnected: bool | None = None,
) -> Failure | None:
    """Say what ``error`` means. Never raises, whatever the error looks like.

    :param error: SQLAlchemy's error or a driver's own. Causes are not followed: SQLAlchemy's errors carry the driver's,
        and whoever listens to the engine's ``handle_error`` has seen it before a framework could wrap it.
    :param committing: it is COMMIT that failed. A connection that is lost there leaves the outcome unknown.
    :param connected: False if there was no connection yet (in ``handle_error``, ``context.connection is None``); None
        if that is not known.
    :param disconnected: the dialect's verdict on the connection (in ``handle_error``, ``context.is_disconnect``); None
        to take it from the error.
    :returns: None for an error that is about the statement, the schema, the login or the program.
    """
    failure, lost = _of_sqlalchemy(error)
    if failure is None and (lost if disconnected is None else disconnected):
        failure = Failure.LOST
    if failure is None and committing and _code_of_mysql(_read(error, "orig") or error) in _MYSQL_IN_COMMIT:
        return Failure.UNKNOWN
    if failure is Failure.LOST and connected is False:
        return Failure.UNAVAILABLE
    if failure is Failure.LOST and committing:
        return Failure.UNKNOWN
    return failure


def _of_sqlalchemy(error: BaseException) -> tuple[Failure | None, bool]:
    """What the error says by itself, and whether SQLAlchemy gave the connection up for it."""
    kind = type(error)  # isinstance() would also ask the object's own __class__, which may raise.
    if issubclass(kind, exc.TimeoutError):
        return Failure.UNAVAILABLE, False
    if issubclass(kind, StaleDataError):
        return Failure.TRANSIENT, False
    if issubclass(kind, exc.DisconnectionError):
        return Failure.LOST, True
    if issubclass(kind, exc.DBAPIError):
        return _of_driver(_read(error, "orig")), _read(error, "connection_invalidated") is True
    return _of_driver(error), False


def _of_driver(error: object) -> Failure | None:
    for kind in type(error).__mro__:
        module = _read(kind, "__module__")
        family = _FAMILIES.get(module.partition(".")[0]) if type(module) is str else None
        if family is not None:
            return family(error)
    return None


def _of_postgresql(error: object) -> Failure | None:
    for name in ("sqlstate", "pgcode"):
        state = _read(error, name)
        if type(state) is str:
            if state == "XX000" and _YUGABYTEDB_RETRYABLE.search(_text(error)):
                return Failure.TRANSIENT
            if state == "08P01" and _BOUNCER_UNAVAILABLE.search(_text(error)):
                return Failure.UNAVAILABLE
            return _SQLSTATES.get(state)
    return _of_libpq(_text(error))


def _of_libpq(text: str) -> Failure | None:
    # A name may stand for several servers. One that has answered counts for more than those that were silent:
    # "localhost" is often refused by ::1 before 127.0.0.1 says that the password is wrong.
    words = _ANSWERS if _ANSWERED in text else _SILENCE
    failure = next((failure for part, failure in words.items() if part in text), None)
    return Failure.UNAVAILABLE if failure is Failure.LOST and _ATTEMPT.search(text) else failure


def _code_of_mysql(error: object) -> int | None:
    code = _read(error, "errno")  # MariaDB Connector/Python; its args hold only the message
    if type(code) is not int:
        arguments = _read(error, "args")
        code = arguments[0] if type(arguments) is tuple and arguments else None
    return code if type(code) is int else None


def _of_mysql(error: object) -> Failure | None:
    code = _code_of_mysql(error)
    if code is None or (code == _OPTION_PREVENTS_STATEMENT and not _READ_ONLY_OPTION.search(_text(error))):
        return None
    return _MYSQL.get(code)


def _of_sqlite(error: object) -> Failure | None:
    code = _read(error, "sqlite_errorcode")
    return _SQLITE.get(code & 0xFF) if type(code) is int else None


#: the first part of a driver's module name -> what knows its errors
_FAMILIES: Final[Mapping[str, Callable[[object], Failure | None]]] = {
    "psycopg": _of_postgresql,
    "psycopg2": _of_postgresql,
    "pymysql": _of_mysql,
    "MySQLdb": _of_mysql,
    "mariadb": _of_mysql,
    "sqlite3": _of_sqlite,
}


def _read(error: object, name: str) -> object:
    """An attribute of an object that may be of any making."""
    try:
        return getattr(error, name, None)
    except Exception:
        return None


def _text(error: object) -> str:
    try:
        return str(error)
    except Exception:
        return ""
