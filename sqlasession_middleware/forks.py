"""A forked process shares no connection with its parent.

gunicorn with ``--preload``, uWSGI, :mod:`multiprocessing` and :func:`os.fork` all copy a process with its open sockets.
Two processes that speak on one socket mix up their answers, and what the child says there, be it only the goodbye of a
connection that is garbage collected, ends the parent's transaction. So the child begins with empty pools, and what it
has inherited can neither be used nor say anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

from sqlalchemy import Engine, event
from sqlalchemy.pool import Pool, QueuePool

from .context import Scope, current

if TYPE_CHECKING:
    from sqlalchemy.pool import ConnectionPoolEntry

Made = TypeVar("Made")

__all__ = ["after_fork", "check_process", "checking", "has_unseen_forks", "leave_to_parent"]

#: uWSGI's own module, which is only there in its processes
_uwsgi: Any = None
with contextlib.suppress(ImportError):
    _uwsgi = importlib.import_module("uwsgi")

#: Whether Python may not be told of forks. uWSGI forks in C, unless it is configured otherwise (its option
#: ``py-call-osafterfork``). Only there a process is asked who it is: that is a system call.
has_unseen_forks = _uwsgi is not None

_pid = os.getpid()
_engines: WeakSet[Engine] = WeakSet()
#: the pools' records of the connections of those engines
_records: WeakSet[ConnectionPoolEntry] = WeakSet()
#: the drivers' connections that were detached from their records
_detached: WeakSet[Any] = WeakSet()
#: what else is made anew in a child, such as a lock that another thread may have held
_renewals: list[Callable[[], None]] = []
#: keeps what a child has inherited from being garbage collected
_inherited: list[Any] = []
# What runs in a child is not measured: the tests of it are scripts that fork.

#: held, in a child, by the thread that has found out about the fork
_beginning = threading.Lock()
_beginner: int | None = None


def leave_to_parent(engine: Engine) -> None:
    """Have children that are forked from this process leave the connections of ``engine`` alone."""
    if has_unseen_forks:  # pragma: no cover  # in uWSGI
        _listen_to_uwsgi()
    if engine not in _engines:
        _engines.add(engine)
        event.listen(engine, "connect", _remember)
        event.listen(engine, "detach", _remember_detached)
        _records.update(_known_records(engine.pool))
        # What is out at the moment comes back some time. (Tested by a script that forks, which is not measured.)
        if isinstance(engine.pool, QueuePool) and engine.pool.checkedout():  # pragma: no cover
            event.listen(engine, "checkin", _remember)


def _known_records(pool: Pool) -> Iterable[ConnectionPoolEntry]:
    """What a pool that was given has connected before, and holds. No public names lead to it."""
    names = vars(pool)
    idle = getattr(names.get("_pool"), "queue", ())  # QueuePool
    only = (names.get("connection"), names.get("_conn"))  # StaticPool, AssertionPool
    known = (*idle, *only, *names.get("_all_conns", ()))  # SingletonThreadPool
    return [record for record in known if hasattr(record, "dbapi_connection")]


def _listen_to_uwsgi() -> None:  # pragma: no cover  # in uWSGI
    """Have uWSGI tell of its forks: the application may hold an engine, and use it without asking us for it."""
    # Not imported here: it takes the places of hooks that the application may have set by itself.
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
    """Decorator of a function that is called in each child."""
    _renewals.append(renew)
    return renew


def check_process() -> None:  # pragma: no cover
    """Find out about a fork that Python was not told of."""
    if os.getpid() != _pid and _beginner != threading.get_ident():
        with _beginning:
            if os.getpid() != _pid:
                _begin_anew()


def checking(make: Callable[..., Made]) -> Callable[..., Made]:
    """A function that finds out about a fork before it does what ``make`` does."""
    if not has_unseen_forks:
        return make

    def checked(*arguments: Any, **options: Any) -> Made:  # pragma: no cover  # in uWSGI
        check_process()
        return make(*arguments, **options)

    return checked  # pragma: no cover


def _remember(driver_connection: Any, record: ConnectionPoolEntry) -> None:
    _records.add(record)


def _remember_detached(driver_connection: Any, record: ConnectionPoolEntry) -> None:  # pragma: no cover  # by a script
    with contextlib.suppress(TypeError):  # SQLite's cannot be referred to weakly, and says nothing to a server.
        _detached.add(driver_connection)


def _close_idle_files() -> None:  # pragma: no cover  # in a script that forks
    """Before a fork: SQLite keeps the locks of a process, and the shared memory of a WAL, by file.

    A child would have a copy of that with any open connection, although it uses it never (SQLite's "How To Corrupt An
    SQLite Database File", 2.6): it would think the file locked by itself, and others the WAL to be nobody's.
    """
    for engine in list(_engines):
        if engine.dialect.name == "sqlite" and isinstance(engine.pool, QueuePool):
            # Not dispose(): who has a connection at the moment gives it back to this pool. No public name leads to what
            # is idle there; each of them connects anew when it is taken.
            idle: Any = engine.pool._pool
            with idle.mutex:
                for record in idle.queue:
                    record.close()


def _begin_anew() -> None:  # pragma: no cover
    global _beginner, _pid
    _beginner = threading.get_ident()
    for renew in _renewals:
        renew()
    for record in list(_records):
        driver_connection = record.dbapi_connection
        if driver_connection is not None:
            _silence(driver_connection)
            # SQLAlchemy's own recipe ("Using Connection Pools with Multiprocessing or os.fork()"): from now on nobody
            # who has the connection, or lets go of it, has anything to roll back.
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
        _keep(engine.pool)  # Nobody knows what else is in it.
        engine.dispose(close=False)
    # The request that has forked, and those around it: what was in their sessions is the parent's.
    scope: Any = current.get(None)
    while isinstance(scope, Scope):
        if scope.session is not None:
            _keep(scope.session)
            scope.session = None
        scope = scope.token.old_value if hasattr(scope, "token") else None
    _pid = os.getpid()
    _beginner = None


def _silence(driver_connection: Any) -> None:  # pragma: no cover
    """Keep a driver's connection from saying anything to the server, whoever calls it and whenever it is finalized."""
    _keep(driver_connection)
    number = _file_number(driver_connection)
    if number is not None:
        # Only in this process: the parent's descriptor goes on to be the socket.
        try:
            nothing = os.open(os.devnull, os.O_RDWR)
        except OSError:  # There is no free descriptor but the socket's own.
            os.close(number)
            nothing = os.open(os.devnull, os.O_RDWR)
        if nothing != number:
            os.dup2(nothing, number, inheritable=False)
            os.close(nothing)


def _file_number(driver_connection: Any) -> int | None:  # pragma: no cover
    """The descriptor of the socket, where the driver tells it; SQLite has none."""
    # MariaDB Connector/Python has a socket, and PyMySQL's is its own affair.
    for candidate in (driver_connection, *(getattr(driver_connection, name, None) for name in ("socket", "_sock"))):
        ask = getattr(candidate, "fileno", None)
        if ask is not None:
            try:
                number = ask()
            except Exception:  # It is closed.
                continue
            return number if isinstance(number, int) and number >= 0 else None
    return None


def _keep(inherited: Any) -> None:  # pragma: no cover
    """Never finalize an object, not even when the interpreter ends, which clears every list that there is."""
    _inherited.append(inherited)
    if platform.python_implementation() == "CPython":
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))


def _renew_lock_and_begin_anew() -> None:  # pragma: no cover
    global _beginning
    _beginning = threading.Lock()
    _begin_anew()


if hasattr(os, "register_at_fork"):  # pragma: no branch
    os.register_at_fork(before=_close_idle_files, after_in_child=_renew_lock_and_begin_anew)
