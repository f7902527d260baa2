"""Reports connections that a request checked out of a pool and did not return, with the stack that did so.

The session returns its connection at the end of each request. A connection that the application checks out itself,
with ``app.engine.connect()`` or a Session of its own, is the application's to return: each one that it forgets is
missing from the pool, until the pool is exhausted. With ``report_leaks=True`` (in an ini ``report_leaks = true``) a
request, or a ``with app.context():``, that ends before its connections are returned is logged as a warning, with the
stack that checked out each of them. Check out a connection that is meant to stay open, such as one that listens for
notifications, outside of requests, or detach it from its pool.

Recording a stack takes some tens of microseconds for each checkout. Without the option nothing is recorded.
"""

from __future__ import annotations

import logging
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import event

from ._dependencies import calling_frame
from ._recording.stacks import Stack, format_stack, take_stack
from ._scope.scope import ENDED, ENDING, RUNNING, Scope, current, outwards
from ._sessions.connections import open_connections

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy import Engine
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

__all__ = ["Checkouts", "exempt_connections", "note_checkouts", "reporting"]

logger = logging.getLogger(__name__)

_observed_engines: WeakSet[Engine] = WeakSet()

#: Connections that are never reported: those of an isolated test, which stay open after the request that needed them.
exempt_connections: WeakSet[PoolProxiedConnection] = WeakSet()


class Checkouts:
    """Connections that were checked out of pools, and the stacks that did so."""

    def __init__(self) -> None:
        # By the proxy: it is dropped when it is returned, while a StaticPool hands out one record again and again.
        self._stacks: WeakKeyDictionary[PoolProxiedConnection, Stack] = WeakKeyDictionary()

    def note(self, driver_connection: Any, record: ConnectionPoolEntry, proxy: PoolProxiedConnection) -> None:
        """Record a checkout. A listener for the ``checkout`` event of a pool."""
        self._stacks[proxy] = take_stack(calling_frame(1))

    def stacks(self, held: Collection[PoolProxiedConnection] = ()) -> list[str]:
        """Return a formatted stack for each connection that was neither returned to its pool nor detached from it.

        :param held: connections that are not reported, because a session will return them.
        """
        return [
            format_stack(stack)
            for proxy, stack in list(self._stacks.items())
            if proxy.is_valid and not proxy.is_detached and proxy not in exempt_connections and proxy not in held
        ]


class ReportingScope(Scope):
    """A scope that records the connections checked out in it, and logs those that are not returned at its end."""

    checkouts: Checkouts | None = None

    def clear(self) -> None:
        """Forget the scope's values; at the end of the scope, log its leaks.

        The end of a scope calls this last, after the session was removed.
        """
        super().clear()
        if self.state is not ENDED or self.checkouts is None:
            return
        stacks = self.checkouts.stacks(_held_outside(self))
        if stacks:
            environ = self.environ
            logger.warning(
                "%s of %r has ended without returning %d of its connections. Checked out here:\n\n%s",
                "A context" if environ is None else f"{environ.get('REQUEST_METHOD')} {environ.get('PATH_INFO')!r}",
                self.owner,
                len(stacks),
                "\n\n".join(stacks),
                extra={"application": self.owner},
            )


def _held_outside(scope: Scope) -> list[PoolProxiedConnection]:
    """Return the connections of the sessions of outer scopes. Some may have been checked out in this scope."""
    held = []
    for outer in islice(outwards(scope), 1, None):
        if outer.session is not None:
            connections = open_connections(outer.session)
            held += [each.connection for each in connections if not each.closed and not each.invalidated]
    return held


@cache
def reporting(scope_class: type[Scope]) -> type[Scope]:
    """Return a subclass of ``scope_class`` that reports leaks."""
    return ReportingScope if scope_class is Scope else type(scope_class.__name__, (ReportingScope, scope_class), {})


def note_checkouts(engine: Engine) -> None:
    """Listen to the checkouts of ``engine``, and record them in the scope that they take place in."""
    if engine not in _observed_engines:
        event.listen(engine, "checkout", _note_checkout)
        _observed_engines.add(engine)


def _note_checkout(driver_connection: Any, record: ConnectionPoolEntry, proxy: PoolProxiedConnection) -> None:
    for scope in outwards(current.get(None)):
        if isinstance(scope, ReportingScope) and scope.state in (RUNNING, ENDING):
            if scope.checkouts is None:
                scope.checkouts = Checkouts()
            scope.checkouts.note(driver_connection, record, proxy)
            return
