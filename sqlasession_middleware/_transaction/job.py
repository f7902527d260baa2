"""A transaction outside of a request: a job, or a script."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from .._database.attribution import failure_of
from .._database.observers import observe_commits, observe_failures
from .._database.recovery import pending_failure
from .._scope.scope import Scope
from .._sessions.calls import refuse_unfinished
from .._sessions.routed_scope import note_unknown_commit
from ..errors import named, of_application
from ..failures import Failure
from .attempt import Again
from .request_transaction import RequestTransaction

__all__ = ["run_job"]

logger = logging.getLogger("sqlasession_middleware.transaction")

Result = TypeVar("Result")


class Policy(Protocol):
    """The part of a :class:`~sqlasession_middleware.transaction.TransactionMiddleware` that a job uses."""

    retry_on: tuple[type[Exception], ...]

    def backoff(self, number: int) -> float:
        """Seconds to wait after an attempt."""


def run_job(policy: Policy, scope: Scope, call: Callable[[], Result], attempts: int) -> Result:
    """Call a function up to ``attempts`` times, and commit what it has done.

    :param scope: the current one, which a context has just begun.
    :returns: what the function returns.
    :raises BaseException: what the last attempt, or its commit, has raised.
    """
    observe_failures(scope.owner)
    if attempts > 1:
        observe_commits(scope.owner)
    local_values = dict(scope)
    for number in range(1, attempts):
        try:
            return _attempt(policy, scope, call, may_repeat=True)
        except Again as again:
            wait = policy.backoff(number)
            of_name = of_application(scope.owner).replace("%", "%%")
            logger.warning(
                f"Attempt %d of %d of %s{of_name} failed and will be repeated in %.3f s: %r",
                *(number, attempts, named(call), wait, again.cause),
                exc_info=again.cause,
            )
        scope.clear()
        scope.update(local_values)
        scope.failure = None
        time.sleep(wait)
    return _attempt(policy, scope, call, may_repeat=False)


def _attempt(policy: Policy, scope: Scope, call: Callable[[], Result], may_repeat: bool) -> Result:
    transaction = scope.transaction = RequestTransaction(scope, may_repeat)
    try:
        result = call()
        refuse_unfinished("run", call, result)
        if transaction.repeat_for is not None:
            _try_again(policy, transaction, None, transaction.repeat_for)
        transaction.conclude()
        return result
    except Again:
        raise
    except BaseException as error:
        failure = failure_of(error, pending_failure(scope))
        transaction.abort(failure)
        if failure is Failure.UNKNOWN:
            logger.exception("It is not known whether a transaction was committed: %s", error)
            note_unknown_commit(scope)
        elif isinstance(error, Exception):
            _try_again(policy, transaction, failure, error)
        raise
    finally:
        scope.transaction = None


def _try_again(policy: Policy, transaction: RequestTransaction, failure: Failure | None, cause: BaseException) -> None:
    reason = transaction.reason_to_repeat(failure, cause, policy.retry_on)
    if reason is not None:
        transaction.abort()
        transaction.remove_session()
        raise Again(reason, failure)
