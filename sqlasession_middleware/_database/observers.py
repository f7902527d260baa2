"""What an engine tells the scope that it works for: failures of the database, and commits.

An application may catch an error of the database, and most frameworks make a page of it. The middleware decides about
the request from the outside, so listeners of the engine's own events note in the scope what the database has said.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from sqlalchemy import event
from sqlalchemy.exc import DBAPIError

from .._dependencies import (
    ON_CONNECT_ISOLATION_LEVEL,
    call_before_all,
    came_from_commit,
    came_from_rollback,
    outdate_connections,
    root_engine,
)
from .._drivers.registry import driver_by_dialect, driver_of
from .._scope.deadline import shortest_deadline
from .._scope.protocols import Application
from .._scope.scope import current, outwards, running_scope
from ..errors import DeadlineError
from ..failures import Failure, ObservedFailure, classify
from .catcher import is_in_one_application
from .forks import fork_safe_lock
from .lost_commits import stores_nothing
from .read_only import is_read_only, is_refusal
from .recovery import expect_recovery, note_answer
from .replaced_errors import mark_observed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import Connection, Engine
    from sqlalchemy.engine import ExceptionContext

    from .._scope.protocols import ManagedTransaction
    from .._scope.scope import Scope

__all__ = [
    "commits_each_statement",
    "enclosing_transactions",
    "engines_of",
    "note_failure",
    "note_late",
    "observe_commits",
    "observe_failures",
    "observe_nested",
]

# Not SQLAlchemy's event.contains(): it knows engines by their id, which an earlier one may have had.
_observed_for_failures: WeakSet[Engine] = WeakSet()
_observed_for_commits: WeakSet[Engine] = WeakSet()
_listening = fork_safe_lock()


def observe_failures(owner: Application) -> None:
    """Note the failures of an application's engines in the scopes that meet them."""
    for engine in map(root_engine, engines_of(owner)):
        if engine not in _observed_for_failures:
            with _listening:
                _listen_for_failures(engine)


def _listen_for_failures(engine: Engine) -> None:
    if engine not in _observed_for_failures:  # pragma: no branch  # another thread may have been faster
        # First, because a listener that raises keeps the others from being called. And last, because a listener may
        # know better than the dialect that the connection is lost.
        event.listen(engine, "handle_error", _note_error)
        call_before_all(engine, _note_error)
        event.listen(engine, "handle_error", _note_disconnect)
        _observed_for_failures.add(engine)


def observe_commits(owner: Application) -> None:
    """Count the commits on an application's engines in the transactions that they are part of.

    These listeners cost some microseconds for each connection. They are there only where requests may be repeated,
    which is what the count is for.
    """
    for engine in (root_engine(engine) for engine in engines_of(owner) if not is_read_only(engine)):
        if engine not in _observed_for_commits:
            event.listen(engine, "begin", _count_autocommit)
            event.listen(engine, "commit", _count_engine_commit)
            event.listen(engine, "commit_twophase", _count_twophase_commit)
            _observed_for_commits.add(engine)


def observe_nested(owner: Application) -> None:
    """Count the commits of an application that is called, or whose context is entered, inside of a request."""
    if any(transaction.may_repeat for transaction in enclosing_transactions()):
        observe_commits(owner)


def enclosing_transactions() -> Iterator[ManagedTransaction]:
    """The managed transactions that the running code is part of, from the innermost application's outwards."""
    return (scope.transaction for scope in outwards(current.get(None)) if scope.transaction is not None)


def note_failure(failure: Failure, error: BaseException, context: ExceptionContext | None = None) -> None:
    """Note a failure in the current scope.

    :param error: the error that the application gets.
    :param context: of SQLAlchemy's ``handle_error``, if it comes from there.
    """
    scope = running_scope()
    # An unknown outcome stays unknown, whatever else fails afterwards.
    if scope is not None and (scope.failure is None or scope.failure.failure is not Failure.UNKNOWN):
        engine, connection = (None, None) if context is None else (context.engine, context.connection)
        scope.failure = observed = ObservedFailure(failure, error, scope.session, engine, is_in_one_application())
        expect_recovery(scope, observed, connection)


def note_late(what: str, context: ExceptionContext | None = None, is_outcome_unknown: bool = False) -> DeadlineError:
    """Note in the current scope that its deadline has passed, and return the error.

    :param what: and ``is_outcome_unknown``: see :class:`~..errors.DeadlineError`.
    """
    error = DeadlineError(shortest_deadline(), what, is_outcome_unknown)
    note_failure(Failure.UNKNOWN if is_outcome_unknown else Failure.UNAVAILABLE, error, context)
    return error


def commits_each_statement(connection: Connection) -> bool:
    """Whether each statement of a connection is durable at once."""
    level = connection.get_execution_options().get("isolation_level")
    if level is None:
        level = getattr(connection.dialect, ON_CONNECT_ISOLATION_LEVEL, None)
    return level == "AUTOCOMMIT" or driver_by_dialect[type(connection.dialect)].has_autocommit(connection)


def engines_of(owner: Any) -> Iterable[Engine]:
    """All engines of an application."""
    return owner.engines.values() if hasattr(owner, "engines") else [owner.database_engine]


def _note_disconnect(context: ExceptionContext) -> None:
    """Note an error again for which a listener has said that the connection is lost."""
    if context.is_disconnect and _knows_nothing_of(context):
        _note_error(context)


def _knows_nothing_of(context: ExceptionContext) -> bool:
    """Whether an error was no failure so far."""
    scope = running_scope()
    noted = scope.failure.error if scope is not None and scope.failure is not None else None
    return noted is not (context.sqlalchemy_exception or context.original_exception)


def _note_error(context: ExceptionContext) -> None:
    mark_observed(context.original_exception)
    if context.is_pre_ping or is_refusal(context):  # The pool replaces a connection that does not answer its ping.
        return
    error = context.original_exception
    if came_from_rollback(error.__traceback__):
        return  # What the application fails of came before: some errors close the connection, and ROLLBACK finds out.
    committing = came_from_commit(error.__traceback__) or _is_second_phase(context)
    failure = classify(
        error,
        committing=committing,
        connected=context.connection is not None,
        disconnected=context.is_disconnect,
    )
    if failure is None:
        _note_answer(context)
        return
    connection = context.connection
    is_undone = failure is Failure.TRANSIENT
    if failure is Failure.UNKNOWN and committing and stores_nothing(connection):
        failure = Failure.LOST  # It stays counted as a commit: a view that was taken for a table may have written.
    if connection is not None:
        driver = driver_of(context)
        if failure is Failure.UNAVAILABLE and driver.has_become_read_only(connection, error):
            # The address may lead to another server by now. What was not committed is lost with this one.
            failure, is_undone = Failure.LOST, True
            _replace_connections(connection)
        elif driver.outdates_connections(error):
            _replace_connections(connection)
    note_failure(failure, context.sqlalchemy_exception or error, context)
    if is_undone:
        for scope in outwards(current.get(None)):
            if scope.transaction is not None:
                _note_given_up(scope, scope.transaction, context, committing)


def _note_answer(context: ExceptionContext) -> None:
    """Note that the database works, although the statement has failed: by a constraint, for example."""
    scope = running_scope()
    if scope is None or context.connection is None or not isinstance(context.sqlalchemy_exception, DBAPIError):
        return
    if not driver_of(context).is_consequence(context.original_exception):
        note_answer(scope, context.statement or "")


def _replace_connections(connection: Connection) -> None:
    """Have the pool replace a connection and those that are like it, after the transaction that it is in."""
    if not (connection.closed or connection.invalidated):
        outdate_connections(connection)


def _is_second_phase(context: ExceptionContext) -> bool:
    statement = (context.statement or "").lstrip().upper()
    return statement.startswith(driver_of(context).server.second_phase)


def _note_given_up(scope: Scope, transaction: ManagedTransaction, context: ExceptionContext, committing: bool) -> None:
    """Note in a transaction around the running code what a failure undid."""
    if committing:
        if transaction.committing is context.connection:
            # The database itself says that this commit did not take place.
            transaction.committing = None
            transaction.commits -= 1
    elif scope.session is not None and driver_of(context).has_rolled_back(context.original_exception):
        # A COMMIT would store what the application does after the error, and not what it did before.
        transaction.rolled_back = scope.session.get_transaction()


def _count_engine_commit(connection: Connection) -> None:
    for transaction in enclosing_transactions():
        transaction.commits += 1
        transaction.committing = connection


def _count_twophase_commit(connection: Connection, xid: Any, is_prepared: bool) -> None:
    _count_engine_commit(connection)


def _count_autocommit(connection: Connection) -> None:
    """Count a commit at the begin of a transaction whose statements are durable at once: no event tells of those."""
    if commits_each_statement(connection):
        _count_engine_commit(connection)
