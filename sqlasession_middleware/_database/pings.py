"""Asks engines whether their servers answer, outside of their pools and without waiting for ever.

A pool whose connections are all in use would make the question wait for its turn, and a busy site would look like one
whose database is away. So each ping opens a connection of its own, as the engine's pool would open one: with the URL,
the arguments, the ``creator`` and the ``do_connect`` events of the engine. It is closed at once.

A server may accept a connection and say nothing, and not every driver has a timeout for each way to do so. So each ping
runs in a thread of its own, and whoever asks does not wait longer than it wants to. What the driver can limit is
limited, so that the thread ends as well. If it does not, it is not joined by others: whoever asks next learns at once
that the server is still silent.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import Context, ContextVar
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from sqlalchemy import Engine, event
from sqlalchemy.pool import NullPool, StaticPool

from .._dependencies import call_first, creator_of, known_records
from .._drivers.registry import driver_of
from .forks import fork_safe_lock, leave_pool_to_parent
from .pool import has_open_connections, is_full

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect
    from sqlalchemy.pool import ConnectionPoolEntry, Pool

__all__ = ["PATIENCE", "SharedConnection", "State", "ask_engines", "own_connection", "prepare_pings"]

logger = logging.getLogger("sqlasession_middleware.health")

#: How many seconds a ping may hang that nothing has ended, before another one is tried beside it. The time doubles with
#: each that hangs, so that an outage of a day leaves a dozen threads.
PATIENCE: Final = 60.0

#: How long the driver may take to connect. Set while a connection is opened for a ping.
_seconds: ContextVar[int | None] = ContextVar("sqlasession_middleware.ping", default=None)

_lock = fork_safe_lock()


class State(StrEnum):
    """What is told of an engine."""

    OK = "ok"
    #: The server answers, and a request would have to wait for a connection.
    FULL = "pool full"
    SLOW = "too slow"
    AWAY = "out of reach"

    @property
    def answers(self) -> bool:
        """Whether the server can be reached."""
        return self is State.OK or self is State.FULL


def ask_engines(
    engines: Mapping[str, Engine], seconds: float, without_secrets: Callable[[str], str], of_name: str = ""
) -> dict[str, State]:
    """Ask all engines at the same time, and return what is known of each after ``seconds`` at the latest.

    :param engines: by their names in the log.
    :param without_secrets: removes passwords from a driver's message.
    :param of_name: how the log goes on that names an engine.
    """
    deadline = time.monotonic() + seconds
    begun = {name: _pinger_of(engine).begin(engine, seconds) for name, engine in engines.items()}
    states = {}
    for name, ping in begun.items():
        state, why = ping.result(engines[name], deadline)
        states[name] = state
        _pinger_of(engines[name]).note(f"{name!r}{of_name}", state, without_secrets(why))
    return states


class _Ping:
    """One question to one engine, in a thread of its own.

    It does not refer to the engine, which nothing here keeps alive.
    """

    def __init__(self, seconds: float) -> None:
        self.began = time.monotonic()
        self.process = os.getpid()
        #: set when the thread has ended, and its connection is closed
        self.ended = threading.Event()
        self._timeout = seconds
        #: what is wrong, and whether the server has refused the connection as one too many
        self._problem: str | None = None
        self._is_one_too_many = False
        #: ends the wait for its connection, as soon as it has one
        self._end_wait: Callable[[], None] | None = None
        self._is_cut = False

    def start(self, engine: Engine) -> None:
        """Ask, in a thread."""
        # A context of its own: what the connection's events find in it is not the request's.
        run = Context().run
        try:
            threading.Thread(target=run, args=(self._run, engine), name="sqlasession-ping", daemon=True).start()
        except RuntimeError as error:  # The process may not start more threads.
            self._problem = _said(error)
            self.ended.set()

    def result(self, engine: Engine, deadline: float) -> tuple[State, str]:
        """What is known at ``deadline``, or as soon as the ping has taken too long, and why.

        :param deadline: by time.monotonic().
        """
        until = min(deadline, self.began + self._timeout)
        if not self.ended.wait(max(0.0, until - time.monotonic())):
            self._cut()
        if self._is_cut:
            return State.SLOW, f"no answer within {self._timeout:g} s"
        if self._problem is not None:
            # The application may have the last of the connections that the server admits.
            works = self._is_one_too_many and has_open_connections(engine.pool)
            return State.FULL if works else State.AWAY, self._problem
        if is_full(engine.pool):
            return State.FULL, "each connection is in use, and requests wait for one"
        return State.OK, ""

    def _run(self, engine: Engine) -> None:
        try:
            self._ask(engine)
        except BaseException as error:  # Whatever a creator raises, SystemExit as well.
            self._problem = _said(error)
            self._is_one_too_many = driver_of(engine).refuses_one_more(error)
        finally:
            self._end_wait = None
            self.ended.set()

    def _ask(self, engine: Engine) -> None:
        driver = driver_of(engine)
        # One more than it is waited for, so that it is always the same of the two that ends first.
        seconds = math.ceil(self._timeout) + 1
        with suppress(SharedConnection), own_connection(engine, seconds) as driver_connection:
            self._end_wait = partial(driver.cut, driver_connection)
            driver.ping(engine.dialect, driver_connection)

    def _cut(self) -> None:
        """End a ping that hangs on a connection: its thread gets an error."""
        self._is_cut = True
        end_wait = self._end_wait
        if end_wait is not None:
            with suppress(OSError):  # It is closed in this moment. Windows has no duplicate of a socket's number.
                end_wait()


class _Pinger:
    """The pings of one engine: one at a time, whoever asks."""

    def __init__(self) -> None:
        self._last: _Ping | None = None
        self._patience = PATIENCE
        self._state = State.OK

    def begin(self, engine: Engine, seconds: float) -> _Ping:
        """Return the ping that runs, or a new one."""
        with _lock:
            last = self._last
            if last is not None and not last.ended.is_set() and last.process == os.getpid():  # A fork has no threads.
                if time.monotonic() - last.began < self._patience:
                    return last
                self._patience *= 2
            else:
                self._patience = PATIENCE
            ping = self._last = _Ping(seconds)
        ping.start(engine)
        return ping

    def note(self, told: str, state: State, why: str) -> None:
        """Log a state, if it is another one than before.

        :param told: how the log names the engine.
        """
        with _lock:
            before, self._state = self._state, state
        if state is before:
            return
        if state is State.OK:
            logger.warning("The health check finds the engine %s ok again", told)
        else:
            logger.warning("The health check finds the engine %s %s: %s", told, state, why)


_pingers: WeakKeyDictionary[Engine, _Pinger] = WeakKeyDictionary()


def prepare_pings(engine: Engine) -> None:
    """Have an engine limit how long a ping's connection may take.

    It is best done before anything connects: a listener that is added while another thread calls those that there are
    makes it fail.
    """
    _pinger_of(engine)


def _pinger_of(engine: Engine) -> _Pinger:
    with _lock:
        pinger = _pingers.get(engine)
        if pinger is None:
            pinger = _pingers[engine] = _Pinger()
            event.listen(engine, "do_connect", _connect_for_ping)
            # First, so that the others are called once.
            call_first(engine, _connect_for_ping, "do_connect")
        return pinger


def _connect_for_ping(dialect: Dialect, record: Any, arguments: list[Any], options: dict[str, Any]) -> Any:
    """A listener of ``do_connect`` that makes a ping's connection. Those of the application are not its affair.

    It works on copies: older versions of SQLAlchemy, such as 2.0.31, have one list and one dict for all connections
    of an engine.
    """
    seconds = _seconds.get()
    if seconds is None:
        return None
    _seconds.set(None)
    arguments, options = list(arguments), dict(options)
    for listener in list(dialect.dispatch.do_connect):
        connection = listener(dialect, record, arguments, options)  # This one returns None by now.
        if connection is not None:
            return connection
    driver_of(dialect).prepare_ping(arguments, options, seconds)
    return dialect.connect(*arguments, **options)


def _said(error: BaseException) -> str:
    """An error on one line. Its traceback would keep the engine alive."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class SharedConnection(Exception):  # noqa: N818  # no error
    """An engine's creator returns one connection again and again, which the application uses."""


@contextmanager
def own_connection(engine: Engine, seconds: int) -> Iterator[Any]:
    """A driver connection that is opened as the engine's pool would open one, outside of it, and closed at the end.

    :param seconds: how long the driver may take to connect, as far as it can be told. See :func:`prepare_pings`.
    :raises SharedConnection: if there is no such connection.
    """
    pool = NullPool(_own_creator(engine.pool, seconds), dialect=engine.dialect, reset_on_return=None)
    leave_pool_to_parent(pool)
    connection = pool.connect()
    try:
        yield connection.dbapi_connection
    finally:
        connection.close()


def _own_creator(pool: Pool, seconds: int) -> Any:
    """Return what opens a connection as a pool does, and raises :class:`SharedConnection` if it is not a new one.

    Whatever is asked on a connection that the application uses at the same time, or closes it, breaks a request.
    """
    create_any = creator_of(pool)

    def create(record: ConnectionPoolEntry) -> Any:
        _seconds.set(seconds)
        return create_any(record)

    def create_own(record: ConnectionPoolEntry) -> Any:
        connection = create(record)
        known = [each.dbapi_connection for each in known_records(pool)]
        if any(each is connection for each in known):
            raise SharedConnection
        if isinstance(pool, StaticPool) and not known:
            # Its creator is made to be called once, and the pool has not done so yet.
            another = create(record)
            if another is connection:
                raise SharedConnection
            another.close()
        return connection

    return create_own
