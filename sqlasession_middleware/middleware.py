"""The middleware: it wraps a WSGI application and gives each of its requests one session.

.. code-block:: python

    from sqlasession_middleware import SQLASessionMiddleware, session

    app = SQLASessionMiddleware(app, "postgresql+psycopg://localhost/shop")

Inside the wrapped application, at any depth, ``session`` is the request's Session. It is opened at first use and
closed when the response is closed; what was not committed is rolled back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property, partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

from sqlalchemy import Engine, MetaData
from sqlalchemy.engine import URL
from sqlalchemy.orm import Session

from .binds import DEFAULT, read_binds
from .capacity import Capacity
from .closing import ListScopeIterator, ScopeContext, finish, respond, respond_joined
from .context import ENDED, RUNNING, WAITING, Scope, current
from .engines import EngineSource
from .errors import ConfigurationError, nearest, shown
from .files import call_with_file_wrapper
from .forks import checking
from .leaks import note_checkouts, reporting
from .marks import Marker
from .replicas import Replicas, read_replicas
from .routing import RoutedScope, Routing
from .schema import TablesOf, create_tables, drop_tables, metadata, tables_by_key, warn_of_no_tables
from .sessions import session_class_for
from .settings import SESSION_OPTIONS, check_seconds, check_types, copy_options, ini_names, ini_place, read_settings
from .transaction import TransactionMiddleware
from .unavailable import UnavailableMiddleware
from .watch import watch_inner

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["SQLASessionMiddleware"]


class SQLASessionMiddleware:
    """Wraps a WSGI application and owns its engine.

    :param app: any WSGI application.
    :param bind: the database: a URL string, a :class:`~sqlalchemy.engine.URL`, or an
        :class:`~sqlalchemy.engine.Engine` that is used as it is and never disposed of.
    :param binds: further databases by their bind keys: what ``bind`` takes, or a dict of engine options with ``url``.
        See :mod:`sqlasession_middleware.binds`.
    :param replicas: of ``bind``, for requests that only read: each as one of ``binds``, with ``engine_options`` where
        it has none of its own.
    :param engine_options: of :func:`sqlalchemy.create_engine`.
    :param session_options: of :class:`sqlalchemy.orm.Session`; ``class_`` is the Session class itself.
    :param metadata: the tables for :meth:`init_database`; or several, such as one for each bind key.
    :param transaction: commit on success: True, or a dict of the options of
        :class:`~sqlasession_middleware.transaction.TransactionMiddleware`.
    :param unavailable: answer 503 where the database is out of reach: True, or a dict of the options of
        :class:`~sqlasession_middleware.unavailable.UnavailableMiddleware`.
    :param streams: content types of responses that hold no connection between two chunks, as ``text/event-stream``
        does not between two events.
    :param read_your_writes: seconds for which a client that has written does not read from a replica of which it is not
        known whether it has the write.
    :param replica_retry: seconds after which a replica that was out of reach is tried again.
    :param report_leaks: log the connections that a request took and did not give back:
        :mod:`sqlasession_middleware.leaks`.
    :raises ConfigurationError: if a setting is wrong. The database is not contacted for that.
    """

    def __init__(
        self,
        app: WSGIApplication,
        bind: str | URL | Engine,
        *,
        binds: Mapping[str, Any] | None = None,
        replicas: Collection[Any] = (),
        engine_options: Mapping[str, Any] | None = None,
        session_options: Mapping[str, Any] | None = None,
        metadata: MetaData | Sequence[MetaData] = metadata,
        transaction: bool | Mapping[str, Any] = False,
        unavailable: bool | Mapping[str, Any] = False,
        streams: Collection[str] = (),
        read_your_writes: float = 5.0,
        replica_retry: float = 10.0,
        report_leaks: bool = False,
    ) -> None:
        if not callable(app):
            raise ConfigurationError("app", f"must be a WSGI application, a callable, got {type(app).__name__}.")
        self.app = app
        #: all metadata with tables of the application, of which :attr:`metadata` is the first
        self.collections = _read_metadata(metadata)
        self.metadata = self.collections[0]
        self._source = EngineSource(bind, engine_options)
        self._session_class, self._session_options = _read_session_options(session_options)
        check_seconds("read_your_writes", read_your_writes)
        check_seconds("replica_retry", replica_retry)
        if binds or replicas:
            self._route(binds, replicas, engine_options, read_your_writes, replica_retry)
        self.streams = _read_streams(streams)
        if not isinstance(report_leaks, bool):
            raise ConfigurationError("report_leaks", f"must be true or false, got {shown(report_leaks)}.")
        if report_leaks:
            self._report_leaks()
        # Inside of the scope, and in this order: a failure is answered only after the last attempt.
        app = _wrap("transaction", TransactionMiddleware, app, transaction)
        self._inner = _wrap("unavailable", UnavailableMiddleware, app, unavailable)

    #: which engine a statement goes to; None where there is only one
    routing: Routing | None = None
    #: what a request's scope is made of
    _new_scope: type[Scope] = Scope
    #: and that of a context
    context_scope: type[Scope] = Scope

    def _route(self, binds: Any, replicas: Any, engine_options: Any, read_your_writes: Any, replica_retry: Any) -> None:
        sources = read_binds(binds or {})
        balanced = None
        if replicas:
            if self._session_options.get("twophase"):
                problem = "cannot be used with replicas: no replica can prepare a transaction."
                raise ConfigurationError("session_options", problem, "twophase")
            marker = Marker(self._source.url, read_your_writes)
            balanced = Replicas(read_replicas(replicas, self._source, engine_options), marker, replica_retry)
            self._new_scope = RoutedScope
        self.routing = Routing(self._source, sources, balanced)

    def _report_leaks(self) -> None:
        self._new_scope, self.context_scope = reporting(self._new_scope), reporting(self.context_scope)
        for source in self._sources():
            source.when_made(note_checkouts)

    def _sources(self) -> list[EngineSource]:
        return [self._source, *(() if self.routing is None else self.routing.sources())]

    @classmethod
    def from_config(cls, app: WSGIApplication, config: Mapping[str, str], prefix: str = "sqlalchemy.") -> Self:
        """Build the middleware from an ini section.

        :param config: a flat mapping of strings: ``sqlalchemy.url``, other ``sqlalchemy.*`` keys as
            :func:`sqlalchemy.engine_from_config` takes them, ``session.*`` and ``metadata``.
        :param prefix: what the engine's keys begin with.
        :raises ConfigurationError: if a key is missing, unknown or wrong; it names the key and the file.
        """
        arguments = read_settings(config, prefix)
        try:
            return cls(app, **arguments)
        except ConfigurationError as error:
            raise error.renamed(ini_names(prefix, arguments), ini_place(config)) from error.__cause__

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        outer = current.get(None)
        if outer is not None:
            if not isinstance(outer, Scope):
                outer = outer or None
            elif outer.state is WAITING or outer.state is ENDED:
                # What a request left there that is between two steps, or over: it did not call this one.
                outer = None
            else:
                joined = self._open_scope_of(environ)
                if joined is not None:
                    return self._join(joined, environ, start_response)
                watch_inner(self)
        # As begin() does for other scopes: here a call would be felt.
        scope = self._new_scope(application=self)
        scope.owner = self
        scope.environ = environ
        scope.start_response = start_response
        scope.headers = scope.inner = scope.session = scope.transaction = scope.failure = None
        scope.state = RUNNING
        token = scope.token = current.set(scope)
        try:
            if "wsgi.file_wrapper" in environ:
                body, is_file = call_with_file_wrapper(self._inner, environ, scope.start)
            else:
                body, is_file = self._inner(environ, scope.start), False
            kind = type(body)
        except BaseException as error:
            try:
                finish(scope, error=error)
            finally:
                current.reset(token)
            raise
        if is_file:
            try:
                finish(scope)
            finally:
                current.reset(token)
            return body
        scope.state = WAITING
        if kind is list or kind is tuple:
            current.reset(token)
            return ListScopeIterator(body, scope)
        # A scope waits on the Local for its next step, unless somebody who is not waiting wants his own back.
        current.set(outer or scope)
        return respond(body, scope)

    def _open_scope_of(self, environ: WSGIEnvironment) -> Scope | None:
        """This application's scope for the same request, if the present call comes from inside of it."""
        scope = current.get(None)
        while isinstance(scope, Scope) and scope.environ is environ:
            if scope.owner is self:
                return scope
            scope = scope.token.old_value
        return None

    def _join(self, scope: Scope, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        before = current.get()
        if before is scope:
            return self.app(environ, start_response)
        current.set(scope)
        try:
            body, is_file = call_with_file_wrapper(self.app, environ, start_response)
        finally:
            current.set(before)
        return body if is_file else respond_joined(body, scope)

    def context(self) -> ScopeContext:
        """This application's scope outside of a request: in scripts, shells, workers and tests.

        .. code-block:: python

            with app.context() as session:
                session.add(Guest(name="Ada"))
                session.commit()
        """
        return ScopeContext(self)

    @property
    def engine(self) -> Engine:
        """The engine, made at first use."""
        return self._source.engine

    @property
    def database_engine(self) -> Engine:
        """The engine, by the name that Werkzeug's pattern gave it."""
        return self._source.engine

    @property
    def engines(self) -> Mapping[str, Engine]:
        """All engines by name: ``"default"``, the bind keys, and ``"replicas[0]"`` and so on."""
        routing = self.routing
        return MappingProxyType({DEFAULT: self._source.engine} if routing is None else routing.all_engines())

    @cached_property
    def new_session(self) -> Callable[..., Session]:
        """Makes a Session of this application that belongs to no scope: the caller closes it.

        It takes options of the Session, over the application's ``session_options``.
        """
        engine = self._source.engine
        routing = self.routing
        if routing is None:
            session_class = session_class_for([engine.dialect.name], self._session_class)
            return checking(partial(session_class, bind=engine, **self._session_options))
        return checking(routing.session_maker(self._session_class, self._session_options))

    def init_database(self) -> None:
        """Create the tables that are not there yet, each on the engine that it belongs to. Needs no scope.

        :warns UserWarning: if there are no tables, most likely because no module with models was imported yet.
        :raises UnboundExecutionError: if a table's bind key is not one of ``binds``. Nothing was created then.
        """
        warn_of_no_tables(self.collections)
        for engine, tables in self._placed_tables():
            create_tables(engine, *tables)

    def drop_database(self) -> None:
        """Drop the tables, each from the engine that it belongs to. Needs no scope.

        :raises UnboundExecutionError: if a table's bind key is not one of ``binds``. Nothing was dropped then.
        """
        for engine, tables in self._placed_tables():
            drop_tables(engine, *tables)

    def _placed_tables(self) -> list[tuple[Engine, TablesOf]]:
        routing = self.routing or Routing(self._source, {}, None)
        return [
            (routing.engine_of(key, "a table of the metadata"), tables)
            for key, tables in tables_by_key(self.collections)
        ]

    def capacity(self, processes: int = 1, threads: int = 1) -> Capacity:
        """How many connections a deployment of this application can open.

        :param processes: that serve it.
        :param threads: of each process; greenlets count likewise.
        """
        return Capacity.of(self.engines, processes, threads)

    def dispose(self) -> None:
        """Close the connections that are idle in the pools. An engine that was given is left alone."""
        self._source.dispose()
        if self.routing is not None:
            self.routing.dispose()

    def without_secrets(self, text: str) -> str:
        """``text``, such as what a driver says, with stars for all that may be a password of an engine."""
        for source in self._sources():
            text = source.without_secrets(text)
        return text

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.app!r} on {self._source!r}>"


def _read_metadata(given: Any) -> tuple[MetaData, ...]:
    collections = tuple(given) if isinstance(given, list | tuple) and given else (given,)
    for each in collections:
        if not isinstance(each, MetaData):
            raise ConfigurationError(
                "metadata",
                f"must be a MetaData, such as a declarative Base.metadata, or several, got {type(each).__name__}.",
            )
    return collections


def _wrap(parameter: str, wrapper: Callable[..., WSGIApplication], app: WSGIApplication, options: Any) -> Any:
    """``app`` in a middleware, if its options are not false."""
    if not isinstance(options, bool | Mapping):
        raise ConfigurationError(parameter, f"must be true, false or a dict of options, got {type(options).__name__}.")
    if options is False:
        return app
    options = {} if options is True else options
    known = [name for name in inspect.signature(wrapper).parameters if name != "app"]
    for name in options:
        if name not in known:
            raise ConfigurationError(parameter, f"is not an option{nearest(str(name), known)}", name)
    try:
        return wrapper(app, **options)
    except ConfigurationError as error:
        raise ConfigurationError(parameter, error.problem, error.parameter) from error.__cause__


def _read_streams(content_types: Any) -> frozenset[str]:
    if isinstance(content_types, str) or not isinstance(content_types, Collection):
        raise ConfigurationError("streams", f"must be a list of content types, got {shown(content_types)}.")
    for each in content_types:
        if not isinstance(each, str) or each.count("/") != 1 or ";" in each:
            raise ConfigurationError("streams", f"must hold content types such as 'text/csv', got {shown(each)}.")
    return frozenset(each.strip().lower() for each in content_types)


def _read_session_options(options: Mapping[str, Any] | None) -> tuple[type[Session], dict[str, Any]]:
    if options is None:
        return Session, {}
    if not isinstance(options, Mapping):
        raise ConfigurationError("session_options", f"must be a dict, got {type(options).__name__}.")
    check_types("session_options", options, SESSION_OPTIONS)
    kept = {name: copy_options(value) for name, value in options.items()}
    session_class = kept.pop("class_", Session)
    if not (isinstance(session_class, type) and issubclass(session_class, Session)):
        raise ConfigurationError(
            "session_options", f"must be a subclass of Session, got {shown(session_class)}.", "class_"
        )
    parameters = inspect.signature(session_class).parameters
    for name in kept:
        if not isinstance(name, str):
            raise ConfigurationError("session_options", f"must have names as keys, got {shown(name)}.")
        if name in ("bind", "binds"):
            raise ConfigurationError("session_options", "is for the middleware to set: give it as 'bind'.", name)
        if name not in parameters and not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
            raise ConfigurationError(
                "session_options", f"is not an option of {session_class.__name__}{nearest(name, parameters)}", name
            )
    if session_class is Session:
        try:
            Session(**kept)  # Opens nothing; a class of the user's own may do anything, and is not tried.
        except Exception as error:
            said = "got a URL." if "://" in str(error) else error
            raise ConfigurationError("session_options", f"are refused by Session: {said}") from None
    return session_class, kept
