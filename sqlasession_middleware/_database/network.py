"""Limits for how long a connection waits for a network, where the application has set none.

The defaults of operating systems and drivers are made for connections that may rest for days. A server that is gone
without a word, because its machine has lost its power or something drops its packets, would keep a request for minutes
when it connects, for a quarter of an hour when it sends, and for hours when it waits for an answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import event

from .._drivers.keepalive import keep_alive
from .._drivers.registry import driver_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy import Engine

__all__ = ["CONNECT_TIMEOUT", "leaves_network_to_us", "limit_network_waits"]

#: Seconds in which a server has to accept a connection. A packet that is lost is sent again after 1, 3 and 7 seconds.
CONNECT_TIMEOUT: Final = 10

#: The options by which an application has its connections from elsewhere, or from a driver that it has chosen itself.
_DECIDED: Final = {"creator", "module", "pool"}


def leaves_network_to_us(options: Collection[str]) -> bool:
    """Whether the options of an engine have the driver's own ``connect()`` make its connections."""
    return _DECIDED.isdisjoint(options)


def limit_network_waits(engine: Engine, connect_timeout: int) -> None:
    """Add to the arguments of a new engine's driver what the application has not said, and set its sockets likewise.

    :param connect_timeout: in seconds.
    """
    driver = driver_of(engine)
    if not driver.server.is_networked:
        return

    # Only here it is known what the URL, ``connect_args``, plugins and the environment come to.
    def complete(dialect: Any, record: Any, arguments: list[Any], options: dict[str, Any]) -> None:
        for name, value in driver.network_defaults(dialect.dbapi, arguments, options, connect_timeout).items():
            options.setdefault(name, value)
        driver.limit_connecting(dialect.dbapi, options)

    def watch(driver_connection: Any, record: Any) -> None:
        number = driver.file_number(driver_connection)
        if number is not None:
            keep_alive(number)

    event.listen(engine, "do_connect", complete)
    if not driver.keeps_alive:
        # First, because another listener may send something.
        event.listen(engine, "connect", watch, insert=True)
