"""``SQLAlchemy``, the class of Flask-SQLAlchemy, whose ``session`` is the one of this library.

.. code-block:: python

    from sqlasession_middleware.flask_sqlalchemy import SQLAlchemy

    db = SQLAlchemy(app, transaction=True, unavailable=True)

in place of ``from flask_sqlalchemy import SQLAlchemy``. Models, queries, binds, and extensions that use ``db`` stay as
they are. ``init_app()`` makes the engines, and wraps ``app.wsgi_app`` with a
:class:`~sqlasession_middleware.SQLASessionMiddleware`. See :doc:`from_flask_sqlalchemy`.

This module needs the extra ``flask-sqlalchemy``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import flask_sqlalchemy
from flask import current_app, has_app_context
from flask.globals import app_ctx
from sqlalchemy import Engine
from sqlalchemy.engine import URL
from sqlalchemy.pool import StaticPool

from ._database.engines import EngineSource, source_of
from ._database.liveness import PING_AFTER
from ._database.schema import create_tables
from ._database.urls import parse_url
from ._dependencies import current_object
from ._flask.middleware import EXTENSION, FlaskMiddleware
from ._flask.session import FlaskSession
from ._flask.settings import IN_CONFIGURATION, KEYS, parse_engine_options, read_options
from ._lifecycle.in_use import refuse_to_wait
from ._scope.scope import Scope
from ._sessions.registry import current_scope
from ._sessions.release import end_reading
from .errors import ConfigurationError

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment
    from flask import Flask
    from sqlalchemy.orm import scoped_session

__all__ = ["SQLAlchemy"]

_URI, _OPTIONS, _BINDS = "SQLALCHEMY_DATABASE_URI", "SQLALCHEMY_ENGINE_OPTIONS", "SQLALCHEMY_BINDS"
#: What hosting services and other libraries call the URL.
_OTHERS_NAMES = ("DATABASE_URL", "DATABASE_URI", "SQLALCHEMY_URL")


class SQLAlchemy(flask_sqlalchemy.SQLAlchemy):
    """Flask-SQLAlchemy's class, with this library's session and engines.

    A key of the Flask configuration overrides each option: ``SQLASESSION_TRANSACTION``, ``SQLASESSION_DEADLINE`` and so
    on.

    :param app: the Flask application, or None if :meth:`init_app` follows.
    :param transaction: and all others up to ``sql_comments``: the options of
        :class:`~sqlasession_middleware.SQLASessionMiddleware`.
    :param theirs: the parameters of Flask-SQLAlchemy's class.
    :raises ConfigurationError: if an option is wrong, now or in :meth:`init_app`. The database is not contacted.
    """

    # The methods with an underscore are those that Flask-SQLAlchemy calls "internal setup", and has for its subclasses;
    # "internal interfaces which may change at any time". The extra names the versions that are tested, and the suite of
    # Flask-SQLAlchemy is run with this class in place of its own.

    def __init__(
        self,
        app: Flask | None = None,
        *,
        name: str | None = None,
        transaction: bool | Mapping[str, Any] = False,
        unavailable: bool | Mapping[str, Any] = False,
        replicas: Collection[Any] = (),
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
        **theirs: Any,
    ) -> None:
        self._options = {
            "name": name,
            "transaction": transaction,
            "unavailable": unavailable,
            "replicas": replicas,
            "streams": streams,
            "read_your_writes": read_your_writes,
            "replica_retry": replica_retry,
            "ping_after": ping_after,
            "report_leaks": report_leaks,
            "lazy_begin": lazy_begin,
            "deadline": deadline,
            "background": background,
            "server_timing": server_timing,
            "slow_requests": slow_requests,
            "sql_comments": sql_comments,
        }
        #: the sources of the engines that init_app() is making, and the options of the default one
        self._making: dict[str | None, EngineSource] = {}
        self._default_options: dict[str, Any] = {}
        super().__init__(app, **theirs)

    @property
    def middleware(self) -> FlaskMiddleware:
        """The middleware of the current application: for ``isolated(db.middleware)``, ``db.middleware.capacity()``.

        :raises RuntimeError: outside of a request and an application context, or if ``init_app()`` was not called.
        """
        found = None if has_app_context() else self._running_middleware()
        if found is None:
            super().engines  # noqa: B018  # It raises Flask-SQLAlchemy's own errors.
            found = current_app.extensions[EXTENSION]
        return found

    @property
    def engines(self) -> Mapping[str | None, Engine]:
        """The engines of the current application by their bind keys; also in a streamed body, after the view."""
        found = None if has_app_context() else self._running_middleware()
        return super().engines if found is None else self._app_engines[found.flask]

    def init_app(self, app: Flask) -> None:
        """Register with a Flask application, make its engines, and wrap its ``wsgi_app``.

        :raises ConfigurationError: if an option is wrong. The database is not contacted.
        :raises RuntimeError: if the application has such an extension already, or no URL of a database.
        """
        options = self._read(app)
        if options["transaction"] is not False and not isinstance(self.session, FlaskSession):
            problem = "cannot be used with 'transaction', which commits the request's session."
            raise ConfigurationError("session_options", problem, "scopefunc")
        self._making.clear()
        try:
            super().init_app(app)
        except RuntimeError as error:
            # Only if no database is set up. It is Flask-SQLAlchemy's error then.
            written = {key.upper(): key for key in app.config if app.config[key] and key not in (_URI, _BINDS)}
            similar = get_close_matches(_URI, written, 1, 0.75) or [name for name in _OTHERS_NAMES if name in written]
            if similar and not app.config.get(_URI):
                problem = f"is not a setting of Flask-SQLAlchemy; did you mean {_URI!r}?"
                raise ConfigurationError(f"{written[similar[0]]!r}{IN_CONFIGURATION}", problem) from error
            raise
        engines = self._app_engines[app]
        # An application's own _make_engine() may not be this one.
        sources = {key: self._making[key] if key in self._making else source_of(engines[key]) for key in engines}
        factory = self.session.session_factory
        session_options = {name: value for name, value in factory.kw.items() if name != "bind" or value is not None}
        options["replicas"] = [self._read_replica(each, app) for each in options["replicas"]]
        options["engine_options"] = None if sources.get(None) is None else self._default_options
        options["session_options"] = {**session_options, "class_": factory.class_, "db": _Registered(self, engines)}
        options["name"] = app.name if options["name"] is None else options["name"]
        options["metadata"] = list(self.metadatas.values())
        try:
            middleware = FlaskMiddleware(self, app, sources, options)
        except ConfigurationError as error:
            names = {name: key for key, name in KEYS.items() if key in app.config}
            if error.parameter not in names:
                raise
            raise error.renamed(names, IN_CONFIGURATION) from error.__cause__
        app.extensions[EXTENSION] = app.wsgi_app = middleware  # type: ignore[method-assign]  # as Flask documents it

    def create_all(self, bind_key: Any = "__all__") -> None:
        """Create the tables that do not exist. All workers of a server may do so at the same moment."""
        every = bind_key == "__all__"
        for key in list(self.metadatas) if every else [bind_key] if isinstance(bind_key, str | None) else bind_key:
            engine: Any = self.engines.get(key)
            # Tests may have put a connection there. That of a StaticPool is the session's as well.
            if isinstance(engine, Engine) and not isinstance(engine.pool, StaticPool) and key in self.metadatas:
                create_tables(engine, self.metadatas[key])
            else:
                super().create_all(key)

    def drop_all(self, bind_key: Any = "__all__") -> None:
        """Drop the tables.

        What the current session has only read is ended first, because the database would wait for it.

        :raises ScopeError: if it would wait for changes that are not committed, or for a response that is not closed.
        """
        engines = self.engines
        scope = self.session.find_scope() if isinstance(self.session, FlaskSession) else None
        if scope is not None:
            end_reading(scope)
        keys = engines if bind_key == "__all__" else [bind_key] if isinstance(bind_key, str | None) else bind_key
        # Tests may have put connections there.
        dropped = {engine for key in keys if isinstance(engine := engines.get(key), Engine)}
        refuse_to_wait(dropped, "drop_all()")
        super().drop_all(bind_key)

    def _make_scoped_session(self, options: dict[str, Any]) -> scoped_session[Any]:
        # Only the first one is ours: tests make others by this method, with options of their own.
        if "session" in vars(self) or "scopefunc" in options:
            return super()._make_scoped_session(options)
        made: Any = self._make_session_factory(options)
        return FlaskSession(self, made, self._open_scope, self._change_sessions)

    def _apply_driver_defaults(self, options: dict[str, Any], app: Flask) -> None:
        # SQLAlchemy's error may show the URL.
        try:
            options["url"] = parse_url(options["url"])
        except ConfigurationError as error:
            raise ConfigurationError(f"{_URI!r}, or a URL of {_BINDS!r},", error.problem) from None
        super()._apply_driver_defaults(options, app)

    def _make_engine(self, bind_key: str | None, options: dict[str, Any], app: Flask) -> Engine:
        where = _OPTIONS if bind_key is None else f"{_BINDS}.{bind_key}"
        options = parse_engine_options(where, options)
        url = options.pop("url")
        try:
            source = EngineSource(url, options)
        except ConfigurationError as error:
            names = {"bind": _URI if bind_key is None else where, "engine_options": where}
            raise error.renamed(names, IN_CONFIGURATION) from error.__cause__
        source.ping_after = self._read(app)["ping_after"]
        self._making[bind_key] = source
        if bind_key is None:
            self._default_options = options
        return source.engine

    def _teardown_session(self, exc: BaseException | None) -> None:
        if not isinstance(self.session, FlaskSession):  # A "scopefunc", or what a test has put there.
            self.session.remove()
        context = current_object(app_ctx)
        middleware = context.app.extensions.get(EXTENSION)  # None if init_app() has failed.
        if middleware is not None:
            middleware.leave(context, exc)

    def _read(self, app: Flask) -> dict[str, Any]:
        return {**self._options, **read_options(app.config)}

    def _read_replica(self, given: Any, app: Flask) -> Any:
        """Apply what Flask-SQLAlchemy sets by driver to a replica as well."""
        if isinstance(given, Engine):
            return given
        options = dict(given) if isinstance(given, Mapping) else {"url": given}
        if isinstance(options.get("url"), str | URL):
            self._apply_driver_defaults(options, app)
        return options

    def _running_middleware(self) -> FlaskMiddleware | None:
        return self.session.find_middleware() if isinstance(self.session, FlaskSession) else None

    def _open_scope(self) -> Scope:
        """Begin the scope of an application context that was pushed before ``init_app()``.

        :raises RuntimeError: if there is no application context.
        """
        self.middleware.enter()
        return current_scope()

    def _change_sessions(self, options: Mapping[str, Any]) -> None:
        for app in self._app_engines:
            app.extensions[EXTENSION].configure_sessions(options)


class _Registered:
    """``db``, as a Session gets it: its engines are those of the Session's own application, wherever it is used."""

    def __init__(self, db: SQLAlchemy, engines: Mapping[str | None, Engine]) -> None:
        self._db = db
        self.engines = engines

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)
