"""A forked process shares no connection with its parent.

gunicorn with ``--preload``, uWSGI, :mod:`multiprocessing` and :func:`os.fork` all copy a process with its open sockets.
Two processes on one socket mix up their answers, and whatever the child sends there ends the parent's transaction, even
the last message of a connection that is garbage collected. So the child process starts with empty pools, and an
inherited connection can neither be used nor send anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import platform
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

from sqlalchemy import Engine, event
from sqlalchemy.pool import QueuePool

from .._dependencies import idle_queue, known_records, reinitialize_lock
from .._drivers.registry import driver_of, driver_that_made
from .._scope.scope import current, outwards

if TYPE_CHECKING:
    from sqlalchemy.pool import ConnectionPoolEntry, Pool

    from .._scope.scope import Scope

Made = TypeVar("Made")

__all__ = [
    "after_fork",
    "check_process",
    "checking",
    "fork_safe_lock",
    "has_unseen_forks",
    "leave_pool_to_parent",
    "leave_session_to_parent",
    "leave_to_parent",
    "pid",
]

#: uWSGI's own module, which exists only in its processes
_uwsgi: Any = None
with contextlib.suppress(ImportError):
    _uwsgi = importlib.import_module("uwsgi")

#: Whether Python may not be told of forks. uWSGI forks in C, unless its option ``py-call-osafterfork`` is set. Only
#: there this module asks for the process id, which is a system call.
has_unseen_forks = _uwsgi is not None

#: the process id, up to date after :func:`check_process`
pid = os.getpid()
_engines: WeakSet[Engine] = WeakSet()
#: the pools' records of the connections of these engines
_records: WeakSet[ConnectionPoolEntry] = WeakSet()
#: the drivers' connections that were detached from their records
_detached: WeakSet[Any] = WeakSet()
#: what else is called in a child, such as the reinitialization of a lock
_renewals: list[Callable[[], None]] = []
#: what a child has inherited, to protect it from garbage collection
_inherited: list[Any] = []
# Coverage is not measured in a child: the tests of it are scripts that fork.

#: held, in a child, by the thread that has detected the fork
_beginning = threading.Lock()
_beginner: int | None = None


def leave_to_parent(engine: Engine) -> None:
    """Leave the connections of an engine to this process when it forks."""
    if has_unseen_forks:  # pragma: no cover  # in uWSGI
        _listen_to_uwsgi()
    if engine not in _engines:
        _engines.add(engine)
        event.listen(engine, "connect", _remember)
        event.listen(engine, "detach", _remember_detached)
        _records.update(known_records(engine.pool))
        # Connections that are already checked out are recorded when they are returned. (Tested by a script that forks,
        # without coverage.)
        if isinstance(engine.pool, QueuePool) and engine.pool.checkedout():  # pragma: no cover
            event.listen(engine, "checkin", _remember)


def leave_pool_to_parent(pool: Pool) -> None:
    """Leave the connections of a new pool, which belongs to no engine, to this process when it forks."""
    event.listen(pool, "connect", _remember)


def _listen_to_uwsgi() -> None:  # pragma: no cover  # in uWSGI
    """Let uWSGI report its forks: the application may use an engine without this library."""
    # uwsgidecorators is not imported here: it replaces hooks that the application may have set.
    chain = getattr(sys.modules.get("uwsgidecorators"), "postfork_chain", None)
    if chain is not None:
        if check_process not in chain:
            chain.insert(0, check_process)
        return
    before = getattr(_uwsgi, "post_fork_hook", None)
    if getattr(before, "func", None) is not _check_before:
        _uwsgi.post_fork_hook = partial(_check_before, before)


def _check_before(hook: Callable[[], object] | None) -> None:  # pragma: no cover  # in uWSGI
    check_process()
    if hook is not None:
        hook()


def after_fork(renew: Callable[[], None]) -> Callable[[], None]:
    """Call the decorated function in each child."""
    _renewals.append(renew)
    return renew


def fork_safe_lock() -> threading.RLock:
    """A lock that is free in a child, whichever thread of the parent holds it."""
    lock = threading.RLock()
    after_fork(partial(reinitialize_lock, lock))
    return lock


def check_process() -> None:  # pragma: no cover
    """Detect a fork that Python was not told of."""
    if os.getpid() != pid and _beginner != threading.get_ident():
        with _beginning:
            if os.getpid() != pid:
                _begin_anew()


def checking(make: Callable[..., Made]) -> Callable[..., Made]:
    """Wrap a function so that it detects a fork before it runs."""
    if not has_unseen_forks:
        return make

    def checked(*arguments: Any, **options: Any) -> Made:  # pragma: no cover  # in uWSGI
        check_process()
        return make(*arguments, **options)

    return checked  # pragma: no cover


def _remember(driver_connection: Any, record: ConnectionPoolEntry) -> None:
    _records.add(record)


def _remember_detached(driver_connection: Any, record: ConnectionPoolEntry) -> None:  # pragma: no cover  # by a script
    with contextlib.suppress(TypeError):  # SQLite's has no weak references, and no server to send to.
        _detached.add(driver_connection)


def leave_session_to_parent(scope: Scope) -> None:
    """Forget the Session of a scope if this process has inherited it: the parent closes it."""
    check_process()
    if scope.session is not None and scope.process != pid:  # pragma: no cover  # in a script that forks
        _keep(scope.session)
        scope.session = None


def _close_idle_files() -> None:  # pragma: no cover  # in a script that forks
    """Before a fork, close idle connections to SQLite's files.

    SQLite keeps the locks of a process, and the shared memory of a WAL, by file. With any connection that is open in
    the fork the child has a copy of both, although it never uses the connection: it would take the file for locked by
    itself, and other processes the WAL for unused (SQLite's "How To Corrupt An SQLite Database File", 2.6).
    """
    for engine in list(_engines):
        if driver_of(engine).server.locks_by_process and isinstance(engine.pool, QueuePool):
            # A record that is closed connects again when it is checked out.
            idle = idle_queue(engine.pool)
            with idle.mutex:
                for record in idle.queue:
                    record.close()


def _begin_anew() -> None:  # pragma: no cover
    global _beginner, pid
    _beginner = threading.get_ident()
    for renew in _renewals:
        renew()
    for record in list(_records):
        driver_connection = record.dbapi_connection
        if driver_connection is not None:
            _silence(driver_connection)
            # SQLAlchemy's own recipe ("Using Connection Pools with Multiprocessing or os.fork()"): from now on there
            # is nothing to roll back, whoever has the connection or returns it.
            record.dbapi_connection = None  # type: ignore[misc]  # of a base class with other slots
            used = getattr(record, "fairy_ref", None)
            proxy = None if used is None else used()
            if proxy is not None:
                proxy.dbapi_connection = None
    _records.clear()
    for driver_connection in list(_detached):
        _silence(driver_connection)
    _detached.clear()
    for engine in list(_engines):
        _keep(engine.pool)  # It may refer to other objects of the driver.
        engine.dispose(close=False)
    # The sessions of the request that has forked, and of the requests around it, are the parent's.
    for scope in outwards(current.get(None)):
        if scope.session is not None:
            _keep(scope.session)
            scope.session = None
    pid = os.getpid()
    _beginner = None


def _silence(driver_connection: Any) -> None:  # pragma: no cover
    """Keep a driver connection from sending anything, whoever calls it and whenever it is finalized."""
    _keep(driver_connection)
    number = driver_that_made(driver_connection).file_number(driver_connection)
    if number is not None:
        # This replaces the socket in this process only. The parent's descriptor is not affected.
        try:
            nothing = os.open(os.devnull, os.O_RDWR)
        except OSError:  # There is no free descriptor except the socket's own.
            os.close(number)
            nothing = os.open(os.devnull, os.O_RDWR)
        if nothing != number:
            os.dup2(nothing, number, inheritable=False)
            os.close(nothing)


def _keep(inherited: Any) -> None:  # pragma: no cover
    """Never finalize an object, not even when the interpreter exits and clears all lists."""
    _inherited.append(inherited)
    if platform.python_implementation() == "CPython":
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))


def _release_lock_and_begin_anew() -> None:  # pragma: no cover
    reinitialize_lock(_beginning)
    _begin_anew()


if hasattr(os, "register_at_fork"):  # pragma: no branch
    os.register_at_fork(before=_close_idle_files, after_in_child=_release_lock_and_begin_anew)
