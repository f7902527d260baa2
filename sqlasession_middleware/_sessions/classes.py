"""The classes that the Sessions of applications are made of."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Dialect
from sqlalchemy.orm import Session

from .._drivers.registry import driver_of
from .request_session import RequestSession
from .write_tracking import WriteTrackingSession

__all__ = ["session_class_for"]

_specialised: dict[tuple[type[Session], ...], type[Session]] = {}


def session_class_for(
    dialects: Iterable[Dialect], session_class: type[Session], mixin: type[RequestSession] = RequestSession
) -> type[Session]:
    """``session_class`` with the behaviour that sessions of requests add.

    SQLAlchemy keeps events by class, so there is one class for each combination.

    :param dialects: of the engines that a Session may work on.
    :param mixin: adds binds or replicas.
    """
    bases: tuple[type[Session], ...] = (mixin,)
    if not all(driver_of(dialect).server.can_tell_writes for dialect in dialects):
        bases = (WriteTrackingSession,) if mixin is RequestSession else (WriteTrackingSession, mixin)
    if session_class is not Session:
        bases = (*bases, session_class)
    if len(bases) == 1:
        return bases[0]
    specialised = _specialised.get(bases)
    if specialised is None:
        names = {"__module__": session_class.__module__, "__qualname__": session_class.__qualname__}
        specialised = _specialised.setdefault(bases, type(session_class.__name__, bases, names))
    return specialised
