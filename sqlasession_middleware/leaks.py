"""Connections that a request took from a pool and did not give back, and where it took them.

The session's own connection comes back with the end of each request. What the application takes beside it, with
``app.engine.connect()`` or a Session of its own, it has to give back itself: what it forgets is missing in the pool,
and one day the pool is empty. With ``report_leaks=True`` (in an ini ``report_leaks = true``) each request, and each
``with app.context():``, that ends before its connections are back is logged as a warning, with the stack that took each
of them. A connection that is meant to stay, such as one that listens for notifications, is better taken outside of
requests, or detached from its pool.

To remember the stacks costs some tens of microseconds for each connection that is taken. Without the option
there is nothing to pay for.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from functools import cache
from types import CodeType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import sqlalchemy
from sqlalchemy import event

from .context import ENDED, WAITING, Scope, current
from .sessions import open_connections

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy import Engine
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

__all__ = ["Checkouts", "lasting", "note_checkouts", "reporting"]

logger = logging.getLogger(__name__)

#: Where somebody was, innermost first: what was called, and the line in it.
Stack = list[tuple[CodeType, int]]

_noting: WeakSet[Engine] = WeakSet()

#: The folders of what is between the application and the pool: a leak is the application's. Their names alone would not
#: do: an application, or a checkout of this library, may be in a folder that is called alike.
_NOT_THE_CALLER = tuple(os.path.join(os.path.dirname(file), "") for file in (str(sqlalchemy.__file__), __file__))
_NOT_THE_TEST = ("/_pytest/", "/pluggy/")


#: Those that are to stay, whoever was the first to need them: a test's.
lasting: WeakSet[PoolProxiedConnection] = WeakSet()


class Checkouts:
    """The connections that somebody has taken from pools."""

    def __init__(self) -> None:
        # Not by the pool's record: a StaticPool gives its only one to all who ask. Who gives back forgets this one.
        self._taken: WeakKeyDictionary[PoolProxiedConnection, Stack] = WeakKeyDictionary()

    def note(self, driver_connection: Any, record: ConnectionPoolEntry, proxy: PoolProxiedConnection) -> None:
        """Listener of a pool's ``checkout``."""
        # Not traceback.extract_stack(), which looks after each file of the stack.
        self._taken[proxy] = [(frame.f_code, line) for frame, line in traceback.walk_stack(sys._getframe(1))]

    def stacks(self, held: Collection[PoolProxiedConnection] = ()) -> list[str]:
        """Where those were taken that are not back, as Python shows a stack. A detached one is its pool's no more.

        :param held: those of whom somebody else knows that they will be given back.
        """
        return [
            _format(stack)
            for proxy, stack in list(self._taken.items())
            if proxy.is_valid and not proxy.is_detached and proxy not in lasting and proxy not in held
        ]


def _format(stack: Stack) -> str:
    """As Python shows a stack, but only what is the application's or the server's."""
    frames = [
        traceback.FrameSummary(code.co_filename, line, code.co_name)
        for code, line in reversed(stack)
        if not code.co_filename.startswith(_NOT_THE_CALLER)
        and not any(part in code.co_filename.replace("\\", "/") for part in _NOT_THE_TEST)
    ]
    return "".join(traceback.StackSummary.from_list(frames).format())


class ReportingScope(Scope):
    """A scope that knows which connections were taken in it, and tells of those that are not back when it ends."""

    checkouts: Checkouts | None = None

    def clear(self) -> None:
        """As any scope's. It is the last that is done at the end, when the session was removed."""
        super().clear()
        if self.state is not ENDED or self.checkouts is None:
            return
        stacks = self.checkouts.stacks(_held_outside(self))
        if stacks:
            environ = self.environ
            logger.warning(
                "%s of %r has ended and not given back %d of the connections that it took. Taken here:\n\n%s",
                "A context" if environ is None else f"{environ.get('REQUEST_METHOD')} {environ.get('PATH_INFO')!r}",
                self.owner,
                len(stacks),
                "\n\n".join(stacks),
                extra={"application": self.owner},
            )


def _held_outside(scope: Scope) -> list[PoolProxiedConnection]:
    """What the sessions of the scopes around this one hold: it may be this one that they were first used in."""
    held = []
    outer: Any = scope.token.old_value
    while isinstance(outer, Scope):
        if outer.session is not None:
            connections = open_connections(outer.session)
            held += [each.connection for each in connections if not each.closed and not each.invalidated]
        outer = outer.token.old_value if hasattr(outer, "token") else None
    return held


@cache
def reporting(scope_class: type[Scope]) -> type[Scope]:
    """``scope_class``, with a report of the connections that are not given back."""
    return ReportingScope if scope_class is Scope else type(scope_class.__name__, (ReportingScope, scope_class), {})


def note_checkouts(engine: Engine) -> None:
    """Have the scopes that report know which connections of ``engine`` were taken in them."""
    if engine not in _noting:
        event.listen(engine, "checkout", _note_checkout)
        _noting.add(engine)


def _note_checkout(driver_connection: Any, record: ConnectionPoolEntry, proxy: PoolProxiedConnection) -> None:
    scope: Any = current.get(None)
    while isinstance(scope, Scope):
        if isinstance(scope, ReportingScope) and scope.state not in (WAITING, ENDED):
            if scope.checkouts is None:
                scope.checkouts = Checkouts()
            scope.checkouts.note(driver_connection, record, proxy)
            return
        scope = scope.token.old_value if hasattr(scope, "token") else None
