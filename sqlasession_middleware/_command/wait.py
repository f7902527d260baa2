"""What ``sqlasession wait`` does: it asks every engine until all of them have answered, or until the time is over.

Each engine has a thread that asks it again and again, and each question a thread of its own, because not every driver
has a timeout for a server that accepts a connection and then says nothing. The main thread prints what the others
report, so nothing that a server does can make the command late.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click
from sqlalchemy import Engine, event
from sqlalchemy.exc import ArgumentError

from .._database.secrets import shown_url
from .._drivers.registry import driver_of
from .messages import complain, describe_error, refuse

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect

    from ..middleware import SQLASessionMiddleware

__all__ = ["Seconds", "end_by_signals", "wait_for"]

#: How many seconds an engine has for one answer.
TRY_TIMEOUT: Final = 5.0
#: How many seconds pass between two questions to an engine: each pause is twice as long as the one before.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 1.0
#: How many questions to one engine may be open: of a driver without timeouts, none of them ends by itself.
OPEN_QUESTIONS: Final = 20
#: A year; the system's clocks have limits of their own.
LONGEST_WAIT: Final = 31_536_000


class Seconds(click.FloatRange):
    """A number of seconds to wait: none that is negative, infinite, or no number."""

    name = "number of seconds"

    def __init__(self) -> None:
        super().__init__(0, LONGEST_WAIT)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number, or raise a usage error."""
        number = super().convert(value, param, ctx)
        if number != number:  # Only "nan" is in no range and out of none.
            self.fail(f"{value!r} is not a valid {self.name}.", param, ctx)
        return number


class Answer(NamedTuple):
    """What became of one question.

    :param problem: why there is no answer; None if there is one.
    :param is_final: whether no time will mend it.
    :param is_cut: whether the engine had less time for it than usual, because all of the time was over.
    """

    problem: str | None = None
    is_final: bool = False
    is_cut: bool = False


class Waited:
    """An engine that is waited for.

    :param name: what the output calls it.
    :param reports: what it puts its answers in.
    """

    def __init__(
        self, name: str, engine: Engine, application: SQLASessionMiddleware, reports: SimpleQueue[tuple[Waited, Answer]]
    ) -> None:
        self.name = name
        self.engine = engine
        #: Why it has not answered yet.
        self.problem = ""
        self._application = application
        self._reports = reports
        self._has_answered = threading.Event()
        self._open = threading.BoundedSemaphore(OPEN_QUESTIONS)

    def ask_until_it_answers(self, deadline: float | None) -> None:
        """Ask, and report what has changed, until the engine has answered or has no more time.

        :param deadline: a time of the clock; None to ask once.
        """
        pause = FIRST_PAUSE
        while True:
            left = TRY_TIMEOUT if deadline is None else min(TRY_TIMEOUT, deadline - time.monotonic())
            answer = self._ask(max(left, 0.0))
            self._reports.put((self, answer))
            if deadline is None or answer.problem is None or answer.is_final or time.monotonic() + pause >= deadline:
                return
            if self._has_answered.wait(pause):
                return
            pause = min(2 * pause, LONGEST_PAUSE)

    def _ask(self, seconds: float) -> Answer:
        began = time.monotonic()
        silent = Answer(f"no response within {round(seconds, 1):g} seconds", is_cut=seconds < TRY_TIMEOUT)
        if not self._open.acquire(timeout=seconds):
            return silent
        answers: SimpleQueue[Answer] = SimpleQueue()
        threading.Thread(target=self._ping, args=(answers,), daemon=True).start()
        try:
            return answers.get(timeout=max(0.0, began + seconds - time.monotonic()))
        except Empty:
            return silent

    def _ping(self, answers: SimpleQueue[Answer]) -> None:
        try:
            # A pool of its own: that of the application is limited, and a question without an answer keeps its
            # connection.
            connection = self.engine.pool.recreate().connect()
            try:
                # Not the dialect's do_ping(): a proxy answers it in place of a server that is away.
                driver_of(self.engine).ping(self.engine.dialect, connection.dbapi_connection)
            finally:
                connection.invalidate()  # Nothing is to be rolled back, for which it would ask once more.
        except Exception as error:
            problem = describe_error(error, self._application) or type(error).__name__
            answers.put(Answer(problem, self._is_refused_here(error)))
        else:
            answers.put(Answer())
            # Of several hosts in a URL the first may be silent for longer than anybody waits for this question.
            self._has_answered.set()
            self._reports.put((self, Answer()))
        finally:
            self._open.release()

    def _is_refused_here(self, error: Exception) -> bool:
        """Whether the driver does not even try, because it has no such option or value.

        All else may pass, also what a server says of a name, a password or a database: another program may be about
        to create them.
        """
        if isinstance(error, TypeError | ImportError | ArgumentError):
            return True
        kind = getattr(self.engine.dialect.dbapi, "ProgrammingError", ())
        original = getattr(error, "orig", None) or error
        driver = driver_of(self.engine)
        return isinstance(original, kind) and driver.name is not None and driver.code_of(original) is None


def wait_for(applications: list[SQLASessionMiddleware], timeout: float) -> bool:
    """Wait until every engine has answered once, and print what changes. Return whether all have.

    Exits with 2 if a driver refuses the settings of its engine.

    :param timeout: how many seconds to wait; with 0 each engine is asked once.
    """
    began = time.monotonic()
    deadline = began + timeout if timeout else None
    # Each engine's own thread is a little earlier.
    end = began + (timeout or TRY_TIMEOUT) + 0.2
    reports: SimpleQueue[tuple[Waited, Answer]] = SimpleQueue()
    missing = list(_engines_of(applications, reports))
    for each in missing:
        threading.Thread(target=each.ask_until_it_answers, args=(deadline,), daemon=True).start()
    # With a deadline an engine may report once more just before it. Without one, each reports once.
    unasked = set(missing)
    while missing and (unasked or deadline is not None):
        try:
            engine, answer = reports.get(timeout=max(0.0, end - time.monotonic()))
        except Empty:
            break
        unasked.discard(engine)
        if engine not in missing:
            continue
        if answer.problem is None:
            missing.remove(engine)
            click.echo(f"{engine.name}: answers after {time.monotonic() - began:.1f} s")
        elif answer.is_final:
            refuse(f"{engine.name} ({shown_url(engine.engine.url)}) cannot be asked: {answer.problem}")
        elif not (answer.is_cut and engine.problem):
            before, engine.problem = engine.problem, answer.problem
            if _without_numbers(before) != _without_numbers(answer.problem):
                click.echo(f"{engine.name}: {answer.problem}")
    for each in missing:
        complain(f"{each.name} ({shown_url(each.engine.url)}) does not answer: {each.problem}")
    return not missing


@contextmanager
def end_by_signals() -> Iterator[None]:
    """End at once by SIGTERM and SIGINT, with the status that says so, also as the first process of a container.

    There, the system ignores a signal that has no handler.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread may have handlers.
        return
    before = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: object) -> None:  # pragma: no cover  # in a process of its own
    sys.stdout.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # what a shell calls it


def _engines_of(
    applications: list[SQLASessionMiddleware], reports: SimpleQueue[tuple[Waited, Answer]]
) -> Iterator[Waited]:
    limited: set[Dialect] = set()
    for number, application in enumerate(applications, 1):
        prefix = f"{application.name or f'application {number}'}, " if len(applications) > 1 else ""
        for name, engine in application.engines.items():
            if engine.dialect not in limited:
                limited.add(engine.dialect)
                event.listen(engine, "do_connect", _limit)
            yield Waited(prefix + name, engine, application, reports)


def _limit(dialect: Dialect, record: object, arguments: list[Any], options: dict[str, Any]) -> None:
    """Have the driver itself end a question, where it can, soon after nobody waits for it. A shorter limit stays."""
    driver, seconds = driver_of(dialect), int(TRY_TIMEOUT) + 1
    for name in (driver.connect_timeout, driver.read_timeout):
        if name is not None:
            try:
                given = float(options.get(name) or seconds)
            except (TypeError, ValueError):
                continue  # The driver says what is wrong with it.
            if given >= seconds:
                options[name] = seconds


def _without_numbers(problem: str) -> str:
    """A problem without what may differ each time: ports, process ids, times."""
    return re.sub(r"\d+", "", problem)
