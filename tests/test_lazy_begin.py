"""G17: a request with ``lazy_begin`` sees and stores what it would without, and waits less often."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import (
    Column,
    Engine,
    Integer,
    String,
    Table,
    UniqueConstraint,
    bindparam,
    create_engine,
    event,
    func,
    insert,
    literal_column,
    select,
    table,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.types import NullType

from sqlasession_middleware import SQLASessionMiddleware, application, session
from sqlasession_middleware._database import lazy_begin
from sqlasession_middleware.errors import ConfigurationError

from .drivers import rows_of, under_another_name
from .wsgi import Environ, StartResponse, consume, environ, start_response


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "lazy_item"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(40))
    __table_args__ = (UniqueConstraint("name", deferrable=True, initially="DEFERRED", name="lazy_item_name"),)


ITEM = Item.__table__
LOG = Table("lazy_log", Base.metadata, Column("id", Integer, primary_key=True), Column("word", String(40)))
#: Not among the tables: a view that writes to the log when it is read.
SPY = table("lazy_spy", Column("n", Integer))
#: Views that do what a read-only transaction allows, or whose function does not tell that it was refused.
HIDDEN = {
    "lazy_hides_setting": "set_config('lazy.owner', 'hidden', false)",
    "lazy_hides_lock": "pg_advisory_xact_lock(4712) IS NULL",
    "lazy_hides_time": "now()",
    "lazy_hides_try": "lazy_try_to_write('tried')",
}
#: A table with row-level security: a policy can call any function.
GUARDED = table("lazy_guarded", Column("n", Integer))

#: A function that writes, a view of it, a trigger that writes, and row-level security by a setting.
OBJECTS = """
CREATE FUNCTION lazy_write(word text) RETURNS integer LANGUAGE sql VOLATILE
    AS 'INSERT INTO lazy_log (word) VALUES (word) RETURNING 1';
CREATE VIEW lazy_spy AS SELECT lazy_write('view') AS n;
CREATE FUNCTION lazy_audit() RETURNS trigger LANGUAGE plpgsql
    AS 'BEGIN INSERT INTO lazy_log (word) VALUES (''trigger''); RETURN NEW; END';
CREATE TRIGGER lazy_audit AFTER UPDATE ON lazy_item FOR EACH ROW EXECUTE FUNCTION lazy_audit();
CREATE VIEW lazy_mine AS SELECT id FROM lazy_item WHERE name = current_setting('lazy.owner', true);
CREATE TABLE lazy_guarded (n integer);
ALTER TABLE lazy_guarded ENABLE ROW LEVEL SECURITY;
CREATE FUNCTION lazy_try_to_write(word text) RETURNS integer LANGUAGE plpgsql AS $$
    BEGIN RETURN lazy_write(word); EXCEPTION WHEN read_only_sql_transaction THEN RETURN 1; END $$;
""" + "".join(f"CREATE VIEW {name} AS SELECT {expression} AS n;" for name, expression in HIDDEN.items())
DROP_OBJECTS = (
    "".join(f"DROP VIEW IF EXISTS {name};" for name in HIDDEN)
    + """
DROP TABLE IF EXISTS lazy_guarded; DROP FUNCTION IF EXISTS lazy_try_to_write(text);
DROP VIEW IF EXISTS lazy_spy; DROP VIEW IF EXISTS lazy_mine; DROP FUNCTION IF EXISTS lazy_write(text);
DROP TRIGGER IF EXISTS lazy_audit ON lazy_item; DROP FUNCTION IF EXISTS lazy_audit();
"""
)

NAMES = select(Item.name).order_by(Item.id)


@pytest.fixture(scope="module")
def url() -> Any:
    found = rows_of("psycopg")[0].values[0].url()
    engine = create_engine(found, isolation_level="AUTOCOMMIT")
    Base.metadata.create_all(engine)
    with engine.connect() as connection:
        connection.exec_driver_sql(DROP_OBJECTS)
        connection.exec_driver_sql(OBJECTS)
        yield found
        connection.exec_driver_sql(DROP_OBJECTS)
    Base.metadata.drop_all(engine)
    engine.dispose()


@pytest.fixture
def other(url: Any) -> Iterator[Engine]:
    """An engine of somebody else, with the tables as they are at first."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql("TRUNCATE lazy_item, lazy_log RESTART IDENTITY")
        connection.execute(insert(ITEM), [{"id": number, "name": f"first {number}"} for number in (101, 102)])
    yield engine
    engine.dispose()


# -- what an application does: each yields what it has seen


def raw_cursor() -> Any:
    return session.connection().connection.cursor()


def interfere(word: str = "theirs") -> None:
    """Somebody else commits a row."""
    with application.other.begin() as connection:
        connection.execute(insert(ITEM).values(name=word))


def status() -> str:
    """The driver's own view of the transaction: not compared, it is what may differ."""
    return str(session.connection().connection.dbapi_connection.info.transaction_status.name)


def reads() -> Iterator[Any]:
    yield session.scalars(NAMES).all()
    yield session.get(Item, 101).name
    yield session.scalar(select(func.count()).select_from(Item))


def reads_what_others_commit() -> Iterator[Any]:
    yield session.scalars(NAMES).all()
    interfere()
    yield session.scalars(NAMES).all()


def writes() -> Iterator[Any]:
    session.add(Item(name="added"))
    session.flush()
    yield session.scalars(NAMES).all()


def reads_then_writes() -> Iterator[Any]:
    yield session.scalars(NAMES).all()
    session.get(Item, 101).name = "changed"
    session.flush()
    yield session.scalars(NAMES).all()
    yield session.scalars(select(LOG.c.word)).all()


def writes_many() -> Iterator[Any]:
    yield session.execute(insert(Item).returning(Item.name), [{"name": "a"}, {"name": "b"}]).scalars().all()
    statement = "INSERT INTO lazy_item (name) VALUES (%s)"
    yield session.connection().exec_driver_sql(statement, [("c",), ("d",)]).rowcount


def writes_many_first() -> Iterator[Any]:
    statement = "INSERT INTO lazy_item (name) VALUES (%s)"
    yield session.connection().exec_driver_sql(statement, [("c",), ("d",)]).rowcount
    yield session.execute(update(ITEM).values(name=ITEM.c.name + "!")).rowcount


def uses_a_raw_cursor() -> Iterator[Any]:
    yield session.scalars(NAMES).all()
    cursor = raw_cursor()
    cursor.execute("INSERT INTO lazy_item (name) VALUES ('raw')")
    cursor.execute("SELECT count(*) FROM lazy_item")
    yield cursor.fetchall()


def uses_a_raw_cursor_after_a_commit() -> Iterator[Any]:
    session.add(Item(name="added"))
    session.commit()
    connection = session.connection()
    session.commit()
    raw = connection.connection if not connection.closed else session.connection().connection
    raw.cursor().execute("INSERT INTO lazy_item (name) VALUES ('raw')")
    yield raw.dbapi_connection.autocommit


def uses_blocks_of_psycopg() -> Iterator[Any]:
    yield session.scalars(NAMES).all()
    driver_connection = session.connection().connection.dbapi_connection
    with driver_connection.transaction() as block:
        yield block.savepoint_name
        driver_connection.execute("INSERT INTO lazy_item (name) VALUES ('block')")
    with driver_connection.transaction("named", force_rollback=True):
        driver_connection.execute("INSERT INTO lazy_item (name) VALUES ('undone')")
    yield session.scalars(NAMES).all()


def uses_blocks_of_psycopg_between_transactions() -> Iterator[Any]:
    """No transaction is open: psycopg's own commits."""
    session.scalars(NAMES).all()
    driver_connection = session.connection().connection.dbapi_connection
    session.rollback()
    with driver_connection.transaction() as block:
        yield block.savepoint_name
        driver_connection.execute("INSERT INTO lazy_item (name) VALUES ('block')")
    yield session.scalars(NAMES).all()


def copies() -> Iterator[Any]:
    yield session.scalars(NAMES).all()
    with raw_cursor().copy("COPY lazy_item (name) FROM STDIN") as copy:
        copy.write(io.StringIO("copied\n").read())
    yield session.scalars(NAMES).all()


def uses_savepoints() -> Iterator[Any]:
    with session.begin_nested():
        yield session.scalars(NAMES).all()
        session.add(Item(name="kept"))
    nested = session.begin_nested()
    session.add(Item(name="undone"))
    session.flush()
    nested.rollback()
    yield session.scalars(NAMES).all()


def catches_an_error_in_a_savepoint() -> Iterator[Any]:
    session.scalars(NAMES).all()
    with suppress(DBAPIError), session.begin_nested():
        session.execute(select(1 / (Item.id - Item.id)))
    session.add(Item(name="after"))
    session.flush()
    yield session.scalars(NAMES).all()


def begins_by_itself() -> Iterator[Any]:
    with session.begin():
        yield session.scalars(NAMES).all()
        session.add(Item(name="begun"))
    yield session.scalars(NAMES).all()


def hands_its_connection_on() -> Iterator[Any]:
    with Session(session.connection()) as inner:
        yield inner.scalars(NAMES).all()
        inner.add(Item(name="handed"))
        inner.flush()
    connection = session.connection()
    with connection.begin_nested():
        connection.execute(insert(ITEM).values(name="core"))
    yield connection.scalars(NAMES).all()


def uses_server_side_cursors() -> Iterator[Any]:
    result = session.execute(NAMES.execution_options(yield_per=1))
    yield next(result.scalars())
    interfere()
    yield [row.name for row in result]
    result.close()


def listens() -> Iterator[Any]:
    session.execute(text("LISTEN lazy_channel"))
    session.execute(text("NOTIFY lazy_channel, 'word'"))
    session.commit()
    driver_connection = session.connection().connection.dbapi_connection
    yield [each.payload for each in driver_connection.notifies(timeout=1, stop_after=1)]
    session.execute(text("UNLISTEN *"))
    session.commit()


def uses_a_temporary_table() -> Iterator[Any]:
    session.execute(text("CREATE TEMPORARY TABLE lazy_temporary (n integer) ON COMMIT DROP"))
    session.execute(text("INSERT INTO lazy_temporary VALUES (1)"))
    yield session.scalars(select(table("lazy_temporary", Column("n", Integer)).c.n)).all()


def sets_what_rows_it_sees() -> Iterator[Any]:
    session.scalars(NAMES).all()
    session.execute(text("SET LOCAL lazy.owner = 'first 101'"))
    mine = table("lazy_mine", Column("id", Integer))
    yield session.scalars(select(mine.c.id)).all()
    yield session.scalars(select(mine.c.id)).all()


def locks_advisorily() -> Iterator[Any]:
    session.scalar(select(func.pg_advisory_xact_lock(4711)))
    with application.other.connect() as connection:
        yield connection.scalar(select(func.pg_try_advisory_xact_lock(4711)))


def locks_a_row() -> Iterator[Any]:
    session.scalars(select(Item).where(Item.id == 101).with_for_update()).one()
    try:
        with application.other.connect() as connection:
            connection.execute(select(ITEM).where(ITEM.c.id == 101).with_for_update(nowait=True))
    except DBAPIError as error:
        yield error.orig.sqlstate


def asks_for_the_time() -> Iterator[Any]:
    before = session.scalar(select(func.now()))
    session.execute(text("SELECT pg_sleep(0.01)"))
    yield before == session.scalar(select(func.now()))
    yield before == session.scalar(select(literal_column("current_timestamp")))


def calls_a_function_that_writes() -> Iterator[Any]:
    yield session.scalar(select(func.lazy_write("function")))
    yield session.scalars(select(LOG.c.word)).all()


def reads_a_view_that_writes() -> Iterator[Any]:
    yield session.scalars(select(SPY.c.n)).all()
    yield session.scalars(select(LOG.c.word)).all()


def reads_and_then_a_view_that_writes() -> Iterator[Any]:
    yield session.scalars(NAMES).all()
    yield session.scalars(select(SPY.c.n)).all()


def read_hidden(name: str) -> Any:
    return session.scalars(select(table(name, Column("n")).c.n)).all()


def changes_a_setting_in_a_view() -> Iterator[Any]:
    yield read_hidden("lazy_hides_setting")
    yield session.scalar(text("SHOW lazy.owner"))
    session.rollback()
    yield session.scalar(text("SELECT coalesce(current_setting('lazy.owner', true), '')"))


def locks_advisorily_in_a_view() -> Iterator[Any]:
    yield read_hidden("lazy_hides_lock")
    with application.other.connect() as connection:
        yield connection.scalar(select(func.pg_try_advisory_xact_lock(4712)))


def asks_for_the_time_in_a_view() -> Iterator[Any]:
    before = read_hidden("lazy_hides_time")
    session.execute(text("SELECT pg_sleep(0.01)"))
    yield before == read_hidden("lazy_hides_time")


def tries_to_write_in_a_view() -> Iterator[Any]:
    yield read_hidden("lazy_hides_try")
    yield session.scalars(select(LOG.c.word)).all()


def reads_a_view_that_is_not_there() -> Iterator[Any]:
    yield code_of(lambda: read_hidden("lazy_hides_nothing"))
    session.rollback()
    yield session.scalars(NAMES).all()


def writes_in_a_with() -> Iterator[Any]:
    written = insert(ITEM).values(name="with").returning(ITEM.c.name).cte("written")
    yield session.scalars(select(written.c.name)).all()


def makes_an_error() -> Iterator[Any]:
    session.add(Item(name="lost"))
    session.flush()
    yield code_of(lambda: session.execute(select(1 / (Item.id - Item.id))))
    yield code_of(lambda: session.scalars(NAMES).all())


def makes_an_error_first() -> Iterator[Any]:
    yield code_of(lambda: session.execute(select(1 / (Item.id - Item.id))))
    yield code_of(lambda: session.scalars(NAMES).all())
    session.rollback()
    session.add(Item(name="after"))
    session.flush()
    yield session.scalars(NAMES).all()


def makes_an_error_in_the_driver() -> Iterator[Any]:
    """Parameters that psycopg cannot send: the transactions have not failed."""
    yield code_of(lambda: session.scalars(NAMES.where(Item.id == bindparam("n", object(), NullType()))).all())
    session.commit()
    yield code_of(lambda: session.execute(text("SELECT CAST(:n AS text)"), {"n": object()}))
    session.add(Item(name="after"))
    session.flush()
    yield session.scalars(NAMES).all()


def sends_several_statements() -> Iterator[Any]:
    session.execute(text("INSERT INTO lazy_item (name) VALUES ('one'); INSERT INTO lazy_item (name) VALUES ('two')"))
    yield session.scalars(NAMES).all()


def sends_what_is_no_string() -> Iterator[Any]:
    """exec_driver_sql() passes on whatever psycopg takes."""
    sql = pytest.importorskip("psycopg.sql").SQL
    for statement in (
        b"SELECT 1",
        sql("SELECT 1"),
        sql("SELECT {}").format(1),
        sql("SELECT 1; {}").format(sql("SELECT 2")),
    ):
        yield session.connection().exec_driver_sql(statement).all()
        session.commit()


def sends_a_percent_sign() -> Iterator[Any]:
    options = {"no_parameters": True}
    yield session.connection().exec_driver_sql("SELECT name, '%' FROM lazy_item", execution_options=options).all()
    session.connection().exec_driver_sql("INSERT INTO lazy_item (name) VALUES ('%')", execution_options=options)


def commits_by_text() -> Iterator[Any]:
    session.execute(text("INSERT INTO lazy_item (name) VALUES ('kept')"))
    session.execute(text("COMMIT"))
    session.execute(text("INSERT INTO lazy_item (name) VALUES ('more')"))
    yield session.scalars(NAMES).all()


def violates_a_deferred_constraint() -> Iterator[Any]:
    session.execute(insert(ITEM).values(name="first 101"))
    yield session.scalars(NAMES).all()


def works_in_autocommit() -> Iterator[Any]:
    session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
    yield session.scalars(NAMES).all()
    session.execute(insert(ITEM).values(name="at once"))
    with application.other.connect() as connection:
        yield connection.scalars(NAMES).all()


def works_at(level: str) -> Iterator[Any]:
    session.connection(execution_options={"isolation_level": level})
    yield session.scalars(NAMES).all()
    interfere()
    yield session.scalars(NAMES).all()
    session.add(Item(name="ours"))
    session.flush()


def sets_its_level() -> Iterator[Any]:
    session.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
    yield session.scalars(NAMES).all()
    interfere()
    yield session.scalars(NAMES).all()


def reads_only() -> Iterator[Any]:
    session.connection(execution_options={"postgresql_readonly": True})
    yield session.scalars(NAMES).all()
    yield code_of(lambda: session.execute(insert(ITEM).values(name="refused")))


def commits_and_goes_on() -> Iterator[Any]:
    yield session.scalars(NAMES).all()
    session.add(Item(name="one"))
    session.commit()
    yield session.scalars(NAMES).all()
    session.add(Item(name="two"))
    session.rollback()
    yield session.scalars(NAMES).all()
    session.add(Item(name="three"))
    session.flush()


def listens_to_the_begin() -> Iterator[Any]:
    """Row-level security as SQLAlchemy's users have it: a setting at each begin."""

    def set_owner(opened: Session, transaction: object, connection: Any) -> None:
        connection.execute(text("SELECT set_config('lazy.owner', 'first 102', true)"))

    event.listen(session(), "after_begin", set_owner)
    mine = table("lazy_mine", Column("id", Integer))
    yield session.scalars(select(mine.c.id)).all()
    session.commit()
    yield session.scalars(select(mine.c.id)).all()


THINGS = [
    reads,
    reads_what_others_commit,
    writes,
    reads_then_writes,
    writes_many,
    writes_many_first,
    uses_a_raw_cursor,
    uses_a_raw_cursor_after_a_commit,
    uses_blocks_of_psycopg,
    uses_blocks_of_psycopg_between_transactions,
    copies,
    uses_savepoints,
    catches_an_error_in_a_savepoint,
    begins_by_itself,
    hands_its_connection_on,
    uses_server_side_cursors,
    listens,
    uses_a_temporary_table,
    sets_what_rows_it_sees,
    locks_advisorily,
    locks_a_row,
    asks_for_the_time,
    calls_a_function_that_writes,
    reads_a_view_that_writes,
    reads_and_then_a_view_that_writes,
    changes_a_setting_in_a_view,
    locks_advisorily_in_a_view,
    asks_for_the_time_in_a_view,
    tries_to_write_in_a_view,
    reads_a_view_that_is_not_there,
    writes_in_a_with,
    makes_an_error,
    makes_an_error_first,
    makes_an_error_in_the_driver,
    sends_several_statements,
    sends_what_is_no_string,
    sends_a_percent_sign,
    commits_by_text,
    violates_a_deferred_constraint,
    works_in_autocommit,
    partial(works_at, "READ COMMITTED"),
    partial(works_at, "REPEATABLE READ"),
    partial(works_at, "SERIALIZABLE"),
    sets_its_level,
    reads_only,
    commits_and_goes_on,
    listens_to_the_begin,
]


def name_of(thing: Any) -> str:
    return f"{thing.func.__name__} {thing.args[0]}" if isinstance(thing, partial) else str(thing.__name__)


def code_of(call: Callable[[], object]) -> object:
    """The error that a call raises, as far as it must be the same."""
    try:
        return call()
    except DBAPIError as error:
        return type(error).__name__, type(error.orig).__name__, getattr(error.orig, "sqlstate", None)
    except Exception as error:
        return type(error).__name__


#: How a request ends.
ENDS = ["answers", "commits", "fails"]


def request_that(thing: Any, end: str, seen: list[Any]) -> Any:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        seen.extend(thing())
        if end == "commits":
            session.commit()
        elif end == "fails":
            raise LookupError("the application's own")
        start("200 OK", [("Content-Type", "text/plain")])
        return [b"done"]

    return app


def run(thing: Any, end: str, other: Engine, url: Any, transaction: Any, lazy_begin: bool) -> dict[str, Any]:
    """What a request has seen, how it ended, and what is stored."""
    with other.connect() as connection:
        connection.exec_driver_sql("TRUNCATE lazy_item, lazy_log RESTART IDENTITY")
        connection.execute(insert(ITEM), [{"id": number, "name": f"first {number}"} for number in (101, 102)])
    seen: list[Any] = []
    app = SQLASessionMiddleware(request_that(thing, end, seen), url, transaction=transaction, lazy_begin=lazy_begin)
    app.other = other  # type: ignore[attr-defined]
    with app.context() as warm:  # The first transaction of a connection asks for its isolation level.
        warm.execute(text("SELECT 1"))
    answer = code_of(lambda: consume(app(environ(), start_response)))
    assert app.engine.pool.checkedout() == 0
    app.dispose()
    with other.connect() as connection:
        stored = connection.scalars(NAMES).all(), connection.scalars(select(LOG.c.word)).all()
    return {"seen": seen, "answer": answer, "stored": stored}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("transaction", [False, True, {"attempts": 3}], ids=["plain", "transaction", "attempts"])
@pytest.mark.parametrize("thing", THINGS, ids=name_of)
def test_request_sees_and_stores_the_same(thing: Any, transaction: Any, end: str, other: Engine, url: Any) -> None:
    expected = run(thing, end, other, url, transaction, lazy_begin=False)
    assert expected["seen"] or isinstance(expected["answer"], tuple)
    assert run(thing, end, other, url, transaction, lazy_begin=True) == expected


# -- the connection


def state_of(connection: Any) -> str:
    """What PostgreSQL says of a connection."""
    asked = text("SELECT state FROM pg_stat_activity WHERE pid = :pid")
    return str(connection[0].scalar(asked, {"pid": connection[1]}))


@contextmanager
def observed(url: Any, **options: Any) -> Iterator[tuple[SQLASessionMiddleware, Callable[[], str]]]:
    """An application with one connection, and what PostgreSQL says of that, as somebody else sees it."""
    app = SQLASessionMiddleware(lambda environ, start: [], url, **options)
    with app.context() as warm:
        pid = warm.connection().connection.dbapi_connection.info.backend_pid
        warm.execute(text("SELECT 1"))
    watcher = create_engine(app.engine.url, isolation_level="AUTOCOMMIT")
    with watcher.connect() as connection:
        yield app, lambda: state_of((connection, pid))
    watcher.dispose()
    app.dispose()


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        (NAMES, "idle"),
        (select(Item), "idle"),
        (text("SELECT 1"), "idle in transaction"),
        (select(Item).from_statement(text("SELECT * FROM lazy_item")), "idle in transaction"),
        (select(func.now()), "idle in transaction"),
        (select(ITEM).with_for_update(), "idle in transaction"),
        (select(table("lazy_mine", Column("id", Integer)).c.id), "idle in transaction"),
        (select(GUARDED.c.n), "idle in transaction"),
        (select(Item.id, select(GUARDED.c.n).scalar_subquery()), "idle in transaction"),
    ],
    ids=["columns", "entities", "text", "entities by text", "function", "lock", "view", "policies", "policies inside"],
)
def test_nothing_stays_open_after_a_plain_read(statement: Any, expected: str, url: Any, other: Engine) -> None:
    with observed(url) as (app, state), app.context() as opened:
        opened.execute(statement).all()
        assert state() == expected
        opened.execute(NAMES).all()
        assert state() == expected


def test_transaction_that_was_left_out_begins_when_the_connection_is_handed_out(url: Any, other: Engine) -> None:
    """Who has it may look whether one is open, as psycopg's own blocks do."""
    with observed(url) as (app, state), app.context() as opened:
        opened.execute(NAMES).all()
        assert state() == "idle"
        for _ in range(2):
            opened.connection()
            assert state() == "idle in transaction"
        opened.rollback()
        opened.connection()
        assert state() == "idle"
        opened.execute(NAMES).all()
        assert state() == "idle in transaction"


def test_view_that_writes_is_no_error_and_leaves_the_connection_as_it_was(url: Any, other: Engine) -> None:
    """A wrong guess costs a wait, never an error."""
    notices: list[str] = []
    with observed(url) as (app, state):
        event.listen(app.engine, "handle_error", lambda context: notices.append("error"))
        for _ in range(2):
            with app.context() as opened:
                driver_connection = opened.connection().connection.dbapi_connection
                read_only = opened.scalar(text("SHOW transaction_read_only"))
                opened.rollback()
                assert opened.scalars(select(SPY.c.n)).all() == [1]
                assert state() == "idle in transaction"
                assert (read_only, driver_connection.autocommit) == ("off", False)
    assert notices == []  # The refusal is none of the application's.
    with other.connect() as connection:
        assert connection.scalars(select(LOG.c.word)).all() == []


@pytest.fixture
def stranger(url: Any, other: Engine) -> Iterator[Any]:
    """The URL of a role that may not ask which locks are held."""
    role = f"lazy_{uuid4().hex[:12]}"
    with other.connect() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {role} LOGIN; GRANT SELECT ON lazy_item TO {role}")
        connection.exec_driver_sql("REVOKE ALL ON pg_catalog.pg_locks FROM PUBLIC")
        yield url.set(username=role)
        connection.exec_driver_sql("GRANT SELECT ON pg_catalog.pg_locks TO PUBLIC")
        connection.exec_driver_sql(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_role_that_may_not_ask_for_locks_reads_as_always(stranger: Any) -> None:
    app = SQLASessionMiddleware(lambda environ, start: [], stranger)
    for _ in range(2):
        with app.context() as opened:
            opened.execute(text("SELECT 1"))
            opened.rollback()
            assert len(opened.scalars(NAMES).all()) == 2
            assert driver_connection_of(opened).info.transaction_status.name == "INTRANS"
    app.dispose()


def test_more_statements_than_are_remembered(url: Any, other: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_begin, "_REMEMBERED_AT_MOST", 2)
    with observed(url) as (app, state), app.context() as opened:
        for statement in [select(ITEM.c.id + literal_column(str(number))) for number in range(4)] * 2:
            assert len(opened.execute(statement).all()) == 2
            assert state() == "idle"


def set_level(driver_connection: Any, record: Any) -> None:
    driver_connection.execute("SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    driver_connection.commit()


LEVELS: dict[str, Any] = {
    "the server's": ({"connect_args": {"options": "-c default_transaction_isolation=serializable"}}, None),
    "the engine's": ({"isolation_level": "REPEATABLE READ"}, None),
    "its execution option": ({"execution_options": {"isolation_level": "SERIALIZABLE"}}, None),
    "a listener's": ({}, set_level),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("first", [NAMES, text("SELECT 1")], ids=["read first", "text first"])
def test_snapshot_lasts_at_another_level(level: str, first: Any, url: Any, other: Engine) -> None:
    """Whoever says so: an option, the server, or a listener that SQLAlchemy does not know of."""
    options, listener = LEVELS[level]
    app = SQLASessionMiddleware(lambda environ, start: [], url, engine_options=options)
    if listener is not None:
        event.listen(app.engine, "connect", listener)
    for name in ("one", "two"):  # The first transaction of a connection asks for its level, and the second knows it.
        with app.context() as opened:
            opened.execute(first).all()
            before = opened.scalars(NAMES).all()
            with other.connect() as connection:
                connection.execute(insert(ITEM).values(name=name))
            assert opened.scalars(NAMES).all() == before
    app.dispose()


def test_level_of_one_transaction_does_not_stay(url: Any, other: Engine) -> None:
    with observed(url) as (app, state):
        for level, expected in [("SERIALIZABLE", "idle in transaction"), (None, "idle")]:
            with app.context() as opened:
                if level:
                    opened.connection(execution_options={"isolation_level": level})
                opened.scalars(NAMES).all()
                assert state() == expected


def test_plan_that_a_migration_has_outdated_is_made_anew(url: Any, other: Engine) -> None:
    """psycopg prepares what comes often, and without a ROLLBACK it does not forget."""
    columns = table("lazy_plan", Column("n", Integer))
    everything = select(literal_column("*")).select_from(columns)
    with other.connect() as connection, observed(url) as (app, _):
        connection.exec_driver_sql("DROP TABLE IF EXISTS lazy_plan")
        connection.exec_driver_sql("CREATE TABLE lazy_plan (n integer)")
        connection.exec_driver_sql("INSERT INTO lazy_plan VALUES (1)")
        for _ in range(8):
            with app.context() as opened:
                assert opened.execute(everything).all() == [(1,)]
        connection.exec_driver_sql("ALTER TABLE lazy_plan ADD COLUMN m text")
        with app.context() as opened:
            assert opened.execute(everything).all() == [(1, None)]
        connection.exec_driver_sql("DROP TABLE lazy_plan")


@pytest.mark.parametrize(
    ("lazy_begin", "given", "expected"),
    [
        (None, False, "idle"),
        (True, False, "idle"),
        (False, False, "idle in transaction"),
        (None, True, "idle in transaction"),
        (True, True, "idle"),
        (False, True, "idle in transaction"),
    ],
)
def test_engine_that_is_given_is_lazy_only_if_asked_for(
    lazy_begin: bool | None, given: bool, expected: str, url: Any, other: Engine
) -> None:
    engine = create_engine(url)
    with observed(engine if given else url, lazy_begin=lazy_begin) as (app, state), app.context() as opened:
        opened.scalars(NAMES).all()
        assert state() == expected
    engine.dispose()


@pytest.mark.parametrize("name", ["do_execute", "do_executemany", "do_execute_no_params"])
def test_listener_of_the_application_is_called(name: str, url: Any, other: Engine) -> None:
    heard: list[str] = []
    statements: dict[str, Callable[[Any], object]] = {
        "do_execute": lambda connection: connection.execute(NAMES),
        "do_executemany": lambda connection: connection.exec_driver_sql("SELECT %s", [("a",), ("b",)]),
        "do_execute_no_params": lambda connection: connection.exec_driver_sql(
            "SELECT '%'", execution_options={"no_parameters": True}
        ),
    }
    with observed(url) as (app, _):
        event.listen(app.engine, name, lambda *arguments: heard.append(name))
        with app.engine.connect() as connection:
            statements[name](connection)
    assert heard == [name]


def test_each_engine_begins_lazily(url: Any, other: Engine) -> None:
    app = SQLASessionMiddleware(lambda environ, start: [], url, binds={"more": url}, replicas=[url])
    for engine in app.engines.values():
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
            connection.rollback()
            connection.execute(NAMES)
            assert connection.connection.dbapi_connection.info.transaction_status.name == "IDLE"
            connection.execute(text("SELECT 1"))
            assert connection.connection.dbapi_connection.info.transaction_status.name == "INTRANS"
    app.dispose()


def test_engines_with_the_same_dialect_begin_lazily_once(url: Any, other: Engine) -> None:
    """Two applications, each with an engine that was made of one engine."""
    engine = create_engine(url)
    for token in ("one", "two"):
        app = SQLASessionMiddleware(
            lambda environ, start: [], engine.execution_options(logging_token=token), lazy_begin=True
        )
        with app.context() as opened:
            opened.execute(text("SELECT 1"))
            opened.rollback()
            opened.execute(NAMES)
            assert driver_connection_of(opened).info.transaction_status.name == "IDLE"
    engine.dispose()


def test_replica_still_refuses_to_write(url: Any, other: Engine) -> None:
    app = SQLASessionMiddleware(lambda environ, start: [], url, replicas=[url])
    engine = app.engines["replicas[0]"]
    for statement in [select(SPY.c.n.label("of_a_replica")), insert(LOG).values(word="replica"), NAMES]:
        for _ in range(2):
            with engine.connect() as connection:
                refused = code_of(lambda: connection.execute(statement))  # noqa: B023  # called at once
                assert (statement is NAMES) == (not isinstance(refused, tuple))
    app.dispose()


def driver_connection_of(opened: Any) -> Any:
    """psycopg's connection, as nobody sees who asks for it: the Session's own method begins what was left out."""
    return Session.connection(opened()).connection.dbapi_connection


class Interruption(BaseException):
    """As gevent raises it in a greenlet that it kills."""


class TimeIsUpError(Exception):
    """As the handlers of signals raise it."""


def interrupt(driver_connection: Any, number: int, error: BaseException) -> None:
    """Have psycopg's wait with that number end by an error, after it has sent what it can."""
    usual, waits = driver_connection.wait, itertools.count()

    def wait(steps: Any, *arguments: Any, **options: Any) -> Any:
        if next(waits) != number:
            return usual(steps, *arguments, **options)
        next(steps, None)
        with suppress(RuntimeError):
            steps.close()  # psycopg goes on in a "finally". Else the garbage collector complains of that.
        raise error

    driver_connection.wait = wait


#: psycopg waits, for nothing, as a cursor adds the statement, and then for the answers.
WAITS = list(itertools.product([NAMES, text("SELECT 1")], range(2)))


@pytest.mark.parametrize("error", [Interruption, TimeIsUpError])
@pytest.mark.parametrize(("first", "number"), WAITS)
def test_interruption_comes_out_and_leaves_nothing(
    first: Any, number: int, error: type[BaseException], url: Any, other: Engine
) -> None:
    """Whichever wait it ends: the application gets it, and nobody gets a connection in another state than usual."""
    with observed(url, engine_options={"pool_size": 1, "max_overflow": 0}) as (app, _):
        with app.context() as opened:
            interrupt(driver_connection_of(opened), number, error())
            with pytest.raises(error):
                opened.execute(first).all()
        with app.context() as opened:
            driver_connection = opened.connection().connection.dbapi_connection
            assert not driver_connection.autocommit
            assert driver_connection.pgconn.pipeline_status == 0
            opened.execute(insert(LOG).values(word="not committed"))
    with other.connect() as connection:
        assert connection.scalars(select(LOG.c.word)).all() == []


def count_looks(driver_connection: Any, looks: list[int]) -> None:
    """Note how often psycopg looks at the socket, in each of its waits."""
    usual = driver_connection.wait

    def counted(steps: Any) -> Any:
        looks.append(0)
        try:
            wanted = next(steps)
            while True:
                looks[-1] += 1
                wanted = steps.send((yield wanted))
        except StopIteration as end:
            return end.value

    driver_connection.wait = lambda steps, *arguments, **options: usual(counted(steps), *arguments, **options)


@pytest.mark.parametrize("first", [NAMES, text("SELECT 1"), insert(LOG).values(word="mine")])
def test_begin_and_the_first_statement_are_sent_as_one(first: Any, url: Any, other: Engine) -> None:
    """psycopg's own pipeline looks twice whether it may send, for each statement."""
    with observed(url) as (app, _), app.context() as opened:
        looks: list[int] = []
        count_looks(driver_connection_of(opened), looks)
        opened.execute(first)
        assert len(looks) == 2
        assert looks[0] == 0  # A cursor has added the statement.
        assert looks[1] >= 1  # The answers may come in pieces.


@pytest.mark.parametrize(("number", "wrong"), [(2, None), (2, 1), (350, None), (350, 1), (350, 349)])
def test_many_rows_are_stored_or_the_first_error_comes_out(
    number: int, wrong: int | None, url: Any, other: Engine
) -> None:
    """More than are sent at once, as well. The connection is the same after it."""
    rows: list[dict[str, Any]] = [{"id": each, "word": str(each)} for each in range(number)]
    if wrong is not None:
        rows[wrong]["id"] = 0
    with observed(url) as (app, state), app.context() as opened:
        if wrong is None:
            opened.execute(insert(LOG), rows)
            opened.commit()
        else:
            with pytest.raises(IntegrityError, match="lazy_log_pkey"):
                opened.execute(insert(LOG), rows)
            opened.rollback()
        assert state() == "idle"
        assert not driver_connection_of(opened).autocommit
        stored = opened.scalars(select(LOG.c.word).order_by(LOG.c.id)).all()
        assert stored == (list(map(str, range(number))) if wrong is None else [])


@pytest.mark.parametrize("row", rows_of("psycopg2"))
def test_driver_without_pipelines_begins_as_always(row: Any, other: Engine) -> None:
    app = SQLASessionMiddleware(lambda environ, start: [], row.url(), lazy_begin=True)
    with app.context() as opened:
        opened.scalars(NAMES).all()
        assert opened.connection().connection.dbapi_connection.info.transaction_status == 2
    app.dispose()


def test_two_phases_begin_as_always(url: Any, other: Engine) -> None:
    with observed(url, session_options={"twophase": True}) as (app, state), app.context() as opened:
        opened.scalars(NAMES).all()
        assert state() == "idle in transaction"


def test_other_server_of_the_same_driver_begins_as_always(url: Any, other: Engine) -> None:
    """Nothing is known of what its read-only transactions refuse."""
    app = SQLASessionMiddleware(lambda environ, start: [], under_another_name(url))
    with app.context() as opened:
        opened.execute(text("SELECT 1"))
        opened.rollback()
        opened.scalars(NAMES).all()
        assert opened.connection().connection.dbapi_connection.info.transaction_status.name == "INTRANS"
    app.dispose()


@pytest.mark.parametrize("wrong", ["yes", 1, []])
def test_wrong_value_is_refused(wrong: Any, sqlite_url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"lazy_begin.* must be true or false, got"):
        SQLASessionMiddleware(lambda environ, start: [], sqlite_url, lazy_begin=wrong)
