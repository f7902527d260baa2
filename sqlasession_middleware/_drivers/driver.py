"""The questions to a driver, with the answers for one that nothing is known of.

They are about attributes of its connections and errors. A driver knows the server that it works with, so that a caller
has one object to ask. Connections are SQLAlchemy's, and a "driver connection" is the driver's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from socket import SHUT_RDWR
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from .._dependencies import socket_of
from .answers import file_number_of, read_attribute
from .failure import Failure
from .keepalive import duplicate
from .server import Code, Server

if TYPE_CHECKING:
    from sqlalchemy import Connection, Dialect

    from .psycopg_pipeline import Pipeline

__all__ = ["Driver"]

# "read-only transaction", "READ ONLY", "readonly database"
_REFUSES_WRITE: Final = re.compile("read.?only", re.IGNORECASE)


class Driver:
    """A driver, and the server that it works with. This class is for one that nothing is known of.

    :param server: another one than :attr:`server`, for a dialect of a server that is not its usual one.
    """

    #: What SQLAlchemy calls it: ``Dialect.driver``.
    name: str | None = None
    #: The module that its connections and errors come from, or the package of that module.
    module: str | None = None
    #: The server that it is made for.
    server: Server = Server()
    #: What any server answers that the driver can work with, whatever the dialect for it is called.
    compatible_server: Server = Server()
    #: Whether its ``rollback()`` asks the server each time, and :meth:`module_without_idle_rollbacks` is of use.
    can_tell_rest = False
    #: The argument of its ``connect()`` that limits how long connecting may take, in seconds.
    connect_timeout: str | None = None
    #: The argument of its ``connect()`` that limits how long it waits for an answer, in seconds, also when it connects.
    read_timeout: str | None = None
    #: The arguments of its ``connect()`` that name a file which may have that limit, and a part of such a file.
    option_files: Collection[str] = ()
    #: Whether arguments of its ``connect()`` have the system watch the other side of a connection; see
    #: :meth:`network_defaults`. Otherwise its sockets are set.
    keeps_alive = False
    #: Whether its cursors that do not buffer take an error among the rows for their end; see :meth:`mind_rows`.
    ends_rows_silently = False
    #: Whether ``executemany()`` makes one INSERT for many rows, if a pattern finds that there is nothing behind VALUES.
    gathers_rows = False
    #: How often it waits when it fetches rows of a server-side cursor, and when it closes one.
    waits_for_rows = 0

    def __init__(self, server: Server | None = None) -> None:
        if server is not None:
            self.server = server

    def working_with(self, server: Server | None) -> Self:
        """The same driver for another server; None for one whose dialect is not known."""
        server = self.compatible_server if server is None else server
        return self if server is self.server else type(self)(server)

    # Errors

    def code_of(self, error: object) -> Code:
        """What an error is known by. Never raises."""
        return None

    def failure_of(self, error: object) -> Failure | None:
        """What an error means, as far as it says so by itself. Never raises."""
        return self.server.failure_of(self.code_of(error), error)

    def failure_in_commit(self, error: object) -> Failure | None:
        """What an error means that COMMIT has failed with, if :meth:`failure_of` returns None."""
        return self.server.failures_in_commit.get(self.code_of(error))

    def is_consequence(self, error: object) -> bool:
        """Whether an error says only that a statement before has failed."""
        return self.code_of(error) in self.server.consequences

    def has_rolled_back(self, error: object) -> bool:
        """Whether the server has rolled back the whole transaction at an error, and the driver does not say so."""
        return self.code_of(error) in self.server.silent_rollbacks

    def was_cancelled(self, error: object) -> bool:
        """Whether an error says that the statement was cancelled."""
        return self.code_of(error) in self.server.cancelled

    def refuses_one_more(self, error: object) -> bool:
        """Whether an error says that the server answers, but has as many connections as it admits."""
        return False

    def is_at_its_own_limit(self, error: object) -> bool:
        """Whether an error says that one account or one database has as many connections as it may, not the server."""
        return False

    def refuses_write(self, error: object) -> bool:
        """Whether an error says that nothing can be written here."""
        return _REFUSES_WRITE.search(str(error)) is not None

    def says_exists(self, error: object) -> bool:
        """Whether an error says that what was to be created is there: somebody else was faster."""
        return self.server.says_exists(self.code_of(error), error)

    def says_gone(self, error: object) -> bool:
        """Whether an error says that what was to be dropped is not there: somebody else was faster."""
        return self.server.says_gone(self.code_of(error), error)

    def outdates_connections(self, error: object) -> bool:
        """Whether an error says that what a connection keeps is outdated, so that other connections meet it as well."""
        return self.server.outdates_connections(self.code_of(error), error)

    def has_become_read_only(self, connection: Connection, error: object) -> bool:
        """Whether an error says that the server refuses all writes, as an old primary does after a failover.

        False if the application has made the transaction read-only itself.
        """
        if connection.closed or connection.invalidated:
            return False
        driver_connection = connection.connection.dbapi_connection
        return self.server.has_become_read_only(self, driver_connection, self.code_of(error))

    # Transactions

    def pipeline(self) -> Pipeline | None:
        """What sends BEGIN together with a statement; None if the driver, or the server, has no such thing."""
        return None

    def prepares(self, driver_connection: Any) -> bool:
        """Whether it has the server prepare a statement whose text is sent often."""
        return False

    def stop_preparing(self, driver_connection: Any) -> None:
        """Have it not do so from now on."""

    def is_idle(self, connection: Connection) -> bool:
        """Whether no transaction is open, as the driver knows without asking the server; False if it does not."""
        return False

    def is_aborted(self, connection: Connection) -> bool:
        """Whether the server has given up the transaction, and would answer a COMMIT with a ROLLBACK and no error."""
        return False

    def waits_to_begin(self, driver_connection: Any) -> bool:
        """Whether it waits for the answer to a BEGIN of its own before it sends what comes next."""
        return False

    def waits_of_end(self, driver_connection: Any, kind: Literal["commit", "rollback"]) -> int:
        """How often it waits for an answer when it commits or rolls back; 0 if it knows that there is nothing to end.

        A driver that works without a server waits for its file.
        """
        return 1

    def waits_of(self, cursor: Any, statement: object, many: int | None) -> int:
        """How often it waits for a server's answer when it executes a statement.

        :param many: how many sets of parameters ``executemany()`` has got; None for ``execute()``.
        """
        return 1 if many is None else many

    def has_autocommit(self, connection: Connection) -> bool:
        """Whether the driver itself was told to commit each statement, without SQLAlchemy's knowledge."""
        driver_connection = connection.connection.dbapi_connection
        ask_driver = getattr(driver_connection, "get_autocommit", None)  # PyMySQL, mysqlclient
        return bool(ask_driver()) if ask_driver is not None else getattr(driver_connection, "autocommit", None) is True

    def has_written(self, connection: Connection) -> bool:
        """Whether the open transaction has something that a rollback would lose, locks included.

        True where that cannot be known: :attr:`Server.can_tell_writes`.
        """
        if connection.closed or connection.invalidated or self.is_idle(connection) or self.is_aborted(connection):
            return False
        return self.server.has_written(self, connection.connection.dbapi_connection)

    def has_open_cursor(self, connection: Connection) -> bool:
        """Whether rows are still to be fetched from a server-side cursor (``stream_results``, ``yield_per``).

        False where that cannot be known.
        """
        if connection.closed or connection.invalidated or self.is_idle(connection) or self.is_aborted(connection):
            return False
        return self.server.has_open_cursor(connection.connection.dbapi_connection)

    def has_nothing_to_lose(self, connection: Connection) -> bool:
        """Whether it is known here that the end of the transaction would lose nothing: no change, lock or open cursor.

        False where that is not known, or only the server could tell: this waits for no answer.
        """
        return connection.closed or connection.invalidated

    def has_something_to_lose(self, connection: Connection) -> bool:
        """Whether the end of the transaction would lose something: :meth:`has_written`, or :meth:`has_open_cursor`.

        A driver that has to ask the server asks once for both.
        """
        return self.has_written(connection) or self.has_open_cursor(connection)

    def is_cursor_closed(self, cursor: Any) -> bool:
        """Whether a cursor of the driver is closed, as SQLAlchemy does after the last row."""
        # PyMySQL and mysqlclient forget the connection instead.
        return bool(cursor.closed) if hasattr(cursor, "closed") else cursor.connection is None

    def begin_writing(self, connection: Connection, always: bool = False) -> None:
        """Begin the transaction that the driver would begin only before the first statement that writes.

        :param always: also where the application begins its transactions itself.
        """

    def written_position(self, connection: Connection) -> int | None:
        """After a commit: the position in the server's log that includes it.

        None where the server has no such thing, or does not answer.
        """
        if not self.server.has_positions or connection.closed or connection.invalidated:
            return None
        try:
            return self.server.written_position(connection.connection.dbapi_connection)
        except Exception:
            return None  # The commit has taken place, whatever has happened to the connection since.

    def replayed_position(self, connection: Connection) -> int | None:
        """The position in the primary's log up to which a standby has replayed it; None of a server that is no standby.

        :raises Exception: the driver's, if it does not answer.
        """
        return self.server.replayed_position(connection.connection.dbapi_connection)

    # Pings

    def prepare_ping(self, arguments: list[Any], options: dict[str, Any], seconds: int) -> None:
        """Change the arguments of the driver's ``connect()`` for a connection that is only to be pinged.

        It must neither wait much longer than ``seconds`` nor create a database.

        :raises Exception: if it is known without connecting that the database is not there.
        """
        if self.connect_timeout is not None:
            options[self.connect_timeout] = seconds

    def ping(self, dialect: Dialect, driver_connection: Any) -> None:
        """Ask the server itself for an answer, and leave no transaction open that was not.

        :raises Exception: the driver's, if there is none.
        """
        dialect.do_ping(driver_connection)
        dialect.do_rollback(driver_connection)

    # Driver connections

    def network_defaults(
        self, module: Any, arguments: Collection[Any], options: Mapping[str, Any], connect_timeout: int
    ) -> dict[str, int]:
        """The arguments to add to those of a new connection, so that it does not wait for a network without end.

        Nothing that the application has said something about, be it in a file or in the environment.

        :param module: the driver's module.
        :param arguments: the arguments of its ``connect()`` without a name.
        :param options: the others.
        :param connect_timeout: the seconds that connecting may take.
        """
        if self.connect_timeout is None or not options.keys().isdisjoint((self.connect_timeout, *self.option_files)):
            return {}
        return {self.connect_timeout: connect_timeout}

    def limit_connecting(self, module: Any, options: dict[str, Any]) -> None:
        """Have a new connection heed :attr:`connect_timeout` where the driver by itself would not.

        :param options: the arguments of its ``connect()`` that have a name, to be changed.
        """

    def share_time(self, options: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The arguments of its ``connect()`` that have a name, so that each of several hosts has a part of the time.

        :param seconds: how long whoever connects waits for all of them together.
        """
        return options

    def make_read_only(self, driver_connection: Any) -> None:
        """Have a new connection refuse to write, as far as that can be had."""
        if self.server.read_only_statement is not None:
            cursor = driver_connection.cursor()
            try:
                cursor.execute(self.server.read_only_statement)
            finally:
                cursor.close()

    def is_made_read_only(self, driver_connection: Any) -> bool:
        """Whether the driver was told to begin read-only transactions."""
        return False

    def parameter_status(self, driver_connection: Any, name: str) -> str | None:
        """What the server said of itself when the connection was made; None if the driver does not pass that on."""
        return None

    def module_without_idle_rollbacks(self, module: Any) -> Any:
        """A stand-in for the driver's module. ``rollback()`` of its connections sends nothing if all is at rest."""
        return module

    # Deadlines: but for the first one, these are called in another thread than the one that uses the connection

    def prepare_for_watch(self, driver_connection: Any) -> None:
        """Note what the other thread needs, before it may need it."""

    def is_waiting(self, driver_connection: Any) -> bool:
        """Whether the server is to answer, or may be; True where that is not known."""
        return True

    def cancel(self, driver_connection: Any, connect: Callable[[], Any]) -> bool:
        """Ask the server to end what it does for a connection. It may take long to ask.

        :param connect: makes another connection of the same engine.
        :returns: False if nobody but the server would know that it was not the server that has taken the request.
        :raises Exception: the driver's, if the server does not answer.
        """
        return True

    def mind_rows(self, cursor: Any, check: Callable[[bool], None]) -> None:
        """Have a cursor call something after each fetch, with whether there are no more rows, as it seems."""

    def cut(self, driver_connection: Any) -> None:
        """End the wait of whoever uses a connection, which is lost then."""
        number = self.file_number(driver_connection)
        if number is None:
            return
        with duplicate(number) as found:
            # If it was closed in the meantime, the number may be that of another connection.
            if self.file_number(driver_connection) == number and self.is_waiting(driver_connection):
                found.shutdown(SHUT_RDWR)

    # Deadlines, in the thread that uses the connection

    def limit_waits(self, driver_connection: Any, seconds: float) -> object:
        """Have the driver itself wait no longer for a lock, where it waits without a server.

        :returns: what :meth:`restore_waits` needs; None if there is nothing to do.
        """
        return None

    def restore_waits(self, driver_connection: Any, before: Any) -> None:
        """Undo :meth:`limit_waits`."""

    def file_number(self, driver_connection: Any) -> int | None:
        """The descriptor of a connection's socket; None if it has none, or does not tell."""
        candidates = (driver_connection, read_attribute(driver_connection, "socket"), socket_of(driver_connection))
        return next((number for number in map(file_number_of, candidates) if number is not None), None)
