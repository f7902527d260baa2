"""The Session classes of applications with binds or replicas: which engine a statement goes to.

SQLAlchemy calls :meth:`Session.get_bind` before it executes anything, and these classes override it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, event
from sqlalchemy.orm import Session

from .._database.binds import DEFAULT, key_of_mapper, key_of_statement
from .._database.cookie import LastWrite
from .._database.reads import has_only_read
from .._database.routing import Routing
from .._drivers.registry import driver_by_dialect
from .._scope.scope import current, outwards
from .classes import session_class_for
from .connections import give_back, open_connections
from .request_session import RequestSession
from .routed_scope import SAFE_METHODS, Route, RoutedScope
from .statements import is_read_throughout

if TYPE_CHECKING:
    from .._database.replicas import Replicas

__all__ = ["session_maker"]


def session_maker(
    routing: Routing,
    session_class: type[Session],
    options: Mapping[str, Any],
    derive: Callable[[type[Session]], type[Session]],
) -> Callable[..., Session]:
    """Return a factory of the Sessions of an application with binds or replicas.

    :param session_class: and ``options``: the application's ``session_options``.
    :param derive: called with each class that Sessions are made of; returns the class to use instead.
    """
    engines = routing.all_engines()
    dialects = {engine.dialect for engine in engines.values()}
    bound = {"bind": engines[DEFAULT], **options}
    mixin = BindsSession if routing.replicas is None else RoutingSession
    routing_class: Any = derive(session_class_for(dialects, session_class, mixin))
    has_choice = session_class.get_bind is not Session.get_bind

    def make_routing(**more: Any) -> Session:
        # Not a class of this application alone: there may be one for each of thousands of tenants. And the class of the
        # user may execute something while it is made.
        session: Any = routing_class.__new__(routing_class)
        session._routing = routing
        session._has_choice = has_choice
        session.__init__(**(bound | more))
        return session  # type: ignore[no-any-return]

    if routing.replicas is None:
        return make_routing
    make_on_primary = partial(derive(session_class_for(dialects, session_class, PrimarySession)), **bound)
    make_writing = make_routing if routing.binds else make_on_primary

    def make(**more: Any) -> Session:
        scope = current.get(None)
        if not isinstance(scope, RoutedScope):
            return make_writing(**more)
        # The lines of RoutedScope.is_safe(), without the call: this runs once for each request with a session.
        environ = scope.environ
        is_safe = environ is not None and environ.get("REQUEST_METHOD") in SAFE_METHODS
        maker = make_routing if is_safe else make_writing
        session: Any = maker(**more) if more else maker()
        session._home = scope
        return session  # type: ignore[no-any-return]

    return make


class BindsSession(RequestSession):
    """The Session of an application with binds.

    It adds private names only: the application's own class may use any public one.
    """

    #: the application's engines
    _routing: Routing
    #: whether the application's own class, bind_mapper() or bind_table() may choose another default
    _has_choice: bool

    def get_bind(
        self, mapper: Any = None, *, clause: Any = None, bind: Any = None, bind_key: str | None = None, **more: Any
    ) -> Any:
        """The engine for a statement.

        :param bind: or ``bind_key``, in ``bind_arguments``: the application's own choice.
        :raises UnboundExecutionError: if there is no such bind key.
        """
        if bind is not None:
            return bind
        routing = self._routing
        if bind_key is not None:
            return routing.source_of(bind_key, "bind_arguments").engine
        if mapper is None:
            key = key_of_statement(clause)
        elif mapper in routing.keys:
            key = routing.keys[mapper]
        else:
            key = routing.keys[mapper] = key_of_mapper(mapper)
        if key is not None:
            return routing.source_of(key, clause if mapper is None else mapper).engine
        return super().get_bind(mapper, clause=clause, **more) if self._has_choice else self.bind

    def bind_mapper(self, *arguments: Any, **more: Any) -> None:
        """Bind a mapper, as SQLAlchemy does; from now on ``get_bind()`` asks SQLAlchemy as well."""
        self._has_choice = True
        super().bind_mapper(*arguments, **more)

    def bind_table(self, *arguments: Any, **more: Any) -> None:
        """Bind a table, as SQLAlchemy does; from now on ``get_bind()`` asks SQLAlchemy as well."""
        self._has_choice = True
        super().bind_table(*arguments, **more)


class PrimarySession(RequestSession):
    """The Session of an application with replicas, if it is on the primary from the start."""

    #: The scope that it was made in. If that scope refers to this Session, it is the request's own, also where another
    #: thread, or a context of another application, works with it.
    _home: RoutedScope | None = None
    #: Whether a commit tells the client that it has written. A request whose method asks for a change counts as a
    #: write: to look at each of its statements would cost more.
    _may_have_written = True


class RoutingSession(PrimarySession, BindsSession):
    """The Session of an application with replicas."""

    #: where it reads; None until the session is known to belong to a request
    __route: Route | None = None
    #: in a request with a safe method: whether something was written since the last commit
    _may_have_written = False

    def get_bind(
        self, mapper: Any = None, *, clause: Any = None, bind: Any = None, bind_key: str | None = None, **more: Any
    ) -> Any:
        """The engine for a statement: that of its bind key, a replica, or the primary."""
        routing = self._routing
        replicas: Any = routing.replicas
        if bind is None and bind_key is not None:
            bind = routing.source_of(bind_key, "bind_arguments").engine
        if bind is not None:
            return self.__explicit_bind(bind, clause)
        default = self.bind
        if routing.binds or self._has_choice:
            # Without binds, a table's bind key is left to the application's own class.
            chosen = super(RoutingSession if routing.binds else BindsSession, self).get_bind(
                mapper, clause=clause, **more
            )
            if chosen is not default:
                return chosen
        route = self.__route or self.__find_route(replicas)
        if route is None or route.moved:
            self.__note_write(clause)
            return default
        # Without a statement it is a flush, or a request for the connection itself.
        if clause is None or not is_read_throughout(clause):
            route.moved = self._may_have_written = True
            return default
        if route.transaction is None or route.transaction is not self.get_transaction():
            route.choose(self, replicas)
        return route.engine

    def connection(self, bind_arguments: Any = None, execution_options: Mapping[str, Any] | None = None) -> Connection:
        """The Session's connection. SQLAlchemy does not call ``get_bind()`` if ``bind_arguments`` name the bind."""
        bind = (bind_arguments or {}).get("bind")
        replicas: Any = self._routing.replicas
        if bind is not None and not replicas.has(bind):
            self.get_bind(bind=bind)
        return super().connection(bind_arguments, execution_options)

    def __explicit_bind(self, bind: Any, clause: Any) -> Any:
        """The bind that the application names. The request moves to the primary, unless the bind is a replica's."""
        replicas: Any = self._routing.replicas
        if not replicas.has(bind):
            route = self.__route or self.__find_route(replicas)
            if route is not None:
                route.moved = True
            self.__note_write(clause)
        return bind

    def __note_write(self, clause: Any) -> None:
        """Remember that a statement on the primary writes, if it does."""
        if not self._may_have_written and (clause is None or not is_read_throughout(clause)):
            self._may_have_written = True

    def __find_route(self, replicas: Replicas) -> Route | None:
        home = self._home
        if home is not None and home.session is self and self.bind is self._routing.source_of(None, "").engine:
            self.__route = home.find_route(replicas)
            self._may_have_written = not home.is_safe()
        return self.__route


@event.listens_for(PrimarySession, "before_commit")
def _end_reading(session: PrimarySession) -> None:
    """End the transactions on replicas first: a replica that is lost must not fail the commit on the primary.

    Their connections are given back. What listeners still read there begins another transaction, with all that each
    transaction begins with.
    """
    home = getattr(session, "_home", None)
    if home is not None and not session.in_nested_transaction():
        replicas = home.owner.routing.replicas
        for connection in open_connections(session):
            driver = driver_by_dialect[type(connection.dialect)]
            if replicas.has(connection) and driver.server.is_networked and not driver.is_idle(connection):
                session._gave_back = True
                give_back(session, connection)
        if home.route is not None:
            home.route.end(session)


@event.listens_for(PrimarySession, "after_commit")
def _note_written(session: Session) -> None:
    """Remember, for the client, when the commit took place and how far the primary's log went."""
    if not isinstance(session, PrimarySession) or session.in_nested_transaction() or not session._may_have_written:
        return
    home = session._home
    is_own = home is not None and home.session is session
    if isinstance(session, RoutingSession) and home is not None and home.is_safe():
        session._may_have_written = False
    pool = None if session.bind is None else session.bind.engine.pool
    for scope in outwards(home if is_own else current.get(None)):
        # Once the head has left, the client was told already that something may have been written.
        # Compared by pool: an Engine with execution options is another object.
        if isinstance(scope, RoutedScope) and scope.owner.database_engine.pool is pool and scope.headers is None:
            primary = [connection for connection in open_connections(session) if connection.engine.pool is pool]
            if primary and not all(map(has_only_read, primary)):
                driver = driver_by_dialect[type(primary[0].dialect)]
                scope.written = LastWrite(time.time(), driver.written_position(primary[0]))
            return
