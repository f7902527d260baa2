"""Until when a scope may wait for its databases.

Only the scopes of an application with a deadline have one: :func:`limited` makes their class.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from .._wsgi.event_stream import EVENT_STREAM, unit_ends
from .._wsgi.websocket import asks_for_websocket
from .scope import ENDED, Scope, current, outwards

__all__ = [
    "begin_deadline",
    "begin_unit",
    "current_deadline",
    "half_of_deadline",
    "limited",
    "now",
    "remaining",
    "shortest_deadline",
]

#: A clock that nobody sets.
now = time.monotonic


@cache
def limited(scope_class: type[Scope]) -> type[Scope]:
    """A class of scopes that have a deadline.

    :param scope_class: the class without one.
    """
    return type(f"Limited{scope_class.__name__}", (scope_class,), {"__slots__": ("deadline", "seconds")})


def begin_deadline(scope: Any, seconds: float | None) -> None:
    """Have a scope's deadline begin now.

    :param scope: of a class that :func:`limited` has made.
    :param seconds: None for no deadline.
    """
    scope.seconds = seconds
    scope.deadline = None if seconds is None else now() + seconds


def begin_unit() -> None:
    """Let the deadlines of streams of units, and of websockets, begin now.

    Call it when a connection is needed. Each unit needs one anew, because it was given back at the end of the one
    before. A head that is held back is not known here, but a browser says that it wants events (HTML Standard,
    "Server-sent events").
    """
    scope: Any
    for scope in outwards(current.get(None)):
        if scope.deadline is not None and _has_units(scope):
            scope.deadline = now() + scope.seconds


def _has_units(scope: Scope) -> bool:
    if scope.headers is not None and unit_ends(scope.headers, scope.owner.streams) is not None:
        return True
    environ = scope.environ
    return environ is not None and (EVENT_STREAM in environ.get("HTTP_ACCEPT", "") or asks_for_websocket(environ))


@contextmanager
def half_of_deadline() -> Iterator[None]:
    """Let the block have half of the time that is left to the current scope."""
    scope: Any = current.get(None)
    deadline = None if scope is None else scope.deadline
    if deadline is None:
        yield
        return
    at = now()
    scope.deadline = at + (deadline - at) / 2
    try:
        yield
    finally:
        scope.deadline = deadline


def current_deadline() -> float | None:
    """The earliest deadline of the running code, in seconds of :func:`time.monotonic`; None if it has none.

    A request that is answered inside of another one, and a context in a request, may not wait longer than what is
    around them.
    """
    earliest = None
    for scope in outwards(current.get(None)):
        # Work that a request has left behind, in a copy of its context, is none of the request's.
        deadline = None if scope.state is ENDED else scope.deadline
        if deadline is not None and (earliest is None or deadline < earliest):
            earliest = deadline
    return earliest


def shortest_deadline() -> float:
    """The shortest deadline of the running code, in seconds from its begin."""
    return min(_each_seconds(), default=0.0)


def _each_seconds() -> Iterator[float]:
    scope: Any
    for scope in outwards(current.get(None)):
        if scope.deadline is not None:
            yield scope.seconds


def remaining() -> float | None:
    """How many seconds are left until the deadline of the current request or context.

    Give it to whatever else the request waits for: ``requests.get(url, timeout=remaining())``.

    :returns: 0 if the deadline has passed; None if there is none, and outside of requests and contexts.
    """
    deadline = current_deadline()
    return None if deadline is None else max(deadline - now(), 0.0)
