"""How a scope ends: when the response closes, when the application fails, when a ``with`` block is left.

A :class:`ScopeIterator` is what the middleware returns. It makes the scope current in each step of the body, and
its end is :func:`finish`: the body's own ``close()``, then ``session.remove``, then the locals' cleanup, each
tried whatever became of the others.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextvars import copy_context
from itertools import chain
from types import GeneratorType, TracebackType
from typing import Any, cast

from sqlalchemy.orm import Session, scoped_session
from werkzeug.wsgi import ClosingIterator

from .context import (
    ENDED,
    ENDING,
    NOTHING,
    RUNNING,
    WAITING,
    Scope,
    begin,
    current,
    leave,
    local,
    local_manager,
    release_local,
)
from .errors import ScopeError
from .sessions import remove_session, session
from .streams import steps
from .watch import watch_inner

__all__ = ["ListScopeIterator", "ScopeContext", "ScopeIterator", "finish", "respond", "respond_joined"]

logger = logging.getLogger(__name__)


# Not None: an application that yields that by mistake gets the server's error for it.
_END = cast(bytes, object())


class ScopeIterator(ClosingIterator):
    """The body of a response, and the owner of its scope.

    :param body: what the application returned.
    :param scope: current in each step, and in ``close()``.
    """

    __slots__ = ("_body", "_iterator", "_scope")

    # Werkzeug's constructor calls iter(body), which is the application's code and may raise before there is anyone
    # to clean up. What it would have set is not needed: all of its methods are here.
    def __init__(self, body: Iterable[bytes], scope: Scope) -> None:
        self._body = body
        self._scope = scope
        self._iterator: Iterator[bytes] | None = None

    def __iter__(self) -> Iterator[bytes]:  # type: ignore[override]  # Werkzeug's says "itself"
        """Step through the body; where a step raises, the scope ends there and then.

        A generator, because that is the fastest that a server can step through. It refers to this object, which so
        lives for as long as it is stepped through, and this object does not refer to it, so that a response that is
        dropped goes at once, without waiting for the garbage collector to find a cycle.

        A scope that found nobody else's on the Local stays there between two steps: in the usual case a step costs
        one look. From the first step on that finds something else there (another thread or context, another
        request, an outer application) each step is a visit.
        """
        scope, get, running, waiting = self._scope, current.get, RUNNING, WAITING
        try:
            if get(None) is scope and scope.state is waiting:
                scope.state = running
                for chunk in self._iterate_again():
                    if scope.state is not running:
                        return  # The step itself, or another thread in the meantime, has closed the response.
                    if get(None) is not scope:
                        self._note_inner()
                        current.set(scope)
                        scope.state = waiting
                        yield chunk
                        break
                    scope.state = waiting
                    yield chunk
                    if get(None) is not scope or scope.state is not waiting:
                        break
                    scope.state = running
                else:
                    if scope.state is running:
                        scope.state = waiting
                    return
            while (visited := self._visit()) is not _END:
                yield visited
        except BaseException as error:
            # Raised while it is waiting, the error is not the application's: this generator is being dropped.
            if scope.state is RUNNING:
                self._fail(error)
            raise

    def __next__(self) -> bytes:
        try:
            chunk = self._visit()
        except BaseException as error:
            self._fail(error)
            raise
        if chunk is _END:
            raise StopIteration
        return chunk

    def _iterate(self) -> Iterator[bytes]:
        if self._iterator is None:
            self._iterator = steps(self._scope, self._body)
        return self._iterator

    def _iterate_again(self) -> Iterator[bytes]:
        """The iterator as a ``for`` loop can take it: some have no ``iter()`` of their own, or only once."""
        iterator = self._iterate()
        return iterator if type(iterator) is GeneratorType or type(iterator) is chain else iter(iterator.__next__, _END)

    def _visit(self) -> bytes:
        """Take a step with the scope current in it, and the caller's again after it; ``_END`` at the end."""
        scope = self._scope
        between = scope.state
        if between is ENDED:
            return _END
        before = current.get(NOTHING)
        current.set(scope.inner or scope)
        scope.state = RUNNING
        try:
            chunk = next(self._iterate(), _END)
        finally:
            self._note_inner()
            current.set(before)
        if scope.state is not RUNNING:
            return _END  # Closed in the meantime.
        scope.state = between
        return chunk

    def _note_inner(self) -> None:
        """Remember a context that the step has entered and not left: the next step goes on in it."""
        left = current.get(None)
        scope = self._scope
        scope.inner = left if left is not scope and isinstance(left, Scope) and left.state is RUNNING else None

    def _fail(self, error: BaseException) -> None:
        _finish_here(self._scope, self._body, error)

    def close(self) -> None:
        """End the scope; a second call does nothing.

        :raises BaseException: what the body's own ``close()`` raised, after everything else was done.
        """
        if self._scope.state < ENDING:
            _finish_here(self._scope, self._body)

    def __del__(self) -> None:
        # PEP 3333 has every server call close(); this one dropped the response instead.
        if self._scope.state < ENDING:
            # In a copy of the context: the garbage collector may have come while this very variable was being set,
            # and Python 3.11 does not survive that the context changes under it then.
            copy_context().run(_abandon, self._scope, self._body)


class SizedScopeIterator(ScopeIterator):
    """The same for a body with a length: servers derive the Content-Length from it."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(self._body)  # type: ignore[arg-type]  # respond() has looked


class ListScopeIterator(SizedScopeIterator):
    """The same for a list or tuple: no code of the application runs while a server steps through it.

    It is handed over as it is, and its scope is off the Local already.
    """

    __slots__ = ()

    def __iter__(self) -> Iterator[bytes]:  # type: ignore[override]
        if self._iterator is None:
            self._iterator = iter(self._body)
        return self._iterator

    def __next__(self) -> bytes:
        return next(iter(self))

    def close(self) -> None:
        scope = self._scope
        if scope.state < ENDING:
            if scope.session is None:
                fatal = end(scope)
            else:
                scope.state = ENDING
                token = current.set(scope)
                try:
                    fatal = end(scope)
                finally:
                    current.reset(token)
            if fatal is not None:
                raise fatal


class JoinedIterator(ScopeIterator):
    """A body that runs in a scope which another response owns and will end."""

    __slots__ = ()

    def _iterate(self) -> Iterator[bytes]:
        # The response that owns the scope steps through this one, and knows whether it is a stream.
        if self._iterator is None:
            self._iterator = iter(self._body)
        return self._iterator

    def _fail(self, error: BaseException) -> None:
        """Nothing: it goes on to the response that owns the scope."""

    def close(self) -> None:
        close = getattr(self._body, "close", None)
        self._body = ()
        if close is not None:
            before = current.get(NOTHING)
            current.set(self._scope)
            try:
                close()
            finally:
                current.set(before)

    def __del__(self) -> None:
        """Nothing: the scope is not this response's."""


class SizedJoinedIterator(JoinedIterator, SizedScopeIterator):
    """Both."""

    __slots__ = ()


def respond(body: Iterable[bytes], scope: Scope) -> ScopeIterator:
    """Make ``scope`` current in ``body`` and end it with the response."""
    # The class is asked, as len() does: an instance may answer to anything.
    return SizedScopeIterator(body, scope) if hasattr(type(body), "__len__") else ScopeIterator(body, scope)


def respond_joined(body: Iterable[bytes], scope: Scope) -> ScopeIterator:
    """Make ``scope`` current in ``body``, which is a part of the response that will end it."""
    if hasattr(type(body), "__len__"):
        return SizedJoinedIterator(body, scope)
    return JoinedIterator(body, scope)


def _finish_here(scope: Scope, body: object = None, error: BaseException | None = None) -> None:
    """Finish a scope, once, and leave the Local as it is found, but for that scope."""
    if scope.state >= ENDING:
        return
    before = current.get(NOTHING)
    try:
        finish(scope, body, error)
    finally:
        if before is scope:
            leave(scope)
        else:
            current.set(before)
        del scope.token


def finish(scope: Scope, body: object = None, error: BaseException | None = None) -> None:
    """Close the body and end its scope: every finisher runs, once, whatever becomes of the others.

    The scope is current in the meantime, and after that: the caller knows what was before.

    :param body: has its ``close()`` called.
    :param error: what the application raised. The caller goes on to raise it, so whatever else fails is logged.
    :raises BaseException: without ``error``, what the body's ``close()`` raised; else what another finisher raised
        that nobody may swallow (:exc:`KeyboardInterrupt`, a greenlet's kill). All other failures are logged.
    """
    scope.state = ENDING
    fatal = None
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


def end(scope: Scope) -> BaseException | None:
    """Run the finishers that are not the application's. Only a session needs its scope to be current for that.

    :returns: what a finisher raised that nobody may swallow. All other failures are logged.
    """
    fatal = None
    if scope.session is not None:
        # First of all: its connection must not wait for the locals' finishers.
        try:
            remove_session(scope)
        except BaseException as failure:
            fatal = _log(scope, "session.remove", failure)
    if len(local_manager.locals) > 1:
        fatal = _cleanup_others(scope) or fatal
    scope.state = ENDED
    scope.clear()
    scope.environ = scope.start_response = scope.transaction = scope.failure = None
    if scope.session is not None:
        # Opened since: by an event of the session's own close, or by a thread that shares the scope.
        _attempt(scope, "session.remove", remove_session, scope)
    return fatal


def _close(scope: Scope, body: object, error: BaseException | None) -> None:
    close = getattr(body, "close", None)
    if error is not None:
        _preserve(scope, error)
        if close is not None:
            _attempt(scope, "the body's close()", close)
    elif close is not None:
        try:
            close()
        except BaseException as close_error:
            _preserve(scope, close_error)
            raise


def _cleanup_others(scope: Scope) -> BaseException | None:
    """What ``local_manager.cleanup()`` does, but not for the scope's own Local, and for each of them in any case."""
    outer = scope.token.old_value
    if isinstance(outer, Scope) and outer.state in (RUNNING, ENDING):
        return None  # They are still in use: only the outermost application's end is the request's.
    fatal = None
    for other in local_manager.locals:
        if other is not local:
            fatal = _attempt(scope, "local_manager.cleanup", release_local, other) or fatal
    return fatal


def _attempt(scope: Scope, name: str, finisher: Callable[..., object], *arguments: object) -> BaseException | None:
    """Call a finisher; log its failure, and return it if it is none that may be swallowed."""
    try:
        finisher(*arguments)
    except BaseException as failure:
        return _log(scope, name, failure)
    return None


def _log(scope: Scope, name: str, failure: BaseException) -> BaseException | None:
    logger.error(
        "A finisher of %r failed: %s",
        scope.owner,
        name,
        exc_info=failure,
        extra={"application": scope.owner, "finisher": name},
    )
    return None if isinstance(failure, Exception) else failure


def _abandon(scope: Scope, body: object) -> None:
    leaked = scope.session is not None
    owner = scope.owner
    try:
        _finish_here(scope, body)
    except BaseException:
        logger.exception("A finisher of a response of %r that was dropped failed", owner)
    if leaked:
        warnings.warn(
            f"A response or context of {owner!r} was dropped with its session open: whoever opened it has to close it.",
            ResourceWarning,
            stacklevel=2,
        )


class ScopeContext:
    """``with app.context():``, a scope that is no request's.

    :param owner: the application that the scope belongs to.
    :param values: what else to find on ``local``.
    """

    def __init__(self, owner: Any, values: dict[str, Any] | None = None) -> None:
        self._owner = owner
        self._values = values
        self._scope: Scope | None = None

    def __enter__(self) -> scoped_session[Session]:
        if self._scope is not None:
            raise ScopeError(f"This context of {self._owner!r} is entered already: call context() for each 'with'.")
        watch_inner(self._owner)
        make = getattr(self._owner, "context_scope", Scope)
        self._scope = scope = make(self._values or (), application=self._owner)
        begin(scope)
        return session

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        scope, self._scope = self._scope, None
        if scope is None:
            return
        before = current.get(None)
        try:
            finish(scope, error=error)
        finally:
            if before is not scope and isinstance(before, Scope) and before.state is RUNNING:
                current.set(before)  # Entered later, and to be left later: it will need this scope's token.
            else:
                leave(scope)

    def __del__(self) -> None:
        if self._scope is not None:
            copy_context().run(_abandon, self._scope, None)


class PreservedContext(threading.local):
    """A failed request's scope, opened anew for each command in the console of Werkzeug's debugger.

    The debugger keeps it for as long as its page may be used and enters it in the thread of each command, so no
    session or connection may live in it between two of them.
    """

    # Called in each thread anew, with what it was first called with: a scope would have ended since.
    def __init__(self, owner: Any, values: dict[str, Any]) -> None:
        self._arguments = owner, values

    def __enter__(self) -> None:
        self._context = ScopeContext(*self._arguments)
        self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


def _preserve(scope: Scope, error: BaseException) -> None:
    """Tell Werkzeug's debugger, if it is outside, how to come back into this scope."""
    environ = scope.environ
    if environ is None or "werkzeug.debug.preserve_context" not in environ or not isinstance(error, Exception):
        return
    # The debugger opens at the frame that raised, which is the innermost application's: that one comes first.
    if environ.get("sqlasession.preserved") is not error:
        environ["sqlasession.preserved"] = error
        environ["werkzeug.debug.preserve_context"](PreservedContext(scope.owner, dict(scope)))
