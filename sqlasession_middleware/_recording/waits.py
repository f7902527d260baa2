"""Times what an engine waits for beside statements: its pool, new connections, COMMIT and ROLLBACK.

For these SQLAlchemy has no events, or such as tell only that they are to come. Whoever measures derives a class from
:class:`TimedWaits`, which has a method for each.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import event

from .._database.pool import wrap_connect
from .._dependencies import call_first
from .._drivers.registry import driver_of

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.engine import Dialect
    from sqlalchemy.pool import ConnectionPoolEntry

__all__ = ["EndKind", "TimedWaits"]

EndKind = Literal["commit", "rollback"]

#: When the connection began to be made that is being waited for. All subclasses set the same.
_connecting: ContextVar[float | None] = ContextVar("sqlasession_middleware.connecting", default=None)

#: Those who time the COMMITs of a dialect.
_timed: WeakKeyDictionary[Dialect, WeakSet[Any]] = WeakKeyDictionary()


class TimedWaits:
    """The listeners of one engine. They lead to it by nothing that would keep it.

    :param engine: what is to be measured.
    :param reader: who measures. Engines with one dialect, as ``execution_options()`` makes them, share their COMMITs,
        which are told to the first of them only.
    """

    def __init__(self, engine: Engine, reader: object) -> None:
        self._driver = driver_of(engine)
        event.listen(engine, "do_connect", self._begin_connect)
        call_first(engine, self._begin_connect, "do_connect")  # Another one may make the connection.
        event.listen(engine, "connect", self._end_connect, insert=True)
        wrap_connect(engine.pool, self._connect)
        dialect: Any = engine.dialect
        readers = _timed.setdefault(dialect, WeakSet())
        if reader not in readers:
            readers.add(reader)
            dialect.do_commit = partial(self._end, "commit", dialect.do_commit)
            dialect.do_rollback = partial(self._end, "rollback", dialect.do_rollback)
            dialect.do_ping = partial(self._ping, dialect.do_ping)

    # -- what a subclass does

    def wanted(self) -> Any:
        """What the methods below need; if it is false, nothing is measured now."""

    def note_connect(self, wanted: Any, entry: ConnectionPoolEntry, begin: float | None) -> None:
        """A connection was made. This is called in any case.

        :param begin: None if that is not known: an engine's own ``creator`` has no event.
        """

    def begin_wait(self, wanted: Any) -> None:
        """A connection is wanted of the pool."""

    def note_wait(self, wanted: Any, begin: float, connecting: float | None, error: BaseException | None) -> None:
        """A connection was had of the pool, or an error.

        :param connecting: when the connection began to be made, if it is a new one.
        """

    def note_end(
        self, wanted: Any, kind: EndKind, driver_connection: Any, waits: int, begin: float, error: BaseException | None
    ) -> None:
        """A COMMIT or ROLLBACK has ended.

        :param waits: how often the driver has waited for an answer; 0 if it knew that there was nothing to end.
        """

    def note_ping(self) -> None:
        """The pool pings a connection."""

    # -- what is called while the engine works

    def _begin_connect(self, dialect: Dialect, entry: ConnectionPoolEntry, arguments: Any, options: Any) -> None:
        _connecting.set(perf_counter())

    def _end_connect(self, driver_connection: Any, entry: ConnectionPoolEntry) -> None:
        self.note_connect(self.wanted(), entry, _connecting.get())

    def _connect(self, connect: Callable[[], Any]) -> Any:
        wanted = self.wanted()
        if not wanted:
            return connect()
        _connecting.set(None)
        self.begin_wait(wanted)
        begin = perf_counter()
        try:
            connection = connect()
        except BaseException as error:
            self.note_wait(wanted, begin, _connecting.get(), error)
            raise
        self.note_wait(wanted, begin, _connecting.get(), None)
        return connection

    def _end(self, kind: EndKind, end: Callable[[Any], None], driver_connection: Any) -> None:
        wanted = self.wanted()
        if not wanted:
            end(driver_connection)
            return
        # The pool passes what it has handed out.
        own = getattr(driver_connection, "dbapi_connection", driver_connection)
        waits = self._driver.waits_of_end(own, kind)
        begin = perf_counter()
        try:
            end(driver_connection)
        except BaseException as error:
            self.note_end(wanted, kind, driver_connection, waits, begin, error)
            raise
        self.note_end(wanted, kind, driver_connection, waits, begin, None)

    def _ping(self, ping: Callable[[Any], bool], driver_connection: Any) -> bool:
        self.note_ping()
        return ping(driver_connection)
