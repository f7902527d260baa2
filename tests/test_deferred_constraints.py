"""Deferred constraints are checked in an ``isolated()`` block where a COMMIT would check them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    ForeignKey,
    Integer,
    MetaData,
    Table,
    UniqueConstraint,
    create_engine,
    event,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.exc import IntegrityError
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware.testing import assert_queries, isolated

from .conftest import DATABASES_SEEN

metadata = MetaData()
PARENTS = Table("deferred_parent", metadata, Column("id", Integer, primary_key=True))


def child(name: str, initially: str) -> Table:
    parent = ForeignKey(PARENTS.c.id, deferrable=True, initially=initially, name=f'100% "{name}" of parents')
    return Table(name, metadata, Column("id", Integer, primary_key=True), Column("parent", Integer, parent))


DEFERRED = child("deferred_child", "DEFERRED")
IMMEDIATE = child("immediate_child", "IMMEDIATE")
#: SQLite has deferred foreign keys only.
RANKS = Table(
    "deferred_rank",
    MetaData(),
    Column("id", Integer, primary_key=True),
    Column("rank", Integer),
    UniqueConstraint("rank", deferrable=True, initially="DEFERRED"),
)


def add(table: Table, **values: int) -> None:
    session.execute(insert(table).values(**values))


def defer() -> None:
    is_sqlite = session.get_bind().dialect.name == "sqlite"
    session.execute(text("PRAGMA defer_foreign_keys = ON" if is_sqlite else "SET CONSTRAINTS ALL DEFERRED"))


def committing(environ: Any, start_response: Any) -> list[bytes]:
    add(DEFERRED, parent=1)
    start_response("200 OK", [])
    return [b"done"]


def in_context(*steps: Callable[[], object]) -> Callable[[SQLASessionMiddleware], None]:
    def run(app: SQLASessionMiddleware) -> None:
        with app.context():
            for step in steps:
                step()
            session.commit()

    return run


def rolled_back(*steps: Callable[[], object]) -> Callable[[SQLASessionMiddleware], None]:
    """The session is used on after the commit has failed."""

    def run(app: SQLASessionMiddleware) -> None:
        with app.context():
            for step in steps:
                step()
            with pytest.raises(IntegrityError):
                session.commit()
            session.rollback()
            add(PARENTS, id=7)
            session.commit()

    return run


def nested(step: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        with session.begin_nested():
            step()

    return run


def request(app: SQLASessionMiddleware) -> None:
    Client(app).get("/", buffered=True)


def orphan() -> None:
    add(DEFERRED, parent=1)


def immediate_orphan() -> None:
    add(IMMEDIATE, parent=1)


def parent() -> None:
    add(PARENTS, id=1)


def no_parent() -> None:
    session.execute(PARENTS.delete())


FAILS = "IntegrityError"
KEPT = "kept"

#: What is done one after the other, each with what becomes of it, and how many rows the tables have in the end.
CASES: dict[str, tuple[list[tuple[Callable[[SQLASessionMiddleware], None], str]], tuple[int, int, int]]] = {
    "a row is missing": ([(in_context(orphan), FAILS)], (0, 0, 0)),
    "a row comes later": ([(in_context(orphan, parent), KEPT)], (1, 1, 0)),
    "it is deferred each time": (
        [(in_context(orphan, parent), KEPT), (in_context(orphan), KEPT), (in_context(no_parent), FAILS)],
        (1, 2, 0),
    ),
    "it fails, and is deferred again": ([(in_context(orphan), FAILS), (in_context(orphan, parent), KEPT)], (1, 1, 0)),
    "the session is used on": ([(rolled_back(orphan), KEPT)], (1, 0, 0)),
    "a savepoint is released before": ([(in_context(nested(orphan), parent), KEPT)], (1, 1, 0)),
    "a savepoint is all there is": ([(in_context(nested(orphan)), FAILS)], (0, 0, 0)),
    "the middleware commits": ([(request, FAILS), (in_context(parent), KEPT), (request, KEPT)], (1, 1, 0)),
    "it was deferred by hand": (
        [(in_context(defer, immediate_orphan), FAILS), (in_context(immediate_orphan), FAILS)],
        (0, 0, 0),
    ),
    "it was deferred by hand once": (
        [(in_context(defer, immediate_orphan, parent), KEPT), (in_context(immediate_orphan, no_parent), FAILS)],
        (1, 0, 1),
    ),
}  # fmt: skip


@pytest.fixture(params=["sqlite", "postgresql"])
def app(request, sqlite_url) -> Iterator[SQLASessionMiddleware]:
    engine = create_engine(DATABASES_SEEN.url(request.param, sqlite_url))
    collections = [metadata]
    if request.param == "sqlite":
        event.listen(engine, "connect", lambda connection, record: connection.execute("PRAGMA foreign_keys = ON"))
    else:
        collections.append(RANKS.metadata)
    app = SQLASessionMiddleware(committing, engine, metadata=collections, transaction=True)
    app.drop_database()
    app.init_database()
    yield app
    app.drop_database()
    engine.dispose()


def counts(app: SQLASessionMiddleware) -> tuple[int, ...]:
    with app.context():
        return tuple(
            session.scalar(select(func.count()).select_from(each)) or 0 for each in (PARENTS, DEFERRED, IMMEDIATE)
        )


@pytest.mark.parametrize("where", ["isolated", "nested", "production"])
@pytest.mark.parametrize("case", CASES)
def test_deferred_constraint_is_checked_at_the_commit_when(app, case, where):
    steps, expected = CASES[case]
    outer = nullcontext() if where == "production" else isolated(app)
    with outer, isolated(app) if where == "nested" else nullcontext():
        for step, outcome in steps:
            with pytest.raises(IntegrityError) if outcome == FAILS else nullcontext():
                step(app)
        assert counts(app) == expected
    if where != "production":
        assert counts(app) == (0, 0, 0)


@pytest.mark.parametrize("app", ["postgresql"], indirect=True)
@pytest.mark.parametrize("where", ["isolated", "production"])
def test_deferred_unique_constraint_is_checked_at_the_commit(app, where):
    with isolated(app) if where == "isolated" else nullcontext(), app.context():
        session.execute(insert(RANKS), [{"rank": 1}, {"rank": 2}])
        session.commit()
        # One after the other, they are not unique in between.
        session.execute(update(RANKS).values(rank=3 - RANKS.c.rank))
        session.commit()
        session.execute(update(RANKS).values(rank=1))
        with pytest.raises(IntegrityError):
            session.commit()


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
@pytest.mark.parametrize("deferrable", [True, None], ids=["initially immediate", "not deferrable"])
def test_commit_is_as_before_when_no_constraint_is_deferred(sqlite_url, database, deferrable):
    metadata = MetaData()
    parents = Table("immediate_parent", metadata, Column("id", Integer, primary_key=True))
    parent = ForeignKey(parents.c.id, deferrable=deferrable, initially="IMMEDIATE" if deferrable else None)
    children = Table("never_deferred", metadata, Column("parent", Integer, parent))
    engine = create_engine(DATABASES_SEEN.url(database, sqlite_url))
    if database == "sqlite":
        event.listen(engine, "connect", lambda connection, record: connection.execute("PRAGMA foreign_keys = ON"))
    app = SQLASessionMiddleware(committing, engine, metadata=metadata)
    app.init_database()
    with isolated(app):
        for _ in range(2):
            with pytest.raises(IntegrityError):
                in_context(lambda: add(children, parent=1))(app)
        in_context(lambda: add(parents, id=1), lambda: add(children, parent=1))(app)
        with app.context():
            assert session.scalar(select(func.count()).select_from(children)) == 1
    app.drop_database()
    engine.dispose()


def test_violation_is_not_the_tests_when_it_was_there_before(sqlite_url):
    engine = create_engine(sqlite_url)
    metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(DEFERRED).values(parent=9))
    event.listen(engine, "connect", lambda connection, record: connection.execute("PRAGMA foreign_keys = ON"))
    engine.dispose()
    app = SQLASessionMiddleware(committing, engine, transaction=True)
    with isolated(app):
        in_context(parent)(app)
        request(app)
        assert counts(app) == (1, 2, 0)
        with pytest.raises(IntegrityError):
            in_context(lambda: add(DEFERRED, parent=9))(app)
    engine.dispose()


def test_foreign_key_to_no_key_is_left_to_sqlite(sqlite_url):
    """SQLite cannot check such a database, and raises an error where the foreign key is used."""
    engine = create_engine(sqlite_url)
    event.listen(engine, "connect", lambda connection, record: connection.execute("PRAGMA foreign_keys = ON"))
    metadata.create_all(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE wrong (parent REFERENCES deferred_child(parent))")
    app = SQLASessionMiddleware(committing, engine)
    with isolated(app):
        in_context(parent)(app)
        assert counts(app) == (1, 0, 0)
    engine.dispose()


def test_statements_of_the_check_are_not_counted(app):
    with isolated(app):
        in_context(parent)(app)
        with assert_queries(1):
            in_context(orphan)(app)
