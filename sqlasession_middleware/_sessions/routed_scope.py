"""Where a request to an application with replicas reads, and how the client learns of its writes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .._database.cookie import LastWrite
from .._database.replicas import Replica, Replicas
from .._dependencies import innermost_transaction, is_clean
from .._scope.scope import Scope
from .registry import current_scope

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine
    from sqlalchemy.orm import Session, SessionTransaction

__all__ = ["SAFE_METHODS", "Route", "RoutedScope", "note_unknown_commit", "on_primary"]

#: Methods that do not ask for a change (RFC 9110, 9.2.1).
SAFE_METHODS = ("GET", "HEAD", "OPTIONS", "TRACE")


class Route:
    """Where the session of a request reads. It outlives ``session.remove()``.

    :param moved: whether the request reads from the primary from now on.
    :param last_write: the client's, as its cookie tells.
    """

    __slots__ = ("_replica", "engine", "last_write", "moved", "transaction")

    def __init__(self, moved: bool, last_write: LastWrite | None) -> None:
        self.moved = moved
        self.last_write = last_write
        #: the engine that the present transaction reads from
        self.engine: Engine | Connection | None = None
        #: the transaction that this was decided in
        self.transaction: SessionTransaction | None = None
        self._replica: Replica | None = None

    def choose(self, session: Session, replicas: Replicas) -> None:
        """Choose the engine of a transaction that begins: a replica, or the primary if no replica is usable."""
        replica = replicas.connect(session, self.last_write, self._replica)
        if replica is not None:
            self._replica = replica
        self.engine = session.bind if replica is None else replica.engine
        self.transaction = session.get_transaction()

    def end(self, session: Session) -> None:
        """Read from the primary until the next transaction: that on the replica has ended, with what was set in it."""
        if self.transaction is session.get_transaction():
            self.engine = session.bind


class RoutedScope(Scope):
    """The scope of a request to an application with replicas."""

    #: made by the session, or by on_primary()
    route: Route | None = None
    #: the last commit of the request that the client can still be told of
    written: LastWrite | None = None

    def is_safe(self) -> bool:
        """Whether the request has a safe method."""
        environ = self.environ
        return environ is not None and environ.get("REQUEST_METHOD") in SAFE_METHODS

    def find_route(self, replicas: Replicas) -> Route:
        """The route of this request."""
        route = self.route
        if route is None:
            last_write = replicas.cookie.read(self.environ) if self.environ is not None and self.is_safe() else None
            route = self.route = Route(not self.is_safe(), last_write)
        return route

    def start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        """The application's ``start_response``: adds the cookie if the request has written by now, or may have."""
        self.status = status
        self.headers = headers
        session: Any = self.session
        if self.written is not None or (
            session is not None
            and innermost_transaction(session) is not None
            and (getattr(session, "_may_have_written", True) or not is_clean(session))
        ):
            headers = self.owner.routing.replicas.cookie.give(self.written, self.environ, headers)
        # The same lines as in Scope.start(): super() would cost requests that use no session.
        if exc_info is None:
            return self.start_response(status, headers)  # type: ignore[misc]  # it is there in a request
        return self.start_response(status, headers, exc_info)  # type: ignore[misc]


def note_unknown_commit(scope: Scope) -> None:
    """Tell the client of a commit whose outcome is unknown: it may look whether the commit took place."""
    if isinstance(scope, RoutedScope):
        position = None if scope.written is None else scope.written.position
        scope.written = LastWrite(time.time(), position, is_exact=False)


def on_primary() -> None:
    """Have the current scope's session read from the primary from now on, as after a write.

    Use it for statements that write although they look like reads, and for reads that have to see what other clients
    have just written. Without replicas, and outside of a request, sessions are on the primary anyway.

    :raises ScopeError: outside of a scope.
    """
    scope = current_scope()
    if isinstance(scope, RoutedScope):
        scope.find_route(scope.owner.routing.replicas).moved = True
