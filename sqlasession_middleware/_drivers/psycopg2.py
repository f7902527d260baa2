"""psycopg2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .base import text_of
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

    def libpq_version(self, module: Any) -> int:
        try:
            return int(module.extensions.libpq_version())
        except Exception:  # of something that stands in for it
            return 0

    def is_made_read_only(self, driver_connection: Any) -> bool:
        return driver_connection.readonly is True

    def make_read_only(self, driver_connection: Any) -> None:
        driver_connection.readonly = True  # A part of the BEGIN that it sends anyway.
