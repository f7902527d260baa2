"""No ROLLBACK that has nothing to undo.

A session rolls back at its end, and the pool once more when the connection is returned. psycopg and psycopg2 know
whether a transaction is open, and the second time send nothing. The drivers of MySQL and MariaDB send it, and wait for
the answer. Therefore the connections of a new engine are of a class derived from the driver's, whose ``rollback()``
sends nothing if nothing at all was sent since the last COMMIT or ROLLBACK: not by SQLAlchemy, and not by whoever has
the driver's connection or one of its cursors. Where that cannot be known, the class is the driver's own, and nothing is
left out.

SQLAlchemy, its pool, and their events and options are as ever: each rollback is theirs. The class is made by the
``connect()`` of what ``create_engine(module=...)`` is given. A listener of ``do_connect`` that returns a connection
would keep those of the application from being called, and ``creator`` all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from .._drivers.registry import driver_by_dialect

if TYPE_CHECKING:
    from sqlalchemy import URL

__all__ = ["leave_out_rollbacks"]

#: The options by which an application has its connections from elsewhere, or says itself how they are rolled back.
_DECIDED: Final = {"creator", "module", "plugins", "pool", "pool_reset_on_return"}


def leave_out_rollbacks(url: URL, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options to add to those of an application, so that a new engine sends no ROLLBACK that has nothing to undo.

    :raises ImportError: if the driver cannot be imported.
    """
    # A plugin may have another URL.
    if _DECIDED & options.keys() or options.get("skip_autocommit_rollback") or "plugin" in url.query:
        return {}
    dialect = url.get_dialect()
    driver = driver_by_dialect[dialect]
    if not driver.can_tell_rest or dialect.is_async:
        return {}
    return {"module": driver.module_without_idle_rollbacks(dialect.import_dbapi())}
