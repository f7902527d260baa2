"""``session``: the global scoped session, and how one Session is opened and removed.

The registry behind it is the scope itself: one slot, no dict to forget a key in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from threading import RLock
from typing import Any, cast

from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.util import ScopedRegistry

from .context import ENDED, WAITING, Scope, begin, current
from .errors import ScopeError

__all__ = ["remove_session", "session"]

logger = logging.getLogger(__name__)

# Threads that share a scope (they were started with its context) must not open two sessions for it. Reentrant, because
# the garbage collector may run an abandoned body's code, and with it this module's, at any time.
_opening = RLock()


class ShellScope(Scope):
    """The scope behind ``local.application = app``, typed by hand.

    Nobody closes a response here: it ends when the Local lets go of it (``local_manager.cleanup()``, another
    thread's end), and what it holds is given back then.
    """

    __slots__ = ()

    def __del__(self) -> None:
        try:
            remove_session(self)
        except Exception:
            logger.exception("The session of a dropped shell scope could not be closed")


class ScopeRegistry(ScopedRegistry[Session]):
    """Where ``session`` finds its Session: the slot of the current scope."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(new_session, current_scope)

    def __call__(self) -> Session:
        return open_session(current_scope())

    def has(self) -> bool:
        scope = current.get(None)
        return isinstance(scope, Scope) and scope.session is not None

    def set(self, obj: Session) -> None:
        self.scopefunc().session = obj

    def clear(self) -> None:
        scope = current.get(None)
        if isinstance(scope, Scope):
            scope.session = None


class ScopeSession(scoped_session[Session]):
    """A :class:`~sqlalchemy.orm.scoped_session` whose scope is the request."""

    def __init__(self) -> None:
        super().__init__(cast("sessionmaker[Session]", new_session))
        self.registry = ScopeRegistry()

    # SQLAlchemy's asks the registry in a call of its own, and so each use of the session would pay for two.
    @property
    def _proxied(self) -> Session:
        scope = current.get(None)
        if isinstance(scope, Scope):
            opened = scope.session
            if opened is not None:
                return opened
            if scope.state is not ENDED:
                return open_session(scope)
        return open_session(current_scope())

    def remove(self) -> None:
        """Close the scope's Session, if one is open. The next use opens another one.

        :raises Exception: what the Session's ``close()`` raised, after its connections were given back.
        """
        scope = current.get(None)
        # Between two steps a request's session is not for others to remove.
        if isinstance(scope, Scope) and scope.state is not WAITING:
            remove_session(scope)

    def configure(self, **options: Any) -> None:
        """Refused: sessions belong to an application, which has its own ``session_options``.

        :raises ScopeError: always.
        """
        raise ScopeError(
            f"session.configure({', '.join(options)}) would change the sessions of every application:"
            " give 'session_options' to SQLASessionMiddleware instead."
        )


def current_scope() -> Scope:
    """The scope that the calling code is in.

    :raises ScopeError: if there is none, or if it has ended.
    """
    values = current.get(None)
    if not isinstance(values, Scope):
        if not values or "application" not in values:
            raise ScopeError(
                "No application is bound here, so 'session' has no scope:"
                " run inside a request, or in 'with app.context():'."
            )
        begin(values := ShellScope(values))
    if values.state is ENDED:
        raise ScopeError(
            "The request is over, so 'session' has no scope any more:"
            " code that outlives its request runs in its own 'with app.context():'."
        )
    return values


def new_session(**options: Any) -> Session:
    """A Session of the current application that belongs to no scope: the caller closes it.

    :param options: of :class:`~sqlalchemy.orm.Session`, over the application's own ``session_options``.
    """
    scope = current_scope()
    make = getattr(scope.get("application"), "new_session", None) or _find_maker(scope)
    return make(**options)


def open_session(scope: Scope) -> Session:
    """The session of ``scope``: the open one, or one that is opened now."""
    opened = scope.session
    if opened is not None:
        return opened
    make = getattr(scope.get("application"), "new_session", None) or _find_maker(scope)
    # Made outside of the lock: a Session class may do in its constructor what it likes.
    made = make()
    with _opening:
        opened = scope.session
        if opened is None:
            opened = scope.session = made
    if opened is not made:
        made.close()
    if scope.state is ENDED:
        # The request ended in another thread while this one was opening: its end may have seen no session.
        remove_session(scope)
        raise ScopeError("The request ended while 'session' was being opened.")
    return opened


def _find_maker(scope: Scope) -> Callable[..., Session]:
    """What makes a Session where ``local.application`` is not the middleware, but an object as in the pattern."""
    owner = scope.get("application")
    if owner is None:
        raise ScopeError("No application is bound here any more: 'local.application' was deleted.")
    if not hasattr(owner, "database_engine"):
        raise ScopeError(f"local.application is {owner!r}, which has no 'database_engine' to open a session on.")
    return partial(Session, owner.database_engine)


def remove_session(scope: Scope) -> None:
    """Take the Session out of its scope, then close it.

    :raises BaseException: what ``close()`` raised. By then every connection that the Session held has been
        invalidated and its place in the pool is free.
    """
    opened = scope.session
    if opened is None:
        return
    scope.session = None
    # Session.close() forgets its transaction first and stops at the first connection whose rollback fails. What it
    # was still holding is only known to that transaction, and neither has a public name that costs no call.
    transaction = getattr(opened, "_transaction", None)
    try:
        opened.close()
    except BaseException:
        while transaction is not None:
            for connection, _, _, autoclose in set(transaction._connections.values()):
                if autoclose and not connection.closed:
                    _give_back(connection)
            transaction = transaction.parent
        raise


def _give_back(connection: Any) -> None:
    try:
        connection.invalidate()
        connection.close()
    except Exception:
        logger.exception("A connection of a session that could not be closed was given up")


#: The current scope's Session, opened at first use and removed with the scope.
session: scoped_session[Session] = ScopeSession()
