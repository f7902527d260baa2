"""Which engine a statement of a session goes to: its table's bind, a replica, or the primary.

Each of SQLAlchemy's ways to execute something asks :meth:`Session.get_bind` first, and here is ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import Session, SessionTransaction

from .binds import DEFAULT, key_of_mapper, key_of_statement, unknown_bind_key
from .context import Scope, current
from .drivers import written_position
from .engines import EngineSource
from .marks import Mark
from .replicas import Replica, Replicas
from .sessions import RequestSession, current_scope, open_connections, session_class_for
from .statements import is_read_throughout

__all__ = ["RoutedScope", "Routing", "note_unknown_commit", "on_primary"]

#: RFC 9110, 9.2.1: methods that ask for nothing to be changed.
SAFE_METHODS = ("GET", "HEAD", "OPTIONS", "TRACE")


class Routing:
    """The engines of one application.

    :param default: of what has no bind key: the primary, where there are replicas.
    :param binds: by their keys.
    :param replicas: of the default engine.
    """

    def __init__(self, default: EngineSource, binds: Mapping[str, EngineSource], replicas: Replicas | None) -> None:
        self._default = default
        self.binds = binds
        self.replicas = replicas
        #: bind keys by mapper: they do not change, most statements have one, and there are as many as models
        self.keys: dict[Any, str | None] = {}

    def engine_of(self, key: str | None, what: object) -> Engine:
        """The engine of a bind key.

        :param what: has the key, and is shown in an error.
        :raises UnboundExecutionError: if there is no such key.
        """
        if key is None or key == DEFAULT:
            return self._default.engine
        if key not in self.binds:
            raise unknown_bind_key(key, self.binds, what)
        return self.binds[key].engine

    def session_maker(self, session_class: type[Session], options: Mapping[str, Any]) -> Callable[..., Session]:
        """Makes the Sessions of the application.

        :param session_class: and ``options``: the application's own.
        """
        engines = self.all_engines()
        dialects = {engine.dialect.name for engine in engines.values()}
        bound = {"bind": engines[DEFAULT], **options}
        mixin = BindsSession if self.replicas is None else RoutingSession
        base = session_class_for(dialects, session_class, mixin)
        # In a class of this application's own, so that no call has to tell each session what it needs to know.
        known = {"_routing": self, "_has_choice": session_class.get_bind is not Session.get_bind}
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, **known}
        routing = partial(type(base.__name__, (base,), names), **bound)
        if self.replicas is None:
            return routing
        on_primary = partial(session_class_for(dialects, session_class, PrimarySession), **bound)
        writing = routing if self.binds else on_primary

        def make(**more: Any) -> Session:
            scope = current.get(None)
            if not isinstance(scope, RoutedScope):
                return writing(**more)
            # As is_safe(): here a call would be felt.
            environ = scope.environ
            is_safe = environ is not None and environ.get("REQUEST_METHOD") in SAFE_METHODS
            maker = routing if is_safe else writing
            opened: Any = maker(**more) if more else maker()
            opened._home = scope
            return opened  # type: ignore[no-any-return]

        return make

    def sources(self) -> list[EngineSource]:
        """Of all but the default engine."""
        return [*self.binds.values(), *(() if self.replicas is None else self.replicas.sources)]

    def dispose(self) -> None:
        """Close the idle connections of all but the default engine."""
        for source in self.sources():
            source.dispose()

    def all_engines(self) -> dict[str, Engine]:
        """By name."""
        engines = {DEFAULT: self._default.engine, **{key: source.engine for key, source in self.binds.items()}}
        for number, engine in enumerate(self.replicas.engines if self.replicas is not None else ()):
            engines[f"replicas[{number}]"] = engine
        return engines


class Route:
    """Where the session of a request reads; it outlives ``session.remove()``."""

    __slots__ = ("engine", "mark", "moved", "replica", "transaction")

    def __init__(self, moved: bool, mark: Mark | None) -> None:
        #: whether it reads from the primary for the rest of the request
        self.moved = moved
        #: what the client has written before
        self.mark = mark
        #: what is in use, and in which transaction that was decided
        self.engine: Engine | Connection | None = None
        self.transaction: SessionTransaction | None = None
        #: where it has read
        self.replica: Replica | None = None


class RoutedScope(Scope):
    """The scope of a request to an application with replicas."""

    #: made by the session, or by on_primary()
    route: Route | None = None
    #: what was committed, if the client can still be told of it
    written: Mark | None = None

    def is_safe(self) -> bool:
        """Whether the request asks for nothing to be changed."""
        environ = self.environ
        return environ is not None and environ.get("REQUEST_METHOD") in SAFE_METHODS

    def find_route(self, replicas: Replicas) -> Route:
        """Where this request reads."""
        route = self.route
        if route is None:
            mark = replicas.marker.read(self.environ) if self.environ is not None and self.is_safe() else None
            route = self.route = Route(not self.is_safe(), mark)
        return route

    def start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        """As any scope's; the head tells the client what the request has written by then, or may have."""
        self.headers = headers
        opened: Any = self.session
        # The public names for a transaction that is open, and for what a flush would write, take a call, or make sets.
        if self.written is not None or (
            opened is not None
            and opened._transaction is not None
            and (getattr(opened, "_may_have_written", True) or not opened._is_clean())
        ):
            headers = self.owner.routing.replicas.marker.give(self.written, self.environ, headers)
        # Not by super(): the requests without a session would feel it.
        start_response = self.start_response
        assert start_response is not None
        return start_response(status, headers) if exc_info is None else start_response(status, headers, exc_info)


class BindsSession(RequestSession):
    """The Session of an application with binds.

    What is public of a Session is SQLAlchemy's and the application's, whose own class may have any name.
    """

    #: the application's engines
    _routing: Routing
    #: whether a class of the application's own, or bind_mapper() and bind_table(), may choose another default
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
            return routing.engine_of(bind_key, "bind_arguments")
        if mapper is None:
            key = key_of_statement(clause)
        elif mapper in routing.keys:
            key = routing.keys[mapper]
        else:
            key = routing.keys[mapper] = key_of_mapper(mapper)
        if key is not None:
            return routing.engine_of(key, clause if mapper is None else mapper)
        return super().get_bind(mapper, clause=clause, **more) if self._has_choice else self.bind

    def bind_mapper(self, *arguments: Any, **more: Any) -> None:
        """As SQLAlchemy's."""
        self._has_choice = True
        super().bind_mapper(*arguments, **more)

    def bind_table(self, *arguments: Any, **more: Any) -> None:
        """As SQLAlchemy's."""
        self._has_choice = True
        super().bind_table(*arguments, **more)


class PrimarySession(RequestSession):
    """The Session of an application with replicas, where it is on the primary from the start."""

    #: the scope that it was made in. It is the scope's own Session if that one has it: then it is the request's also
    #: where another thread, or a context of another application, works with it
    _home: RoutedScope | None = None
    #: Whether a commit tells the client that it has written. Who was asked to change something is taken at his word:
    #: to look at each statement would take longer.
    _may_have_written = True


class RoutingSession(PrimarySession, BindsSession):
    """The Session of an application with replicas."""

    #: where it reads, once it is known to be a request's
    __route: Route | None = None
    #: of a request with a safe method: whether something was written since the last commit
    _may_have_written = False

    def get_bind(
        self, mapper: Any = None, *, clause: Any = None, bind: Any = None, bind_key: str | None = None, **more: Any
    ) -> Any:
        """As of an application with binds; and what has none goes to a replica, or to the primary."""
        routing = self._routing
        replicas: Any = routing.replicas
        if bind is None and bind_key is not None:
            bind = routing.engine_of(bind_key, "bind_arguments")
        if bind is not None:
            if not replicas.has(bind):
                route = self.__route or self.__find_route(replicas)
                if route is not None:
                    route.moved = True
                self.__note(clause)
            return bind
        default = self.bind
        if routing.binds or self._has_choice:
            # Without binds a table's key is for a class of the application's own to read.
            chosen = super(RoutingSession if routing.binds else BindsSession, self).get_bind(
                mapper, clause=clause, **more
            )
            if chosen is not default:
                return chosen
        route = self.__route or self.__find_route(replicas)
        if route is None or route.moved:
            self.__note(clause)
            return default
        # Without a statement it is a flush, or the application asks for the connection itself.
        if clause is None or not is_read_throughout(clause):
            route.moved = self._may_have_written = True
            return default
        if route.transaction is None or route.transaction is not self.get_transaction():
            replica = replicas.connect(self, route.mark, route.replica)
            if replica is not None:
                route.replica = replica
            route.engine = default if replica is None else replica.engine
            route.transaction = self.get_transaction()
        return route.engine

    def connection(self, bind_arguments: Any = None, execution_options: Mapping[str, Any] | None = None) -> Connection:
        """As SQLAlchemy's, which does not ask for a bind where it is told one."""
        bind = (bind_arguments or {}).get("bind")
        replicas: Any = self._routing.replicas
        if bind is not None and not replicas.has(bind):
            self.get_bind(bind=bind)
        return super().connection(bind_arguments, execution_options)

    def __note(self, clause: Any) -> None:
        """Note whether a statement on the primary writes."""
        if not self._may_have_written and (clause is None or not is_read_throughout(clause)):
            self._may_have_written = True

    def __find_route(self, replicas: Replicas) -> Route | None:
        home = self._home
        if home is not None and home.session is self and self.bind is self._routing.engine_of(None, ""):
            self.__route = home.find_route(replicas)
            self._may_have_written = not home.is_safe()
        return self.__route


@event.listens_for(PrimarySession, "before_commit")
def _end_reading(opened: Session) -> None:
    """End the transactions on replicas first: one that is lost there must not fail a commit that is under way."""
    home = getattr(opened, "_home", None)
    if home is not None and not opened.in_nested_transaction():
        replicas = home.owner.routing.replicas
        for connection in open_connections(opened):
            if replicas.has(connection) and connection.dialect.name != "sqlite":
                connection.exec_driver_sql("ROLLBACK")


@event.listens_for(PrimarySession, "after_commit")
def _note_written(opened: Session) -> None:
    """Note for the client that it has written, and how far the primary's log went."""
    if not isinstance(opened, PrimarySession) or opened.in_nested_transaction() or not opened._may_have_written:
        return
    home = opened._home
    is_own = home is not None and home.session is opened
    if isinstance(opened, RoutingSession) and home is not None and home.is_safe():
        opened._may_have_written = False
    scope: Any = home if is_own else current.get(None)
    while isinstance(scope, Scope):
        # Not once the head has left: it was told by then that something may have been written.
        if isinstance(scope, RoutedScope) and scope.owner.engine is opened.bind and scope.headers is None:
            # By their pools: an Engine with execution options of its own is another object.
            pool = opened.bind.engine.pool
            primary = [connection for connection in open_connections(opened) if connection.engine.pool is pool]
            if primary:
                scope.written = Mark(time.time(), written_position(primary[0]))
            return
        scope = scope.token.old_value if hasattr(scope, "token") else None


def note_unknown_commit(scope: Scope) -> None:
    """Have the client told of a commit of which nobody knows the outcome: it may look whether it took place."""
    if isinstance(scope, RoutedScope):
        position = None if scope.written is None else scope.written.position
        scope.written = Mark(time.time(), position, is_exact=False)


def on_primary() -> None:
    """Have the current scope's session read from the primary from now on, as after a write.

    For what cannot be seen to write, or has to see what other clients have just written. Without replicas, and outside
    of a request, sessions are on the primary anyway.

    :raises ScopeError: outside of a scope.
    """
    scope = current_scope()
    if isinstance(scope, RoutedScope):
        scope.find_route(scope.owner.routing.replicas).moved = True
