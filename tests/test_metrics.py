"""Metrics for OpenTelemetry: their names are those of the conventions, and their values are what has happened."""

from __future__ import annotations

import gc
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

import pytest
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.semconv._incubating.attributes import db_attributes
from opentelemetry.semconv._incubating.metrics import db_metrics
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.semconv.attributes.server_attributes import SERVER_ADDRESS, SERVER_PORT
from prometheus_client import generate_latest
from sqlalchemy import create_engine, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.pool import NullPool, QueuePool
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, doom, metrics, session
from sqlasession_middleware.errors import ConfigurationError
from sqlasession_middleware.tenants import TenantsMiddleware

from .conftest import DATABASES_SEEN
from .ports import free_port
from .wsgi import Environ, StartResponse

PATIENCE = 30

POOL = {"db.client.connection.pool.name": "default"}


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "measured_item"
    id: Mapped[int] = mapped_column(primary_key=True)


def answer(environ: Environ, start_response: StartResponse) -> list[bytes]:
    environ["work"]()
    start_response(environ.get("status", "200 OK"), [("Content-Type", "text/plain")])
    return [b"done"]


def read() -> None:
    session.scalars(select(Item.id)).all()


def write() -> None:
    session.execute(insert(Item))


def ask(app: Any, work: Callable[[], object] = read, **more: Any) -> Any:
    return Client(app).get("/", buffered=True, environ_overrides={"work": work, **more})


class Collected:
    """What a provider has collected."""

    def __init__(self) -> None:
        self._reader = InMemoryMetricReader()
        self.provider = MeterProvider([self._reader])

    def points(self, name: str) -> dict[tuple[tuple[str, Any], ...], Any]:
        """The values of a metric by their attributes; of a histogram, the counts."""
        data = self._reader.get_metrics_data()
        return {
            tuple(sorted(point.attributes.items())): getattr(point, "count", None) or getattr(point, "value", 0)
            for resource in ([] if data is None else data.resource_metrics)
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        }

    def value(self, name: str, **attributes: Any) -> Any:
        """The value with these attributes beside those of the pool; None if there is none."""
        told = {key.replace("_", "."): value for key, value in attributes.items()}
        return self.points(name).get(tuple(sorted({**POOL, **told}.items())))


@pytest.fixture
def collected() -> Iterator[Collected]:
    found = Collected()
    yield found
    found.provider.shutdown()


@pytest.fixture
def make(collected: Collected, database_url: str) -> Iterator[Callable[..., SQLASessionMiddleware]]:
    made: list[SQLASessionMiddleware] = []

    def make(**options: Any) -> SQLASessionMiddleware:
        app = SQLASessionMiddleware(answer, database_url, metadata=Base.metadata, **options)
        app.init_database()
        app.dispose()
        metrics.observe(app, collected.provider)
        made.append(app)
        return app

    yield make
    for app in made:
        app.drop_database()
        app.dispose()


# -- names


class Noted:
    """A meter that notes the instruments that are made."""

    def __init__(self) -> None:
        self.made: dict[str, tuple[str, str]] = {}

    def get_meter(self, name: str) -> Noted:
        return self

    def __getattr__(self, kind: str) -> Any:
        def create(name: str, *arguments: Any, unit: str = "", **options: Any) -> None:
            found = next((each for each in arguments if isinstance(each, str)), unit)
            self.made[name] = kind.replace("observable_", ""), found

        return create


def test_names_kinds_and_units_are_those_of_the_conventions() -> None:
    ours, theirs = Noted(), Noted()
    metrics._Meters(ours)  # type: ignore[arg-type]  # it has what is asked for
    of_conventions = {name: each for name, each in ours.made.items() if not name.startswith("sqlasession.")}
    constants = {value: name for name, value in vars(db_metrics).items() if name.startswith("DB_CLIENT_")}
    for name in of_conventions:
        getattr(db_metrics, f"create_{constants[name].lower()}", lambda meter: None)(theirs)
    # The stable one is elsewhere, or has no function in some versions.
    theirs.made.setdefault(db_metrics.DB_CLIENT_OPERATION_DURATION, ("create_histogram", "s"))
    assert len(of_conventions) == 8
    assert of_conventions == theirs.made


def test_attributes_are_those_of_the_conventions(make: Any, collected: Collected) -> None:
    known = {value for name, value in vars(db_attributes).items() if name.startswith("DB_")}
    known |= {ERROR_TYPE, SERVER_ADDRESS, SERVER_PORT}
    app = make()
    with pytest.raises(DBAPIError):
        ask(app, lambda: (read(), session.execute(text("SELECT nothing FROM nowhere"))))
    used = {
        key
        for name in ("operation.duration", "connection.count", "connection.max", "connection.wait_time")
        for attributes in collected.points(f"db.client.{name}")
        for key, _ in attributes
    }
    assert {"db.system.name", "error.type", "db.client.connection.state"} <= used <= known
    systems = {value for name, value in vars(db_attributes.DbSystemNameValues).items() if name.isupper()}
    systems = {getattr(each, "value", each) for each in systems}
    assert {dict(each)["db.system.name"] for each in collected.points("db.client.operation.duration")} <= systems
    assert {*metrics._SYSTEMS.values()} <= systems
    states = {each.value for each in db_attributes.DbClientConnectionStateValues}
    counted = collected.points("db.client.connection.count")
    assert {dict(each)["db.client.connection.state"] for each in counted} == states


# -- statements and connections


def test_statements_are_counted_once_and_failures_apart(make: Any, collected: Collected) -> None:
    app = make()

    def work() -> None:
        read()
        write()
        with pytest.raises(DBAPIError):
            session.execute(text("SELECT nothing FROM nowhere"))
        session.rollback()

    ask(app, work)
    points = [(dict(key), count) for key, count in collected.points("db.client.operation.duration").items()]
    points = [(attributes, count) for attributes, count in points if "db.operation.name" not in attributes]
    assert sorted(("error.type" in attributes, count) for attributes, count in points) == [(False, 2), (True, 1)]
    url = app.engine.url
    for attributes, _ in points:
        assert attributes["db.namespace"] == url.database
        assert attributes.get("server.address") == url.host
        assert attributes.get("server.port") == url.port


def test_failure_of_what_was_measured_is_not_measured_again(collected: Collected, sqlite_engine: Any) -> None:
    app = SQLASessionMiddleware(answer, sqlite_engine)
    metrics.observe(app, collected.provider)

    def work() -> None:
        # It is executed, and fails when its second row is fetched.
        rows = session.execute(text("SELECT 1 UNION ALL SELECT abs(-9223372036854775808)"))
        with pytest.raises(DBAPIError):
            rows.all()

    ask(app, work)
    (attributes,) = collected.points("db.client.operation.duration")
    assert "error.type" not in dict(attributes)


def ends(collected: Collected) -> dict[tuple[str, str | None], int]:
    """How many COMMITs and ROLLBACKs there were, by the class of their error."""
    points = [(dict(key), count) for key, count in collected.points("db.client.operation.duration").items()]
    return {
        (each["db.operation.name"], each.get("error.type")): count
        for each, count in points
        if "db.operation.name" in each
    }


def test_commits_and_rollbacks_that_are_sent_are_timed(make: Any, collected: Collected) -> None:
    app = make(transaction=True)
    before = ends(collected)
    ask(app, write)
    assert ends(collected) == {**before, ("COMMIT", None): before.get(("COMMIT", None), 0) + 1}
    rolled_back = before.get(("ROLLBACK", None), 0)
    ask(app, lambda: (write(), doom()))
    assert ends(collected)["ROLLBACK", None] == rolled_back + 1


def test_commit_that_fails_is_counted_apart(collected: Collected, sqlite_url: str) -> None:
    app = SQLASessionMiddleware(answer, sqlite_url)
    metrics.observe(app, collected.provider)

    def work() -> None:
        session.execute(text("PRAGMA foreign_keys = ON"))
        session.execute(text("CREATE TABLE a (id INTEGER PRIMARY KEY)"))
        session.execute(text("CREATE TABLE b (id INTEGER REFERENCES a DEFERRABLE INITIALLY DEFERRED)"))
        session.commit()
        session.execute(text("INSERT INTO b VALUES (1)"))
        with pytest.raises(DBAPIError):
            session.commit()

    ask(app, work)
    assert ends(collected)["COMMIT", "IntegrityError"] == 1
    app.dispose()


def test_connections_are_counted_and_timed(make: Any, collected: Collected) -> None:
    app = make(engine_options={"pool_size": 2, "max_overflow": 3})
    seen: list[Any] = []

    def count() -> tuple[Any, Any]:
        name = "db.client.connection.count"
        return tuple(collected.value(name, db_client_connection_state=state) for state in ("used", "idle"))  # type: ignore[return-value]

    def work() -> None:
        read()
        seen.append(count())

    ask(app, work)
    ask(app, work)
    assert seen == [(1, 0), (1, 0)]
    assert count() == (0, 1)
    assert collected.value("db.client.connection.max") == 5
    times = ("create_time", "wait_time", "use_time")
    assert [collected.value(f"db.client.connection.{each}") for each in times] == [1, 2, 2]
    app.engine.dispose()
    ask(app, work)
    assert [collected.value(f"db.client.connection.{each}") for each in times] == [2, 3, 3]
    connection = app.engine.connect()
    connection.invalidate()
    connection.close()
    assert collected.value("db.client.connection.use_time") == 4
    assert collected.value("db.client.connection.pending_requests") == 0


def test_waits_for_the_pool_are_counted_while_they_last(make: Any, collected: Collected) -> None:
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": PATIENCE}
    app = make(engine_options=options)
    taken = app.engine.connect()
    thread = threading.Thread(target=ask, args=(app,))
    thread.start()
    pending = threading.Event()
    while collected.value("db.client.connection.pending_requests") != 1:
        assert not pending.wait(0.01)
    taken.close()
    thread.join()
    assert collected.value("db.client.connection.pending_requests") == 0
    assert collected.points("db.client.connection.timeouts") == {}


def test_timeouts_of_the_pool_are_counted_with_the_503(make: Any, collected: Collected) -> None:
    app = make(engine_options={"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.01}, unavailable=True)
    with app.engine.connect():
        assert ask(app).status_code == 503
    assert ask(app).status_code == 200
    assert collected.value("db.client.connection.timeouts") == 1
    assert collected.points("sqlasession.request.unavailable") == {(("reason", "pool"),): 1}
    assert collected.value("sqlasession.breaker.state", state="closed") == 1


def test_breaker_tells_its_state(collected: Collected) -> None:
    url = f"postgresql+psycopg://127.0.0.1:{free_port()}/nothing"
    app = SQLASessionMiddleware(answer, url, unavailable={"breaker_failures": 1})
    metrics.observe(app, collected.provider)
    assert collected.points("sqlasession.breaker.state") == {}
    assert ask(app).status_code == 503
    states = {dict(key)["state"]: value for key, value in collected.points("sqlasession.breaker.state").items()}
    assert states == {"closed": 0, "open": 1, "half open": 0}
    assert collected.points("sqlasession.request.unavailable") == {(("reason", "unreachable"),): 1}
    assert collected.points("db.client.connection.wait_time") == {}
    app.dispose()


def test_pool_that_does_not_count_is_left_out(collected: Collected) -> None:
    app = SQLASessionMiddleware(answer, create_engine("sqlite://", poolclass=NullPool))
    metrics.observe(app, collected.provider)
    ask(app, lambda: session.execute(text("SELECT 1")))
    assert collected.points("db.client.connection.count") == {}
    assert collected.points("db.client.connection.max") == {}
    assert sum(collected.points("db.client.operation.duration").values()) == 1
    app.dispose()


def test_pool_without_a_limit_has_no_maximum(make: Any, collected: Collected) -> None:
    ask(make(engine_options={"max_overflow": -1}))
    assert collected.points("db.client.connection.max") == {}


def test_connection_of_an_own_creator_has_no_time_of_its_making(collected: Collected, sqlite_url: str) -> None:
    failing = create_engine("postgresql+psycopg://127.0.0.1:1/nothing", poolclass=QueuePool)
    made = create_engine("sqlite://", creator=lambda: sqlite3.connect(":memory:"), poolclass=QueuePool)
    app = SQLASessionMiddleware(answer, made, binds={"failing": failing})
    metrics.observe(app, collected.provider)

    def work() -> None:
        with pytest.raises(DBAPIError):
            failing.connect()
        session.execute(text("SELECT 1"))

    ask(app, work)
    assert collected.points("db.client.connection.create_time") == {}
    made.dispose()


# -- requests


def test_outcomes_and_attempts_are_counted(make: Any, collected: Collected) -> None:
    app = make(transaction={"attempts": 3, "backoff_base": 0})
    attempts: list[int] = []

    def twice() -> None:
        attempts.append(1)
        write()
        if len(attempts) == 1:
            raise StaleDataError

    ask(app, twice)
    ask(app, lambda: (write(), doom()))
    ask(app, write, status="404 Not Found")
    ask(app, lambda: None)
    with app.context():
        read()  # No request.
    outcomes = {key[0][1]: value for key, value in collected.points("sqlasession.request.transactions").items()}
    assert outcomes == {"committed": 1, "doomed": 1, "vetoed": 1, "no transaction": 1}
    assert list(collected.points("sqlasession.request.attempts").values()) == [5]


def test_applications_of_one_provider_share_its_instruments(collected: Collected, sqlite_engine: Any) -> None:
    apps = [SQLASessionMiddleware(answer, sqlite_engine) for _ in range(2)]
    for app in apps:
        metrics.observe(app, collected.provider)
        ask(app, lambda: session.execute(text("SELECT 1")))
    assert sum(collected.points("db.client.operation.duration").values()) == 2
    assert sum(collected.points("sqlasession.request.attempts").values()) == 2


def test_engine_is_not_kept(collected: Collected, sqlite_url: str) -> None:
    app = SQLASessionMiddleware(answer, sqlite_url)
    metrics.observe(app, collected.provider)
    ask(app, lambda: session.execute(text("SELECT 1")))
    app.dispose()
    engine = ref(app.engine)
    del app
    gc.collect()
    assert engine() is None
    assert collected.points("db.client.connection.count") == {}


def test_provider_is_the_global_one_by_default(monkeypatch: pytest.MonkeyPatch, collected: Collected) -> None:
    monkeypatch.setattr(metrics, "get_meter_provider", lambda: collected.provider)
    app = SQLASessionMiddleware(answer, "sqlite://")
    metrics.observe(app)
    ask(app, lambda: None)
    assert list(collected.points("sqlasession.request.attempts").values()) == [1]


def test_slow_requests_are_logged_beside(collected: Collected, caplog: pytest.LogCaptureFixture) -> None:
    app = SQLASessionMiddleware(answer, "sqlite://", slow_requests={"seconds": 0}, server_timing=True)
    metrics.observe(app, collected.provider)
    assert "Server-Timing" in ask(app, lambda: None).headers
    assert len(caplog.records) == 1
    assert list(collected.points("sqlasession.request.attempts").values()) == [1]


def test_prometheus_shows_them(sqlite_url: str) -> None:
    provider = MeterProvider([PrometheusMetricReader()])
    app = SQLASessionMiddleware(answer, sqlite_url, binds={"audit": "sqlite://"}, transaction=True)
    metrics.observe(app, provider)
    ask(app, lambda: session.execute(text("SELECT 1")))
    page = generate_latest().decode()
    app.dispose()
    provider.shutdown()
    assert "db_client_operation_duration_seconds_bucket{" in page
    assert 'le="0.005"' in page
    assert 'db_client_connection_pool_name="default",db_client_connection_state="idle"' in page
    assert "sqlasession_request_transactions_total{" in page


# -- settings


def test_application_is_checked(collected: Collected) -> None:
    with pytest.raises(ConfigurationError, match="app must be a SQLASessionMiddleware, got"):
        metrics.observe(answer, collected.provider)  # type: ignore[arg-type]  # the error
    app = SQLASessionMiddleware(answer, create_engine("sqlite://"))
    metrics.observe(app, collected.provider)
    with pytest.raises(ConfigurationError, match="app is observed already"):
        metrics.observe(app, collected.provider)


def test_package_does_not_import_opentelemetry() -> None:
    code = "import sys, sqlasession_middleware; sys.exit('opentelemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def tenant_of(name: str) -> str:
    return "sqlite://"


@pytest.mark.parametrize("by_tenant", [False, True])
def test_tenants_are_one_series_unless_they_are_told_apart(by_tenant: bool) -> None:
    collected = Collected()
    tenants = TenantsMiddleware(
        answer, tenant_of, tenant="header:X-Tenant", known=["acme", "globex"], metadata=Base.metadata
    )
    metrics.observe(tenants, collected.provider, by_tenant=by_tenant)
    for name in ("acme", "globex"):
        tenants.init_database(name)
        ask(tenants, HTTP_X_TENANT=name)
    idle = ("db.client.connection.state", "idle")
    pool = ("db.client.connection.pool.name", "default")
    each = [(("tenant", name),) for name in ("acme", "globex")] if by_tenant else [()]
    counts = collected.points("db.client.connection.count")
    assert {key: value for key, value in counts.items() if idle in key} == {
        (pool, idle, *more): 2 / len(each) for more in each
    }
    assert set(collected.points("sqlasession.request.attempts")) == set(each)
    told = {name for key in collected.points("db.client.operation.duration") for name, _ in key}
    assert ("tenant" in told) is by_tenant
    assert "db.namespace" not in told  # An SQLite database in memory has no name.
    tenants.dispose()


def test_pool_that_tenants_share_is_observed_once() -> None:
    collected = Collected()
    tenants = TenantsMiddleware(
        answer,
        DATABASES_SEEN.url("postgresql", ""),
        tenant="header:X-Tenant",
        known=["acme", "globex"],
        metadata=Base.metadata,
        schema="metrics_{tenant}",
    )
    metrics.observe(tenants, collected.provider)
    for name in ("acme", "globex"):
        tenants.init_database(name)
        ask(tenants, HTTP_X_TENANT=name)
    counts = collected.points("db.client.connection.count")
    assert counts[(*POOL.items(), ("db.client.connection.state", "idle"))] == 1
    assert collected.points("sqlasession.request.transactions") == {(("outcome", "only read"),): 2}
    with tenants.shared.engine.begin() as connection:
        connection.execute(text("DROP SCHEMA metrics_acme CASCADE"))
        connection.execute(text("DROP SCHEMA metrics_globex CASCADE"))
    tenants.dispose()
