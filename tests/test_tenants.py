"""Tenants (G22): a database, a schema or rows for each of them, on real servers and by WSGI calls."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from click.testing import CliRunner
from paste.deploy import loadapp
from sqlalchemy import Column, MetaData, String, Table, create_engine, event, insert, make_url, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool
from werkzeug.test import Client

from sqlasession_middleware import after_commit, application, has_scope, session
from sqlasession_middleware._database.breaker import _registered
from sqlasession_middleware._drivers.registry import driver_of
from sqlasession_middleware._sessions.connections import open_connections
from sqlasession_middleware.cli import main
from sqlasession_middleware.errors import ConfigurationError, ScopeError, UnknownTenantError
from sqlasession_middleware.inspector import InspectorMiddleware
from sqlasession_middleware.tenants import TenantsMiddleware
from sqlasession_middleware.testing import assert_queries, isolated
from sqlasession_middleware.unavailable import breaker_state

from .conftest import DATABASES_SEEN
from .ports import free_port
from .wsgi import Environ, StartResponse, environ

pytestmark = pytest.mark.usefixtures("disposes")


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "tenant_note"
    id: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(String(80))


NAMES = ("acme", "globex", "initech")


def read(environ: Environ, start: StartResponse) -> list[bytes]:
    """Tells whose rows it finds; a POST adds one. ``/text`` asks by text, ``/mixed`` by both."""
    start("200 OK", [("Content-Type", "text/plain")])
    if environ["REQUEST_METHOD"] == "POST":
        session.add(Note(owner=application.tenant))
        session.commit()
    statement: Any = select(Note.owner).order_by(Note.id)
    if environ["PATH_INFO"] == "/text":
        statement = text("SELECT owner FROM tenant_note ORDER BY id")
    if environ["PATH_INFO"] == "/mixed":
        statement = select(text("owner")).select_from(text("tenant_note"))
    return [",".join(session.scalars(statement)).encode()]


def call(app: Any, method: str = "GET", **more: Any) -> tuple[str, bytes]:
    seen: list[str] = []
    body = app(environ(method, **more), lambda status, headers, exc_info=None: seen.append(status))
    try:
        return seen[0] if seen else "", b"".join(body)
    finally:
        if hasattr(body, "close"):
            body.close()


def ask(app: Any, name: str, method: str = "GET", path: str = "/") -> bytes:
    status, body = call(app, method, HTTP_X_TENANT=name, PATH_INFO=path)
    assert status == "200 OK", (status, body)
    return body


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., TenantsMiddleware]:
    """Makes an application with an SQLite file for each tenant."""

    def make(app: Any = read, **options: Any) -> TenantsMiddleware:
        options = {"tenant": "header:X-Tenant", "known": NAMES, "metadata": Base.metadata, **options}
        return TenantsMiddleware(app, f"sqlite:///{tmp_path}/{{tenant}}.db", **options)

    return make


@pytest.fixture
def postgresql() -> Iterator[str]:
    url = DATABASES_SEEN.url("postgresql", "")
    engine = create_engine(url)
    yield url
    with engine.begin() as connection:
        for name in NAMES:
            connection.execute(text(f'DROP SCHEMA IF EXISTS "t_{name}" CASCADE'))
        connection.execute(text("DROP TABLE IF EXISTS tenant_note"))
    engine.dispose()


@pytest.fixture
def schemas(postgresql: str) -> Iterator[Callable[..., TenantsMiddleware]]:
    """Makes an application with a schema for each tenant, on a pool of one connection."""
    made: list[TenantsMiddleware] = []

    def make(app: Any = read, **options: Any) -> TenantsMiddleware:
        options = {
            "tenant": "header:X-Tenant",
            "known": NAMES,
            "metadata": Base.metadata,
            "schema": "t_{tenant}",
            "engine_options": {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5},
            **options,
        }
        made.append(TenantsMiddleware(app, options.pop("bind", postgresql), **options))
        for name in made[-1].names():
            made[-1].init_database(name)
        return made[-1]

    yield make
    for each in made:
        each.dispose()


def files_in(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


class TestDatabaseEach:
    def test_each_sees_its_own_rows(self, files: Any, tmp_path: Path) -> None:
        app = files()
        assert files_in(tmp_path) == []
        for name in NAMES:
            app.init_database(name)
        for name in NAMES:
            assert ask(app, name, "POST") == name.encode()
        for name in NAMES:
            assert ask(app, name) == name.encode()
        assert files_in(tmp_path) == [f"{name}.db" for name in NAMES]

    def test_application_is_the_tenants(self, files: Any) -> None:
        app = files()
        with app.context("acme"):
            assert application.tenant == "acme"
            assert application == app.application("acme")
            assert repr(app.application("acme")).startswith("<TenantApplication 'acme' of ")
            with app.context("globex"):
                assert application.tenant == "globex"
            assert application.tenant == "acme"
        assert app.names() == sorted(NAMES)
        assert repr(app).startswith("<TenantsMiddleware of ")

    def test_two_first_requests_make_one(self, files: Any) -> None:
        made: list[str] = []
        at_once = threading.Barrier(8, timeout=30)

        def slow(name: str) -> str:
            made.append(name)
            return "sqlite://"

        app = TenantsMiddleware(answer_tenant, slow, tenant=lambda environ: "acme", known=NAMES)

        def first(number: int) -> bytes:
            at_once.wait()
            return call(app)[1]

        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(first, range(8))) == {b"acme"}
        assert made == ["acme"]

    def test_idle_tenant_is_forgotten_and_made_again(self, files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = Clock(monkeypatch)
        app = files(idle=60)
        app.init_database("acme")
        ask(app, "acme", "POST")
        first = app.application("acme")
        assert first.engine.pool.checkedin() == 1
        clock.at += 59
        app.application("globex")
        assert app.application("acme") is first
        clock.at += 61
        app.application("globex")
        assert first.engine.pool.checkedin() == 0
        second = app.application("acme")
        assert second is not first
        assert ask(app, "acme") == b"acme"

    def test_stream_keeps_its_tenant(self, files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """It has no connection between two chunks, and would find another application's otherwise."""
        clock = Clock(monkeypatch)

        def stream(environ: Environ, start: StartResponse) -> Iterator[bytes]:
            start("200 OK", [("Content-Type", "text/event-stream")])
            for _ in range(2):
                yield ",".join(session.scalars(select(Note.owner))).encode() + b"\n\n"

        app = files(stream, idle=60, most=1)
        app.init_database("acme")
        with app.context("acme"):
            session.add(Note(owner="acme"))
            session.commit()
        body: Any = app(environ(HTTP_X_TENANT="acme"), lambda status, headers, exc_info=None: None)
        steps = iter(body)
        assert next(steps) == b"acme\n\n"
        kept = app.application("acme")
        clock.at += 1000
        app.init_database("globex")
        assert app.application("acme") is kept
        assert next(steps) == b"acme\n\n"
        body.close()
        clock.at += 1000
        app.application("globex")
        assert app.application("acme") is not kept

    def test_most_have_connections(self, files: Any) -> None:
        app = files(most=2)
        for name in NAMES:
            app.init_database(name)
        first, *others = [app._table.applications.get(name) for name in NAMES]
        assert first is None
        assert all(each.engine.pool.checkedin() == 1 for each in others)

    def test_most_holds_for_connections_that_come_later(self, files: Any) -> None:
        """The applications are all made before the first of them connects."""

        def app(environ: Environ, start: StartResponse) -> list[bytes]:
            if environ["REQUEST_METHOD"] == "POST":
                session.connection()
            return answer_tenant(environ, start)

        tenants = files(app, most=1)
        for method in ("GET", "POST"):
            for name in NAMES:
                call(tenants, method, HTTP_X_TENANT=name)
        assert open_in(tenants) == ["initech"]

    def test_most_holds_for_connections_that_come_with_the_application(self, files: Any) -> None:
        app = files(most=1)
        app.on_making(lambda each: each.engine)
        for name in NAMES:
            app.application(name)
        assert open_in(app) == ["initech"]

    def test_most_holds_when_those_in_use_have_ended(self, files: Any) -> None:
        app = files(most=1)
        with app.context("acme"):
            session.connection()
            with app.context("globex"):
                session.connection()
                with app.context("initech"):
                    session.connection()
                assert open_in(app) == ["acme", "globex"]
            assert open_in(app) == ["acme"]
            assert session.scalar(text("SELECT 1")) == 1
        assert open_in(app) == ["acme"]

    def test_scope_revives_what_was_forgotten_before_it_began(
        self, files: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = Clock(monkeypatch)
        app = files(idle=60)
        app.init_database("acme")
        found = app.application("acme")
        context = found.context()
        clock.at += 1000
        app.application("globex")
        assert "acme" not in app._table.applications
        with context:
            assert app.application("acme") is found
            assert session.scalars(select(Note.owner)).all() == []
        # And where another one has come first, both work, and the old one keeps no connection.
        context = found.context()
        clock.at += 1000
        app.application("globex")
        other = app.application("acme")
        assert other is not found
        with context:
            assert session.scalars(select(Note.owner)).all() == []
            assert found.engine.pool.checkedout() == 1
        assert found.engine.pool.checkedin() == 0
        assert app.application("acme") is other

    def test_connection_keeps_its_tenant(self, files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = Clock(monkeypatch)
        app = files(idle=60)
        found = app.application("acme")
        with found.engine.connect():
            clock.at += 1000
            assert app.application("acme") is found

    def test_transaction_and_jobs_are_the_tenants(self, files: Any) -> None:
        done: list[str] = []

        def write(environ: Environ, start: StartResponse) -> list[bytes]:
            session.add(Note(owner=application.tenant))
            name = application.tenant
            after_commit(lambda: done.append(name))
            application.background(lambda: done.append(f"background of {application.tenant}"))
            start(environ["test.status"], [])
            return [b""]

        app = files(write, transaction=True, unavailable=True)
        for name in NAMES:
            app.init_database(name)
            call(app, HTTP_X_TENANT=name, **{"test.status": "200 OK" if name == "acme" else "500 Failed"})
        app.dispose()
        assert done == ["acme", "background of acme"]
        for name in NAMES:
            with app.context(name):
                assert session.scalars(select(Note.owner)).all() == (["acme"] if name == "acme" else [])

    def test_binds_and_replicas_are_the_tenants(self, tmp_path: Path) -> None:
        audit = MetaData(info={"bind_key": "audit"})
        Note.__table__.to_metadata(audit)
        url = f"sqlite:///{tmp_path}/{{tenant}}.db"
        app = TenantsMiddleware(
            read,
            {"url": url, "pool_size": 1},
            tenant="header:X-Tenant",
            known=NAMES,
            metadata=[Base.metadata, audit],
            binds={"audit": {"url": f"sqlite:///{tmp_path}/{{tenant}}_audit.db", "pool_size": 2}},
            replicas=[url],
        )
        for name in NAMES[:2]:
            app.init_database(name)
            ask(app, name, "POST")
        for name in NAMES[:2]:
            assert ask(app, name) == name.encode()
            assert set(app.application(name).engines) == {"default", "audit", "replicas[0]"}
        assert files_in(tmp_path) == ["acme.db", "acme_audit.db", "globex.db", "globex_audit.db"]

    def test_isolated_is_one_tenants(self, files: Any) -> None:
        app = files()
        for name in NAMES[:2]:
            app.init_database(name)
        with isolated(app.application("acme")):
            assert ask(app, "acme", "POST") == b"acme"
            assert ask(app, "globex", "POST") == b"globex"
        assert ask(app, "acme") == b""
        assert ask(app, "globex") == b"globex"


def open_in(app: TenantsMiddleware) -> list[str]:
    """The tenants that have a pool."""
    return [name for name, each in app._table.applications.items() if each.open_engines()]


def answer_tenant(environ: Environ, start: StartResponse) -> list[bytes]:
    start("200 OK", [])
    return [application.tenant.encode()]


class Clock:
    """The clock of tenants and of what is known of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at = 1000.0
        for module in ("sqlasession_middleware._tenants.application", "sqlasession_middleware._tenants.table",
                       "sqlasession_middleware._tenants.names", "sqlasession_middleware.tenants"):  # fmt: skip
            monkeypatch.setattr(f"{module}.now", lambda: self.at)


class TestSchemaEach:
    @pytest.mark.parametrize("path", ["/", "/text", "/mixed"])
    @pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
    @pytest.mark.parametrize("lazy", [True, False])
    def test_each_sees_its_own_rows_on_one_connection(
        self, schemas: Any, postgresql: str, path: str, driver: str, lazy: bool
    ) -> None:
        app = schemas(bind=postgresql.replace("+psycopg:", f"+{driver}:"), lazy_begin=lazy)
        for name in NAMES:
            assert ask(app, name, "POST", path) == name.encode()
        for _ in range(8):  # More often than psycopg waits before it prepares a statement.
            for name in NAMES:
                assert ask(app, name, path=path) == name.encode()
        assert app.shared.engine.pool.checkedin() == 1

    def test_schema_and_tables_are_made_by_several_at_once(self, schemas: Any, postgresql: str) -> None:
        apps = [schemas(known=()) for _ in range(6)]
        for app in apps:
            app._known.last = frozenset(NAMES)
        at_once = threading.Barrier(len(apps), timeout=30)

        def create(app: TenantsMiddleware) -> None:
            at_once.wait()
            for name in NAMES:
                app.init_database(name)

        with ThreadPoolExecutor(len(apps)) as pool:
            list(pool.map(create, apps))
        assert ask(apps[0], "acme", "POST") == b"acme"

    def test_plain_read_leaves_nothing_open(self, schemas: Any) -> None:
        """With psycopg, BEGIN, the setting, a SELECT and COMMIT are one wait (G17)."""
        app = schemas()
        ask(app, "acme", "POST")
        with app.context("acme"):
            assert session.scalars(select(Note.owner)).all() == ["acme"]
            held = open_connections(session())
            assert [driver_of(each).is_idle(each) for each in held] == [True]
            assert session.scalars(text("SELECT owner FROM tenant_note")).all() == ["acme"]
            assert [driver_of(each).is_idle(each) for each in held] == [False]  # Text may do anything.

    @pytest.mark.parametrize("way", ["several", "server-side", "listener", "many", "no parameters", "savepoint"])
    def test_first_statement_of_any_kind_is_the_tenants(self, schemas: Any, way: str) -> None:
        app = schemas()
        for name in NAMES[:2]:
            ask(app, name, "POST")
        if way in ("listener", "many", "no parameters"):
            for kind in ("do_execute", "do_executemany", "do_execute_no_params"):
                event.listen(app.shared.engine, kind, lambda *more: None)
        for name in NAMES[:2]:
            with app.context(name):
                if way == "several":
                    session.execute(text("SET LOCAL work_mem TO '1MB'; INSERT INTO tenant_note (owner) VALUES ('x')"))
                    assert session.scalars(text("SELECT owner FROM tenant_note ORDER BY id")).all() == [name, "x"]
                elif way == "server-side":
                    options = {"stream_results": True}
                    found = session.execute(text("SELECT owner FROM tenant_note"), execution_options=options)
                    assert found.scalars().all() == [name]
                elif way == "many":
                    session.execute(text("INSERT INTO tenant_note (owner) VALUES (:owner)"), [{"owner": name}] * 2)
                    assert set(session.scalars(text("SELECT owner FROM tenant_note"))) == {name}
                elif way == "no parameters":
                    options = {"no_parameters": True}
                    found = session.execute(text("SELECT owner FROM tenant_note"), execution_options=options)
                    assert found.scalars().all() == [name]
                elif way == "savepoint":
                    with session.begin_nested():
                        assert session.scalars(text("SELECT owner FROM tenant_note")).all() == [name]
                    cursor = session.connection().connection.cursor()
                    cursor.execute("SELECT owner FROM tenant_note")
                    assert cursor.fetchall() == [(name,)]
                else:
                    assert session.scalars(text("SELECT owner FROM tenant_note")).all() == [name]

    def test_connection_that_was_read_on_is_the_tenants_when_it_is_handed_out(self, schemas: Any) -> None:
        app = schemas()
        ask(app, "acme", "POST")
        with app.context("acme"):
            assert session.scalars(select(Note.owner)).all() == ["acme"]
            cursor = session.connection().connection.cursor()
            cursor.execute("SELECT owner FROM tenant_note")
            assert cursor.fetchall() == [("acme",)]

    @pytest.mark.parametrize("listened", ["after_begin", "begin", "before_cursor_execute", "its own cursor"])
    @pytest.mark.parametrize("lazy", [True, False])
    def test_listener_with_a_cursor_of_the_driver_comes_first(
        self, schemas: Any, postgresql: str, lazy: bool, listened: str
    ) -> None:
        """It begins the transaction, as one does that tells the server who the user is. The rest is the tenant's."""

        def execute(connection: Any) -> None:
            connection.connection.cursor().execute("SET LOCAL work_mem TO '1MB'")

        app = schemas(lazy_begin=lazy)
        ask(app, "acme", "POST")
        engine, statement = app.shared.engine, "SELECT owner FROM tenant_note"
        calls: dict[str, Any] = {
            "begin": execute,
            "before_cursor_execute": lambda connection, *more: execute(connection),
            "its own cursor": lambda connection, cursor, *more: cursor.execute("SET LOCAL work_mem TO '1MB'"),
        }
        if listened in calls:
            name = listened if listened in ("begin", "before_cursor_execute") else "before_cursor_execute"
            event.listen(engine, name, calls[listened])
        for way in ("text", "connection"):
            with app.context("acme"):
                if listened == "after_begin":
                    event.listen(session(), "after_begin", lambda s, transaction, connection: execute(connection))
                if way == "text":
                    assert session.scalars(text(statement)).all() == ["acme"]
                cursor = session.connection().connection.cursor()
                assert cursor.execute(statement).fetchall() == [("acme",)]
                session.execute(text("SET LOCAL search_path TO public"))  # The application's own word is the last one.
                assert session.scalars(text("SHOW search_path")).all() == ["public"]
                session.connection()
                assert session.scalars(text("SHOW search_path")).all() == ["public"]

    @pytest.mark.parametrize("lazy_begin", [None, False])
    def test_setting_the_tenant_is_a_part_of_begin(self, schemas: Any, lazy_begin: bool | None) -> None:
        """It is no statement of the request's own, as BEGIN is none."""
        seen: list[Any] = []

        def app(environ: Environ, start: StartResponse) -> list[bytes]:
            seen.append(environ["sqlasession.record"])
            return list(read(environ, start))

        tenants = schemas(app, slow_requests={"seconds": 60}, lazy_begin=lazy_begin)
        with assert_queries(1):
            ask(tenants, "acme")
        assert (seen[0].count, seen[0].tenant) == (1, "acme")

    def test_temporary_table_of_another_hides_no_table(self, schemas: Any) -> None:
        """PostgreSQL looks for temporary tables first, and they stay with the connection."""
        app = schemas()
        for name in NAMES[:2]:
            ask(app, name, "POST")
        with app.context("acme"):
            session.execute(text("CREATE TEMPORARY TABLE tenant_note AS SELECT 'of acme' AS owner"))
            session.commit()
            assert session.scalars(text("SELECT owner FROM pg_temp.tenant_note")).all() == ["of acme"]
        assert ask(app, "globex", path="/text") == b"globex"

    @pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
    def test_role_without_a_search_path_finds_nothing_out_of_a_transaction(
        self, schemas: Any, postgresql: str, driver: str
    ) -> None:
        """And everything else works as before."""
        engine = create_engine(postgresql)
        role = f"tenant_web_{engine.url.database}"  # Roles are those of all databases.
        with engine.begin() as connection:
            Base.metadata.create_all(connection)  # in "public"
            connection.execute(text(f"DROP ROLE IF EXISTS {role}"))
            connection.execute(text(f"CREATE ROLE {role} LOGIN SUPERUSER"))
            connection.execute(text(f"ALTER ROLE {role} SET search_path TO ''"))
        url = make_url(postgresql).set(username=role, drivername=f"postgresql+{driver}")
        try:
            app = schemas(bind=url)
            for path in ("/", "/text"):
                for name in NAMES:
                    assert set(ask(app, name, "POST", path).split(b",")) == {name.encode()}
            with app.context("acme"), session.get_bind().connect() as connection:
                cursor = connection.connection.cursor()
                with pytest.raises(Exception, match='"tenant_note" does not exist'):
                    cursor.execute("SELECT owner FROM tenant_note")
            app.application("acme").drop_database()
            app.dispose()
        finally:
            with engine.begin() as connection:
                connection.execute(text(f"REASSIGN OWNED BY {role} TO CURRENT_USER; DROP ROLE {role}"))
            engine.dispose()

    def test_nothing_is_left_on_the_connection(self, schemas: Any) -> None:
        app = schemas()
        ask(app, "acme", "POST", "/text")
        with app.shared.engine.connect() as connection:
            assert "t_acme" not in connection.scalars(text("SHOW search_path")).one()

    def test_text_without_a_tenants_table_finds_no_other(self, schemas: Any, postgresql: str) -> None:
        app = schemas()
        ask(app, "acme", "POST")
        app.application("globex").drop_database()
        with pytest.raises(Exception, match="tenant_note"):
            ask(app, "globex", path="/text")
        assert ask(app, "acme", path="/text") == b"acme"

    def test_savepoint_and_raw_cursor_are_the_tenants(self, schemas: Any) -> None:
        app = schemas()
        for name in NAMES[:2]:
            ask(app, name, "POST")
        statement = "SELECT owner FROM tenant_note"
        for name in NAMES[:2]:
            with app.context(name):
                raw = session.connection().connection.cursor()
                raw.execute(statement)
                assert raw.fetchall() == [(name,)]
                with session.begin_nested() as savepoint:
                    assert session.scalars(text(statement)).all() == [name]
                    savepoint.rollback()
                assert session.scalars(text(statement)).all() == [name]
            with app.application(name).engine.begin() as connection:
                raw = connection.connection.cursor()
                raw.execute(statement)
                assert raw.fetchall() == [(name,)]

    def test_what_has_no_transaction_is_refused(self, schemas: Any) -> None:
        engine = schemas().application("acme").engine
        with engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT")
            with pytest.raises(ScopeError, match="AUTOCOMMIT"):
                connection.execute(text("SELECT 1"))
        with engine.connect() as connection, pytest.raises(ScopeError, match="two phases"):
            connection.begin_twophase()

    def test_reading_gives_the_connection_back(self, schemas: Any) -> None:
        """What sets the tenant is no write: a list is handed to the server without a connection (G18)."""
        app = schemas()
        body = app(environ(HTTP_X_TENANT="acme"), lambda status, headers, exc_info=None: None)
        assert app.shared.engine.pool.checkedout() == 0
        body.close()

    def test_repeatable_read_and_deadline(self, schemas: Any, postgresql: str) -> None:
        app = schemas(
            engine_options={"pool_size": 1, "max_overflow": 0, "isolation_level": "REPEATABLE READ"}, deadline=30
        )
        for name in NAMES:
            assert ask(app, name, "POST", "/text") == name.encode()

    def test_connection_that_is_lost_is_an_outage(self, schemas: Any) -> None:
        """Also where it is lost before the tenant is set."""
        app = schemas(unavailable=True, ping_after=None)
        ask(app, "acme", "POST")

        @event.listens_for(app.shared.engine, "checkout")
        def kill(driver_connection: Any, record: Any, proxy: Any) -> None:
            driver_connection.pgconn.finish()

        status, _ = call(app, HTTP_X_TENANT="acme")
        event.remove(app.shared.engine, "checkout", kill)
        assert status == "503 Service Unavailable"
        assert ask(app, "acme") == b"acme"

    def test_transactions_are_counted_once(self, schemas: Any) -> None:
        calls: list[int] = []

        def app(environ: Environ, start: StartResponse) -> list[bytes]:
            calls.append(environ["sqlasession.attempt"])
            session.add(Note(owner="acme"))
            session.flush()
            if len(calls) == 1:
                raise OperationalError("", {}, DeadlockError())
            start("200 OK", [])
            return [b""]

        tenants = schemas(app, transaction={"attempts": 2, "backoff_base": 0}, unavailable=True)
        call(tenants, HTTP_X_TENANT="acme")
        assert calls == [1, 2]
        with tenants.context("acme"):
            assert len(session.scalars(select(Note)).all()) == 1

    @pytest.mark.skipif(
        sqlalchemy.__version__ < "2.1", reason="a connection of an engine with options cannot be listened to before"
    )
    def test_isolated_is_one_tenants(self, schemas: Any) -> None:
        app = schemas(engine_options={"pool_size": 2})
        with isolated(app.application("acme")):
            assert ask(app, "acme", "POST", "/text") == b"acme"
            assert ask(app, "globex", "POST", "/text") == b"globex"
        assert ask(app, "acme", path="/text") == b""
        assert ask(app, "globex", path="/text") == b"globex"

    def test_many_tenants_listen_once(self, schemas: Any) -> None:
        """What listens to the shared engine does not become more with each tenant."""
        app = schemas(unavailable=True, transaction={"attempts": 2}, deadline=10)

        def listeners() -> list[int]:
            engine = app.shared.engine
            pool = [len(list(getattr(engine.pool.dispatch, name))) for name in ("connect", "checkout", "checkin")]
            own = [len(list(getattr(engine.dispatch, name))) for name in ("begin", "commit", "before_cursor_execute")]
            return [*pool, *own, len(list(engine.dialect.dispatch.handle_error)), len(type(engine.pool).__mro__)]

        ask(app, "acme")
        before = listeners()
        for name in NAMES:
            ask(app, name, "POST")
        assert listeners() == before


def test_breaker_is_the_servers() -> None:
    """A database that is out of reach keeps nobody waiting for another one on the same server."""
    dead = f"postgresql+psycopg://127.0.0.1:{free_port()}"
    url = make_url(DATABASES_SEEN.url("postgresql", ""))

    def bind(name: str) -> Any:
        return url if name == "initech" else f"{dead}/{name}"

    unavailable = {"breaker_failures": 1, "breaker_seconds": 1000}
    app = TenantsMiddleware(select_1, bind, tenant="header:X-Tenant", known=NAMES, unavailable=unavailable)
    assert call(app, HTTP_X_TENANT="acme")[0] == "503 Service Unavailable"
    tried: list[str] = []
    globex = app.application("globex").engine
    event.listen(globex, "do_connect", lambda *more: tried.append("globex"))
    assert call(app, HTTP_X_TENANT="globex")[0] == "503 Service Unavailable"
    assert (tried, breaker_state(globex)) == ([], "open")
    assert call(app, HTTP_X_TENANT="initech")[0] == "200 OK"
    app.dispose()


@pytest.mark.parametrize("drivername", ["postgresql+psycopg", "postgresql+psycopg2"])
@pytest.mark.parametrize("limited", ["DATABASE", "ROLE"])
def test_limit_of_one_tenant_is_not_the_servers(limited: str, drivername: str) -> None:
    """One that has its CONNECTION LIMIT is told so, and the others on the server are served. An outage is another."""
    given = make_url(DATABASES_SEEN.url("postgresql", "")).set(drivername=drivername)
    names = {name: f"{given.database}_{name}" for name in NAMES[:2]}
    url = given.set(password="x")
    admin = create_engine(given, isolation_level="AUTOCOMMIT", poolclass=NullPool)

    def administer(*statements: str) -> None:
        with admin.connect() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    undo = [
        *(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)' for name in names.values()),
        *(f'DROP ROLE IF EXISTS "{name}"' for name in names.values()),
    ]
    administer(*undo)
    apps: list[TenantsMiddleware] = []
    try:
        for name in names.values():
            administer(f"CREATE ROLE \"{name}\" LOGIN PASSWORD 'x'", f'CREATE DATABASE "{name}"')
        # Superusers are exempt, so each tenant has a role.
        app = TenantsMiddleware(
            select_1,
            lambda name: url.set(username=names[name], database=names[name]),
            tenant="header:X-Tenant",
            known=NAMES[:2],
            unavailable={"breaker_failures": 1, "breaker_seconds": 1000},
        )
        apps.append(app)
        administer(f'ALTER {limited} "{names["acme"]}" CONNECTION LIMIT 0')
        for _ in range(2):
            assert call(app, HTTP_X_TENANT="acme")[0] == "503 Service Unavailable"
            assert call(app, HTTP_X_TENANT="globex")[0] == "200 OK"
        engine = app.application("acme").engine
        assert breaker_state(engine) == "closed"
        # One that tries whether the server is back gets an answer of it, although it is turned away.
        breaker = _registered(engine)
        breaker.fail(OperationalError("", {}, Exception("away")))
        assert breaker_state(engine) == "open"
        breaker.open_until = 0.001
        assert call(app, HTTP_X_TENANT="acme")[0] == "503 Service Unavailable"
        assert breaker_state(engine) == "closed"
        administer(f'ALTER {limited} "{names["acme"]}" CONNECTION LIMIT 1')
        assert call(app, HTTP_X_TENANT="acme")[0] == "200 OK"
    finally:
        for each in apps:
            each.dispose()
        administer(*undo)
        admin.dispose()


@pytest.mark.parametrize(
    ("url", "number", "is_own"),
    [
        ("mysql+pymysql://", 1040, False),  # ER_CON_COUNT_ERROR
        ("mysql+pymysql://", 1203, True),  # ER_TOO_MANY_USER_CONNECTIONS
        ("mysql+pymysql://", 1226, True),  # ER_USER_LIMIT_REACHED
        ("sqlite://", 1, False),
    ],
)
def test_limit_of_an_account_differs_from_the_servers(url: str, number: int, is_own: bool) -> None:
    assert driver_of(create_engine(url)).is_at_its_own_limit(OperationalError("", {}, Exception(number)).orig) is is_own


def select_1(environ: Environ, start: StartResponse) -> list[bytes]:
    session.execute(text("SELECT 1"))
    start("200 OK", [])
    return [b""]


def test_schemas_of_mariadb_are_databases() -> None:
    url = make_url(DATABASES_SEEN.url("mariadb", ""))
    options: dict[str, Any] = {"tenant": "header:X-Tenant", "known": NAMES[:2], "metadata": Base.metadata}
    options |= {"engine_options": {"pool_size": 1, "max_overflow": 0}, "transaction": True}
    app = TenantsMiddleware(read, url, schema=f"{url.database}_{{tenant}}", **options)
    try:
        for name in NAMES[:2]:
            app.init_database(name)
        for _ in range(2):
            for name in NAMES[:2]:
                assert set(ask(app, name, "POST").split(b",")) == {name.encode()}
        assert app.shared.engine.pool.checkedin() == 1
    finally:
        with app.shared.engine.begin() as connection:
            for name in NAMES[:2]:
                connection.execute(text(f"DROP DATABASE IF EXISTS `{url.database}_{name}`"))
        app.dispose()


def test_other_databases_are_those_of_all(schemas: Any, tmp_path: Path) -> None:
    """Beside the pool that all share there is one on another server, whose tables are not the tenants'."""
    audit = MetaData(info={"bind_key": "audit"})
    shared = Table("tenant_audit", audit, Column("owner", String(80)))
    binds = {"audit": f"sqlite:///{tmp_path}/audit.db"}
    app = schemas(binds=binds, metadata=[Base.metadata, audit], transaction=True)
    for name in NAMES:
        with app.context(name):
            session.execute(insert(shared).values(owner=name))
            session.commit()
            assert session.scalars(select(Note.owner)).all() == []
    with app.context("acme"):
        assert session.scalars(select(shared.c.owner)).all() == list(NAMES)
    assert app.application("acme").without_secrets("nothing") == "nothing"


def test_bind_on_a_standby_is_the_tenants(schemas: Any, postgresql: str) -> None:
    """An engine that the application asks itself: the tenant is set there as well."""
    app = schemas(binds={"standby": postgresql})
    statements = (select(Note.owner), text("SELECT owner FROM tenant_note"))
    for name in NAMES:
        ask(app, name, "POST")
    for name in NAMES * 2:
        with app.context(name):
            for statement in statements:
                assert session.scalars(statement, bind_arguments={"bind_key": "standby"}).all() == [name]
    assert app.shared.engines["standby"].pool.checkedin() == 1


def test_engine_that_is_given_can_be_shared_by_two(postgresql: str) -> None:
    engine = create_engine(postgresql, pool_size=1, max_overflow=0)
    options: dict[str, Any] = {"tenant": "header:X-Tenant", "known": NAMES, "metadata": Base.metadata}
    apps = [TenantsMiddleware(read, engine, schema="t_{tenant}", **options) for _ in range(2)]
    seen: list[str] = []
    for app in apps:
        app.application("acme")
        app.on_making(lambda each: seen.append(each.tenant))
        app.init_database("acme")
    assert ask(apps[0], "acme", "POST", "/text") == b"acme"
    assert ask(apps[1], "acme", path="/text") == b"acme"
    assert seen == ["acme"] * 2
    with engine.connect() as connection, connection.begin_twophase():
        pass  # Without a tenant it may be.
    engine.dispose()


class DeadlockError(Exception):
    sqlstate = "40P01"


DeadlockError.__module__ = "psycopg.errors"


class TestRowsEach:
    def test_policy_sees_the_tenant(self, postgresql: str) -> None:
        engine = create_engine(postgresql)
        with engine.begin() as connection:
            Base.metadata.create_all(connection)
            connection.execute(text("DROP ROLE IF EXISTS tenant_role"))
            for statement in (
                "ALTER TABLE tenant_note ENABLE ROW LEVEL SECURITY",
                "CREATE POLICY own ON tenant_note USING (owner = NULLIF(current_setting('app.tenant', true), ''))",
                "CREATE ROLE tenant_role LOGIN",
                "GRANT ALL ON tenant_note, tenant_note_id_seq TO tenant_role",
            ):
                connection.execute(text(statement))
        options = {"role": "tenant_role", "app.tenant": "{tenant}"}
        app = TenantsMiddleware(
            read,
            postgresql,
            tenant="header:X-Tenant",
            known=NAMES,
            set_local=options,
            engine_options={"pool_size": 1, "max_overflow": 0},
        )
        try:
            for path in ("/", "/text", "/mixed"):
                for name in NAMES:
                    assert set(ask(app, name, "POST", path).split(b",")) == {name.encode()}
            with engine.connect() as connection:
                assert len(connection.execute(select(Note.__table__)).all()) == 9
            with app.context("acme"), pytest.raises(Exception, match="policy"):
                session.execute(insert(Note).values(owner="globex"))
            # On a connection that was a tenant's, the setting is an empty text.
            with app.shared.context():
                session.execute(text("SET LOCAL ROLE tenant_role"))
                assert session.scalars(text("SELECT owner FROM tenant_note")).all() == []
                with pytest.raises(Exception, match="policy"):
                    session.execute(insert(Note).values(owner=""))
        finally:
            app.dispose()
            with engine.begin() as connection:
                connection.execute(text("DROP OWNED BY tenant_role; DROP ROLE tenant_role; DROP TABLE tenant_note"))
            engine.dispose()


#: What somebody may send as the name of a tenant, to one that has "acme".
HOSTILE = {
    "traversal": "../acme",
    "deep traversal": "../../../../etc/passwd",
    "absolute": "/tmp/evil",
    "backslash": "..\\acme",
    "nul": "acme\x00",
    "newline": "acme\n",
    "double quote": 'acme"',
    "single quote": "acme'; DROP TABLE note; --",
    "percent": "ac%6de",
    "format": "{tenant}",
    "percent format": "%(tenant)s",
    "very long": "a" * 100_000,
    "64": "a" * 64,
    "another case": "Acme",
    "idn": "acmé",
    "kelvin sign": "\N{KELVIN SIGN}elvin",
    "full width": "\N{FULLWIDTH LATIN SMALL LETTER A}cme",
    "digits of others": "\N{ARABIC-INDIC DIGIT ONE}",
    "at": "user@acme",
    "url": "sqlite:///other.db",
    "dots": "..",
    "dot": "acme.globex",
    "dash": "-acme",
    "underscore": "_acme",
    "two": "acme,globex",
    "spaces": " acme",
    "nobody": "nobody",
}


class TestHostileNames:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Iterator[Path]:
        folder = tmp_path / "tenants"
        folder.mkdir()
        yield folder
        assert files_in(folder) == []
        assert files_in(tmp_path) == ["tenants"]

    @pytest.mark.parametrize("place", ["header", "path", "subdomain", "host", "callable"])
    @pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
    def test_nothing_is_made(self, folder: Path, caplog: pytest.LogCaptureFixture, place: str, name: str) -> None:
        caplog.set_level("DEBUG")
        tenant, options, more = {
            "header": ("header:X-Tenant", {}, {"HTTP_X_TENANT": name}),
            "path": ("path", {}, {"PATH_INFO": f"/{name}"}),
            "subdomain": ("subdomain", {"domain": "example.com"}, {"HTTP_HOST": f"{name}.example.com"}),
            "host": ("host", {"hosts": {"acme.com": "acme"}}, {"HTTP_HOST": name}),
            "callable": (lambda environ: environ["test.name"], {}, {"test.name": name}),
        }[place]
        known = ["acme", "globex", "kelvin"]
        app = TenantsMiddleware(connect, f"sqlite:///{folder}/{{tenant}}.db", tenant=tenant, known=known, **options)
        is_host = place == "subdomain" and name == "Acme"
        if is_host or (place == "path" and name in ("/tmp/evil",)):
            return  # Hosts have no case; and "//tmp" asks for no tenant.
        status, body = call(app, **more)
        assert status == "404 Not Found"
        assert name.encode("utf-8", "replace")[:12] not in body
        assert app._table.applications == {}
        assert len(caplog.text) < 1000
        assert name not in caplog.text or len(name) < 40

    @pytest.mark.parametrize(
        ("host", "expected"),
        [
            ("acme.example.com", "acme"),
            ("ACME.Example.COM", "acme"),
            ("acme.example.com:8080", "acme"),
            ("acme.example.com:", "acme"),
            ("acme.example.com.", "acme"),
            ("acme.example.com.:80", "acme"),
            ("acme.example.com..", ""),
            ("acme@acme.example.com", ""),
            ("acme.example.com:80:80", ""),
            ("other.acme.example.com", ""),
            (".example.com", ""),
            ("example.com.", None),
            ("example.com", None),
            ("EXAMPLE.com:80", None),
            ("acme.example.com,globex.example.com", ""),
            ("acme.example.com, globex.example.com", ""),
            ("acme.example.com.evil.com", ""),
            ("acme.evilexample.com", ""),
            ("acme", ""),
            ("127.0.0.1", ""),
            ("[::1]:80", ""),
            ("", None),
        ],
    )
    def test_host(self, host: str, expected: str | None) -> None:
        app = TenantsMiddleware(answer_tenant, in_memory, tenant="subdomain", domain="example.com", known=NAMES)
        status, body = call(app, HTTP_HOST=host, SERVER_NAME="example.com")
        if expected:
            assert (status, body) == ("200 OK", expected.encode())
        else:
            assert status == "404 Not Found"


def in_memory(name: str) -> str:
    return "sqlite://"


def connect(environ: Environ, start: StartResponse) -> list[bytes]:
    session.connection()
    start("200 OK", [])
    return []


class TestWhoIsAsked:
    def test_path_is_where_the_application_is_mounted(self) -> None:
        def app(environ: Environ, start: StartResponse) -> list[bytes]:
            start("200 OK", [])
            return [f"{application.tenant} {environ['SCRIPT_NAME']} {environ['PATH_INFO']}".encode()]

        tenants = TenantsMiddleware(app, in_memory, tenant="path", known=NAMES)
        assert call(tenants, SCRIPT_NAME="/shop", PATH_INFO="/acme/x/y")[1] == b"acme /shop/acme /x/y"
        assert call(tenants, PATH_INFO="/acme")[1] == b"acme /acme "
        for path in ("/", "", "*", "//acme", "/nobody", "/acm%65"):
            assert call(tenants, PATH_INFO=path)[0] == "404 Not Found"

    def test_host_is_one_of_those_that_are_given(self) -> None:
        for hosts in ({"www.acme.com.": "acme", "WWW.Globex.com": "globex"}, find_host, "tests.test_tenants:find_host"):
            app = TenantsMiddleware(answer_tenant, in_memory, tenant="host", hosts=hosts, known=NAMES)
            assert call(app, HTTP_HOST="www.acme.com:80")[1] == b"acme"
            assert call(app, HTTP_HOST="WWW.GLOBEX.com")[1] == b"globex"
            assert call(app, HTTP_HOST="www.acme.com.")[1] == b"acme"
            assert call(app, HTTP_HOST="www.initech.com")[0] == "404 Not Found"

    def test_no_tenant_needs_no_scope(self) -> None:
        def app(environ: Environ, start: StartResponse) -> list[bytes]:
            assert not has_scope()
            start("200 OK", [])
            return [b"welcome"]

        tenants = TenantsMiddleware(app, in_memory, tenant="header:X-Tenant", known=NAMES, required=False)
        assert call(tenants) == ("200 OK", b"welcome")
        assert call(tenants, HTTP_X_TENANT="nobody")[0] == "404 Not Found"

    def test_environ_tells_the_tenant(self) -> None:
        def app(environ: Environ, start: StartResponse) -> list[bytes]:
            start("200 OK", [])
            return [f"{environ['sqlasession.tenant']} {environ['sqlasession.record'].tenant}".encode()]

        tenants = TenantsMiddleware(
            app, in_memory, tenant=lambda environ: "acme", known=NAMES, slow_requests={"seconds": 60}
        )
        assert call(tenants)[1] == b"acme acme"


@pytest.mark.parametrize("stands", ["around the tenants", "inside of them"])
@pytest.mark.parametrize("kind", ["files", "schemas"])
def test_inspector_tells_the_tenant_of_each_request(request: pytest.FixtureRequest, kind: str, stands: str) -> None:
    """Statements are recorded once, on the engine of the tenant or on the one that all share."""
    make = request.getfixturevalue(kind)
    inspector = InspectorMiddleware(read, token="0123456789abcdef")
    if stands == "around the tenants":
        tenants = make()
        inspector = InspectorMiddleware(tenants, token="0123456789abcdef")
        app: Any = inspector
    else:
        app = tenants = make(inspector)
    for name in ("acme", "globex", "acme"):
        tenants.init_database(name)
        ask(app, name)
    # One that stands inside is asked through a tenant, as any page of the application.
    browser = Client(app)
    local = {"REMOTE_ADDR": "127.0.0.1", "HTTP_HOST": "localhost", "HTTP_X_TENANT": "acme"}
    browser.get("/_sqlasession/?token=0123456789abcdef", environ_overrides=local)
    listed = browser.get("/_sqlasession/requests.json", environ_overrides=local).get_json()
    seen = [(each["tenant"], each["queries"]) for each in listed if each["path"] == "/"]
    assert seen == [("acme", 1), ("globex", 1), ("acme", 1)]
    page = browser.get(f"/_sqlasession/r/{listed[0]['id']}", environ_overrides=local).text
    assert "<dt>Tenant</dt>" in page
    pools = browser.get("/_sqlasession/pools.json", environ_overrides=local).get_json()
    assert len(pools) == (2 if kind == "files" else 1)


def find_host(host: str) -> str | None:
    return {"www.acme.com": "acme", "www.globex.com": "globex"}.get(host, "")


class TestKnown:
    def test_names_are_asked_for_again_after_so_many_seconds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = Clock(monkeypatch)
        answers = [["acme", "No Name"], ["globex"]]
        asked: list[float] = []

        def known() -> list[str]:
            asked.append(clock.at)
            return answers[len(asked) > 1]

        app = TenantsMiddleware(answer_tenant, in_memory, tenant="header:X-Tenant", known=known, known_seconds=30)
        assert asked == []
        assert [call(app, HTTP_X_TENANT=name)[0][:3] for name in ("acme", "globex", "No Name")] == ["200", "404", "404"]
        assert asked == [1000.0]
        clock.at += 31
        assert [call(app, HTTP_X_TENANT=name)[0][:3] for name in ("acme", "globex")] == ["404", "200"]
        assert asked == [1000.0, 1031.0]
        assert app.names() == ["globex"]
        assert len(asked) == 3

    def test_directory_is_asked(self, sqlite_url: str) -> None:
        engine = create_engine(sqlite_url)
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE tenant (name TEXT)"))
            connection.execute(text("INSERT INTO tenant VALUES ('acme'), ('Acme; --'), (NULL)"))
        known = {"bind": sqlite_url, "query": "SELECT name FROM tenant"}
        app = TenantsMiddleware(answer_tenant, in_memory, tenant="header:X-Tenant", known=known)
        assert call(app, HTTP_X_TENANT="acme")[1] == b"acme"
        with engine.begin() as connection:
            connection.execute(text("INSERT INTO tenant VALUES ('globex')"))
        assert call(app, HTTP_X_TENANT="globex")[0] == "404 Not Found"
        with app.context("globex"):  # Who asks by name asks the directory.
            pass
        assert call(app, HTTP_X_TENANT="globex")[1] == b"globex"
        assert app.names() == ["acme", "globex"]
        with pytest.raises(UnknownTenantError, match="There is no tenant 'nobody'"):
            app.init_database("nobody")
        app.dispose()
        engine.dispose()

    def test_silent_directory_is_no_unknown_tenant(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        clock = Clock(monkeypatch)
        fails = [True]

        def known() -> list[str]:
            if fails:
                raise ConnectionError
            return ["acme"]

        app = TenantsMiddleware(answer_tenant, in_memory, tenant="header:X-Tenant", known=known)
        assert call(app, HTTP_X_TENANT="acme")[0] == "503 Service Unavailable"
        fails.clear()
        assert call(app, HTTP_X_TENANT="acme")[0] == "200 OK"
        fails.append(True)
        clock.at += 100
        assert call(app, HTTP_X_TENANT="acme")[0] == "200 OK"
        assert call(app, HTTP_X_TENANT="globex")[0] == "404 Not Found"
        assert "those that were known go on" in caplog.text

    @pytest.mark.parametrize("answer", ["acme", b"acme", None, 1, [["acme"]]])
    def test_answer_that_is_no_list_of_names_is_no_answer(self, answer: Any) -> None:
        app = TenantsMiddleware(answer_tenant, in_memory, tenant="header:X-Tenant", known=lambda: answer)
        for name in ("acme", "a"):
            assert call(app, HTTP_X_TENANT=name)[0] == "503 Service Unavailable"

    def test_others_go_on_while_one_asks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = Clock(monkeypatch)
        asks, goes_on = threading.Event(), threading.Event()

        def known() -> list[str]:
            if clock.at > 1000:
                asks.set()
                assert goes_on.wait(30)
            return ["acme"]

        app = TenantsMiddleware(answer_tenant, in_memory, tenant="header:X-Tenant", known=known)
        assert call(app, HTTP_X_TENANT="acme")[1] == b"acme"
        clock.at += 100
        with ThreadPoolExecutor(1) as pool:
            late = pool.submit(call, app, HTTP_X_TENANT="acme")
            assert asks.wait(30)
            assert call(app, HTTP_X_TENANT="globex")[0] == "404 Not Found"
            goes_on.set()
            assert late.result() == ("200 OK", b"acme")

    def test_nothing_is_looked_through_again_and_again_while_one_asks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With many tenants that takes milliseconds, and a directory may be silent for long."""
        clock = Clock(monkeypatch)
        asks, goes_on = threading.Event(), threading.Event()

        def known() -> list[str]:
            if clock.at > 1000:
                asks.set()
                assert goes_on.wait(30)
            return ["acme"]

        app = TenantsMiddleware(answer_tenant, in_memory, tenant="header:X-Tenant", known=known)
        assert call(app, HTTP_X_TENANT="acme")[1] == b"acme"
        sweeps: list[float] = []
        sweep = app._table.sweep
        monkeypatch.setattr(app._table, "sweep", lambda names: (sweeps.append(clock.at), sweep(names)))
        clock.at += 100
        with ThreadPoolExecutor(1) as pool:
            late = pool.submit(call, app, HTTP_X_TENANT="acme")
            assert asks.wait(30)
            for _ in range(5):
                assert call(app, HTTP_X_TENANT="acme")[1] == b"acme"
            assert len(sweeps) == 1
            goes_on.set()
            assert late.result() == ("200 OK", b"acme")

    def test_removed_tenant_is_refused_while_it_is_in_use(self, files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = Clock(monkeypatch)
        names = ["acme", "globex"]
        app = files(known=lambda: list(names), known_seconds=10)
        app.init_database("acme")
        found = app.application("acme")
        with found.context():
            assert session.scalars(select(Note.owner)).all() == []
            names.remove("acme")
            clock.at += 11
            for _ in range(3):
                assert call(app, HTTP_X_TENANT="acme")[0] == "404 Not Found"
            with found.context():  # What it has begun is ended by its own code.
                assert session.scalars(select(Note.owner)).all() == []
            assert call(app, HTTP_X_TENANT="acme")[0] == "404 Not Found"
            assert session.scalars(select(Note.owner)).all() == []
            names.append("acme")
            clock.at += 11
            assert ask(app, "acme") == b""
            assert app.application("acme") is not found
        assert found.engine.pool.checkedin() == 0

    @pytest.mark.parametrize("status", ["503 Service Unavailable", "200 OK"])
    def test_those_who_waited_for_the_directory_do_not_ask_again(self, status: str) -> None:
        """Where it is silent, eight requests would wait for eight times as long, one after the other."""
        asked: list[None] = []
        asks, goes_on = threading.Event(), threading.Event()

        def known() -> list[str]:
            asked.append(None)
            asks.set()
            assert goes_on.wait(30)
            if len(asked) == 1 and status != "200 OK":
                raise ConnectionError
            return ["acme"]

        app = TenantsMiddleware(answer_tenant, in_memory, tenant="header:X-Tenant", known=known)
        with ThreadPoolExecutor(8) as pool:
            waiting = Waiting(app._known._asking)
            app._known._asking = waiting  # type: ignore[assignment]  # it counts who waits
            answers = [pool.submit(call, app, HTTP_X_TENANT="acme") for _ in range(8)]
            assert asks.wait(30)
            assert waiting.all_are_here.wait(30)
            goes_on.set()
            assert {each.result()[0] for each in answers} == {status}
        assert len(asked) == 1
        assert call(app, HTTP_X_TENANT="acme")[0] == "200 OK"


class Waiting:
    """A lock that tells when eight have come."""

    def __init__(self, lock: Any) -> None:
        self.lock = lock
        self.number = 0
        self.all_are_here = threading.Event()
        self.counting = threading.Lock()

    def __enter__(self) -> None:
        with self.counting:
            self.number += 1
            if self.number == 8:
                self.all_are_here.set()
        self.lock.acquire()

    def __exit__(self, *error: object) -> None:
        self.lock.release()


#: Wrong arguments, and a part of the error.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no place": ({"bind": "sqlite:///a.db"}, "bind must have {tenant} in its database or user"),
    "place in the host": ({"bind": "postgresql://{tenant}.com/shop"}, "bind may have {tenant} in its database and"),
    "no URL": ({"bind": "{tenant}"}, "bind must be a database URL"),
    "both": ({"schema": "{tenant}"}, "bind cannot have {tenant} or be a callable together with 'schema'"),
    "schema without a place": ({"bind": "sqlite://", "schema": "x"}, "schema must be {tenant} with letters"),
    "schema with a quote": ({"bind": "sqlite://", "schema": '{tenant}"'}, "schema must be {tenant} with letters"),
    "no settings": ({"bind": "sqlite://", "set_local": "x"}, "set_local must be a dict of settings, got str."),
    "no setting": ({"bind": "sqlite://", "set_local": {"a b": "x"}}, "set_local must have names of PostgreSQL's"),
    "percent": ({"bind": "sqlite://", "set_local": {"a": "%"}}, "set_local['a'] must be a text without '%'"),
    "no PostgreSQL": ({"bind": "sqlite://", "set_local": {"a.b": "x"}}, "set_local is for PostgreSQL only"),
    "one of the replicas": (
        {"bind": "postgresql+psycopg:///a", "schema": "{tenant}", "replicas": ["postgresql+psycopg:///{tenant}"]},
        "replicas[0] cannot have {tenant} or be a callable together with 'schema' or 'set_local', which share a pool.",
    ),
    "replica of another server": (
        {"bind": "postgresql+psycopg:///a", "schema": "{tenant}", "replicas": ["sqlite:///a.db"]},
        "replicas[0] must be on a server of the same kind as 'bind'.",
    ),
    "twophase": (
        {"bind": "postgresql+psycopg:///a", "schema": "{tenant}", "session_options": {"twophase": True}},
        "session_options['twophase'] cannot be used together with 'schema'",
    ),
    "resolver": ({"tenant": "hosts"}, "tenant must be 'host', 'subdomain', 'path', 'header:NAME'"),
    "header": ({"tenant": "header: X:Y"}, "tenant must have the name of a header after 'header:', got 'X:Y'."),
    "no domain": ({"tenant": "subdomain"}, "domain must be set with tenant='subdomain', and only then"),
    "domain": ({"tenant": "subdomain", "domain": ".com"}, "domain must be a domain such as 'example.com', got '.com'."),
    "no hosts": ({"tenant": "host"}, "hosts must be set with tenant='host', and only then"),
    "known": ({"known": None}, "known must be the names of the tenants, or what tells them, got None."),
    "known name": ({"known": ["Acme"]}, "known must be names of up to 63 of a to z, 0 to 9, '-' and '_', got 'Acme'."),
    "known of the server": (
        {"bind": "postgresql+psycopg:///a", "schema": "{tenant}", "known": ["public"]},
        "known must have no name that makes a schema or database of the server's own, got 'public'.",
    ),
    "known dict": ({"known": {"bind": "sqlite://"}}, "known must have 'bind', a database, and 'query'"),
    "idle": ({"idle": 0}, "idle must be a number of seconds above 0, got 0."),
    "most": ({"most": 0}, "most must be a whole number from 1, got 0."),
    "required": ({"required": 1}, "required must be true or false, got 1."),
    "option": ({"streams": "x"}, "streams must be a list of content types"),
    "engine option": ({"engine_options": {"pool_size": "x"}}, "engine_options['pool_size'] must be a whole number"),
}


class TestSettings:
    @pytest.mark.parametrize(("options", "problem"), REFUSED.values(), ids=REFUSED)
    def test_wrong_setting_is_refused(self, options: dict[str, Any], problem: str) -> None:
        given = {"bind": "sqlite:///{tenant}.db", "tenant": "header:X-Tenant", "known": NAMES, **options}
        with pytest.raises(ConfigurationError) as caught:
            TenantsMiddleware(read, given.pop("bind"), **given)
        assert problem in str(caught.value)

    def test_name_is_not_cut_off(self) -> None:
        """PostgreSQL cuts off what is longer than 63 bytes, so that two tenants would have one database."""
        known = ["a" * 58, "a" * 57]
        for bind, options in (
            ("postgresql://localhost/shop__{tenant}", {}),
            ({"url": "postgresql://{tenant}__shop@localhost/shop"}, {}),
            ("postgresql://localhost/shop", {"schema": "shop__{tenant}"}),
            ("postgresql://localhost/{tenant}", {"binds": {"a": {"url": "postgresql://localhost/audit_{tenant}"}}}),
            ("postgresql://localhost/{tenant}", {"replicas": [make_url("postgresql://localhost/read__{tenant}")]}),
            ("postgresql://localhost/shop", {"set_local": {"search_path": 'x, "shop__{tenant}" , public'}}),
            ("postgresql://localhost/shop", {"set_local": {"app.tenant": "{tenant}", "Role": "shop__{tenant}"}}),
        ):
            with pytest.raises(ConfigurationError, match="of up to 57 of a to z"):
                TenantsMiddleware(read, bind, tenant="header:X-Tenant", known=known, **options)

    @pytest.mark.parametrize(
        ("name", "bind", "options"),
        [
            ("public", "postgresql://localhost/shop", {"schema": "{tenant}"}),
            ("pg_catalog", "postgresql://localhost/shop", {"schema": "{tenant}"}),
            ("pg_catalog", "postgresql://localhost/shop", {"set_local": {"search_path": '"{tenant}"'}}),
            ("template1", "postgresql://localhost/{tenant}", {}),
            ("postgres", {"url": "postgresql://{tenant}@localhost/shop"}, {}),
            ("mysql", "mariadb+pymysql://localhost/shop", {"schema": "{tenant}"}),
            ("sys", "sqlite:///{tenant}.db", {"binds": {"audit": "mariadb+pymysql://localhost/{tenant}"}}),
        ],
    )
    def test_name_that_is_the_servers_is_no_tenant(self, name: str, bind: Any, options: Any) -> None:
        """Customers may choose their names, and "public" would have what is everybody's."""

        def make(known: Any) -> TenantsMiddleware:
            return TenantsMiddleware(answer_tenant, bind, tenant="header:X-Tenant", known=known, **options)

        with pytest.raises(ConfigurationError, match=f"known must have no name that makes .*, got '{name}'"):
            make(["acme", name])
        app = make(lambda: ["acme", name])
        assert app.names() == ["acme"]
        assert call(app, HTTP_X_TENANT=name)[0] == "404 Not Found"
        assert call(app, HTTP_X_TENANT="acme")[1] == b"acme"

    def test_name_of_a_server_may_have_a_file(self) -> None:
        assert TenantsMiddleware(read, "sqlite:///{tenant}.db", tenant="path", known=["public"]).names() == ["public"]

    def test_callable_makes_what_a_bind_may_be(self, tmp_path: Path) -> None:
        engine = create_engine(f"sqlite:///{tmp_path}/acme.db")

        def bind(name: str) -> Any:
            return {"acme": engine, "globex": {"url": f"sqlite:///{tmp_path}/globex.db", "pool_size": 1}}.get(
                name, f"sqlite:///{tmp_path}/{name}.db"
            )

        app = TenantsMiddleware(read, bind, tenant="header:X-Tenant", known=NAMES, metadata=Base.metadata, most=1)
        for name in NAMES:
            app.init_database(name)
            assert ask(app, name, "POST") == name.encode()
        assert app.application("acme").engine is engine
        engine.dispose()


def ini_of_tenants(folder: Path, known: str = "acme, globex", **settings: str) -> str:
    """An ini file whose application has tenants; that of "away" has no folder for its database."""
    (folder / "acme").mkdir(exist_ok=True)
    (folder / "globex").mkdir(exist_ok=True)
    given = {
        "sqlalchemy.url": "sqlite:///%(here)s/{tenant}/shop.db",
        "metadata": "tests.test_tenants:Base.metadata",
        "tenants.tenant": "header:X-Tenant",
        "tenants.known": known,
        **settings,
    }
    lines = "\n".join(f"{key} = {value}" for key, value in given.items() if value)
    path = folder / "tenants.ini"
    path.write_text(
        "[app:shop]\npaste.app_factory = tests.paste_apps:guest_book\n\n[filter-app:main]\n"
        f"paste.filter_app_factory = sqlasession_middleware.paste:tenants\nnext = shop\n{lines}\n"
    )
    return str(path)


class TestIni:
    def test_section_makes_what_the_constructor_does(self, tmp_path: Path) -> None:
        path = ini_of_tenants(
            tmp_path,
            known="",
            **{
                "tenants.known_url": "sqlite:///%(here)s/directory.db",
                "tenants.known_query": "SELECT name FROM tenant",
                "tenants.known_seconds": "5",
                "tenants.idle": "30",
                "tenants.most": "7",
                "tenants.required": "false",
                "transaction": "true",
            },
        )
        app = loadapp(f"config:{path}")
        assert isinstance(app, TenantsMiddleware)
        assert repr(app._known.directory) == f"sqlite:///{tmp_path}/directory.db"
        assert (app._table._idle, app._table._most, app._required) == (30, 7, False)

    def test_other_keys(self, tmp_path: Path) -> None:
        url = "postgresql+psycopg://localhost/shop"
        more = {"tenants.schema": "t_{tenant}", "tenants.set_local.app.tenant": "{tenant}", "sqlalchemy.url": url}
        more |= {"tenants.tenant": "host", "tenants.hosts": "tests.test_tenants:find_host"}
        app = loadapp(f"config:{ini_of_tenants(tmp_path, 'tests.test_tenants:known_names', **more)}")
        assert app._maker._set_local == {"app.tenant": "{tenant}"}
        assert app.names() == ["acme", "globex"]
        assert app.application("acme").schema == "t_acme"
        statement = app.application("acme").engine.get_execution_options()["sqlasession_local_settings"]
        assert statement == (
            "SELECT set_config('search_path', '\"t_acme\", pg_temp', true), set_config('app.tenant', 'acme', true)"
        )

    @pytest.mark.parametrize(
        ("settings", "problem"),
        [
            ({"tenants.idle": "soon"}, "'tenants.idle' in {path} must be a number of seconds, got 'soon'."),
            ({"tenants.idle": "0"}, "'tenants.idle' in {path} must be a number of seconds above 0, got 0."),
            ({"tenants.iddle": "1"}, "'tenants.iddle' in {path} is not a setting of this middleware; did you mean"),
            ({"tenants.tenant": ""}, "'tenants.tenant' in {path} is missing: see the reference of ini keys."),
            ({"tenants.tenant": "subdomain"}, "'tenants.domain' in {path} must be set with tenant='subdomain'"),
            ({"tenants.known": "Acme"}, "'tenants.known' in {path} must be names of up to 63"),
            ({"tenants.known": "a.b:c"}, "'tenants.known' in {path} must be the dotted name of an importable object"),
            ({"sqlalchemy.pool_size": "x"}, "'sqlalchemy.pool_size' in {path} must be a whole number from 0, got 'x'."),
        ],
    )
    def test_error_names_the_key(self, tmp_path: Path, settings: dict[str, str], problem: str) -> None:
        path = ini_of_tenants(tmp_path, **settings)
        with pytest.raises(ConfigurationError) as caught:
            loadapp(f"config:{path}")
        assert str(caught.value).startswith(problem.format(path=path))


def known_names() -> list[str]:
    return ["acme", "globex"]


class TestCommand:
    @pytest.fixture(autouse=True)
    def plain_shell(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "IPython", None)

    def command(self, *arguments: str, said: str = "") -> Any:
        return CliRunner().invoke(main, list(arguments), input=said)

    def test_create_and_check_one_and_all(self, tmp_path: Path) -> None:
        path = ini_of_tenants(tmp_path)
        done = self.command("create", path, "--tenant", "acme")
        assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, "done")
        assert files_in(tmp_path / "globex") == []
        done = self.command("create", path, "--all-tenants")
        assert done.stdout.splitlines() == ["1 of 2: acme: created", "2 of 2: globex: created", "done: 2 tenants"]
        assert files_in(tmp_path / "globex") == ["shop.db"]
        done = self.command("check", path, "--tenant", "acme")
        assert (done.exit_code, f"sqlite:///{tmp_path}/acme/shop.db" in done.stdout) == (0, True)
        done = self.command("check", path, "--all-tenants")
        assert done.exit_code == 0
        assert re.match(r"1 of 2: acme: default \d+\.\d ms\n2 of 2: globex: ", done.stdout)

    def test_all_goes_on_after_one_that_fails(self, tmp_path: Path) -> None:
        path = ini_of_tenants(tmp_path, "acme, away, globex")
        for name in ("create", "check"):
            done = self.command(name, path, "--all-tenants")
            assert done.exit_code == 1
            assert [line[:14] for line in done.stdout.splitlines()] == [
                "1 of 3: acme: ",
                "3 of 3: globex",
                "done: 2 tenant",
            ]
            first, summary = done.stderr.splitlines()
            assert first.startswith("error: the tenant away: ")
            assert summary == "error: 1 of 3 tenants have failed: away"

    def test_engine_that_does_not_answer_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "acme" / "shop.db").parent.mkdir()
        path = ini_of_tenants(tmp_path, "acme")
        (tmp_path / "acme" / "shop.db").mkdir()
        done = self.command("check", path, "--all-tenants")
        assert done.exit_code == 1
        assert "error: the tenant acme: default does not answer: unable to open database file" in done.stderr

    def test_shell_is_the_tenants(self, tmp_path: Path) -> None:
        path = ini_of_tenants(tmp_path)
        done = self.command("shell", path, "--tenant", "globex", said="print(application.tenant)\n")
        assert (done.exit_code, "globex" in done.stdout) == (0, True)

    def test_shell_of_all_opens_their_contexts(self, tmp_path: Path) -> None:
        path = ini_of_tenants(tmp_path)
        loop = "for name in tenants.names():\n    with tenants.context(name):\n        "
        said = f"{loop}print('in', application.tenant, session.scalar(text('SELECT 1')))\n\nprint('after')\n"
        done = self.command("shell", path, "--all-tenants", said=f"from sqlalchemy import text\n{said}")
        assert done.exit_code == 0
        assert re.findall(r"in \w+ 1|after", done.stdout) == ["in acme 1", "in globex 1", "after"]
        assert "tenants.names(): " in done.output

    @pytest.mark.parametrize(("options", "kept"), [((), 0), (("--commit",), 1)], ids=["rolled back", "committed"])
    def test_code_runs_once_for_each(self, tmp_path: Path, options: tuple[str, ...], kept: int) -> None:
        path = ini_of_tenants(tmp_path, "acme, away, globex")
        self.command("create", path, "--all-tenants")
        imported = "from tests.test_tenants import Note\n"  # Other modules may have mapped classes of that name.
        code = f"{imported}session.add(Note(owner=application.tenant))\nsession.flush()\n"
        code += "seen = [*globals().get('seen', []), 1]\nassert len(seen) == 1\n"
        done = self.command("shell", path, "--all-tenants", *options, "-c", code)
        assert done.exit_code == 1
        assert done.stdout.splitlines() == ["1 of 3: acme: done", "3 of 3: globex: done", "done: 2 tenants"]
        first, summary = done.stderr.splitlines()
        assert first.startswith("error: the tenant away: bind names the SQLite file")
        assert summary == "error: 1 of 3 tenants have failed: away"
        owners = f"{imported}print([each.owner for each in session.query(Note)])"
        for name in ("acme", "globex"):
            done = self.command("shell", path, "--tenant", name, "-c", owners)
            assert (done.exit_code, done.stdout) == (0, f"{[name] * kept}\n")

    def test_code_that_fails_is_told_with_its_line(self, tmp_path: Path) -> None:
        done = self.command("shell", ini_of_tenants(tmp_path), "--tenant", "acme", "-c", "def f():\n    1 / 0\nf()")
        assert (done.exit_code, done.stderr) == (1, "error: line 2: ZeroDivisionError: division by zero\n")
        done = self.command("shell", ini_of_tenants(tmp_path), "--all-tenants", "-c", "{'acme': 1}[application.tenant]")
        assert done.stdout.splitlines() == ["1 of 2: acme: done", "done: 1 tenant"]
        assert done.stderr.splitlines()[0] == "error: the tenant globex: line 1: KeyError: 'globex'"

    def test_code_that_fails_at_the_commit(self, tmp_path: Path) -> None:
        imported = "from tests.test_tenants import Note\n"
        path = ini_of_tenants(tmp_path, "acme")
        self.command("create", path, "--all-tenants")
        done = self.command("shell", path, "--tenant", "acme", "--commit", "-c", f"{imported}session.add(Note())")
        assert (done.exit_code, done.stderr[:23]) == (1, "error: IntegrityError: ")
        assert self.command("shell", path, "--tenant", "acme", "--commit", "-c", "1").exit_code == 0

    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            (("--commit",), "error: --commit needs -c or one tenant: "),
            (("-c", "for"), "error: -c must be Python: invalid syntax (<-c>, line 1)"),
            (("-c", "\0"), "error: -c must be Python: "),
        ],
        ids=["commit", "syntax", "NUL"],
    )
    def test_code_is_checked_before_anything_runs(self, tmp_path: Path, options: tuple[str, ...], problem: str) -> None:
        done = self.command("shell", ini_of_tenants(tmp_path), "--all-tenants", *options)
        assert done.exit_code == 2
        assert done.stderr.startswith(problem)

    @pytest.mark.parametrize(
        "arguments",
        [("create",), ("check",), ("shell",), ("wait",), ("drop", "--yes"), ("create", "--tenant", "nobody")],
    )
    def test_nobody_is_refused(self, tmp_path: Path, arguments: tuple[str, ...]) -> None:
        name, *options = arguments
        done = self.command(name, ini_of_tenants(tmp_path), *options)
        assert done.exit_code == 2
        assert files_in(tmp_path / "acme") == []
