"""Listeners that note the statements of one engine."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.engine.interfaces import ExecuteStyle

from .._database.reads import BEGINS
from .._drivers.registry import driver_of
from .fetching import time_fetching
from .objects import RELATIONSHIP, is_flushing
from .present import present_records
from .record import FLUSH, Statement
from .stacks import take_statement_stack

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine
    from sqlalchemy.engine import ExceptionContext

__all__ = ["HOLD", "StatementListeners"]

#: The attribute of an ExecutionContext with what was noted of its statement.
_NOTED: Final = "sqlasession_noted"
#: The key in the ``info`` of a connection with its present hold, and the records that have it.
HOLD: Final = "sqlasession_middleware.hold"


class StatementListeners:
    """The listeners for statements.

    :meth:`begin_statement` is one that returns what is to be sent: SQLAlchemy calls others by a function of its own.

    :param name: what the records call the engine.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine = name
        self._driver = driver_of(engine)
        self._is_networked = self._driver.server.is_networked

    def begin_statement(
        self, connection: Connection, cursor: Any, sql: str, parameters: Any, context: Any, is_many: bool
    ) -> tuple[str, Any]:
        records, attempt = present_records()
        if not records:
            return sql, parameters
        proxy = connection.connection
        if self._is_networked:
            driver = self._driver
            is_sent_each = is_many and context.execute_style is ExecuteStyle.EXECUTEMANY
            trips = driver.waits_of(cursor, sql, len(parameters) if is_sent_each else None)
            trips += driver.waits_to_begin(proxy.dbapi_connection)
            for record in records:
                record.trips += trips
        options = context.execution_options
        if BEGINS in options:
            return sql, parameters
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
        noted = proxy.info.get(HOLD)
        statement.hold = None if noted is None else noted[0]
        statement.relationship = FLUSH if is_flushing.get() else options.get(RELATIONSHIP)
        statement.stack = take_statement_stack()
        for record in records:
            record.add(statement)
        setattr(context, _NOTED, (statement, records))
        statement.end = 0.0
        statement.begin = perf_counter()
        return sql, parameters

    def end_statement(
        self, connection: Connection, cursor: Any, sql: str, parameters: Any, context: Any, is_many: bool
    ) -> None:
        now = perf_counter()
        noted = getattr(context, _NOTED, None)
        if noted is not None and not noted[0].end:
            statement, records = noted
            statement.rows = cursor.rowcount
            _note_end(statement, records, now)
            time_fetching(context, cursor, statement, records, self._driver.waits_for_rows)

    def fail_statement(self, context: ExceptionContext) -> None:
        now = perf_counter()
        noted = getattr(context.execution_context, _NOTED, None)
        if noted is not None:
            statement, records = noted
            if not statement.end:  # It may fail when its rows are fetched.
                _note_end(statement, records, now)
            statement.error = context.sqlalchemy_exception or context.original_exception


def _note_end(statement: Statement, records: Any, now: float) -> None:
    statement.end = now
    for record in records:
        record.seconds += now - statement.begin
