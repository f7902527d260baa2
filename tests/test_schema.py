"""Creating tables while others do the same."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Column, Engine, Integer, MetaData, Table, create_engine, event, inspect
from sqlalchemy.exc import DBAPIError

from sqlasession_middleware import SQLASessionMiddleware, metadata, schema

NAMES = ("test_schema_a", "test_schema_b", "test_schema_c")
tables = MetaData()
for name in NAMES:
    Table(name, tables, Column("id", Integer, primary_key=True))


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = create_engine(database_url)
    tables.drop_all(engine)
    yield engine
    tables.drop_all(engine)
    engine.dispose()


def test_tables_are_created_once_when_threads_race(engine: Engine) -> None:
    apps = [SQLASessionMiddleware(lambda environ, start: [], engine, metadata=tables) for _ in range(4)]
    barrier = threading.Barrier(4)

    def create(app: SQLASessionMiddleware) -> None:
        barrier.wait(timeout=30)
        app.init_database()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(create, apps))
    assert set(NAMES) <= set(inspect(engine).get_table_names())


def test_creation_goes_on_when_another_process_was_faster_with_each_table(engine: Engine) -> None:
    """Each time create_all() has looked, somebody else creates the table that it is about to create."""
    other = create_engine(engine.url)
    faster: list[str] = []

    def create_first(connection: object, cursor: object, statement: str, *rest: object) -> None:
        for name in NAMES:
            if "CREATE TABLE" in statement and name in statement and name not in faster:
                faster.append(name)
                if engine.name != "postgresql":  # Its DDL is transactional: see the next line.
                    tables.tables[name].create(other)
                else:
                    tables.create_all(other)

    event.listen(engine, "before_cursor_execute", create_first)
    schema.create_tables(engine, tables)
    assert faster
    assert set(NAMES) <= set(inspect(engine).get_table_names())
    other.dispose()


def test_error_is_raised_when_nothing_new_appears(engine: Engine) -> None:
    attempts: list[str] = []

    def refuse(connection: object, cursor: object, statement: str, *rest: object) -> tuple[str, object]:
        if "CREATE TABLE" in statement:
            attempts.append(statement)
            return "CREATE NONSENSE", ()
        return statement, rest[0]

    event.listen(engine, "before_cursor_execute", refuse, retval=True)
    with pytest.raises(DBAPIError, match="NONSENSE"):
        schema.create_tables(engine, tables)
    assert len(attempts) == 1


def test_metadata_is_shared_unless_the_application_has_its_own() -> None:
    def app(*_: object) -> list[bytes]:
        return []

    assert SQLASessionMiddleware(app, "sqlite://").metadata is metadata
    assert SQLASessionMiddleware(app, "sqlite://", metadata=tables).metadata is tables
