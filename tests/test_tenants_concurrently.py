"""No row is another tenant's, whatever is asked of whom, and in which order (G22)."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import String, create_engine, event, func, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqlasession_middleware import application, session
from sqlasession_middleware.tenants import TenantsMiddleware

from .conftest import DATABASES_SEEN
from .wsgi import Environ, StartResponse, environ, start_response

THREADS, TENANTS, STEPS = 64, 200, 8
NAMES = [f"tenant{number}" for number in range(TENANTS)]


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "tenant_row"
    id: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(String(80))


def owners(how: str) -> set[str]:
    """Whose rows there are, asked in one of several ways."""
    if how == "text":
        return set(session.scalars(text("SELECT owner FROM tenant_row")))
    if how == "mixed":
        return set(session.scalars(select(text("owner")).select_from(text("tenant_row"))))
    if how == "objects":
        return {row.owner for row in session.scalars(select(Row))}
    if how == "raw":
        cursor: Any = session.connection().connection.cursor()
        cursor.execute("SELECT owner FROM tenant_row")
        return {row[0] for row in cursor.fetchall()}
    return set(session.scalars(select(Row.owner).where(func.length(Row.owner) > 0)))


WAYS = ("text", "mixed", "objects", "raw", "columns")


class Site:
    """One application of all tenants. It raises if it meets a row of another one."""

    def __init__(self, make: Callable[[Any], TenantsMiddleware]) -> None:
        self.tenants = make(self)
        self.requests = 0

    def check(self, name: str, how: str) -> bytes:
        assert application.tenant == name
        found = owners(how)
        assert found <= {name}, (name, found)
        return b"x"

    def __call__(self, environ: Environ, start: StartResponse) -> Any:
        name, how = environ["HTTP_X_TENANT"], environ["test.how"]
        self.requests += 1
        self.check(name, how)
        if environ["REQUEST_METHOD"] == "POST":
            session.add(Row(owner=name))
            session.commit()
        kind = environ["test.kind"]
        if kind == "fails":
            session.add(Row(owner="nobody's, as it is rolled back"))
            session.flush()
            raise LookupError
        if kind == "nested":
            other = environ["test.other"]
            with self.tenants.context(other):
                self.check(other, how)
            self.ask(other, "GET", how, "list", name)
            self.check(name, how)
        start("200 OK", [("Content-Type", "text/event-stream" if kind == "events" else "text/plain")])
        return self.stream(name, how) if kind in ("events", "stream") else [b"x"]

    def stream(self, name: str, how: str) -> Iterator[bytes]:
        for _ in range(3):
            yield self.check(name, how) + b"\n\n"

    def ask(self, name: str, method: str, how: str, kind: str, other: str) -> Iterator[None]:
        """A request, in steps; a list is whole in the first one."""
        more = {"HTTP_X_TENANT": name, "test.how": how, "test.kind": kind, "test.other": other}
        try:
            body: Any = self.tenants(environ(method, **more), start_response)
        except LookupError:
            return iter(())
        if kind in ("events", "stream"):
            return self.steps(body)
        body.close()
        return iter(())

    def steps(self, body: Any) -> Iterator[None]:
        try:
            for _ in body:
                yield
        finally:
            body.close()


def make_files(folder: Path, **options: Any) -> Callable[[Any], TenantsMiddleware]:
    def make(app: Any) -> TenantsMiddleware:
        url = f"sqlite:///{folder}/{{tenant}}.db"
        return TenantsMiddleware(
            app,
            url,
            tenant="header:X-Tenant",
            known=NAMES,
            metadata=Base.metadata,
            **{"most": 20, "idle": 0.05} | options,
        )

    return make


@pytest.fixture
def schemas() -> Iterator[Callable[[Any], TenantsMiddleware]]:
    url = DATABASES_SEEN.url("postgresql", "")
    engine = create_engine(url)
    names = [f"c_{name}" for name in NAMES]

    def each(statement: str) -> None:
        for begin in range(0, TENANTS, 50):  # A transaction may hold so many locks only.
            with engine.begin() as connection:
                for name in names[begin : begin + 50]:
                    connection.execute(text(statement.format(name=name)))

    each('DROP SCHEMA IF EXISTS "{name}" CASCADE')
    each('CREATE SCHEMA "{name}" CREATE TABLE tenant_row (id serial PRIMARY KEY, owner varchar(80) NOT NULL)')
    made: list[TenantsMiddleware] = []

    def make(app: Any, **more: Any) -> TenantsMiddleware:
        pool = {"pool_size": 10, "max_overflow": 0, "pool_timeout": 60}
        options: dict[str, Any] = {"schema": "c_{tenant}", "engine_options": pool, "idle": 0.05, **more}
        made.append(TenantsMiddleware(app, url, tenant="header:X-Tenant", known=NAMES, **options))
        return made[-1]

    yield make
    for app in made:
        app.dispose()
    each('DROP SCHEMA "{name}" CASCADE')
    engine.dispose()


def run_threads(site: Site, names: list[str], kinds: tuple[str, ...], steps: int = STEPS) -> None:
    """Have 64 threads ask, each at random, and with several streams open."""
    begins = threading.Barrier(THREADS, timeout=60)

    def work(seed: int) -> None:
        chosen = random.Random(seed)
        begins.wait()
        open_ones: list[Iterator[None]] = []
        for _ in range(steps):
            if open_ones and chosen.random() < 0.4:
                if next(open_ones[0], "end") == "end":
                    open_ones.pop(0)
                continue
            name, other = chosen.sample(names, 2)
            asked = site.ask(name, chosen.choice(["GET", "POST"]), chosen.choice(WAYS), chosen.choice(kinds), other)
            if next(asked, "end") != "end":
                open_ones.append(asked)
        for each in open_ones:
            list(each)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))


def test_64_threads_see_only_the_rows_of_their_tenants_in_files(tmp_path: Path) -> None:
    # Each file is written once here, so that no thread waits for the lock of another.
    site = Site(make_files(tmp_path, engine_options={"connect_args": {"timeout": 60}}))
    for name in NAMES:
        site.tenants.init_database(name)
    run_threads(site, NAMES, ("list", "events", "stream", "fails", "nested"))
    assert site.requests > THREADS
    site.tenants.dispose()


def test_64_threads_see_only_the_rows_of_their_tenants_in_schemas(schemas: Any) -> None:
    """A stream that is no stream of events holds its connection, and a nested request another: so 64 would wait for
    each other's on a pool of 10."""
    site = Site(schemas)
    run_threads(site, NAMES, ("list", "events", "fails"))
    assert site.requests > THREADS
    assert site.tenants.shared is not None
    assert site.tenants.shared.engine.pool.checkedin() <= 10  # type: ignore[attr-defined]


def test_tenant_that_is_kept_on_the_connection_is_found_out(schemas: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests are for: a tenant of the session of the server, set where the connection is made for it."""

    def keep(engine: Any) -> None:
        @event.listens_for(engine, "begin")
        def set_once(connection: Any) -> None:
            statement = connection.get_execution_options().get("sqlasession_local_settings")
            if statement is not None and "tenant" not in connection.info:
                connection.info["tenant"] = True
                connection.exec_driver_sql(statement.replace(", true)", ", false)"))
                connection.connection.commit()

    monkeypatch.setattr("sqlasession_middleware._tenants.maker.begin_with_settings", keep)
    site = Site(lambda app: schemas(app, lazy_begin=False))
    with pytest.raises(AssertionError, match="tenant"):
        run_threads(site, NAMES[:20], ("list",), 20)


steps = st.tuples(
    st.sampled_from(NAMES[:4]),
    st.sampled_from(["GET", "POST"]),
    st.sampled_from(WAYS),
    st.sampled_from(["list", "events", "stream", "fails", "nested"]),
    st.sampled_from(NAMES[:4]),
)


@settings(max_examples=30)
@given(st.lists(st.one_of(steps, st.integers(0, 3), st.just("sweep")), max_size=25))
def test_any_order_of_requests_steps_and_sweeps(tmp_path_factory: pytest.TempPathFactory, chosen: list[Any]) -> None:
    """In one thread: requests of four tenants are open at once, while those that are idle are forgotten."""
    site = Site(make_files(tmp_path_factory.mktemp("tenants"), idle=1e-9, most=1))
    for name in NAMES[:4]:
        site.tenants.init_database(name)
    open_ones: list[Iterator[None]] = []
    for each in chosen:
        if each == "sweep":
            site.tenants._sweep()
        elif isinstance(each, int):
            if open_ones and next(open_ones[each % len(open_ones)], "end") == "end":
                open_ones.pop(each % len(open_ones))
        else:
            open_ones.append(site.ask(*each))
    for asked in open_ones:
        list(asked)
    for name in NAMES[:4]:
        assert not site.tenants.application(name).users
    site.tenants.dispose()
