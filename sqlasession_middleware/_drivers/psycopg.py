"""psycopg, version 3."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Literal

from .._dependencies import has_prepared
from .answers import read_attribute
from .libpq import LibpqDriver

if TYPE_CHECKING:
    from .psycopg_pipeline import Pipeline

__all__ = ["Psycopg"]

#: Seconds for the request to cancel a statement.
CANCEL_TIMEOUT: Final = 2.0


class Psycopg(LibpqDriver):
    """psycopg."""

    name = module = "psycopg"
    sqlstate = "sqlstate"

    def pipeline(self) -> Pipeline | None:
        if not self.server.can_begin_lazily:
            return None
        from .psycopg_pipeline import Pipeline  # imports psycopg

        return Pipeline() if Pipeline.is_supported() else None

    def prepares(self, driver_connection: Any) -> bool:
        return read_attribute(driver_connection, "prepare_threshold") is not None

    def stop_preparing(self, driver_connection: Any) -> None:
        driver_connection.prepare_threshold = None

    def waits_of(self, cursor: Any, statement: object, many: int | None) -> int:
        # A server-side cursor, which has a name, is declared and described. executemany() uses the pipeline mode.
        return 2 if hasattr(cursor, "name") else 1

    def waits_of_end(self, driver_connection: Any, kind: Literal["commit", "rollback"]) -> int:
        waits = super().waits_of_end(driver_connection, kind)
        # After a ROLLBACK it has the server forget what was prepared.
        return waits + (kind == "rollback" and waits > 0 and has_prepared(driver_connection))

    def transaction_status(self, driver_connection: Any) -> int | None:
        # Each read of ``info`` makes an object.
        return getattr(getattr(driver_connection, "pgconn", None), "transaction_status", None)

    def cancel(self, driver_connection: Any, connect: Callable[[], Any]) -> bool:
        capabilities: Any = read_attribute(sys.modules.get("psycopg"), "capabilities")  # since 3.2
        if capabilities is not None and capabilities.has_cancel_safe():
            driver_connection.cancel_safe(timeout=CANCEL_TIMEOUT)  # It needs no further connection.
            return False  # PgBouncer takes it for a server that is silent.
        return super().cancel(driver_connection, connect)

    def libpq_version(self, module: Any) -> int:
        try:
            return int(module.pq.version())
        except Exception:  # of something that stands in for it
            return 0

    def is_made_read_only(self, driver_connection: Any) -> bool:
        return driver_connection.read_only is True

    def make_read_only(self, driver_connection: Any) -> None:
        driver_connection.read_only = True  # A part of the BEGIN that it sends anyway.
