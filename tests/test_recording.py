"""The record of a request, Server-Timing and the log of slow requests."""

from __future__ import annotations

import _thread
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Column, Integer, MetaData, Sequence, Table, column, create_engine, event, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.orm.exc import StaleDataError
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, doom, session
from sqlasession_middleware._database.breaker import breaker_state
from sqlasession_middleware._recording import record as records
from sqlasession_middleware._recording.record import RECORD, Record
from sqlasession_middleware._recording.stacks import application_frames, take_statement_stack
from sqlasession_middleware.errors import ConfigurationError

from .conftest import DATABASES_SEEN
from .ports import free_port
from .wsgi import Environ, StartResponse, consume, environ

PATIENCE = 30


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = f"recording_{uuid4().hex[:12]}"
    id: Mapped[int] = mapped_column(primary_key=True)


def answer(environ: Environ, start_response: StartResponse) -> list[bytes]:
    environ["work"]()
    start_response(environ.get("status", "200 OK"), [("Content-Type", "text/plain")])
    return [b"done"]


@pytest.fixture
def make(database_url: str) -> Iterator[Callable[..., SQLASessionMiddleware]]:
    made: list[SQLASessionMiddleware] = []

    def make(app: Any = answer, **options: Any) -> SQLASessionMiddleware:
        options = {"server_timing": True, **options}
        wrapped = SQLASessionMiddleware(app, database_url, metadata=Base.metadata, **options)
        if not made:
            wrapped.init_database()
        made.append(wrapped)
        return wrapped

    yield make
    if made:
        made[0].drop_database()
    for app in made:
        app.dispose()


def read() -> None:
    session.scalars(select(Item.id)).all()


def write() -> None:
    session.execute(insert(Item))


def ask(app: SQLASessionMiddleware, work: Callable[[], object], **more: Any) -> tuple[Record, Any]:
    """The record of a request, and its response."""
    record = Record({"REQUEST_METHOD": "GET", "PATH_INFO": "/"})
    overrides = {RECORD: record, "work": work, **more}
    return record, Client(app).get("/", buffered=True, environ_overrides=overrides)


def test_statements_are_noted_with_what_came_of_them(make: Any) -> None:
    app = make(transaction=True)

    def work() -> None:
        write()
        session.execute(insert(Item), [{"id": 100}, {"id": 101}])
        session.connection().exec_driver_sql("SELECT 7 % 4", execution_options={"no_parameters": True}).all()
        with pytest.raises(DBAPIError), session.begin_nested():
            session.execute(text("SELECT nothing FROM nowhere"))
        read()

    record, _ = ask(app, work)
    texts = [re.sub(r"\s+", " ", each.sql) for each in record.statements]
    assert texts[0].startswith(f"INSERT INTO {Item.__tablename__}")
    assert texts[2] == "SELECT 7 % 4"
    assert texts[3].startswith("SAVEPOINT")
    assert [each.is_many for each in record.statements[:2]] == [False, True]
    failed = [each for each in record.statements if each.error is not None]
    assert [each.sql for each in failed] == ["SELECT nothing FROM nowhere"]
    assert isinstance(failed[0].error, DBAPIError)
    assert record.count == len(record.statements)
    assert [each.sql for each in record.statements if not each.end >= each.begin > 0] == []
    assert record.seconds == pytest.approx(sum(each.seconds for each in record.statements))
    assert {application_frames(each.stack)[0][0].co_filename for each in record.statements} == {__file__}
    assert {each.engine for each in record.statements} == {"default"}


def test_each_statement_of_one_execution_is_noted(make: Any) -> None:
    """SQLAlchemy asks for a default before the statement, and sends many rows by several INSERTs."""
    app = make()
    numbers = Sequence(f"numbers_{uuid4().hex[:12]}")
    table = Table(
        numbers.name.replace("numbers", "numbered"),
        MetaData(),
        Column("id", Integer, numbers, primary_key=True),
        implicit_returning=False,
    )
    pages = {"insertmanyvalues_page_size": 2}
    has_sequences = app.engine.dialect.supports_sequences
    table.metadata.create_all(app.engine)

    def work() -> None:
        if has_sequences:
            session.execute(insert(table))
        many = [{"id": number} for number in range(200, 205)]
        assert len(session.scalars(insert(Item).returning(Item.id), many, execution_options=pages).all()) == 5

    record, _ = ask(app, work)
    table.metadata.drop_all(app.engine)
    asked, several = record.statements[:-3], record.statements[-3:]
    assert ["nextval" in each.sql.lower() for each in asked] == ([True, False] if has_sequences else [])
    assert [(each.is_many, each.rows) for each in several] == [(True, 2), (True, 2), (True, 1)]
    assert [each.sql for each in record.statements if not each.end >= each.begin > 0] == []
    assert record.seconds == pytest.approx(sum(each.seconds for each in record.statements))


def test_connections_are_noted_from_checkout_to_return(make: Any) -> None:
    app = make(transaction=True)
    app.engine.dispose()
    record, _ = ask(app, lambda: (read(), write()))
    (hold,) = record.holds
    assert {each.hold for each in record.statements} == {hold}
    assert record.begin < hold.begin < record.statements[0].begin < record.statements[-1].end < hold.end
    assert record.held == pytest.approx(hold.end - hold.begin)
    pool, connect = sorted(record.waits, key=lambda each: each.begin)
    assert (pool.kind, connect.kind) == ("pool", "connect")
    assert pool.end <= connect.begin
    again, _ = ask(app, read)
    assert [each.kind for each in again.waits] == ["pool"]
    assert [each.connection for each in again.holds] == [hold.connection]


def test_connection_that_is_lost_is_held_no_longer(make: Any) -> None:
    app = make()

    def work() -> None:
        read()
        session.connection().invalidate()
        session.rollback()
        read()

    record, _ = ask(app, work)
    first, second = record.holds
    assert 0 < first.end < second.begin
    assert first.connection != second.connection


def test_wait_for_the_pool_is_noted(server_url: str) -> None:
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": PATIENCE}
    app = SQLASessionMiddleware(answer, server_url, engine_options=options, server_timing=True)
    taken = app.engine.connect()
    begun = threading.Event()

    def give_back() -> None:
        assert begun.wait(PATIENCE)
        time.sleep(0.05)  # What is measured is at least this.
        taken.close()

    thread = threading.Thread(target=give_back)
    thread.start()
    record, response = ask(app, lambda: (begun.set(), session.execute(text("SELECT 1"))))
    thread.join()
    assert record.waited >= 0.05
    assert float(re.search(r"db-wait;dur=([\d.]+)", response.headers["Server-Timing"])[1]) >= 50  # type: ignore[index]
    app.dispose()


def test_breaker_opens_although_waits_are_timed() -> None:
    url = f"postgresql+psycopg://127.0.0.1:{free_port()}/nothing"
    app = SQLASessionMiddleware(answer, url, unavailable={"breaker_failures": 1}, server_timing=True)
    _, response = ask(app, read)
    assert response.status_code == 503
    assert breaker_state(app.engine) == "open"
    app.dispose()


class Outcome(Exception):  # noqa: N818  # no error
    """Ends a request."""


def fail() -> None:
    write()
    raise Outcome


def twice(attempts: list[int]) -> None:
    attempts.append(1)
    write()
    if len(attempts) == 1:
        raise StaleDataError


OUTCOMES: dict[str, tuple[Callable[[], object], dict[str, Any], str]] = {
    "nothing": (lambda: None, {}, "no transaction"),
    "read": (read, {}, "only read"),
    "read, committed": (read, {"transaction": True}, "committed"),
    "write": (write, {}, "rolled back"),
    "own commit": (lambda: (write(), session.commit()), {}, "committed"),
    "commit": (write, {"transaction": True}, "committed"),
    "doomed": (lambda: (write(), doom()), {"transaction": True}, "doomed"),
    "fails": (fail, {"transaction": True}, "rolled back"),
}


@pytest.mark.parametrize("case", OUTCOMES)
def test_outcome_of_the_transaction_is_told(make: Any, case: str) -> None:
    work, options, outcome = OUTCOMES[case]
    app = make(**options)
    record = Record()
    try:
        Client(app).get("/", buffered=True, environ_overrides={RECORD: record, "work": work})
    except Outcome:
        pass
    assert record.outcome == outcome


def test_outcome_is_vetoed(make: Any) -> None:
    app = make(transaction=True)
    record, _ = ask(app, write, status="404 Not Found")
    assert record.outcome == "vetoed"


LOST = {"postgresql": ("server closed the connection unexpectedly",), "mariadb": (2013, "Lost connection")}


@pytest.mark.parametrize(("work", "outcome"), [(write, "outcome unknown"), (read, "only read")])
def test_outcome_is_unknown_of_what_may_have_written(server_url: str, work: Callable[[], object], outcome: str) -> None:
    if work is read and "postgresql" not in server_url:
        outcome = "outcome unknown"  # A SELECT may call any function there.
    # Recorded after its dialect fails, so that the failure is timed.
    engine = create_engine(server_url)
    Base.metadata.create_all(engine)
    driver_error = engine.dialect.loaded_dbapi.OperationalError

    def do_commit(driver_connection: Any) -> None:
        raise driver_error(*LOST[engine.dialect.name])

    commit, engine.dialect.do_commit = engine.dialect.do_commit, do_commit  # type: ignore[method-assign]
    app = SQLASessionMiddleware(answer, engine, transaction=True, unavailable=True, server_timing=True)
    record, response = ask(app, work)
    engine.dialect.do_commit = commit  # type: ignore[method-assign]
    Base.metadata.drop_all(engine)
    engine.dispose()
    assert (response.status_code, record.outcome) == (500 if outcome == "outcome unknown" else 503, outcome)


def test_attempts_are_told_apart(make: Any) -> None:
    app = make(transaction={"attempts": 3, "backoff_base": 0})
    attempts: list[int] = []
    record, response = ask(app, lambda: twice(attempts))
    assert [each.attempt for each in record.statements] == [1, 2]
    assert [each.attempt for each in record.holds] == [1, 2]
    assert record.outcome == "committed"
    assert [each.kind for each in record.ends if each.attempt == 1] == ["rollback"] * sum(
        each.attempt == 1 for each in record.ends
    )
    assert 'attempt;desc="2"' in response.headers["Server-Timing"]


def test_engines_have_their_names(make: Any, sqlite_url: str) -> None:
    app = make(binds={"audit": sqlite_url}, replicas=[f"{sqlite_url}2"])

    def work() -> None:
        session.execute(text("SELECT 1"))
        session.execute(text("SELECT 1"), bind_arguments={"bind_key": "audit"})

    record, _ = ask(app, work)
    assert [each.engine for each in record.statements] == ["replicas[0]", "audit"]


def test_applications_inside_of_a_request_share_its_record(make: Any) -> None:
    app, inner = make(), make()

    def work() -> None:
        with inner.context():
            read()
        assert Client(inner).get("/", buffered=True, environ_overrides={"work": read}).status_code == 200

    record, _ = ask(app, work)
    assert record.count == 1  # The inner request has one of its own.
    both = Record()
    Client(app).get(
        "/",
        buffered=True,
        environ_overrides={RECORD: both, "work": lambda: ask_with(inner, both)},
    )
    assert both.count == 1


def ask_with(app: SQLASessionMiddleware, record: Record) -> None:
    Client(app).get("/", buffered=True, environ_overrides={RECORD: record, "work": read})


def test_record_has_no_more_than_so_many_of_each(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "AT_MOST", 3)
    app = make()

    def work() -> None:
        for _ in range(10):
            write()
            session.commit()

    record, response = ask(app, work)
    assert (record.count, len(record.statements)) == (10, 3)
    assert len(record.holds) == len(record.waits) == len(record.ends) == 3
    assert 'desc="10 queries"' in response.headers["Server-Timing"]
    assert record.outcome == "committed"


# -- fetching


def busy(*values: Any) -> int:
    """A function of SQLite's that takes five milliseconds."""
    time.sleep(0.005)
    return 1


@pytest.fixture
def slow_rows(sqlite_url: str) -> Iterator[SQLASessionMiddleware]:
    """An application whose database looks for each row when it is fetched."""
    engine = create_engine(sqlite_url)
    event.listen(engine, "connect", lambda connection, _: connection.create_function("busy", 1, busy))
    yield SQLASessionMiddleware(answer, engine, server_timing=True)
    engine.dispose()


ROWS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 9) SELECT i, busy(i) AS b FROM n"
NUMBERS = list(range(1, 10))
WAYS: dict[str, Callable[[], list[int]]] = {
    "all": lambda: [each.i for each in session.execute(text(ROWS)).all()],
    "one by one": lambda: [each.i for each in session.execute(text(ROWS))],
    "by parts": lambda: [each.i for part in session.execute(text(ROWS)).partitions(2) for each in part],
    "by the driver's parts": lambda: (
        [each.i for each in session.connection().execute(text(ROWS)).fetchmany()] + NUMBERS[1:]
    ),
    "yield_per": lambda: [each.i for each in session.execute(text(ROWS)).yield_per(4)],
    "yield_per, one by one": lambda: one_by_one(session.execute(text(ROWS)).yield_per(4)),
    "yield_per, all": lambda: [each.i for each in session.execute(text(ROWS)).yield_per(4).all()],
    "selected": lambda: list(session.scalars(select(column("i")).select_from(text(f"({ROWS})")).where(text("b = 1")))),
    "streamed": lambda: list(
        session.scalars(
            select(column("i")).select_from(text(f"({ROWS})")).where(text("b = 1")),
            execution_options={"stream_results": True, "max_row_buffer": 3},
        )
    ),
}


def one_by_one(result: Any) -> list[int]:
    found = []
    while (row := result.fetchone()) is not None:
        found.append(row.i)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_fetching_is_timed_apart(slow_rows: SQLASessionMiddleware, way: str) -> None:
    found: list[list[int]] = []
    record, response = ask(slow_rows, lambda: found.append(WAYS[way]()))
    assert found == [NUMBERS]
    (statement,) = record.statements
    least = 0.005 if "driver" in way else 0.04  # The first row comes with the statement, or is the only one.
    assert statement.fetched == record.fetched >= (0 if "driver" in way else least)
    told = float(re.search(r"db;dur=([\d.]+)", response.headers["Server-Timing"])[1])  # type: ignore[index]
    assert told == pytest.approx((record.seconds + record.fetched) * 1000, abs=0.06)


def test_failure_while_rows_are_fetched_is_noted(sqlite_engine: Any) -> None:
    app = SQLASessionMiddleware(answer, sqlite_engine, server_timing=True)
    failing = "SELECT 1 UNION ALL SELECT abs(-9223372036854775808)"

    def work() -> None:
        for options in ({}, {"yield_per": 1}):
            with pytest.raises(DBAPIError):
                session.execute(text(failing), execution_options=options).all()
            with pytest.raises(DBAPIError):
                session.execute(select(text("*")).select_from(text(f"({failing})")), execution_options=options).all()

    record, _ = ask(app, work)
    assert [type(each.error).__name__ for each in record.statements] == ["OperationalError"] * 4
    assert record.seconds == pytest.approx(sum(each.seconds for each in record.statements))


@pytest.mark.parametrize("size", [2, 100])
def test_rows_of_a_server_side_cursor_are_timed(make: Any, server_url: str, size: int) -> None:
    app = SQLASessionMiddleware(answer, server_url, metadata=Base.metadata, server_timing=True)
    app.init_database()
    found: list[int] = []

    def work() -> None:
        session.execute(insert(Item), [{"id": each} for each in NUMBERS])
        found.extend(session.scalars(select(Item.id).order_by(Item.id), execution_options={"yield_per": size}))

    record, _ = ask(app, work)
    assert found == NUMBERS
    assert record.statements[-1].fetched > 0
    app.drop_database()
    app.dispose()


def test_failure_and_early_end_of_a_server_side_cursor_are_noted() -> None:
    app = SQLASessionMiddleware(answer, DATABASES_SEEN.url("postgresql", ""), server_timing=True)
    options = {"yield_per": 2}

    def work() -> None:
        rows = session.execute(text("SELECT 1 / (7 - i) FROM generate_series(1, 9) AS i"), execution_options=options)
        with pytest.raises(DBAPIError):
            rows.all()
        session.rollback()
        few = session.execute(text("SELECT i FROM generate_series(1, 9) AS i"), execution_options=options)
        assert next(few) == (1,)
        few.close()

    record, _ = ask(app, work)
    assert [each.error is not None for each in record.statements] == [True, False]
    app.dispose()


def test_pings_are_trips(server_url: str) -> None:
    counts = []
    for ping in (False, True):
        app = SQLASessionMiddleware(answer, server_url, engine_options={"pool_pre_ping": ping}, server_timing=True)
        for _ in range(3):
            record, _ = ask(app, lambda: session.execute(text("SELECT 1")))
        counts.append(record.trips)
        app.dispose()
    assert counts[1] == counts[0] + 1


def test_stack_of_few_calls_is_taken() -> None:
    taken: list[Any] = []
    done = threading.Event()
    _thread.start_new_thread(lambda: (taken.append(take_statement_stack()), done.set()), ())
    assert done.wait(PATIENCE)
    assert [code.co_filename for code, _ in taken[0]] == [__file__]


def test_time_of_fetching_is_in_the_log(slow_rows: SQLASessionMiddleware, caplog: pytest.LogCaptureFixture) -> None:
    app = SQLASessionMiddleware(answer, slow_rows.engine, slow_requests={"seconds": 0})
    ask(app, lambda: session.execute(text(ROWS)).all())
    (logged,) = caplog.records
    assert logged.slow.fetch_seconds >= 0.04  # type: ignore[attr-defined]
    assert re.search(r"1 queries took 0\.0\d\d s, fetching their rows 0\.[0-9]+ s", logged.getMessage())


# -- Server-Timing


def metrics(response: Any) -> dict[str, str]:
    return dict(each.split(";", 1) for each in response.headers["Server-Timing"].split(", "))


@pytest.mark.parametrize("transaction", [False, True])
def test_response_tells_what_the_database_took(make: Any, transaction: bool) -> None:
    app = make(transaction=transaction)
    record, response = ask(app, lambda: (read(), write(), *(() if transaction else (session.commit(),))))
    told = metrics(response)
    assert list(told) == ["db", "db-wait", "db-commit"]
    assert told["db"] == f'dur={(record.seconds + record.fetched) * 1000:.1f};desc="2 queries"'
    assert told["db-commit"] == f"dur={record.committing * 1000:.1f}"
    assert len(response.headers["Server-Timing"]) < 300


def test_response_tells_that_nothing_was_sent(make: Any) -> None:
    _, response = ask(make(), lambda: None)
    assert response.headers["Server-Timing"] == 'db;dur=0.0;desc="0 queries"'


def test_header_is_added_to_that_of_the_application(make: Any) -> None:
    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        start_response("200 OK", [("Server-Timing", "view;dur=3")])
        return [b"done"]

    response = Client(make(app)).get("/", buffered=True)
    assert response.headers.getlist("Server-Timing") == ["view;dur=3", 'db;dur=0.0;desc="0 queries"']


def test_header_of_an_error_page_replaces_the_first_one(make: Any) -> None:
    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        start_response("200 OK", [])
        try:
            raise Outcome
        except Outcome as error:
            start_response("500 Oh", [], (type(error), error, None))
        return [b"done"]

    heads: list[tuple[str, list[str]]] = []

    def note(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], None]:
        heads.append((status, [name for name, _ in headers]))
        return lambda data: None

    consume(make(app)(environ(), note))
    consume(make(app, transaction=True)(environ(), note))
    assert heads == [(status, ["Server-Timing"]) for status in ("200 OK", "500 Oh", "500 Oh")]


def says_yes(environ: Environ) -> bool:
    return "yes" in environ["QUERY_STRING"]


@pytest.mark.parametrize("decides", [says_yes, f"{__name__}:says_yes"])
def test_callable_decides_whether_to_tell(make: Any, decides: Any) -> None:
    app = make(server_timing=decides)
    for query, told in (("yes", True), ("no", False)):
        _, response = ask(app, read, QUERY_STRING=query)
        assert ("Server-Timing" in response.headers) is told


def test_ini_switches_them_on() -> None:
    for value, told in (("true", True), ("false", False), (f"{__name__}:says_yes", True)):
        config = {"sqlalchemy.url": "sqlite://", "server_timing": value, "slow_requests.queries": "3"}
        app = SQLASessionMiddleware.from_config(answer, config)
        _, response = ask(app, lambda: None, QUERY_STRING="yes")
        assert ("Server-Timing" in response.headers) is told
        assert (app.slow_requests.queries, app.slow_requests.seconds) == (3, 1.0)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"server_timing": 3}, "server_timing must be callable"),
        ({"slow_requests": {"second": 1}}, r"slow_requests\['second'\] is not an option; did you mean 'seconds'"),
        ({"slow_requests": {"seconds": -1}}, r"slow_requests\['seconds'\] must be a number of seconds from 0"),
        ({"slow_requests": {"queries": 0}}, r"slow_requests\['queries'\] must be a whole number from 1"),
        ({"slow_requests": True}, "slow_requests must be a dict of options, got True"),
    ],
)
def test_error_names_the_option(options: Any, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        SQLASessionMiddleware(answer, "sqlite://", **options)


# -- slow requests


@pytest.mark.parametrize(
    ("slow", "is_logged"),
    [
        ({"seconds": 0}, True),
        ({"seconds": 60}, False),
        ({"seconds": 60, "queries": 1}, True),
        ({"seconds": 60, "queries": 2}, False),
    ],
)
def test_slow_request_is_logged_once(make: Any, caplog: pytest.LogCaptureFixture, slow: Any, is_logged: bool) -> None:
    app = make(slow_requests=slow, server_timing=False, transaction=True, report_leaks=True)
    with app.context():
        read()
        write()
        read()
    ask(app, lambda: (read(), write()), PATH_INFO="/slow")
    logged = [each for each in caplog.records if each.name == "sqlasession_middleware.slow_requests"]
    assert len(logged) == is_logged
    for record in logged:
        assert record.levelno == logging.WARNING
        said = record.getMessage()
        assert said.startswith("Slow: GET '/': 200 OK after ")
        assert "2 queries took" in said
        assert "attempt 1, committed" in said
        assert f"INSERT INTO {Item.__tablename__}" in said
        assert f'File "{__file__}"' in said
        assert (record.slow.queries, record.slow.outcome, record.slow.status) == (2, "committed", "200 OK")  # type: ignore[attr-defined]
        assert (record.slow.trips > 2) is (app.engine.dialect.name != "sqlite")  # type: ignore[attr-defined]
        assert record.application is app  # type: ignore[attr-defined]


def test_slow_request_that_failed_is_logged(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    app = make(slow_requests={"seconds": 0})
    with pytest.raises(Outcome):
        ask(app, fail)
    (record,) = caplog.records
    assert "no response after" in record.getMessage()
    assert "rolled back" in record.getMessage()


def test_slow_request_is_logged_once_over_all_attempts(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    app = make(slow_requests={"seconds": 0}, transaction={"attempts": 3, "backoff_base": 0})
    attempts: list[int] = []
    ask(app, lambda: twice(attempts))
    (record,) = [each for each in caplog.records if each.name == "sqlasession_middleware.slow_requests"]
    assert "attempt 2, committed" in record.getMessage()


def test_engines_with_one_dialect_are_timed_once(make: Any) -> None:
    app = make(transaction=True)
    engine = app.engine.execution_options(logging_token="other")  # no password
    other = SQLASessionMiddleware(answer, engine, transaction=True, server_timing=True)
    record, _ = ask(other, write)
    assert len(record.statements) == len(record.holds) == 1
    assert [each.kind for each in record.ends][:1] == ["commit"]
    assert record.outcome == "committed"


def test_stack_of_a_thread_with_few_calls_is_taken() -> None:
    taken: list[Any] = []
    thread = threading.Thread(target=lambda: taken.append(take_statement_stack()))
    thread.start()
    thread.join()
    assert len(taken[0]) >= 1
