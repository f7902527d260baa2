"""A forked process shares no connection with its parent.

gunicorn with ``--preload``, uWSGI, :mod:`multiprocessing` and :func:`os.fork` all copy a process with its open sockets.
Two processes that speak on one socket mix up their answers, and what the child says there, be it only the goodbye of a
connection that is garbage collected, ends the parent's transaction. So the child begins with empty pools, and what it
has inherited can neither be used nor say anything.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from sqlalchemy import Engine, event

from .context import Scope, current

if TYPE_CHECKING:
    from sqlalchemy.pool import ConnectionPoolEntry

__all__ = ["after_fork", "check_process", "leave_to_parent"]

_pid = os.getpid()
_engines: WeakSet[Engine] = WeakSet()
#: the pools' records of the connections of those engines
_records: WeakSet[ConnectionPoolEntry] = WeakSet()
#: what else is made anew in a child, such as a lock that another thread may have held
_renewals: list[Callable[[], None]] = []
#: keeps what a child has inherited from being garbage collected
_inherited: list[Any] = []


def leave_to_parent(engine: Engine) -> None:
    """Have children that are forked from this process leave the connections of ``engine`` alone."""
    if engine not in _engines:
        _engines.add(engine)
        event.listen(engine, "connect", _remember)


def after_fork(renew: Callable[[], None]) -> Callable[[], None]:
    """Decorator of a function that is called in each child."""
    _renewals.append(renew)
    return renew


def check_process() -> None:
    """Find out about a fork that Python was not told of: uWSGI forks in C."""
    if os.getpid() != _pid:
        _begin_anew()


def _remember(driver_connection: Any, record: ConnectionPoolEntry) -> None:
    _records.add(record)


def _begin_anew() -> None:
    global _pid
    _pid = os.getpid()
    for renew in _renewals:
        renew()
    for record in list(_records):
        driver_connection = record.dbapi_connection
        if driver_connection is not None:
            _silence(driver_connection)
            # SQLAlchemy's own recipe ("Using Connection Pools with Multiprocessing or os.fork()"): from now on nobody
            # who lets go of the record, and no garbage collection, has anything to roll back.
            record.dbapi_connection = None  # type: ignore[misc]  # of a base class with other slots
    _records.clear()
    for engine in list(_engines):
        _keep(engine.pool)  # A given engine may have made connections before anybody remembered them.
        engine.dispose(close=False)
    # The request that has forked, and those around it: what was in their sessions is the parent's.
    scope: Any = current.get(None)
    while isinstance(scope, Scope):
        if scope.session is not None:
            _keep(scope.session)
            scope.session = None
        scope = scope.token.old_value if hasattr(scope, "token") else None


def _silence(driver_connection: Any) -> None:
    """Keep a driver's connection from saying anything to the server, whoever calls it and whenever it is finalized."""
    _keep(driver_connection)
    number = _file_number(driver_connection)
    if number is not None:
        nothing = os.open(os.devnull, os.O_RDWR)
        # Only in this process: the parent's descriptor goes on to be the socket.
        os.dup2(nothing, number, inheritable=False)
        os.close(nothing)


def _file_number(driver_connection: Any) -> int | None:
    """The descriptor of the socket, where the driver tells it; SQLite has none."""
    for candidate in (driver_connection, getattr(driver_connection, "_sock", None)):  # PyMySQL's is in _sock.
        ask = getattr(candidate, "fileno", None)
        if ask is not None:
            try:
                number = ask()
            except Exception:  # It is closed.
                continue
            return number if isinstance(number, int) and number >= 0 else None
    return None


def _keep(inherited: Any) -> None:
    """Never finalize an object, not even when the interpreter ends, which clears every list that there is."""
    _inherited.append(inherited)
    if platform.python_implementation() == "CPython":
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
