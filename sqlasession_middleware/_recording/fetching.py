"""Times how long rows are fetched: SQLAlchemy has no event for it.

A result of SQLAlchemy leaves fetching to a strategy, which its execution context has before the result is made. Those
of here do what SQLAlchemy's own do, and note in the records of the statement how long the driver took. That is where
the time goes with SQLite, which looks for the next row when it is asked for one, and with server-side cursors. Most
other drivers have all rows once the statement was executed, and make Python's values of them when they are fetched.

Not timed are the rows of a dialect that has a strategy of its own (SQL Server's OUTPUT, Oracle's LOBs), and what an
INSERT of many rows returns, which SQLAlchemy fetches by itself between its batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, NoReturn

from sqlalchemy.engine.cursor import BufferedRowCursorFetchStrategy, CursorFetchStrategy

from .._dependencies import is_server_side

if TYPE_CHECKING:
    from .record import Record, Statement

__all__ = ["time_fetching"]


def time_fetching(context: Any, cursor: Any, statement: Statement, records: Sequence[Record], trips: int) -> None:
    """Note in the records of a statement how long its rows are fetched.

    :param context: the statement's, after it was executed and before its result is made.
    :param trips: how often the server is waited for whenever rows of a server-side cursor are fetched, and when it is
        closed.
    """
    if type(context.cursor_fetch_strategy) is not CursorFetchStrategy:
        return
    options = context.execution_options
    if is_server_side(context):
        strategy: Any = _TimedBuffer(_TimedCursor(cursor, statement, records, trips), options)
    elif options.get("stream_results") and not (context.is_crud or context.is_text):
        strategy = _TimedBuffer(_TimedCursor(cursor, statement, records, 0), options)
    else:
        strategy = _TimedFetch(statement, records)
    context.cursor_fetch_strategy = strategy


class _TimedFetch(CursorFetchStrategy):
    """Fetches rows as SQLAlchemy does by default, and takes the time."""

    __slots__ = ("_records", "_statement")

    def __init__(self, statement: Statement, records: Sequence[Record]) -> None:
        self._statement = statement
        self._records = records

    def fetchone(self, result: Any, dbapi_cursor: Any, hard_close: bool = False) -> Any:
        begin = perf_counter()
        try:
            return CursorFetchStrategy.fetchone(self, result, dbapi_cursor, hard_close)
        finally:
            _note(self._statement, self._records, perf_counter() - begin)

    def fetchmany(self, result: Any, dbapi_cursor: Any, size: int | None = None) -> Any:
        begin = perf_counter()
        try:
            return CursorFetchStrategy.fetchmany(self, result, dbapi_cursor, size)
        finally:
            _note(self._statement, self._records, perf_counter() - begin)

    def fetchall(self, result: Any, dbapi_cursor: Any) -> Any:
        begin = perf_counter()
        try:
            return CursorFetchStrategy.fetchall(self, result, dbapi_cursor)
        finally:
            _note(self._statement, self._records, perf_counter() - begin)

    def yield_per(self, result: Any, dbapi_cursor: Any, num: int) -> None:
        cursor = _TimedCursor(dbapi_cursor, self._statement, self._records, 0)
        result.cursor_strategy = _TimedBuffer(cursor, {"max_row_buffer": num}, growth_factor=0, initial_buffer=deque())


class _TimedBuffer(BufferedRowCursorFetchStrategy):
    """Fetches rows by parts as SQLAlchemy does, and takes the time of each."""

    __slots__ = ("_cursor",)

    def __init__(self, cursor: _TimedCursor, *arguments: Any, **options: Any) -> None:
        self._cursor = cursor
        super().__init__(cursor, *arguments, **options)  # type: ignore[arg-type]  # as far as it is used

    def fetchone(self, result: Any, dbapi_cursor: Any, hard_close: bool = False) -> Any:
        return super().fetchone(result, self._cursor, hard_close)  # type: ignore[arg-type]

    def fetchmany(self, result: Any, dbapi_cursor: Any, size: int | None = None) -> Any:
        return super().fetchmany(result, self._cursor, size)  # type: ignore[arg-type]

    def fetchall(self, result: Any, dbapi_cursor: Any) -> Any:
        return super().fetchall(result, self._cursor)  # type: ignore[arg-type]

    def soft_close(self, result: Any, dbapi_cursor: Any) -> None:
        self._cursor.note_close()
        super().soft_close(result, dbapi_cursor)

    def hard_close(self, result: Any, dbapi_cursor: Any) -> None:
        self._cursor.note_close()
        super().hard_close(result, dbapi_cursor)

    def handle_exception(self, result: Any, dbapi_cursor: Any, err: BaseException) -> NoReturn:
        super().handle_exception(result, self._cursor.cursor, err)


class _TimedCursor:
    """What a buffer uses of a driver's cursor."""

    __slots__ = ("_records", "_statement", "_trips", "cursor")

    def __init__(self, cursor: Any, statement: Statement, records: Sequence[Record], trips: int) -> None:
        self.cursor = cursor
        self._statement = statement
        self._records = records
        self._trips = trips

    def fetchmany(self, size: int) -> Any:
        begin = perf_counter()
        try:
            return self.cursor.fetchmany(size)
        finally:
            _note(self._statement, self._records, perf_counter() - begin, self._trips)

    def fetchall(self) -> Any:
        begin = perf_counter()
        try:
            return self.cursor.fetchall()
        finally:
            _note(self._statement, self._records, perf_counter() - begin, self._trips)

    def note_close(self) -> None:
        """Note that SQLAlchemy closes it."""
        _note(self._statement, self._records, 0.0, self._trips)


def _note(statement: Statement, records: Sequence[Record], seconds: float, trips: int = 0) -> None:
    statement.fetched += seconds
    for record in records:
        record.fetched += seconds
        record.trips += trips
