"""The tables of an application: the shared ``metadata``, and creating and dropping what is in it."""

from __future__ import annotations

import warnings
from threading import RLock

from sqlalchemy import Engine, MetaData, inspect
from sqlalchemy.exc import DBAPIError

__all__ = ["create_tables", "drop_tables", "metadata"]

#: The tables of every application that was not given a metadata of its own.
metadata = MetaData()

_creating = RLock()


def create_tables(engine: Engine, tables: MetaData) -> None:
    """Create the tables that are not there yet, even while other threads or processes do the same."""
    if not tables.tables:
        warnings.warn(
            "The metadata has no tables, so init_database() creates none: import the modules that define the models"
            " before, or pass the metadata that they are in, SQLASessionMiddleware(…, metadata=Base.metadata).",
            UserWarning,
            stacklevel=3,
        )
    present: set[str] | None = None
    with _creating:
        while True:
            try:
                return tables.create_all(engine)
            except DBAPIError:
                # Another process may have created a table after create_all() looked for it: look again, for as long
                # as more of them appear. Workers that all create their tables as they start are the usual case.
                before, present = present, _present(engine, tables)
                if present in (before, set()):
                    raise


def drop_tables(engine: Engine, tables: MetaData) -> None:
    """Drop the tables that are there."""
    tables.drop_all(engine)


def _present(engine: Engine, tables: MetaData) -> set[str]:
    inspector = inspect(engine)
    return {name for name, table in tables.tables.items() if inspector.has_table(table.name, table.schema)}
