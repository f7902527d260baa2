"""The tables of an application: the shared ``metadata``, and creating and dropping what is in it."""

from __future__ import annotations

import warnings

from sqlalchemy import Engine, MetaData

__all__ = ["create_tables", "drop_tables", "metadata"]

#: The tables of every application that was not given a metadata of its own.
metadata = MetaData()


def create_tables(engine: Engine, tables: MetaData) -> None:
    """Create the tables that are not there yet."""
    if not tables.tables:
        warnings.warn(
            "The metadata has no tables, so init_database() creates none: import the modules that define the models"
            " before, or pass the metadata that they are in, SQLASessionMiddleware(…, metadata=Base.metadata).",
            UserWarning,
            stacklevel=3,
        )
    tables.create_all(engine)


def drop_tables(engine: Engine, tables: MetaData) -> None:
    """Drop the tables that are there."""
    tables.drop_all(engine)
