"""The middleware: it wraps a WSGI application and gives each of its requests one session.

.. code-block:: python

    from sqlasession_middleware import SQLASessionMiddleware, session

    app = SQLASessionMiddleware(app, "postgresql+psycopg://localhost/shop")

Inside the wrapped application, at any depth, ``session`` is the request's Session. It is opened at first use and
closed when the response is closed; what was not committed is rolled back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextvars import Token
from functools import cached_property, partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from sqlalchemy import Engine, MetaData
from sqlalchemy.engine import URL
from sqlalchemy.orm import Session, object_session, scoped_session
from sqlalchemy.orm.exc import UnmappedInstanceError

from ._database.binds import DEFAULT, read_binds
from ._database.comments import SQLComments, comment_on
from ._database.cookie import ReadYourWritesCookie
from ._database.deadlines import limit_nested, limit_waits
from ._database.engines import EngineSource, source_of
from ._database.forks import checking
from ._database.lazy_begin import begin_lazily
from ._database.liveness import PING_AFTER
from ._database.observers import observe_nested
from ._database.replicas import Replicas, read_replicas
from ._database.routing import Routing
from ._database.schema import TablesOf, create_tables, drop_tables, metadata, tables_by_key, warn_of_no_tables
from ._lifecycle.background import BackgroundThreads
from ._lifecycle.context import ScopeContext
from ._lifecycle.deadline import with_deadline
from ._lifecycle.ending import finish
from ._lifecycle.in_use import refuse_to_wait
from ._lifecycle.response import ListScopeIterator, respond, respond_joined
from ._lifecycle.stream import end_with_call
from ._scope.deadline import limited
from ._scope.scope import ENDED, RUNNING, WAITING, Scope, current, outwards
from ._sessions.classes import session_class_for
from ._sessions.registry import current_scope
from ._sessions.routed_scope import RoutedScope
from ._sessions.routing_sessions import session_maker
from ._settings.arguments import (
    explain_unknown,
    make_with_options,
    read_metadata,
    read_session_options,
    read_streams,
    wrap,
)
from ._settings.checks import (
    check_application,
    check_boolean,
    check_count,
    check_deadline,
    check_name_or_none,
    check_seconds,
    check_seconds_or_none,
    resolve_option,
)
from ._settings.ini import ini_names, ini_place, read_settings
from ._transaction.job import run_job
from ._wsgi.file_wrapper import call_with_file_wrapper
from .capacity import Capacity
from .errors import ConfigurationError, named, of_application, shown, without_address
from .leaks import note_checkouts, reporting
from .transaction import TransactionMiddleware, after_commit
from .unavailable import UnavailableMiddleware

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from .failures import Failure

__all__ = ["SQLASessionMiddleware"]

Result = TypeVar("Result")


class SQLASessionMiddleware:
    """Wraps a WSGI application and owns its engine.

    :param app: any WSGI application.
    :param bind: the database: a URL string, a :class:`~sqlalchemy.engine.URL`, or an
        :class:`~sqlalchemy.engine.Engine`, which is used as it is and never disposed of.
    :param name: what logs, errors, health checks, metrics and the command call the application, such as ``"shop"``. An
        ini section's name is the default there.
    :param binds: further databases by their bind keys. Each is given like ``bind``, or as a dict of engine options with
        ``url``. See :doc:`binds`.
    :param replicas: replicas of ``bind``, for requests that only read. Each is given like one of ``binds``; options
        that it does not set are those of ``engine_options``.
    :param engine_options: the options of :func:`sqlalchemy.create_engine`.
    :param session_options: the options of :class:`sqlalchemy.orm.Session`; ``class_`` is the Session class itself.
    :param metadata: the :class:`~sqlalchemy.MetaData` for :meth:`init_database`, or several, such as one for each bind
        key.
    :param transaction: commit on success: True, or a dict of the options of
        :class:`~sqlasession_middleware.transaction.TransactionMiddleware`.
    :param unavailable: answer 503 when the database is out of reach: True, or a dict of the options of
        :class:`~sqlasession_middleware.unavailable.UnavailableMiddleware`.
    :param streams: the content types of responses that hold no connection between two chunks. Responses of the type
        ``text/event-stream`` never hold one between two events.
    :param read_your_writes: how many seconds a client that has written does not read from a replica, unless the replica
        is known to have the write.
    :param replica_retry: after how many seconds a replica that was out of reach is tried again.
    :param ping_after: how many seconds a connection may be idle before it is pinged; 0 pings it at each use, None never
        because of the time. Applies to each engine that is created here, unless its options have ``pool_pre_ping``. See
        :doc:`engines`.
    :param report_leaks: log the connections that a request took and did not give back. See
        :mod:`sqlasession_middleware.leaks`.
    :param lazy_begin: send BEGIN together with the first statement that needs it. None does so on the engines that the
        middleware creates, True on those that are given as well, False on none. See :doc:`waits`.
    :param deadline: the seconds after which no request waits for its databases any more; or a callable of environ that
        returns them, or its dotted name. None is no limit. See :doc:`deadlines`.
    :param background: how :meth:`background` works: a dict of ``threads``, how many there are in each process (2), and
        of ``seconds``, how long :meth:`dispose` and the end of the process wait for them (10).
    :param server_timing: add a ``Server-Timing`` to each response, which tells the client what the database took; or a
        callable of environ that decides whether to, or its dotted name. See :doc:`observing`.
    :param slow_requests: log each request that took longer than ``seconds`` (1) or sent more than ``queries`` (100): a
        dict of these. See :doc:`observing`.
    :param sql_comments: add a comment to each statement that tells which application and route have sent it: a dict of
        what it tells. See :doc:`observing`.
    :raises ConfigurationError: if a setting is wrong. The database is not contacted to find that out.
    """

    #: Chooses the engine of each statement; None if there is only one engine.
    routing: Routing | None = None
    #: Set by an UnavailableMiddleware inside: whether it answers a failure of the database.
    answers_503: Callable[[WSGIEnvironment, Failure | None], bool] | None = None
    #: Called with the reason of each 503 that an UnavailableMiddleware answers with: see :mod:`.metrics`.
    note_503: Callable[[str], None] | None = None
    #: What comments of statements tell; None if they have none.
    sql_comments: SQLComments | None = None
    #: The class of the scopes of requests.
    _new_scope: type[Scope] = Scope
    #: The class of the scopes of :meth:`context`.
    context_scope: type[Scope] = Scope

    @explain_unknown
    def __init__(
        self,
        app: WSGIApplication,
        bind: str | URL | Engine,
        *,
        name: str | None = None,
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
        ping_after: float | None = PING_AFTER,
        report_leaks: bool = False,
        lazy_begin: bool | None = None,
        deadline: float | Callable[[WSGIEnvironment], float | None] | str | None = None,
        background: Mapping[str, Any] | None = None,
        server_timing: bool | Callable[[WSGIEnvironment], object] | str = False,
        slow_requests: Mapping[str, Any] | None = None,
        sql_comments: Mapping[str, Any] | None = None,
    ) -> None:
        check_application(app)
        self.app = app
        check_name_or_none("name", name)
        #: what others call it
        self.name = name
        #: All metadata that was given; :attr:`metadata` is the first.
        self.collections = read_metadata(metadata)
        self.metadata = self.collections[0]
        self._source = source_of(bind, engine_options)
        self._session_class, self._session_options = read_session_options(session_options)
        check_seconds("read_your_writes", read_your_writes)
        check_seconds("replica_retry", replica_retry)
        if binds or replicas:
            self._route(binds, replicas, engine_options, read_your_writes, replica_retry)
        check_seconds_or_none("ping_after", ping_after)
        for source in self._sources():
            source.ping_after = ping_after
        self.streams = read_streams(streams)
        check_boolean("report_leaks", report_leaks)
        if report_leaks:
            self._report_leaks()
        if lazy_begin is not None:
            check_boolean("lazy_begin", lazy_begin)
        for source in self._sources():
            if lazy_begin or (lazy_begin is None and not source.given):
                source.on_creation(begin_lazily)
        if sql_comments is not None:
            self._comment_statements(sql_comments)
        self._background = make_with_options("background", BackgroundThreads, background)
        # UnavailableMiddleware is outermost: it answers a failure only after the last attempt of a transaction.
        app = wrap("transaction", TransactionMiddleware, app, transaction)
        self._policy = app if isinstance(app, TransactionMiddleware) else None
        self._inner = wrap("unavailable", UnavailableMiddleware, app, unavailable)
        if server_timing is not False or slow_requests is not None:
            self._record_requests(server_timing, slow_requests)
        if deadline is not None:
            self._limit_requests(deadline)

    def _route(self, binds: Any, replicas: Any, engine_options: Any, read_your_writes: Any, replica_retry: Any) -> None:
        sources = read_binds(binds or {})
        balanced = None
        if replicas:
            if self._session_options.get("twophase"):
                problem = "cannot be used with replicas: no replica can prepare a transaction."
                raise ConfigurationError("session_options", problem, "twophase")
            cookie = ReadYourWritesCookie(self._source.url, read_your_writes)
            balanced = Replicas(read_replicas(replicas, self._source, engine_options, replica_retry), cookie)
            self._new_scope = RoutedScope
        self.routing = Routing(self._source, sources, balanced)

    def _report_leaks(self) -> None:
        self._new_scope, self.context_scope = reporting(self._new_scope), reporting(self.context_scope)
        for source in self._sources():
            source.on_creation(note_checkouts)

    def _comment_statements(self, sql_comments: Any) -> None:
        if self.name is not None and isinstance(sql_comments, Mapping):
            sql_comments = {"application": self.name, **sql_comments}
        self.sql_comments = make_with_options("sql_comments", SQLComments, sql_comments)
        for source in self._sources():
            source.on_creation(partial(comment_on, comments=self.sql_comments))

    def _record_requests(self, server_timing: Any, slow_requests: Any) -> None:
        from ._recording.requests import SlowRequests, logging_slow

        if server_timing is not True:
            server_timing = resolve_option("server_timing", server_timing or None)
        if slow_requests is not None:
            #: what makes a request a slow one
            self.slow_requests = make_with_options("slow_requests", SlowRequests, slow_requests)
        self.record_requests(None if slow_requests is None else logging_slow, server_timing)

    def record_requests(self, reading: Callable[[type[Scope]], type[Scope]] | None, server_timing: Any = None) -> None:
        """Have each request recorded.

        :param reading: makes the class of the scopes of requests one that reads the record at their end.
        :param server_timing: whether the response tells of it.
        """
        from ._recording.listeners import record_engine
        from ._recording.requests import with_record

        self._inner = with_record(self._inner, server_timing)
        if reading is not None:
            self._new_scope = reading(self._new_scope)
        for name, source in self.named_sources().items():
            source.on_creation(partial(record_engine, name=name))

    def _limit_requests(self, deadline: Any) -> None:
        if callable(deadline) or isinstance(deadline, str):
            deadline = resolve_option("deadline", deadline)
        else:
            check_deadline(deadline)
        self._new_scope = limited(self._new_scope)
        self._inner = with_deadline(self._inner, deadline)
        for source in self._sources():
            source.on_creation(limit_waits)

    def _sources(self) -> list[EngineSource]:
        return list(self.named_sources().values())

    def named_sources(self) -> dict[str, EngineSource]:
        """What the engines are made of, by their names."""
        return {DEFAULT: self._source, **({} if self.routing is None else self.routing.sources())}

    @classmethod
    def from_config(cls, app: WSGIApplication, config: Mapping[str, str], prefix: str = "sqlalchemy.") -> Self:
        """Build the middleware from an ini section.

        :param config: a flat mapping of strings with the keys of :doc:`ini`: ``sqlalchemy.*`` as
            :func:`sqlalchemy.engine_from_config` takes them, ``session.*``, ``metadata`` and others.
        :param prefix: the prefix of the engine's keys.
        :raises ConfigurationError: if a key is missing, unknown or wrong. The error names the key and the file.
        """
        arguments = read_settings(config, prefix)
        try:
            return cls(app, **arguments)
        except ConfigurationError as error:
            raise error.renamed(ini_names(prefix, arguments), ini_place(config)) from error.__cause__

    @classmethod
    def without_app(cls, bind: str | URL | Engine, **options: Any) -> Self:
        """Make one that wraps nothing, for scripts, workers and set-up code: :meth:`context`, :meth:`run` and the rest.

        :param bind: and ``options``: as for the class.
        :raises ConfigurationError: if a setting is wrong, and when it is called as a WSGI application.
        """
        return cls(_no_application, bind, **options)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        outer = current.get(None)
        # A scope that has ended, or waits for its next step, did not call this: its context was copied in its step.
        if outer is not None and isinstance(outer, Scope) and outer.state is not WAITING and outer.state is not ENDED:
            joined = self._open_scope_of(environ)
            if joined is not None:
                return self._join(joined, environ, start_response)
            observe_nested(self)
            limit_nested(self)
        # This repeats begin(), because a function call for each request costs measurable time.
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
            if scope.session is not None and not is_file:
                end_with_call(scope, body, kind)
        except BaseException as error:
            _finish_and_reset(scope, token, error)
            raise
        if is_file:
            _finish_and_reset(scope, token)
            return body
        # Nothing on the Local may lead to the response, or a server that drops it would never free it.
        scope.state = WAITING
        current.reset(token)
        return ListScopeIterator(body, scope) if kind is list or kind is tuple else respond(body, scope)

    def _open_scope_of(self, environ: WSGIEnvironment) -> Scope | None:
        """Find this application's scope of the same request, if the request passes this middleware a second time."""
        for scope in outwards(current.get(None)):
            if scope.environ is not environ:
                break
            if scope.owner is self:
                return scope
        return None

    def _join(self, scope: Scope, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Call the application in ``scope``, which is open already and ends later."""
        before = current.get()
        if before is scope:
            return self.app(environ, start_response)
        current.set(scope)
        try:
            body, is_file = call_with_file_wrapper(self.app, environ, start_response)
        finally:
            current.set(before)
        return body if is_file else respond_joined(body, scope)

    def context(self, *, deadline: float | None = None) -> ScopeContext:
        """Open a scope of this application outside of a request: in scripts, shells, workers and tests.

        :param deadline: the seconds after which it waits for its databases no more. The application's own ``deadline``
            is one of requests, and does not apply.
        :raises ConfigurationError: if ``deadline`` is no number above 0.

        .. code-block:: python

            with app.context() as session:
                session.add(Guest(name="Ada"))
                session.commit()
        """
        if deadline is None:
            return ScopeContext(self, self.context_scope)
        check_deadline(deadline)
        return ScopeContext(self, limited(self.context_scope), deadline)

    def run(
        self,
        call: Callable[..., Result],
        *arguments: Any,
        attempts: int | None = None,
        deadline: float | None = None,
    ) -> Result:
        """Call a function outside of a request, in a context and a transaction of its own.

        The transaction is committed if the function returns, and rolled back if it raises. After an error of the
        database that may not recur, the function is called again, as a request would be. :doc:`jobs`.

        .. code-block:: python

            app.run(send_reminders, "Monday", attempts=3)

        :param arguments: for the function.
        :param attempts: the maximum number of attempts; those of ``transaction`` if it is not given, 1 without it.
        :param deadline: the seconds after which all attempts together wait for the databases no more.
        :returns: what the function returns. Objects of the session are detached by then.
        :raises BaseException: what the function or the commit has raised in the last attempt.
        :raises TypeError: if the function returns a generator or a coroutine, which has done nothing yet.
        """
        policy = self._policy or TransactionMiddleware(self.app)
        if attempts is not None:
            check_count("attempts", attempts)
        with self.context(deadline=deadline):
            function = partial(call, *arguments) if arguments else call
            return run_job(policy, current_scope(), function, attempts or policy.attempts)

    def background(self, call: Callable[..., object], *arguments: Any) -> None:
        """Call a function in a thread of this process, as :meth:`run` does.

        In a request or context of this application that takes place after its commit, and never without it: see
        :func:`~sqlasession_middleware.after_commit`. What the function raises is logged.

        :param arguments: for the function. Pass the keys of a Session's objects instead of the objects.
        :raises TypeError: if the function cannot be called, or an argument belongs to a Session.
        """
        if not callable(call):
            raise TypeError(f"background() needs a function, got {shown(call)}.")
        for each in arguments:
            if isinstance(each, Session | scoped_session) or _is_in_session(each):
                raise TypeError(
                    f"background() cannot take {type(each).__name__}, which belongs to a Session that another thread"
                    " must not use: pass its key."
                )
        job, told = partial(self.run, call, *arguments), named(call) + of_application(self)
        scope = current.get(None)
        if isinstance(scope, Scope) and scope.state is not ENDED and scope.owner is self:
            after_commit(partial(self._background.submit, job, told))
        else:
            self._background.submit(job, told)

    @property
    def engine(self) -> Engine:
        """The engine. It is created at first use."""
        return self._source.engine

    @property
    def database_engine(self) -> Engine:
        """The engine, under the name that it has in Werkzeug's pattern."""
        return self._source.engine

    @property
    def engines(self) -> Mapping[str, Engine]:
        """All engines by name: ``"default"``, the bind keys, ``"replicas[0]"`` and so on."""
        routing = self.routing
        return MappingProxyType({DEFAULT: self._source.engine} if routing is None else routing.all_engines())

    @cached_property
    def new_session(self) -> Callable[..., Session]:
        """Create a Session outside of any scope. The caller has to close it.

        Keyword arguments are options of the Session, and override the application's ``session_options``.
        """
        return self._session_maker()

    def _session_maker(
        self, derive: Callable[[type[Session]], type[Session]] = lambda base: base
    ) -> Callable[..., Session]:
        """Return a function that makes Sessions as :attr:`new_session` does.

        :param derive: is called with each Session class of the application, and returns the class to use instead.
        """
        routing = self.routing
        if routing is None:
            engine = self._source.engine
            session_class = session_class_for([engine.dialect], self._session_class)
            return checking(partial(derive(session_class), bind=engine, **self._session_options))
        return checking(session_maker(routing, self._session_class, self._session_options, derive))

    def init_database(self) -> None:
        """Create the tables that do not exist yet, each on its own engine. No scope is needed.

        All workers of a server may do so at the same moment: see :doc:`deployment`.

        :warns UserWarning: if the metadata has no tables, usually because no module with models was imported yet.
        :raises UnboundExecutionError: if the bind key of a table is not in ``binds``; then nothing is created.
        """
        warn_of_no_tables(self.collections)
        for engine, tables in self._placed_tables():
            create_tables(engine, *tables)

    def drop_database(self) -> None:
        """Drop the tables, each on its own engine. No scope is needed.

        :raises UnboundExecutionError: if the bind key of a table is not in ``binds``; then nothing is dropped.
        :raises ScopeError: if it would wait for a response that is not closed, for a context around the call, or for an
            ``isolated()`` block. The error names it.
        """
        placed = self._placed_tables()
        refuse_to_wait({engine for engine, _ in placed})
        for engine, tables in placed:
            drop_tables(engine, *tables)

    def _placed_tables(self) -> list[tuple[Engine, TablesOf]]:
        routing = self.routing or Routing(self._source, {}, None)
        return [
            (routing.source_of(key, "a table of the metadata").engine, tables)
            for key, tables in tables_by_key(self.collections)
        ]

    def capacity(self, processes: int = 1, threads: int = 1) -> Capacity:
        """Compute how many connections a deployment of this application can open.

        :param processes: the processes that serve it.
        :param threads: the threads, or greenlets, of each process.
        """
        return Capacity.of(self.engines, processes, threads)

    @property
    def registry(self) -> Any:
        """The registry of the Pyramid application that is wrapped, for scripts and tests that ask ``app`` for it.

        :raises AttributeError: if the wrapped application has none.
        """
        wrapped: Any = self.app
        return wrapped.registry

    def dispose(self) -> None:
        """Close the idle connections of the pools. An Engine that was given is not touched.

        What :meth:`background` has begun is waited for first.
        """
        self._background.wait()
        self._source.dispose()
        if self.routing is not None:
            self.routing.dispose()

    def without_secrets(self, text: str) -> str:
        """Replace the passwords of all engines in ``text``, such as a driver's error message, by stars."""
        for source in self._sources():
            text = source.without_secrets(text)
        return text

    def __repr__(self) -> str:
        called = f"of {without_address(self.app)}" if self.name is None else repr(self.name)
        return f"<{type(self).__name__} {called} on {self._source!r}>"


def _no_application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    problem = "is missing: without_app() made this for scripts. Pass the WSGI application to SQLASessionMiddleware."
    raise ConfigurationError("app", problem)


def _is_in_session(argument: object) -> bool:
    try:
        return object_session(argument) is not None
    except UnmappedInstanceError:
        return False


def _finish_and_reset(scope: Scope, token: Token[dict[str, Any]], error: BaseException | None = None) -> None:
    """End a request that has no further steps."""
    try:
        finish(scope, error=error)
    finally:
        current.reset(token)
