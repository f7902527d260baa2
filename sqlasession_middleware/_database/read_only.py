"""Engines that nothing is written to: replicas. Their commits do not count, and their refusals are explained."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakSet

from sqlalchemy import Engine

from .._dependencies import origins_of
from .._drivers.registry import driver_of
from .replaced_errors import driver_error_of

if TYPE_CHECKING:
    from sqlalchemy.engine import ExceptionContext

__all__ = ["explain_refusal", "is_explained", "is_read_only", "is_refusal", "note_read_only"]

_read_only: WeakSet[Engine] = WeakSet()

_EXPLANATION = (
    "This statement was sent to a replica, because it does not look like a write:"
    " call on_primary() before it, or let the request have a method such as POST."
)


def note_read_only(engine: Engine) -> None:
    """Note that nothing is written to an engine, nor to those that are made of it by ``execution_options()``."""
    _read_only.add(engine)


def is_read_only(engine: Engine) -> bool:
    """Whether nothing is written to an engine."""
    return bool(_read_only) and any(origin in _read_only for origin in origins_of(engine))


def is_refusal(context: ExceptionContext) -> bool:
    """Whether an error is the refusal of a replica to write: a mistake of the application, not an outage."""
    engine = context.engine
    return engine is not None and is_read_only(engine) and driver_of(context).refuses_write(context.original_exception)


def explain_refusal(context: ExceptionContext) -> None:
    """Listener of ``handle_error`` that adds a note to the error of a replica that refused to write."""
    if context.sqlalchemy_exception is not None and is_refusal(context):
        # Another listener may put its own error in the place of SQLAlchemy's, but not of the driver's.
        context.sqlalchemy_exception.add_note(_EXPLANATION)
        context.original_exception.add_note(_EXPLANATION)


def is_explained(error: BaseException) -> bool:
    """Whether :func:`explain_refusal` has added its note to an error."""
    return any(_EXPLANATION in getattr(each, "__notes__", ()) for each in (error, driver_error_of(error)))
