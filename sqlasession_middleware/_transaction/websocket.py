"""Requests that ask for a websocket: the transaction does not apply once the websocket is open."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

from .._scope.scope import Scope
from .._sessions.release import uncommitted
from .._wsgi.bodies import HeldBody, close_quietly, first_chunk, iterate
from .._wsgi.held_head import HeldHead
from .._wsgi.websocket import is_websocket, watch_sockets
from ..errors import of_application
from .attempt import Attempt, Policy

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["serve_websocket"]

logger = logging.getLogger("sqlasession_middleware.transaction")


def serve_websocket(
    policy: Policy, environ: WSGIEnvironment, start_response: StartResponse, scope: Scope
) -> Iterable[bytes]:
    """Call the application for a request that asks for a websocket. The request is not repeated.

    If the application responds, the transaction is committed or rolled back, as in any request. If the request becomes
    a websocket, uncommitted work is rolled back, and the application's response or exception is passed to the server.
    """
    handshake = _Handshake(policy, scope)
    if is_websocket(environ):  # The server has answered the handshake: there is nothing to hold back.
        body = policy.app(environ, start_response)
        try:
            # A generator serves the websocket while it is iterated.
            return HeldBody(list(body), iter(()), body)
        except BaseException:
            close_quietly(body)
            raise
        finally:
            handshake.log_uncommitted(environ)
    watch_sockets(environ)
    attempt = Attempt(handshake, environ, start_response, scope)
    try:
        return attempt.run()
    except Upgraded as upgraded:
        if upgraded.error is not None:
            raise upgraded.error from None
        if attempt.status:
            attempt.release()
        return upgraded.body


class Upgraded(BaseException):
    """A signal: the request was a websocket. The attempt rolls back uncommitted work, and sends no response.

    :param body: the body that the application returned.
    :param error: the exception that the application raised.
    """

    def __init__(self, body: Iterable[bytes] = (), error: Exception | None = None) -> None:
        self.body = body
        self.error = error


class _Handshake:
    """Calls the application in an attempt, and checks whether the request has become a websocket."""

    def __init__(self, policy: Policy, scope: Scope) -> None:
        self.policy = policy
        self.scope = scope
        self.app: WSGIApplication = self._call
        self.commit_failed = policy.commit_failed
        self.commit_veto = policy.commit_veto
        self.retry_on = policy.retry_on

    def _call(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        head = cast(HeldHead, start_response)  # It is the attempt.
        try:
            body = self.policy.app(environ, start_response)
            if not head.status and type(body) is not list and type(body) is not tuple:
                iterator = iterate(body)  # A generator calls start_response() in its first step.
                body = HeldBody(first_chunk(iterator), iterator, body)
        except Exception as error:
            if isinstance(error, StopIteration) or is_websocket(environ):
                self.log_uncommitted(environ)
                raise Upgraded(error=error) from None
            raise
        if not head.status or is_websocket(environ):
            self.log_uncommitted(environ)
            raise Upgraded(body)
        return body

    def log_uncommitted(self, environ: WSGIEnvironment) -> None:
        session = self.scope.session
        left = "" if session is None else uncommitted(session)
        if left:
            logger.warning(
                "The websocket at %r%s has ended, and its session is rolled back with %s: no transaction of the"
                " middleware applies to a websocket. Commit in its handler, in 'with app.context():' for each message.",
                environ.get("PATH_INFO"),
                of_application(self.scope.owner),
                left,
            )
