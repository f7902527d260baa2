"""The drivers that are known, and which of them to ask.

To add a driver: a module like ``mysqldb.py``, and an entry in :data:`DRIVERS`. To add a server: a module like
``mysql.py``, with a class for any driver of it, and an entry in :data:`OTHERS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from .driver import Driver
from .mariadb import MariaDBConnector
from .mysql import MySQLDriver
from .mysqldb import MySQLdb
from .postgresql import PostgreSQLDriver
from .psycopg import Psycopg
from .psycopg2 import Psycopg2
from .pymysql import PyMySQL
from .server import Server
from .sqlite import SQLite3, SQLiteDriver

if TYPE_CHECKING:
    from sqlalchemy import URL, Connection, Dialect, Engine
    from sqlalchemy.engine import ExceptionContext, ExecutionContext

__all__ = ["DRIVERS", "SERVER_NAMES", "UNKNOWN", "driver_by_dialect", "driver_of", "driver_that_made", "server_of_url"]

#: The drivers that are known.
DRIVERS: Final[Sequence[Driver]] = (Psycopg(), Psycopg2(), PyMySQL(), MySQLdb(), MariaDBConnector(), SQLite3())

#: For any other driver of a known server.
OTHERS: Final[Sequence[Driver]] = (PostgreSQLDriver(), MySQLDriver(), SQLiteDriver())

#: For any other driver of any other server.
UNKNOWN: Final = Driver()

_BY_NAME: Final[Mapping[Any, Driver]] = {driver.name: driver for driver in DRIVERS}
_BY_MODULE: Final[Mapping[Any, Driver]] = {driver.module: driver for driver in DRIVERS}
_BY_SERVER: Final[Mapping[Any, Driver]] = {name: driver for driver in OTHERS for name in driver.server.names}

#: The names of the dialects of known servers.
SERVER_NAMES: Final = tuple(_BY_SERVER)


class _ByDialect(dict["type[Dialect]", Driver]):
    def __missing__(self, dialect: type[Dialect]) -> Driver:
        """The driver that a dialect uses, with the server that the dialect is for.

        A dialect of another name is derived from one that is known: what it does not say by its own names, the classes
        that it inherits from say.
        """
        server = _BY_SERVER.get(dialect.name)
        drivers = (_BY_NAME.get(vars(kind).get("driver")) for kind in dialect.__mro__)
        servers = (_BY_SERVER.get(vars(kind).get("name")) for kind in dialect.__mro__)
        known = next((each for each in (*drivers, *servers) if each is not None), UNKNOWN)
        found = self[dialect] = known.working_with(None if server is None else server.server)
        return found


#: The driver of a class of dialects: ``driver_by_dialect[type(connection.dialect)]``. It is one look-up in a dict, for
#: what runs in each request; elsewhere :func:`driver_of` reads better.
driver_by_dialect: Final = _ByDialect()


def driver_of(bound: Connection | Engine | Dialect | ExceptionContext | ExecutionContext) -> Driver:
    """The driver of a dialect, or of what has one."""
    return driver_by_dialect[type(bound.dialect if hasattr(bound, "dialect") else bound)]


def driver_that_made(made: object) -> Driver:
    """The driver that an error or a driver connection comes from, by the modules of its classes."""
    for kind in type(made).__mro__:
        try:
            module = kind.__module__
        except Exception:
            continue
        driver = _BY_MODULE.get(module.partition(".")[0]) if type(module) is str else None
        if driver is not None:
            return driver
    return UNKNOWN


def server_of_url(url: URL) -> Server:
    """The server that a URL leads to. The driver need not be installed."""
    return _BY_SERVER.get(url.get_backend_name(), UNKNOWN).server
