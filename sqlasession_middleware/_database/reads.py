"""Which connections have sent nothing but reads, so that their transaction can end without a question.

PostgreSQL can tell what a transaction has done, but the answer has to be waited for. The engine therefore watches what
it sends. What does not leave nothing (:mod:`.plain_reads`), and what goes to the driver's own connection count as
doubt. A server-side cursor counts until its last row was fetched.

In: the statements of an engine. Out: :func:`has_only_read`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

from .._dependencies import is_server_side, origins_of
from .._drivers.registry import driver_of
from .executions import listen_to_executions
from .plain_reads import Reading, judge

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine
    from sqlalchemy.engine import ExecutionContext

__all__ = [
    "BEGINS",
    "FIRST",
    "READS",
    "give_first",
    "has_locked",
    "has_only_read",
    "has_unread_rows",
    "is_first_due",
    "note_doubt",
    "note_first",
    "note_handed_out",
    "note_locked",
    "note_rows",
    "sends_first",
    "was_handed_out",
    "watch_reads",
    "with_first",
    "without_first",
]

#: The execution option of a statement that is a part of BEGIN: it sets something for the transaction that begins now.
BEGINS: Final = "sqlasession_begins"

#: The execution option of an engine with a statement that each transaction has to begin with, and that is sent together
#: with the first one of the application.
FIRST: Final = "sqlasession_first"

#: The key in ``bind_arguments`` by which the library itself asks a Session for a connection, to read from it. Anybody
#: else may do with one what is not seen.
READS: Final = "sqlasession_reads"

# Attributes that this module adds to objects of SQLAlchemy. Each statement looks at one of them, so that a set of weak
# references, whose every look is Python code, would cost more than all the rest.

#: of a dialect: whether its engines are watched
_WATCHED: Final = "sqlasession_watched"
#: of an engine: that which is the same but for :data:`FIRST`
_WITH_FIRST: Final = "sqlasession_with_first"
#: of a connection: whether something else than reads was sent, or may have been
_DOUBTFUL: Final = "sqlasession_doubtful"
#: of a connection: whether the application may have it in hand
_HANDED_OUT: Final = "sqlasession_handed_out"
#: of a connection: whether its transaction has to begin yet with what :data:`FIRST` says
_FIRST_IS_DUE: Final = "sqlasession_first_is_due"
#: of a connection: whether a statement has left a lock, or something else that the connection keeps
_LOCKED: Final = "sqlasession_locked"
#: of a connection: the execution contexts of its server-side cursors, as long as something refers to their results
_STREAMED: Final = "sqlasession_streamed"

#: PostgreSQL's locks that no end of a transaction releases ("Advisory Lock Functions"), and that no question about the
#: transaction finds.
_LOCKS: Final = re.compile(r"\bpg_(try_)?advisory_lock", re.IGNORECASE)


def watch_reads(engine: Engine) -> None:
    """Note what an engine sends, if its server would have to be asked."""
    dialect = engine.dialect
    if not driver_of(dialect).server.asks_for_writes or hasattr(dialect, _WATCHED):
        return
    setattr(dialect, _WATCHED, True)  # Several engines may share it.
    listen_to_executions(engine, _note, _note, _note_alone)


def _note(cursor: Any, statement: Any, parameters: Any, context: ExecutionContext) -> None:
    if is_server_side(context):
        note_rows(context)
    if judge(statement) is Reading.DOUBTFUL and BEGINS not in context.execution_options:
        setattr(context.root_connection, _DOUBTFUL, True)
        # The expression has no fixed beginning: by itself it takes as long as thirty calls of Python functions.
        if isinstance(statement, str) and "advisory" in statement.lower() and _LOCKS.search(statement):
            note_locked(context.root_connection)


def _note_alone(cursor: Any, statement: Any, context: ExecutionContext) -> None:
    _note(cursor, statement, None, context)


def note_doubt(connection: Connection) -> None:
    """Note that a statement does not only read, although its text looks like it."""
    setattr(connection, _DOUBTFUL, True)


def note_handed_out(connection: Connection) -> None:
    """Note that the application got a connection, and may use it later, and in ways that are not seen."""
    setattr(connection, _DOUBTFUL, True)
    setattr(connection, _HANDED_OUT, True)


def was_handed_out(connection: Connection) -> bool:
    """Whether the application may have a connection in hand, and would find it closed."""
    return hasattr(connection, _HANDED_OUT)


def note_first(connection: Connection, is_due: bool) -> None:
    """Note that a transaction begins that has to begin with what :data:`FIRST` says, or that it was sent."""
    setattr(connection, _FIRST_IS_DUE, is_due)


def is_first_due(connection: Connection) -> bool:
    """Whether what a transaction has to begin with is still to be sent in it."""
    return getattr(connection, _FIRST_IS_DUE, False)


def give_first(engine: Engine, statement: str) -> None:
    """Have each transaction of a Session on an engine begin with a statement, which waits for the first one."""
    setattr(engine, _WITH_FIRST, engine.execution_options(**{FIRST: statement}))


def sends_first(engine: Engine) -> bool:
    """Whether a Session sends something on an engine that begins each transaction there."""
    return hasattr(engine, _WITH_FIRST)


def with_first(bind: Any) -> Any:
    """The engine on which a Session may send :data:`FIRST` later: it tells when a connection is handed out.

    :param bind: an engine. Anything else, and one without such a statement, is returned unchanged.
    """
    return getattr(bind, _WITH_FIRST, bind)


def without_first(engine: Engine) -> Engine:
    """The engine that was given :data:`FIRST`, or an engine itself that has no such option."""
    return next(origin for origin in origins_of(engine) if FIRST not in origin.get_execution_options())


def note_locked(connection: Connection) -> None:
    """Note that a statement has left a lock, or something else that the connection keeps."""
    setattr(connection, _LOCKED, True)


def has_locked(connection: Connection) -> bool:
    """Whether a statement was seen to leave a lock, or something else that the connection keeps."""
    return hasattr(connection, _LOCKED)


def has_only_read(connection: Connection) -> bool:
    """Whether all that a connection of a watched engine has sent were reads, as far as that is known."""
    return (
        hasattr(connection.dialect, _WATCHED)
        and not hasattr(connection, _DOUBTFUL)
        and not (hasattr(connection, _STREAMED) and has_unread_rows(connection))
    )


def note_rows(context: ExecutionContext) -> None:
    """Note that the rows of a statement are fetched while they are read."""
    connection = context.root_connection
    known = [each for each in getattr(connection, _STREAMED, ()) if each() is not None]
    setattr(connection, _STREAMED, [*known, ref(context)])


def has_unread_rows(connection: Connection) -> bool:
    """Whether rows are still to be fetched from a server-side cursor; False where cursors are not tracked."""
    contexts = (reference() for reference in getattr(connection, _STREAMED, ()))
    return any(context is not None and not driver_of(context).is_cursor_closed(context.cursor) for context in contexts)
