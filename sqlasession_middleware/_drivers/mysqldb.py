"""mysqlclient, whose module is MySQLdb."""

from __future__ import annotations

from typing import Any, Final

from .answers import file_number_of, first_argument, read_attribute
from .mysql import MySQLDriver, number_of
from .server import Code

__all__ = ["MySQLdb"]

#: The attribute of a connection with its number at the server and that of its socket, while it is watched.
_NUMBERS: Final = "sqlasession_numbers"


class MySQLdb(MySQLDriver):
    """mysqlclient."""

    name = "mysqldb"
    module = "MySQLdb"
    connect_timeout = "connect_timeout"
    read_timeout = "read_timeout"
    # What such a file says takes precedence over the argument.
    option_files = ("read_default_file", "read_default_group")
    can_tell_rest = True
    # Its cursors call query(). It has other commands: stat(), ping(), kill() and the like ask for no data.
    sending = ("query", "send_query", "select_db", "change_user", "autocommit", "close")

    def code_of(self, error: object) -> Code:
        return number_of(first_argument(error))

    def file_number(self, driver_connection: Any) -> int | None:
        number = file_number_of(driver_connection)
        if number is None and read_attribute(driver_connection, "open"):
            return _numbers_of(driver_connection)[1]
        return number

    def prepare_for_watch(self, driver_connection: Any) -> None:
        # Since 2.3 its methods refuse to be called in another thread while it is in use.
        setattr(driver_connection, _NUMBERS, (driver_connection.thread_id(), file_number_of(driver_connection)))

    def connection_number(self, driver_connection: Any) -> int | None:
        return _numbers_of(driver_connection)[0]


def _numbers_of(driver_connection: Any) -> tuple[int | None, int | None]:
    found: tuple[int | None, int | None] = getattr(driver_connection, _NUMBERS, (None, None))
    return found
