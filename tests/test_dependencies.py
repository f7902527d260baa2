"""The private names of dependencies: each one exists, means what this library expects, and is used in one module.

Run with the oldest and the newest dependencies. A test that fails here names what a release has taken away.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import pkgutil
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

import falcon
import pytest
from bottle import Bottle
from django.core.handlers.base import BaseHandler
from django.core.handlers.exception import convert_exception_to_response
from flask import Flask
from pyramid.tweens import excview_tween_factory
from sqlalchemy import (
    Column,
    Connection,
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    Pool,
    Table,
    create_engine,
    event,
    insert,
    select,
    text,
    union,
)
from sqlalchemy.dialects.mysql.base import MySQLDialect
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.engine import ExceptionContext, ExecutionContext
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    contains_eager,
    joinedload,
    mapped_column,
    relationship,
    scoped_session,
    selectinload,
)
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.orm.session import SessionTransactionState
from sqlalchemy.pool import AssertionPool, NullPool, QueuePool, SingletonThreadPool, StaticPool
from sqlalchemy.sql import visitors
from sqlalchemy.sql.selectable import ForUpdateArg
from werkzeug.local import Local, LocalProxy

import sqlasession_middleware
from sqlasession_middleware import _dependencies
from sqlasession_middleware._drivers.registry import driver_of
from tests.conftest import DATABASES_SEEN
from tests.drivers import Row, rows_of, rows_on
from tests.sources import module_files

HOME = Path(_dependencies.__file__)
OWN = {"sqlasession_middleware", *sys.stdlib_module_names}


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "dependencies_item"
    id: Mapped[int] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column()
    n: Mapped[int] = mapped_column(default=0)
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012


class Part(Base):
    __tablename__ = "dependencies_part"
    id: Mapped[int] = mapped_column(primary_key=True)
    whole_id: Mapped[int | None] = mapped_column(ForeignKey("dependencies_part.id"))
    parts: Mapped[list[Part]] = relationship()


items = Item.__table__


def assert_has(owner: object, name: str) -> None:
    assert hasattr(owner, name), f"{owner!r} has no {name!r} any more: see sqlasession_middleware/_dependencies.py"


@pytest.fixture
def engine(sqlite_engine: Engine) -> Engine:
    Base.metadata.create_all(sqlite_engine)
    return sqlite_engine


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    with Session(engine) as opened:
        yield opened


# SQLAlchemy: sessions


def test_innermost_transaction(session: Session) -> None:
    assert_has(session, _dependencies.TRANSACTION)
    assert _dependencies.innermost_transaction(session) is None
    outermost = session.begin()
    assert _dependencies.innermost_transaction(session) is outermost
    nested = session.begin_nested()
    assert _dependencies.innermost_transaction(session) is nested
    assert nested.parent is outermost


def test_is_clean(session: Session) -> None:
    assert_has(session, "_is_clean")
    assert _dependencies.is_clean(session)
    item = Item(id=1)
    session.add(item)
    assert not _dependencies.is_clean(session)
    session.flush()
    assert _dependencies.is_clean(session)
    item.n = 1
    assert not _dependencies.is_clean(session)
    session.flush()
    session.delete(item)
    assert not _dependencies.is_clean(session)


def test_connections_of(session: Session, engine: Engine) -> None:
    transaction = session.begin()
    assert_has(transaction, "_connections")
    assert _dependencies.connections_of(transaction) == []
    other = create_engine("sqlite://")
    opened = {session.connection(), session.connection(bind_arguments={"bind": other})}
    found = _dependencies.connections_of(transaction)
    assert len(found) == 2
    assert set(found) == {(connection, True) for connection in opened}
    assert len(_dependencies.open_connections_of(transaction)) == 2
    assert set(_dependencies.open_connections_of(transaction)) == opened
    session.close()
    other.dispose()
    with engine.connect() as connection, Session(connection) as joined:
        transaction = joined.begin()
        joined.connection()
        assert _dependencies.connections_of(transaction) == [(connection, False)]


def test_state_of_transaction(session: Session, engine: Engine) -> None:
    transaction = session.begin()
    assert_has(transaction, "_state")
    assert _dependencies.state_of_transaction(transaction) is SessionTransactionState.ACTIVE
    session.close()
    assert _dependencies.state_of_transaction(transaction) is SessionTransactionState.CLOSED


def test_set_execution_options(engine: Engine) -> None:
    with engine.connect() as connection:
        assert_has(connection, "_execution_options")
        before = connection.get_execution_options()
        connection.execution_options(stream_results=True)
        _dependencies.set_execution_options(connection, before)
        assert "stream_results" not in connection.get_execution_options()


def test_flush_error(session: Session) -> None:
    item = Item(id=1)
    session.add(item)
    session.flush()
    assert_has(session.get_transaction(), "_rollback_exception")
    assert _dependencies.flush_error(session) is None
    session.connection().execute(items.update().values(version=7))
    item.n = 1
    with pytest.raises(StaleDataError) as caught:
        session.flush()
    assert _dependencies.flush_error(session) is caught.value
    session.rollback()
    assert _dependencies.flush_error(session) is None
    assert _dependencies.flush_error(None) is None


def test_repeats_entities(session: Session) -> None:
    assert_has(session.execute(select(Part)), "_unique_filter_state")
    joined = select(Part).join(part := aliased(Part), Part.parts)
    for statement in (
        select(Part),
        select(Part.id),
        joined,
        select(items.c.id),
        joined.options(selectinload(Part.parts)),
    ):
        assert not _dependencies.repeats_entities(session.execute(statement))
    for option in (joinedload(Part.parts), contains_eager(Part.parts.of_type(part))):
        assert _dependencies.repeats_entities(session.execute(joined.options(option)))


def test_methods_of_a_scoped_session_use_the_overridden_property(session: Session) -> None:
    asked: list[str] = []

    class Ours(scoped_session[Session]):
        @property
        def _proxied(self) -> Session:
            asked.append("_proxied")
            return session

    assert_has(scoped_session, "_proxied")
    ours = Ours(lambda: pytest.fail("scoped_session does not use _proxied any more"))
    ours.add(Item(id=1))
    ours.flush()
    assert ours.scalars(select(Item.id)).all() == [1]
    assert ours.get(Item, 1) is session.get(Item, 1)
    assert ours.new == session.new
    ours.rollback()
    assert len(asked) == 6


# SQLAlchemy: statements

FOR_UPDATE = select(items).with_for_update()


@pytest.mark.parametrize(
    ("statement", "locks"),
    [
        (FOR_UPDATE, True),
        (select(Item).with_for_update(read=True), True),
        (union(select(items), select(items)).with_for_update(), True),
        (select(items), False),
        (select(Item), False),
        (union(select(items), select(items)), False),
    ],
)
def test_for_update(statement: Any, locks: bool) -> None:
    assert_has(statement, _dependencies.FOR_UPDATE)
    assert (getattr(statement, _dependencies.FOR_UPDATE) is not None) is locks
    # The public way, which is_read_throughout() takes for nested statements.
    for nested in (statement, select(statement.subquery())):
        assert any(isinstance(each, ForUpdateArg) for each in visitors.iterate(nested)) is locks


def test_raw_columns() -> None:
    assert_has(select(items), _dependencies.RAW_COLUMNS)
    assert getattr(select(items.c.id, items.c.n), _dependencies.RAW_COLUMNS)[0].table is items
    assert getattr(select(items), _dependencies.RAW_COLUMNS)[0] is items
    assert not hasattr(text("SELECT 1"), _dependencies.RAW_COLUMNS)


def test_prefixes_and_suffixes() -> None:
    statement = select(items).prefix_with(text("/* before */")).suffix_with(text("/* after */"))
    for name, words in ((_dependencies.PREFIXES, "/* before */"), (_dependencies.SUFFIXES, "/* after */")):
        assert_has(statement, name)
        [(element, _)] = getattr(statement, name)
        assert str(element) == words
        assert getattr(select(items), name) == ()


# SQLAlchemy: engines and pools


def test_isolation_level_on_connect() -> None:
    for level in (None, "AUTOCOMMIT", "SERIALIZABLE"):
        dialect = create_engine("sqlite://", **({} if level is None else {"isolation_level": level})).dialect
        assert_has(dialect, _dependencies.ON_CONNECT_ISOLATION_LEVEL)
        assert getattr(dialect, _dependencies.ON_CONNECT_ISOLATION_LEVEL) == level


@pytest.mark.parametrize(("options", "expected"), [({}, 10), ({"max_overflow": 3}, 3), ({"max_overflow": -1}, -1)])
def test_max_overflow(options: Any, expected: int) -> None:
    pool = create_engine("sqlite://", poolclass=QueuePool, **options).pool
    assert_has(pool, "_max_overflow")
    assert isinstance(pool, QueuePool)
    assert _dependencies.max_overflow(pool) == expected


def test_pool_size_of_zero_has_no_limit() -> None:
    pool = create_engine("sqlite://", poolclass=QueuePool, pool_size=0).pool
    assert isinstance(pool, QueuePool)
    assert _dependencies.max_overflow(pool) == -1


@pytest.mark.parametrize("kind", [QueuePool, StaticPool, AssertionPool, SingletonThreadPool, NullPool])
def test_creator_of(kind: type[Pool]) -> None:
    engine = create_engine("sqlite://", poolclass=kind)
    assert_has(engine.pool, "_invoke_creator")
    received: list[Any] = []
    event.listen(engine, "do_connect", lambda dialect, record, arguments, options: received.append(record))
    with engine.connect() as connection:
        known = connection.connection.dbapi_connection
        record: Any = object()
        made = _dependencies.creator_of(engine.pool)(record)
        assert made is not known
        assert received[-1] is record
        made.close()
    engine.dispose()
    other = create_engine("sqlite://", poolclass=kind, creator=lambda: known)
    assert _dependencies.creator_of(other.pool)(record) is known


def test_idle_queue(engine: Engine) -> None:
    pool = engine.pool
    assert isinstance(pool, QueuePool)
    assert_has(pool, "_pool")
    with engine.connect() as connection:
        driver_connection = connection.connection.dbapi_connection
        assert not _dependencies.idle_queue(pool).queue
    idle = _dependencies.idle_queue(pool)
    [record] = idle.queue
    assert record.dbapi_connection is driver_connection
    with idle.mutex:
        record.close()
    assert record.dbapi_connection is None
    with engine.connect() as connection:
        assert connection.scalar(select(1)) == 1
        assert connection.connection.dbapi_connection is record.dbapi_connection


@pytest.mark.parametrize("kind", [QueuePool, StaticPool, AssertionPool, SingletonThreadPool, NullPool])
def test_known_records(kind: type[Pool]) -> None:
    engine = create_engine("sqlite://", poolclass=kind)
    assert _dependencies.known_records(engine.pool) == []
    with engine.connect() as connection:
        driver_connection = connection.connection.dbapi_connection
    found = [record.dbapi_connection for record in _dependencies.known_records(engine.pool)]
    assert found == ([] if kind is NullPool else [driver_connection]), f"{kind.__name__} keeps its records elsewhere"
    engine.dispose()


@pytest.mark.parametrize("kind", [QueuePool, StaticPool, SingletonThreadPool, AssertionPool])
def test_outdate_connections(kind: type[Pool], sqlite_url: str) -> None:
    engine = create_engine(sqlite_url, poolclass=kind)
    assert_has(engine.pool, "_invalidate")
    with engine.connect() as connection:
        old = connection.connection.dbapi_connection
        connection.execute(select(1))
        _dependencies.outdate_connections(connection)
        assert connection.scalar(select(1)) == 1
        assert connection.connection.dbapi_connection is old
    for _ in range(2):
        with engine.connect() as connection:
            new = connection.connection.dbapi_connection
            assert new is not old
    with engine.connect() as connection:
        assert connection.connection.dbapi_connection is new
    engine.dispose()
    old.close()  # StaticPool drops it without closing it, of which Python 3.13 warns.


@pytest.mark.parametrize("kind", [QueuePool, StaticPool, SingletonThreadPool, NullPool])
@pytest.mark.parametrize("in_transaction", [True, False])
def test_disown(kind: type[Pool], in_transaction: bool, sqlite_url: str) -> None:
    engine = create_engine(sqlite_url, poolclass=kind)
    returned: list[object] = []
    event.listen(engine, "checkin", lambda driver_connection, record: returned.append(driver_connection))
    connection = engine.connect()
    proxy, driver_connection = connection.connection, connection.connection.dbapi_connection
    assert_has(proxy, "_connection_record")
    if in_transaction:
        connection.exec_driver_sql("CREATE TABLE kept (id INTEGER)")
        connection.exec_driver_sql("INSERT INTO kept VALUES (1)")
    _dependencies.disown(proxy)
    assert not proxy.is_valid
    connection.invalidate()
    connection.close()
    assert returned == []
    if in_transaction:
        assert driver_connection.in_transaction
        assert driver_connection.execute("SELECT id FROM kept").fetchall() == [(1,)]
    driver_connection.close()
    engine.dispose()


@pytest.mark.parametrize("row", rows_on("postgresql", "mariadb"))
def test_ping(row: Row) -> None:
    engine = create_engine(row.url())
    assert_has(engine.dialect, "_do_ping_w_event")
    pinged: list[bool] = []
    event.listen(engine, "handle_error", lambda context: pinged.append(context.is_pre_ping))
    with engine.connect() as connection:
        driver_connection = connection.connection.dbapi_connection
        assert driver_connection is not None
        assert _dependencies.ping(engine.dialect, driver_connection) is True
        driver_connection.close()
        assert _dependencies.ping(engine.dialect, driver_connection) is False
        connection.invalidate()
    engine.dispose()
    assert pinged == [True]


@pytest.mark.parametrize("pings", [True, False])
def test_take_pre_ping(pings: bool) -> None:
    engine = create_engine("sqlite://", poolclass=QueuePool, pool_pre_ping=pings)
    assert_has(engine.pool, "_pre_ping")
    assert _dependencies.take_pre_ping(engine.pool) is pings
    assert _dependencies.take_pre_ping(engine.pool.recreate()) is False


def test_call_first(engine: Engine) -> None:
    called: list[str] = []
    listeners: dict[str, Any] = {name: lambda context, name=name: called.append(name) for name in ("first", "other")}
    for name in ("other", "first"):
        event.listen(engine, "handle_error", listeners[name])
    assert_has(engine.dialect.dispatch.handle_error, "listeners")
    _dependencies.call_first(engine, listeners["first"])
    with engine.connect() as connection, pytest.raises(DBAPIError) as caught:
        connection.execute(text("no SQL"))
    assert called == ["first", "other"]
    assert _dependencies.was_handled(caught.value.__traceback__)
    event.remove(engine, "handle_error", listeners["first"])
    with engine.connect() as connection, pytest.raises(DBAPIError):
        connection.execute(text("no SQL"))
    assert called == ["first", "other", "other"]


@pytest.mark.parametrize("name", ["do_execute", "do_execute_no_params"])
def test_call_first_before_whoever_executes(engine: Engine, name: str) -> None:
    called: list[str] = []
    event.listen(engine, name, lambda *arguments: called.append("other") or True)
    listener: Any = lambda *arguments: called.append("first")  # noqa: E731
    event.listen(engine, name, listener)
    _dependencies.call_first(engine, listener, name)
    with engine.connect() as connection:
        options = {"no_parameters": True} if name == "do_execute_no_params" else {}
        connection.execution_options(**options).exec_driver_sql("DELETE FROM dependencies_item")
    assert called == ["first", "other"]


def test_is_server_side() -> None:
    seen: list[tuple[bool, ExecutionContext]] = []
    engine = create_engine(DATABASES_SEEN.url("postgresql", ""))

    @event.listens_for(engine, "do_execute")
    def look(cursor: Any, statement: str, parameters: Any, context: ExecutionContext) -> None:
        seen.append((_dependencies.is_server_side(context), context))

    with engine.connect() as connection:
        connection.execute(select(1)).all()
        connection.execute(select(1), execution_options={"stream_results": True}).all()
    engine.dispose()
    assert [each for each, _ in seen[-2:]] == [False, True]
    assert_has(seen[0][1], "_is_server_side")


def test_attributes_with_files(tmp_path: Path) -> None:
    """One that is gone makes a file a stream again. Django's needs settings, and is in tests/test_giving_back.py."""
    path = tmp_path / "file"
    path.write_bytes(b"x")
    for (module, kind), attribute in _dependencies.FILE_ATTRIBUTES.items():
        made = getattr(importlib.import_module(module), kind)
        if module == "django.http.response":
            continue
        with path.open("rb") as file:
            arguments = {"AppIterRange": (0, 1), "CloseableStreamIterator": (8192,)}.get(kind, ())
            found = getattr(made(file, *arguments), attribute, None)
            assert found is file, f"{module}.{kind} has no {attribute!r} any more: see _dependencies.py"
    for (module, name), variable in _dependencies.FILE_VARIABLES.items():
        kind, _, method = name.partition(".")
        with path.open("rb") as file:
            generator = getattr(getattr(importlib.import_module(module), kind)(file), method)()
            assert generator.gi_code.co_qualname == name
            assert generator.gi_frame.f_globals["__name__"] == module
            assert generator.gi_frame.f_locals[variable].file is file


def test_error_that_was_handled_is_known_by_its_traceback() -> None:
    for name in _dependencies._HANDLERS:
        assert_has(Connection, name)
    assert not _dependencies.was_handled(None)
    with pytest.raises(DBAPIError) as caught:
        create_engine("sqlite:////no/such/folder/x.db").connect()
    assert _dependencies.was_handled(caught.value.__traceback__)
    with pytest.raises(ValueError, match="x") as other:
        raise ValueError("x")
    assert not _dependencies.was_handled(other.value.__traceback__)


def test_error_of_a_commit_is_known_by_its_traceback(engine: Engine) -> None:
    metadata = MetaData()
    parent = Table("dependencies_parent", metadata, Column("id", Integer, primary_key=True))
    deferred = ForeignKey(parent.c.id, deferrable=True, initially="DEFERRED")
    child = Table("dependencies_child", metadata, Column("id", Integer, primary_key=True), Column("parent", deferred))
    metadata.create_all(engine)
    seen: list[bool] = []

    def note(context: ExceptionContext) -> None:
        seen.append(_dependencies.came_from_commit(context.original_exception.__traceback__))

    event.listen(engine, "handle_error", note)
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA foreign_keys = ON")
        connection.execute(insert(child).values(id=1, parent=7))
        with pytest.raises(DBAPIError):
            connection.exec_driver_sql("SELECT * FROM dependencies_missing")
        with pytest.raises(IntegrityError) as caught:
            connection.commit()
    assert seen == [False, True], "the frame of a COMMIT is not called 'do_commit' any more"
    assert _dependencies.came_from_commit(caught.value.__traceback__)
    assert not _dependencies.came_from_commit(None)


def test_error_of_a_rollback_is_known_by_its_traceback(engine: Engine) -> None:
    assert_has(PGDialect, "do_rollback_twophase")
    seen: list[bool] = []

    def note(context: ExceptionContext) -> None:
        seen.append(_dependencies.came_from_rollback(context.original_exception.__traceback__))

    event.listen(engine, "handle_error", note)
    with engine.connect() as connection:
        with pytest.raises(DBAPIError):
            connection.exec_driver_sql("SELECT * FROM dependencies_missing")
        connection.connection.driver_connection.close()  # type: ignore[union-attr]  # there is one
        with pytest.raises(DBAPIError) as caught:
            connection.rollback()
    assert seen == [False, True], "the frame of a ROLLBACK is not called 'do_rollback' any more"
    assert not _dependencies.came_from_commit(caught.value.__traceback__)
    assert not _dependencies.came_from_rollback(None)


def test_error_of_a_second_phase_is_known_by_its_traceback(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    for dialect in (PGDialect, MySQLDialect):
        assert_has(dialect, "do_commit_twophase")

    def do_commit_twophase(connection: Connection, *arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError

    for name in ("do_begin_twophase", "do_prepare_twophase", "do_rollback_twophase"):
        monkeypatch.setattr(engine.dialect, name, lambda *arguments, **options: None)
    monkeypatch.setattr(engine.dialect, "do_commit_twophase", do_commit_twophase)
    with engine.connect() as connection:
        transaction = connection.begin_twophase()
        transaction.prepare()
        with pytest.raises(ZeroDivisionError) as caught:
            transaction.commit()
    assert _dependencies.came_from_commit(caught.value.__traceback__)


# Frameworks

#: What a framework's function that catches the errors of views belongs to.
CATCHERS = {
    ("flask.app", "full_dispatch_request"): Flask,
    ("flask.app", "wsgi_app"): Flask,
    ("pyramid.tweens", "excview_tween"): excview_tween_factory,
    ("falcon.app", "__call__"): falcon.App,
    ("bottle", "_handle"): Bottle,
    ("bottle", "_cast"): Bottle,
    ("bottle", "wsgi"): Bottle,
    ("django.core.handlers.base", "_get_response"): BaseHandler,
    ("django.core.handlers.exception", "inner"): convert_exception_to_response,
}


def test_functions_that_catch_errors_of_views() -> None:
    """``tests/test_recovery.py`` sees them at work."""
    assert CATCHERS.keys() == _dependencies._CATCHERS.keys()
    for (module, name), home in CATCHERS.items():
        assert home.__module__ == module
        if inspect.isclass(home):
            assert_has(home, name)
            around = _dependencies._CATCHERS[module, name]
            assert around is None or hasattr(home, around)
        else:
            assert name in [each.co_name for each in home.__code__.co_consts if inspect.iscode(each)]


# Werkzeug, drivers, Python


def test_current_object() -> None:
    local = Local()
    local.application = found = object()
    assert_has(LocalProxy, "_get_current_object")
    assert _dependencies.current_object(local("application")) is found


def test_socket_of_pymysql() -> None:
    connections = pytest.importorskip("pymysql.connections")
    assert_has(connections.Connection, "_sock")
    engine = create_engine(DATABASES_SEEN.url("mariadb", ""))
    with engine.connect() as connection:
        assert _dependencies.socket_of(connection.connection.dbapi_connection).fileno() > 0
    engine.dispose()
    assert _dependencies.socket_of(object()) is None


def test_read_timeout_of_pymysql() -> None:
    """It is read before each answer, and not only when the connection is made."""
    pymysql = pytest.importorskip("pymysql")
    engine = create_engine(DATABASES_SEEN.url("mariadb", ""))
    with engine.connect() as connection:
        driver_connection = connection.connection.driver_connection
        assert_has(driver_connection, _dependencies.READ_TIMEOUT)
        cursor = driver_connection.cursor()
        with _dependencies.answers_within(driver_connection, 0.2), pytest.raises(pymysql.OperationalError):
            cursor.execute("SELECT SLEEP(30)")
        assert getattr(driver_connection, _dependencies.READ_TIMEOUT) is None
        connection.invalidate()
    with engine.connect() as connection:
        driver_connection = connection.connection.driver_connection
        with _dependencies.answers_within(driver_connection, 0.2):
            connection.execute(text("SELECT 1"))
        connection.execute(text("SELECT SLEEP(0.5)"))
    engine.dispose()
    with _dependencies.answers_within(object(), 0.2):
        pass


def test_autocommit() -> None:
    """Also in a transaction, where psycopg's own attribute cannot be set."""
    psycopg = pytest.importorskip("psycopg")
    engine = create_engine(rows_of("psycopg")[0].values[0].url())
    with engine.connect() as connection:
        driver_connection = connection.connection.dbapi_connection
        assert_has(driver_connection, _dependencies.AUTOCOMMIT)
        for value in (True, False):
            setattr(driver_connection, _dependencies.AUTOCOMMIT, value)
            assert driver_connection.autocommit is value
        driver_connection.execute("SELECT 1")
        with pytest.raises(psycopg.ProgrammingError):
            driver_connection.autocommit = True
        setattr(driver_connection, _dependencies.AUTOCOMMIT, True)
        assert driver_connection.autocommit is True
        setattr(driver_connection, _dependencies.AUTOCOMMIT, False)
    engine.dispose()


def test_has_prepared() -> None:
    engine = create_engine(rows_of("psycopg")[0].values[0].url())
    with engine.connect() as connection:
        driver_connection: Any = connection.connection.driver_connection
        assert not _dependencies.has_prepared(driver_connection)
        driver_connection.execute("SELECT 1", prepare=True)
        assert _dependencies.has_prepared(driver_connection)
        driver_connection.rollback()
        assert not _dependencies.has_prepared(driver_connection)
    engine.dispose()
    assert not _dependencies.has_prepared(object())


def test_pipeline() -> None:
    """A cursor adds its statement to the connection's Pipeline, which is asked then to send it, and in the end."""
    psycopg = pytest.importorskip("psycopg")
    engine = create_engine(rows_of("psycopg")[0].values[0].url())
    asked = []

    class Asked(psycopg.Pipeline):  # type: ignore[misc]  # as psycopg may be missing
        def _communicate_gen(self) -> Any:
            asked.append((len(self.command_queue), len(self.result_queue)))
            return super()._communicate_gen()

    assert_has(psycopg.Pipeline, "_communicate_gen")
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        driver_connection: Any = connection.connection.dbapi_connection
        assert_has(driver_connection, _dependencies.PIPELINE)
        assert getattr(driver_connection, _dependencies.PIPELINE) is None
        with driver_connection.pipeline() as pipeline:
            assert getattr(driver_connection, _dependencies.PIPELINE) is pipeline
        pipeline = Asked(driver_connection)
        setattr(driver_connection, _dependencies.PIPELINE, pipeline)
        driver_connection.pgconn.enter_pipeline_mode()
        pipeline.pgconn.send_query_params(b"BEGIN READ ONLY", None)
        pipeline.result_queue.append(None)
        cursor = driver_connection.execute("SHOW transaction_read_only")
        assert asked == [(1, 2)]
        pipeline.pgconn.send_query_params(b"no SQL", None)
        pipeline.result_queue.append(None)
        with pytest.raises(psycopg.errors.SyntaxError):
            pipeline.sync()
        assert len(asked) == 2
        pipeline.sync()  # It reads what has come after the error.
        assert cursor.fetchone() == ("on",)
        driver_connection.pgconn.exit_pipeline_mode()
        setattr(driver_connection, _dependencies.PIPELINE, None)
        driver_connection.execute("ROLLBACK")
    engine.dispose()


#: What their connections send with, and the public methods that leave nothing open: they ask for no data.
SENDS = {"_execute_command", "_write_bytes", "write_packet", "_send_autocommit_mode"}
LEAVES_NOTHING_OPEN = {"commit", "rollback", "ping"}


@pytest.mark.parametrize("row", rows_of("pymysql", "mariadb"))
def test_public_methods_that_send_are_known(row: Row) -> None:
    """Each method of the driver's connections that sends by itself; those of mysqlclient are written in C."""
    engine = create_engine(row.url())
    with engine.connect() as connection:
        kind: Any = type(connection.connection.dbapi_connection)
    engine.dispose()
    sends = set()
    for name, found in vars(kind).items():
        function = found.fset if isinstance(found, property) else found
        if inspect.isfunction(function) and SENDS.intersection(function.__code__.co_names) and name[0] != "_":
            sends.add(name)
    assert "begin" in sends
    assert sends - LEAVES_NOTHING_OPEN <= set(driver_of(engine).sending)  # type: ignore[attr-defined]


@pytest.mark.parametrize("row", rows_of("mariadb"))
def test_last_statement(row: Row) -> None:
    engine = create_engine(row.url())
    with engine.connect() as connection:
        driver_connection: Any = connection.connection.dbapi_connection
        cursor = driver_connection.cursor()
        for name, arguments in {
            "execute": ("SELECT 1",),
            "executemany": ("INSERT INTO dependencies_missing VALUES (?)", [(1,)]),
            "callproc": ("dependencies_missing", ()),
        }.items():
            assert_has(driver_connection, _dependencies.LAST_STATEMENT)
            setattr(driver_connection, _dependencies.LAST_STATEMENT, None)
            with suppress(DBAPIError, engine.dialect.loaded_dbapi.Error):
                getattr(cursor, name)(*arguments)
            assert arguments[0] in getattr(driver_connection, _dependencies.LAST_STATEMENT)
    engine.dispose()


@pytest.mark.parametrize("row", rows_of("mariadb"))
def test_socket_number_of(row: Row) -> None:
    engine = create_engine(row.url())
    with engine.connect() as connection:
        driver_connection: Any = connection.connection.dbapi_connection
        assert_has(driver_connection, "_get_socket")
        assert stat.S_ISSOCK(os.fstat(_dependencies.socket_number_of(driver_connection)).st_mode)
        with suppress(engine.dialect.loaded_dbapi.Error):
            driver_connection.kill(driver_connection.connection_id)
        with pytest.raises(engine.dialect.loaded_dbapi.Error):
            driver_connection.ping()
        assert _dependencies.socket_number_of(driver_connection) == -1
        connection.invalidate()
    engine.dispose()


def test_calling_frame() -> None:
    assert_has(sys, "_getframe")
    assert _dependencies.calling_frame(0).f_code.co_name == "test_calling_frame"


@pytest.mark.parametrize("make", [threading.Lock, threading.RLock])
def test_lock_of_another_thread_is_reinitialized(make: Any) -> None:
    lock = make()
    assert_has(lock, "_at_fork_reinit")
    thread = threading.Thread(target=lock.acquire)
    thread.start()
    thread.join()
    assert not lock.acquire(blocking=False)
    _dependencies.reinitialize_lock(lock)
    assert lock.acquire(blocking=False)
    lock.release()


def test_lock_of_the_thread_that_forks_is_kept() -> None:
    lock = threading.RLock()
    assert_has(lock, "_is_owned")
    found: list[bool] = []
    with lock:
        _dependencies.reinitialize_lock(lock)
        thread = threading.Thread(target=lambda: found.append(lock.acquire(blocking=False)))
        thread.start()
        thread.join()
    assert found == [False]


# Nowhere else


class PrivateNames(ast.NodeVisitor):
    """The private names that a module defines, and those that it uses: attributes, imports, and names in strings."""

    def __init__(self, path: Path) -> None:
        self.defined: set[str] = set()
        self.used: list[tuple[str, str]] = []
        self.on_self: set[str] = set()
        self.path = path
        self.visit(ast.parse(path.read_text()))

    def use(self, name: str, node: Any) -> None:
        if name.startswith("_") and not name.endswith("__"):
            self.used.append((name, f"{self.path}:{node.lineno} uses {name}"))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.defined.add(node.name)
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.defined.add(node.name)
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self.defined.add(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            if isinstance(node.ctx, ast.Store):
                self.defined.add(node.attr)
        elif isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()":
            pass  # What is overridden is listed, see below.
        elif node.attr in NAMES_OF_DEPENDENCIES:
            self.use(f"{node.attr} of a dependency", node)
        else:
            self.use(node.attr, node)
        self.generic_visit(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level == 0 and node.module != "__future__":
            # Only type checkers read typeshed's modules.
            for part in (node.module or "").removeprefix("_typeshed").split("."):
                self.use(part, node)
            for alias in node.names:
                self.use(f"{alias.name} of {node.module}", node)

    def visit_Import(self, node: ast.Import) -> None:
        for part in ".".join(alias.name for alias in node.names).split("."):
            self.use(part, node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and node.value.isidentifier():
            self.use(node.value, node)


#: As they stand in ``_dependencies``: another object of this library may have an attribute of the same name.
NAMES_OF_DEPENDENCIES: frozenset[str] = frozenset()
NAMES_OF_DEPENDENCIES = frozenset(name for name, _ in PrivateNames(HOME).used)


def test_names_are_found() -> None:
    assert {"_transaction", "_connections", "_max_overflow", "_sock", "_getframe"} <= NAMES_OF_DEPENDENCIES


def test_no_other_module_uses_a_private_name_of_a_dependency() -> None:
    modules = [PrivateNames(path) for path in module_files().values() if path != HOME]
    defined = {name for module in modules for name in module.defined}
    # Python documents this one.
    found = [place for module in modules for name, place in module.used if name not in defined and name != "_exit"]
    assert not found, "give each a name and a reason in _dependencies.py:\n" + "\n".join(found)


def test_no_class_overrides_a_private_name_of_a_dependency_unless_it_is_listed() -> None:
    names = [each.name for each in pkgutil.walk_packages(sqlasession_middleware.__path__, "sqlasession_middleware.")]
    modules = [importlib.import_module(name) for name in names if not name.endswith("_typing")]
    overridden = set()
    for _, kind in {member for module in modules for member in inspect.getmembers(module, inspect.isclass)}:
        if kind.__module__.startswith("sqlasession_middleware") and not issubclass(kind, Enum):
            # Names of Python's own classes, such as a Protocol's, are not a dependency's.
            foreign = [base for base in kind.__mro__ if base.__module__.partition(".")[0] not in OWN]
            for name in vars(kind):
                # An abstract class of Python's has one of the name for its own.
                is_private = name.startswith("_") and not name.startswith("__") and name != "_abc_impl"
                if is_private and any(name in vars(base) for base in foreign):
                    overridden.add((kind.__name__, name))
    assert overridden == _dependencies.OVERRIDDEN
