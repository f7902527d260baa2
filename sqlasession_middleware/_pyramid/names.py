"""What applications import from pyramid_tm and pyramid_retry, for those that have uninstalled them.

An application that still has pyramid_retry may go on to import from it: the errors that it marks are recognized, and
environ has what its functions look at.
"""

from __future__ import annotations

import sys
from typing import Any

from pyramid.request import Request
from transaction import TransactionManager
from transaction.interfaces import TransientError
from zope.interface import alsoProvides, classImplements
from zope.interface.interface import InterfaceClass

__all__ = [
    "BeforeRetry",
    "IBeforeRetry",
    "IRetryableError",
    "RetryableException",
    "default_commit_veto",
    "explicit_manager",
    "is_error_retryable",
    "is_last_attempt",
    "is_marked",
    "is_tm_active",
    "make_event",
    "mark_error_retryable",
]

#: The environ keys of pyramid_tm: whether the tween is in charge, and of which manager.
TM_ACTIVE = "tm.active"
TM_MANAGER = "tm.manager"
#: The environ keys of pyramid_retry: the number of the attempt, from 0, and how many there may be.
RETRY_ATTEMPT = "retry.attempt"
RETRY_ATTEMPTS = "retry.attempts"

IRetryableError = InterfaceClass("IRetryableError", __doc__="Marks errors after which a request is repeated.")
IBeforeRetry = InterfaceClass("IBeforeRetry", __doc__="An event before each repetition of a request.")


class RetryableException(Exception):  # noqa: N818  # pyramid_retry's name
    """After it a request is repeated."""


class BeforeRetry:
    """The event before a request is repeated.

    :param request: the request that is dropped; ``environ`` is its environ.
    :param exception: the reason.
    :param response: what an exception view has made of it, or None.
    """

    def __init__(self, request: Request, exception: BaseException, response: Any = None) -> None:
        self.request = request
        self.environ = request.environ
        self.exception = exception
        self.response = response


def make_event(request: Request, exception: BaseException, response: Any) -> Any:
    """Make the event that the subscribers of pyramid_retry's know, if it is there, and those of ours."""
    theirs = sys.modules.get("pyramid_retry")
    event = (BeforeRetry if theirs is None else theirs.BeforeRetry)(request, exception, response)
    alsoProvides(event, IBeforeRetry)
    return event


def mark_error_retryable(error: Exception | type[Exception]) -> None:
    """Have a request repeated after an exception, or after any of a class.

    :raises ValueError: if it is neither.
    """
    if isinstance(error, type) and issubclass(error, Exception):
        classImplements(error, IRetryableError)
    elif isinstance(error, Exception):
        alsoProvides(error, IRetryableError)
    else:
        raise ValueError(f"Only exceptions and their classes can be marked as retryable, got {error!r}.")


def is_marked(error: object) -> bool:
    """Whether a request is to be repeated after an error, as far as the application says, or another data manager."""
    if isinstance(error, RetryableException | TransientError) or IRetryableError.providedBy(error):
        return True
    theirs = sys.modules.get("pyramid_retry")
    return theirs is not None and bool(
        isinstance(error, theirs.RetryableException) or theirs.IRetryableError.providedBy(error)
    )


def is_error_retryable(request: Request, error: object) -> bool:
    """Whether a request is repeated after ``error``: it is marked, and this is not the last attempt."""
    return not is_last_attempt(request) and is_marked(error)


def is_last_attempt(request: Request) -> bool:
    """Whether a request is not repeated any more, whatever happens."""
    attempt = request.environ.get(RETRY_ATTEMPT)
    attempts = request.environ.get(RETRY_ATTEMPTS)
    return attempt is None or attempts is None or attempt + 1 == attempts


def is_tm_active(request: Request) -> bool:
    """Whether the tween is in charge of the request's transaction."""
    return bool(request.environ.get(TM_ACTIVE, False))


def explicit_manager(request: Request) -> TransactionManager:
    """For ``tm.manager_hook``: a manager of the request's own, whose transactions have to be begun."""
    return TransactionManager(explicit=True)


def default_commit_veto(request: Request, response: Any) -> bool:
    """For ``tm.commit_veto``: veto 4xx and 5xx. A header ``X-Tm`` overrides this: only ``commit`` is not vetoed."""
    told = response.headers.get("x-tm")
    return bool(told != "commit" if told is not None else response.status.startswith(("4", "5")))
