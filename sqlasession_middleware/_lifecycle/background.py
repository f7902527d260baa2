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

__all__ = ["BackgroundThreads", "call_logged"]

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
        self._waiting: deque[tuple[Callable[[], object], str]] = deque()
        self._threads = 0
        #: how many threads are in a call
        self._busy = 0

    def submit(self, call: Callable[[], object], name: str) -> None:
        """Have a function called in a thread. What it raises is logged.

        :param name: how the log names it.
        :raises RuntimeError: if there is no thread, and none can be started.
        """
        with self._changed:
            self._waiting.append((call, name))
            self._changed.notify_all()
            if self._threads < min(self._most, self._busy + len(self._waiting)):
                try:
                    Thread(target=self._work, name="sqlasession-background", daemon=True).start()
                except RuntimeError:  # At the end of the process, or of its memory.
                    if not self._threads:
                        self._waiting.pop()
                        raise
                else:
                    self._threads += 1

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                call, name = self._waiting.popleft()
                self._busy += 1
            call_logged(call, name)
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


def call_logged(call: Callable[[], object], name: str) -> None:
    """Call a function in an empty context. What it raises is logged."""
    try:
        Context().run(call)
    except BaseException:
        logger.exception("A call in the background failed: %s", name)


@after_fork
def _begin_anew() -> None:  # pragma: no cover  # in a child
    """The child has none of its parent's threads, and what they had to do is the parent's."""
    for each in list(_all):
        each._begin()


@atexit.register
def _wait_for_all() -> None:
    for each in list(_all):
        each.wait()
