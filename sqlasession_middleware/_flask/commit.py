"""The commit of a request runs under Flask's contexts, and Flask's error handlers see it fail.

``transaction`` commits after Flask has made the response, called the ``after_request`` functions and saved its own
session. Flask would have popped the request's contexts by then. But what runs in a flush or a commit may ask for them:
Flask-SQLAlchemy's signals, a column's default that is ``current_user.id``. So the contexts are pushed once more as the
request begins, and popped after the commit: then the teardown functions run, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from flask import Flask, got_request_exception, request_started
from flask.globals import request_ctx

from .._dependencies import current_object
from .._scope.scope import running_scope
from .._sessions.calls import find_calls
from .._settings.checks import resolve_option

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from .._transaction.attempt import CommitVeto

__all__ = ["CommitUnderFlask"]

#: The environ key of the contexts that are kept.
KEPT = "sqlasession.flask"


class _Kept:
    """The contexts of one attempt at a request.

    :ivar context: Flask's context of the request, pushed once more; None if there is none to pop.
    :ivar error: what the teardown functions get.
    :ivar is_serving: whether Flask is being called.
    """

    __slots__ = ("context", "error", "is_serving")

    def __init__(self) -> None:
        self.is_serving = False
        self.context: Any = None
        self.error: BaseException | None = None

    def pop(self) -> None:
        context, error = self.context, self.error
        self.context = self.error = None
        if context is not None:
            if error is not None and context.app.should_ignore_error(error):
                error = None
            context.pop(error)


class CommitUnderFlask:
    """The innermost application where ``transaction`` is on: Flask's own, with its contexts kept until the commit.

    :param app: the Flask application.
    :param commit_veto: the option of the transaction.
    """

    def __init__(self, app: Flask, commit_veto: CommitVeto | str | None) -> None:
        self._app = app
        self._wsgi_app = app.wsgi_app
        self._veto = commit_veto
        request_started.connect(self._keep, app)
        got_request_exception.connect(self._note_error, app)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        kept: _Kept = environ[KEPT]
        if kept.is_serving:
            return self._wsgi_app(environ, start_response)  # The application passes its own request on to itself.
        kept.pop()  # Those of the attempt before.
        kept.is_serving = True
        try:
            return self._wsgi_app(environ, start_response)
        except BaseException as error:
            kept.error = error
            raise
        finally:
            kept.is_serving = False

    def popping(self, app: WSGIApplication) -> WSGIApplication:
        """Wrap what is around the transaction, so that the contexts are popped after it."""

        def call(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            kept = environ[KEPT] = _Kept()
            try:
                return app(environ, start_response)
            finally:
                kept.pop()

        return call

    def answer(self, environ: WSGIEnvironment, error: Exception) -> WSGIApplication | None:
        """The ``commit_failed`` of the transaction: Flask's response to an exception of a view.

        What an error handler writes is committed if its response is a success.
        """
        kept: _Kept = environ[KEPT]
        if kept.context is None:
            return None
        app = self._app
        try:
            # The handler of Flask re-raises what is being handled.
            response = app.finalize_request(_handled(app.handle_user_exception, error))
            self._commit(environ, response)
        except Exception as unhandled:
            kept.error = unhandled
            return app.handle_exception(unhandled)
        return response

    def _commit(self, environ: WSGIEnvironment, response: Any) -> None:
        scope = running_scope()
        session = None if scope is None else scope.session
        if session is None or not (session.in_transaction() or find_calls(session)):
            return
        headers = response.get_wsgi_headers(environ).to_wsgi_list()
        veto: CommitVeto | None = resolve_option("commit_veto", self._veto)
        if veto is None or not veto(environ, response.status, headers):
            session.commit()

    def _keep(self, sender: Flask, **more: Any) -> None:
        context = current_object(request_ctx)
        kept = _kept_by(context)
        if kept is not None and kept.context is None:
            context.push()
            kept.context = context

    def _note_error(self, sender: Flask, exception: BaseException, **more: Any) -> None:
        kept = _kept_by(current_object(request_ctx))
        if kept is not None:
            kept.error = exception


def _kept_by(context: Any) -> _Kept | None:
    """What belongs to the request; None if it did not come through the middleware."""
    kept: _Kept | None = context.request.environ.get(KEPT)
    return kept


def _handled(handle: Callable[[Exception], Any], error: Exception) -> Any:
    try:
        raise error
    except Exception as raised:
        return handle(raised)
