"""What users of other tools have reported: rebuilt with this library. Each test names the report."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from typing import Any
from uuid import uuid4
from weakref import ref

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from sqlalchemy import ForeignKey, String, create_engine, insert, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, selectinload
from sqlalchemy.pool import QueuePool
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, metrics, session
from sqlasession_middleware._recording.record import RECORD, Record
from sqlasession_middleware.errors import ConfigurationError
from sqlasession_middleware.testing import no_n_plus_one

from .wsgi import Environ, StartResponse

PREFIX = f"reported_{uuid4().hex[:12]}"
#: So many objects are asked for at once by selectinload() ("What Kind of Loading to Use?").
BATCH = 500


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = f"{PREFIX}_author"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50), default="50%")
    books: Mapped[list[Book]] = relationship()


class Book(Base):
    __tablename__ = f"{PREFIX}_book"
    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey(Author.id))


def answer(environ: Environ, start_response: StartResponse) -> list[bytes]:
    environ["work"]()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"done"]


def ask(app: Any, work: Any) -> tuple[Record, Any]:
    record = Record({"REQUEST_METHOD": "GET", "PATH_INFO": "/"})
    return record, Client(app).get("/", buffered=True, environ_overrides={RECORD: record, "work": work})


@pytest.fixture
def app(database_url: str) -> Iterator[SQLASessionMiddleware]:
    app = SQLASessionMiddleware(answer, database_url, metadata=Base.metadata, server_timing=True)
    app.init_database()
    yield app
    app.drop_database()
    app.dispose()


def test_selectin_loading_in_batches_is_no_n_plus_one(app: SQLASessionMiddleware) -> None:
    """OneGov/onegov-cloud 2575: loading of many objects, 500 at a time, was taken for N+1."""

    def fill() -> None:
        session.execute(insert(Author), [{"id": number, "name": ""} for number in range(1, 3 * BATCH + 2)])
        session.commit()

    def read() -> None:
        found = session.scalars(select(Author).options(selectinload(Author.books))).all()
        assert [author.books for author in found] == [[]] * (3 * BATCH + 1)

    ask(app, fill)
    record, _ = ask(app, read)
    assert record.count == 5
    with no_n_plus_one():
        ask(app, read)
    # In a loop of its own it is one.
    ids = [1, 2, 3]
    with pytest.raises(AssertionError, match="3 times: SELECT"), no_n_plus_one():
        ask(
            app,
            lambda: [
                session.scalars(select(Author).where(Author.id == each).options(selectinload(Author.books))).all()
                for each in ids
            ],
        )


def test_objects_that_are_loaded_singly_at_several_places_are_no_n_plus_one(app: SQLASessionMiddleware) -> None:
    """jmcarp/nplusone 15: lazy loads of objects that were loaded one by one, at places of their own."""
    ask(app, lambda: (session.add_all(Author(id=number) for number in (1, 2, 3)), session.commit()))

    def work() -> None:
        assert session.get_one(Author, 1).books == []
        assert session.get_one(Author, 2).books == []
        assert session.get_one(Author, 3).books == []

    with no_n_plus_one():
        ask(app, work)


def test_script_records_nothing(app: SQLASessionMiddleware) -> None:
    """pyramid_debugtoolbar 51 and 96: statements outside of requests were kept for ever."""
    record, _ = ask(app, lambda: session.execute(text("SELECT 1")))

    def ask_often(times: int) -> int:
        with app.context():
            for _ in range(times):
                session.execute(text("SELECT 1"))
        gc.collect()
        return len(gc.get_objects())

    before = ask_often(100)
    assert ask_often(2_000) - before < 1_000  # One object more for each statement would be 2,000.
    assert record.count == 1


def test_kept_records_keep_no_connection(database_url: str) -> None:
    """pyramid_debugtoolbar 282: what was kept of requests kept their connections, until the pool was empty."""
    engine = create_engine(database_url, poolclass=QueuePool, pool_size=1, max_overflow=1, pool_timeout=0.1)
    app = SQLASessionMiddleware(answer, engine, server_timing=True)
    kept = [ask(app, lambda: session.execute(text("SELECT 1")).all())[0] for _ in range(10)]
    assert [each.count for each in kept] == [1] * 10
    assert (engine.pool.checkedout(), engine.pool.checkedin()) == (0, 1)  # type: ignore[attr-defined]  # of a QueuePool
    engine.dispose()


def test_statement_within_another_one_has_a_clock_of_its_own(app: SQLASessionMiddleware) -> None:
    """pyramid_debugtoolbar 65: the clock was the connection's, and a second statement took it away."""
    ask(app, lambda: (session.add_all(Author(id=number) for number in (1, 2, 3)), session.commit()))

    def work() -> None:
        for number in session.scalars(select(Author.id).order_by(Author.id)):
            session.execute(text("SELECT 1")).all()
            assert number in (1, 2, 3)

    record, _ = ask(app, work)
    assert record.count == 4
    assert record.seconds == pytest.approx(sum(each.seconds for each in record.statements))
    assert record.fetched == pytest.approx(sum(each.fetched for each in record.statements))
    assert all(each.end >= each.begin > 0 for each in record.statements)


def test_header_stays_short_whatever_was_sent(sqlite_engine: Any) -> None:
    """tuupola/server-timing-middleware 25: an entry for each measurement made heads that servers refuse."""
    app = SQLASessionMiddleware(answer, sqlite_engine, server_timing=True)
    _, response = ask(app, lambda: [session.execute(text("SELECT 1")) for _ in range(3_000)])
    (header,) = response.headers.getlist("Server-Timing")
    assert 'desc="3000 queries"' in header
    assert len(header) < 300


def test_comment_with_a_percent_sign_changes_no_value(database_url: str) -> None:
    """PyMySQL 449, psycopg 1274: ``%`` is doubled in some calls of a driver, and must not be in others."""
    comments = {"application": "50% off", "values": lambda environ: {"share": "100%"}}
    app = SQLASessionMiddleware(answer, database_url, metadata=Base.metadata, sql_comments=comments)
    app.init_database()
    found: list[str] = []

    def work() -> None:
        session.execute(insert(Author), [{"name": "1%"}, {"name": "%s"}, {"name": "%%"}])
        session.connection().exec_driver_sql(f"DELETE FROM {Author.__tablename__} WHERE name = 'none'")
        found.extend(session.scalars(select(Author.name).where(Author.name.like("%")).order_by(Author.id)))

    ask(app, work)
    app.drop_database()
    app.dispose()
    assert found == ["1%", "%s", "%%"]


@pytest.fixture
def reader() -> Iterator[InMemoryMetricReader]:
    reader = InMemoryMetricReader()
    yield reader
    reader.shutdown()


def count_of(reader: InMemoryMetricReader, name: str) -> int:
    data = reader.get_metrics_data()
    return sum(
        getattr(point, "count", 1)
        for resource in ([] if data is None else data.resource_metrics)
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == name
        for point in metric.data.data_points
    )


def test_engines_that_are_measured_are_collected(reader: InMemoryMetricReader, sqlite_url: str) -> None:
    """opentelemetry-python-contrib 1761: each engine that was instrumented stayed in memory."""
    provider = MeterProvider([reader])
    engines = []
    for _ in range(10):
        app = SQLASessionMiddleware(answer, sqlite_url, server_timing=True)
        metrics.observe(app, provider)
        ask(app, lambda: session.execute(text("SELECT 1")))
        app.dispose()
        engines.append(ref(app.engine))
        del app
    gc.collect()
    assert [each() for each in engines] == [None] * 10


def test_engine_of_two_applications_is_measured_once(reader: InMemoryMetricReader, sqlite_engine: Any) -> None:
    """opentelemetry-python-contrib 2149: an engine that was instrumented twice had spans that nobody closed."""
    provider = MeterProvider([reader])
    apps = [SQLASessionMiddleware(answer, sqlite_engine) for _ in range(2)]
    for app in apps:
        metrics.observe(app, provider)
        with pytest.raises(ConfigurationError, match="is observed already"):
            metrics.observe(app, provider)
    ask(apps[0], lambda: session.execute(text("SELECT 1")))
    assert count_of(reader, "db.client.operation.duration") == 1


def test_connecting_is_measured_apart(reader: InMemoryMetricReader, server_url: str) -> None:
    """opentelemetry-python-contrib 1133: making the connection was not told, and the first statement looked slow."""
    app = SQLASessionMiddleware(answer, server_url, server_timing=True)
    metrics.observe(app, MeterProvider([reader]))
    record, response = ask(app, lambda: session.execute(text("SELECT 1")))
    assert [each.kind for each in record.waits] == ["connect", "pool"]
    assert count_of(reader, "db.client.connection.create_time") == 1
    connecting = record.waits[0].end - record.waits[0].begin
    assert record.statements[0].begin >= record.waits[0].end
    assert record.seconds + connecting < record.statements[0].end - record.begin
    assert re.match(r"db;dur=[\d.]+;desc=\"1 query\", db-wait;dur=", response.headers["Server-Timing"])
    app.dispose()
