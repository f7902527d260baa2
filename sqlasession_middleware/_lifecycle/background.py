"""A few threads of a process for work that no client waits for."""

from __future__ import annotations

import atexit
import logging
from collections import deque
from collections.abc import Callable
from contextvars import Context
from threading import Condition, Thread
from weakref import WeakSet

from .._database.forks import after_fork
from .._settings.checks import check_count, check_seconds

__all__ = ["BackgroundThreads"]

logger = logging.getLogger("sqlasession_middleware.background")

_all: WeakSet[BackgroundThreads] = WeakSet()


class BackgroundThreads:
    """Calls functions in threads, in the order in which they came. The threads start with the first call.

    :param threads: how many there are at most.
    :param seconds: how long the end of the process, and :meth:`wait`, wait for what was begun and what is waiting.
    :raises ConfigurationError: if one of them is wrong.
    """

    # Not ThreadPoolExecutor: the end of the process waits for its threads, however long that takes.

    def __init__(self, threads: int = 2, seconds: float = 10.0) -> None:
        check_count("threads", threads)
        check_seconds("seconds", seconds)
        self._most = threads
        self._seconds = seconds
        self._begin()
        _all.add(self)

    def _begin(self) -> None:
        self._changed = Condition()
        self._waiting: deque[Callable[[], object]] = deque()
        self._threads = 0
        #: how many threads are in a call
        self._busy = 0

    def submit(self, call: Callable[[], object]) -> None:
        """Have a function called in a thread. What it raises is logged."""
        with self._changed:
            self._waiting.append(call)
            self._changed.notify_all()
            if self._threads < min(self._most, self._busy + len(self._waiting)):
                self._threads += 1
                Thread(target=self._work, name="sqlasession-background", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                call = self._waiting.popleft()
                self._busy += 1
            try:
                Context().run(call)
            except BaseException:
                logger.exception("A call in the background failed: %r", call)
            del call
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    def wait(self) -> None:
        """Wait until all is done, or the time is up. Then what was not done is logged."""
        with self._changed:
            if not self._changed.wait_for(lambda: not (self._waiting or self._busy), self._seconds):
                logger.error(
                    "The time of %g s for calls in the background is up: %d have not ended, %d have not begun",
                    *(self._seconds, self._busy, len(self._waiting)),
                )


@after_fork
def _begin_anew() -> None:
    """The child has none of its parent's threads, and what they had to do is the parent's."""
    for each in list(_all):
        each._begin()


@atexit.register
def _wait_for_all() -> None:
    for each in list(_all):
        each.wait()
