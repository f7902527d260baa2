"""psycopg2."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from socket import SHUT_RDWR
from threading import Event, Thread
from typing import Any

from .answers import file_number_of, text_of
from .keepalive import duplicate
from .libpq import FULL_SERVER, LibpqDriver

__all__ = ["Psycopg2"]


class Psycopg2(LibpqDriver):
    """psycopg2."""

    name = module = "psycopg2"
    sqlstate = "pgcode"

    def cancel(self, driver_connection: Any, connect: Callable[[], Any]) -> bool:
        try:
            return super().cancel(driver_connection, connect)
        except Exception as error:
            if not any(words in text_of(error) for words in FULL_SERVER):
                raise
            # It takes no connection. All of Python waits for it, but the server has just answered.
            driver_connection.cancel()
            return True

    def limit_connecting(self, module: Any, options: dict[str, Any]) -> None:
        extensions = module.extensions
        kind = options.get("connection_factory") or extensions.connection
        # With such a callback, libpq does not wait by itself, and nobody looks at connect_timeout.
        if extensions.get_wait_callback() is not None and isinstance(kind, type):
            options["connection_factory"] = impatient_class(kind, extensions.parse_dsn)

    def libpq_version(self, module: Any) -> int:
        try:
            return int(module.extensions.libpq_version())
        except Exception:  # of something that stands in for it
            return 0

    def is_made_read_only(self, driver_connection: Any) -> bool:
        return driver_connection.readonly is True

    def make_read_only(self, driver_connection: Any) -> None:
        driver_connection.readonly = True  # A part of the BEGIN that it sends anyway.


@cache
def impatient_class(kind: Any, parse: Callable[[str], dict[str, str]]) -> type:
    """A subclass of the driver's connections whose ``connect_timeout`` is that of each address, as in libpq."""

    def connect(self: Any, dsn: str, *arguments: Any, **options: Any) -> None:
        made, seconds = Event(), 0
        with suppress(ValueError):  # The driver says what is wrong with it.
            seconds = int(parse(dsn).get("connect_timeout") or os.environ.get("PGCONNECT_TIMEOUT") or 0)
        if seconds > 0:
            Thread(target=cut_until, args=(self, made, seconds), name="connect-timeout", daemon=True).start()
        try:
            kind.__init__(self, dsn, *arguments, **options)
        finally:
            made.set()

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**names, "__init__": connect})


def cut_until(driver_connection: Any, made: Event, seconds: int) -> None:
    """Give up each address that has not answered after so many seconds, until the connection is made."""
    while not made.wait(seconds):
        number = file_number_of(driver_connection)
        if number is not None:
            with suppress(OSError), duplicate(number) as found:
                if not made.is_set():
                    found.shutdown(SHUT_RDWR)
