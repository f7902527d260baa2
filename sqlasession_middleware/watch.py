"""What an engine tells the scope that it works for: failures of the database, and commits.

An application may swallow an error of the database, and most frameworks make a page of it. What became of the
request is decided from the outside, so the engine's own events note in the scope what the database has said.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

from sqlalchemy import event
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import QueuePool

from .context import ENDED, WAITING, Scope, current
from .drivers import is_autocommitting
from .errors import TransactionAborted
from .failures import Failure, classify

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine
    from sqlalchemy.engine import ExceptionContext

    from .transaction import Attempt

__all__ = [
    "Noted",
    "WatchedPool",
    "attempts",
    "explain_refusal",
    "failure_of",
    "forgotten",
    "is_in_autocommit",
    "read_only",
    "watch_commits",
    "watch_failures",
    "watch_inner",
]


#: PostgreSQL's SQLSTATE of each statement after the one that failed.
IN_FAILED_TRANSACTION = "25P02"

#: What dialects send in place of COMMIT when both sides are prepared.
SECOND_PHASE = ("COMMIT PREPARED", "XA COMMIT")


# Not SQLAlchemy's event.contains(): it knows engines by their id, which another one may have had before.
_telling_failures: WeakSet[Engine] = WeakSet()
_telling_commits: WeakSet[Engine] = WeakSet()

#: Engines that nothing is written to: their commits are none.
read_only: WeakSet[Engine] = WeakSet()


#: How the servers, and SQLite, refuse to write: "read-only transaction", "READ ONLY", "readonly database".
_REFUSAL = re.compile("read.?only", re.IGNORECASE)
_REFUSED = (
    "This went to a replica, because the statement does not look as if it wrote:"
    " call on_primary() before it, or let the request have a method such as POST."
)


class Noted(NamedTuple):
    """The last failure of the database that a scope has met."""

    failure: Failure
    #: what the application got to see of it
    error: BaseException


class WatchedPool(QueuePool):
    """SQLAlchemy's own pool, which has no event that tells when no connection became free in time."""

    # SQLAlchemy names a pool's logger after the module: this one's is below "sqlalchemy.pool" as any other's.
    __module__ = QueuePool.__module__

    def connect(self) -> Any:
        try:
            return super().connect()
        except PoolTimeoutError as error:
            _note(Noted(Failure.UNAVAILABLE, error))
            raise


@contextmanager
def forgotten() -> Iterator[Callable[[], None]]:
    """Gives a function that forgets what the scope has met inside of the block: it was dealt with."""
    scope = current.get(None)
    before = scope.failure if isinstance(scope, Scope) else None

    def forget() -> None:
        if isinstance(scope, Scope):  # Not in a thread that was handed the session.
            scope.failure = before

    yield forget


def watch_failures(owner: Any) -> None:
    """Note the failures of an application's engines in the scopes that meet them."""
    for engine in _engines_of(owner):
        if engine not in _telling_failures:
            event.listen(engine, "handle_error", _note_failure)
            _telling_failures.add(engine)


def watch_commits(owner: Any) -> None:
    """Count the commits on an application's engines in the attempts that they are part of.

    A listener of this kind costs some microseconds a connection, whatever it does: so only where attempts are
    repeated, which is what the count is for.
    """
    for engine in _engines_of(owner):
        if engine not in _telling_commits and engine not in read_only:
            event.listen(engine, "begin", _count_autocommit)
            event.listen(engine, "commit", _count_commit)
            event.listen(engine, "commit_twophase", _count_commit_twophase)
            _telling_commits.add(engine)


def watch_inner(owner: Any) -> None:
    """Have another application that is called, or a context that is entered, count for the attempts around it."""
    if any(attempt.may_repeat for attempt in attempts()):
        watch_commits(owner)


def _engines_of(owner: Any) -> Iterable[Engine]:
    return owner.engines.values() if hasattr(owner, "engines") else [owner.database_engine]


def failure_of(error: BaseException, noted: Noted | None) -> Failure | None:
    """What an exception that leaves the application says of the database.

    :param noted: the last failure that the scope has met: it counts if ``error`` came of it.
    """
    if noted is not None and (
        noted.failure is Failure.UNKNOWN or _is_consequence(error) or _came_of(error, noted.error)
    ):
        return noted.failure
    if _REFUSED in getattr(error, "__notes__", ()):
        return None
    original = getattr(error, "orig", None) or error
    committing = _is_commit(error.__traceback__) or _is_commit(original.__traceback__)
    failure = classify(error, committing=committing)
    if failure is None and committing and original is error:
        return Failure.UNKNOWN  # No answer of the driver, but a signal or a timeout that has cut the COMMIT short.
    return failure


def _is_consequence(error: BaseException) -> bool:
    """Whether it only says that a transaction failed before, and that the application went on."""
    original = getattr(error, "orig", None)
    state = getattr(original, "sqlstate", None) or getattr(original, "pgcode", None)
    return isinstance(error, PendingRollbackError | TransactionAborted) or state == IN_FAILED_TRANSACTION


def _came_of(error: BaseException | None, cause: BaseException) -> bool:
    """Whether ``cause`` is in the chain of what ``error`` was raised for."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if error is cause:
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _note(noted: Noted) -> None:
    scope = current.get(None)
    if isinstance(scope, Scope) and scope.state not in (WAITING, ENDED):
        known = scope.failure
        # That an outcome is not known stays true, whatever else fails afterwards.
        if known is None or known.failure is not Failure.UNKNOWN:
            scope.failure = noted


def _note_failure(context: ExceptionContext) -> None:
    if context.is_pre_ping:  # The pool replaces a connection that does not answer its ping.
        return
    error = context.original_exception
    if _is_refused(context):  # A mistake of the application's, which stays one.
        return
    statement = (context.statement or "").lstrip().upper()
    committing = _is_commit(error.__traceback__) or statement.startswith(SECOND_PHASE)
    failure = classify(
        error,
        committing=committing,
        connected=context.connection is not None,
        disconnected=context.is_disconnect,
    )
    if failure is None:
        return
    _note(Noted(failure, context.sqlalchemy_exception or error))
    if failure is Failure.TRANSIENT:
        for attempt in attempts():
            if committing and attempt.committing is context.connection:
                # The database itself says that it did not take place.
                attempt.committing = None
                attempt.commits -= 1
            elif not committing and context.dialect.name in ("mysql", "mariadb"):
                attempt.note_rolled_back(error)


def _is_refused(context: ExceptionContext) -> bool:
    return context.engine in read_only and _REFUSAL.search(str(context.original_exception)) is not None


def explain_refusal(context: ExceptionContext) -> None:
    """Listener of an engine that nothing is written to: what an error there means."""
    error = context.sqlalchemy_exception
    if error is not None and _is_refused(context):
        error.add_note(_REFUSED)


def _is_commit(traceback: TracebackType | None) -> bool:
    """Whether the error came from a COMMIT: SQLAlchemy's event does not tell, but a dialect's methods have names."""
    while traceback is not None:
        if traceback.tb_frame.f_code.co_name in ("do_commit", "do_commit_twophase"):
            return True
        traceback = traceback.tb_next
    return False


def attempts() -> Iterator[Attempt]:
    """The attempts that the running code is part of, from the innermost application's to the outermost's."""
    scope: Any = current.get(None)
    while isinstance(scope, Scope):
        if scope.transaction is not None:
            yield scope.transaction
        scope = scope.token.old_value if hasattr(scope, "token") else None


def _count_commit(connection: Connection) -> None:
    for attempt in attempts():
        attempt.commits += 1
        attempt.committing = connection


def _count_commit_twophase(connection: Connection, xid: Any, is_prepared: bool) -> None:
    _count_commit(connection)


def is_in_autocommit(connection: Connection) -> bool:
    """Whether each statement of a connection is durable at once."""
    level = connection.get_execution_options().get("isolation_level")
    if level is None:
        level = getattr(connection.dialect, "_on_connect_isolation_level", None)
    return level == "AUTOCOMMIT" or is_autocommitting(connection)


def _count_autocommit(connection: Connection) -> None:
    """No event says so."""
    if is_in_autocommit(connection):
        _count_commit(connection)
