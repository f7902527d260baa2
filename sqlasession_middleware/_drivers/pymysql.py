"""PyMySQL."""

from __future__ import annotations

from typing import Any

from .._dependencies import answers_within, socket_of
from .answers import file_number_of, first_argument
from .mysql import MySQLDriver, number_of
from .server import Code

__all__ = ["PyMySQL"]


class PyMySQL(MySQLDriver):
    """PyMySQL."""

    name = module = "pymysql"
    connect_timeout = "connect_timeout"
    read_timeout = "read_timeout"
    can_tell_rest = True
    # Its cursors call query(), and so do kill() and init_command.
    sending = (
        *("query", "begin", "select_db", "autocommit", "show_warnings", "set_character_set", "write_packet"),
        *("connect", "close"),
    )

    def connect_with(self, module: Any, kind: type, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Have ``connect_timeout`` limit the wait for each answer of the server as well, as with other drivers.

        PyMySQL by itself waits without end for a server that accepts a connection and says nothing.
        """
        if options.get("read_timeout") is not None or options.get("defer_connect"):
            return super().connect_with(module, kind, arguments, options)
        connection = kind(*arguments, **{**options, "defer_connect": True})
        with answers_within(connection, connection.connect_timeout):
            connection.connect()
        return connection

    def code_of(self, error: object) -> Code:
        return number_of(first_argument(error))

    def file_number(self, driver_connection: Any) -> int | None:
        return file_number_of(socket_of(driver_connection))
