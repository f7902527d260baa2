"""Whether an idle connection still leads to its server, without asking the server.

A server that closes a connection says so, and then its socket has something to read. So the pool looks at the socket of
a connection before a request gets it, which takes a microsecond, and pings it only if there is something: it may be a
notice, a notification, or a ticket of TLS. A firewall says nothing when it forgets a connection. Therefore a connection
that was idle for long is pinged as well, and so is one whose socket is not known. A connection that does not answer is
replaced, with all that are older, as by SQLAlchemy's own ``pool_pre_ping``.
"""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import event
from sqlalchemy.exc import InvalidatePoolError

from .._dependencies import known_records, ping, take_pre_ping
from .._drivers.registry import driver_of
from ..failures import Failure, classify

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.engine import Dialect
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

__all__ = ["PING_AFTER", "has_to_ping_always", "ping_in_checkout", "replace_lost_connections"]

#: How many seconds a connection may be idle before it is pinged. It is shorter than what is known to forget silently:
#: Azure's load balancers after 240 seconds, AWS's NAT gateways after 350, GCP's firewalls after 600.
PING_AFTER: Final = 60.0

#: When the connection was returned, in ``ConnectionPoolEntry.info``, which is emptied with each new connection.
RETURNED: Final = "sqlasession_middleware.returned"


def _find_poll() -> Callable[[], Any] | None:
    """``select.poll()``, which takes descriptors of any number; None where there is none (Windows, eventlet).

    gevent's own is made for waiting: it may answer that there is nothing before it has asked the system.
    """
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and hasattr(select, "poll"):
        original: Callable[[], Any] = monkey.get_original("select", "poll")
        return original
    return getattr(select, "poll", None)


_poll = _find_poll()


#: A clock that nobody sets. On Linux, it goes on while the machine sleeps.
_seconds = partial(time.clock_gettime, time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic


def has_to_ping_always(ping_after: float | None) -> bool:
    """Whether there is nothing but ``pool_pre_ping``."""
    return _poll is None or ping_after == 0


def replace_lost_connections(engine: Engine, ping_after: float | None) -> None:
    """Have the pool of a new engine replace the connections that were lost while they were idle.

    :param ping_after: how many seconds a connection may be idle before it is pinged; None for ever, less than 0 to ping
        it at each use.
    """
    dialect, file_number = engine.dialect, driver_of(engine).file_number
    longest = float("inf") if ping_after is None else ping_after

    def look(driver_connection: Any, record: ConnectionPoolEntry, proxy: PoolProxiedConnection) -> None:
        returned = record.info.get(RETURNED)
        if returned is None:
            return  # It is new.
        if _seconds() - returned <= longest and is_silent(file_number(driver_connection)):
            return
        if not answers(dialect, driver_connection):
            raise InvalidatePoolError

    def note_return(driver_connection: Any, record: ConnectionPoolEntry) -> None:
        if driver_connection is not None:
            record.info[RETURNED] = _seconds()

    # First, because another listener may send something.
    event.listen(engine, "checkout", look, insert=True)
    event.listen(engine, "checkin", note_return)


def ping_in_checkout(engine: Engine) -> None:
    """Have a pool with ``pool_pre_ping`` send its pings among the listeners of ``checkout``, where one can be ended."""
    if take_pre_ping(engine.pool):
        for record in known_records(engine.pool):
            record.info[RETURNED] = 0.0  # Long ago: only new connections are not pinged.
        replace_lost_connections(engine, ping_after=-1)


def answers(dialect: Dialect, driver_connection: Any) -> bool:
    """Whether a connection answers a ping.

    :raises Exception: if it says anything else than that it is lost.
    """
    try:
        return ping(dialect, driver_connection)
    except Exception as error:
        # SQLAlchemy does not know each error of a lost connection, such as those of TLS.
        if classify(error) is Failure.LOST:
            return False
        raise


def is_silent(number: int | None) -> bool:
    """Whether a socket is open and has nothing to read, not even its end.

    :param number: its descriptor; None if that is not known.
    """
    if number is None or _poll is None:
        return False
    poll = _poll()
    poll.register(number, select.POLLIN)  # Errors and the end are always reported.
    return not poll.poll(0)
