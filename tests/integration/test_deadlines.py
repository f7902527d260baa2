"""G19: whatever the database does, or does not, each request is answered by its deadline."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4
from wsgiref.types import StartResponse, WSGIEnvironment

import pytest
from sqlalchemy import URL, NullPool, create_engine, text
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware.errors import DeadlineError
from sqlasession_middleware.unavailable import breaker_state

from ..drivers import Row, rows_of, rows_on
from ..test_health import account
from .faulty_ways import Gate, full_backlog, offers_tls, silent_listener
from .own_servers import OwnMariaDB, OwnPostgreSQL, OwnServer, running
from .servers import PATIENCE

# psycopg tells of a cursor whose connection was lost before it could be closed.
pytestmark = pytest.mark.filterwarnings("ignore:<psycopg.ServerCursor object:ResourceWarning")

DEADLINE = 0.7
#: Seconds that an answer may be late.
TOLERANCE = 0.5
#: Of a table that is there while the module's tests run.
TABLE = f"deadline_{uuid4().hex[:12]}"

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "transaction": {"transaction": True},
    "attempts": {"transaction": {"attempts": 3, "backoff_base": 0.01}},
}
SLEEP = {"postgresql": "pg_sleep", "mariadb": "sleep"}
#: What a server does, but for the question itself.
RUNNING = {
    "postgresql": "SELECT query FROM pg_stat_activity WHERE state <> 'idle' AND pid <> pg_backend_pid()",
    "mariadb": "SELECT info FROM information_schema.processlist WHERE info IS NOT NULL AND id <> connection_id()",
}


class World:
    """A database, an application that works with it, and what is wrong."""

    def __init__(
        self, row: Row, url: URL, stack: ExitStack, mode: str, pre_ping: bool = False, **connect_args: Any
    ) -> None:
        self.row, self.url, self.mode = row, url, mode
        #: marks the statements of this test
        self.token = uuid4().hex
        self.work: Callable[[], object] = lambda: self.say("SELECT 1")
        self.connect_args = connect_args
        self.commits = True
        self.app = SQLASessionMiddleware(
            self.answer,
            url,
            engine_options={
                "pool_size": 1,
                "max_overflow": 0,
                "connect_args": connect_args,
                **({"pool_pre_ping": True} if pre_ping else {}),
            },
            deadline=DEADLINE,
            unavailable=True,
            **MODES[mode],
        )
        stack.callback(self.app.dispose)
        self.other = create_engine(row.url(), poolclass=NullPool, isolation_level="AUTOCOMMIT")

    def say(self, statement: str) -> Any:
        return session.execute(text(f"{statement} /* {self.token} */"))

    def sleep(self, seconds: float) -> None:
        self.say(f"SELECT {SLEEP[self.row.server]}({seconds})")

    def answer(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        self.work()
        if self.mode == "plain" and self.commits:
            session.commit()
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"done"]

    def ask(self) -> str:
        """The status of a request, and whether it was in time."""
        begun = time.monotonic()
        try:
            response = Client(self.app).get("/", buffered=True)
            status = f"{response.status_code}{' unknown' if b'not known' in response.data else ''}"
            assert response.status_code != 503 or response.headers["Retry-After"]
        except DeadlineError as error:
            status = "unknown" if error.is_outcome_unknown else str(error)
        took = time.monotonic() - begun
        assert took < DEADLINE + TOLERANCE * busy(), took
        return status

    def ask_in_time(self) -> str:
        """The status of a request that was over before its deadline: a busy machine may be too slow for that."""
        end = time.monotonic() + PATIENCE
        while True:
            begun = time.monotonic()
            status = self.ask()
            if time.monotonic() - begun < DEADLINE or begun > end:
                return status

    def is_clean(self) -> bool:
        """Whether the server does nothing any more for this test."""
        with self.other.connect() as connection:
            return not any(self.token in each for each in connection.scalars(text(RUNNING[self.row.server])))

    def wait_until(self, done: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not done():
            assert time.monotonic() < end
            time.sleep(0.02)


def busy() -> float:
    """How much longer everything takes because more runs than there are processors; 1 where it does not."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def through(port: int, url: URL) -> URL:
    return url.set(host="127.0.0.1", port=port)


# -- what is wrong: each yields a world in which it is


Fault = Callable[[Row, ExitStack, str], AbstractContextManager[World]]


@contextmanager
def listener_says_nothing(row: Row, stack: ExitStack, mode: str) -> Iterator[World]:
    yield World(row, through(stack.enter_context(silent_listener()), row.url()), stack, mode)


@contextmanager
def backlog_is_full(row: Row, stack: ExitStack, mode: str) -> Iterator[World]:
    yield World(row, through(stack.enter_context(full_backlog()), row.url()), stack, mode)


#: What each driver has to be told to ask for TLS, without looking at certificates.
TLS: dict[str, dict[str, Any]] = {
    "psycopg": {"sslmode": "require"},
    "psycopg2": {"sslmode": "require"},
    "pymysql": {"ssl": {"check_hostname": False}},
    "MySQLdb": {"ssl": {"ca": None}, "ssl_mode": "REQUIRED"},
    "mariadb": {"ssl": True},
}


@contextmanager
def tls_hangs(row: Row, stack: ExitStack, mode: str) -> Iterator[World]:
    url = row.url()
    if row.server == "postgresql":
        port = stack.enter_context(silent_listener(b"S"))
    else:
        gate = stack.enter_context(Gate(str(url.host), url.port or 3306))
        gate.first, gate.shuts_at, port = offers_tls, b"", gate.port
    yield World(row, through(port, url), stack, mode, **TLS[row.module])


@contextmanager
def pool_is_full(row: Row, stack: ExitStack, mode: str) -> Iterator[World]:
    world = World(row, row.url(), stack, mode)
    with world.app.engine.connect():
        yield world


@contextmanager
def query_takes_long(row: Row, stack: ExitStack, mode: str) -> Iterator[World]:
    world = World(row, row.url(), stack, mode)
    world.work = partial(world.sleep, 10)
    yield world
    world.work = lambda: world.say("SELECT 1")


@contextmanager
def rows_trickle(row: Row, stack: ExitStack, mode: str) -> Iterator[World]:
    """They are so few that the server sends them all together, with the error of a statement that was cancelled."""
    world = World(row, row.url(), stack, mode)
    rows = {
        "postgresql": "SELECT n, pg_sleep(0.01) FROM generate_series(1, 800) AS n",
        "mariadb": "SELECT seq, sleep(0.01) FROM seq_1_to_800",
    }[row.server]
    streamed = text(f"{rows} /* {world.token} */").execution_options(yield_per=5)
    world.work = lambda: sum(1 for _ in session.execute(streamed))
    world.commits = False  # Which would be refused.
    yield world
    world.work = lambda: world.say("SELECT 1")


@contextmanager
def server_is_full(row: Row, stack: ExitStack, mode: str) -> Iterator[World]:
    """There is no further connection for the request to cancel."""
    world = World(row, stack.enter_context(account(row)), stack, mode)
    world.work = partial(world.sleep, 2)
    yield world
    # Nor is there one for the next request, until the server has noticed.
    world.wait_until(world.is_clean)
    world.work = lambda: world.say("SELECT 1")
    world.wait_until(lambda: world.ask() == "200")
    assert breaker_state(world.app.engine) == "closed"


@contextmanager
def ping_is_not_answered(row: Row, stack: ExitStack, mode: str) -> Iterator[World]:
    url = row.url()
    gate = stack.enter_context(Gate(str(url.host), url.port or (5432 if row.server == "postgresql" else 3306)))
    world = World(row, through(gate.port, url), stack, mode, pre_ping=True)
    assert world.ask() == "200"
    gate.shut()
    yield world
    gate.open()


@contextmanager
def lock_is_held(row: Row, stack: ExitStack, mode: str) -> Iterator[World]:
    world = World(row, row.url(), stack, mode)
    world.work = lambda: world.say(f"UPDATE {TABLE} SET n = n + 1 WHERE id = 1")
    with world.other.connect() as holder:
        holder = holder.execution_options(isolation_level="READ COMMITTED")
        holder.execute(text(f"SELECT n FROM {TABLE} WHERE id = 1 FOR UPDATE"))
        yield world
        assert world.app.engine.pool.checkedout() == 0
        world.wait_until(world.is_clean)  # While the lock is held.


@contextmanager
def packets_vanish(row: Row, stack: ExitStack, mode: str, at: str) -> Iterator[World]:
    url = row.url()
    gate = stack.enter_context(Gate(str(url.host), url.port or (5432 if row.server == "postgresql" else 3306)))
    # Else the statements could not be read here.
    plain = {"pymysql": {"ssl_disabled": True}, "psycopg": {"sslmode": "disable"}, "psycopg2": {"sslmode": "disable"}}
    world = World(row, through(gate.port, url), stack, mode, **plain.get(row.module, {}))
    world.work = lambda: world.say(f"UPDATE {TABLE} SET n = n + 1 WHERE id = 2")
    assert world.ask() == "200"
    gate.shuts_at = at.encode()
    yield world
    gate.open()


@contextmanager
def server_is_stopped(row: Row, stack: ExitStack, mode: str, own: Any) -> Iterator[World]:
    server: OwnServer = own(row.server)
    world = World(row, server.url.set(drivername=row.dialect), stack, mode)
    world.other = create_engine(server.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    assert world.ask() == "200"
    with stopped(server):
        yield world


@contextmanager
def stopped(server: OwnServer) -> Iterator[None]:
    assert server.process is not None
    # The server first and, at the end, last: while it is stopped none of its children goes away. One that was just
    # ending stays a zombie.
    found = [server.process.pid]
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        wait_until_stopped(server.process.pid)
        for each in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                if int(each.read_text().rpartition(")")[2].split()[1]) == server.process.pid:
                    found.append(int(each.parent.name))
        for pid in found[1:]:
            os.kill(pid, signal.SIGSTOP)
            wait_until_stopped(pid)
        yield
    finally:
        for pid in reversed(found):
            os.kill(pid, signal.SIGCONT)


def wait_until_stopped(pid: int) -> None:
    while any(state_of(task) not in "TZX" for task in Path(f"/proc/{pid}/task").iterdir()):
        time.sleep(0.01)


def state_of(task: Path) -> str:
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


FAULTS: dict[str, Fault] = {
    "listener says nothing": listener_says_nothing,
    "full backlog": backlog_is_full,
    "TLS hangs": tls_hangs,
    "full pool": pool_is_full,
    "long query": query_takes_long,
    "rows that trickle": rows_trickle,
    "long query on a full server": server_is_full,
    "ping": ping_is_not_answered,
    "lock": lock_is_held,
    "packets vanish in a statement": partial(packets_vanish, at="UPDATE"),
    "packets vanish in COMMIT": partial(packets_vanish, at="COMMIT"),
}
#: Of which no server is there, that could be cleaned and used again.
WITHOUT_SERVER = ("listener says nothing", "full backlog", "TLS hangs")


@pytest.fixture(autouse=True, scope="module")
def table() -> Iterator[None]:
    engines = [create_engine(param.values[0].url(), poolclass=NullPool) for param in rows_on("postgresql", "mariadb")]
    for engine in {each.url.get_backend_name(): each for each in engines}.values():
        with engine.begin() as connection:
            connection.execute(text(f"CREATE TABLE {TABLE} (id integer PRIMARY KEY, n integer NOT NULL)"))
            connection.execute(text(f"INSERT INTO {TABLE} VALUES (1, 0), (2, 0)"))
    yield
    for engine in {each.url.get_backend_name(): each for each in engines}.values():
        with engine.begin() as connection:
            connection.execute(text(f"DROP TABLE {TABLE}"))


@pytest.fixture(scope="module")
def own() -> Iterator[Callable[[str], OwnServer]]:
    kinds: dict[str, type[OwnServer]] = {"postgresql": OwnPostgreSQL, "mariadb": OwnMariaDB}
    servers: dict[str, OwnServer] = {}
    with ExitStack() as stack:

        def find(name: str) -> OwnServer:
            if name not in servers:
                servers[name] = stack.enter_context(running(kinds[name]))
            return servers[name]

        yield find


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fault", [*FAULTS, "stopped server"])
@pytest.mark.parametrize("row", rows_on("postgresql", "mariadb"))
def test_request_is_answered_by_its_deadline(row: Row, fault: str, mode: str, own: Any) -> None:
    make = FAULTS.get(fault, partial(server_is_stopped, own=own))
    with ExitStack() as stack:
        with make(row, stack, mode) as world:
            status = world.ask()
            held = 1 if fault == "full pool" else 0
            assert world.app.engine.pool.checkedout() == held
        if fault == "packets vanish in COMMIT":
            assert status == ("unknown" if mode == "plain" else "500 unknown")
        else:
            assert status == "503"
        if fault not in WITHOUT_SERVER:
            world.wait_until(world.is_clean)
            assert world.ask_in_time() == "200"
            assert world.app.engine.pool.checkedout() == 0


@pytest.mark.parametrize("silent", [silent_listener, full_backlog])
@pytest.mark.parametrize("row", rows_of("psycopg", "psycopg2"))
def test_second_host_is_asked_in_time(row: Row, silent: Callable[[], AbstractContextManager[int]]) -> None:
    """A connect timeout is one of each host, and that of the first may be longer than the deadline."""
    url = row.url()
    with silent() as port:
        hosts = [f"127.0.0.1:{port}", f"{url.host}:{url.port or 5432}"]
        app = SQLASessionMiddleware(
            lambda environ, start: [], url.set(host=None, port=None, query={**url.query, "host": hosts})
        )
        with app.context(deadline=5) as opened:
            assert opened.scalar(text("SELECT 1")) == 1
        app.dispose()
