"""Which failure of the database an exception came of."""

from __future__ import annotations

from sqlalchemy.exc import DBAPIError, PendingRollbackError

from .._dependencies import came_from_commit, came_from_rollback
from .._drivers.registry import driver_that_made
from ..errors import TransactionAborted
from ..failures import Failure, ObservedFailure, classify
from .read_only import is_explained
from .replaced_errors import causes_of, driver_error_of, unobserved_error_of

__all__ = ["failure_of"]


def failure_of(error: BaseException, observed: ObservedFailure | None) -> Failure | None:
    """What an exception that leaves the application says about the database.

    :param observed: the last failure that the scope has met. It counts if ``error`` came of it.
    """
    if observed is not None and (
        observed.failure is Failure.UNKNOWN or _is_consequence(error) or _came_of(error, observed.error)
    ):
        return observed.failure
    if is_explained(error):
        return None
    original = getattr(error, "orig", None) or error
    if came_from_rollback(original.__traceback__):
        # The flush that failed has rolled back: its own error says why, although the ROLLBACK's has taken its place.
        for earlier in causes_of(original):
            if isinstance(earlier, DBAPIError):
                return classify(earlier)
    committing = came_from_commit(error.__traceback__) or came_from_commit(original.__traceback__)
    failure = classify(error, committing=committing)
    replaced = unobserved_error_of(error) if failure is None else error
    if replaced is not error:
        return classify(replaced, committing=committing or came_from_commit(replaced.__traceback__))
    if failure is None and committing and original is error:
        return Failure.UNKNOWN  # Not the driver's answer: a signal or a timeout has cut the COMMIT short.
    return failure


def _is_consequence(error: BaseException) -> bool:
    """Whether an error only says that the transaction had failed before."""
    if isinstance(error, PendingRollbackError | TransactionAborted):
        return True
    original = driver_error_of(error)
    return driver_that_made(original).is_consequence(original)


def _came_of(error: BaseException, cause: BaseException) -> bool:
    """Whether ``cause`` is among the causes and contexts of an error, or the error itself.

    The driver's error stands for SQLAlchemy's: a listener may have put another one in its place.
    """
    original = driver_error_of(cause)
    return any(each is cause or each is original for each in causes_of(error))
