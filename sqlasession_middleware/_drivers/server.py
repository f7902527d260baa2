"""The questions to a database server, with the answers for one that nothing is known of: codes, SQL, limits."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from .answers import text_of
from .failure import Failure

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["MAX_CONNECTIONS", "Code", "Limit", "Server", "ServersDriver"]

#: What an error is known by: an SQLSTATE, or a number.
Code = str | int | None

#: The name of the limit of a whole server.
MAX_CONNECTIONS: Final = "max_connections"

# "table a already exists", "name is already used by an existing object"
_EXISTS: Final = re.compile("already", re.IGNORECASE)
# "no such table: a", "table or view does not exist"
_IS_GONE: Final = re.compile("no such|does not exist", re.IGNORECASE)


class Limit(NamedTuple):
    """How many connections a server admits, or one of its roles, accounts or databases.

    :param name: :data:`MAX_CONNECTIONS`, or what has the limit.
    :param reserved: how many of them are for administrators.
    """

    name: str
    maximum: int
    reserved: int = 0

    @property
    def free(self) -> int:
        """Those that an application can have."""
        return self.maximum - self.reserved


class ServersDriver(Protocol):
    """What a server asks the driver that it is used with."""

    def is_made_read_only(self, driver_connection: Any) -> bool:
        """Whether the driver was told to begin read-only transactions."""

    def parameter_status(self, driver_connection: Any, name: str) -> str | None:
        """What the server said of itself when the connection was made; None if the driver does not pass that on."""


class Server:
    """A database server, or several that answer alike. This class is for one that nothing is known of."""

    #: The names of SQLAlchemy's dialects for it, the one that reports use first.
    names: tuple[str, ...] = ()
    #: Where it listens unless the URL says otherwise.
    default_port: int | None = None
    #: Whether its connections can be lost, because it is another process, mostly behind a network.
    is_networked = True
    #: Whether the operating system keeps its locks by process, so that no open connection may go through a fork.
    locks_by_process = False
    #: Whether a replica can read at the isolation level SERIALIZABLE, and locks nothing by that.
    serializable_on_replicas = False
    #: What a dialect sends in place of COMMIT when all sides are prepared. A dialect that is not known may be derived
    #: from any of those that are.
    second_phase: tuple[str, ...] = ("COMMIT PREPARED", "XA COMMIT")

    #: What the codes of its errors mean. A code that is not listed is about the statement, the schema, the login or the
    #: program.
    failures: Mapping[Code, Failure] = {}
    #: What further codes mean when COMMIT has failed with them.
    failures_in_commit: Mapping[Code, Failure] = {}
    #: Codes that say only that a statement before has failed.
    consequences: Collection[Code] = ()
    #: Codes of a statement that was cancelled, by a client's request or by a limit of its time.
    cancelled: Collection[Code] = ()
    #: Whether a COMMIT that was cancelled has not taken place.
    undoes_cancelled_commits = True
    #: Codes with which the server rolls back the whole transaction, where the driver does not say so.
    silent_rollbacks: Collection[Code] = ()

    #: Whether a SELECT of READ COMMITTED sees the same in a transaction of its own, and a read-only transaction refuses
    #: whatever writes.
    can_begin_lazily = False
    #: Whether :meth:`has_written` can tell; if not, the session watches its statements.
    can_tell_writes = False
    #: Whether :meth:`has_written` and :meth:`has_open_cursor` wait for an answer: its engines watch what they send.
    asks_for_writes = False
    #: Whether it has a log with positions: :meth:`written_position`, :meth:`replayed_position`.
    has_positions = False
    #: A statement that makes a connection read-only.
    read_only_statement: str | None = None

    #: How many bits each of its integers has beside the sign; None if that depends on the type.
    integer_bits: int | None = None
    #: Whether a text with a NUL may be sent as a parameter.
    accepts_nul = True

    def failure_of(self, code: Code, error: object) -> Failure | None:
        """The meaning of an error."""
        return self.failures.get(code)

    def outdates_connections(self, code: Code, error: object) -> bool:
        """Whether an error says that what a connection keeps is outdated, so that other connections meet it as well."""
        return False

    def has_become_read_only(self, driver: ServersDriver, driver_connection: Any, code: Code) -> bool:
        """Whether an error says that the server refuses all writes, and not only those of this transaction."""
        return False

    def says_exists(self, code: Code, error: object) -> bool:
        """Whether an error says that what was to be created is there: somebody else was faster."""
        return _EXISTS.search(text_of(error)) is not None

    def says_gone(self, code: Code, error: object) -> bool:
        """Whether an error says that what was to be dropped is not there: somebody else was faster."""
        return _IS_GONE.search(text_of(error)) is not None

    @contextmanager
    def creating(self, connection: Connection) -> Iterator[None]:
        """Let others that create tables wait until the block, which commits, has ended; and wait for them before.

        A lock that cannot be had is no error: who creates without one may meet what others have created meanwhile.

        :param connection: a connection with no transaction open.
        """
        yield

    def dropping(self, connection: Connection) -> AbstractContextManager[None]:
        """The same for those that drop tables, who wait for those that create some, too."""
        return self.creating(connection)

    def has_written(self, driver: ServersDriver, driver_connection: Any) -> bool:
        """Whether the open transaction has something that a rollback would lose, locks included."""
        return True

    def has_open_cursor(self, driver_connection: Any) -> bool:
        """Whether rows are still to be fetched from a server-side cursor."""
        return False

    def written_position(self, driver_connection: Any) -> int | None:
        """The position in the server's log, in bytes, after all that was committed before."""
        return None

    def replayed_position(self, driver_connection: Any) -> int | None:
        """The position in the primary's log up to which a standby has replayed it; None of a server that is no standby.

        :raises Exception: the driver's, if it does not answer.
        """
        return None

    def begin_explaining(self, cursor: Any, is_read: bool, analyze: bool, seconds: int) -> str | None:
        """Have a new connection refuse to write, and no statement of it take long.

        :param cursor: the driver's own, of the connection.
        :param is_read: whether the statement only reads.
        :param analyze: whether it is to be run as well.
        :returns: what precedes a statement so that the server tells how it runs it; None if there is no such thing.
        """
        return None

    def limits(self, connection: Connection) -> list[Limit]:
        """What limits the connections to it; empty if nothing does, or if it cannot be asked."""
        return []
