"""Creating tables while others do the same, and dropping them while others use them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from inspect import signature
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Engine,
    Index,
    Integer,
    MetaData,
    Table,
    create_engine,
    event,
    inspect,
    select,
    text,
)
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, metadata, session
from sqlasession_middleware._database import schema
from sqlasession_middleware._drivers import mysql, postgresql
from sqlasession_middleware._drivers.registry import UNKNOWN, driver_of
from sqlasession_middleware._drivers.server import Server
from sqlasession_middleware.errors import ScopeError
from sqlasession_middleware.testing import isolated

from .conftest import DATABASES, DATABASES_SEEN
from .creators import PATIENCE

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


#: What the creators are to race for, and the engines' options.
RACES: dict[str, dict[str, object]] = {
    "": {},
    "serializable": {"isolation_level": "SERIALIZABLE"},
    "autocommit": {"isolation_level": "AUTOCOMMIT", "model": {"cycle": False}},
    "one connection": {"pool_size": 1, "max_overflow": 0},
    "schema": {"model": {"schema": "races"}},
}
#: The databases of a race; all, if it is not here.
ONLY = {"schema": ["postgresql"]}


def race(kind: str, name: str, url: str, options: dict[str, object]) -> dict[str, list[object]]:
    if name != "postgresql":
        # SQLite has no ALTER for a foreign key. In MariaDB 10.11 two at the same moment, for tables that refer to each
        # other, wait for each other until the server is restarted: a test that fails would cost the server.
        options = {**options, "model": {"cycle": False}}
    command = [sys.executable, "-m", "tests.creators", kind, url, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, list[object]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("name", "what"), [(name, what) for what in RACES for name in ONLY.get(what, DATABASES)], ids=str
)
def test_processes_create_and_drop_at_the_same_moment(name: str, what: str, sqlite_url: str) -> None:
    found = race("processes", name, DATABASES_SEEN.url(name, sqlite_url), RACES[what])
    assert found["failed"] == []
    first = found["init_database"][0]
    assert isinstance(first, dict)
    assert (first["tables"], first["rows"]) == (["race_left", "race_right", "race_rows"], 1)
    assert found["init_database"] == [first] * len(found["init_database"])
    assert found["drop_database"] == [{"tables": [], "rows": None}] * len(found["drop_database"])
    # Who waits for the others meets none of their tables. SQLite has no lock for a DROP.
    if what != "autocommit" or name == "mariadb":
        assert name == "sqlite" or found["said"] == []
        assert not any("already" in str(said) for said in found["said"])


@pytest.mark.parametrize("name", DATABASES)
def test_threads_create_and_drop_at_the_same_moment(name: str, sqlite_url: str) -> None:
    found = race("threads", name, DATABASES_SEEN.url(name, sqlite_url), {})
    assert found["failed"] == []
    assert found["drop_database"] == [{"tables": [], "rows": None}] * len(found["init_database"])


def hold_lock(engine: Engine) -> Engine:
    """Create tables in another process, for ever."""
    other = create_engine(engine.url, poolclass=NullPool)
    connection = other.connect()
    event.listen(other, "engine_disposed", lambda _: connection.close())
    for statement in postgresql.LOCK_CREATION if engine.name == "postgresql" else [mysql.LOCK_CREATION]:
        connection.exec_driver_sql(statement)
    return other


@pytest.fixture
def server_engine(server_url: str) -> Iterator[Engine]:
    timeout = {"options": "-c lock_timeout=300"} if server_url.startswith("postgresql") else {}
    engine = create_engine(server_url, connect_args=timeout)
    tables.drop_all(engine)
    yield engine
    tables.drop_all(engine)
    engine.dispose()


def test_nobody_waits_who_has_nothing_to_create(server_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(driver_of(server_engine).server), "creating", None)
    tables.create_all(server_engine)
    schema.create_tables(server_engine, tables)


def test_lock_that_cannot_be_had_is_no_error(server_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mysql, "WAITING_FOR_CREATION", 1)
    holder = hold_lock(server_engine)
    try:
        schema.create_tables(server_engine, tables)
        assert set(NAMES) <= set(inspect(server_engine).get_table_names())
        schema.drop_tables(server_engine, tables)
        assert not set(NAMES) & set(inspect(server_engine).get_table_names())
    finally:
        holder.dispose()


#: What asks for a lock of those that create, whoever holds it.
HELD_LOCKS = {
    "postgresql": "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = "
    "(SELECT oid FROM pg_database WHERE datname = current_database())",
    "mariadb": f"SELECT IS_USED_LOCK({mysql.CREATING}) IS NOT NULL",
}


@pytest.mark.parametrize("fails", [False, True])
def test_connection_is_given_back_as_it_was(server_url: str, fails: bool) -> None:
    engine = create_engine(server_url, pool_size=1, max_overflow=0, isolation_level="SERIALIZABLE")
    tables.drop_all(engine)
    if fails:
        event.listen(engine, "before_cursor_execute", _refuse, retval=True)
        with pytest.raises(DBAPIError, match="NONSENSE"):
            schema.create_tables(engine, tables)
    else:
        schema.create_tables(engine, tables)
    with engine.connect() as connection:
        assert connection.scalar(text(HELD_LOCKS[engine.name.replace("mysql", "mariadb")])) == 0
        assert connection.get_isolation_level() == "SERIALIZABLE"
    tables.drop_all(engine)
    engine.dispose()


def _refuse(
    connection: object, cursor: object, statement: str, parameters: object, *rest: object
) -> tuple[str, object]:
    return ("CREATE NONSENSE", ()) if "CREATE TABLE" in statement else (statement, parameters)


#: The modes of sqlite3 and of SQLAlchemy, and a listener that sends BEGIN, as SQLAlchemy's recipe for savepoints does.
SQLITE_MODES: dict[str, dict[str, object]] = {
    "legacy": {},
    "AUTOCOMMIT": {"isolation_level": "AUTOCOMMIT"},
    "isolation_level None, and BEGIN": {"connect_args": {"isolation_level": None}},
}
if "skip_autocommit_rollback" in signature(DefaultDialect).parameters:  # since SQLAlchemy 2.0.43
    options = {"isolation_level": "AUTOCOMMIT", "skip_autocommit_rollback": True}
    SQLITE_MODES["AUTOCOMMIT without rollbacks"] = options
if sys.version_info >= (3, 12):
    SQLITE_MODES["autocommit False"] = {"connect_args": {"autocommit": False}}
    SQLITE_MODES["autocommit True"] = {"connect_args": {"autocommit": True}}


@pytest.mark.parametrize("mode", SQLITE_MODES)
def test_sqlite_creates_all_tables_or_none_in_each_mode(mode: str, sqlite_url: str) -> None:
    engine = create_engine(sqlite_url, **SQLITE_MODES[mode])
    if mode.endswith("BEGIN"):
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    other = create_engine(sqlite_url, connect_args={"timeout": 0})
    broken = MetaData()
    for name in NAMES:
        Table(name, broken, Column("id", Integer, primary_key=True), Column("x", Integer), Index("same_name", "x"))
    with pytest.raises(DBAPIError, match="same_name"):
        schema.create_tables(engine, broken)
    assert inspect(other).get_table_names() == []
    schema.create_tables(engine, tables)
    assert set(inspect(other).get_table_names()) == set(NAMES)
    with other.begin() as connection:  # Nobody holds a lock.
        connection.execute(tables.tables[NAMES[0]].insert())
    with engine.begin() as connection:
        connection.execute(tables.tables[NAMES[0]].insert())
    with other.connect() as connection:
        assert len(connection.execute(select(tables.tables[NAMES[0]])).all()) == 2
    engine.dispose()
    other.dispose()


def test_error_of_an_index_is_not_taken_for_a_race(engine: Engine) -> None:
    """On MariaDB the table is there then, as if another process had created it."""
    wrong = MetaData()
    Table(NAMES[0], wrong, Column("id", Integer, primary_key=True), Index("test_schema_index", text("lost")))
    with pytest.raises(DBAPIError, match="lost"):
        schema.create_tables(engine, wrong)


#: What makes a connection read-only, and what the database says of it.
READ_ONLY = {
    "sqlite": ({}, "readonly"),
    "postgresql": ({"options": "-c default_transaction_read_only=on"}, "read-only transaction"),
    "mariadb": ({"init_command": "SET SESSION TRANSACTION READ ONLY"}, "READ ONLY transaction"),
}


def test_read_only_database_is_no_problem_unless_something_is_missing(engine: Engine) -> None:
    arguments, said = READ_ONLY[engine.name.replace("mysql", "mariadb")]
    url = engine.url
    tables.create_all(engine)
    if engine.name == "sqlite":
        url = url.set(database=f"file:{url.database}", query={"mode": "ro", "uri": "true"})
    reader = create_engine(url, connect_args=arguments)
    schema.create_tables(reader, tables)
    tables.tables[NAMES[1]].drop(engine)
    with pytest.raises(DBAPIError, match=said):
        schema.create_tables(reader, tables)
    reader.dispose()


def test_creation_goes_on_when_another_process_was_faster_with_each_table(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time create_all() has looked, somebody else creates the table that it is about to create."""
    monkeypatch.setattr(type(driver_of(engine).server), "creating", Server.creating)  # Nobody has a lock.
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


# -- what drop_database() would wait for

HELD = MetaData()
held = Table("schema_held", HELD, Column("id", Integer, primary_key=True))


def reading(environ, start_response):
    session.execute(select(held)).all()
    start_response("200 OK", [])
    return (chunk for chunk in [b"read"])


@pytest.fixture(params=["QueuePool", "NullPool"])
def held_app(request, server_url) -> Iterator[SQLASessionMiddleware]:
    options = {"poolclass": NullPool} if request.param == "NullPool" else {}
    app = SQLASessionMiddleware(reading, server_url, metadata=HELD, engine_options=options)
    app.drop_database()
    app.init_database()
    yield app
    app.drop_database()
    app.dispose()


@contextmanager
def open_response(app: SQLASessionMiddleware) -> Iterator[None]:
    response = Client(app).get("/page")
    yield
    response.close()


@contextmanager
def context_around(app: SQLASessionMiddleware) -> Iterator[None]:
    with app.context():
        session.execute(select(held)).all()
        yield


@contextmanager
def context_further_out(app: SQLASessionMiddleware) -> Iterator[None]:
    other = SQLASessionMiddleware(reading, "sqlite://")
    with context_around(app), other.context():
        yield


@contextmanager
def isolated_block(app: SQLASessionMiddleware) -> Iterator[None]:
    with isolated(app):
        Client(app).get("/", buffered=True)
        yield


WAITED_FOR = {
    open_response: r"the response to GET '/page' of <SQLASession",
    context_around: r"a context of <SQLASession",
    context_further_out: r"a context of <SQLASession",
    isolated_block: r"an isolated\(\) block",
}


@pytest.mark.parametrize("holds", WAITED_FOR, ids=[each.__name__ for each in WAITED_FOR])
def test_drop_database_names_what_it_would_wait_for_when_there_is(held_app, holds):
    with holds(held_app), pytest.raises(ScopeError, match=rf"^drop_database\(\) would wait for {WAITED_FOR[holds]}"):
        held_app.drop_database()
    held_app.drop_database()


def test_drop_database_goes_ahead_when_nothing_holds_a_lock(held_app, sqlite_url):
    other = SQLASessionMiddleware(reading, sqlite_url, metadata=HELD)
    other.init_database()
    elsewhere = Client(other).get("/")
    with held_app.engine.connect(), held_app.context():
        session.execute(select(held)).all()
        session.commit()
        held_app.drop_database()
    elsewhere.close()
    other.dispose()


def test_drop_database_waits_when_a_request_of_another_thread_will_end(held_app):
    held_locks, go_on = threading.Event(), threading.Event()

    def slow(environ, start_response):
        session.execute(select(held)).all()
        held_locks.set()
        assert go_on.wait(timeout=30)
        start_response("200 OK", [])
        return [b""]

    app = SQLASessionMiddleware(slow, held_app.engine)
    with ThreadPoolExecutor(2) as pool:
        request = pool.submit(lambda: Client(app).get("/", buffered=True))
        assert held_locks.wait(timeout=30)
        dropping = pool.submit(held_app.drop_database)
        go_on.set()
        request.result()
        dropping.result(timeout=30)


def test_error_of_a_listener_is_raised_unless_it_says_that_another_was_faster(sqlite_url: str) -> None:
    """Also where all tables are there already."""
    own = MetaData()
    Table("test_schema_own", own, Column("id", Integer, primary_key=True))
    app = SQLASessionMiddleware(lambda environ, start: [], sqlite_url, metadata=own)
    app.init_database()
    statements = ["CREATE TABLE test_schema_own (id integer)"]

    @event.listens_for(own, "after_create")
    def send(target: Any, connection: Any, **more: Any) -> None:
        if statements:
            connection.execute(text(statements.pop()))

    app.init_database()
    assert statements == []
    statements.append("no SQL")
    with pytest.raises(DBAPIError, match="syntax error"):
        app.init_database()
    app.dispose()


@pytest.mark.parametrize("begins", [False, True], ids=["", "the application sends BEGIN"])
def test_lock_of_a_file_that_is_not_had_is_an_error(sqlite_url: str, begins: bool) -> None:
    own = MetaData()
    Table("test_schema_own", own, Column("id", Integer, primary_key=True))
    options = {"connect_args": {"timeout": 0.05}}
    app = SQLASessionMiddleware(lambda environ, start: [], sqlite_url, metadata=own, engine_options=options)
    if begins:
        event.listen(app.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    holder = create_engine(sqlite_url)
    with holder.connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        with pytest.raises(DBAPIError, match="locked"):
            app.init_database()
    app.init_database()
    holder.dispose()
    app.dispose()


def test_schema_that_is_not_there_is_the_databases_error() -> None:
    own = MetaData()
    Table("test_schema_own", own, Column("id", Integer, primary_key=True), schema="test_schema_nowhere")
    for server in ("postgresql", "mariadb"):
        app = SQLASessionMiddleware(lambda environ, start: [], DATABASES_SEEN.url(server, ""), metadata=own)
        with pytest.raises(DBAPIError, match="test_schema_nowhere"):
            app.init_database()
        app.dispose()


def test_what_an_error_says_of_a_race() -> None:
    def says(driver: Any, code: Any, words: str = "words") -> tuple[bool, bool]:
        return driver.server.says_exists(code, Exception(words)), driver.server.says_gone(code, Exception(words))

    unknown, maria = UNKNOWN, driver_of(create_engine("mariadb+pymysql://"))
    assert says(unknown, None, "table x already exists") == (True, False)
    assert says(unknown, None, "no such table: x")[0] is False
    posted = driver_of(create_engine("postgresql+psycopg://"))
    assert says(posted, "23505", 'violates unique constraint "pg_type_typname_nsp_index"') == (True, False)
    assert says(posted, "23505", 'violates unique constraint "guest_name_key"') == (False, False)
    assert says(maria, 1050) == (True, False)
    assert says(maria, 1051) == (False, True)
    assert says(maria, 1005, "errno: 121") == (True, False)
    assert says(maria, 1005, "errno: 150") == (False, False)
