"""MySQL and MariaDB, with Galera: codes of their errors, and questions in SQL."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, partial, wraps
from importlib import import_module
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Final, Literal

from sqlalchemy import text

from .answers import ask, first_argument, port_of, read_attribute, text_of
from .driver import Driver
from .failure import Failure
from .server import MAX_CONNECTIONS, Code, Limit, Server, ServersDriver

if TYPE_CHECKING:
    from sqlalchemy import Connection, Dialect

__all__ = ["CompatibleWithMySQL", "MySQL", "MySQLDriver", "number_of"]

#: ER_LOCK_DEADLOCK
DEADLOCK: Final = 1213

#: ER_CON_COUNT_ERROR, ER_TOO_MANY_USER_CONNECTIONS, ER_USER_LIMIT_REACHED
TOO_MANY_CONNECTIONS: Final = (1040, 1203, 1226)
#: Those of them that are about the account only.
TOO_MANY_OF_ACCOUNT: Final = (1203, 1226)

# MySQL: "Server Error Message Reference", "Client Error Message Reference", "InnoDB Error Handling".
# MariaDB: "MariaDB Error Code Reference". Galera Cluster: "Server Error Log", "Two-Node Clusters".
# ProxySQL: PROXYSQL_MYSQL_ERR in its source, of which 9003 is a command that it does not support. Amazon RDS Proxy:
# "Troubleshooting for RDS Proxy".
NUMBERS: Final[Mapping[Code, Failure]] = {
    1020: Failure.TRANSIENT,  # ER_CHECKREAD: MariaDB's snapshot isolation, the default since 11.6.2
    1205: Failure.TRANSIENT,  # ER_LOCK_WAIT_TIMEOUT; MariaDB's NOWAIT
    DEADLOCK: Failure.TRANSIENT,  # also Galera's certification failure, also in COMMIT
    1412: Failure.TRANSIENT,  # ER_TABLE_DEF_CHANGED: "please retry transaction"
    1614: Failure.TRANSIENT,  # ER_XA_RBDEADLOCK
    1615: Failure.TRANSIENT,  # ER_NEED_REPREPARE: the table of a prepared statement has changed, or left the cache
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
    2026: Failure.LOST,  # CR_SSL_CONNECTION_ERROR, where the connection was closed
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
    1815: Failure.UNAVAILABLE,  # ER_INTERNAL_ERROR, where it is MaxScale's or ColumnStore's that a server is away
    1836: Failure.UNAVAILABLE,  # ER_READ_ONLY_MODE
    2002: Failure.UNAVAILABLE,  # CR_CONNECTION_ERROR
    2003: Failure.UNAVAILABLE,  # CR_CONN_HOST_ERROR
    2005: Failure.UNAVAILABLE,  # CR_UNKNOWN_HOST
    2012: Failure.UNAVAILABLE,  # CR_SERVER_HANDSHAKE_ERR
    9001: Failure.UNAVAILABLE,  # ProxySQL: no connection to a server in time
    9002: Failure.UNAVAILABLE,  # ProxySQL: too many attempts to connect to a server have failed
    9004: Failure.UNAVAILABLE,  # ProxySQL: the server is offline
    9005: Failure.UNAVAILABLE,  # ProxySQL: the server lags behind
    9006: Failure.UNAVAILABLE,  # ProxySQL: the server does not answer a ping
    9007: Failure.UNAVAILABLE,  # ProxySQL: the server does not answer a change of the user
    9501: Failure.UNAVAILABLE,  # Amazon RDS Proxy: no connection to a server in time
}

NUMBERS_IN_COMMIT: Final[Mapping[Code, Failure]] = {
    # ER_ERROR_DURING_COMMIT: of Galera's node that was cut off from the others, which may have it or not (wsrep-lib,
    # "transaction.cpp": the provider's error_connection_failed).
    1180: Failure.UNKNOWN,
}

#: Numbers that say it only with these words. Others of 2026 are about certificates and versions of TLS, and others of
#: 1815 about the statement.
WORDS: Final[Mapping[Code, re.Pattern[str]]] = {
    1290: re.compile("--[a-z-]*read[-_]only"),
    1815: re.compile(
        "session creation failed|new router session|lost connection|not ready yet|is not responding"
        "|connection to (the )?(backend|server|master|primary)",
        re.IGNORECASE,
    ),
    2026: re.compile("eof|reset by peer|broken pipe|timed out|closed", re.IGNORECASE),
}

#: ER_OPTION_PREVENTS_STATEMENT, ER_READ_ONLY_MODE: the whole server.
READ_ONLY_SERVERS: Final = (1290, 1836)
#: ER_CANT_EXECUTE_IN_READ_ONLY_TRANSACTION: the server's, if it begins all transactions so, or else this one.
READ_ONLY_TRANSACTION: Final = 1792
# MySQL has renamed the variable, MariaDB has both names.
ASK_READ_ONLY: Final = "SHOW GLOBAL VARIABLES WHERE Variable_name IN ('transaction_read_only', 'tx_read_only')"

# Behind a balancer, another server may have another connection with this number. The server's list has the client's
# port with it, which that connection does not have; a host without a port is a socket of this machine.
ASK_WHETHER_SAME: Final = "SELECT host FROM information_schema.processlist WHERE id = %d"

# What a CREATE says that has lost a race, and a DROP. ER_DUP_KEYNAME is not here: only who has created a table creates
# its indexes.
EXISTS: Final[Collection[Code]] = (
    1007,  # ER_DB_CREATE_EXISTS
    1050,  # ER_TABLE_EXISTS_ERROR, also of sequences
    1826,  # ER_FK_DUP_NAME
)
#: ER_CANT_CREATE_TABLE, of MariaDB, where the reason is the name of a foreign key.
CANT_CREATE_TABLE: Final = 1005
DUPLICATE_KEY: Final = re.compile(r"errno: 121\b")
IS_GONE: Final[Collection[Code]] = (
    1008,  # ER_DB_DROP_EXISTS
    1051,  # ER_BAD_TABLE_ERROR
    1091,  # ER_CANT_DROP_FIELD_OR_KEY, also of foreign keys
    1146,  # ER_NO_SUCH_TABLE, where a foreign key is dropped first
    4091,  # ER_UNKNOWN_SEQUENCES, of MariaDB
)

# The name of the lock of those that create tables. Such locks belong to the whole server, and their names have up to
# 64 characters, as those of databases. It is the same in all versions of this library.
CREATING: Final = "CONCAT('sqlasession ', SHA1(COALESCE(DATABASE(), '')))"
#: How many seconds to wait for it. Each query waits for one, because drivers and servers have timeouts for a query.
WAITING_FOR_CREATION: Final = 60
LOCK_CREATION: Final = f"SELECT GET_LOCK({CREATING}, 1)"
UNLOCK_CREATION: Final = f"SELECT RELEASE_LOCK({CREATING})"

# One more is admitted, for an administrator ("max_connections"). The other one is the account's own, 0 for no limit.
ASK_LIMITS: Final = (
    "SELECT @@max_connections, CONCAT('max_user_connections of ', CURRENT_USER()), @@max_user_connections"
)


#: Of these, ``executemany()`` makes one statement of many rows.
_INSERT: Final = re.compile(r"\s*(INSERT|REPLACE)\b", re.IGNORECASE)


class CompatibleWithMySQL(Server):
    """Any server that speaks MySQL's protocol, such as TiDB, StarRocks and SingleStore."""

    second_phase = ("XA COMMIT",)
    failures = NUMBERS
    failures_in_commit = NUMBERS_IN_COMMIT
    # ER_QUERY_INTERRUPTED, MariaDB's ER_STATEMENT_TIMEOUT, MySQL's ER_QUERY_TIMEOUT. A COMMIT that waits for a replica
    # is durable already.
    cancelled = (1317, 1969, 3024)
    undoes_cancelled_commits = False
    # A deadlock rolls back the transaction, a lock timeout only the statement ("InnoDB Error Handling").
    silent_rollbacks = (DEADLOCK,)

    def failure_of(self, code: Code, error: object) -> Failure | None:
        words = WORDS.get(code)
        return None if words is not None and not words.search(text_of(error)) else self.failures.get(code)

    def says_exists(self, code: Code, error: object) -> bool:
        return code in EXISTS or (code == CANT_CREATE_TABLE and DUPLICATE_KEY.search(text_of(error)) is not None)

    def says_gone(self, code: Code, error: object) -> bool:
        return code in IS_GONE

    def has_become_read_only(self, driver: ServersDriver, driver_connection: Any, code: Code) -> bool:
        if code != READ_ONLY_TRANSACTION:
            return code in READ_ONLY_SERVERS
        try:
            return bool(ask(driver_connection, ASK_READ_ONLY)[1] == "ON")
        except Exception:
            return True  # A server that says nothing of it is replaced for nothing, at worst.


class MySQL(CompatibleWithMySQL):
    """MySQL and MariaDB, which have the same codes and limits."""

    names = ("mysql", "mariadb")
    default_port = 3306
    read_only_statement = "SET SESSION TRANSACTION READ ONLY"
    # Some have no sign, and the server knows that no row has a number that is too large.
    integer_bits = 64

    @contextmanager
    def creating(self, connection: Connection) -> Iterator[None]:
        """A lock of the session, because each CREATE TABLE commits."""
        driver_connection = connection.connection.dbapi_connection
        locked = False
        with suppress(Exception):  # Galera has no such locks since MariaDB 10.6.13: ER_NOT_SUPPORTED_YET.
            locked = any(ask(driver_connection, LOCK_CREATION)[0] == 1 for _ in range(WAITING_FOR_CREATION))
        try:
            yield
        finally:
            if locked:
                with suppress(Exception):  # The lock is gone with the connection.
                    ask(driver_connection, UNLOCK_CREATION)

    def begin_explaining(self, cursor: Any, is_read: bool, analyze: bool, seconds: int) -> str | None:
        if is_read:  # In such a transaction not even the plan of a write is told.
            cursor.execute("SET SESSION TRANSACTION READ ONLY")
        else:  # MariaDB calls functions for a plan: what they write is rolled back.
            cursor.execute("SET SESSION autocommit = 0")
        cursor.execute("SELECT VERSION()")
        is_mariadb = "mariadb" in str(cursor.fetchone()[0]).lower()
        limit = f"max_statement_time = {seconds}" if is_mariadb else f"max_execution_time = {seconds * 1000}"
        cursor.execute(f"SET SESSION {limit}")
        if analyze:
            return "ANALYZE " if is_mariadb else "EXPLAIN ANALYZE "
        return "EXPLAIN "

    def limits(self, connection: Connection) -> list[Limit]:
        maximum, account, of_account = connection.execute(text(ASK_LIMITS)).one()
        return [Limit(MAX_CONNECTIONS, maximum), *([Limit(account, of_account)] if of_account > 0 else [])]


class MySQLDriver(Driver):
    """Any driver of MySQL and MariaDB.

    None of them tells whether a cursor of the server is open, and with some of them a query would break the cursor.

    What was sent tells whether anything is open. The server's status flags do not: PyMySQL does not read those that
    follow a result, mysqlclient does not pass them on, and an error, which may leave locks, has none.
    """

    server = MySQL()
    compatible_server = CompatibleWithMySQL()
    gathers_rows = True  # PyMySQL and mysqlclient.
    #: The public methods of its connections, and the properties that can be set, by which anything is sent that may
    #: leave something open, beside ``commit()`` and ``rollback()``; also those after which nothing is known.
    sending: tuple[str, ...] = ()

    def code_of(self, error: object) -> Code:
        number = number_of(read_attribute(error, "errno"))
        return number_of(first_argument(error)) if number is None else number

    def refuses_one_more(self, error: object) -> bool:
        return self.code_of(error) in TOO_MANY_CONNECTIONS

    def is_at_its_own_limit(self, error: object) -> bool:
        return self.code_of(error) in TOO_MANY_OF_ACCOUNT

    def prepare_ping(self, arguments: list[Any], options: dict[str, Any], seconds: int) -> None:
        super().prepare_ping(arguments, options, seconds)
        if self.connect_timeout is not None:
            # With PyMySQL, the connect timeout ends as soon as the port is open, before the server has said anything.
            options.update(read_timeout=seconds, write_timeout=seconds)

    def ping(self, dialect: Dialect, driver_connection: Any) -> None:
        # A query, because ProxySQL and MaxScale answer the drivers' ping() themselves. Without a table it begins no
        # transaction.
        ask(driver_connection, "SELECT 1")

    def module_without_idle_rollbacks(self, module: Any) -> Any:
        def connect(*arguments: Any, **options: Any) -> Any:
            kind = self.class_of_connections(module)
            if kind is None:
                return module.connect(*arguments, **options)
            return self.connect_with(module, attentive_class(self, kind), arguments, options)

        # Whatever else SQLAlchemy or an application looks for is the module's.
        stand_in = ModuleType(module.__name__, module.__doc__)
        vars(stand_in).update(connect=connect, __getattr__=partial(getattr, module), __dir__=partial(dir, module))
        return stand_in

    def connect_with(self, module: Any, kind: type, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """A new connection of a class, as the driver's own ``connect()`` makes those of its class."""
        return kind(*arguments, **options)

    def class_of_connections(self, module: Any) -> type | None:
        """The class of the connections that ``connect()`` of the driver's module makes.

        :return: None if it is not the driver's own, or was replaced, such as by what measures its connections.
        """
        if module.__name__ != self.module:
            return None  # such as PyMySQL installed as MySQLdb
        try:
            kind = import_module(f"{self.module}.connections").Connection
        except (ImportError, AttributeError):
            return None  # of a version that is not known
        if type(kind) is not type or kind.__module__ != f"{self.module}.connections":
            return None
        connect = module.connect
        is_plain = connect is kind or (type(connect) is FunctionType and connect.__globals__ is vars(module))
        return kind if is_plain else None

    def is_waiting(self, driver_connection: Any) -> bool:
        # None of the drivers tells whether it waits. Between two statements of a transaction it does not.
        return not (hasattr(driver_connection, "at_rest") and self.is_at_rest(driver_connection))

    def cancel(self, driver_connection: Any, connect: Callable[[], Any]) -> bool:
        number, port = self.connection_number(driver_connection), port_of(self.file_number(driver_connection))
        if number is None:
            return True
        other = connect()
        try:
            row = ask(other, ASK_WHETHER_SAME % number)
            if row is not None and str(row[0]).partition(":")[2] == port:
                ask(other, f"KILL QUERY {number:d}")
        finally:
            other.close()
        return True

    def waits_of_end(self, driver_connection: Any, kind: Literal["commit", "rollback"]) -> int:
        is_at_rest = hasattr(driver_connection, "at_rest") and self.is_at_rest(driver_connection)
        return int(kind == "commit" or not is_at_rest)

    def waits_of(self, cursor: Any, statement: object, many: int | None) -> int:
        is_gathered = self.gathers_rows and isinstance(statement, str) and _INSERT.match(statement) is not None
        return 1 if many is None or is_gathered else many

    def connection_number(self, driver_connection: Any) -> int | None:
        """The number that the server knows a connection by."""
        found = driver_connection.thread_id() if hasattr(driver_connection, "thread_id") else None
        return number_of(found)

    def note_rest(self, driver_connection: Any) -> None:
        """After a COMMIT or a ROLLBACK: note that nothing is open, until something is sent."""
        driver_connection.at_rest = True

    def is_at_rest(self, driver_connection: Any) -> bool:
        """Whether nothing was sent since :meth:`note_rest`, by whoever has the connection or one of its cursors."""
        at_rest: bool = driver_connection.at_rest
        return at_rest


@cache
def attentive_class(driver: MySQLDriver, kind: type[Any]) -> type:
    """A subclass of a driver's connections, which notes what is sent, and sends no ROLLBACK if that was nothing.

    :param kind: the driver's class. Its methods are looked up at each call, as something may replace them later.
    """

    def commit(self: Any) -> None:
        kind.commit(self)
        driver.note_rest(self)

    def rollback(self: Any) -> None:
        if not driver.is_at_rest(self):
            kind.rollback(self)
            driver.note_rest(self)

    def ping(self: Any, *arguments: Any, **options: Any) -> Any:
        """It leaves nothing open, but is waited for."""
        before, self.at_rest = self.at_rest, False
        answer = kind.ping(self, *arguments, **options)
        self.at_rest = before
        return answer

    def noting(name: str) -> Any:
        def send(self: Any, *arguments: Any, **options: Any) -> Any:
            self.at_rest = False
            return getattr(kind, name)(self, *arguments, **options)

        def set_property(self: Any, value: Any) -> None:
            self.at_rest = False
            getattr(kind, name).__set__(self, value)

        found = getattr(kind, name)
        return property(found.__get__, set_property) if isinstance(found, property) else wraps(found)(send)

    # A version may not have all of them.
    methods = {name: noting(name) for name in driver.sending if hasattr(kind, name)}
    # What reads the names of classes, such as a log, finds the usual ones.
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    own = {"at_rest": False} | {
        call.__name__: wraps(getattr(kind, call.__name__))(call) for call in (commit, rollback, ping)
    }
    return type(kind.__name__, (kind,), {**names, **own, **methods})


def number_of(value: object) -> int | None:
    """The number of an error, if it is a number."""
    return value if type(value) is int else None
