"""A plugin of pytest, ``-p tests.integration.unprepared``: psycopg prepares no statements on the server.

For tests behind a PgBouncer before 1.21. Without the plugin, each of their applications would need this option.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Dialect, Engine, event


@event.listens_for(Engine, "do_connect")
def prepare_nothing(dialect: Dialect, record: object, arguments: list[Any], options: dict[str, Any]) -> None:
    if dialect.driver == "psycopg":
        options.setdefault("prepare_threshold", None)
