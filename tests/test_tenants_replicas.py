"""Tenants that share a pool and its replicas: each reads its own rows there, and all know at once which one is away.

The replica is the primary's own server here, by connections that cannot write. A standby is in
tests/integration/test_replicas.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import URL, String, create_engine, event, literal_column, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from werkzeug.test import Client

from sqlasession_middleware import application, session
from sqlasession_middleware.tenants import TenantsMiddleware
from sqlasession_middleware.testing import isolated

from .drivers import Row, rows_on
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
