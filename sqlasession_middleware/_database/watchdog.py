"""Ends waits for databases at their deadlines, from a thread of its own.

A call that waits for a silent server returns only if its socket is shut down. The server is asked first to cancel what
it does: it may be a lock or a long query that is waited for, and a server that has lost its client goes on with them.

The thread looks at the connections that are in use only when the earliest of their deadlines has come. It is one of the
operating system, also under gevent: a driver that blocks all greenlets would block this one as well.
"""

from __future__ import annotations

import _thread
import os
import select
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from .._drivers.answers import ask
from .forks import after_fork, fork_safe_lock

if TYPE_CHECKING:
    from sqlalchemy.pool import ConnectionPoolEntry

    from .._drivers.driver import Driver

__all__ = ["Watch", "end_watch", "watch", "watch_of"]

#: Seconds until a server has to have ended what it was asked to cancel.
_GRACE: Final = 0.2
#: Seconds after which it is asked whether it is there, if that is not known.
_REACTION: Final = 0.05
#: Seconds between two looks at a connection whose deadline has passed.
_INTERVAL: Final = 0.1
#: How many requests to cancel may be under way: a silent server does not answer them.
_CANCELS_AT_MOST: Final = 16


def _original(module: Any, name: str) -> Any:
    """A function of Python's, also where gevent has put its own in its place."""
    monkey = sys.modules.get("gevent.monkey")
    return getattr(module, name) if monkey is None else monkey.get_original(module.__name__, name)


class Watch:
    """A connection that is in use.

    :param deadline: until when it may be waited for.
    :param connect: makes another driver connection of the same engine.
    """

    __slots__ = (
        "before",
        "connect",
        "deadline",
        "driver",
        "driver_connection",
        "due",
        "is_cancelled",
        "is_cut",
        "is_heard",
    )

    def __init__(self, deadline: float, driver: Driver, driver_connection: Any, connect: Callable[[], Any]) -> None:
        self.deadline = self.due = deadline
        self.driver = driver
        self.driver_connection = driver_connection
        self.connect = connect
        #: whether the server was asked to cancel a statement, which may reach it late
        self.is_cancelled = False
        #: whether the server has answered since
        self.is_heard = False
        #: whether the wait was ended here, because the server has not ended it
        self.is_cut = False
        #: what undoes :meth:`~.Driver.limit_waits`
        self.before: object = None

    def look(self) -> float:
        """End the wait for this connection, if there is one. Called when it is due.

        :returns: after how many seconds to look again.
        """
        if not self.driver.is_waiting(self.driver_connection):
            return _INTERVAL
        if not self.is_cancelled:
            self.is_cancelled = True
            if len(_cancels) < _CANCELS_AT_MOST:  # pragma: no branch  # so many silent servers
                _start_thread(self._cancel)
            return _GRACE
        self.is_cut = True
        self.driver.cut(self.driver_connection)
        return _INTERVAL

    def _cancel(self) -> None:
        _cancels.add(self)
        try:
            self.is_heard = self.driver.cancel(self.driver_connection, self.connect) or self._is_answered()
        except Exception as error:  # It may have ended, and no server may answer.
            self.is_heard = self.driver.refuses_one_more(error)
        finally:
            _cancels.discard(self)

    def _is_answered(self) -> bool:
        """Whether the server has ended what it was asked to cancel, or else answers another question."""
        _original(time, "sleep")(_REACTION)
        if not self.driver.is_waiting(self.driver_connection):
            return True
        other = self.connect()
        try:
            ask(other, "SELECT 1")
        finally:
            other.close()
        return True


_watches: dict[ConnectionPoolEntry, Watch] = {}
_cancels: set[Watch] = set()
#: when the thread looks again; 0 if there is no thread
_next_look = 0.0
#: the pipe that wakes it, by its ends
_waking: tuple[int, int] | None = None
_starting = fork_safe_lock()


def watch(record: ConnectionPoolEntry, watched: Watch) -> None:
    """Watch a connection until :func:`end_watch`.

    :param record: the pool's.
    """
    _watches[record] = watched
    # First the watch, then this look: the thread does it the other way round.
    if watched.due < _next_look or _waking is None:
        _wake()


def end_watch(record: ConnectionPoolEntry) -> Watch | None:
    """Watch a connection no more.

    :returns: its watch, if it had one.
    """
    return _watches.pop(record, None)


def watch_of(driver_connection: Any) -> Watch | None:
    """The watch of a connection, if it has one."""
    return next((each for each in list(_watches.values()) if each.driver_connection is driver_connection), None)


def _wake() -> None:
    global _waking
    with _starting:
        if _waking is None:
            _waking = os.pipe()
            os.set_blocking(_waking[1], False)
            _start_thread(_run)
    with suppress(BlockingIOError):  # It is full: the thread will wake.
        os.write(_waking[1], b".")


def _start_thread(call: Callable[[], None]) -> None:  # pragma: no cover  # Coverage does not measure such threads.
    _original(_thread, "start_new_thread")(call, ())


def _run() -> None:
    global _next_look
    assert _waking is not None
    poll = _original(select, "poll")()
    poll.register(_waking[0], select.POLLIN)
    while True:
        _next_look = float("inf")
        earliest = float("inf")
        for watched in list(_watches.values()):
            now = time.monotonic()
            if watched.due <= now:
                with suppress(Exception):  # A connection that its user has closed in this moment.
                    watched.due = now + watched.look()
            earliest = min(earliest, watched.due)
        _next_look = earliest
        if poll.poll(None if earliest == float("inf") else max(earliest - time.monotonic(), 0) * 1000 + 1):
            os.read(_waking[0], 4096)


@after_fork
def _forget() -> None:  # pragma: no cover  # in a child
    """A child has neither the thread nor the requests that it watched over."""
    global _waking, _next_look
    _watches.clear()
    _cancels.clear()
    _waking, _next_look = None, 0.0
