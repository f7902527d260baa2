"""The tables of an application: the shared ``metadata``, and creating and dropping what is in it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from threading import RLock

from sqlalchemy import Engine, MetaData, Table, inspect
from sqlalchemy.exc import DBAPIError

from .binds import key_of
from .forks import after_fork

__all__ = ["TablesOf", "create_tables", "drop_tables", "metadata", "tables_by_key", "warn_of_no_tables"]

#: The tables of every application that was not given a metadata of its own.
metadata = MetaData()

#: Those of a metadata that belong to one engine; None where all of them do.
TablesOf = tuple[MetaData, Sequence[Table] | None]

_creating = RLock()


@after_fork
def _renew_lock() -> None:  # pragma: no cover  # in a child
    global _creating
    _creating = RLock()


def tables_by_key(collections: Collection[MetaData]) -> list[tuple[str | None, TablesOf]]:
    """The tables of some metadata, with the bind key that they have in common; None is the default engine's."""
    found: list[tuple[str | None, TablesOf]] = []
    for each in collections:
        by_key: dict[str | None, list[Table]] = {}
        for table in each.tables.values():
            by_key.setdefault(key_of(table), []).append(table)
        if len(by_key) > 1:
            found += [(key, (each, tables)) for key, tables in by_key.items()]
        else:
            # What is no table (a sequence, an ENUM) is created only with the metadata as a whole.
            found.append((next(iter(by_key), each.info.get("bind_key")), (each, None)))
    return found


def warn_of_no_tables(collections: Collection[MetaData]) -> None:
    """:warns UserWarning: if there is nothing to create, most likely because no module with models was imported yet."""
    if not any(each.tables for each in collections):
        warnings.warn(
            "The metadata has no tables, so init_database() creates none: import the modules that define the models"
            " before, or pass the metadata that they are in, SQLASessionMiddleware(…, metadata=Base.metadata).",
            UserWarning,
            stacklevel=3,
        )


def create_tables(engine: Engine, collection: MetaData, wanted: Sequence[Table] | None = None) -> None:
    """Create the tables that are not there yet, even while other threads or processes do the same."""
    present: set[str] | None = None
    with _creating:
        while True:
            try:
                return collection.create_all(engine, wanted)
            except DBAPIError:
                # Another process may have created a table after create_all() looked for it: look again, for as long
                # as more of them appear. Workers that all create their tables as they start are the usual case.
                before, present = present, _present(engine, collection, wanted)
                if present in (before, set()):
                    raise


def drop_tables(engine: Engine, collection: MetaData, wanted: Sequence[Table] | None = None) -> None:
    """Drop the tables that are there."""
    collection.drop_all(engine, wanted)


def _present(engine: Engine, collection: MetaData, wanted: Sequence[Table] | None) -> set[str]:
    inspector = inspect(engine)
    candidates = collection.tables.values() if wanted is None else wanted
    return {table.key for table in candidates if inspector.has_table(table.name, table.schema)}
