"""What others have reported of their own libraries for tenants, built on this one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Enum, Integer, Sequence, create_engine, make_url, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool

from sqlasession_middleware import application, has_scope, session
from sqlasession_middleware.errors import ScopeError
from sqlasession_middleware.tenants import TenantsMiddleware

from .conftest import DATABASES_SEEN
from .integration.pgbouncer import bouncing
from .wsgi import Environ, StartResponse, consume, environ, start_response

NAMES = ("acme", "globex")

pytestmark = pytest.mark.usefixtures("disposes")


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "report_account"
    id: Mapped[int] = mapped_column(Integer, Sequence("report_account_seq", metadata=Base.metadata), primary_key=True)
    owner: Mapped[str]
    kind: Mapped[str] = mapped_column(Enum("new", "old", name="report_kind", metadata=Base.metadata), default="new")


def add_own(environ: Environ, start: StartResponse) -> list[bytes]:
    session.add(Account(owner=application.tenant))
    session.commit()
    start("200 OK", [])
    return [b""]


@pytest.fixture
def make() -> Iterator[Callable[..., TenantsMiddleware]]:
    """Makes an application with a schema for each tenant on a pool of one connection, and one row in each."""
    url = DATABASES_SEEN.url("postgresql", "")
    engine = create_engine(url, poolclass=NullPool)

    def clean() -> None:
        with engine.begin() as connection:
            for name in NAMES:
                connection.execute(text(f"DROP SCHEMA IF EXISTS report_{name} CASCADE"))

    made: list[TenantsMiddleware] = []

    def make(app: Any = add_own, bind: Any = url, **options: Any) -> TenantsMiddleware:
        given = {"engine_options": {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}, **options}
        given |= {"tenant": "header:X-Tenant", "known": NAMES, "schema": "report_{tenant}", "metadata": Base.metadata}
        made.append(TenantsMiddleware(app, bind, **given))
        for name in NAMES:
            made[-1].init_database(name)
            with made[-1].context(name):
                session.add(Account(owner=name))
                session.commit()
        return made[-1]

    clean()
    yield make
    for each in made:
        each.dispose()
    clean()
    engine.dispose()


def ask(app: Any, name: str) -> bytes:
    return consume(app(environ(HTTP_X_TENANT=name), start_response))


def owners() -> list[str]:
    return list(session.scalars(select(Account.owner)))


def test_object_is_refreshed_from_its_own_schema(make: Any) -> None:
    """sqlalchemy/sqlalchemy#10322: after the commit, the object was looked for in "public"."""
    app = make()
    for name in NAMES:
        with app.context(name):
            account = Account(owner=name)
            session.add(account)
            session.commit()
            assert (account.id, account.owner) == (2, name)


def test_one_key_is_two_objects_in_two_schemas(make: Any) -> None:
    """sqlalchemy/sqlalchemy#7832: one Session took rows of two schemas with the same key for one object."""
    app = make(engine_options={"pool_size": 2})
    with app.context("acme"):
        outer = session.get(Account, 1)
        with app.context("globex"):
            inner = session.get(Account, 1)
            assert (outer.owner, inner.owner) == ("acme", "globex")
        assert session.get(Account, 1) is outer


def test_sequence_and_enum_are_in_the_schema(make: Any) -> None:
    """sqlalchemy/sqlalchemy#5500 and #5158: the table was made of a sequence, and of a type, in another schema."""
    app = make()
    with app.shared.engine.connect() as connection:
        found = connection.execute(
            text(
                """
                SELECT nspname, relname FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace
                WHERE relname = 'report_account_seq'
                UNION SELECT nspname, typname FROM pg_type JOIN pg_namespace n ON n.oid = typnamespace
                WHERE typname = 'report_kind'
                """
            )
        ).all()
    assert sorted(tuple(each) for each in found) == [
        (f"report_{name}", what) for name in NAMES for what in ("report_account_seq", "report_kind")
    ]
    app.application("acme").drop_database()
    with app.context("globex"):
        session.add(Account(owner="globex", kind="old"))
        session.commit()
        assert session.scalars(select(Account.id).where(Account.kind == "old")).all() == [2]


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_prepared_statement_meets_other_columns(make: Any, driver: str) -> None:
    """pgjdbc/pgjdbc#496: "cached plan must not change result type", where one schema was migrated already."""
    app = make(bind=make_url(DATABASES_SEEN.url("postgresql", "")).set(drivername=f"postgresql+{driver}"))
    with app.context("acme"):
        session.execute(text("ALTER TABLE report_account ADD note text"))
        session.commit()
    for _ in range(8):
        for name, width in (("acme", 4), ("globex", 3)):
            with app.context(name):
                assert [len(row) for row in session.execute(text("SELECT * FROM report_account"))] == [width]


def test_pgbouncer_gives_a_server_connection_to_another_tenant(make: Any) -> None:
    """django-tenants/django-tenants#1112 and #545, rails-on-services/apartment#470: in its transaction mode, the last
    SET search_path won for everybody on the same connection to the server."""
    with bouncing(make_url(DATABASES_SEEN.url("postgresql", "")), default_pool_size=1) as bouncer:
        app = make(bind=bouncer.url, engine_options={"pool_size": 2})
        statement = text("SELECT owner, pg_backend_pid() FROM report_account")
        with app.context("acme"):
            first = session.execute(statement).one()
            session.rollback()
            with app.context("globex"):
                second = session.execute(statement).one()
                session.rollback()
            assert (first[0], second[0]) == NAMES
            assert first[1] == second[1]
            assert session.execute(statement).one() == first
        app.dispose()


def test_request_in_a_request_leaves_the_tenant_as_it_was(make: Any) -> None:
    """django-tenants/django-tenants#1142: after a request of the test client the schema stayed the other one."""
    app = make(engine_options={"pool_size": 2})
    with app.context("acme"):
        ask(app, "globex")
        assert application.tenant == "acme"
        assert owners() == ["acme"]
    assert not has_scope()


def test_thread_has_no_tenant_instead_of_a_public_one(make: Any) -> None:
    """django-tenants/django-tenants#632, citusdata/activerecord-multi-tenant#255: a thread saw what is nobody's, or
    everybody's."""
    app, seen = make(), []

    def work() -> None:
        try:
            owners()
        except ScopeError as error:
            seen.append(error)

    with app.context("acme"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert "No application is bound here" in str(seen[0])


def test_job_does_not_take_the_tenant_of_the_one_before(make: Any) -> None:
    """ErwinM/acts_as_tenant#188: a job that began while another one ran took that one's tenant."""
    runs, goes_on = threading.Event(), threading.Event()
    seen: dict[str, list[str]] = {}

    def work() -> None:
        name = application.tenant
        runs.set()
        assert goes_on.wait(30) or name == "globex"
        seen[name] = owners()
        if name == "globex":
            goes_on.set()

    app = make(background={"threads": 1})
    other = make_second(app)
    app.application("acme").background(work)
    assert runs.wait(30)
    other.start()
    goes_on.set()
    app.application("globex").background(work)
    other.join()
    app.dispose()
    assert seen == {name: [name] for name in NAMES}


def make_second(app: TenantsMiddleware) -> threading.Thread:
    """A thread that is in another tenant at the same time."""

    def work() -> None:
        with app.context("globex"):
            assert owners() == ["globex"]

    return threading.Thread(target=work)


def test_query_that_is_run_later_is_not_the_outer_tenants(make: Any) -> None:
    """django-tenants/django-tenants#164: a query that was made in the block, and run after it, found the rows of the
    tenant around the block."""
    app = make(engine_options={"pool_size": 2})
    with app.context("acme"):
        with app.context("globex"):
            query = session.query(Account.owner)
            made_in = session()
        assert [owner for (owner,) in query] == ["globex"]
        made_in.close()
        assert owners() == ["acme"]
