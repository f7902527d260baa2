"""The middleware of one Flask application, and the scopes of its application contexts.

A request has the scope of the middleware. An application context that is pushed inside of it leaves that alone. Any
other application context has a scope of its own, from its push to its teardown.

A request that begins inside of an application context of the same application, as in tests, runs in that context: Flask
makes no other one. So it has the context's session as well, and its ``g``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

from flask import Flask, appcontext_pushed, has_app_context, request_finished
from flask.globals import app_ctx
from sqlalchemy.orm import Session

from .._database.binds import DEFAULT
from .._database.engines import EngineSource
from .._database.forks import checking
from .._dependencies import current_object
from .._lifecycle.context import ScopeContext
from .._scope.scope import RUNNING, Scope, current, outwards, running_scope
from .._sessions.classes import session_class_for
from .._sessions.registry import session
from ..middleware import SQLASessionMiddleware
from ..transaction import default_commit_veto
from .commit import CommitUnderFlask

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["EXTENSION", "FlaskMiddleware"]

Result = TypeVar("Result")

#: its name in ``app.extensions``
EXTENSION = "sqlasession_middleware"


class FlaskMiddleware(SQLASessionMiddleware):
    """Wraps ``app.wsgi_app`` of one Flask application.

    :param db: what the application was registered with.
    :param flask: the application.
    :param sources: those of the engines, by their bind keys.
    :param options: of :class:`.SQLASessionMiddleware`.
    """

    def __init__(
        self,
        db: object,
        flask: Flask,
        sources: Mapping[str | None, EngineSource],
        options: Mapping[str, Any],
    ) -> None:
        self.db = db
        self.flask = flask
        self._has_default = None in sources
        #: the contexts of requests whose response is complete
        self._complete: WeakSet[Any] = WeakSet()
        self._entered: WeakKeyDictionary[Any, list[tuple[ScopeContext, Scope]]] = WeakKeyDictionary()
        binds: dict[Any, Any] = dict(sources)
        # An application may have databases with bind keys only. One of them stands for the default then, where the
        # engines are counted and watched: no Session uses it for what has no bind key.
        default = next(each for key in (None, DEFAULT, *binds) if (each := binds.get(key)) is not None)
        binds.pop(None, None)
        if default is binds.get(DEFAULT):
            del binds[DEFAULT]
        given = {} if options["transaction"] is True else options["transaction"]
        if isinstance(given, Mapping):
            committing = CommitUnderFlask(flask, given.get("commit_veto", default_commit_veto))
            transaction = {"commit_failed": committing.answer, **given}
            super().__init__(committing, default, binds=binds, **{**options, "transaction": transaction})
            self._inner = committing.popping(self._inner)
        else:
            super().__init__(flask.wsgi_app, default, binds=binds, **options)
        self._inner = _lending(self._inner, self._find_lender)
        appcontext_pushed.connect(self._note_push, flask)
        request_finished.connect(self._note_response, flask)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if has_app_context() and app_ctx.app is self.flask:
            self.enter()
        return super().__call__(environ, start_response)

    def run(self, call: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
        """Call a function in a transaction, as the base class does, and in an application context."""
        if has_app_context() and app_ctx.app is self.flask:
            return super().run(call, *arguments, **options)
        with self.flask.app_context():
            return super().run(call, *arguments, **options)

    def enter(self) -> None:
        """Begin a scope for the current application context, unless it has one already, or belongs to a request."""
        context = current_object(app_ctx)
        entered = self._entered.get(context, ())
        if not self._serves() and not any(each is mine for each in outwards(running_scope()) for _, mine in entered):
            opened = self.context()
            opened.__enter__()
            self._entered.setdefault(context, []).append((opened, current.get()))  # type: ignore[arg-type]  # it is a scope

    def leave(self, context: object, error: BaseException | None) -> None:
        """End the scope of an application context, if it has one of its own.

        A request's own context ends with the view, or after the commit. The session goes with it, as Flask-SQLAlchemy's
        does, unless the response is a stream: test clients do not close responses, and nothing else uses it.
        """
        for entered, _ in reversed(self._entered.pop(context, ())):
            entered.__exit__(None if error is None else type(error), error, None)
        if context in self._complete:
            self._complete.discard(context)
            if self._serves():
                session.remove()

    def configure_sessions(self, options: Mapping[str, Any]) -> None:
        """Change the options of the Sessions that will be made."""
        self._session_options.update(options)
        vars(self).pop("new_session", None)

    def _session_maker(
        self, derive: Callable[[type[Session]], type[Session]] = lambda base: base
    ) -> Callable[..., Session]:
        # Without replicas, Flask-SQLAlchemy's own Session finds the engine, by the same bind keys.
        if self.routing is not None and self.routing.replicas is not None:
            return super()._session_maker(derive)
        base = session_class_for([source.engine.dialect for source in self._sources()], self._session_class)
        bind = self.engine if self._has_default else None
        return checking(partial(derive(base), **{"bind": bind, **self._session_options}))

    def _serves(self) -> bool:
        """Whether the code that runs is that of a request or job of this application, and of no context inside."""
        scope = running_scope()
        return scope is not None and scope.owner is self and (scope.environ or scope.transaction) is not None

    def _note_push(self, sender: Flask, **more: Any) -> None:
        self.enter()

    def _note_response(self, sender: Flask, response: Any, **more: Any) -> None:
        if response.status_code >= 400 and response.content_length is not None and not response.direct_passthrough:
            response.make_sequence()  # An HTTPException's page is complete, but Werkzeug hands it on as an iterator.
        # An application that calls itself has several responses in one context: the last is its own.
        (self._complete.discard if response.is_streamed else self._complete.add)(current_object(app_ctx))

    def _find_lender(self, scope: Scope) -> Scope | None:
        """The scope of the application context that a request begins in, if Flask makes no other one for it."""
        if not has_app_context() or app_ctx.app is not self.flask:
            return None
        outer: Any = scope.token.old_value
        entered = self._entered.get(current_object(app_ctx), ())
        return outer if any(mine is outer for _, mine in entered) else None


def _lending(app: WSGIApplication, find_lender: Callable[[Scope], Scope | None]) -> WSGIApplication:
    """Wrap an application so that its requests may have the session of a scope around them."""

    def call(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        scope: Any = current.get()
        lender = find_lender(scope)
        if lender is None:
            return app(environ, start_response)
        with _lent(lender, scope):
            body = app(environ, start_response)
        return _LentBody(body, partial(_lent, lender, scope))

    return call


@contextmanager
def _lent(lender: Scope, scope: Scope) -> Iterator[None]:
    """Have the session of ``lender`` in ``scope`` while the code of the request runs.

    Between two steps, and at its end, the request has none that could be closed with it.
    """
    if lender.state is not RUNNING:
        yield
        return
    _move(lender, scope)
    try:
        yield
    finally:
        _move(scope, lender)
        scope.session = None


def _move(source: Scope, target: Scope) -> None:
    target.session = source.session
    if source.session is not None:
        target.process = source.process


class _LentBody:
    """The body of a response whose steps have the lender's session."""

    def __init__(self, body: Iterable[bytes], lent: Callable[[], Any]) -> None:
        self._body = body
        self._lent = lent
        self._iterator: Iterator[bytes] | None = None

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        with self._lent():
            if self._iterator is None:
                self._iterator = iter(self._body)
            return next(self._iterator)

    def close(self) -> None:
        close = getattr(self._body, "close", None)
        if close is not None:
            with self._lent():
                close()
