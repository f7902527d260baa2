"""psycopg2."""

from __future__ import annotations

from typing import Any

from .libpq import LibpqDriver

__all__ = ["Psycopg2"]


class Psycopg2(LibpqDriver):
    """psycopg2."""

    name = module = "psycopg2"
    sqlstate = "pgcode"

    def libpq_version(self, module: Any) -> int:
        try:
            return int(module.extensions.libpq_version())
        except Exception:  # of something that stands in for it
            return 0

    def is_made_read_only(self, driver_connection: Any) -> bool:
        return driver_connection.readonly is True

    def make_read_only(self, driver_connection: Any) -> None:
        driver_connection.readonly = True  # A part of the BEGIN that it sends anyway.
