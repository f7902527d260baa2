"""The shared ``metadata``, and functions that create and drop the tables of an application."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

from sqlalchemy import Connection, Engine, Inspector, MetaData, Table, inspect
from sqlalchemy.exc import DBAPIError, NoSuchTableError
from sqlalchemy.schema import CreateSchema

from .._drivers.registry import driver_of
from ..failures import Failure, classify
from .binds import key_of
from .forks import fork_safe_lock

__all__ = [
    "TablesOf",
    "create_schema",
    "create_tables",
    "drop_tables",
    "metadata",
    "tables_by_key",
    "warn_of_no_tables",
]

#: The metadata of each application that is not given one.
metadata = MetaData()

#: A metadata, and those of its tables that belong to one engine; None if all of them do.
TablesOf = tuple[MetaData, Sequence[Table] | None]

_creating = fork_safe_lock()


def tables_by_key(collections: Collection[MetaData]) -> list[tuple[str | None, TablesOf]]:
    """Group the tables of several metadata by their bind keys. The key of the default engine is None."""
    found: list[tuple[str | None, TablesOf]] = []
    for each in collections:
        by_key: dict[str | None, list[Table]] = {}
        for table in each.tables.values():
            by_key.setdefault(key_of(table), []).append(table)
        if len(by_key) > 1:
            found += [(key, (each, tables)) for key, tables in by_key.items()]
        else:
            # A metadata without tables may have sequences and ENUMs to create, so it has an entry as well.
            found.append((next(iter(by_key), each.info.get("bind_key")), (each, None)))
    return found


def warn_of_no_tables(collections: Collection[MetaData]) -> None:
    """Warn if there are no tables to create. A likely reason is that no module with models was imported yet.

    :warns UserWarning: if no metadata has a table.
    """
    if not any(each.tables for each in collections):
        warnings.warn(
            "The metadata has no tables, so init_database() creates none: import the modules that define the models"
            " before, or pass the metadata that they are in, SQLASessionMiddleware(…, metadata=Base.metadata).",
            UserWarning,
            stacklevel=3,
        )


def create_schema(engine: Engine, name: str) -> None:
    """Create a schema, if it does not exist. Several threads and processes may do so at the same time."""

    def create(connection: Connection, wanted: object) -> None:
        connection.execute(CreateSchema(name, if_not_exists=True))

    alone = driver_of(engine).server.creating
    with _creating:
        # PostgreSQL may have looked for the schema, and found none, before it has waited for the others.
        _repeat_if_lost(
            partial(_change_alone, engine, alone, create, None),
            driver_of(engine).says_exists,
            lambda: inspect(engine).get_schema_names(),
        )


def create_tables(engine: Engine, collection: MetaData, wanted: Sequence[Table] | None = None) -> None:
    """Create the tables that do not exist. Several threads and processes may do so at the same time.

    :param wanted: some tables of ``collection``; None for all of them.
    """
    with _creating:
        _repeat_if_lost(
            partial(_create_missing, engine, collection, wanted),
            driver_of(engine).says_exists,
            partial(_existing_tables, engine, collection, wanted),
        )


def drop_tables(engine: Engine, collection: MetaData, wanted: Sequence[Table] | None = None) -> None:
    """Drop the tables that exist. Several threads and processes may do so at the same time.

    :param wanted: some tables of ``collection``; None for all of them.
    """
    _repeat_if_lost(
        partial(_change_alone, engine, driver_of(engine).server.dropping, collection.drop_all, wanted),
        driver_of(engine).says_gone,
        partial(_existing_tables, engine, collection, wanted),
    )


def _create_missing(engine: Engine, collection: MetaData, wanted: Sequence[Table] | None) -> None:
    if _has_all(engine, collection, wanted):
        # Most processes start with tables that are there. They wait for nobody, and may have no right to write. There
        # may still be ENUMs to create, or listeners to call.
        try:
            collection.create_all(engine, wanted)
            return
        except DBAPIError as error:
            if not driver_of(engine).says_exists(error.orig):
                raise
    _change_alone(engine, driver_of(engine).server.creating, collection.create_all, wanted)


def _change_alone(
    engine: Engine,
    alone: Callable[[Connection], AbstractContextManager[None]],
    change: Callable[[Connection, Sequence[Table] | None], None],
    wanted: Sequence[Table] | None,
) -> None:
    with engine.connect() as connection, alone(connection):
        try:
            change(connection, wanted)
            connection.commit()
        except BaseException:
            connection.rollback()  # before others begin
            raise


def _repeat_if_lost(change: Callable[[], None], lost: Callable[[object], bool], existing: Callable[[], object]) -> None:
    """Call ``change`` until it has met nobody who does the same: in another version, by a tool, or without a lock.

    It looks first what there is, so what others have done is not done again. An error that comes a second time, while
    nothing has changed, is not the others' doing.
    """
    before: object = None
    while True:
        try:
            return change()
        except DBAPIError as error:
            if not lost(error.orig) and classify(error) is not Failure.TRANSIENT:
                raise
            now = existing(), str(error.orig)
            if now == before:
                raise
            before = now


def _has_all(engine: Engine, collection: MetaData, wanted: Sequence[Table] | None) -> bool:
    """Whether all tables exist, by one query for each schema. False where that is not known."""
    schemas: dict[str | None, set[str]] = {}
    for table in _candidates(collection, wanted):
        schemas.setdefault(_schema_of(engine, table), set()).add(table.name)
    with engine.connect() as connection:
        try:
            inspector: Inspector = inspect(connection)
            return all(names <= set(inspector.get_table_names(schema)) for schema, names in schemas.items())
        except (DBAPIError, NotImplementedError, NoSuchTableError):
            return False  # MariaDB has an error for a schema that it does not know.


def _existing_tables(engine: Engine, collection: MetaData, wanted: Sequence[Table] | None) -> set[str]:
    inspector = inspect(engine)
    return {
        table.key
        for table in _candidates(collection, wanted)
        if inspector.has_table(table.name, _schema_of(engine, table))
    }


def _candidates(collection: MetaData, wanted: Sequence[Table] | None) -> Collection[Table]:
    return collection.tables.values() if wanted is None else wanted


def _schema_of(engine: Engine, table: Table) -> str | None:
    """The schema of a table; an engine may have other names for them."""
    translated: Mapping[str | None, str | None] = engine.get_execution_options().get("schema_translate_map") or {}
    return translated.get(table.schema, table.schema)
