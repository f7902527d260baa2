"""Listeners that note in the record of a request what its engines do.

An engine has them once somebody records it; a process that records nothing has none.
"""

from __future__ import annotations

from functools import partial
from itertools import count
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from sqlalchemy import Engine, event

from .._database.forks import fork_safe_lock
from .._database.lazy_begin import count_waits
from .._database.lost_commits import stores_nothing
from .._dependencies import root_engine
from .._drivers.answers import question_listeners
from ..failures import Failure, classify
from .objects import record_objects
from .present import note_trips, present_records
from .record import End, Hold, Wait
from .statements import HOLD, StatementListeners
from .waits import EndKind, TimedWaits

if TYPE_CHECKING:
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

__all__ = ["record_engine", "record_objects", "recorded_name"]

#: The key in the ``info`` of a connection with its number in its pool.
_NUMBER: Final = "sqlasession_middleware.number"

_names: WeakKeyDictionary[Engine, str] = WeakKeyDictionary()
_listening = fork_safe_lock()
_note_question = partial(note_trips, 1)


def record_engine(engine: Engine, name: str) -> None:
    """Note what an engine does in the records of the requests that use it.

    :param name: what the records call it.
    """
    engine = root_engine(engine)  # Those that were made of it have the same pool and the same dialect.
    with _listening:
        if engine in _names:
            return
        _names[engine] = name
        if _note_question not in question_listeners:
            question_listeners.append(_note_question)
    StatementListeners(engine, name)
    _ConnectionListeners(engine, name)


def recorded_name(engine: Engine) -> str | None:
    """What records call an engine; None if it is not recorded."""
    return _names.get(root_engine(engine))


class _ConnectionListeners(TimedWaits):
    """The listeners for the connections of one engine.

    :param name: what the records call it.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        super().__init__(engine, record_engine)
        self._engine = name
        self._numbers = count(1)
        self._dialect = engine.dialect
        self._is_networked = self._driver.server.is_networked
        count_waits(engine.dialect, note_trips)
        event.listen(engine, "checkout", self._begin_hold)
        event.listen(engine, "checkin", self._end_hold)
        event.listen(engine, "detach", self._end_hold)
        event.listen(engine, "invalidate", self._lose)

    def wanted(self) -> Any:
        present = present_records()
        return present if present[0] else None

    def note_connect(self, wanted: Any, entry: ConnectionPoolEntry, begin: float | None) -> None:
        entry.info[_NUMBER] = next(self._numbers)
        if wanted and begin is not None:
            records, attempt = wanted
            wait = Wait("connect", self._engine, attempt, begin, perf_counter())
            for record in records:
                record.add_wait(wait)

    def note_wait(self, wanted: Any, begin: float, connecting: float | None, error: BaseException | None) -> None:
        records, attempt = wanted
        # If it has made a connection, it has waited until then.
        wait = Wait("pool", self._engine, attempt, begin, connecting or perf_counter())
        for record in records:
            record.add_wait(wait)

    def note_end(
        self, wanted: Any, kind: EndKind, driver_connection: Any, waits: int, begin: float, error: BaseException | None
    ) -> None:
        now = perf_counter()
        records, attempt = wanted
        is_unknown = error is not None and kind == "commit" and self._is_unknown(error, driver_connection)
        end = End(kind, self._engine, attempt, begin, now, error, is_unknown, waits > 0)
        trips = waits if self._is_networked else 0
        for record in records:
            record.add_end(end)
            record.trips += trips

    def note_ping(self) -> None:
        if self._is_networked:
            note_trips(1)

    def _begin_hold(self, driver_connection: Any, entry: ConnectionPoolEntry, proxy: PoolProxiedConnection) -> None:
        records, attempt = present_records()
        if records:
            info = entry.info
            number = info.get(_NUMBER)
            if number is None:  # It was made before somebody recorded the engine.
                number = info[_NUMBER] = next(self._numbers)
            hold = Hold(self._engine, number, attempt, perf_counter())
            info[HOLD] = hold, records
            for record in records:
                record.begin_hold(hold)

    def _end_hold(self, driver_connection: Any, entry: ConnectionPoolEntry) -> None:
        noted = entry.info.pop(HOLD, None)
        if noted is not None:
            hold, records = noted
            hold.end = perf_counter()
            for record in records:
                record.end_hold(hold)

    def _lose(self, driver_connection: Any, entry: ConnectionPoolEntry, error: BaseException | None) -> None:
        self._end_hold(driver_connection, entry)

    def _is_unknown(self, error: BaseException, driver_connection: Any) -> bool:
        is_lost = self._dialect.is_disconnect(error, driver_connection, None)  # type: ignore[arg-type]  # may be any
        is_unknown = classify(error, committing=True, disconnected=is_lost) is Failure.UNKNOWN
        return is_unknown and not stores_nothing(driver_connection)
