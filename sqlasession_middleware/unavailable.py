"""Answers 503 when the database is out of reach, even if the application handles the error.

.. code-block:: python

    app = SQLASessionMiddleware(app, "postgresql+psycopg://localhost/shop", unavailable=True)

This applies to refused and lost connections, to servers that start or stop, and to an exhausted pool. It also applies
to deadlocks and lock timeouts that persist after the last of several attempts. Constraint, schema and login errors are
not changed. See :mod:`sqlasession_middleware.failures`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from sqlalchemy import select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from ._database.attribution import failure_of
from ._database.breaker import breaker_of, breaker_state, guard
from ._database.engines import without_passwords_of_urls
from ._database.observers import observe_failures
from ._database.recovery import pending_failure
from ._database.replaced_errors import causes_of
from ._scope.scope import running_scope
from ._settings.checks import check_application, check_boolean, check_seconds, resolve_option
from ._wsgi import error_pages
from ._wsgi.bodies import HeldBody, close_quietly, first_chunk, iterate
from ._wsgi.file_wrapper import is_file
from ._wsgi.held_head import HeldHead
from ._wsgi.users_page import RETRY_AFTER, UNAVAILABLE, answer_with_page
from ._wsgi.websocket import asks_for_websocket, is_websocket
from .errors import ConfigurationError, of_application, shown
from .failures import Failure, ObservedFailure, classify
from .transaction import TransactionMiddleware

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["UnavailableMiddleware", "breaker_state"]

logger = logging.getLogger(__name__)

_OUT_OF_REACH = (Failure.UNAVAILABLE, Failure.LOST)


class UnavailableMiddleware:
    """Answers 503 with Retry-After when the wrapped application cannot reach the database.

    Inside a :class:`~sqlasession_middleware.SQLASessionMiddleware`, it also recognizes a failure that a framework
    turned into an error page; without it, only the exception counts.

    :param app: any WSGI application.
    :param retry_after: seconds after which the client may try again.
    :param transient: whether to answer 503 to a transient failure as well: a deadlock, a serialization failure, a lock
        timeout. The default is true if ``app`` is a
        :class:`~sqlasession_middleware.transaction.TransactionMiddleware` whose ``attempts`` are above 1; the answer is
        503 if all of them have failed.
    :param page: a WSGI application that answers in place of the default page, or its dotted name.
    :param breaker_failures: after how many failures in a row to reach an engine whoever needs it is told so at once; 0
        for never.
    :param breaker_seconds: for how many seconds. Then one request tries it again.
    :raises ConfigurationError: if an option is wrong.
    """

    def __init__(
        self,
        app: WSGIApplication,
        *,
        retry_after: int = 10,
        transient: bool | None = None,
        page: WSGIApplication | str | None = None,
        breaker_failures: int = 3,
        breaker_seconds: float = 5.0,
    ) -> None:
        check_application(app)
        if type(retry_after) is not int or retry_after < 0:
            raise ConfigurationError(
                "retry_after", f"must be a whole number of seconds from 0, got {shown(retry_after)}."
            )
        if transient is None:
            transient = isinstance(app, TransactionMiddleware) and app.attempts > 1
        check_boolean("transient", transient)
        if type(breaker_failures) is not int or breaker_failures < 0:
            raise ConfigurationError(
                "breaker_failures", f"must be a whole number of failures from 0, got {shown(breaker_failures)}."
            )
        check_seconds("breaker_seconds", breaker_seconds)
        self.app = app
        self.breaker_failures = breaker_failures
        self.breaker_seconds = breaker_seconds
        self.retry_after = retry_after
        self.transient = transient
        self.page: WSGIApplication | None = resolve_option("page", page)
        self._owner: object = None

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        scope = running_scope()
        if scope is not None and scope.owner is not self._owner:
            observe_failures(scope.owner)
            scope.owner.answers_503 = self._answers
            if self.breaker_failures:
                guard(scope.owner, self.breaker_failures, self.breaker_seconds)
            self._owner = scope.owner
        head = _Head(start_response)
        body: Iterable[bytes] = ()
        try:
            body = self.app(environ, head)
            kind = type(body)
            if kind is not list and kind is not tuple and not is_file(environ, body):
                iterator = iterate(body)
                chunks = first_chunk(iterator)
                whole: Iterable[bytes] = HeldBody(chunks, iterator, body)
            else:
                whole = body
        except BaseException as error:
            close_quietly(body)
            page = None
            if isinstance(error, Exception) and not head.released:
                observed = None if scope is None else pending_failure(scope)
                page = self._page(environ, failure_of(error, observed), error, observed)
            if page is None:
                raise
            return page(environ, start_response)
        if head.status.startswith("500") and not head.released and scope is not None:
            observed = pending_failure(scope)
            page = None if observed is None else self._page(environ, observed.failure, observed.error, observed)
            if page is not None:
                close_quietly(body)
                return page(environ, start_response)
        head.release()
        return HeldBody(head.written, iter(whole), body) if head.written else whole

    def _page(
        self,
        environ: WSGIEnvironment,
        failure: Failure | None,
        cause: BaseException,
        observed: ObservedFailure | None,
    ) -> WSGIApplication | None:
        """The page for a failure of the database; None if the application's own response or exception stands."""
        if not self._is_answered(environ, failure):
            return None
        scope = running_scope()
        of_name = of_application(None if scope is None else scope.owner)
        request = environ.get("REQUEST_METHOD"), environ.get("PATH_INFO"), of_name
        said = _said_by_the_driver(cause)
        if failure is Failure.TRANSIENT:
            logger.error("The database is too busy: %s %r%s is answered with 503: %s", *request, said, exc_info=cause)
            return self._page_for(environ, "busy")
        if observed is not None and _is_own_fault(observed):
            logger.error(
                "%s %r%s has lost its connection in each attempt, and the database answers others: it is no outage, but"
                " a statement that the database cannot take, for example one above max_allowed_packet: %s",
                *request,
                said,
                exc_info=cause,
            )
            return None
        breaker = breaker_of(cause, None if observed is None else observed.engine)
        # Once in an outage: the others fail of the same.
        shown_cause = cause if breaker is None or breaker.tells(self) else None
        logger.error(
            "The database is out of reach: %s %r%s is answered with 503: %s", *request, said, exc_info=shown_cause
        )
        origin = cause if observed is None else observed.error
        is_pool = any(isinstance(each, PoolTimeoutError) for each in causes_of(origin))
        return self._page_for(environ, "pool" if is_pool else "unreachable")

    def _is_answered(self, environ: WSGIEnvironment, failure: Failure | None) -> bool:
        is_busy = failure is Failure.TRANSIENT and self.transient
        return (is_busy or failure in _OUT_OF_REACH) and not is_websocket(environ)

    def _answers(self, environ: WSGIEnvironment, failure: Failure | None) -> bool:
        """Whether the failure of an exception that leaves the application now is answered with 503."""
        if not self._is_answered(environ, failure):
            return False
        scope = running_scope()
        observed = None if scope is None or failure is Failure.TRANSIENT else pending_failure(scope)
        return observed is None or not _is_own_fault(observed)

    def _page_for(self, environ: WSGIEnvironment, kind: str) -> WSGIApplication:
        """The user's page, if there is one, or the default one.

        :param kind: what the user's page is told: "unreachable", "pool" or "busy".
        """
        scope = running_scope()
        # In a shell the owner may be anything.
        note = None if scope is None else getattr(scope.owner, "note_503", None)
        if note is not None:
            note(kind)
        own = error_pages.unavailable(self.retry_after, is_busy=kind == "busy")
        if self.page is None:
            return own
        environ[UNAVAILABLE] = kind
        environ[RETRY_AFTER] = str(self.retry_after)
        return partial(answer_with_page, self.page, own)


def _is_own_fault(observed: ObservedFailure) -> bool:
    """Whether a statement lost its connection in each of several attempts, and the engine answers on another one."""
    if not getattr(running_scope(), "lost_each_time", False):
        return False  # An attempt that came further shows that the database can take the request.
    # An old primary that refuses to write is lost, too, and answers: it is the server's fault.
    if observed.engine is None or classify(observed.error) is not Failure.LOST:
        return False
    try:
        with observed.engine.connect() as connection:
            connection.execute(select(1))
    except Exception:
        return False
    return True


class _Head(HeldHead):
    """The head of a response. At the end of a websocket there is none."""

    def check(self) -> bool:
        scope = running_scope()
        if not self.status and scope is not None and asks_for_websocket(scope.environ or {}):
            return False
        return super().check()


def _said_by_the_driver(error: BaseException) -> str:
    """The driver's message on one line, even if the application wrapped the error."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    original = next((each.orig for each in causes if isinstance(each, DBAPIError) and each.orig is not None), error)
    return without_passwords_of_urls(" ".join(str(original).split()))
