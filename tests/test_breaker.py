"""Breakers: an engine that is out of reach is not waited for, and is found again (G20)."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import Engine, NullPool, create_engine, event, make_url, select, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import QueuePool

from sqlasession_middleware import SQLASessionMiddleware, _dependencies, application, session
from sqlasession_middleware._database import breaker as module
from sqlasession_middleware.errors import BreakerOpenError, ConfigurationError, DeadlineError
from sqlasession_middleware.failures import Failure, classify
from sqlasession_middleware.unavailable import breaker_state

from .databases import DATABASES_SEEN
from .integration.faulty_ways import silent_listener
from .ports import free_port
from .test_routing import break_engine, break_replica
from .test_unavailable import call as plain_call
from .test_unavailable import kill
from .wsgi import Environ, StartResponse

PLAIN = [("Content-Type", "text/plain")]
SECRET = "hunter2-s3cret"
DRIVERS = ["postgresql+psycopg", "postgresql+psycopg2", "mysql+pymysql"]
BUSY, OK = "503 Service Unavailable", "200 OK"


class Clock:
    """One that the tests set."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "now", made)
    return made


@pytest.fixture
def make() -> Iterator[Callable[..., SQLASessionMiddleware]]:
    made: list[SQLASessionMiddleware] = []

    def make(app: Any, bind: Any, **options: Any) -> SQLASessionMiddleware:
        made.append(SQLASessionMiddleware(app, bind, **{"unavailable": True, **options}))
        return made[-1]

    yield make
    for each in made:
        each.dispose()


def call(app: Any, **more: Any) -> str:
    return plain_call(app, **more, **{"wsgi.url_scheme": "http", "SERVER_NAME": "shop", "SERVER_PORT": "80"})[0]


def bare(environ: Environ, start: StartResponse) -> Iterable[bytes]:
    if environ["PATH_INFO"] == "/static":
        start(OK, PLAIN)
        return [b"static"]
    key = environ["PATH_INFO"].strip("/") or None
    session.execute(text("SELECT 1"), bind_arguments={"bind": application.engines[key]} if key else {})
    start(OK, PLAIN)
    return [b"done"]


def in_flask() -> Any:
    app = Flask("shop")

    @app.route("/")
    def index() -> str:
        return str(session.scalar(select(1)))

    @app.route("/static")
    def static_page() -> str:
        return "static"

    return app


def lines(caplog: pytest.LogCaptureFixture, beginning: str = "The database sqlite") -> list[str]:
    return [each.getMessage() for each in caplog.records if each.getMessage().startswith(beginning)]


def tracebacks(caplog: pytest.LogCaptureFixture) -> list[bool]:
    """Of the answers 503, whether each has one in the log."""
    return [bool(each.exc_info) for each in caplog.records if " is answered with 503: " in each.getMessage()]


@pytest.mark.parametrize("app", [bare, in_flask()], ids=["bare", "flask"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_refused_port_is_not_tried_again_until_it_is_time(
    make: Any, driver: str, app: Any, caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    wrapped = make(app, f"{driver}://shop:{SECRET}@127.0.0.1:{free_port()}/shop")
    tries: list[float] = []
    event.listen(wrapped.engine, "do_connect", lambda *more: tries.append(clock.seconds))
    assert [call(wrapped) for _ in range(10)] == [BUSY] * 10
    assert len(tries) == 3
    assert breaker_state(wrapped.engine) == "open"
    assert call(wrapped, PATH_INFO="/static") == OK
    with pytest.raises(BreakerOpenError) as raised:
        wrapped.engine.connect()
    assert classify(raised.value) is Failure.UNAVAILABLE
    clock.seconds += 5
    assert breaker_state(wrapped.engine) == "half open"
    assert [call(wrapped) for _ in range(10)] == [BUSY] * 10
    assert tries == [1000, 1000, 1000, 1005]
    assert wrapped.engine.pool.checkedout() == 0
    (opened,) = lines(caplog, "The database " + driver)
    assert " for 5 s, then one request tries it again: " in opened
    assert "127.0.0.1" in opened
    assert tracebacks(caplog) == [True] + 19 * [False]
    assert SECRET not in caplog.text + str(raised.value)


@pytest.mark.parametrize("driver", DRIVERS)
def test_silent_server_is_waited_for_by_the_first_requests_only(make: Any, driver: str) -> None:
    with silent_listener() as port:
        wrapped = make(bare, f"{driver}://shop@127.0.0.1:{port}/shop", deadline=0.3)
        for _ in range(3):
            assert call(wrapped) == BUSY
        begun = time.monotonic()
        assert [call(wrapped) for _ in range(20)] == [BUSY] * 20
        assert time.monotonic() - begun < 0.3 * 20 / 2
        assert breaker_state(wrapped.engine) == "open"


def test_server_that_is_back_is_found_by_the_request_that_tries(
    make: Any, database_url: str, caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    caplog.set_level("WARNING")
    wrapped = make(bare, database_url)
    for _ in range(2):
        broken = break_engine(wrapped.engine)
        assert [call(wrapped) for _ in range(5)] == [BUSY] * 5
        broken.clear()
        assert call(wrapped) == BUSY
        clock.seconds += 5
        assert [call(wrapped) for _ in range(5)] == [OK] * 5
        assert breaker_state(wrapped.engine) == "closed"
    said = [line.rpartition(" is ")[2] for line in lines(caplog, "The database ") if "answered with" not in line]
    assert [line == "reachable again" for line in said] == [False, True, False, True]
    assert tracebacks(caplog) == ([True] + 5 * [False]) * 2


def test_one_of_twenty_threads_tries(make: Any, sqlite_url: str, clock: Clock) -> None:
    wrapped = make(bare, sqlite_url)
    broken = break_engine(wrapped.engine)
    for _ in range(3):
        call(wrapped)
    broken.clear()
    tries: list[int] = []
    others_are_answered = threading.Event()

    def wait(*more: object) -> None:
        tries.append(threading.get_ident())
        assert others_are_answered.wait(30)

    event.listen(wrapped.engine, "do_connect", wait)
    clock.seconds += 5
    answers: list[str] = []

    def ask() -> None:
        answers.append(call(wrapped))
        if len(answers) >= 19:
            others_are_answered.set()

    with ThreadPoolExecutor(20) as threads:
        list(threads.map(lambda _: ask(), range(20)))
    assert answers == [BUSY] * 19 + [OK]
    assert len(tries) == 1
    assert breaker_state(wrapped.engine) == "closed"


def test_another_one_tries_when_the_first_does_not_end(sqlite_url: str, clock: Clock) -> None:
    found = module.Breaker(1, 5, lambda error: None, lambda: None)
    found.fail(OSError())
    assert (found.state, found.begin_try()) == ("open", False)
    clock.seconds += 5
    assert (found.state, found.begin_try(), found.begin_try(), found.state) == ("half open", True, False, "half open")
    clock.seconds += module.LONGEST_TRY
    assert found.begin_try()


def test_each_bind_fails_alone(make: Any, sqlite_url: str) -> None:
    wrapped = make(bare, sqlite_url, binds={"away": f"mysql+pymysql://shop@127.0.0.1:{free_port()}/shop"})
    assert [call(wrapped, PATH_INFO="/away") for _ in range(5)] == [BUSY] * 5
    assert call(wrapped) == OK
    assert {name: breaker_state(each) for name, each in wrapped.engines.items()} == {
        "default": "closed",
        "away": "open",
    }


def test_success_between_failures_keeps_it_closed(make: Any, sqlite_url: str) -> None:
    wrapped = make(bare, sqlite_url)
    broken = break_engine(wrapped.engine)
    for _ in range(4):
        broken.append(True)
        assert [call(wrapped) for _ in range(2)] == [BUSY] * 2
        broken.clear()
        assert call(wrapped) == OK
        wrapped.engine.dispose()
    assert breaker_state(wrapped.engine) == "closed"


def test_full_pool_and_lost_connections_are_no_failures_to_reach_it(make: Any, server_url: str) -> None:
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0}

    def killed(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/killed":
            kill(server_url)
        session.execute(text("SELECT 1"))
        return []

    wrapped = make(killed, server_url, engine_options=options)
    assert [call(wrapped, PATH_INFO="/killed") for _ in range(5)] == [BUSY] * 5
    with wrapped.engine.connect():
        assert [call(wrapped) for _ in range(5)] == [BUSY] * 5
    assert breaker_state(wrapped.engine) == "closed"


@pytest.mark.parametrize("spent", [False, True])
def test_deadline_that_passed_elsewhere_is_no_failure_to_reach_it(make: Any, server_url: str, spent: bool) -> None:
    """In a full pool, and in a request that has used up its time before it connects."""

    def late(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        if spent:
            time.sleep(0.1)
        return bare(environ, start)

    options = {"pool_size": 1, "max_overflow": 0}
    wrapped = make(late, server_url, engine_options=options, deadline=0.05)
    with wrapped.engine.connect():
        assert [call(wrapped) for _ in range(4)] == [BUSY] * 4
    wrapped.engine.dispose()
    if spent:
        assert [call(wrapped) for _ in range(4)] == [BUSY] * 4
    assert breaker_state(wrapped.engine) == "closed"


def test_slow_query_is_no_failure_to_reach_it(make: Any, server_url: str) -> None:
    def slow(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        session.execute(text("SELECT pg_sleep(10)" if "postgresql" in server_url else "SELECT sleep(10)"))
        return []

    wrapped = make(slow, server_url, deadline=0.3)
    assert [call(wrapped) for _ in range(4)] == [BUSY] * 4
    assert breaker_state(wrapped.engine) == "closed"


def test_connections_of_before_the_outage_are_replaced(make: Any, server_url: str, clock: Clock) -> None:
    number = "SELECT pg_backend_pid()" if "postgresql" in server_url else "SELECT connection_id()"
    wrapped = make(bare, server_url)
    assert call(wrapped) == OK
    with wrapped.engine.connect() as connection:
        before = connection.scalar(text(number))
        broken = break_engine_only(wrapped.engine)
        assert [call(wrapped) for _ in range(3)] == [BUSY] * 3
    broken.clear()
    clock.seconds += 5
    assert call(wrapped) == OK
    with wrapped.engine.connect() as connection:
        assert connection.scalar(text(number)) != before


def break_engine_only(engine: Engine) -> list[bool]:
    """The same, but the connections that there are stay."""
    dispose, engine.dispose = engine.dispose, lambda *more, **options: None  # type: ignore[method-assign]
    try:
        return break_engine(engine)
    finally:
        engine.dispose = dispose  # type: ignore[method-assign]


@pytest.mark.parametrize("poolclass", [QueuePool, NullPool])
def test_engine_that_is_given_has_one_as_well(make: Any, sqlite_url: str, clock: Clock, poolclass: Any) -> None:
    engine = create_engine(sqlite_url, poolclass=poolclass)
    wrapped = make(bare, engine)
    broken = break_engine(engine)
    assert [call(wrapped) for _ in range(3)] == [BUSY] * 3
    assert breaker_state(engine) == "open"
    engine.dispose()
    broken.clear()
    with pytest.raises(BreakerOpenError):
        engine.connect()
    clock.seconds += 5
    assert call(wrapped) == OK
    assert type(engine.pool).__name__ == poolclass.__name__
    engine.dispose()


def test_refused_login_is_the_answer_of_a_server(make: Any, sqlite_url: str, clock: Clock) -> None:
    wrapped = make(bare, sqlite_url)
    broken = break_engine(wrapped.engine)
    for _ in range(3):
        call(wrapped)
    broken.clear()

    def refuse(*more: object) -> None:
        error = type("OperationalError", (Exception,), {"__module__": "psycopg"})
        raise OperationalError("connect", {}, error("connection failed: FATAL:  password authentication failed"))

    event.listen(wrapped.engine, "do_connect", refuse)
    clock.seconds += 5
    with pytest.raises(DBAPIError):
        call(wrapped)
    assert breaker_state(wrapped.engine) in ("closed", "open")


@pytest.mark.parametrize("unavailable", [False, {"breaker_failures": 0}])
def test_nothing_is_there_without_the_option(make: Any, sqlite_url: str, unavailable: Any) -> None:
    wrapped = make(bare, sqlite_url, unavailable=unavailable)
    before = type(wrapped.engine.pool)
    assert call(wrapped) == OK
    assert type(wrapped.engine.pool) is before
    assert breaker_state(wrapped.engine) is None


def test_replica_has_the_breaker_that_passes_it_over(make: Any, sqlite_url: str, clock: Clock) -> None:
    wrapped = make(bare, sqlite_url, replicas=[sqlite_url], replica_retry=7)
    broken = break_replica(wrapped)
    replica = wrapped.engines["replicas[0]"]
    assert breaker_state(replica) == "closed"
    assert call(wrapped) == OK
    assert breaker_state(replica) == "open"
    broken.clear()
    clock.seconds += 7
    assert breaker_state(replica) == "half open"
    assert call(wrapped) == OK
    assert breaker_state(replica) == "closed"


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ({"breaker_failures": True}, "whole number of failures from 0, got True"),
        ({"breaker_failures": 1.5}, "whole number of failures from 0, got 1.5"),
        ({"breaker_seconds": -1}, "number of seconds from 0, got -1"),
    ],
)
def test_wrong_options_are_errors(make: Any, sqlite_url: str, option: Any, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        make(bare, sqlite_url, unavailable=option)


FORK = """
import os
from sqlasession_middleware._database.breaker import Breaker
found = Breaker(1, 1000, lambda error: None, lambda: None)
found.fail(OSError())
assert found.state == "open"
pid = os.fork()
if not pid:
    os._exit(0 if found.state == "closed" else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert found.state == "open"
"""


def test_child_begins_with_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("everywhere", [False, True])
def test_connections_to_a_server_that_refuses_to_write_are_renewed_whoever_listens(make: Any, everywhere: bool) -> None:
    """Also if a listener raises before others are called, and if it listens to all engines."""
    numbers: list[int] = []

    def write(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        numbers.append(session.scalar(text("SELECT pg_backend_pid()")) or 0)
        session.execute(text("CREATE TABLE breaker_never (id int)"))
        return []

    def fail(context: object) -> None:
        raise LookupError

    read_only = {"options": "-c default_transaction_read_only=on"}
    url = make_url(DATABASES_SEEN.url("postgresql", "")).update_query_dict(read_only)
    wrapped = make(write, url)
    target = Engine if everywhere else wrapped.engine
    event.listen(target, "handle_error", fail)
    try:
        assert [call(wrapped) for _ in range(3)] == [BUSY] * 3
    finally:
        event.remove(target, "handle_error", fail)
    assert len(set(numbers)) == 3


def test_what_has_no_breaker_has_nothing_to_count(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url)
    module.note_silence(engine, DeadlineError(1, "nothing"))
    module.forget_connections(None, DeadlineError(1, "nothing"))
    assert breaker_state(engine) is None
    calls: list[str] = []
    own = module.Breaker(1, 1, lambda error: calls.append("open"), lambda: calls.append("closed"))
    own.close()
    assert (own.state, calls) == ("closed", [])
    engine.dispose()


def test_guarded_pool_has_deadlines(make: Any, server_url: str) -> None:
    """Whichever of the two comes first."""
    app = make(bare, server_url, engine_options={"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.1})
    assert call(app).startswith("200")
    with app.engine.connect():
        for seconds, expected in ((0.05, DeadlineError), (60, PoolTimeoutError)):
            with app.context(deadline=seconds) as opened, pytest.raises(expected):
                opened.execute(text("SELECT 1"))
    assert call(app).startswith("200")


def test_answer_that_is_an_error_closes_it(make: Any, sqlite_url: str, clock: Clock) -> None:
    """Such as a refused login: the server is there."""
    app = make(bare, sqlite_url, unavailable={"breaker_failures": 1, "breaker_seconds": 5})
    assert call(app).startswith("200")
    app.engine.dispose()
    found = module.breaker_of(LookupError(), app.engine)
    assert found is not None
    found.open_until = 0.001

    @event.listens_for(app.engine, "do_connect")
    def refuse(*arguments: Any) -> None:
        raise sqlite3.DatabaseError("file is not a database")

    with pytest.raises(DBAPIError):
        app.engine.connect()
    assert found.state == "closed"


def test_listeners_that_come_first_are_there() -> None:
    before = _dependencies._Before(print, [])
    assert (bool(before), list(before)) == (True, [print])
