"""``deadline``: when it begins and ends, and what the application and the client get."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import copy_context
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Engine, NullPool, Pool, create_engine, event, literal, text
from sqlalchemy import select as select_core
from sqlalchemy.exc import DBAPIError

from sqlasession_middleware import SQLASessionMiddleware, release, remaining, session
from sqlasession_middleware._database import deadlines, watchdog
from sqlasession_middleware._drivers.answers import port_of
from sqlasession_middleware._drivers.registry import driver_of
from sqlasession_middleware.errors import ConfigurationError, DeadlineError
from sqlasession_middleware.failures import Failure, classify

from .conftest import DATABASES_SEEN
from .drivers import Row, rows_on
from .wsgi import Environ, StartResponse, consume, environ, start_response

pytestmark = pytest.mark.usefixtures("disposes")

PLAIN = [("Content-Type", "text/plain")]
SERVERS = rows_on("postgresql", "mariadb")
SLEEP = {"postgresql": "SELECT pg_sleep(%s)", "mariadb": "SELECT sleep(%s)"}


def answering(work: Callable[[], object], headers: Any = PLAIN) -> Any:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        work()
        start("200 OK", headers)
        return [b"done"]

    return app


def work_until(passed: float | None) -> None:
    """The application works with no database until a deadline has passed."""
    assert passed is not None
    end = time.monotonic() + passed
    while time.monotonic() <= end:
        time.sleep(0.01)


def select() -> Any:
    return session.scalar(text("SELECT 1"))


class Asked:
    """What an engine sends."""

    def __init__(self, engine: Engine) -> None:
        self.statements: list[str] = []
        event.listen(engine, "before_cursor_execute", lambda *given: self.statements.append(given[2]))


# -- the option


@pytest.mark.parametrize("wrong", [0, -1, "soon", True, float("nan"), float("inf"), [1]])
def test_wrong_deadline_is_an_error_that_names_it(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^deadline must be "):
        SQLASessionMiddleware(lambda environ, start: [], "sqlite://", deadline=wrong)


@pytest.mark.parametrize("wrong", [0, "soon"])
def test_wrong_deadline_of_a_context_or_a_callable_is_an_error(wrong: Any) -> None:
    app = SQLASessionMiddleware(answering(select), "sqlite://", deadline=lambda environ: wrong)
    with pytest.raises(ConfigurationError, match=r"^deadline must be "):
        app.context(deadline=wrong)
    with pytest.raises(ConfigurationError, match=r"^deadline must be "):
        app(environ(), start_response)


def seconds_of(environ: Environ) -> float | None:
    return {"/long": 60.0, "/none": None}.get(environ["PATH_INFO"], 5.0)


@pytest.mark.parametrize("deadline", [seconds_of, f"{__name__}:seconds_of"])
@pytest.mark.parametrize(("path", "expected"), [("/", 5), ("/long", 60), ("/none", None)])
def test_deadline_may_depend_on_the_request(deadline: Any, path: str, expected: float | None) -> None:
    seen: list[float | None] = []
    app = SQLASessionMiddleware(answering(lambda: seen.append(remaining())), "sqlite://", deadline=deadline)
    consume(app(environ(PATH_INFO=path), start_response))
    (left,) = seen
    assert left == expected if left is None or expected is None else expected - 2 < left <= expected


@pytest.mark.parametrize(("value", "expected"), [("2.5", 2.5), ("none", None), (f"{__name__}:seconds_of", 5.0)])
def test_ini_has_a_key(value: str, expected: float | None) -> None:
    seen: list[float | None] = []
    config = {"sqlalchemy.url": "sqlite://", "deadline": value}
    app = SQLASessionMiddleware.from_config(answering(lambda: seen.append(remaining())), config)
    consume(app(environ(), start_response))
    assert (seen[0] is None) == (expected is None)
    assert expected is None or expected - 2 < (seen[0] or 0) <= expected


def test_nothing_is_left_outside_of_requests_or_without_the_option() -> None:
    seen: list[float | None] = [remaining()]
    app = SQLASessionMiddleware(answering(lambda: seen.append(remaining())), "sqlite://")
    consume(app(environ(), start_response))
    with app.context():
        seen.append(remaining())
    assert seen == [None, None, None]


def test_shortest_deadline_of_what_is_around_counts() -> None:
    app = SQLASessionMiddleware(lambda environ, start: [], "sqlite://", deadline=1)
    with app.context(deadline=50), app.context(deadline=60):
        assert 40 < (remaining() or 0) <= 50
        with app.context(deadline=10), app.context():
            assert 5 < (remaining() or 0) <= 10
        assert 40 < (remaining() or 0) <= 50
    assert remaining() is None


# -- after the deadline


DEADLINE = 0.15


def test_nothing_is_sent_after_the_deadline(sqlite_or_server: str) -> None:
    app = SQLASessionMiddleware(lambda environ, start: [], sqlite_or_server)
    with app.context() as warm:
        warm.execute(text("SELECT 1"))
    with app.context(deadline=DEADLINE) as opened:
        opened.execute(text("SELECT 1"))
        asked = Asked(app.engine)
        work_until(DEADLINE)
        with pytest.raises(DeadlineError, match=r"the deadline of 0.15 s has passed: nothing is sent to the database"):
            opened.execute(text("SELECT 2"))
        opened.rollback()
        with pytest.raises(DeadlineError):
            opened.execute(text("SELECT 3"))
    assert asked.statements == []
    assert app.engine.pool.checkedout() == 0
    with app.context() as opened:
        assert opened.scalar(text("SELECT 4")) == 4
    app.dispose()


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def sqlite_or_server(request: pytest.FixtureRequest, sqlite_url: str) -> str:
    return DATABASES_SEEN.url(request.param, sqlite_url)


@pytest.fixture
def table(sqlite_or_server: str) -> Iterator[str]:
    name = f"deadline_{uuid4().hex[:12]}"
    engine = create_engine(sqlite_or_server, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text(f"CREATE TABLE {name} (n integer)"))
    yield name
    with engine.begin() as connection:
        connection.execute(text(f"DROP TABLE {name}"))


@pytest.mark.parametrize("transaction", [False, True, {"attempts": 3}], ids=["plain", "transaction", "attempts"])
def test_commit_that_was_not_sent_stores_nothing_and_is_a_503(
    sqlite_or_server: str, table: str, transaction: Any
) -> None:
    attempts: list[int] = []

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        attempts.append(1)
        session.execute(text(f"INSERT INTO {table} VALUES (1)"))
        work_until(remaining())
        if not transaction:
            session.commit()
        start("200 OK", PLAIN)
        return [b"done"]

    wrapped = SQLASessionMiddleware(app, sqlite_or_server, transaction=transaction, unavailable=True, deadline=DEADLINE)
    seen: list[str] = []
    consume(wrapped(environ(), lambda status, headers, *more: seen.append(status)))  # type: ignore[arg-type, return-value]
    assert (seen, attempts) == (["503 Service Unavailable"], [1])
    assert wrapped.engine.pool.checkedout() == 0
    with wrapped.context() as opened:
        assert opened.scalar(text(f"SELECT count(*) FROM {table}")) == 0
    wrapped.dispose()


def test_slow_page_after_a_read_is_answered_and_keeps_its_connection() -> None:
    """It has waited for nothing when the deadline passed."""
    made: list[int] = []
    app = SQLASessionMiddleware(lambda environ, start: [], DATABASES_SEEN.url("postgresql", ""))
    event.listen(app.engine, "connect", lambda *given: made.append(1))
    for _ in range(2):
        with app.context(deadline=1) as opened:
            assert opened.scalar(text("SELECT 1")) == 1
            work_until(1.3)
    assert len(made) == 1
    app.dispose()


@pytest.mark.parametrize("transaction", [False, True], ids=["plain", "transaction"])
@pytest.mark.parametrize("row", SERVERS)
def test_slow_page_is_answered(row: Row, transaction: bool) -> None:
    """Nothing of it is lost. Where nobody knows that, there is a 503 instead of a COMMIT."""
    statement = select_core(literal(1))

    def work() -> None:
        assert session.scalar(statement) == 1
        work_until(0.5)

    app = SQLASessionMiddleware(answering(work), row.url(), deadline=0.4, transaction=transaction, unavailable=True)
    with app.context() as warm:
        warm.execute(statement)
        warm.execute(statement)
    seen: list[str] = []
    consume(app(environ(), lambda status, headers, *more: seen.append(status)))  # type: ignore[arg-type, return-value]
    assert seen == ["503 Service Unavailable" if transaction and row.module != "psycopg" else "200 OK"]
    assert app.engine.pool.checkedout() == 0
    app.dispose()


def test_work_that_a_request_has_left_behind_has_no_deadline() -> None:
    """A thread in a copy of the request's context, with a context of the application of its own."""
    app: Any = None
    found: list[Any] = []
    may_go_on = threading.Event()

    def later() -> None:
        may_go_on.wait(10)
        with app.context() as opened:
            found.append(opened.scalar(text("SELECT 1")))

    threads: list[threading.Thread] = []

    def work() -> None:
        session.execute(text("SELECT 1"))
        threads.append(threading.Thread(target=copy_context().run, args=(later,)))
        threads[0].start()

    app = SQLASessionMiddleware(answering(work), "sqlite://", deadline=DEADLINE)
    consume(app(environ(), start_response))
    work_until(DEADLINE)
    may_go_on.set()
    threads[0].join()
    assert found == [1]


def test_cursor_of_the_driver_is_not_waited_for_after_the_deadline() -> None:
    """The library does not see what it sends."""
    app = SQLASessionMiddleware(lambda environ, start: [], DATABASES_SEEN.url("postgresql", ""))
    with app.context(deadline=DEADLINE) as opened:
        cursor: Any = opened.connection().connection.cursor()
        work_until(DEADLINE)
        begun = time.monotonic()
        with pytest.raises(Exception, match=r"cancel|lost|closed"):
            cursor.execute("SELECT pg_sleep(10)")
        assert time.monotonic() - begun < 1
    app.dispose()


def sleep_long(opened: Any, row: Row) -> None:
    opened.execute(text(SLEEP[row.server] % 10))
    opened.execute(text("SELECT 1"))  # MariaDB's sleep() only returns earlier when it is interrupted.


@pytest.mark.parametrize("row", SERVERS)
@pytest.mark.parametrize("handles", [True, False], ids=["caught", "not caught"])
def test_long_query_is_ended_and_its_connection_is_not_used_again(row: Row, handles: bool) -> None:
    """A request to cancel may reach the server late, when somebody else has the connection."""
    closed: list[int] = []
    app = SQLASessionMiddleware(lambda environ, start: [], row.url())
    event.listen(app.engine, "close", lambda *given: closed.append(1))
    with app.context(deadline=0.3) as opened:
        begun = time.monotonic()
        with pytest.raises(DeadlineError) as caught:
            sleep_long(opened, row)
        assert time.monotonic() - begun < 0.8
        if handles:
            opened.rollback()
    assert classify(caught.value) is Failure.UNAVAILABLE
    assert (closed, app.engine.pool.checkedout()) == ([1], 0)
    app.dispose()


def test_query_of_psycopg_is_cancelled_by_another_connection_if_it_cannot_do_so_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With libpq before version 17, its own request may keep all of Python waiting."""
    psycopg = pytest.importorskip("psycopg")
    monkeypatch.setattr(psycopg.capabilities, "has_cancel_safe", lambda: False)
    app = SQLASessionMiddleware(lambda environ, start: [], DATABASES_SEEN.url("postgresql", ""))
    with app.context(deadline=0.3) as opened:
        with pytest.raises(DeadlineError):
            opened.execute(text("SELECT pg_sleep(10)"))
        opened.rollback()
    app.dispose()


@pytest.mark.parametrize("row", SERVERS)
def test_connection_that_does_not_wait_is_not_cut(row: Row) -> None:
    engine = create_engine(row.url())
    driver = driver_of(engine)
    with engine.connect() as connection:
        driver_connection = connection.connection.dbapi_connection
        if driver.is_waiting(driver_connection):
            return  # Nobody knows that of this one.
        driver.cut(driver_connection)
        assert connection.scalar(text("SELECT 1")) == 1
    engine.dispose()


def test_error_without_a_connection_says_nothing_of_silence() -> None:
    context: Any = SimpleNamespace(connection=None)
    assert deadlines._is_silent(context) is False


def test_connection_without_a_number_is_not_cancelled() -> None:
    def connect() -> None:
        raise AssertionError

    driver_of(create_engine("mariadb+pymysql://")).cancel(object(), connect)
    assert port_of(None) == ""


def test_wait_for_a_lock_of_sqlite_ends_by_the_deadline(tmp_path: Any) -> None:
    """Its own timeout is five seconds, and is what it was before for those who have no deadline."""
    app = SQLASessionMiddleware(lambda environ, start: [], f"sqlite:///{tmp_path}/file")
    holder = create_engine(app.engine.url)
    with holder.connect() as connection:
        connection.execute(text("CREATE TABLE locked (n integer)"))
        connection.execute(text("INSERT INTO locked VALUES (1)"))
        with app.context(deadline=0.3) as opened:
            begun = time.monotonic()
            with pytest.raises((DeadlineError, DBAPIError)):
                opened.execute(text("CREATE TABLE other (n integer)"))
            assert time.monotonic() - begun < 1
        with app.context() as opened:
            assert opened.scalar(text("PRAGMA busy_timeout")) == 5000
    app.dispose()
    holder.dispose()


@pytest.mark.parametrize("number", [1, 2])
def test_attempt_that_could_not_finish_is_not_begun(number: int) -> None:
    attempts: list[int] = []

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        attempts.append(1)
        session.execute(text("SELECT 1"))
        if len(attempts) == number:
            work_until(remaining())
        raise DeadlockError

    wrapped = SQLASessionMiddleware(
        app, "sqlite://", transaction={"attempts": 5, "backoff_base": 0, "retry_on": DeadlockError}, deadline=DEADLINE
    )
    with pytest.raises(DeadlockError):
        wrapped(environ(), start_response)
    assert len(attempts) == number


class DeadlockError(Exception):
    """A transient error of the application's own."""


def test_wait_before_an_attempt_leaves_time_for_it() -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        if environ["sqlasession.attempt"] == 1:
            raise DeadlockError
        start("200 OK", PLAIN)
        return [str((remaining() or 0) > 0).encode()]

    options = {"attempts": 2, "backoff_base": 50.0, "backoff_cap": 50.0, "retry_on": DeadlockError}
    wrapped = SQLASessionMiddleware(app, "sqlite://", transaction=options, deadline=1)
    assert consume(wrapped(environ(), start_response)) == b"True"


# -- streams and websockets


@pytest.mark.parametrize("transaction", [False, True], ids=["plain", "transaction"])
def test_stream_of_events_has_a_deadline_for_each(transaction: bool) -> None:
    def app(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        start("200 OK", [("Content-Type", "text/event-stream")])
        for _ in range(3):
            work_until(2 * DEADLINE)  # It waits for something to tell.
            yield f"data: {session.scalar(text('SELECT 1'))}\n\n".encode()
            release()

    wrapped = SQLASessionMiddleware(
        app, DATABASES_SEEN.url("postgresql", ""), transaction=transaction, deadline=DEADLINE
    )
    asked = environ(HTTP_ACCEPT="text/event-stream" if transaction else "*/*")
    assert consume(wrapped(asked, start_response)) == b"data: 1\n\n" * 3
    assert wrapped.engine.pool.checkedout() == 0
    wrapped.dispose()


def test_event_that_takes_too_long_is_ended() -> None:
    def app(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        start("200 OK", [("Content-Type", "text/event-stream")])
        yield f"data: {session.scalar(text('SELECT 1'))}\n\n".encode()
        session.execute(text("SELECT pg_sleep(10)"))

    wrapped = SQLASessionMiddleware(app, DATABASES_SEEN.url("postgresql", ""), deadline=DEADLINE)
    begun = time.monotonic()
    with pytest.raises(DeadlineError):
        consume(wrapped(environ(), start_response))
    assert time.monotonic() - begun < 1
    assert wrapped.engine.pool.checkedout() == 0
    wrapped.dispose()


def test_websocket_has_a_deadline_for_each_use() -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        for _ in range(3):
            work_until(2 * DEADLINE)
            assert session.scalar(text("SELECT 1")) == 1
            session.rollback()
        return []

    wrapped = SQLASessionMiddleware(app, "sqlite://", deadline=DEADLINE)
    given = environ(HTTP_UPGRADE="websocket", HTTP_CONNECTION="Upgrade")
    consume(wrapped(given, start_response))


# -- other engines, threads, processes


def test_application_inside_of_a_request_ends_by_its_deadline() -> None:
    inner = SQLASessionMiddleware(
        answering(lambda: session.execute(text("SELECT pg_sleep(10)"))), DATABASES_SEEN.url("postgresql", "")
    )
    outer = SQLASessionMiddleware(inner, "sqlite://", deadline=DEADLINE)
    begun = time.monotonic()
    with pytest.raises(DeadlineError):
        outer(environ(), start_response)
    assert time.monotonic() - begun < 1
    inner.dispose()


@pytest.mark.parametrize("row", SERVERS)
def test_engine_that_was_given_ends_by_the_deadline(row: Row) -> None:
    engine = create_engine(row.url(), pool_pre_ping=True)
    app = SQLASessionMiddleware(lambda environ, start: [], engine, deadline=60)
    for _ in range(2):
        with app.context(deadline=0.3) as opened:
            begun = time.monotonic()
            with pytest.raises(DeadlineError):
                sleep_long(opened, row)
            assert time.monotonic() - begun < 1
    engine.dispose()


def test_deadline_of_one_request_does_not_end_another() -> None:
    """Connections of all requests are watched by one thread."""
    app = SQLASessionMiddleware(lambda environ, start: [], DATABASES_SEEN.url("postgresql", ""))
    ended: list[float] = []

    def work(seconds: float) -> None:
        begun = time.monotonic()
        with app.context(deadline=seconds) as opened:
            try:
                opened.execute(text("SELECT pg_sleep(0.8)"))
            except DeadlineError:
                ended.append(seconds)
            assert time.monotonic() - begun < max(seconds, 0.8) + 0.5

    seconds = [0.1, 5.0, 0.3, 5.0, 0.2]
    threads = [threading.Thread(target=work, args=(each,)) for each in seconds]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sorted(ended) == [0.1, 0.2, 0.3]
    app.dispose()


def test_child_watches_by_itself() -> None:
    """It has no thread of its parent, and nothing of what the parent has asked."""
    app = SQLASessionMiddleware(lambda environ, start: [], DATABASES_SEEN.url("postgresql", ""))

    def is_ended() -> bool:
        begun = time.monotonic()
        with app.context(deadline=0.2) as opened, pytest.raises(DeadlineError):
            opened.execute(text("SELECT pg_sleep(10)"))
        return time.monotonic() - begun < 1

    assert is_ended()
    child = os.fork()
    if not child:  # pragma: no cover  # in the child
        os._exit(0 if is_ended() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert is_ended()
    app.dispose()


#: A greenlet waits for its database, and another one works meanwhile.
FAILED_STREAM = """
import gc, os, sys
from sqlalchemy import text
from sqlasession_middleware import SQLASessionMiddleware
from sqlasession_middleware.errors import DeadlineError

app = SQLASessionMiddleware.without_app({url!r})
streamed = text("SELECT seq, sleep(0.01) FROM seq_1_to_8000").execution_options(yield_per=5)
connections = []

def fail():
    try:
        with app.context(deadline=0.4) as session:
            connections.append(session.connection().connection.dbapi_connection)
            sum(1 for _ in session.execute(streamed))
    except DeadlineError:
        pass

gc.disable()
fail()
fail()
gc.collect()
# The cursor, the list, the variable of this loop, and the argument lead to it.
print([sys.getrefcount(each) >= 4 for each in connections], flush=True)
os._exit(0)  # Nothing is of use in a process whose references are wrong.
"""


def test_connection_of_a_failed_stream_is_released_once() -> None:
    """MariaDB Connector/Python releases it twice when the garbage collector takes its cursor."""
    pytest.importorskip("mariadb")
    (row,) = [each for each in (param.values[0] for param in SERVERS) if each.module == "mariadb"]
    script = FAILED_STREAM.format(url=row.url().render_as_string(hide_password=False))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "[True, True]\n"), done.stderr


GREENLETS = """
import gevent.monkey
gevent.monkey.patch_all()
import time
import gevent
from sqlalchemy import text
from sqlasession_middleware import SQLASessionMiddleware
from sqlasession_middleware.errors import DeadlineError

app = SQLASessionMiddleware(lambda environ, start: [], {url!r})
ticks = []

def tick():
    while True:
        ticks.append(1)
        gevent.sleep(0.01)

working = gevent.spawn(tick)
begun = time.monotonic()
with app.context(deadline=0.6) as session:
    session.execute(text("SELECT 1"))
    before = len(ticks)
    try:
        session.execute(text({statement!r}))
        session.execute(text("SELECT 1"))
    except DeadlineError:
        others = "working" if len(ticks) - before > 5 else "blocked"
        print("ended" if time.monotonic() - begun < 3 else "late", others)
app.dispose()
"""


@pytest.mark.parametrize("row", SERVERS)
def test_wait_of_a_greenlet_is_ended(row: Row) -> None:
    """Also by a driver that keeps all greenlets waiting."""
    pytest.importorskip("gevent.monkey")
    script = GREENLETS.format(url=row.url().render_as_string(hide_password=False), statement=SLEEP[row.server] % 10)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    blocks = row.module in ("psycopg2", "MySQLdb", "mariadb")
    assert done.stdout == f"ended {'blocked' if blocks else 'working'}\n", done.stderr


def test_nothing_is_watched_any_more_when_requests_have_ended() -> None:
    app = SQLASessionMiddleware(answering(select), DATABASES_SEEN.url("postgresql", ""), deadline=60)
    for _ in range(3):
        consume(app(environ(), start_response))
    assert not watchdog._watches
    app.dispose()


def test_application_without_deadlines_has_no_part_of_them(sqlite_or_server: str) -> None:
    """Off costs nothing: no listener, no other pool, no other scope."""
    plain = SQLASessionMiddleware(answering(select), sqlite_or_server)
    consume(plain(environ(), start_response))
    limited = SQLASessionMiddleware(answering(select), sqlite_or_server, deadline=60)
    consume(limited(environ(), start_response))

    def listeners(app: SQLASessionMiddleware) -> list[int]:
        pool, dialect, dispatch = app.engine.pool.dispatch, app.engine.dialect.dispatch, app.engine.dispatch
        found: list[Any] = [pool.checkout, pool.checkin, pool.connect, dialect.do_connect, dialect.handle_error]
        return [len(each) for each in (*found, dispatch.before_cursor_execute, dispatch.commit)]  # type: ignore[attr-defined]

    assert listeners(plain)[-2:] == [0, 0]
    assert all(less <= more for less, more in zip(listeners(plain), listeners(limited), strict=True))
    assert sum(listeners(limited)) - sum(listeners(plain)) >= 6
    assert type(plain.engine.pool) is not type(limited.engine.pool)
    assert isinstance(plain.engine.pool, Pool)
    plain.dispose()
    limited.dispose()


def test_connection_that_comes_too_late_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request has left it to the thread that makes it."""
    made, may_go_on = threading.Event(), threading.Event()
    closed: list[int] = []

    class Late:
        def close(self) -> None:
            closed.append(1)
            made.set()

    app = SQLASessionMiddleware(lambda environ, start: [], DATABASES_SEEN.url("postgresql", ""))
    engine = app.engine

    def connect(*arguments: Any, **options: Any) -> Late:
        may_go_on.wait(10)
        return Late()

    monkeypatch.setattr(engine.dialect, "connect", connect)
    with app.context(deadline=DEADLINE) as opened, pytest.raises(DeadlineError, match="no connection to the database"):
        opened.execute(text("SELECT 1"))
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    may_go_on.set()
    assert made.wait(10)
    assert closed == [1]
    gc.collect()


@pytest.mark.parametrize("makes", [True, False], ids=["makes a connection", "changes an argument"])
def test_application_may_connect_as_it_likes(makes: bool) -> None:
    """Such as with a token that is valid for a quarter of an hour."""
    app = SQLASessionMiddleware(answering(select), DATABASES_SEEN.url("postgresql", ""), deadline=60)
    names: list[Any] = []

    @event.listens_for(app.engine, "do_connect")
    def connect(dialect: Any, record: Any, arguments: Any, options: Any) -> Any:
        options["application_name"] = "of the listener"
        return dialect.connect(*arguments, **options) if makes else None

    event.listen(
        app.engine, "connect", lambda made, record: names.append(made.info.parameter_status("application_name"))
    )
    consume(app(environ(), start_response))
    assert names == ["of the listener"]
    app.dispose()


def test_replica_and_primary_share_what_is_left() -> None:
    url = DATABASES_SEEN.url("postgresql", "")
    app = SQLASessionMiddleware(answering(select), url, replicas=[url], deadline=60)
    assert consume(app(environ(), start_response)) == b"done"
    app.dispose()


def test_error_of_connecting_is_as_without_a_deadline() -> None:
    url = DATABASES_SEEN.url("postgresql", "")
    errors = []
    for deadline in (None, 5):
        app = SQLASessionMiddleware(lambda environ, start: [], create_engine(url).url.set(port=1))
        with app.context(deadline=deadline) as opened, pytest.raises(DBAPIError) as caught:
            opened.execute(text("SELECT 1"))
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


def test_full_pool_is_an_error_that_names_the_deadline() -> None:
    app = SQLASessionMiddleware(
        lambda environ, start: [],
        DATABASES_SEEN.url("postgresql", ""),
        engine_options={"pool_size": 1, "max_overflow": 0},
    )
    with app.engine.connect():
        for _ in range(2):
            with (
                app.context(deadline=DEADLINE) as opened,
                pytest.raises(DeadlineError, match="no connection of the pool has become free"),
            ):
                opened.execute(text("SELECT 1"))
    app.dispose()
