"""A forked process shares no connection with its parent.

gunicorn with ``--preload``, uWSGI, :mod:`multiprocessing` and :func:`os.fork` all copy a process with its open sockets.
Two processes that speak on one socket mix up their answers, and what the child says there, be it only the goodbye of a
connection that is garbage collected, ends the parent's transaction. So the child begins with empty pools, and what it
has inherited can neither be used nor say anything.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

from sqlalchemy import Engine, event

from .context import Scope, current

if TYPE_CHECKING:
    from sqlalchemy.pool import ConnectionPoolEntry

Made = TypeVar("Made")

__all__ = ["after_fork", "check_process", "checking", "has_unseen_forks", "leave_to_parent"]

try:
    importlib.import_module("uwsgi")
except ImportError:
    has_unseen_forks = False
else:  # pragma: no cover
    #: Whether Python may not be told of forks. uWSGI forks in C, unless it is configured otherwise (its option
    #: ``py-call-osafterfork``). Only there a process is asked who it is: that is a system call.
    has_unseen_forks = True

_pid = os.getpid()
_engines: WeakSet[Engine] = WeakSet()
#: the pools' records of the connections of those engines
_records: WeakSet[ConnectionPoolEntry] = WeakSet()
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
    if engine not in _engines:
        _engines.add(engine)
        event.listen(engine, "connect", _remember)
        # What a given engine has connected before lies in its pool, and no public name leads to it.
        for record in list(getattr(getattr(engine.pool, "_pool", None), "queue", ())):
            _records.add(record)


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
        nothing = os.open(os.devnull, os.O_RDWR)
        # Only in this process: the parent's descriptor goes on to be the socket.
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
    os.register_at_fork(after_in_child=_renew_lock_and_begin_anew)
