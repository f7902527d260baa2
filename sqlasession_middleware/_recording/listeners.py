"""Listeners that note in the record of a request what its engines and sessions do.

An engine has them once somebody records it; a process that records nothing has none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import count
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import Engine, event
from sqlalchemy.orm import Session

from .._database.forks import fork_safe_lock
from .._database.pool import wrap_connect
from .._database.reads import BEGINS
from .._dependencies import calling_frame
from .._scope.scope import Scope, current
from ..failures import Failure, classify
from .record import FLUSH, RECORD, End, Hold, Record, Statement, Wait
from .stacks import take_stack

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.engine import Dialect, ExceptionContext
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

#: when the connection began to be made that is being waited for
_connecting: ContextVar[float | None] = ContextVar("sqlasession_middleware.connecting", default=None)
_is_flushing: ContextVar[bool] = ContextVar("sqlasession_middleware.is_flushing", default=False)

_names: WeakKeyDictionary[Engine, str] = WeakKeyDictionary()
_timed: WeakSet[Dialect] = WeakSet()
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
    listeners = _EngineListeners(name)
    event.listen(engine, "before_cursor_execute", listeners.begin_statement)
    event.listen(engine, "after_cursor_execute", listeners.end_statement)
    event.listen(engine, "handle_error", listeners.fail_statement)
    event.listen(engine, "do_connect", listeners.begin_connect, insert=True)
    event.listen(engine, "connect", listeners.end_connect, insert=True)
    event.listen(engine, "checkout", listeners.begin_hold)
    event.listen(engine, "checkin", listeners.end_hold)
    event.listen(engine, "detach", listeners.end_hold)
    event.listen(engine, "invalidate", listeners.lose)
    event.listen(engine, "engine_disposed", listeners.time_pool)
    listeners.time_pool(engine)
    listeners.time_ends(engine.dialect)


class _EngineListeners:
    """The listeners of one engine.

    :param engine: its name.
    """

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._numbers = count(1)

    # -- statements

    def begin_statement(
        self, connection: Connection, cursor: Any, sql: str, parameters: Any, context: Any, is_many: bool
    ) -> None:
        records, attempt = _records()
        if not records or BEGINS in context.execution_options:
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
        noted = connection.connection.info.get(_HOLD)
        statement.hold = None if noted is None else noted[0]
        statement.relationship = FLUSH if _is_flushing.get() else context.execution_options.get(_RELATIONSHIP)
        statement.stack = take_stack(calling_frame(1))
        for record in records:
            record.add(statement)
        setattr(context, _NOTED, (statement, records))
        statement.end = 0.0
        statement.begin = perf_counter()

    def end_statement(
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

    def fail_statement(self, context: ExceptionContext) -> None:
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

    def begin_connect(self, dialect: Dialect, entry: ConnectionPoolEntry, arguments: Any, options: Any) -> None:
        _connecting.set(perf_counter())

    def end_connect(self, driver_connection: Any, entry: ConnectionPoolEntry) -> None:
        begin = _connecting.get()
        entry.info[_NUMBER] = next(self._numbers)
        records, attempt = _records()
        if records and begin is not None:
            wait = Wait("connect", self._engine, attempt, begin, perf_counter())
            for record in records:
                record.add_wait(wait)

    def begin_hold(self, driver_connection: Any, entry: ConnectionPoolEntry, proxy: PoolProxiedConnection) -> None:
        records, attempt = _records()
        if records:
            number = entry.info.get(_NUMBER)
            if number is None:  # It was made before somebody recorded the engine.
                number = entry.info[_NUMBER] = next(self._numbers)
            hold = Hold(self._engine, number, attempt, perf_counter())
            entry.info[_HOLD] = hold, tuple(records)
            for record in records:
                record.begin_hold(hold)

    def end_hold(self, driver_connection: Any, entry: ConnectionPoolEntry) -> None:
        noted = entry.info.pop(_HOLD, None)
        if noted is not None:
            hold, records = noted
            hold.end = perf_counter()
            for record in records:
                record.end_hold(hold)

    def lose(self, driver_connection: Any, entry: ConnectionPoolEntry, error: BaseException | None) -> None:
        self.end_hold(driver_connection, entry)

    # -- what SQLAlchemy has no events for

    def time_pool(self, engine: Engine) -> None:
        """Time the waits for the engine's pool: for the present one, and for that which takes its place."""
        wrap_connect(engine.pool, self._connect)

    def _connect(self, connect: Callable[[], Any]) -> Any:
        records, attempt = _records()
        if not records:
            return connect()
        _connecting.set(None)
        begin = perf_counter()
        try:
            return connect()
        finally:
            # If it has made a connection, it has waited until then.
            wait = Wait("pool", self._engine, attempt, begin, _connecting.get() or perf_counter())
            for record in records:
                record.add_wait(wait)

    def time_ends(self, dialect: Dialect) -> None:
        """Time the COMMITs and ROLLBACKs of the engine: its events tell only that they are to come."""
        if dialect in _timed:
            return
        _timed.add(dialect)
        self._dialect = dialect
        found: Any = dialect
        found.do_commit = partial(self._end, "commit", found.do_commit)
        found.do_rollback = partial(self._end, "rollback", found.do_rollback)

    def _is_unknown(self, error: BaseException, driver_connection: Any) -> bool:
        is_lost = self._dialect.is_disconnect(error, driver_connection, None)  # type: ignore[arg-type]  # may be any
        return classify(error, committing=True, disconnected=is_lost) is Failure.UNKNOWN

    def _end(self, kind: Any, end: Callable[[Any], None], driver_connection: Any) -> None:
        records, attempt = _records()
        if not records:
            return end(driver_connection)
        begin = perf_counter()
        error: BaseException | None = None
        try:
            return end(driver_connection)
        except BaseException as raised:
            error = raised
            raise
        finally:
            now = perf_counter()
            is_unknown = error is not None and kind == "commit" and self._is_unknown(error, driver_connection)
            noted = End(kind, self._engine, attempt, begin, now, error, is_unknown)
            for record in records:
                record.add_end(noted)


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
