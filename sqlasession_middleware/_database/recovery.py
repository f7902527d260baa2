"""Detects that a failure of the database is over: the application has caught it, and its session works again.

A failure explains only the error page or exception that it caused, not a later one. So it ends with the next statement
that succeeds in the scope's session: after a ROLLBACK TO SAVEPOINT, in a new transaction, on another engine, or in
another session. A statement that fails by itself, by a constraint for example, shows as well that the database works. A
failure that a framework makes a page of is not over, and a commit whose outcome is unknown stays unknown.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from sqlalchemy import Engine, event
from sqlalchemy.exc import InvalidRequestError

from .._dependencies import open_connections_of, root_engine
from .._scope.scope import Scope
from ..failures import Failure, ObservedFailure
from .catcher import is_making_error_page, was_left_to_framework

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session

__all__ = ["expect_recovery", "note_answer", "pending_failure"]

#: Statements that SQLAlchemy sends to manage a transaction. Their success does not end a failure: an exception that
#: passes through ``begin_nested()`` sends a ROLLBACK TO SAVEPOINT.
_OF_TRANSACTIONS = re.compile(r"\s*(SAVEPOINT|ROLLBACK|RELEASE|BEGIN|COMMIT|PREPARE|XA)\b", re.IGNORECASE)


#: An attribute that this module adds to a connection: what its next statements are told to.
_TOLD: Final = "sqlasession_told"

#: Engines whose statements are told to what is noted at their connections.
_telling: WeakSet[Engine] = WeakSet()


def expect_recovery(scope: Scope, observed: ObservedFailure, failed: Connection | None) -> None:
    """End a scope's failure with the next statement that succeeds in its session.

    The listeners are added when a failure is observed, so they cost nothing in other requests.

    :param failed: the connection that failed, if there is one.
    """

    def note_success(connection: Any, cursor: Any, statement: str, *more: object) -> None:
        if scope.failure is observed:
            note_answer(scope, statement)

    def listen(connection: Connection) -> None:
        try:
            event.listen(connection, "after_cursor_execute", note_success)
        except InvalidRequestError:  # pragma: no cover  # before SQLAlchemy 2.1
            _listen_at_engine(connection, note_success)

    def note_begin(session: Session, transaction: object, connection: Connection) -> None:
        if scope.failure is observed:
            listen(connection)

    if observed.failure is Failure.UNKNOWN:
        return
    if failed is not None:
        listen(failed)
    if observed.session is not None:
        for connection in _connections_of(observed.session):
            listen(connection)
        event.listen(observed.session, "after_begin", note_begin)


def _listen_at_engine(connection: Connection, call: Callable[..., None]) -> None:  # pragma: no cover
    """Have a function called with the next statements of a connection that takes no listeners.

    Before SQLAlchemy 2.1 that is one whose engine was made by ``execution_options()``.
    """
    setattr(connection, _TOLD, (*getattr(connection, _TOLD, ()), call))
    engine = root_engine(connection.engine)
    if engine not in _telling:
        _telling.add(engine)
        event.listen(engine, "after_cursor_execute", _tell)


def _tell(connection: Connection, *more: Any) -> None:  # pragma: no cover
    for call in getattr(connection, _TOLD, ()):
        call(connection, *more)


def note_answer(scope: Scope, statement: str) -> None:
    """End a scope's failure, if there is one: the database has answered a statement since."""
    observed = scope.failure
    if observed is None or observed.failure is Failure.UNKNOWN or _OF_TRANSACTIONS.match(statement):
        return
    if not _is_given_up(scope) and not is_making_error_page(observed.error):
        scope.failure = None


def pending_failure(scope: Scope) -> ObservedFailure | None:
    """The failure of a scope, unless it is over. Call this before the session's transaction is ended."""
    observed, session = scope.failure, scope.session
    if observed is None or observed.failure is Failure.UNKNOWN or session is None or session is observed.session:
        return observed
    # The application has removed the session that failed, or opened this one after the failure.
    if _connections_of(session) and not (observed.in_one_application and was_left_to_framework(observed.error)):
        scope.failure = None
    return scope.failure


def _is_given_up(scope: Scope) -> bool:
    """Whether the database has rolled back the session's transaction, and the application continues in it."""
    transaction, session = scope.transaction, scope.session
    return (
        transaction is not None
        and session is not None
        and transaction.rolled_back is not None
        and transaction.rolled_back is session.get_transaction()
    )


def _connections_of(session: Session) -> list[Connection]:
    transaction = session.get_transaction()
    return [] if transaction is None else open_connections_of(transaction)
