"""The body of a response, as the server gets it.

A :class:`ScopeIterator` makes the scope current in each step of the body, and ends it when the response is closed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextvars import copy_context
from typing import cast

from werkzeug.wsgi import ClosingIterator

from .._scope.scope import ENDED, ENDING, RUNNING, WAITING, Scope, current
from .._wsgi.bodies import iterate
from .ending import abandon, end, finish_from_outside
from .stream import steps

__all__ = ["ListScopeIterator", "ScopeIterator", "respond", "respond_joined"]

# Not None: an application that yields that by mistake gets the server's error for it.
_END = cast(bytes, object())


class ScopeIterator(ClosingIterator):
    """The body of a response, and the owner of its scope.

    :param body: what the application returned.
    :param scope: current in each step, and in ``close()``.
    """

    __slots__ = ("_body", "_iterator", "_scope")

    # Werkzeug's constructor calls iter(body), which is the application's code and may raise before this object can
    # clean up. What that constructor sets is not needed: all methods are overridden here.
    def __init__(self, body: Iterable[bytes], scope: Scope) -> None:
        self._body = body
        self._scope = scope
        self._iterator: Iterator[bytes] | None = None

    def __iter__(self) -> Iterator[bytes]:  # type: ignore[override]  # Werkzeug's says "itself"
        """Step through the body. The scope ends as soon as a step raises.

        This is a generator, because nothing is faster to iterate. It refers to this object, which lives as long as the
        generator does. This object does not refer to the generator: so a response that is dropped is freed at once,
        and not when the garbage collector finds a cycle.

        Each step sets the Local and restores it. Between two steps nothing there leads to the scope: the scope leads to
        the server's objects, and these may lead to the response, which could not be freed when it is dropped. When a
        step leaves a context open, it and all later steps take the longer way of ``next()``.
        """
        scope, enter, leave, running, waiting = self._scope, current.set, current.reset, RUNNING, WAITING
        token = None
        try:
            if scope.state is waiting:
                token = enter(scope.inner or scope)
                scope.state = running
                for chunk in self._iterate():
                    if scope.state is not running:
                        return  # The step itself, or another thread meanwhile, has closed the response.
                    if scope.inner is not None and self._note_inner():
                        break
                    scope.state = waiting
                    leave(token)
                    try:
                        yield chunk
                    except BaseException:
                        token = None
                        raise
                    if scope.state is not waiting:
                        token = None
                        return
                    token = enter(scope)
                    scope.state = running
                else:
                    if scope.state is running:
                        scope.state = waiting
                    return
                scope.state = waiting
                leave(token)
                token = None
                yield chunk
            while (visited := self._visit()) is not _END:
                yield visited
        except BaseException as error:
            # An error that is raised while the scope waits is not the application's: this generator is being dropped.
            if scope.state is RUNNING:
                self._fail(error)
            raise
        finally:
            if token is not None:
                leave(token)

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

    def _visit(self) -> bytes:
        """Take a step with the scope current, and make the caller's value current again; ``_END`` at the end."""
        scope = self._scope
        between = scope.state
        if between is ENDED:
            return _END
        token = current.set(scope.inner or scope)
        scope.state = RUNNING
        try:
            chunk = next(self._iterate(), _END)
        finally:
            self._note_inner()
            current.reset(token)
        if scope.state is not RUNNING:
            return _END  # Closed meanwhile.
        scope.state = between
        return chunk

    def _note_inner(self) -> bool:
        """Remember a context that the step entered and did not leave: the next step goes on in it.

        :returns: whether there is one.
        """
        left = current.get(None)
        scope = self._scope
        is_inner = left is not scope and isinstance(left, Scope) and left.state is RUNNING
        scope.inner = left if is_inner else None
        return is_inner

    def _fail(self, error: BaseException) -> None:
        finish_from_outside(self._scope, self._body, error)

    def close(self) -> None:
        """End the scope; a second call does nothing.

        :raises BaseException: what the body's own ``close()`` raised, after everything else was done.
        """
        finish_from_outside(self._scope, self._body)

    def __del__(self) -> None:
        # PEP 3333 has every server call close(). This one dropped the response instead.
        if self._scope.state < ENDING:
            # In a copy of the context: the garbage collector may run while this very variable is being set, and
            # Python 3.11 crashes if the context changes then.
            copy_context().run(abandon, self._scope, self._body)


class SizedScopeIterator(ScopeIterator):
    """The same for a body with a length: servers derive the Content-Length from it."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(self._body)  # type: ignore[arg-type]  # checked in respond()


class ListScopeIterator(SizedScopeIterator):
    """The same for a list or tuple: no code of the application runs in its steps.

    The server steps through the list itself. The scope has left the Local already.
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
    """A body that runs in the scope of another response, which will end it."""

    __slots__ = ()

    def _iterate(self) -> Iterator[bytes]:
        # The response that owns the scope steps through this one, and looks whether it is a stream.
        if self._iterator is None:
            self._iterator = iterate(self._body)
        return self._iterator

    def _fail(self, error: BaseException) -> None:
        """Do nothing: the error goes on to the response that owns the scope."""

    def close(self) -> None:
        close = getattr(self._body, "close", None)
        self._body = ()
        if close is not None:
            token = current.set(self._scope)
            try:
                close()
            finally:
                current.reset(token)

    def __del__(self) -> None:
        """Do nothing: another response owns the scope."""


class SizedJoinedIterator(JoinedIterator, SizedScopeIterator):
    """The same for a body with a length."""

    __slots__ = ()


def respond(body: Iterable[bytes], scope: Scope) -> ScopeIterator:
    """The response that makes ``scope`` current in ``body``, and ends it."""
    # Checks the class, as len() does: an instance may have any attribute.
    return SizedScopeIterator(body, scope) if hasattr(type(body), "__len__") else ScopeIterator(body, scope)


def respond_joined(body: Iterable[bytes], scope: Scope) -> ScopeIterator:
    """The response that makes ``scope`` current in ``body``, and leaves its end to the response around it."""
    if hasattr(type(body), "__len__"):
        return SizedJoinedIterator(body, scope)
    return JoinedIterator(body, scope)
