"""Errors that a listener of ``handle_error`` has put in the place of SQLAlchemy's, as oslo.db does.

SQLAlchemy raises such an error ``from`` the driver's. Its own, which the driver's error is ``orig`` of, nobody sees.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .._dependencies import was_handled
from .._drivers.registry import UNKNOWN, driver_that_made

__all__ = ["causes_of", "driver_error_of", "mark_observed", "unobserved_error_of"]

#: The attribute of a driver's error that a listener of ours has seen.
_OBSERVED = "sqlasession_observed"


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """An error, and its causes and contexts."""
    each: BaseException | None = error
    seen: set[int] = set()
    while each is not None and id(each) not in seen:
        yield each
        seen.add(id(each))
        each = each.__cause__ or each.__context__


def driver_error_of(error: BaseException) -> BaseException:
    """The driver's error that SQLAlchemy has raised an error from; without one, the error itself."""
    original = getattr(error, "orig", None)
    if isinstance(original, BaseException):
        return original
    cause = error.__cause__
    return error if cause is None or driver_that_made(cause) is UNKNOWN else cause


def unobserved_error_of(error: BaseException) -> BaseException:
    """The driver's error among the causes and contexts of an error that a listener has replaced before ours saw it.

    A listener that is called before ours and raises keeps ours from being called. What ours have seen is over if the
    application has dealt with it.

    :returns: without one, the error itself.
    """
    for each in causes_of(error):
        if was_handled(each.__traceback__):
            found = driver_error_of(each)
            return error if _was_observed(found) else found
    return error


def mark_observed(error: BaseException) -> None:
    """Note that a listener of ours has seen an error of a driver."""
    with contextlib.suppress(Exception):  # An error may be of any class.
        setattr(error, _OBSERVED, True)


def _was_observed(error: BaseException) -> bool:
    return getattr(error, _OBSERVED, False) is True
