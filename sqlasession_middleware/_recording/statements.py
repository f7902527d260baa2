"""Listeners that note the statements of one engine and of those that were made of it.

They begin with the dialect's events and end with its execution context: see :mod:`.._database.executions`.
"""

from __future__ import annotations

from functools import cache
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy import event
from sqlalchemy.engine.interfaces import ExecuteStyle

from .._database.executions import listen_to_executions
from .._database.reads import BEGINS
from .._drivers.registry import driver_of
from .fetching import time_fetching
from .objects import RELATIONSHIP, is_flushing
from .present import present_records
from .record import FLUSH, Statement
from .stacks import take_statement_stack

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.engine import ExceptionContext

    from .record import Record

__all__ = ["HOLD", "StatementListeners", "note_execution"]

#: The attribute of an ExecutionContext with what was noted of its statement: see :class:`_Noted`.
_NOTED: Final = "sqlasession_noted"
#: The key in the ``info`` of a connection with its present hold, and the records that have it.
HOLD: Final = "sqlasession_middleware.hold"

_INSERTS_MANY: Final = ExecuteStyle.INSERTMANYVALUES


class _Noted(NamedTuple):
    """What was noted of a statement.

    :param waits_for_rows: how often the server is waited for when rows of a server-side cursor are fetched.
    """

    statement: Statement
    records: tuple[Record, ...]
    waits_for_rows: int


class StatementListeners:
    """The listeners for statements.

    :param name: what the records call the engine.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine = name
        self._driver = driver_of(engine)
        self._is_networked = self._driver.server.is_networked
        self._waits_for_rows = self._driver.waits_for_rows
        listen_to_executions(engine, self._execute, self._execute_many, self._execute_without_parameters)
        event.listen(engine, "handle_error", self._fail)
        dialect: Any = engine.dialect
        dialect.execution_ctx_cls = _noting_end(dialect.execution_ctx_cls)

    def _execute(self, cursor: Any, sql: str, parameters: Any, context: Any) -> None:
        self._begin(cursor, sql, parameters, context, context.execute_style is _INSERTS_MANY)

    def _execute_many(self, cursor: Any, sql: str, parameters: Any, context: Any) -> None:
        self._begin(cursor, sql, parameters, context, True)

    def _execute_without_parameters(self, cursor: Any, sql: str, context: Any) -> None:
        self._begin(cursor, sql, (), context, False)

    def _begin(self, cursor: Any, sql: str, parameters: Any, context: Any, is_many: bool) -> None:
        before = getattr(context, _NOTED, None)
        if before is not None:  # What a default asks for, or one of several INSERTs of many rows.
            _note_end(before, context, perf_counter())
            setattr(context, _NOTED, None)
        records, attempt = present_records()
        if not records:
            return
        proxy = context.root_connection.connection
        try:
            hold = proxy.info.get(HOLD)
        except NotImplementedError:  # It is of no pool yet: SQLAlchemy asks a new server what it is.
            return
        if self._is_networked:
            driver = self._driver
            is_sent_each = is_many and context.execute_style is not _INSERTS_MANY
            trips = driver.waits_of(cursor, sql, len(parameters) if is_sent_each else None)
            trips += driver.waits_to_begin(proxy.dbapi_connection)
            for record in records:
                record.trips += trips
        options = context.execution_options
        if BEGINS in options:
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
        statement.hold = None if hold is None else hold[0]
        statement.relationship = FLUSH if is_flushing.get() else options.get(RELATIONSHIP)
        statement.stack = take_statement_stack()
        for record in records:
            record.add(statement)
        setattr(context, _NOTED, _Noted(statement, records, self._waits_for_rows))
        statement.end = 0.0
        statement.begin = perf_counter()

    def _fail(self, context: ExceptionContext) -> None:
        now = perf_counter()
        noted = getattr(context.execution_context, _NOTED, None)
        if noted is not None:
            _note_end(noted, None, now)
            noted.statement.error = context.sqlalchemy_exception or context.original_exception


def note_execution(context: Any) -> None:
    """Note that the statement of a context was executed, if it was noted that it began."""
    now = perf_counter()
    noted = getattr(context, _NOTED, None)
    if noted is not None and _note_end(noted, context, now):
        time_fetching(context, context.cursor, *noted)


def _note_end(noted: _Noted, context: Any, now: float) -> bool:
    """Note the end of a statement, unless that was done. It may fail later, when its rows are fetched.

    :param context: its context; None if it has failed.
    :returns: whether it was done now.
    """
    statement = noted.statement
    if statement.end:
        return False
    if context is not None:
        statement.rows = context.cursor.rowcount
    statement.end = now
    for record in noted.records:
        record.seconds += now - statement.begin
    return True


@cache
def _noting_end(base: Any) -> Any:
    """A subclass of a dialect's execution contexts that notes when a statement was executed: no event tells of it."""

    def post_exec(self: Any) -> None:
        note_execution(self)
        base.post_exec(self)

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "post_exec": post_exec}
    return type(base.__name__, (base,), names)
