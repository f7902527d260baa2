"""Connections that were lost while they were idle are replaced, and the server is not asked for that (G17)."""

from __future__ import annotations

import os
import resource
import select as system
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, NullPool, create_engine, event, text
from sqlalchemy.exc import OperationalError

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware._database import liveness
from sqlasession_middleware._drivers.registry import driver_of

from .drivers import Row, rows_of, rows_on
from .wsgi import Environ, StartResponse, consume, environ, start_response

NETWORKED = rows_on("postgresql", "mariadb")
PATIENCE = 60.0
ROOT = Path(__file__).parents[1]
#: As many as the pool keeps.
IDLE = 5

#: What a server calls its connections, and how it ends one.
NUMBER = {"postgresql": "SELECT pg_backend_pid()", "mariadb": "SELECT CONNECTION_ID()"}
KILL = {"postgresql": "SELECT pg_terminate_backend({})", "mariadb": "KILL {}"}


def number_of_connection(environ: Environ, start: StartResponse) -> list[bytes]:
    name = session.get_bind().dialect.name
    answer = b"%d" % session.execute(text(NUMBER[name])).scalar_one()
    start("200 OK", [])
    return [answer]


@pytest.fixture(params=NETWORKED)
def row(request: pytest.FixtureRequest) -> Row:
    found: Row = request.param
    return found


def wrap(url: Any, **options: Any) -> SQLASessionMiddleware:
    return SQLASessionMiddleware(number_of_connection, url, **options)


def ask(app: Any) -> int:
    return int(consume(app(environ(), start_response)))


def fill(engine: Engine, number: int = IDLE, socket_of: Callable[[Any], int | None] | None = None) -> dict[int, int]:
    """Have idle connections in a pool: their numbers, and the descriptors of their sockets."""
    find = socket_of or driver_of(engine).file_number
    found = {}
    with ExitStack() as stack:
        for _ in range(number):
            connection = stack.enter_context(engine.connect())
            descriptor = find(connection.connection.dbapi_connection)
            assert descriptor is not None
            found[connection.execute(text(NUMBER[engine.dialect.name])).scalar_one()] = descriptor
    assert len(found) == number == engine.pool.checkedin()  # type: ignore[attr-defined]
    return found


def wait_for_the_server(descriptors: Any) -> None:
    """Return when each of the sockets has something to read."""
    for descriptor in descriptors:
        poll = system.poll()
        poll.register(descriptor, system.POLLIN)
        assert poll.poll(PATIENCE * 1000)


def kill(engine: Engine, idle: dict[int, int]) -> None:
    """End idle connections from the server's side. Returns when the client could know."""
    killer = create_engine(engine.url, poolclass=NullPool)
    with killer.connect() as connection:
        for number in idle:
            connection.execute(text(KILL[engine.dialect.name].format(number)))
    wait_for_the_server(idle.values())


def count_connects(engine: Engine) -> list[Any]:
    made: list[Any] = []
    event.listen(engine, "connect", lambda connection, record: made.append(connection))
    return made


class Pings(list[Any]):
    """The pings that the pool sends, each an argument of the dialect's ``do_ping()``."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.ping = engine.dialect.do_ping
        engine.dialect.do_ping = self.note  # type: ignore[method-assign]

    def note(self, connection: Any) -> bool:
        self.append(connection)
        return self.ping(connection)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as its only item, that the pool's clock tells."""
    now = [1000.0]
    monkeypatch.setattr(liveness, "_seconds", lambda: now[0])
    return now


@pytest.mark.parametrize("options", [{}, {"ping_after": None}, {"engine_options": {"pool_pre_ping": True}}], ids=str)
def test_no_request_fails_when_the_server_has_closed_the_idle_connections(row: Row, options: Any) -> None:
    app = wrap(row.url(), **options)
    killed = fill(app.engine)
    kill(app.engine, killed)
    assert killed.keys().isdisjoint({ask(app) for _ in range(2 * IDLE)})
    app.dispose()


@pytest.mark.parametrize("of", ["bind", "binds", "replicas"])
def test_engines_of_all_kinds_are_looked_after(of: str, server_url: str) -> None:
    options = {"bind": {}, "binds": {"binds": {"other": server_url}}, "replicas": {"replicas": [server_url]}}[of]
    app = wrap(server_url, **options)
    for engine in app.engines.values():
        killed = fill(engine)
        kill(engine, killed)
        with engine.connect() as connection:
            assert connection.execute(text(NUMBER[engine.dialect.name])).scalar_one() not in killed
    app.dispose()


def test_connection_is_not_pinged_unless_it_was_idle_for_long(row: Row, clock: list[float]) -> None:
    app = wrap(row.url())
    first = ask(app)
    pings = Pings(app.engine)
    clock[0] += 60
    assert (ask(app), len(pings)) == (first, 0)
    clock[0] += 60.5
    assert (ask(app), len(pings)) == (first, 1)
    assert (ask(app), len(pings)) == (first, 1)
    app.dispose()


def test_connection_was_not_idle_while_a_request_had_it(server_url: str, clock: list[float]) -> None:
    app = wrap(server_url)
    ask(app)
    pings = Pings(app.engine)
    with app.context():
        session.execute(text("SELECT 1"))
        clock[0] += 3600
    ask(app)
    assert not pings
    app.dispose()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"ping_after": 2.5}, [False, True]),
        ({"ping_after": None}, [False, False]),
        ({"ping_after": 0}, [True, True]),
        ({"engine_options": {"pool_pre_ping": True}}, [True, True]),
        ({"engine_options": {"pool_pre_ping": True}, "ping_after": None}, [True, True]),
        ({"engine_options": {"pool_pre_ping": False}}, [False, False]),
        ({"engine_options": {"pool_pre_ping": False}, "ping_after": 0}, [False, False]),
    ],
    ids=str,
)
@pytest.mark.parametrize("of", ["bind", "binds", "replicas"])
def test_ping_comes_when_the_options_say(
    of: str, options: Any, expected: list[bool], server_url: str, clock: list[float]
) -> None:
    options = dict(options)
    own = options.get("engine_options", {})
    more = {
        "bind": {},
        "binds": {"binds": {"other": {"url": server_url, **own}}},
        "replicas": {"replicas": [server_url]},
    }
    app = wrap(server_url, **options, **more[of])
    engine = list(app.engines.values())[-1]
    engine.connect().close()
    pings = Pings(engine)
    seen = []
    for seconds in (2, 1e9):
        clock[0] += seconds
        engine.connect().close()
        seen.append(bool(pings))
        pings.clear()
    assert seen == expected
    app.dispose()


@pytest.fixture
def known_socket(row: Row, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], int | None]:
    """Have the socket of a driver not be known, except to the one who calls this."""
    driver = driver_of(row.url().get_dialect()())
    find = driver.file_number
    monkeypatch.setattr(type(driver), "file_number", lambda self, connection: None)
    return find


def test_connection_is_pinged_each_time_when_its_socket_is_not_known(
    row: Row, known_socket: Callable[[Any], int | None]
) -> None:
    app = wrap(row.url())
    killed = fill(app.engine, socket_of=known_socket)
    pings = Pings(app.engine)
    assert ask(app) in killed
    assert len(pings) == 1
    kill(app.engine, killed)
    assert killed.keys().isdisjoint({ask(app) for _ in range(2 * IDLE)})
    app.dispose()


@pytest.mark.usefixtures("known_socket")
def test_new_connection_is_not_pinged(row: Row) -> None:
    app = wrap(row.url())
    pings = Pings(app.engine)
    first = ask(app)
    app.engine.dispose()
    assert ask(app) != first
    assert not pings
    app.dispose()


def test_each_use_is_pinged_when_the_system_cannot_look(server_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "_poll", None)
    app = wrap(server_url)
    ask(app)
    pings = Pings(app.engine)
    ask(app)
    assert len(pings) == 1
    app.dispose()


@pytest.mark.parametrize("row", rows_on("postgresql"), indirect=True)
def test_connection_is_kept_when_what_it_has_to_read_is_a_notification(row: Row) -> None:
    app = wrap(row.url())
    made = count_connects(app.engine)
    with app.engine.begin() as connection:
        connection.execute(text("LISTEN idle_connections"))
    idle = fill(app.engine, 1)
    notifier = create_engine(row.url(), poolclass=NullPool)
    with notifier.begin() as connection:
        connection.execute(text("NOTIFY idle_connections, 'hello'"))
    wait_for_the_server(idle.values())
    pings = Pings(app.engine)
    assert {ask(app) for _ in range(3)} == idle.keys()
    assert len(made) == len(pings) == 1  # It was read with the answer.
    app.dispose()


@pytest.mark.parametrize("row", rows_of("pymysql", "MySQLdb"), indirect=True)
def test_error_of_a_ping_is_understood(row: Row, clock: list[float]) -> None:
    app = wrap(row.url())
    first = ask(app)
    dialect: Any = app.engine.dialect
    error = dialect.loaded_dbapi.OperationalError

    def fail_with(*arguments: Any) -> None:
        def do_ping(connection: Any) -> bool:
            raise error(*arguments)

        dialect.do_ping = do_ping
        clock[0] += 61

    # One that SQLAlchemy does not take for a lost connection; that of MariaDB Connector/Python has these words as well.
    fail_with(2026, "TLS/SSL error: unexpected eof while reading")
    second = ask(app)
    assert second != first
    fail_with(1227, "Access denied; you need (at least one of) the PING privilege(s) for this operation")
    with pytest.raises(OperationalError, match="PING privilege"):
        ask(app)
    app.dispose()


def test_listener_of_the_application_finds_a_connection_that_works(row: Row) -> None:
    def set_up(connection: Any, record: Any, proxy: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        cursor.close()

    app = wrap(row.url(), engine_options={"pool_events": [(set_up, "checkout")]})
    killed = fill(app.engine)
    kill(app.engine, killed)
    assert killed.keys().isdisjoint({ask(app) for _ in range(2 * IDLE)})
    app.dispose()


@pytest.mark.parametrize("when", ["in use", "idle"])
def test_connection_that_the_application_has_closed_is_replaced(row: Row, when: str) -> None:
    app = wrap(row.url())
    first = ask(app)
    with app.engine.connect() as connection:
        connection.execute(text("SELECT 1"))
        connection.rollback()
        driver_connection = connection.connection.dbapi_connection
        assert driver_connection is not None
        if when == "in use":
            driver_connection.close()
    if when == "idle":
        driver_connection.close()
    assert ask(app) != first
    app.dispose()


def test_idle_connections_are_looked_at_when_the_pool_is_another_one(server_url: str) -> None:
    app = wrap(server_url)
    ask(app)
    app.dispose()
    killed = fill(app.engine)
    kill(app.engine, killed)
    assert killed.keys().isdisjoint({ask(app) for _ in range(2 * IDLE)})
    app.dispose()


def test_socket_of_any_number_is_looked_at(row: Row) -> None:
    """``select()`` has room for 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("too few descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    app = wrap(row.url())
    opened = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while opened[-1] < 1100:
            opened.append(os.dup(opened[0]))
        killed = fill(app.engine)
        assert min(killed.values()) > 1023
        pings = Pings(app.engine)
        assert ask(app) in killed
        assert not pings
        kill(app.engine, killed)
        assert killed.keys().isdisjoint({ask(app) for _ in range(2 * IDLE)})
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    app.dispose()


def test_engine_that_was_given_is_left_as_it_is(row: Row, clock: list[float]) -> None:
    engine = create_engine(row.url())
    app = wrap(engine, ping_after=0)
    pings = Pings(engine)
    for _ in range(3):
        ask(app)
        clock[0] += 1e9
    assert not pings
    engine.dispose()


def test_pool_that_was_given_is_left_as_it_is(server_url: str, clock: list[float]) -> None:
    pool = create_engine(server_url).pool
    app = wrap(server_url, engine_options={"pool": pool})
    pings = Pings(app.engine)
    for _ in range(3):
        ask(app)
        clock[0] += 1e9
    assert not pings
    app.dispose()


GREENLETS = """
import gevent.monkey
gevent.monkey.patch_all()
import select
from tests import test_idle_connections as tests
from sqlalchemy import make_url
from sqlasession_middleware._database import liveness

assert liveness._poll is not select.poll, "gevent's poll() is for waiting"
app = tests.wrap(make_url({url!r}))
killed = tests.fill(app.engine)
pings = tests.Pings(app.engine)
assert tests.ask(app) in killed and not pings
tests.kill(app.engine, killed)
assert killed.keys().isdisjoint({{tests.ask(app) for _ in range(10)}})
print("done")
"""


@pytest.mark.parametrize("row", rows_of("psycopg", "pymysql"), indirect=True)
def test_greenlets_look_without_waiting(row: Row) -> None:
    pytest.importorskip("gevent.monkey")
    assert liveness._find_poll() is system.poll  # Nothing is patched in this process.
    script = GREENLETS.format(url=row.url().render_as_string(hide_password=False))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.stdout == "done\n", done.stderr


REFUSED: dict[str, Any] = {"text": "60", "negative": -1, "true": True, "endless": float("inf")}


@pytest.mark.parametrize("value", REFUSED.values(), ids=REFUSED)
def test_time_is_refused_when_it_is_no_time(value: Any) -> None:
    with pytest.raises(ValueError, match=r"ping_after must be a number of seconds from 0, or none, got"):
        wrap("sqlite://", ping_after=value)
