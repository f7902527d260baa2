"""Listeners that note in the record of a request what its engines and sessions do.

An engine has them once somebody records it; a process that records nothing has none.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from sqlalchemy import Engine, event
from sqlalchemy.engine.interfaces import ExecuteStyle
from sqlalchemy.orm import Session

from .._database.forks import fork_safe_lock
from .._database.lazy_begin import count_waits
from .._dependencies import calling_frame
from .._drivers.base import question_listeners
from .._scope.scope import Scope, current
from ..failures import Failure, classify
from .fetching import time_fetching
from .record import FLUSH, RECORD, End, Hold, Record, Statement, Wait
from .stacks import take_stack
from .waits import EndKind, TimedWaits

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.orm import ORMExecuteState
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

__all__ = ["record_engine", "record_objects", "recorded"]

#: Records of everything that the process does, whichever request it is in: those of tests.
_sinks: list[Record] = []

#: The execution option with the relationship that the ORM loads.
_RELATIONSHIP: Final = "sqlasession_relationship"
#: The attribute of an ExecutionContext with what was noted of its statement.
_NOTED: Final = "sqlasession_noted"
#: The keys in the ``info`` of a connection.
_NUMBER: Final = "sqlasession_middleware.number"
_HOLD: Final = "sqlasession_middleware.hold"

_is_flushing: ContextVar[bool] = ContextVar("sqlasession_middleware.is_flushing", default=False)

_names: WeakKeyDictionary[Engine, str] = WeakKeyDictionary()
_listening = fork_safe_lock()


def _records() -> tuple[Sequence[Record], int]:
    """The records that what happens now belongs to, and the number of the request's attempt."""
    scope: Any = current.get(None)
    while isinstance(scope, Scope):
        environ = scope.environ
        if environ is not None:
            record = environ.get(RECORD)
            if record is not None:
                transaction = scope.transaction
                if transaction is not None and (not record.transactions or record.transactions[-1] is not transaction):
                    record.transactions.append(transaction)
                attempt = record.last_attempt = environ.get("sqlasession.attempt", 1)
                return [record, *_sinks] if _sinks else (record,), attempt
            if _sinks:
                return _sinks, environ.get("sqlasession.attempt", 1)
        scope = scope.token.old_value if hasattr(scope, "token") else None
    return _sinks, 1


def record_engine(engine: Engine, name: str) -> None:
    """Note what an engine does in the records of the requests that use it.

    :param name: what the records call it.
    """
    with _listening:
        if engine in _names:
            return
        _names[engine] = name
        if _note_question not in question_listeners:
            question_listeners.append(_note_question)
    _EngineListeners(engine, name)


class _EngineListeners(TimedWaits):
    """The listeners of one engine.

    :param name: what the records call it.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        super().__init__(engine, record_engine)
        self._engine = name
        self._numbers = count(1)
        self._dialect = engine.dialect
        self._is_networked = self._driver.server.is_networked
        count_waits(engine.dialect, _note_trips)
        event.listen(engine, "before_cursor_execute", self._begin_statement)
        event.listen(engine, "after_cursor_execute", self._end_statement)
        event.listen(engine, "handle_error", self._fail_statement)
        event.listen(engine, "checkout", self._begin_hold)
        event.listen(engine, "checkin", self._end_hold)
        event.listen(engine, "detach", self._end_hold)
        event.listen(engine, "invalidate", self._lose)

    # -- statements

    def _begin_statement(
        self, connection: Connection, cursor: Any, sql: str, parameters: Any, context: Any, is_many: bool
    ) -> None:
        records, attempt = _records()
        if not records:
            return
        statement = Statement()
        statement.engine = self._engine
        statement.attempt = attempt
        statement.sql = sql
        statement.compiled = context.compiled
        statement.parameters = parameters
        statement.is_many = is_many
        statement.rows = -1
        statement.error = None
        statement.fetched = 0.0
        proxy = connection.connection
        noted = proxy.info.get(_HOLD)
        statement.hold = None if noted is None else noted[0]
        statement.relationship = FLUSH if _is_flushing.get() else context.execution_options.get(_RELATIONSHIP)
        statement.stack = take_stack(calling_frame(1))
        driver = self._driver
        is_sent_each = is_many and context.execute_style is ExecuteStyle.EXECUTEMANY
        trips = driver.waits_of(cursor, sql, len(parameters) if is_sent_each else None)
        if trips and driver.waits_to_begin(proxy.dbapi_connection):
            trips += 1
        for record in records:
            record.add(statement)
            record.trips += trips
        setattr(context, _NOTED, (statement, records))
        statement.end = 0.0
        statement.begin = perf_counter()

    def _end_statement(
        self, connection: Connection, cursor: Any, sql: str, parameters: Any, context: Any, is_many: bool
    ) -> None:
        now = perf_counter()
        noted = getattr(context, _NOTED, None)
        if noted is not None:
            statement, records = noted
            statement.end = now
            statement.rows = cursor.rowcount
            for record in records:
                record.seconds += now - statement.begin
            time_fetching(context, cursor, statement, records, self._driver.waits_for_rows)

    def _fail_statement(self, context: ExceptionContext) -> None:
        now = perf_counter()
        noted = getattr(context.execution_context, _NOTED, None)
        if noted is not None:
            statement, records = noted
            if not statement.end:
                statement.end = now
                for record in records:
                    record.seconds += now - statement.begin
            statement.error = context.sqlalchemy_exception or context.original_exception

    # -- connections

    def wanted(self) -> Any:
        records, attempt = _records()
        return (records, attempt) if records else None

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
            _note_trips(1)

    def _begin_hold(self, driver_connection: Any, entry: ConnectionPoolEntry, proxy: PoolProxiedConnection) -> None:
        records, attempt = _records()
        if records:
            number = entry.info.get(_NUMBER)
            if number is None:  # It was made before somebody recorded the engine.
                number = entry.info[_NUMBER] = next(self._numbers)
            hold = Hold(self._engine, number, attempt, perf_counter())
            entry.info[_HOLD] = hold, tuple(records)
            for record in records:
                record.begin_hold(hold)

    def _end_hold(self, driver_connection: Any, entry: ConnectionPoolEntry) -> None:
        noted = entry.info.pop(_HOLD, None)
        if noted is not None:
            hold, records = noted
            hold.end = perf_counter()
            for record in records:
                record.end_hold(hold)

    def _lose(self, driver_connection: Any, entry: ConnectionPoolEntry, error: BaseException | None) -> None:
        self._end_hold(driver_connection, entry)

    def _is_unknown(self, error: BaseException, driver_connection: Any) -> bool:
        is_lost = self._dialect.is_disconnect(error, driver_connection, None)  # type: ignore[arg-type]  # may be any
        return classify(error, committing=True, disconnected=is_lost) is Failure.UNKNOWN


def _note_trips(trips: int) -> None:
    """Note that the server was waited for, beside what is told of statements and their transactions."""
    for record in _records()[0]:
        record.trips += trips


def _note_question() -> None:
    _note_trips(1)


@contextmanager
def recorded() -> Iterator[Record]:
    """Record everything that the process does in a block, whichever request or thread it is in."""
    record = Record()
    record.most = sys.maxsize
    record_objects()
    with _listening:
        if not _sinks:
            event.listen(Engine, "engine_connect", _record_used)
        _sinks.append(record)
    try:
        yield record
    finally:
        with _listening:
            _sinks.remove(record)
            if not _sinks:
                event.remove(Engine, "engine_connect", _record_used)


def _record_used(connection: Connection) -> None:
    engine = connection.engine
    if engine not in _names:
        record_engine(engine, engine.url.render_as_string(hide_password=True))


def record_objects() -> None:
    """Note which objects the ORM loads, and for which relationship it sends a statement."""
    with _listening:
        if not event.contains(Session, "do_orm_execute", _note_relationship):
            event.listen(Session, "do_orm_execute", _note_relationship)
            event.listen(Session, "loaded_as_persistent", _note_object)
            event.listen(Session, "before_flush", _begin_flush)
            event.listen(Session, "after_flush", _end_flush)
            event.listen(Session, "after_soft_rollback", _end_flush)


def _note_relationship(state: ORMExecuteState) -> None:
    if not (state.is_select and state.is_orm_statement):
        return
    if state.lazy_loaded_from is None and not state.is_column_load:
        return
    if not _records()[0]:
        return
    path: Any = state.loader_strategy_path
    last = path.path[-1] if path is not None and path.path else None
    if last is not None and not state.is_column_load:
        name = f"{last.parent.class_.__name__}.{last.key}"
    else:
        name = state.bind_mapper.class_.__name__ if state.bind_mapper is not None else ""
    state.update_execution_options(**{_RELATIONSHIP: name})


def _begin_flush(session: Session, context: object, instances: object) -> None:
    _is_flushing.set(True)


def _end_flush(session: Session, context: object) -> None:
    _is_flushing.set(False)


def _note_object(session: Session, instance: object) -> None:
    kind = type(instance)
    for record in _records()[0]:
        record.objects[kind] = record.objects.get(kind, 0) + 1
