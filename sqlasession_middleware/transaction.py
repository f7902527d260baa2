"""One transaction per request: committed on success, rolled back otherwise, repeated where that may help.

.. code-block:: python

    app = SQLASessionMiddleware(app, "postgresql+psycopg://localhost/shop", transaction={"attempts": 3})

or, with other middleware in between, ``SQLASessionMiddleware(other(TransactionMiddleware(app)), …)``.

A successful response is not completed before its transaction is committed. The middleware therefore holds back the
head until the first chunk is available, and the end of the response until the commit has succeeded.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from ._database.observers import observe_commits, observe_failures
from ._scope.deadline import remaining
from ._scope.protocols import ManagedTransaction
from ._scope.scope import Scope, running_scope
from ._sessions.calls import calls_of, find_calls, refuse_unfinished
from ._sessions.registry import current_scope, open_session
from ._sessions.release import end_reading, release, uncommitted
from ._settings.checks import check_application, check_bytes, check_count, check_seconds, resolve_option
from ._transaction.attempt import Again, Attempt, CommitFailed, CommitVeto
from ._transaction.websocket import serve_websocket
from ._wsgi.kept_request import KeptRequest
from ._wsgi.websocket import asks_for_websocket
from .errors import ConfigurationError, ScopeError, of_application, shown
from .failures import Failure

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["TransactionMiddleware", "after_commit", "default_commit_veto", "doom", "release", "repeat"]

logger = logging.getLogger(__name__)

Call = TypeVar("Call", bound=Callable[[], object])

#: The environ key with the number of the attempt, from 1.
ATTEMPT = "sqlasession.attempt"


def default_commit_veto(environ: WSGIEnvironment, status: str, headers: list[tuple[str, str]]) -> bool:
    """The rules of repoze.tm2: veto 4xx and 5xx. A header ``X-Tm`` overrides this: only ``commit`` is not vetoed."""
    for name, value in headers:
        if len(name) == 4 and name.lower() == "x-tm":
            return value.strip().lower() != "commit"
    return status.startswith(("4", "5"))


def doom() -> None:
    """Roll back the current request's transaction at its end, even if the request succeeds.

    :raises ScopeError: if no TransactionMiddleware manages this code.
    """
    _managed_transaction("doom").doomed = True


def repeat(error: BaseException) -> None:
    """Repeat the current request, as after a failure of the database that may not recur.

    Call it anywhere in the request, also in an error handler that turns ``error`` into a page. The attempt is rolled
    back in any case. The request is repeated if ``attempts`` are left, no part of the response was released, and the
    application has committed nothing by itself. Otherwise the application's response or exception stands.

    :param error: the reason, which is logged with the repetition.
    :raises ScopeError: if no TransactionMiddleware manages this code.
    :raises TypeError: if ``error`` is no exception.
    """
    if not isinstance(error, BaseException):
        raise TypeError(f"repeat() needs the exception that is the reason, got {shown(error)}.")
    transaction = _managed_transaction("repeat")
    transaction.doomed = True
    transaction.repeat_for = error


def after_commit(call: Call) -> Call:
    """Call a function once the work of the current request, or context, is durable, and never otherwise.

    It is called after the commit of the scope's session, in a scope of its own, in which it may use ``session`` and has
    to commit by itself. Functions are called in the order in which they were given. A rollback forgets those that were
    given since the begin of the transaction or savepoint that it undoes, and so does a repetition of the request. Where
    a TransactionMiddleware manages the transaction, no SQL has to be sent for the call to take place. What a function
    raises is logged, and changes neither the response nor the calls after it.

    :param call: a function without arguments. It is returned, so that this may be a decorator.
    :raises ScopeError: outside of a scope.
    :raises TypeError: if ``call`` cannot be called.
    """
    if not callable(call):
        raise TypeError(f"after_commit() needs a function, got {shown(call)}.")
    scope = current_scope()
    open_context = getattr(scope.owner, "context", None)
    if open_context is None:
        raise ScopeError(f"after_commit() needs an application with context(), and {shown(scope.owner)} has none.")
    if scope.transaction is not None:
        scope.transaction.has_calls = True
    session = open_session(scope)
    calls_of(session, partial(_call_in, open_context)).add(session, call)
    return call


def _call_in(open_context: Callable[[], Any], call: Callable[[], object]) -> None:
    """Make a call after the commit, in a context of its own."""
    with open_context():
        refuse_unfinished("after_commit", call, call())
        scope = current_scope()
        calls = None if scope.session is None else find_calls(scope.session)
        # What it has given to after_commit() follows the same commit, unless it has left work of its own undone.
        if calls is not None and end_reading(scope) and not uncommitted(open_session(scope)):
            calls.note_durable()
            calls.make()


def _managed_transaction(function: str) -> ManagedTransaction:
    transaction = current_scope().transaction
    if transaction is None:
        raise ScopeError(
            f"{function}() needs a transaction: no TransactionMiddleware is in charge of this code,"
            " or its transaction has ended."
        )
    return transaction


class TransactionMiddleware:
    """Commits the scope's session when the wrapped application succeeds.

    Place it inside a :class:`~sqlasession_middleware.SQLASessionMiddleware`; a second one in the same scope joins the
    first one's transaction.

    :param app: any WSGI application.
    :param commit_veto: called with environ, status and headers; true rolls back. Or its dotted name. None commits
        whatever the status.
    :param commit_failed: called with environ and the error when the commit has failed and nothing was sent; returns the
        WSGI application to answer with, or None to let the error go on. Or its dotted name.
    :param attempts: the maximum number of attempts, if the database reports an error that may not recur.
    :param backoff_base: seconds; the upper limit of the random wait before the second attempt; it doubles with each
        attempt.
    :param backoff_cap: seconds; no wait is longer.
    :param activate: called with environ; false leaves the request without a transaction. Or its dotted name.
    :param retry_on: further exceptions after which a request is repeated, or their dotted names.
    :param replay_body_memory: bytes; with more than one attempt, a request's body is kept in memory up to this size,
        and a longer one in a temporary file.
    :param replay_body_max: bytes; with more than one attempt, a request with a longer body is passed on unread, and
        not repeated.
    :raises ConfigurationError: if an option is wrong.
    """

    def __init__(
        self,
        app: WSGIApplication,
        *,
        commit_veto: CommitVeto | str | None = default_commit_veto,
        commit_failed: CommitFailed | str | None = None,
        attempts: int = 1,
        backoff_base: float = 0.05,
        backoff_cap: float = 1.0,
        activate: Callable[[WSGIEnvironment], object] | str | None = None,
        retry_on: type[Exception] | str | Sequence[type[Exception] | str] = (),
        replay_body_memory: int = 1024 * 1024,
        replay_body_max: int = 10 * 1024 * 1024,
    ) -> None:
        check_application(app)
        check_count("attempts", attempts)
        check_seconds("backoff_base", backoff_base)
        check_seconds("backoff_cap", backoff_cap)
        check_bytes("replay_body_memory", replay_body_memory)
        check_bytes("replay_body_max", replay_body_max)
        self.app = app
        self.attempts = attempts
        self.backoff_base = backoff_base
        self.backoff_cap = backoff_cap
        self.commit_veto: CommitVeto | None = resolve_option("commit_veto", commit_veto)
        self.commit_failed: CommitFailed | None = resolve_option("commit_failed", commit_failed)
        self.activate: Callable[[WSGIEnvironment], object] | None = resolve_option("activate", activate)
        self.retry_on = _read_exceptions(retry_on)
        self.replay_body_memory = replay_body_memory
        self.replay_body_max = replay_body_max
        #: the application whose engines are observed; set at the first request, because they are not made before
        self._owner: object = None

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        scope = running_scope()
        if scope is None:
            raise ScopeError(
                "TransactionMiddleware has no session to commit: put it inside of a SQLASessionMiddleware,"
                " or give that one 'transaction=True'."
            )
        if scope.transaction is not None or (self.activate is not None and not self.activate(environ)):
            return self.app(environ, start_response)
        if scope.owner is not self._owner:
            observe_failures(scope.owner)
            if self.attempts > 1:
                observe_commits(scope.owner)
            self._owner = scope.owner
        if "HTTP_UPGRADE" in environ and asks_for_websocket(environ):
            environ[ATTEMPT] = 1
            return serve_websocket(self, environ, start_response, scope)
        if self.attempts > 1:
            return self._repeat(environ, start_response, scope)
        environ[ATTEMPT] = 1
        return Attempt(self, environ, start_response, scope).run()

    def _repeat(self, environ: WSGIEnvironment, start_response: StartResponse, scope: Scope) -> Iterable[bytes]:
        """Try up to ``attempts`` times; all but the last may end in :class:`~._transaction.attempt.Again`."""
        request = KeptRequest(environ, self.replay_body_memory, self.replay_body_max)
        local_values = dict(scope)
        lost_each_time = True
        for number in range(1, self.attempts):
            environ[ATTEMPT] = number
            try:
                return Attempt(self, environ, start_response, scope, request.is_repeatable).run()
            except Again as again:
                scope.lost_each_time = lost_each_time = lost_each_time and again.failure is Failure.LOST
                wait = self.backoff(number)
                # Not an argument: those are documented.
                of_name = of_application(scope.owner).replace("%", "%%")
                logger.warning(
                    f"Attempt %d of %d at %s %r{of_name} failed and will be repeated in %.3f s: %r",
                    number,
                    self.attempts,
                    environ.get("REQUEST_METHOD"),
                    environ.get("PATH_INFO"),
                    wait,
                    again.cause,
                    exc_info=again.cause,
                )
            request.restore()
            scope.clear()
            scope.update(local_values)
            scope.failure = None
            time.sleep(wait)
        environ[ATTEMPT] = self.attempts
        return Attempt(self, environ, start_response, scope).run()

    def backoff(self, number: int) -> float:
        """Choose how many seconds to wait after an attempt.

        :param number: the attempt's, from 1.
        """
        longest = min(self.backoff_cap, self.backoff_base * 2 ** min(number - 1, 60))
        left = remaining()
        # What is left is for the attempt as well.
        return random.uniform(0, longest if left is None else min(longest, left / 2))


def _read_exceptions(given: Any) -> tuple[type[Exception], ...]:
    kinds = []
    for each in given if isinstance(given, list | tuple | set | frozenset) else (given,):
        kind = resolve_option("retry_on", each)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            raise ConfigurationError("retry_on", f"must be exception classes or their dotted names, got {shown(each)}.")
        kinds.append(kind)
    return tuple(kinds)
