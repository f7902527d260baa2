"""MariaDB Connector/Python."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, Final

from .._dependencies import LAST_STATEMENT, socket_number_of
from .answers import read_attribute
from .mysql import MySQLDriver, number_of
from .server import Code

__all__ = ["MariaDBConnector"]

#: Cursors whose rows have ended with an error that was raised here. An error and its frames lead to each other, and to
#: the cursor. Of a cursor that the garbage collector takes, the driver (1.1.14) releases the connection twice, which
#: ends the process at some later time. So they are kept until nothing else leads to them.
_failed: Final[deque[Any]] = deque()


class MariaDBConnector(MySQLDriver):
    """MariaDB Connector/Python."""

    name = "mariadbconnector"
    module = "mariadb"
    connect_timeout = "connect_timeout"
    read_timeout = "read_timeout"
    # What such a file says takes precedence over the argument.
    option_files = ("default_file", "default_group")
    can_tell_rest = True
    ends_rows_silently = True
    # Its cursors send by themselves. They note each statement before.
    sending = (
        *("begin", "select_db", "database", "autocommit", "kill", "change_user"),
        *("tpc_begin", "tpc_prepare", "tpc_commit", "tpc_rollback"),
        *("connect", "reconnect", "reset", "close"),
    )

    def code_of(self, error: object) -> Code:
        return number_of(read_attribute(error, "errno"))  # The arguments hold only the message.

    def connect_with(self, module: Any, kind: type, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        # A class in the arguments is the application's own. With "pool_name" the driver pools plain connections.
        return module.connect(*arguments, **{"connectionclass": kind, **options})

    def note_rest(self, driver_connection: Any) -> None:
        # A version whose connections do not begin with it may not note it either.
        if LAST_STATEMENT in vars(driver_connection):
            setattr(driver_connection, LAST_STATEMENT, None)
            super().note_rest(driver_connection)

    def is_at_rest(self, driver_connection: Any) -> bool:
        return super().is_at_rest(driver_connection) and getattr(driver_connection, LAST_STATEMENT) is None

    def waits_of(self, cursor: Any, statement: object, many: int | None) -> int:
        return 1  # It sends the parameters of executemany() together.

    def connection_number(self, driver_connection: Any) -> int | None:
        return number_of(read_attribute(driver_connection, "connection_id"))

    def mind_rows(self, cursor: Any, check: Callable[[bool], None]) -> None:
        release_failed_cursors()
        kind: Any = type(cursor)
        cursor.__class__ = minding_class(kind)
        cursor.check_rows = check

    def file_number(self, driver_connection: Any) -> int | None:
        try:
            number = socket_number_of(driver_connection)
        except Exception:
            return None
        return number if number >= 0 else None


@cache
def minding_class(kind: type[Any]) -> type:
    """A subclass of the driver's cursors, which calls its ``check_rows`` after each fetch.

    :param kind: the driver's class. Its methods return what they have when the server sends an error instead of a row.
    """

    def check(self: Any, has_ended: bool) -> None:
        try:
            self.check_rows(has_ended)
        except BaseException:
            _failed.append(self)
            raise

    def fetchone(self: Any) -> Any:
        row = kind.fetchone(self)
        check(self, row is None)
        return row

    def fetchmany(self: Any, size: int = 0) -> Any:
        rows = kind.fetchmany(self, size)
        check(self, len(rows) < (size or self.arraysize))
        return rows

    def fetchall(self: Any) -> Any:
        rows = kind.fetchall(self)
        check(self, True)
        return rows

    methods = {call.__name__: wraps(getattr(kind, call.__name__))(call) for call in (fetchone, fetchmany, fetchall)}
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**names, **methods})


def release_failed_cursors() -> None:
    """Keep no cursor any more to which nothing else leads."""
    for _ in range(len(_failed)):
        cursor = _failed.popleft()
        if sys.getrefcount(cursor) > 2:  # this variable, and the argument
            _failed.append(cursor)
