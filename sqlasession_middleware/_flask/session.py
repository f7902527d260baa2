"""``db.session``: a scoped session whose scope is the request, or the application context outside of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session, scoped_session, sessionmaker

from .._scope.scope import ENDED, ENDING, RUNNING, Scope, current, outwards
from .._sessions.registry import ScopeRegistry, ScopeSession, current_scope, open_session

if TYPE_CHECKING:
    from .middleware import FlaskMiddleware

__all__ = ["FlaskSession"]


class FlaskSession(ScopeSession):
    """The scoped session of one ``db``. It finds scopes of that ``db`` only.

    :param db: the owner of the applications.
    :param made: has the class and the options of the Sessions.
    :param open_scope: called where no scope of ``db`` is found: begins that of Flask's application context, or raises.
    :param changed: called with options that are to change.
    """

    def __init__(
        self,
        db: object,
        made: sessionmaker[Session],
        open_scope: Callable[[], Scope],
        changed: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._db = db
        self.changed = changed
        self._open_scope = open_scope
        maker = _SessionMaker(self, made)
        scoped_session.__init__(self, maker)
        self.registry = _Registry(maker, self)

    @property
    def _proxied(self) -> Session:
        scope = self.find_scope()
        return open_session(scope) if scope.session is None else scope.session

    def find_scope(self) -> Scope:
        """The scope that the calling code runs in.

        :raises RuntimeError: if there is none: Flask's error.
        :raises ScopeError: if it has ended.
        """
        scope = self._find_here()
        if scope is None:
            return self._open_scope()
        return current_scope() if scope.state is ENDED else scope

    def _find_here(self) -> Scope | None:
        scope = current.get(None)
        if isinstance(scope, Scope):
            if getattr(scope.owner, "db", None) is self._db:
                return scope
            # Another application runs inside of the request, and calls code of this one.
            for outer in outwards(scope):
                if getattr(outer.owner, "db", None) is self._db and outer.state in (RUNNING, ENDING):
                    return outer
        return None

    def find_middleware(self) -> FlaskMiddleware | None:
        """The application whose scope the calling code runs in, if it does."""
        scope: Any = self._find_here()
        return None if scope is None or scope.state is ENDED else scope.owner

    def configure(self, **options: Any) -> None:
        """Change the options of the Sessions that will be made, as SQLAlchemy does."""
        scoped_session.configure(self, **options)


class _Registry(ScopeRegistry):
    """The place of the Session in the scope that is found."""

    __slots__ = ("_session",)

    def __init__(self, make: Callable[[], Session], session: FlaskSession) -> None:
        super().__init__(make)
        self.scopefunc = session.find_scope
        self._session = session

    def __call__(self) -> Session:
        return open_session(self.scopefunc())

    def has(self) -> bool:
        scope = self._session._find_here()
        return scope is not None and scope.session is not None

    def clear(self) -> None:
        scope = self._session._find_here()
        if scope is not None:
            scope.session = None


class _SessionMaker(sessionmaker[Session]):
    """Makes Sessions of the current application, which belong to no scope: the caller closes them.

    SQLAlchemy looks here for the class that the events of a ``scoped_session`` belong to: one of this ``db`` alone.
    """

    # Not SQLAlchemy's constructor: it would derive another class.
    def __init__(self, session: FlaskSession, made: sessionmaker[Session]) -> None:
        self.kw = made.kw
        self.class_ = made.class_
        self._session = session

    def __call__(self, **options: Any) -> Session:
        return self._session.find_scope().owner.new_session(**options)

    def configure(self, **options: Any) -> None:
        """Change the options of the Sessions that will be made, those of requests among them."""
        super().configure(**options)
        self._session.changed(options)
