"""``with app.context():``, a scope that is not a request's."""

from __future__ import annotations

from contextvars import copy_context
from types import TracebackType
from typing import Any

from sqlalchemy.orm import Session, scoped_session

from .._database.deadlines import limit_nested
from .._database.observers import observe_nested
from .._scope.deadline import begin_deadline
from .._scope.scope import NOTHING, RUNNING, WAITING, Scope, begin, current, leave
from .._sessions.connections import disown_returned
from .._sessions.registry import session
from ..errors import ScopeError
from .ending import abandon, finish

__all__ = ["ScopeContext"]


class ScopeContext:
    """A context manager that begins a scope and ends it.

    :param owner: the application that the scope belongs to.
    :param scope_class: what is made of it.
    :param deadline: its deadline in seconds, if the class can have one.
    """

    def __init__(self, owner: Any, scope_class: type[Scope] = Scope, deadline: float | None = None) -> None:
        self._owner = owner
        self._scope_class = scope_class
        self._deadline = deadline
        self._scope: Scope | None = None

    def __enter__(self) -> scoped_session[Session]:
        if self._scope is not None:
            raise ScopeError(f"This context of {self._owner!r} was already entered: call context() for each 'with'.")
        observe_nested(self._owner)
        self._scope = scope = self._scope_class(application=self._owner)
        begin(scope)
        if self._deadline is not None:
            begin_deadline(scope, self._deadline)
        limit_nested(self._owner)
        return session

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        scope, self._scope = self._scope, None
        if scope is None:
            return
        before = current.get(None)
        if kind is GeneratorExit:
            disown_returned(scope)  # The collector may be closing the generator that the block is in.
        try:
            finish(scope, error=error)
        finally:
            if before is not scope and isinstance(before, Scope) and before.state is RUNNING:
                current.set(before)  # A context that was entered later and is left later: it needs this scope's token.
            elif before is not scope and _is_waiting(scope.token.old_value):
                # Not left in a step of the body that entered it: the collector drops a response.
                current.set(NOTHING if before is None else before)
            else:
                leave(scope)

    def __del__(self) -> None:
        if self._scope is not None:
            copy_context().run(abandon, self._scope, None)


def _is_waiting(scope: object) -> bool:
    return isinstance(scope, Scope) and scope.state is WAITING
