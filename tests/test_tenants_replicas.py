"""Tenants that share a pool and its replicas: each reads its own rows there, and all know at once which one is away.

The replica is the primary's own server here, by connections that cannot write. A standby is in
tests/integration/test_replicas.py.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from threading import Barrier, BrokenBarrierError, Thread
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import URL, Engine, String, create_engine, event, literal_column, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from werkzeug.test import Client

from sqlasession_middleware import application, on_primary, session
from sqlasession_middleware.errors import DeadlineError
from sqlasession_middleware.tenants import TenantsMiddleware
from sqlasession_middleware.testing import isolated

from .drivers import Row, rows_of, rows_on
from .ports import free_port
from .wsgi import Environ, StartResponse

pytestmark = pytest.mark.usefixtures("disposes")

Make = Callable[..., TenantsMiddleware]

NAMES = ("acme", "globex", "initech")
#: What is true on a connection of a replica.
IS_REPLICA = {
    "postgresql": "current_setting('transaction_read_only') = 'on'",
    "mariadb": "@@session.tx_read_only",
}


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "replicated_note"
    id: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(String(80))


def find(by_text: bool) -> str:
    """Whose rows there are, and on which server."""
    server = application.engine.dialect.name
    where = IS_REPLICA[server]
    statement: Any = select(Note.owner, literal_column(where)).order_by(Note.id)
    if by_text:
        schema = "" if server == "postgresql" else f"`{application.schema}`."  # "A schema each" says why.
        statement = text(f"SELECT owner, {where} FROM {schema}replicated_note ORDER BY id")
    return " ".join(f"{owner}:{'replica' if there else 'primary'}" for owner, there in session.execute(statement))


def serve(environ: Environ, start: StartResponse) -> list[bytes]:
    """A POST adds a row. ``/text`` asks by text, ``/commit`` commits."""
    if environ["REQUEST_METHOD"] == "POST":
        session.add(Note(owner=application.tenant))
    found = find(by_text=environ["PATH_INFO"] == "/text")
    if environ["REQUEST_METHOD"] == "POST" or environ["PATH_INFO"] == "/commit":
        session.commit()
    start("200 OK", [("Content-Type", "text/plain")])
    return [found.encode()]


def ask(client: Client, name: str, path: str = "/", method: str = "GET") -> str:
    response = client.open(path, method=method, headers={"X-Tenant": name}, buffered=True)
    assert response.status_code == 200, response.text
    return response.text


@pytest.fixture(params=rows_on("postgresql", "mariadb"))
def row(request: pytest.FixtureRequest) -> Row:
    found: Row = request.param
    return found


@pytest.fixture
def url(row: Row) -> Iterator[URL]:
    found = row.url()
    yield found
    engine = create_engine(found)
    with engine.begin() as connection:
        Base.metadata.drop_all(connection)
        for name in NAMES:
            connection.execute(text(f"DROP SCHEMA IF EXISTS r_{name}" + " CASCADE" * (row.server == "postgresql")))
    engine.dispose()


@pytest.fixture
def make(url: URL) -> Iterator[Make]:
    """Makes an application with a schema for each tenant, in which it has one row, on two pools of one connection."""
    made: list[TenantsMiddleware] = []

    def make(app: Any = serve, **options: Any) -> TenantsMiddleware:
        pool = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}
        options = {"schema": "r_{tenant}", "replicas": [url], "metadata": Base.metadata, **options}
        tenants = TenantsMiddleware(app, url, tenant="header:X-Tenant", known=NAMES, engine_options=pool, **options)
        made.append(tenants)
        for name in NAMES:
            tenants.init_database(name)
            with tenants.context(name):
                session.add(Note(owner=name))
                session.commit()
        return tenants

    yield make
    for each in made:
        each.dispose()


OPTIONS = {"plain": {}, "transaction": {"transaction": True}, "attempts": {"transaction": {"attempts": 2}}}


@pytest.mark.parametrize("path", ["/", "/text", "/commit"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_reads_its_own_rows_on_the_replica(make: Make, options: dict[str, Any], path: str) -> None:
    tenants = make(**options)
    for name in NAMES * 3:
        assert ask(Client(tenants), name, path) == f"{name}:replica"
    assert tenants.shared is not None
    assert [engine.pool.checkedin() for engine in tenants.shared.engines.values()] == [1, 1]


def test_client_reads_what_it_has_written(make: Make) -> None:
    tenants = make()
    client = Client(tenants)
    assert ask(client, "acme", method="POST") == "acme:primary acme:primary"
    assert ask(client, "acme") == "acme:primary acme:primary"
    # The cookie is that of the database: on the same host the other tenants' pages are read there as well.
    assert ask(client, "globex") == "globex:primary"
    assert ask(Client(tenants), "acme") == "acme:replica acme:replica"


def test_replica_that_is_away_is_found_out_once(make: Make, url: URL) -> None:
    tenants = make(replicas=[url.set(host="127.0.0.1", port=free_port())], replica_retry=60)
    tried: list[object] = []
    assert tenants.shared is not None
    event.listen(tenants.shared.engines["replicas[0]"], "do_connect", lambda *arguments: tried.append(arguments[0]))
    for name in NAMES:
        assert ask(Client(tenants), name) == f"{name}:primary"
    assert len(tried) == 1
    assert tenants.shared.routing is not None
    assert tenants.shared.routing.replicas is not None
    tenants.shared.routing.replicas.members[0].passed_over_until = 0.001
    assert ask(Client(tenants), "acme") == "acme:primary"
    assert len(tried) == 2  # It is tried again, and has to answer before it is read from.


def test_listener_of_a_commit_reads_the_tenants_rows(make: Make) -> None:
    """The commit ends the transaction on the replica first, and with it what was set for the tenant."""
    seen: list[str] = []

    def listened(environ: Environ, start: StartResponse) -> list[bytes]:
        event.listen(session(), "before_commit", lambda session: seen.append(find(by_text=True)))
        return serve(environ, start)

    tenants = make(listened)
    for name in NAMES:
        assert ask(Client(tenants), name, "/commit") == f"{name}:replica"
    assert seen == [f"{name}:primary" for name in NAMES]


def test_engine_of_a_replica_is_the_tenants(make: Make) -> None:
    """What the application does with it is no write, and the request goes on reading from replicas."""

    def named(environ: Environ, start: StartResponse) -> list[bytes]:
        replica = application.engines["replicas[0]"]
        with replica.connect() as connection:
            assert connection.scalars(select(Note.owner)).all() == [application.tenant]
        assert session.scalars(select(Note.owner), bind_arguments={"bind": replica}).all() == [application.tenant]
        session.rollback()
        return serve(environ, start)

    tenants = make(named)
    for name in NAMES:
        assert ask(Client(tenants), name) == f"{name}:replica"


@pytest.mark.skipif(
    sqlalchemy.__version__ < "2.1", reason="a connection of an engine with options cannot be listened to before"
)
def test_isolated_reads_what_is_not_committed(make: Make) -> None:
    tenants = make()
    acme = tenants.application("acme")
    with isolated(acme):
        assert ask(Client(tenants), "acme", method="POST") == "acme:primary acme:primary"
        assert ask(Client(tenants), "acme", "/text") == "acme:primary acme:primary"
    assert ask(Client(tenants), "acme") == "acme:replica"


def all_of(connection: Any = None) -> list[str]:
    """Whose rows there are, by a text that names no schema where the server can be told of it."""
    statement = select(Note.owner)
    if application.engine.dialect.name == "postgresql":
        statement = text("SELECT owner FROM replicated_note")  # type: ignore[assignment]
    found: list[str] = (connection or session).scalars(statement).all()
    return found


def all_by_driver(connection: Any) -> list[str]:
    """The same by a cursor of the driver."""
    schema = "" if application.engine.dialect.name == "postgresql" else f"`{application.schema}`."
    cursor = connection.connection.cursor()
    cursor.execute(f"SELECT owner FROM {schema}replicated_note")
    return [row[0] for row in cursor.fetchall()]


def connection_of_replica() -> Any:
    """The Session's connection to the replica, by which it reads anyway."""
    return session.connection({"clause": select(1)})


def by_driver_first() -> list[Any]:
    return [all_by_driver(connection_of_replica()), all_of()]


def by_driver_after_a_read() -> list[Any]:
    return [session.scalars(select(Note.owner)).all(), all_by_driver(connection_of_replica())]


def by_name_of_the_replica() -> list[Any]:
    replica = {"bind": application.engines["replicas[0]"]}
    # There is one connection: it is the Session's, whoever names the engine.
    found = [all_of(), session.scalars(select(Note.owner), bind_arguments=replica).all()]
    return [*found, all_by_driver(session.connection(replica))]


def by_another_session() -> list[Any]:
    with Session(connection_of_replica()) as other:
        return [all_by_driver(other.connection()), all_of(other)]


def by_stream() -> list[Any]:
    streamed = [list(session.scalars(select(Note.owner).execution_options(yield_per=1))), all_of()]
    session.rollback()
    return [*streamed, list(session.scalars(select(Note.owner).execution_options(stream_results=True)))]


def after_commits() -> list[Any]:
    found = []
    for _ in range(3):
        found += [all_of(), session.scalars(select(Note.owner)).all()]
        session.commit()
    return found


def after_an_error() -> list[Any]:
    found = [all_of()]
    for statement in (text("SELECT nothing_of_that_name"), select(literal_column("nothing_of_that_name"), Note.id)):
        with suppress(sqlalchemy.exc.DBAPIError):
            session.execute(statement)
        session.rollback()
        found.append(all_of())
    return found


def on_both() -> list[Any]:
    found = [all_of()]
    with session.begin_nested():
        found.append(all_of())
    on_primary()
    return [*found, all_of(), all_by_driver(session.connection())]


def in_listeners() -> list[Any]:
    found: list[Any] = []
    event.listen(session(), "after_begin", lambda *given: found.append(all_by_driver(given[2])))
    found.append(all_of())
    session.commit()
    return [*found, session.scalars(select(Note.owner)).all(), all_of()]


def in_a_listener_of_a_commit() -> list[Any]:
    """The commit ends the transaction on the replica first, and with it what was set for the tenant."""
    replica = {"bind": application.engines["replicas[0]"]}
    found = [session.scalars(select(Note.owner), bind_arguments=replica).all(), all_by_driver(connection_of_replica())]
    event.listen(session(), "before_commit", lambda _: found.append(all_by_driver(session.connection(replica))))
    session.commit()
    return found


WAYS: tuple[Callable[[], list[Any]], ...] = (
    by_driver_first,
    by_driver_after_a_read,
    by_name_of_the_replica,
    by_another_session,
    by_stream,
    after_commits,
    after_an_error,
    on_both,
    in_listeners,
    in_a_listener_of_a_commit,
)


def read_by(way: Callable[[], list[Any]], make: Make, **options: Any) -> None:
    """Have all tenants read, on the same connections, where nobody has a row as well."""

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        found = way()
        assert found == [[application.tenant]] * len(found)
        start("200 OK", [])
        return [application.tenant.encode()]

    tenants = make(app, **options)
    assert tenants.shared is not None
    with tenants.shared.engine.begin() as connection:
        Base.metadata.create_all(connection)
        connection.execute(Note.__table__.insert(), {"id": 1, "owner": "nobody"})
    for name in NAMES * 2:
        assert ask(Client(tenants), name) == name
    assert [engine.pool.checkedout() for engine in tenants.shared.engines.values()] == [0, 0]


@pytest.mark.parametrize("way", WAYS)
def test_no_way_to_read_finds_a_row_of_nobody(make: Make, way: Callable[[], list[Any]]) -> None:
    read_by(way, make)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("row", rows_of("psycopg"), indirect=True)
def test_no_way_to_read_finds_a_row_of_nobody_where_each_transaction_begins_at_once(
    make: Make, way: Callable[[], list[Any]]
) -> None:
    read_by(way, make, lazy_begin=False)


@pytest.mark.parametrize("target", ["replica", "all engines"])
@pytest.mark.parametrize("row", rows_of("psycopg"), indirect=True)
def test_listener_that_executes_by_itself_finds_no_row_of_nobody(make: Make, url: URL, target: str) -> None:
    """No listener that is called after it could send the settings first."""

    def execute(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
        cursor.execute(statement, parameters)
        return True

    replica = create_engine(url, pool_size=1, max_overflow=0)
    listened = replica if target == "replica" else Engine
    event.listen(listened, "do_execute", execute)
    try:
        read_by(after_commits, make, replicas=[replica], lazy_begin=True)
    finally:
        event.remove(listened, "do_execute", execute)
        replica.dispose()


@pytest.mark.parametrize("options", [{}, {"replicas": []}, {"replicas": [], "binds": True}], ids=str)
def test_session_has_one_transaction_on_an_engine_by_whatever_name(
    make: Make, url: URL, options: dict[str, Any]
) -> None:
    """It sees what it has written, and needs no second connection of a pool that has one."""

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        session.add(Note(owner="new"))
        session.flush()
        named = {"bind": application.engine}
        counts = {len(session.scalars(select(Note.owner), bind_arguments=named).all())}
        counts.add(len(all_by_driver(session.connection(named))))
        session.rollback()
        start("200 OK", [])
        return [str(counts).encode()]

    if "binds" in options:
        options = {**options, "binds": {"other": url}}
    assert ask(Client(make(app, **options)), "acme", method="POST") == "{2}"


@pytest.mark.parametrize("row", rows_on("postgresql"), indirect=True)
def test_replica_that_is_lost_before_a_commit_does_not_fail_it(make: Make, url: URL) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        number = session.scalars(text("SELECT pg_backend_pid()")).one()
        session.add(Note(owner=application.tenant))
        engine = create_engine(url)
        with engine.connect() as connection:
            connection.execute(text("SELECT pg_terminate_backend(:number, 5000)"), {"number": number})
        engine.dispose()
        session.commit()
        start("200 OK", [])
        return [find(by_text=True).encode()]

    tenants = make(app)
    assert ask(Client(tenants), "acme") == "acme:primary acme:primary"
    assert ask(Client(tenants), "globex") == "globex:primary globex:primary"


GIVEN: dict[str, Callable[[Engine], Any]] = {
    "url": lambda engine: engine.url,
    "engine": lambda engine: engine,
    "engine with options": lambda engine: engine.execution_options(foo=1),
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("row", rows_on("postgresql"), indirect=True)
def test_commit_of_what_was_read_on_a_replica_is_no_commit(
    make: Make, url: URL, given: Callable[[Engine], Any]
) -> None:
    """So the request is repeated after an error that may not recur."""
    calls: list[str] = []

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        calls.append(find(by_text=True))
        session.commit()
        if len(calls) == 1:
            on_primary()
            session.execute(text("DO $$ BEGIN RAISE 'again' USING ERRCODE = '40001'; END $$"))
        start("200 OK", [])
        return [find(by_text=True).encode()]

    replica = create_engine(url)
    tenants = make(app, replicas=[given(replica)], transaction={"attempts": 2})
    assert ask(Client(tenants), "acme").startswith("acme:")
    assert len(calls) == 2
    replica.dispose()


def test_first_requests_of_a_tenant_at_once_use_the_same_engines(make: Make) -> None:
    """An engine that is not the one that is compared would be nobody's."""
    tenants = make()
    assert tenants.shared is not None
    barrier = Barrier(2)

    def meet(engine: Engine, options: Any) -> None:
        with suppress(BrokenBarrierError):
            barrier.wait(0.2)

    for engine in tenants.shared.engines.values():
        event.listen(engine, "set_engine_execution_options", meet)
    tenants._table.applications.clear()
    found: list[str] = []
    threads = [Thread(target=lambda: found.append(ask(Client(tenants), "acme"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    acme = tenants.application("acme")
    with acme.context():
        assert session.bind is acme.engine
    assert [*found, ask(Client(tenants), "acme", "/commit")] == ["acme:replica"] * 3


@pytest.mark.parametrize("row", rows_of("psycopg"), indirect=True)
def test_tenants_have_one_class_of_sessions(make: Make, url: URL) -> None:
    """A class takes 15 KiB, and each listener of a base class is kept for each of them."""
    tenants = make(binds={"other": url})
    kinds = set()
    for name in NAMES:
        with tenants.context(name):
            kinds.add(type(session()))
    assert len(kinds) == 1


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("row", rows_on("postgresql"), indirect=True)
def test_silent_replica_leaves_time_for_the_primary(make: Make, url: URL, given: Callable[[Engine], Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        replica = create_engine(url.set(host="127.0.0.1", port=silent.getsockname()[1]))
        tenants = make(replicas=[given(replica)], deadline=2)
        assert [ask(Client(tenants), name) for name in NAMES] == [f"{name}:primary" for name in NAMES]
        replica.dispose()


@pytest.mark.parametrize("there", ["replica", "primary"])
@pytest.mark.parametrize("row", rows_on("postgresql"), indirect=True)
def test_failure_of_a_tenant_is_over_when_the_database_answers(make: Make, there: str) -> None:
    """The application gets the error of the database, and a later error of its own is no reason to try again."""
    calls: list[str] = []

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        if there == "primary":
            on_primary()
        calls.append(find(by_text=True))
        with pytest.raises(OperationalError):
            session.execute(text("DO $$ BEGIN RAISE 'again' USING ERRCODE = '40001'; END $$"))
        session.rollback()
        calls.append(find(by_text=True))
        raise LookupError("the application's own")

    tenants = make(app, transaction={"attempts": 2}, unavailable=True)
    for name in NAMES:
        calls.clear()
        with pytest.raises(LookupError):
            ask(Client(tenants), name)
        assert len(calls) == 2


@pytest.mark.parametrize("row", rows_on("postgresql"), indirect=True)
def test_request_that_is_late_takes_no_replica_from_the_others(make: Make) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        found = find(by_text=True)
        if environ["PATH_INFO"] == "/late":
            with suppress(sqlalchemy.exc.DBAPIError, DeadlineError):
                session.execute(text("SELECT pg_sleep(10)"))
            session.rollback()
            with pytest.raises(DeadlineError):
                find(by_text=True)
        start("200 OK", [])
        return [found.encode()]

    tenants = make(app, deadline=0.5)
    assert ask(Client(tenants), "acme", "/late") == "acme:replica"
    assert ask(Client(tenants), "globex") == "globex:replica"


class TestRowsEach:
    @pytest.fixture
    def row(self) -> Row:
        found: Row = next(each.values[0] for each in rows_on("postgresql"))
        return found

    def test_policy_of_the_replica_sees_the_tenant(self, url: URL) -> None:
        """A transaction on the replica begins with the setting, also after one that has committed."""
        setting = select(literal_column("current_setting('app.tenant', true)"))

        def app(environ: Environ, start: StartResponse) -> list[bytes]:
            found = []
            for _ in range(2):
                found.append(session.scalars(setting).one())
                found.append(session.scalars(select(literal_column(IS_REPLICA["postgresql"]))).one())
                session.commit()
            start("200 OK", [("Content-Type", "text/plain")])
            return [repr(found).encode()]

        tenants = TenantsMiddleware(
            app, url, tenant="header:X-Tenant", known=NAMES, set_local={"app.tenant": "{tenant}"}, replicas=[url]
        )
        for name in NAMES * 2:
            assert ask(Client(tenants), name) == repr([name, True] * 2)
        tenants.dispose()
