"""How a scope ends: every finisher runs, once, whatever becomes of the others.

The finishers are the body's own ``close()``, then ``session.remove``, then the cleanup of the locals.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

from .._database.forks import leave_session_to_parent
from .._scope.local import local, local_manager, release_local
from .._scope.scope import ENDED, ENDING, RUNNING, Scope, current
from .._sessions.connections import disown_returned, remove_session
from .debugger import preserve

__all__ = ["abandon", "end", "finish", "finish_from_outside", "log_failure"]

logger = logging.getLogger("sqlasession_middleware.closing")


def finish(scope: Scope, body: object = None, error: BaseException | None = None) -> None:
    """Close the body and end its scope.

    The scope is current meanwhile and afterwards: the caller knows what was current before.

    :param body: its ``close()`` is called.
    :param error: what the application raised. The caller re-raises it, so all other failures are logged.
    :raises BaseException: without ``error``, what the body's ``close()`` raised; else what another finisher raised
        that must not be swallowed (:exc:`KeyboardInterrupt`, a greenlet's kill). All other failures are logged.
    """
    scope.state = ENDING
    try:
        if body is not None or error is not None:
            current.set(scope.inner or scope)
            _close(scope, body, error)
    finally:
        current.set(scope)
        scope.inner = None
        fatal = end(scope)
    if fatal is not None and error is None:
        raise fatal


def finish_from_outside(scope: Scope, body: object = None, error: BaseException | None = None) -> None:
    """Finish a scope that may not be current, once, and leave the Local as it is."""
    if scope.state >= ENDING:
        return
    token = current.set(scope)
    try:
        finish(scope, body, error)
    finally:
        current.reset(token)
        del scope.token


def end(scope: Scope) -> BaseException | None:
    """Run the finishers that are not the application's. Only the end of a session needs the scope to be current.

    :returns: what a finisher raised that must not be swallowed. All other failures are logged.
    """
    fatal = None
    if scope.session is not None:
        # The session goes first: its connection must not wait for the locals' finishers.
        try:
            remove_session(scope)
        except BaseException as failure:
            fatal = log_failure(scope, "session.remove", failure)
    if len(local_manager.locals) > 1:
        fatal = _clean_up_locals(scope) or fatal
    scope.state = ENDED
    scope.clear()
    scope.environ = scope.start_response = scope.transaction = scope.failure = None
    if scope.session is not None:
        # Opened since, by an event of the session's own close, or by a thread that shares the scope.
        _run(scope, "session.remove", remove_session, scope)
    return fatal


def abandon(scope: Scope, body: object) -> None:
    """Finish a scope that nobody closed. Nothing is raised."""
    leave_session_to_parent(scope)
    leaked = scope.session is not None
    owner = scope.owner
    try:
        disown_returned(scope)
        finish_from_outside(scope, body)
    except BaseException:
        logger.exception("A finisher failed for a response of %r that was never closed", owner)
    if leaked:
        warnings.warn(
            f"A response or context of {owner!r} was dropped with its session open:"
            " close the response, or leave the context.",
            ResourceWarning,
            stacklevel=2,
        )


def _close(scope: Scope, body: object, error: BaseException | None) -> None:
    close = getattr(body, "close", None)
    if error is not None:
        preserve(scope, error)
        if close is not None:
            _run(scope, "the body's close()", close)
    elif close is not None:
        try:
            close()
        except BaseException as close_error:
            preserve(scope, close_error)
            raise


def _clean_up_locals(scope: Scope) -> BaseException | None:
    """Release the locals of ``local_manager``, each even if others fail, except the scope's own Local."""
    outer = scope.token.old_value
    if isinstance(outer, Scope) and outer.state in (RUNNING, ENDING):
        return None  # They are still in use: only the end of the outermost application is the request's end.
    fatal = None
    for other in local_manager.locals:
        if other is not local:
            fatal = _run(scope, "local_manager.cleanup", release_local, other) or fatal
    return fatal


def _run(scope: Scope, name: str, finisher: Callable[..., object], *arguments: object) -> BaseException | None:
    """Call a finisher, and log its failure.

    :returns: the failure, if it must not be swallowed.
    """
    try:
        finisher(*arguments)
    except BaseException as failure:
        return log_failure(scope, name, failure)
    return None


def log_failure(scope: Scope, name: str, failure: BaseException) -> BaseException | None:
    """Log what a finisher raised.

    :returns: the failure, if it must not be swallowed.
    """
    logger.error(
        "A finisher of %r failed: %s",
        scope.owner,
        name,
        exc_info=failure,
        extra={"application": scope.owner, "finisher": name},
    )
    return None if isinstance(failure, Exception) else failure
