"""``session``: the global scoped session, and how the Session of a scope is opened.

The registry behind it is the scope itself: one slot, and no dict whose keys could stay behind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.util import ScopedRegistry

from .._database import forks
from .._database.forks import check_process, fork_safe_lock, has_unseen_forks, leave_session_to_parent
from .._scope.elsewhere import is_in_flask_context, request_without_scope
from .._scope.scope import ENDED, NOTHING, WAITING, Scope, begin, current
from ..errors import ScopeError, shown
from .classes import session_class_for
from .connections import disown_returned, remove_session
from .request_session import RequestSession

__all__ = ["current_scope", "has_scope", "new_session", "open_session", "session"]

logger = logging.getLogger("sqlasession_middleware.sessions")

# Threads that share a scope (they were started with its context) must not open two sessions for it. Reentrant, because
# the garbage collector may close an abandoned response, and so call this module, at any time.
_opening = fork_safe_lock()


class ShellScope(Scope):
    """The scope behind ``local.application = app``, as typed in a shell.

    There is no response to close. The scope ends when the Local drops it: in ``local_manager.cleanup()``, or when its
    thread ends. Its session is closed then.
    """

    __slots__ = ()

    def __del__(self) -> None:
        try:
            leave_session_to_parent(self)  # The scopes of other threads end in the child of a fork.
            disown_returned(self)
            remove_session(self)
        except Exception:
            logger.exception("The session of a dropped shell scope could not be closed")


class ScopeSessionMaker(sessionmaker[Session]):
    """Makes Sessions of the current application, as :func:`new_session` does.

    It is a :class:`~sqlalchemy.orm.sessionmaker`, because SQLAlchemy looks there for the class that the events of a
    ``scoped_session`` belong to.
    """

    # Not SQLAlchemy's constructor: it derives a class of its own, and no Session of an application is made of that.
    def __init__(self) -> None:
        self.kw = {}
        #: The base of the Session classes of all applications.
        self.class_ = RequestSession

    def __call__(self, **options: Any) -> Session:
        return new_session(**options)

    def configure(self, **options: Any) -> NoReturn:
        """Raise an error, as ``session.configure()`` does.

        :raises ScopeError: always.
        """
        raise ScopeError(
            f"session.configure({', '.join(options)}) would change the sessions of every application:"
            " give 'session_options' to SQLASessionMiddleware instead."
        )


class ScopeRegistry(ScopedRegistry[Session]):
    """SQLAlchemy's registry, whose place for the Session is a slot of the current scope."""

    __slots__ = ()

    def __init__(self, make: Callable[[], Session]) -> None:
        super().__init__(make, current_scope)

    def __call__(self) -> Session:
        return open_session(current_scope())

    def has(self) -> bool:
        scope = current.get(None)
        return isinstance(scope, Scope) and scope.session is not None

    def set(self, obj: Session) -> None:
        scope = self.scopefunc()
        scope.process = forks.pid
        scope.session = obj

    def clear(self) -> None:
        scope = current.get(None)
        if isinstance(scope, Scope):
            scope.session = None


class ScopeSession(scoped_session[Session]):
    """A :class:`~sqlalchemy.orm.scoped_session` whose scope is the request."""

    def __init__(self) -> None:
        make = ScopeSessionMaker()
        super().__init__(make)
        self.registry = ScopeRegistry(make)

    # SQLAlchemy's own property calls the registry. Each use of the session would pay for that call.
    @property
    def _proxied(self) -> Session:
        scope = current.get(None)
        if isinstance(scope, Scope):
            orm_session = scope.session
            if orm_session is not None:
                return orm_session
            if scope.state is not ENDED:
                return open_session(scope)
        return open_session(current_scope())

    def remove(self) -> None:
        """Close the scope's Session, if one is open. The next use opens another one.

        It does nothing while a TransactionMiddleware is in charge and there is something to commit: recipes for
        frameworks call it in their teardown, before it is known whether the response is a success.

        :raises Exception: what the Session's ``close()`` raised, after its connections were given back.
        """
        scope = self._find_here()
        # Code that runs between two steps of a response, in a copy of a step's context, must not remove its session.
        if isinstance(scope, Scope) and scope.state is not WAITING:
            orm_session = scope.session
            transaction = scope.transaction
            if (
                transaction is None
                or orm_session is None
                or not (orm_session.in_transaction() or transaction.has_calls)
            ):
                remove_session(scope)

    def _find_here(self) -> dict[str, Any] | None:
        """The value whose Session ``remove()`` closes, if it is a scope."""
        return current.get(None)

    def configure(self, **options: Any) -> None:
        """Raise an error: sessions belong to an application, which has its own ``session_options``.

        :raises ScopeError: always.
        """
        self.session_factory.configure(**options)


def current_scope() -> Scope:
    """The scope that the calling code runs in.

    :raises ScopeError: if there is none, or if it has ended.
    """
    values = current.get(None)
    if not isinstance(values, Scope):
        if not values or "application" not in values:
            request = request_without_scope()
            if request is not None:
                raise ScopeError(
                    f"No SQLASessionMiddleware is around the code that uses 'session' in the request {request},"
                    " or its scope is over: wrap what uses it. In a pipeline, the middleware comes before it:"
                    " 'pipeline = db shop'."
                )
            if is_in_flask_context():
                raise ScopeError(
                    "Flask's application context is no scope of 'session':"
                    " use 'with database.context():' of the SQLASessionMiddleware."
                )
            raise ScopeError(
                "No application is bound here, so 'session' has no scope:"
                " run inside a request, or in 'with app.context():'."
            )
        values = ShellScope(values)
        begin(values)
    if values.state is ENDED:
        raise ScopeError(
            "The request is over, so 'session' has no scope:"
            " code that outlives its request runs in its own 'with app.context():'."
        )
    return values


def has_scope() -> bool:
    """Whether ``session`` finds a scope here: in a request, and in ``with app.context():``.

    For code that also runs where it would raise a :exc:`~sqlasession_middleware.errors.ScopeError`.
    """
    return "application" in current.get(NOTHING)  # A scope that has ended is empty.


def new_session(**options: Any) -> Session:
    """Make a Session of the current application that belongs to no scope: the caller closes it.

    :param options: of :class:`~sqlalchemy.orm.Session`, over the application's own ``session_options``.
    """
    scope = current_scope()
    make = getattr(scope.get("application"), "new_session", None) or _find_maker(scope)
    return make(**options)


def open_session(scope: Scope) -> Session:
    """The session of ``scope``, opened now if there is none."""
    if has_unseen_forks:  # pragma: no cover  # in uWSGI
        check_process()
    orm_session = scope.session
    if orm_session is not None:
        return orm_session
    make = getattr(scope.get("application"), "new_session", None) or _find_maker(scope)
    # Made outside of the lock: the constructor of an application's Session class may run any code.
    new = make()
    with _opening:
        orm_session = scope.session
        if orm_session is None:
            scope.process = forks.pid
            orm_session = scope.session = new
    if orm_session is not new:
        new.close()
    if scope.state is ENDED:
        # The request ended in another thread in the meantime, possibly before it could see this session.
        remove_session(scope)
        raise ScopeError("The request ended while 'session' was being opened.")
    return orm_session


def _find_maker(scope: Scope) -> Callable[..., Session]:
    """What makes a Session if ``local.application`` is an object as in Werkzeug's pattern, and not the middleware."""
    owner = scope.get("application")
    if owner is None:
        raise ScopeError("No application is bound here any more: 'local.application' was deleted.")
    if not hasattr(owner, "database_engine"):
        raise ScopeError(f"local.application is {shown(owner)}, which has no 'database_engine' to open a session on.")
    engine = owner.database_engine
    return partial(session_class_for([engine.dialect], Session), engine)


#: The current scope's Session, opened at first use and removed with the scope.
session: scoped_session[Session] = ScopeSession()
