"""A script: processes, or threads, that create and drop the tables of an application at the same moment.

``python -m tests.creators KIND URL`` prints, as JSON, what has failed and what the database has said.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from sqlalchemy import (
    DDL,
    Column,
    Engine,
    Enum,
    ForeignKey,
    Integer,
    MetaData,
    Table,
    create_engine,
    event,
    func,
    inspect,
    select,
)
from sqlalchemy.engine import ExceptionContext

from sqlasession_middleware import SQLASessionMiddleware

CREATORS = 8
#: A round in which nobody met another shows nothing.
ROUNDS = 3
#: How many seconds a creator waits for the others.
PATIENCE = 60


def model(schema: str | None = None, cycle: bool = True) -> MetaData:
    """Tables that refer to each other, with what else races: types, schemas, indexes, and rows of a new table."""
    metadata = MetaData(schema=schema)
    if schema is not None:
        event.listen(metadata, "before_create", DDL(f"CREATE SCHEMA IF NOT EXISTS {schema}"))
    prefix = "" if schema is None else f"{schema}."
    rows = Table("race_rows", metadata, Column("id", Integer, primary_key=True), Column("of", Integer, index=True))
    Table(
        "race_left",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("kind", Enum("a", "b", name="race_kind", metadata=metadata)),
        Column("right", *([ForeignKey(f"{prefix}race_right.id", name="race_to_right")] if cycle else [Integer])),
    )
    Table(
        "race_right",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("left", ForeignKey(f"{prefix}race_left.id", name="race_to_left"), index=True),
    )

    @event.listens_for(rows, "after_create")
    def fill(target: Table, connection: Any, **options: Any) -> None:
        connection.execute(rows.insert().values(of=1))

    return metadata


def describe(engine: Engine, metadata: MetaData) -> dict[str, Any]:
    """What there is: a row for each time that the table was created, and what belongs to the tables."""
    inspector = inspect(engine)
    rows = next(table for table in metadata.tables.values() if table.name == "race_rows")
    names = [table.name for table in metadata.tables.values() if inspector.has_table(table.name, table.schema)]
    with engine.connect() as connection:
        count = connection.scalar(select(func.count()).select_from(rows)) if rows.name in names else None
    found: dict[str, Any] = {"tables": sorted(names), "rows": count}
    for name in names:
        found[name] = [
            len(inspector.get_indexes(name, metadata.schema)),
            len(inspector.get_foreign_keys(name, metadata.schema)),
        ]
    return found


def create_and_drop(url: str, options: dict[str, Any], barrier: Any, report: Callable[[str, Any], object]) -> None:
    """Be one of several, at the same moment in each step."""
    if threading.current_thread() is threading.main_thread():
        signal.alarm(PATIENCE)  # Nobody else ends a process that waits for its database.
    metadata = model(**options.pop("model", {}))
    app = SQLASessionMiddleware(lambda environ, start: [], create_engine(url, **options), metadata=metadata)

    @event.listens_for(app.engine, "handle_error")
    def note(context: ExceptionContext) -> None:
        if (context.statement or "").lstrip().startswith(("CREATE", "ALTER", "DROP")):  # MariaDB's look is a DESCRIBE.
            report("said", str(context.original_exception))

    for number in range(ROUNDS):
        for step in (app.init_database, app.drop_database):
            barrier.wait(PATIENCE)
            try:
                step()
            except Exception as error:
                report("failed", f"round {number}: {step.__name__}: {error}")
            if barrier.wait(PATIENCE) == 0:
                report(step.__name__, describe(app.engine, metadata))
    app.engine.dispose()


#: What removes what a run that was killed has left, also where some of the foreign keys are gone.
CLEANING = {
    "sqlite": (),
    "postgresql": (
        "DROP SCHEMA IF EXISTS races CASCADE",
        "DROP TABLE IF EXISTS race_left, race_right, race_rows CASCADE",
        "DROP TYPE IF EXISTS race_kind",
    ),
    "mysql": ("SET FOREIGN_KEY_CHECKS = 0", "DROP TABLE IF EXISTS race_left, race_right, race_rows"),
    "mariadb": ("SET FOREIGN_KEY_CHECKS = 0", "DROP TABLE IF EXISTS race_left, race_right, race_rows"),
}


def clean(url: str) -> None:
    """Leave the database as it was before."""
    engine = create_engine(url)
    with engine.begin() as connection:
        for statement in CLEANING[engine.name]:
            connection.exec_driver_sql(statement)
    engine.dispose()


def main(kind: str, url: str, options: str) -> None:
    """Run the creators, and print what they have reported."""
    given = json.loads(options)
    signal.alarm(PATIENCE)
    if kind == "processes":
        context = multiprocessing.get_context("fork")
        queue: Any = context.SimpleQueue()
        barrier: Any = context.Barrier(CREATORS)
        start: Any = context.Process
    else:
        queue, barrier, start = SimpleQueue(), threading.Barrier(CREATORS), threading.Thread

    def report(what: str, value: Any) -> None:
        queue.put((what, value))

    clean(url)
    creators = [start(target=create_and_drop, args=(url, dict(given), barrier, report)) for _ in range(CREATORS)]
    for each in creators:
        each.start()
    for each in creators:
        each.join()
    found: dict[str, list[Any]] = {"failed": [], "said": [], "init_database": [], "drop_database": []}
    while not queue.empty():
        what, value = queue.get()
        found[what].append(value)
    clean(url)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
