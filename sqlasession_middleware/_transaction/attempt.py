"""One attempt at a request: calls the application, and commits or rolls back depending on the response."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from types import GeneratorType
from typing import TYPE_CHECKING, Protocol

from .._database.attribution import failure_of
from .._database.recovery import pending_failure
from .._dependencies import flush_error
from .._scope.scope import Scope
from .._sessions.routed_scope import note_unknown_commit
from .._wsgi import error_pages
from .._wsgi.bodies import HeldBody, close_quietly
from .._wsgi.event_stream import unit_ends
from .._wsgi.file_wrapper import is_file, is_whole_file
from .._wsgi.held_head import HeldHead
from ..errors import shown
from ..failures import Failure, ObservedFailure, classify
from .committing_body import CommittingBody
from .held_response import HeldResponse, hold_response
from .request_transaction import RequestTransaction

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["Again", "Attempt", "CommitFailed", "CommitVeto"]

logger = logging.getLogger("sqlasession_middleware.transaction")

_LISTS = (list, tuple)

CommitVeto = Callable[["WSGIEnvironment", str, list[tuple[str, str]]], object]
CommitFailed = Callable[["WSGIEnvironment", Exception], "WSGIApplication | None"]


class Policy(Protocol):
    """The part of a :class:`~sqlasession_middleware.transaction.TransactionMiddleware` that an attempt uses."""

    app: WSGIApplication
    commit_failed: CommitFailed | None
    commit_veto: CommitVeto | None
    retry_on: tuple[type[Exception], ...]


class Again(Exception):  # noqa: N818  # a signal to the middleware
    """The attempt has failed and may be repeated. It was rolled back, and its response was closed."""

    def __init__(self, cause: BaseException, failure: Failure | None) -> None:
        self.cause = cause
        self.failure = failure


class Attempt(HeldHead):
    """One attempt at a request. It is the ``start_response`` that the application gets.

    :param policy: the middleware.
    :param may_repeat: whether another attempt may follow.
    """

    #: what the application returned
    body: Iterable[bytes] = ()
    #: the headers that the commit veto was asked about already
    _asked_veto_of: object = None

    def __init__(
        self,
        policy: Policy,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        scope: Scope,
        may_repeat: bool = False,
    ) -> None:
        self.start_response = start_response
        self.policy = policy
        self.environ = environ
        self.scope = scope
        self.transaction = RequestTransaction(scope, may_repeat)

    def run(self) -> Iterable[bytes]:
        """Call the application.

        :returns: the body for the server.
        :raises Again: if the attempt is to be repeated.
        """
        transaction = self.scope.transaction = self.transaction
        try:
            self.body = body = self.policy.app(self.environ, self)
            # A list is complete, and is passed to the server unchanged.
            held = None if type(body) in _LISTS and self.written is None else self._hold(body)
            if (self.status >= "5" or transaction.repeat_for is not None) and not self.released:
                answer = self._answer_to_page()
                if answer is not None:
                    return answer
            self._end_before_release(held)
            self.release()
            return body if held is None else self._rest_of(body, held)
        except Again:
            raise
        except BaseException as error:
            failure = failure_of(error, pending_failure(self.scope))
            transaction.abort(failure)
            self._close_body()
            if self.released or not isinstance(error, Exception):
                raise
            answer = self._answer_to(failure, error)
            if answer is None and transaction.commit_failed:
                answer = self._answer_to_failed_commit(failure, error)
            if answer is None:
                raise
            return answer
        finally:
            if transaction.concluded:
                self.scope.transaction = None

    def has_no_body(self) -> bool:
        return self.environ.get("REQUEST_METHOD") == "HEAD" or super().has_no_body()

    def _hold(self, body: Iterable[bytes]) -> HeldResponse | None:
        """Hold the beginning of the response; None for a file, in whose steps no code of the application runs."""
        if not self.written and is_file(self.environ, body):
            return None
        scope = self.scope
        if scope.session is not None:
            if not self.written and is_whole_file(body):
                return None
            if self.status and unit_ends(self.headers, scope.owner.streams) is not None:
                self._end_before_units()
        return hold_response(self, body, scope.owner.streams)

    def _end_before_units(self) -> None:
        """End the transaction before a stream of units waits for its first one, as if that were a unit."""
        if self.status >= "5":
            return  # It may be a page about a failure, which is decided about later.
        veto = self.policy.commit_veto
        if veto is not None:
            self.transaction.vetoed = bool(veto(self.environ, self.status, self.headers))
            self._asked_veto_of = self.headers
        self.transaction.end_before_units()

    def _end_before_release(self, held: HeldResponse | None) -> None:
        """End the transaction, or a part of it, before the head and the first chunks are released."""
        if not self.status:
            self.check()
        transaction = self.transaction
        is_complete = held is None or held.is_complete
        if is_complete and self.scope.session is None:
            transaction.concluded = True  # There is nothing to commit, so the veto is not called.
            return
        veto = self.policy.commit_veto
        if veto is not None and self._asked_veto_of is not self.headers:
            transaction.vetoed = bool(veto(self.environ, self.status, self.headers))
        if held is None or held.is_complete:
            transaction.conclude()
        elif held.ends_unit is not None and sum(map(held.ends_unit, held.chunks)):
            transaction.in_units = True
            transaction.end_unit()
        elif transaction.vetoed or transaction.doomed:
            transaction.roll_back()  # Now, so that its locks are not held until the client has read the body.

    def _rest_of(self, body: Iterable[bytes], held: HeldResponse) -> Iterable[bytes]:
        """Return the body for the server: the held chunks, and the rest."""
        if held.rest is not None:
            return CommittingBody(self.transaction, body, held)
        if type(body) is GeneratorType or not hasattr(body, "close"):
            return held.chunks
        return HeldBody(held.chunks, iter(()), body)

    def _close_body(self) -> None:
        """Close the body of a response that the server will not get."""
        body, self.body = self.body, ()
        close_quietly(body)

    def _answer_to_page(self) -> Iterable[bytes] | None:
        """Decide whether to replace a page that the application may have made after a failure of the database.

        :returns: the other answer; None to keep the application's page.
        """
        observed = pending_failure(self.scope) or _failed_flush(self.scope)
        if observed is not None:
            return self._answer_to(observed.failure, observed.error)
        asked = self.transaction.repeat_for
        return None if asked is None else self._answer_to(None, asked)

    def _answer_to(self, failure: Failure | None, cause: BaseException) -> Iterable[bytes] | None:
        """Decide how to answer a failure that ends the attempt.

        :returns: the answer; None to keep the application's own response or exception.
        :raises Again: if the attempt is to be repeated.
        """
        transaction = self.transaction
        if failure is Failure.UNKNOWN:
            transaction.abort(failure)
            self._close_body()
            logger.error("It is not known whether a transaction was committed: %s", cause, exc_info=cause)
            note_unknown_commit(self.scope)
            return error_pages.outcome_unknown()(self.environ, self.start_response)
        reason = transaction.reason_to_repeat(failure, cause, self.policy.retry_on)
        if reason is None:
            return None
        transaction.abort()
        self._close_body()
        transaction.remove_session()
        raise Again(reason, failure)

    def _answer_to_failed_commit(self, failure: Failure | None, error: Exception) -> Iterable[bytes] | None:
        """Ask the application for its response to a commit that has failed. The transaction is rolled back already.

        :returns: the answer; None to let the error go on.
        """
        ask = self.policy.commit_failed
        if ask is None:
            return None
        answers_503 = self.scope.owner.answers_503
        if answers_503 is not None and answers_503(self.environ, failure):
            return None
        response = ask(self.environ, error)
        if response is None:
            return None
        if not callable(response):
            raise TypeError(f"commit_failed must return a WSGI application or None, got {shown(response)}.")
        return response(self.environ, self.start_response)


def _failed_flush(scope: Scope) -> ObservedFailure | None:
    """The error of a failed flush that did not come from a driver (a StaleDataError), while the session has it."""
    error = flush_error(scope.session)
    failure = None if error is None else classify(error)
    return None if error is None or failure is None else ObservedFailure(failure, error)
