"""The connection pool of the engines that the middleware makes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import Pool, QueuePool

from .._dependencies import max_overflow
from .._scope.deadline import begin_unit, remaining
from ..failures import Failure
from .observers import note_failure, note_late

__all__ = ["ObservedPool", "TimedPool", "has_open_connections", "is_full", "limit_pool", "wrap_connect"]


class ObservedPool(QueuePool):
    """SQLAlchemy's own pool, which has no event for a connection that did not become free in time."""

    # SQLAlchemy names a pool's logger after its class. This one stays below "sqlalchemy.pool".
    __module__ = QueuePool.__module__

    def connect(self) -> Any:
        try:
            return super().connect()
        except PoolTimeoutError as error:
            note_failure(Failure.UNAVAILABLE, error)
            raise


class TimedPool(ObservedPool):
    """Waits for a free connection no longer than until the deadline of who needs it."""

    __module__ = QueuePool.__module__

    def connect(self) -> Any:
        begin_unit()
        try:
            return super().connect()
        except PoolTimeoutError as error:
            if remaining() == 0:
                raise note_late("no connection of the pool has become free") from error
            raise

    @property
    def _timeout(self) -> float:
        """The seconds to wait, which SQLAlchemy looks at each time."""
        configured: float = vars(self)["_timeout"]
        left = remaining()
        return configured if left is None or left > configured else left

    @_timeout.setter
    def _timeout(self, seconds: float) -> None:
        vars(self)["_timeout"] = seconds


def limit_pool(pool: Pool) -> None:
    """Make a pool of this module a :class:`TimedPool`. Another pool would not know the connections that are out."""
    kind = type(pool)
    if kind is ObservedPool:
        pool.__class__ = TimedPool
    elif ObservedPool in kind.__bases__:  # Something was put before it, such as a breaker.
        bases = tuple(TimedPool if base is ObservedPool else base for base in kind.__bases__)
        pool.__class__ = type(kind.__name__, bases, dict(vars(kind)))


# Part of the name of the pools' logger, which applications may have configured.
ObservedPool.__name__ = TimedPool.__name__ = "WatchedPool"


def wrap_connect(pool: Pool, around: Callable[[Callable[[], Any]], Any]) -> None:
    """Call a function for each connection that is wanted of a pool, and of that which ``dispose()`` puts in its place.

    :param around: is given what returns the connection.
    """
    found: Any = pool

    # Of the class that it has when it is called: breakers and deadlines change it later. What the instance has already
    # is of another such wrapper.
    connect = vars(found).get("connect", lambda: type(found).connect(found))
    recreate = vars(found).get("recreate", lambda: type(found).recreate(found))

    def recreate_wrapped() -> Any:
        another = recreate()
        wrap_connect(another, around)
        return another

    found.connect, found.recreate = partial(around, connect), recreate_wrapped


def is_full(pool: Pool) -> bool:
    """Whether each connection that a pool may open is in use: the next request waits."""
    if not isinstance(pool, QueuePool):
        return False  # It opens as many as are asked for, or has one that all share.
    overflow = max_overflow(pool)
    return overflow >= 0 and pool.checkedout() >= pool.size() + overflow


def has_open_connections(pool: Pool) -> bool:
    """Whether a pool has connections, in use or idle. False if it does not count them."""
    return isinstance(pool, QueuePool) and pool.checkedout() + pool.checkedin() > 0
