"""Sends BEGIN together with the first statement that needs it, and reads that need none without waiting for one.

psycopg waits three times for a request with one SELECT: for its BEGIN, for the SELECT, and for the ROLLBACK at the end.
In libpq's pipeline mode several statements are sent before the first answer comes:

a plain read (:mod:`.plain_reads`)
    ``BEGIN READ ONLY``, the SELECT and ``COMMIT`` are one wait, and nothing stays open. The server refuses a SELECT
    that writes after all. The first time, it also refuses one that uses anything else than tables: a view or a policy
    may do what a read-only transaction allows and a rollback undoes. Then the SELECT is sent again, as any other
    statement.

any other first statement
    ``BEGIN`` and the statement are one wait, and the transaction goes on as always.

The driver is left as SQLAlchemy leaves it. So what is sent on the connection by other ways begins a transaction as
before. Who asks the Session for its connection may look whether a transaction is open, as psycopg's own
``connection.transaction()`` does: so the one that was left out begins then, and no read is alone any more.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from sqlalchemy import TwoPhaseTransaction

from .._drivers.registry import driver_of
from .comment_text import without_comment
from .executions import has_other_listeners, listen_to_executions
from .forks import fork_safe_lock
from .plain_reads import is_plain_read, remember_as_writing
from .reads import BEGINS, FIRST, is_first_due, note_doubt, note_first, was_handed_out

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection, Engine
    from sqlalchemy.engine import Dialect, ExecutionContext

    from .._drivers.psycopg_pipeline import Pipeline

__all__ = ["begin_lazily", "begin_now", "begins_lazily", "can_wait", "count_waits"]

#: The key in the ``info`` of a connection that says whether the server begins its transactions at READ COMMITTED.
_IS_READ_COMMITTED: Final = "sqlasession_middleware.is_read_committed"

#: The attribute that this module adds to a Connection: what begins the transaction that its reads have left out.
_LEFT_OUT: Final = "sqlasession_left_out"

#: What SQLAlchemy replaces at each execution by the name that ``schema_translate_map`` has for a schema.
_SCHEMA_PLACEHOLDER: Final = "__[SCHEMA_"

#: About as many as the engines' statement caches have.
_REMEMBERED_AT_MOST: Final = 2000

# The events are the dialect's, which Engine.execution_options() shares. Not SQLAlchemy's event.contains(): it knows
# engines by their id, which an earlier one may have had.
_begun_lazily: WeakKeyDictionary[Dialect, _LazyBegin | None] = WeakKeyDictionary()
_listening = fork_safe_lock()


def begin_lazily(engine: Engine) -> None:
    """Have the transactions of an engine begin with their first statement, if its driver and server can do that.

    The same is true then for all engines that were made of it by ``execution_options()``, and for that which it was
    made of.
    """
    with _listening:
        if engine.dialect in _begun_lazily:
            return
        _begun_lazily[engine.dialect] = None
        pipeline = driver_of(engine).pipeline()
        if pipeline is not None:
            lazy = _begun_lazily[engine.dialect] = _LazyBegin(pipeline)
            listen_to_executions(engine, lazy.execute, lazy.execute_many, lazy.execute_without_parameters, first=False)


def count_waits(dialect: Dialect, note: Callable[[int], None]) -> None:
    """Have somebody told by how much the waits of a statement differ from those of BEGIN and then the statement.

    :param note: is called with -1 where they are one, and with the waits of a read that was tried alone in vain.
    """
    lazy = _begun_lazily.get(dialect)
    if lazy is not None:
        lazy.pipeline = lazy.pipeline.counting(note)


def begins_lazily(engine: Engine) -> bool:
    """Whether the transactions of an engine begin with their first statement."""
    return engine.dialect in _begun_lazily and driver_of(engine).pipeline() is not None


def can_wait(connection: Connection) -> bool:
    """Whether the first statement of a transaction can be preceded by another one when it comes.

    It cannot where the application listens to the same events: its listener may execute the statement by itself.
    """
    dialect = connection.dialect
    events = dialect.dispatch
    return _begun_lazily.get(dialect) is not None and not any(
        has_other_listeners(dialect, listeners)
        for listeners in (events.do_execute, events.do_executemany, events.do_execute_no_params)
    )


def begin_now(connection: Connection) -> None:
    """Begin the transaction that reads have left out, because the connection is handed out to the application."""
    first = connection.get_execution_options().get(FIRST)
    if first is not None and (is_first_due(connection) or driver_of(connection).is_idle(connection)):
        connection.exec_driver_sql(first, execution_options={BEGINS: True})
        note_first(connection, is_due=False)
    left_out: Callable[[Any], None] | None = getattr(connection, _LEFT_OUT, None)
    if left_out is not None and not (connection.closed or connection.invalidated):
        left_out(connection.connection.dbapi_connection)


class _LazyBegin:
    """Executes the first statements of transactions in place of SQLAlchemy.

    Each method is a listener, and returns whether it has executed the statement. None does where the application has
    a listener of its own for the event, which would not be called then.

    :param pipeline: of the engine's driver.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        #: which plain reads can be in a transaction of their own, by their texts before parameters are expanded
        self._can_be_alone: dict[str, bool] = {}

    def execute(self, cursor: Any, statement: str, parameters: Any, context: ExecutionContext) -> bool:
        dialect = context.dialect
        if not self.pipeline.is_idle(cursor):
            return _catch_up(cursor, context)
        if has_other_listeners(dialect, dialect.dispatch.do_execute):
            return _leave(cursor, _first_of(context))
        call = partial(dialect.do_execute, cursor, statement, parameters, context)
        return self._begin(cursor, statement, parameters, context, call)

    def execute_many(self, cursor: Any, statement: str, parameters: Any, context: ExecutionContext) -> bool:
        dialect = context.dialect
        if not self.pipeline.is_idle(cursor):
            return _catch_up(cursor, context)
        if has_other_listeners(dialect, dialect.dispatch.do_executemany):
            return _leave(cursor, _first_of(context))
        call = partial(dialect.do_executemany, cursor, statement, parameters, context)
        return self._begin(cursor, statement, parameters, context, call)

    def execute_without_parameters(self, cursor: Any, statement: str, context: ExecutionContext) -> bool:
        dialect = context.dialect
        if not self.pipeline.is_idle(cursor):
            return _catch_up(cursor, context)
        if has_other_listeners(dialect, dialect.dispatch.do_execute_no_params):
            return _leave(cursor, _first_of(context))
        call = partial(dialect.do_execute_no_params, cursor, statement, context)
        return self._begin(cursor, statement, None, context, call)

    def _begin(
        self, cursor: Any, statement: Any, parameters: Any, context: ExecutionContext, call: Callable[[], object]
    ) -> bool:
        pipeline = self.pipeline
        begin = pipeline.begin_of(cursor)
        connection = context.root_connection
        transaction = connection.get_transaction()
        # Without one SQLAlchemy asks a new server what it is. Listeners may still change the connection.
        has_begun = transaction is not None or BEGINS in context.execution_options
        first = _first_of(context)
        if begin is None or not has_begun or isinstance(transaction, TwoPhaseTransaction):
            return _leave(cursor, first)
        info = connection.connection.info
        is_read_committed = begin.is_read_committed or info.get(_IS_READ_COMMITTED)
        if is_read_committed is False:
            return _leave(cursor, first)
        may_be_alone = is_read_committed and not was_handed_out(connection)
        refused = None
        if may_be_alone and is_plain_read(statement, parameters, context):
            text = _text_of(statement, context)
            known = self._can_be_alone.get(text)
            if known is not False:
                outcome = pipeline.read(begin, cursor, call, is_known=known is True, first=first)
                if outcome is outcome.DONE:
                    self._remember(text, True)
                    setattr(connection, _LEFT_OUT, partial(pipeline.begin_alone, begin, first=first))
                    return True
                if outcome is outcome.WRITES:
                    remember_as_writing(statement)
                    note_doubt(connection)
                elif outcome is outcome.REFUSED:
                    refused = text
        if not parameters and (not isinstance(statement, str) or ";" in statement):
            return _leave(cursor, first)  # It may be several statements, which only psycopg's usual mode can send.
        note_first(connection, is_due=False)
        level = pipeline.begin(begin, cursor, call, ask_level=is_read_committed is None, first=first)
        if level is not None:
            info[_IS_READ_COMMITTED] = level == "read committed"
        if refused is not None:
            self._remember(refused, False)  # Only now: it has not failed by itself.
        return True

    def _remember(self, text: str, can_be_alone: bool) -> None:
        if text not in self._can_be_alone:
            if len(self._can_be_alone) >= _REMEMBERED_AT_MOST:
                self._can_be_alone.clear()
            self._can_be_alone[text] = can_be_alone


def _first_of(context: ExecutionContext) -> tuple[str, ...]:
    """What the transaction has to begin with, unless this is it, or there is no transaction."""
    connection = context.root_connection
    first = connection.get_execution_options().get(FIRST)
    if first is None or connection.get_transaction() is None or BEGINS in context.execution_options:
        return ()
    return (first,)


def _catch_up(cursor: Any, context: ExecutionContext) -> bool:
    """Execute what the transaction had to begin with, where the driver's own cursor has begun it: a listener's."""
    if not is_first_due(context.root_connection):
        return False
    first = _first_of(context)
    note_first(context.root_connection, is_due=False)
    return _leave(cursor, first)


def _leave(cursor: Any, first: tuple[str, ...]) -> bool:
    """Leave a statement to SQLAlchemy, after what its transaction begins with. psycopg sends BEGIN before that."""
    for statement in first:
        cursor.connection.cursor().execute(statement)
    return False


def _text_of(statement: str, context: ExecutionContext) -> str:
    """The text of a plain read that is the same for each length of an IN, and for each comment that is added to it."""
    compiled: Any = context.compiled
    return without_comment(statement) if _SCHEMA_PLACEHOLDER in compiled.string else compiled.string
