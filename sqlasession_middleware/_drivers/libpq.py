"""Drivers that are made on PostgreSQL's client library: psycopg and psycopg2.

libpq gives no SQLSTATE for a connection that it could not make, so that only the message is left. That the server has
answered is seen in any language; what it has answered, only in English. From a server with another ``lc_messages``,
"starting up" and "too many clients" cannot be told from a wrong password.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

from .answers import ask, file_number_of, port_of, read_attribute, text_of
from .failure import Failure
from .keepalive import COUNT, IDLE, INTERVAL, UNACKNOWLEDGED
from .postgresql import PostgreSQLDriver, ask_alone
from .server import Code

if TYPE_CHECKING:
    from sqlalchemy import Connection, Dialect

__all__ = ["FULL_SERVER", "LibpqDriver"]

#: PQTRANS_IDLE, PQTRANS_ACTIVE and PQTRANS_INERROR ("Connection Status Functions").
TRANSACTION_IDLE: Final = 0
ACTIVE: Final = 1
IN_ERROR: Final = 3

# What a server answers instead of making a connection. Sources: PostgreSQL's canAcceptConnections() and InitProcess(),
# PgBouncer, CockroachDB, Supavisor's lib/supavisor/errors, Pgpool-II, Amazon RDS Proxy. Most other answers are about
# logins, and mean None.
ANSWERS: Final[Mapping[str, Failure]] = {
    "the database system is ": Failure.UNAVAILABLE,  # starting up, shutting down, in recovery mode, not (yet) accepting
    "too many clients already": Failure.UNAVAILABLE,
    "too many connections for ": Failure.UNAVAILABLE,  # role, database: OWN_LIMIT
    "connection slots are reserved": Failure.UNAVAILABLE,
    "server is not accepting clients": Failure.UNAVAILABLE,  # CockroachDB's node that drains
    "no more connections allowed": Failure.UNAVAILABLE,  # PgBouncer's max_client_conn
    "query_wait_timeout": Failure.UNAVAILABLE,  # PgBouncer had no server connection to give
    "cached error: connect ": Failure.UNAVAILABLE,  # PgBouncer's server_login_retry; other cached errors are passed on
    "cached error: server conn crashed": Failure.UNAVAILABLE,
    "client_login_timeout": Failure.UNAVAILABLE,  # PgBouncer, while no server lets it in
    "pgbouncer cannot connect to server": Failure.UNAVAILABLE,
    "max clients reached": Failure.UNAVAILABLE,  # Supavisor's "MaxClientsInSessionMode", "(EMAXCONNSESSION)"
    "ax client connections reached": Failure.UNAVAILABLE,  # Supavisor's "Max" and "(EMAXCONN) max"
    "max proxy connections reached": Failure.UNAVAILABLE,  # Supavisor
    "ool checkout timeout": Failure.UNAVAILABLE,  # Supavisor
    "failed to create a backend connection": Failure.UNAVAILABLE,  # Pgpool-II
    "all backend nodes are down": Failure.UNAVAILABLE,  # Pgpool-II
    "Timed-out waiting to acquire database connection": Failure.UNAVAILABLE,  # Amazon RDS Proxy
    "terminating connection": Failure.LOST,
}

#: What a database or a role says that has its CONNECTION LIMIT; the SQLSTATE is that of a full server.
OWN_LIMIT: Final = "too many connections for "
#: Those of them that say that as many connections are open as are admitted: PostgreSQL's own, all, and its SQLSTATE.
FULL_SERVER: Final = ("too many clients already", OWN_LIMIT, "connection slots are reserved")
FULL: Final = (
    *FULL_SERVER,
    "no more connections allowed",
    "max clients reached",
    "ax client connections reached",
    "max proxy connections reached",
)
TOO_MANY: Final = "53300"

# What libpq ("fe-connect.c", "fe-misc.c", "fe-secure.c"), psycopg and psycopg2 say when no server has answered: in
# English, unless the program calls setlocale() for LC_MESSAGES, which Python by itself does not. Other messages are
# about certificates, missing passwords and misspelt connection options, and mean None.
SILENCE: Final[Mapping[str, Failure]] = {
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
    "SSL error: unexpected eof": Failure.LOST,  # as OpenSSL 3 has it; other SSL errors are about certificates
    "could not receive ": Failure.LOST,
    "could not send ": Failure.LOST,
    "the connection is lost": Failure.LOST,  # psycopg
    "the connection is closed": Failure.LOST,  # psycopg
    "connection socket closed": Failure.LOST,  # psycopg, while it waits
    "connection already closed": Failure.LOST,  # psycopg2
}

# Behind a balancer, another server may have another process with this number. It does not have the client's port, which
# is -1 for a Unix socket ("pg_stat_activity").
CANCEL: Final = (
    "SELECT pg_catalog.pg_cancel_backend(pid) FROM pg_catalog.pg_stat_activity WHERE pid = %d AND client_port = %d"
)

#: The parameters that have the system ask the other side whether it is there ("Parameter Key Words").
KEEPALIVES: Final[Mapping[str, int]] = {
    "keepalives_idle": IDLE,
    "keepalives_interval": INTERVAL,
    "keepalives_count": COUNT,
}
#: In milliseconds. On Linux it also counts in place of the three above.
USER_TIMEOUT: Final = "tcp_user_timeout"
#: The fewest seconds of ``connect_timeout``: psycopg and libpq take 1 for 2.
SHORTEST_TIMEOUT: Final = 2
#: The version of libpq since which it has this parameter. It refuses one that it does not know.
HAS_USER_TIMEOUT: Final = 120000

#: The arguments with a whole connection string: psycopg2's and psycopg's.
CONNECTION_STRINGS: Final = ("dsn", "conninfo")

# libpq writes a server's message as "SEVERITY:  message", with two spaces, whatever the language of the severity.
ANSWERED: Final = ":  "
ATTEMPT: Final = re.compile("connection to server (at|on socket) .+ failed: ")


class LibpqDriver(PostgreSQLDriver):
    """What psycopg and psycopg2 have in common."""

    connect_timeout = "connect_timeout"
    keeps_alive = True
    waits_for_rows = 1
    #: The attribute of its errors with the SQLSTATE.
    sqlstate: str

    def code_of(self, error: object) -> Code:
        state = read_attribute(error, self.sqlstate)
        return state if type(state) is str else None

    def failure_of(self, error: object) -> Failure | None:
        state = self.code_of(error)
        return _failure_of_message(text_of(error)) if state is None else self.server.failure_of(state, error)

    def refuses_one_more(self, error: object) -> bool:
        said = text_of(error)
        return self.code_of(error) == TOO_MANY or any(words in said for words in FULL)

    def is_at_its_own_limit(self, error: object) -> bool:
        return OWN_LIMIT in text_of(error)

    def ping(self, dialect: Dialect, driver_connection: Any) -> None:
        # SQLAlchemy sends an empty query, to which a proxy need not ask a server. PgBouncer would close its own
        # connection to the server if a client left in a transaction.
        is_idle = self.transaction_status(driver_connection) == TRANSACTION_IDLE
        (ask_alone if is_idle else ask)(driver_connection, "SELECT 1")

    def network_defaults(
        self, module: Any, arguments: Collection[Any], options: Mapping[str, Any], connect_timeout: int
    ) -> dict[str, int]:
        # A name is said if a connection string has it anywhere: an argument would take precedence over the string.
        strings = [str(each) for each in (*arguments, *map(options.get, CONNECTION_STRINGS)) if each is not None]

        def says(name: str) -> bool:
            return name in options or any(name in string for string in strings)

        if says("service") or "PGSERVICE" in os.environ:
            return {}  # It may set any of them, and these would take precedence.
        defaults: dict[str, int] = {}
        if not says("connect_timeout") and "PGCONNECT_TIMEOUT" not in os.environ:
            defaults["connect_timeout"] = connect_timeout
        has_times = any(map(says, KEEPALIVES))
        if not has_times and not says("keepalives"):
            defaults.update(KEEPALIVES)
        if not has_times and not says(USER_TIMEOUT) and self.libpq_version(module) >= HAS_USER_TIMEOUT:
            defaults[USER_TIMEOUT] = UNACKNOWLEDGED * 1000
        return defaults

    def share_time(self, options: dict[str, Any], seconds: float) -> dict[str, Any]:
        hosts = str(options.get("host", "")).count(",") + 1
        share = max(int(seconds / hosts), SHORTEST_TIMEOUT)
        try:
            given = int(options.get("connect_timeout") or share + 1)
        except (TypeError, ValueError):
            return options  # The driver says what is wrong with it.
        return options if hosts == 1 or 0 < given <= share else {**options, "connect_timeout": share}

    def libpq_version(self, module: Any) -> int:
        """The version of libpq that the driver's module runs with; 0 if it does not tell."""
        return 0

    def is_idle(self, connection: Connection) -> bool:
        return _transaction_status(connection) == TRANSACTION_IDLE

    def is_aborted(self, connection: Connection) -> bool:
        return _transaction_status(connection) == IN_ERROR

    def has_nothing_to_lose(self, connection: Connection) -> bool:
        if connection.closed or connection.invalidated:
            return True
        # No transaction is open. In autocommit there never is one, and the connection may have a temporary table, a
        # setting or a lock that the request still needs. One that was aborted still has the error of its COMMIT.
        status = self.transaction_status(connection.connection.dbapi_connection)
        return status == TRANSACTION_IDLE and not self.has_autocommit(connection)

    def waits_to_begin(self, driver_connection: Any) -> bool:
        return self.transaction_status(driver_connection) == TRANSACTION_IDLE and not driver_connection.autocommit

    def waits_of_end(self, driver_connection: Any, kind: Literal["commit", "rollback"]) -> int:
        return int(self.transaction_status(driver_connection) != TRANSACTION_IDLE)

    def transaction_status(self, driver_connection: Any) -> int | None:
        """What libpq knows of the transaction; None if the driver does not pass that on."""
        return getattr(getattr(driver_connection, "info", None), "transaction_status", None)

    def parameter_status(self, driver_connection: Any, name: str) -> str | None:
        ask_driver = getattr(getattr(driver_connection, "info", None), "parameter_status", None)
        return None if ask_driver is None else ask_driver(name) or ""

    def is_waiting(self, driver_connection: Any) -> bool:
        return self.transaction_status(driver_connection) == ACTIVE

    def cancel(self, driver_connection: Any, connect: Callable[[], Any]) -> bool:
        # Not PQcancel(): psycopg2 keeps all of Python waiting for it, and a silent server never answers.
        number, port = driver_connection.info.backend_pid, port_of(self.file_number(driver_connection)) or "-1"
        other = connect()
        try:
            ask(other, CANCEL % (number, int(port)))
        finally:
            other.close()
        return True

    def file_number(self, driver_connection: Any) -> int | None:
        return file_number_of(driver_connection)


def _transaction_status(connection: Connection) -> object:
    if connection.closed or connection.invalidated:
        return None
    info = getattr(connection.connection.dbapi_connection, "info", None)
    return getattr(info, "transaction_status", None)


def _failure_of_message(text: str) -> Failure | None:
    # A name may stand for several servers. One that has answered counts for more than those that have not: "localhost"
    # is often refused by ::1 before 127.0.0.1 says that the password is wrong.
    words = ANSWERS if ANSWERED in text else SILENCE
    failure = next((failure for part, failure in words.items() if part in text), None)
    return Failure.UNAVAILABLE if failure is Failure.LOST and ATTEMPT.search(text) else failure
