"""What an error of the database means for the request.

:func:`classify` takes an error of SQLAlchemy or of a driver. It returns a :class:`Failure`, or None for an error that
is about a constraint, a missing table, a wrong password or a bug in the program. No driver is imported, and no
database is asked. The tables of codes are in the modules of the servers, in ``_drivers``.

Limits:

- libpq has no SQLSTATE for a connection that it could not make, only a message. In any language the message shows that
  the server has answered; what it has answered is known only in English. From a server with another ``lc_messages``,
  "starting up" and "too many clients" are None, as a wrong password is.
- A write in a transaction that the application made read-only looks like a write on a read-only server.
- Statement timeouts and cancelled queries are None: the next attempt would exceed the same limit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import exc
from sqlalchemy.orm.exc import StaleDataError

from ._drivers.answers import read_attribute
from ._drivers.failure import Failure
from ._drivers.registry import driver_that_made
from .errors import BreakerOpenError, DeadlineError

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.orm import Session

__all__ = ["Failure", "ObservedFailure", "classify"]


class ObservedFailure(NamedTuple):
    """The last failure of the database that was observed in a scope."""

    failure: Failure
    #: the error as the application has seen it
    error: BaseException
    #: the scope's Session at that time, if there was one
    session: Session | None = None
    #: the engine that failed, if it is known
    engine: Engine | None = None
    #: whether one application of a framework ran, and not one inside of another
    in_one_application: bool = False


def classify(
    error: BaseException,
    *,
    committing: bool = False,
    connected: bool | None = None,
    disconnected: bool | None = None,
) -> Failure | None:
    """Return the meaning of an error. Never raises, whatever the error is.

    :param error: an error of SQLAlchemy or of a driver. Its causes are not examined: an error of SQLAlchemy holds the
        driver's error, and a listener of the engine's ``handle_error`` sees it before a framework, or another listener,
        can wrap it.
    :param committing: whether it was COMMIT that failed. If the connection is lost there, the outcome is unknown.
    :param connected: False if there was no connection yet (in ``handle_error``, ``context.connection is None``); None
        if that is not known.
    :param disconnected: whether the dialect considers the connection lost (in ``handle_error``,
        ``context.is_disconnect``); None to take it from the error.
    :returns: None for an error that is about the statement, the schema, the login or the program.
    """
    failure, lost = _failure_by_itself(error)
    if failure is None and (lost if disconnected is None else disconnected):
        failure = Failure.LOST
    if failure is None and committing:
        original = read_attribute(error, "orig") or error
        return driver_that_made(original).failure_in_commit(original)
    if failure is Failure.LOST and connected is False:
        return Failure.UNAVAILABLE
    if failure is Failure.LOST and committing:
        return Failure.UNKNOWN
    return failure


def _failure_by_itself(error: BaseException) -> tuple[Failure | None, bool]:
    """The meaning of an error by itself, and whether SQLAlchemy has invalidated the connection."""
    kind = type(error)  # isinstance() also reads the object's __class__, which may raise.
    if issubclass(kind, DeadlineError):
        is_unknown = read_attribute(error, "is_outcome_unknown") is True
        return Failure.UNKNOWN if is_unknown else Failure.UNAVAILABLE, False
    if issubclass(kind, exc.TimeoutError | BreakerOpenError):
        return Failure.UNAVAILABLE, False
    if issubclass(kind, StaleDataError):
        return Failure.TRANSIENT, False
    if issubclass(kind, exc.DisconnectionError):
        return Failure.LOST, True
    if issubclass(kind, exc.DBAPIError):
        original = read_attribute(error, "orig")
        lost = read_attribute(error, "connection_invalidated") is True
        return driver_that_made(original).failure_of(original), lost
    return driver_that_made(error).failure_of(error), False
