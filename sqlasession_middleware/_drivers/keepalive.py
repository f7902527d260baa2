"""How the operating system finds out that nobody is at the other end of a connection any more.

Without this, what waits for an answer waits for hours: TCP by itself sends nothing while it waits. With keepalives it
asks the other system after :data:`IDLE` seconds, and every :data:`INTERVAL` seconds until it answers. What was sent and
is not acknowledged is sent again for a quarter of an hour on Linux, and with ``TCP_USER_TIMEOUT`` for
:data:`UNACKNOWLEDGED` seconds. Both end after the same time: on Linux the latter also counts in place of
:data:`COUNT`, and if it were shorter, one packet that is lost would end an idle connection.

The other system answers, and not the server: one that hangs or was stopped is as good as any.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

__all__ = ["COUNT", "IDLE", "INTERVAL", "UNACKNOWLEDGED", "duplicate", "keep_alive"]

#: After how many seconds of silence the other system is asked. Shorter than what firewalls and balancers forget after.
IDLE: Final = 30
#: Seconds between two questions.
INTERVAL: Final = 10
#: How many questions in a row may go unanswered.
COUNT: Final = 3
#: How many seconds the other system may take to acknowledge, or to have room for, what was sent.
UNACKNOWLEDGED: Final = IDLE + INTERVAL * COUNT

#: The options of a socket and their values. A system may not have all of them. macOS has another name for the first.
_OPTIONS: Final = {
    number: value
    for name, value in (
        ("TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE", IDLE),
        ("TCP_KEEPINTVL", INTERVAL),
        ("TCP_KEEPCNT", COUNT),
        ("TCP_USER_TIMEOUT", UNACKNOWLEDGED * 1000),
    )
    if (number := getattr(socket, name, None)) is not None
}


def keep_alive(number: int) -> None:
    """Set the options of a socket of TCP, unless someone else has set any of them.

    :param number: the socket's descriptor.
    """
    if os.name != "posix":
        return  # Windows has other numbers for sockets than for files.
    with suppress(OSError), duplicate(number) as found:  # It may be closed, or no socket.
        if found.family in (socket.AF_INET, socket.AF_INET6) and not _has_own_options(found):
            _set_options(found)


@contextmanager
def duplicate(number: int) -> Iterator[socket.socket]:
    """A socket of Python's, to be closed without closing the driver's."""
    blocking = os.get_blocking(number)
    try:
        with socket.socket(fileno=os.dup(number)) as found:
            yield found
    finally:
        # That of gevent is non-blocking, and so is any with socket.setdefaulttimeout(): both descriptors with it.
        os.set_blocking(number, blocking)


def _set_options(found: socket.socket) -> None:
    found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for number, value in _OPTIONS.items():
        with suppress(OSError):  # The system may not have what Python was compiled with.
            found.setsockopt(socket.IPPROTO_TCP, number, value)


def _has_own_options(found: socket.socket) -> bool:
    """Whether an option differs from that of a new socket, as a listener of an application may have set it."""
    with socket.socket(found.family, socket.SOCK_STREAM) as new:
        return any(_option(found, number) != _option(new, number) for number in _OPTIONS)


def _option(found: socket.socket, number: int) -> int | None:
    try:
        return found.getsockopt(socket.IPPROTO_TCP, number)
    except OSError:
        return None
