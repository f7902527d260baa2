"""HealthMiddleware: what it answers, how long it takes, and what it leaves alone, on real servers."""

from __future__ import annotations

import gc
import json
import logging
import os
import select
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4
from wsgiref.simple_server import WSGIRequestHandler, make_server
from wsgiref.validate import validator

import pytest
from flask import Flask
from paste.cascade import Cascade
from paste.deploy import loadapp
from paste.gzipper import middleware as gzip
from paste.urlmap import URLMap
from sqlalchemy import Connection, Engine, NullPool, QueuePool, StaticPool, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import AssertionPool, SingletonThreadPool
from werkzeug.debug import DebuggedApplication
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.test import Client

import sqlasession_middleware
from sqlasession_middleware import SQLASessionMiddleware
from sqlasession_middleware._database import pings
from sqlasession_middleware.errors import ConfigurationError
from sqlasession_middleware.health import HealthMiddleware
from sqlasession_middleware.transaction import TransactionMiddleware
from sqlasession_middleware.unavailable import UnavailableMiddleware

from .drivers import Row, rows_on
from .ports import free_port
from .wsgi import Environ, StartResponse, select_one

pytestmark = pytest.mark.usefixtures("disposes")

SECRET = "hunter2-s3cret"
JSON = {"Accept": "application/json"}
LOGGER = "sqlasession_middleware.health"
#: How long something may take on a busy machine that takes no time.
PATIENCE = 30.0
#: How much later than its timeout an answer may come.
LATE = 0.5


def shop(environ: Environ, start: StartResponse) -> list[bytes]:
    if environ["PATH_INFO"] == "/database":
        select_one()
    start("200 OK", [("Content-Type", "text/plain")])
    return [b"shop"]


@pytest.fixture
def make() -> Iterator[Callable[..., HealthMiddleware]]:
    """Makes applications with their health, which are disposed of at the end."""
    with ExitStack() as stack:

        def make(bind: Any = "sqlite://", *, timeout: float = 5.0, health: Any = None, **options: Any) -> Any:
            app = SQLASessionMiddleware(shop, bind, **options)
            stack.callback(app.dispose)
            if not isinstance(bind, str) and hasattr(bind, "dispose"):
                stack.callback(bind.dispose)
            return HealthMiddleware(app, timeout=timeout, **health or {})

        yield make


class Answer(SimpleNamespace):
    """What a probe is told, and after how many seconds."""

    status: int
    ready: bool
    states: dict[str, str]
    took: float


def probe(app: Any) -> Answer:
    began = time.monotonic()
    response = Client(app).get("/readyz", headers=JSON)
    took = time.monotonic() - began
    assert response.json is not None
    assert response.headers["Cache-Control"] == "no-store"
    states = {name: said["state"] for name, said in response.json["engines"].items()}
    assert (response.status_code == 200) is response.json["ready"]
    return Answer(status=response.status_code, ready=response.json["ready"], states=states, took=took)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "sqlasession-ping"]


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class Silent:
    """A server that accepts connections and says nothing. It keeps them until it is closed."""

    def __init__(self, port: int = 0) -> None:
        self.listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self.listener.getsockname()[1]
        self.accepted: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                self.accepted.append(self.listener.accept()[0])

    def close(self) -> None:
        with suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self._thread.join(PATIENCE)
        for each in self.accepted:
            each.close()

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Relay(Silent):
    """Leads to a real server, and may become silent: at once, or as soon as a client asks something."""

    def __init__(self, url: Any, port: int = 0) -> None:
        self.url = make_url(url)
        self.is_silent = False
        self.stops_at: bytes | None = None
        super().__init__(port)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client = self.listener.accept()[0]
                self.accepted.append(client)
                if not self.is_silent:
                    port = self.url.port or (5432 if self.url.get_backend_name() == "postgresql" else 3306)
                    server = socket.create_connection((self.url.host, port))
                    threading.Thread(target=self._relay, args=(client, server)).start()

    def _relay(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError, ValueError), server:  # A socket that was closed has no descriptor.
            while True:
                for each in select.select([client, server], [], [])[0]:
                    data = each.recv(65536)
                    if self.stops_at is not None and each is client and self.stops_at in data:
                        client.recv(1)  # Until the client gives up.
                        return
                    if not data:
                        client.close()
                        return
                    (server if each is client else client).sendall(data)


def through(relay: Relay, **query: str) -> Any:
    return relay.url.set(host="127.0.0.1", port=relay.port).update_query_dict(query)


@pytest.fixture
def silent() -> Iterator[Silent]:
    with Silent() as server:
        yield server
    wait_for(lambda: not threads())


@pytest.fixture(params=rows_on("postgresql", "mariadb"))
def row(request: pytest.FixtureRequest) -> Row:
    """Each driver of a server."""
    row: Row = request.param
    row.url()
    return row


# -- what is answered, and where

ANSWERS: dict[tuple[str, str | None], tuple[str, str]] = {
    ("/healthz", None): ("text/plain; charset=UTF-8", "alive\n"),
    ("/healthz", "*/*"): ("text/plain; charset=UTF-8", "alive\n"),
    ("/healthz", "text/html,*/*;q=0.8"): ("text/plain; charset=UTF-8", "alive\n"),
    ("/healthz", "image/png"): ("text/plain; charset=UTF-8", "alive\n"),
    ("/healthz", "application/json"): ("application/json", '{"alive": true}\n'),
    ("/readyz", None): ("text/plain; charset=UTF-8", "ready\ndefault: ok\naudit: ok\n"),
    ("/readyz", "text/plain;q=0.5,application/json"): (
        "application/json",
        '{"ready": true, "engines": {"default": {"state": "ok"}, "audit": {"state": "ok"}}}\n',
    ),
    ("/readyz", "no header"): ("text/plain; charset=UTF-8", "ready\ndefault: ok\naudit: ok\n"),
}


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(("asked", "expected"), ANSWERS.items(), ids=map(str, ANSWERS))
def test_answer_is_what_the_client_accepts(make: Any, method: str, asked: Any, expected: Any) -> None:
    app = make(binds={"audit": "sqlite://"})
    path, accept = asked
    response = Client(app).open(path, method=method, headers={} if accept is None else {"Accept": accept})
    assert response.status == "200 OK"
    assert response.headers["Content-Type"] == expected[0]
    assert response.headers["Content-Length"] == str(len(expected[1]))
    assert response.headers["Cache-Control"] == "no-store"
    assert response.text == (expected[1] if method == "GET" else "")


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "get"])
def test_other_methods_are_not_allowed(make: Any, path: str, method: str) -> None:
    app = make(create_engine("sqlite://", creator=unwanted))
    response = Client(app).open(path, environ_overrides={"REQUEST_METHOD": method})
    assert response.status == "405 Method Not Allowed"
    assert response.headers["Allow"] == "GET, HEAD"
    assert response.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("path", ["/", "/healthz/", "/readyz/x", "/HEALTHZ", "", "/database"])
def test_other_paths_are_the_applications(make: Any, path: str) -> None:
    app = make()
    received: list[Any] = []
    given = {"REQUEST_METHOD": "POST", "PATH_INFO": path}

    def inner(environ: Environ, start: StartResponse) -> list[bytes]:
        received.extend((environ, start))
        return [b"its own"]

    app.app = inner
    start: Any = object()
    assert app(given, start) == [b"its own"]
    assert received[0] is given
    assert received[1] is start


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, {"/healthz": "alive\n", "/readyz": "ready\ndefault: ok\n", "/up": "shop"}),
        ({"live": "/up"}, {"/healthz": "shop", "/readyz": "ready\ndefault: ok\n", "/up": "alive\n"}),
        ({"live": None, "ready": "/up"}, {"/healthz": "shop", "/readyz": "shop", "/up": "ready\ndefault: ok\n"}),
        ({"live": None, "ready": None}, {"/healthz": "shop", "/readyz": "shop", "/up": "shop"}),
    ],
)
def test_paths_are_those_that_are_given(make: Any, options: Any, found: dict[str, str]) -> None:
    client = Client(make(health=options))
    assert {path: client.get(path).text for path in found} == found


def unwanted() -> Any:
    raise AssertionError("no connection is wanted")


def test_live_touches_no_database(make: Any, silent: Silent) -> None:
    app = make(
        f"postgresql+psycopg://u@127.0.0.1:{silent.port}/x", binds={"a": create_engine("sqlite://", creator=unwanted)}
    )
    began = time.monotonic()
    assert Client(app).get("/healthz").status_code == 200
    assert time.monotonic() - began < LATE
    assert not silent.accepted
    assert not threads()


class Quiet(WSGIRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


def test_it_keeps_to_wsgi_on_a_real_server(make: Any, sqlite_url: str) -> None:
    engine = create_engine(sqlite_url)
    with engine.connect():
        pass
    server = make_server("127.0.0.1", 0, validator(make(engine)), handler_class=Quiet)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        for method, path, status, length in (
            ("GET", "/healthz", 200, 6),
            ("HEAD", "/healthz", 200, 0),
            ("GET", "/readyz", 200, 18),
            ("HEAD", "/readyz", 200, 0),
            ("POST", "/readyz", 405, 31),
        ):
            connection = HTTPConnection("127.0.0.1", server.server_port, timeout=PATIENCE)
            connection.request(method, path)
            response = connection.getresponse()
            assert (response.status, len(response.read())) == (status, length), (method, path)
            connection.close()
    finally:
        server.shutdown()
        thread.join(PATIENCE)
        server.server_close()


# -- engines


def test_each_database_answers(make: Any, database_url: str) -> None:
    if database_url.startswith("sqlite"):
        create_engine(database_url).connect().close()
    app = make(database_url, binds={"memory": "sqlite://"}, replicas=[database_url])
    answer = probe(app)
    assert answer.states == {"default": "ok", "memory": "ok", "replicas[0]": "ok"}
    # The pools were not asked.
    assert [engine.pool.checkedin() for engine in app.app.engines.values()] == [0, 0, 0]


def test_each_driver_answers_and_leaves_no_connection(make: Any, row: Row) -> None:
    url = row.url()
    app = make(url)
    ask = {
        "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()",
        "mariadb": "SELECT count(*) FROM information_schema.processlist WHERE db = DATABASE() AND command = 'Sleep'",
    }[row.server]
    observer = create_engine(url, poolclass=NullPool)
    with observer.connect() as connection:
        count = partial(connection.scalar, text(ask))
        before = count()
        for _ in range(10):
            assert probe(app).states == {"default": "ok"}
        wait_for(lambda: count() <= before)
    assert not threads()


POOLS = {
    "QueuePool": {"poolclass": QueuePool},
    "NullPool": {"poolclass": NullPool},
    "StaticPool": {"poolclass": StaticPool},
    "SingletonThreadPool": {"poolclass": SingletonThreadPool},
    "AssertionPool": {"poolclass": AssertionPool},
}


@pytest.mark.parametrize("url", ["sqlite://", "{file}", "sqlite:///file:x?mode=memory&cache=shared&uri=true"])
@pytest.mark.parametrize("options", POOLS.values(), ids=POOLS)
def test_engine_that_was_given_answers(make: Any, url: str, options: Any, sqlite_url: str) -> None:
    create_engine(sqlite_url).connect().close()
    engine = create_engine(url.replace("{file}", sqlite_url), **options)
    app = make(engine)
    with engine.connect() as connection:
        assert probe(app).states == {"default": "ok"}
        assert connection.scalar(text("SELECT 1")) == 1


@pytest.mark.parametrize("is_connected", [True, False])
@pytest.mark.parametrize("options", POOLS.values(), ids=POOLS)
def test_creator_makes_the_connection(make: Any, options: Any, is_connected: bool) -> None:
    made: list[sqlite3.Connection] = []

    def creator() -> sqlite3.Connection:
        made.append(sqlite3.connect(":memory:", check_same_thread=False))
        return made[-1]

    engine = create_engine("sqlite:///nowhere/at/all.db", creator=creator, **options)
    app = make(engine)
    if is_connected:
        engine.connect().close()
    used = len(made)
    assert probe(app).states == {"default": "ok"}
    assert len(made) > used
    for each in made[used:]:
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            each.execute("SELECT 1")
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1


@pytest.mark.parametrize("is_connected", [True, False])
def test_connection_that_is_shared_with_the_application_is_left_alone(make: Any, is_connected: bool) -> None:
    shared = sqlite3.connect(":memory:", check_same_thread=False)
    engine = create_engine("sqlite://", creator=lambda: shared, poolclass=StaticPool)
    app = make(engine)
    if is_connected:
        engine.connect().close()
    sent: list[str] = []
    shared.set_trace_callback(sent.append)
    assert [probe(app).states for _ in range(2)] == [{"default": "ok"}] * 2
    assert sent == []
    assert Client(app).get("/database", buffered=True).text == "shop"


@pytest.mark.parametrize("error", [OSError("no"), SystemExit(3), ValueError(f"postgresql://me:{SECRET}@db/shop")])
def test_error_of_a_creator_is_no_error_of_the_answer(
    make: Any, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def creator() -> Any:
        raise error

    app = make(create_engine("sqlite://", creator=creator))
    assert probe(app).states == {"default": "out of reach"}
    assert type(error).__name__ in caplog.text
    assert SECRET not in caplog.text


def test_file_that_is_not_there_is_not_created(make: Any, sqlite_url: str, tmp_path: Path) -> None:
    app = make(sqlite_url)
    assert probe(app).states == {"default": "out of reach"}
    assert os.listdir(tmp_path) == []
    app.app.engine.connect().close()
    assert probe(app).states == {"default": "ok"}


def test_memory_is_the_one_of_the_application(make: Any) -> None:
    app = make("sqlite://")
    with app.app.engine.begin() as connection:
        connection.execute(text("CREATE TABLE health (id INTEGER)"))
        # Nor does the ping wait for who writes.
        assert probe(app).states == {"default": "ok"}
    with app.app.engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM health")) == 0


def test_do_connect_events_of_the_application_are_heard(make: Any, server_url: str) -> None:
    """They may bring the password, such as a token that is valid for a quarter of an hour."""
    engine = create_engine(make_url(server_url).set(host="nowhere.invalid"))
    host = make_url(server_url).host

    @event.listens_for(engine, "do_connect")
    def lead_to_the_server(dialect: Any, record: Any, arguments: list[Any], options: dict[str, Any]) -> None:
        assert record.info == {}
        called.append("before")
        options["host"] = host

    called: list[str] = []
    app = make(engine)
    event.listen(engine, "do_connect", lambda *arguments: called.append("after"))
    assert probe(app).states == {"default": "ok"}
    assert called == ["before", "after"]


def test_connections_of_the_application_keep_their_own_timeouts(make: Any, row: Row) -> None:
    options: list[dict[str, Any]] = []
    engine = create_engine(row.url())
    app = make(engine)
    assert probe(app).ready
    event.listen(engine, "do_connect", lambda dialect, record, arguments, given: options.append({**given}))
    engine.connect().close()
    assert not {"connect_timeout", "read_timeout", "write_timeout"} & options[0].keys()


# -- what counts


def away() -> str:
    return f"postgresql+psycopg://shop:{SECRET}@127.0.0.1:{free_port()}/shop"


def test_open_breaker_is_told(make: Any) -> None:
    app = make(away(), unavailable={"breaker_failures": 1, "breaker_seconds": 60})
    browser = Client(app)
    assert "breaker" not in browser.get("/readyz").text
    assert browser.get("/database", buffered=True).status_code == 503
    said = browser.get("/readyz", headers=JSON).json
    assert said is not None
    assert said["engines"]["default"] == {"state": "out of reach", "breaker": "open"}
    assert browser.get("/readyz", headers={"Accept": "text/plain"}).text.splitlines()[1] == (
        "default: out of reach, breaker open"
    )


def test_listener_of_the_application_makes_the_connection(make: Any, server_url: str) -> None:
    engine = create_engine(server_url)
    event.listen(
        engine, "do_connect", lambda dialect, record, arguments, options: dialect.connect(*arguments, **options)
    )
    assert probe(make(engine)).states == {"default": "ok"}


@pytest.mark.parametrize("who", ["default", "audit", "replicas[0]", "nobody"])
def test_replica_that_is_away_does_not_make_the_site_unready(make: Any, who: str) -> None:
    urls = {name: away() if name == who else "sqlite://" for name in ("default", "audit", "replicas[0]")}
    app = make(urls["default"], binds={"audit": urls["audit"]}, replicas=[urls["replicas[0]"]])
    answer = probe(app)
    assert answer.states == {name: "out of reach" if name == who else "ok" for name in urls}
    assert answer.ready is (who not in ("default", "audit"))


@pytest.mark.parametrize("given", [False, True])
def test_full_pool_is_no_outage(make: Any, database_url: str, given: bool, caplog: pytest.LogCaptureFixture) -> None:
    options = {"pool_size": 1, "max_overflow": 1, "pool_timeout": PATIENCE}
    app = make(create_engine(database_url, **options)) if given else make(database_url, engine_options=options)
    engine = app.app.engine
    with engine.connect():
        assert probe(app).states == {"default": "ok"}
        with engine.connect():
            answer = probe(app)
            assert (answer.status, answer.states) == (200, {"default": "pool full"})
            assert answer.took < PATIENCE / 2
            assert Client(app).get("/readyz").text == "ready\ndefault: pool full\n"
    assert probe(app).states == {"default": "ok"}
    assert [record.getMessage() for record in caplog.records if record.name == LOGGER] == [
        "The health check finds the engine 'default' pool full: each connection is in use, and requests wait for one",
        "The health check finds the engine 'default' ok again",
    ]


@pytest.mark.parametrize("options", [{"pool_size": 0}, {"max_overflow": -1}, {"poolclass": NullPool}])
def test_pool_without_a_limit_is_never_full(make: Any, sqlite_url: str, options: Any) -> None:
    app = make(sqlite_url, engine_options=options)
    with app.app.engine.connect(), app.app.engine.connect():
        assert probe(app).states == {"default": "ok"}


@contextmanager
def account(row: Row) -> Iterator[Any]:
    """The URL of an account that may have one connection."""
    url, name = row.url(), f"health_{uuid4().hex[:12]}"
    administrator = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    create, drop = {
        "postgresql": (
            [f"CREATE ROLE {name} LOGIN PASSWORD '{SECRET}' CONNECTION LIMIT 1"],
            [f"DROP ROLE {name}"],
        ),
        "mariadb": (
            [
                f"CREATE USER {name}@'%' IDENTIFIED BY '{SECRET}' WITH MAX_USER_CONNECTIONS 1",
                f"CREATE USER {name}@localhost IDENTIFIED BY '{SECRET}' WITH MAX_USER_CONNECTIONS 1",
                f"GRANT ALL ON `{url.database}`.* TO {name}@'%'",
                f"GRANT ALL ON `{url.database}`.* TO {name}@localhost",
            ],
            [f"DROP USER {name}@'%'", f"DROP USER {name}@localhost"],
        ),
    }[row.server]
    with administrator.connect() as connection:
        for statement in create:
            connection.execute(text(statement))
        try:
            yield url.set(username=name, password=SECRET)
        finally:
            for statement in drop:
                connection.execute(text(statement))


def connect_at_last(engine: Engine) -> Connection:
    """Connect as soon as the server has noticed that the last connection has gone."""
    found: list[Connection] = []

    def connect() -> bool:
        with suppress(DBAPIError):
            found.append(engine.connect())
        return bool(found)

    wait_for(connect)
    return found[0]


def test_site_that_has_the_last_connection_of_the_server_is_no_outage(
    make: Any, row: Row, caplog: pytest.LogCaptureFixture
) -> None:
    with account(row) as url:
        app = make(url)
        assert probe(app).states == {"default": "ok"}

        with connect_at_last(app.app.engine):
            assert probe(app).states == {"default": "pool full"}
        app.app.dispose()
        other = create_engine(url, poolclass=NullPool)
        with connect_at_last(other):
            assert probe(app).states == {"default": "out of reach"}
    assert SECRET not in caplog.text


# -- servers that are silent


def test_silent_server_is_answered_in_time_and_not_asked_twice(make: Any, row: Row, silent: Silent) -> None:
    url = row.url().set(host="127.0.0.1", port=silent.port, username="shop", password=SECRET)
    app = make(url, timeout=1.0)
    answer = probe(app)
    assert answer.states == {"default": "too slow"}
    assert 0.9 < answer.took < 1 + LATE
    for _ in range(5):
        answer = probe(app)
        assert (answer.status, answer.states) == (503, {"default": "too slow"})
        assert answer.took < LATE
    assert len(silent.accepted) == 1
    assert len(threads()) == 1
    # The driver's own timeout ends it, and the next probe asks again.
    wait_for(lambda: not threads())
    assert probe(app).states == {"default": "too slow"}
    assert len(silent.accepted) == 2


def test_server_that_recovers_is_found_ready(make: Any, row: Row) -> None:
    with Relay(row.url()) as relay:
        app = make(through(relay), timeout=1.0)
        assert probe(app).states == {"default": "ok"}
        relay.is_silent = True
        assert probe(app).states == {"default": "too slow"}
        relay.is_silent = False
        wait_for(lambda: probe(app).ready)
        assert len(relay.accepted) == 3
    wait_for(lambda: not threads())


def test_ping_that_hangs_on_its_connection_is_cut(make: Any, row: Row) -> None:
    """A process that was stopped, or a route that was dropped, after the connection was made."""
    with Relay(row.url()) as relay:
        relay.stops_at = b"SELECT 1"
        app = make(through(relay, **({"sslmode": "disable"} if row.server == "postgresql" else {})), timeout=1.0)
        answer = probe(app)
        assert answer.states == {"default": "too slow"}
        assert answer.took < 1 + LATE
        began = time.monotonic()
        wait_for(lambda: not threads())
        # The drivers of MySQL have a timeout of their own for this, of two seconds; libpq has none.
        assert row.server != "postgresql" or time.monotonic() - began < 1.0
        relay.stops_at = None
        assert probe(app).states == {"default": "ok"}


def test_all_engines_are_asked_at_the_same_time(make: Any, silent: Silent) -> None:
    url = f"postgresql+psycopg://u@127.0.0.1:{silent.port}/x"
    binds = {f"bind{number}": url for number in range(6)}
    app = make(url, timeout=1.0, binds=binds, replicas=[url, "sqlite://"])
    answer = probe(app)
    assert answer.took < 1 + LATE
    assert answer.states == {**dict.fromkeys(["default", *binds, "replicas[0]"], "too slow"), "replicas[1]": "ok"}


def test_probes_at_the_same_time_ask_once(make: Any, silent: Silent) -> None:
    app = make(f"postgresql+psycopg://u@127.0.0.1:{silent.port}/x", timeout=1.0)
    other = HealthMiddleware(app.app, timeout=1.0)  # Another mount of the same application.
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(probe, [app, other] * 8))
    assert {str(answer.states) for answer in answers} == {"{'default': 'too slow'}"}
    assert max(answer.took for answer in answers) < 1 + LATE
    assert len(silent.accepted) == 1


def test_probes_at_the_same_time_are_all_told_that_it_is_ready(make: Any, server_url: str) -> None:
    app = make(server_url)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(probe, [app] * 64))
    assert [answer for answer in answers if not answer.ready] == []
    assert not threads()


def test_pages_are_served_while_a_probe_waits(make: Any, silent: Silent) -> None:
    app = make("sqlite://", timeout=5.0, binds={"away": f"postgresql+psycopg://u@127.0.0.1:{silent.port}/x"})
    with ThreadPoolExecutor(1) as pool:
        probing = pool.submit(probe, app)
        wait_for(lambda: silent.accepted)
        assert Client(app).get("/database", buffered=True).text == "shop"
        assert Client(app).get("/healthz").text == "alive\n"
        assert not probing.done()
        assert probing.result().states == {"default": "ok", "away": "too slow"}


def test_creator_that_hangs_is_tried_again_later_and_later(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now, called, end = [0.0], [], threading.Event()

    def creator() -> Any:
        called.append(now[0])
        end.wait(PATIENCE)
        return sqlite3.connect(":memory:")

    monkeypatch.setattr(pings, "time", SimpleNamespace(monotonic=lambda: now[0]))
    app = make(create_engine("sqlite://", creator=creator), timeout=0.01)
    for minute in range(60):
        now[0] = minute * 60.0
        assert probe(app).states == {"default": "too slow"}
        wait_for(lambda: called)
    wait_for(lambda: len(called) == len(threads()))
    assert called == [0.0, 60.0, 180.0, 420.0, 900.0, 1860.0]
    end.set()
    wait_for(lambda: not threads())
    app.timeout = PATIENCE
    now[0] += 1
    assert probe(app).states == {"default": "ok"}


def test_thread_that_cannot_be_started_is_no_error_of_the_answer(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    app = make()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        assert probe(app).states == {"default": "out of reach"}
    assert probe(app).states == {"default": "ok"}


def test_child_process_asks_although_the_parents_ping_hangs() -> None:
    script = """if True:
        import os, sys, threading
        from werkzeug.test import Client
        from sqlasession_middleware import SQLASessionMiddleware
        from sqlasession_middleware.health import HealthMiddleware

        held, entered = threading.Event(), threading.Event()
        parent = os.getpid()

        def creator():
            import sqlite3
            if os.getpid() == parent:
                entered.set()
                held.wait(60)
            return sqlite3.connect(":memory:")

        from sqlalchemy import create_engine
        app = SQLASessionMiddleware(lambda environ, start: [], create_engine("sqlite://", creator=creator))
        app = HealthMiddleware(app, timeout=0.1)
        assert Client(app).get("/readyz").text == "not ready\\ndefault: too slow\\n"
        assert entered.wait(60)
        app.timeout = 30.0
        child = os.fork()
        if not child:
            print(Client(app).get("/readyz").text, flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        os._exit(0)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=2 * PATIENCE)
    assert (done.returncode, done.stdout) == (0, "ready\ndefault: ok\n\n"), done.stderr


def test_engine_is_not_kept_alive(sqlite_url: str) -> None:
    for url in (sqlite_url, "sqlite://"):
        app = SQLASessionMiddleware(shop, url)
        probe(HealthMiddleware(app))
        engine = weakref.ref(app.engine)
        app.dispose()
        del app
        wait_for(lambda: not threads())
        gc.collect()
        assert engine() is None


# -- no detail for strangers


def test_nothing_secret_is_answered_or_logged(
    make: Any, row: Row, silent: Silent, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    base = row.url().set(username="shop", password=SECRET, host="127.0.0.1")
    urls = {
        "refused": base.set(port=free_port()),
        "silent": base.set(port=silent.port),
        # Where the server trusts anybody, there is at least no such user or database.
        "login": row.url().set(username="nobody_of_that_name", password=SECRET, database="no_such"),
        "name": base.set(host="nowhere.invalid"),
    }
    app = make(urls.pop("refused"), timeout=1.0, binds=urls)
    for headers in ({}, JSON):
        response = Client(app).get("/readyz", headers=headers)
        assert response.status_code == 503
        words = {"not", "ready", "default", "silent", "login", "name", "too", "slow", "out", "of", "reach"}
        if not headers:
            assert set(response.text.replace(":", "").split()) <= words
        else:
            assert response.json is not None
            assert {each for said in response.json["engines"].values() for each in said} == {"state"}
    assert SECRET not in caplog.text
    said = [record.getMessage() for record in caplog.records if record.name == LOGGER]
    assert len(said) == 4
    assert any("127.0.0.1" in each for each in said)


def test_state_is_logged_once_when_it_changes(make: Any, server_url: str, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    with Relay(server_url, port) as relay:
        app = make(through(relay))
        assert [probe(app).ready for _ in range(3)] == [True] * 3
    assert [probe(app).ready for _ in range(3)] == [False] * 3
    with Relay(server_url, port):
        assert [probe(app).ready for _ in range(3)] == [True] * 3
    away, again = (record for record in caplog.records if record.name == LOGGER)
    assert away.getMessage().startswith("The health check finds the engine 'default' out of reach: OperationalError: ")
    assert again.getMessage() == "The health check finds the engine 'default' ok again"
    assert {record.levelname for record in (away, again)} == {"WARNING"}
    assert {record.exc_info for record in (away, again)} == {None}


# -- where the application is found


class Attribute:
    """A middleware with the application in an attribute of a given name."""

    def __init__(self, app: Any, name: str) -> None:
        setattr(self, name, app)

    def __call__(self, environ: Environ, start: StartResponse) -> Any:
        raise AssertionError


def flask_around(app: Any) -> Flask:
    flask = Flask("shop")
    flask.wsgi_app = app  # type: ignore[method-assign]
    return flask


class Anything(Attribute):
    """It has attributes of any name."""

    def __getattr__(self, name: str) -> Any:
        return Anything(None, "x") if name != "app" else self.__dict__["_app"]


AROUND: dict[str, Callable[[Any], Any]] = {
    "itself": lambda app: app,
    "app": lambda app: Attribute(Attribute(app, "app"), "app"),
    "application": lambda app: Attribute(app, "application"),
    "own middlewares": lambda app: UnavailableMiddleware(TransactionMiddleware(app)),
    "health": lambda app: HealthMiddleware(app, live="/live", ready=None),
    "werkzeug": lambda app: ProxyFix(DebuggedApplication(app)),
    "paste": lambda app: gzip(app),
    "flask": flask_around,
    "method": lambda app: Attribute(app, "app").__call__,
    "partial": lambda app: partial(app),
    "dispatcher": lambda app: DispatcherMiddleware(shop, {"/shop": ProxyFix(app)}),
    "dispatcher's default": lambda app: DispatcherMiddleware(app, {"/other": shop, "/same": app}),
    "urlmap": lambda app: mapped({"/shop": app, "/other": shop}),
    "cascade": lambda app: Cascade([shop, app]),
    "anything": lambda app: Anything(app, "_app"),
}


def mapped(apps: dict[str, Any]) -> URLMap:
    urls = URLMap()
    for path, app in apps.items():
        urls[path] = app
    return urls


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_application_is_found_when_others_are_between(make: Any, around: Callable[[Any], Any]) -> None:
    app = make(binds={"mark": "sqlite://"}).app
    assert probe(HealthMiddleware(around(app))).states == {"default": "ok", "mark": "ok"}


def test_application_is_the_one_that_is_given(make: Any) -> None:
    app = make(binds={"mark": "sqlite://"}).app
    for outer in (lambda environ, start: app(environ, start), SQLASessionMiddleware(shop, "sqlite://"), shop):
        assert probe(HealthMiddleware(outer, application=app)).states == {"default": "ok", "mark": "ok"}


@pytest.mark.parametrize("transaction", [False, {"attempts": 2}])
def test_application_is_the_one_around_it(transaction: Any, caplog: pytest.LogCaptureFixture) -> None:
    inner = HealthMiddleware(shop, application=sqlasession_middleware.application)
    apps = [
        SQLASessionMiddleware(inner, "sqlite://", binds={name: "sqlite://"}, transaction=transaction, unavailable=True)
        for name in ("red", "blue")
    ]
    assert [list(probe(app).states) for app in apps] == [["default", "red"], ["default", "blue"]]
    assert Client(apps[0]).get("/healthz").text == "alive\n"
    assert Client(apps[0]).get("/database", buffered=True).text == "shop"
    with pytest.raises(ConfigurationError, match="application is the SQLASessionMiddleware around this one, but there"):
        inner({"REQUEST_METHOD": "GET", "PATH_INFO": "/readyz"}, lambda *head: lambda data: None)
    for app in apps:
        app.dispose()


ONE, OTHER = (SQLASessionMiddleware(shop, "sqlite://") for _ in range(2))

REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "none": (shop, {}, "application is needed, because function leads to no SQLASessionMiddleware: pass the one"),
    "several": (mapped({"/a": ONE, "/b": OTHER}), {}, "application is needed, because URLMap leads to 2 of them"),
    "another kind": (ONE, {"application": shop}, "application must be a SQLASessionMiddleware, got function."),
    "a health": (ONE, {"application": HealthMiddleware(ONE)}, "got HealthMiddleware."),
    "no app": (None, {}, "app must be a WSGI application, a callable, got NoneType."),
    "relative": (ONE, {"live": "healthz"}, "live must be a path that begins with '/', or none, got 'healthz'."),
    "empty": (ONE, {"ready": ""}, "ready must be a path that begins with '/', or none, got ''."),
    "URL": (
        ONE,
        {"ready": f"mysql://me:{SECRET}@db/"},
        "ready must be a path that begins with '/', or none, got a URL.",
    ),
    "same": (ONE, {"live": "/up", "ready": "/up"}, "ready must be another path than 'live', got '/up' for both."),
    "no time": (ONE, {"timeout": 0}, "timeout must be a number of seconds above 0, got 0."),
    "negative": (ONE, {"timeout": -1.0}, "timeout must be a number of seconds above 0, got -1.0."),
    "endless": (ONE, {"timeout": float("inf")}, "timeout must be a number of seconds above 0, got inf."),
    "text": (ONE, {"timeout": "1"}, "timeout must be a number of seconds above 0, got '1'."),
    "true": (ONE, {"timeout": True}, "timeout must be a number of seconds above 0, got True."),
    "endless attributes": (Anything(None, "_app"), {}, "leads to no SQLASessionMiddleware"),
}


@pytest.mark.parametrize(("app", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_error_names_the_option_when_it_is_wrong(app: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        HealthMiddleware(app, **options)
    assert message in str(caught.value)
    assert SECRET not in str(caught.value)


def test_no_application_is_needed_when_nothing_asks_for_it() -> None:
    assert Client(HealthMiddleware(shop, ready=None)).get("/healthz").text == "alive\n"


# -- ini files

DB = """
[filter:db]
use = egg:sqlasession_middleware
sqlalchemy.url = sqlite://
sqlalchemy.binds.mark.url = sqlite://
[app:shop]
use = call:tests.paste_apps:guest_book
"""


@pytest.mark.parametrize(
    ("pipeline", "keys", "path"),
    [
        ("health db shop", "", "/readyz"),
        ("health gzip db shop", "timeout = 2.5\nlive = none", "/readyz"),
        ("db health shop", "application = sqlasession_middleware:application\nready = /up", "/up"),
    ],
)
def test_ini_names_the_filter(pipeline: str, keys: str, path: str, tmp_path: Path) -> None:
    ini = tmp_path / "shop.ini"
    ini.write_text(
        f"[pipeline:main]\npipeline = {pipeline}\n{DB}[filter:gzip]\nuse = egg:Paste#gzip\n"
        f"[filter:health]\nuse = egg:sqlasession_middleware#health\n{keys}\n"
    )
    client = Client(loadapp(f"config:{ini}"))
    assert client.get(path).text == "ready\ndefault: ok\nmark: ok\n"


@pytest.mark.parametrize(
    ("pipeline", "keys", "message"),
    [
        ("health shop", "", "'application' in {ini} is needed, because function leads to no SQLASessionMiddleware"),
        ("health db shop", "timeout = soon", "'timeout' in {ini} must be a number of seconds, got 'soon'."),
        ("health db shop", "timeout = 0", "'timeout' in {ini} must be a number of seconds above 0, got 0."),
        ("health db shop", "live = healthz", "'live' in {ini} must be a path that begins with '/', or none"),
        ("health db shop", "alive = /x", "'alive' in {ini} is not a setting of this middleware; did you mean 'live'?"),
        ("health db shop", "application = no.such:thing", "'application' in {ini} must be the dotted name"),
    ],
)
def test_error_names_the_key_and_the_file(pipeline: str, keys: str, message: str, tmp_path: Path) -> None:
    ini = tmp_path / "shop.ini"
    ini.write_text(
        f"[pipeline:main]\npipeline = {pipeline}\n{DB}"
        f"[filter:health]\nuse = egg:sqlasession_middleware#health\n{keys}\n"
    )
    with pytest.raises(ConfigurationError) as caught:
        loadapp(f"config:{ini}")
    assert message.format(ini=ini) in str(caught.value)


def test_json_is_made_of_texts_only(make: Any) -> None:
    """A name of an engine may be of any language."""
    app = make(binds={"журнал": "sqlite://"})
    assert list(probe(app).states) == ["default", "журнал"]
    assert Client(app).get("/readyz").text == "ready\ndefault: ok\nжурнал: ok\n"
    assert json.loads(Client(app).get("/healthz", headers=JSON).data) == {"alive": True}


def test_connecting_does_not_fail_when_the_first_check_comes_meanwhile(make: Any, sqlite_url: str) -> None:
    """An event of the application may take long, such as one that asks for a token."""
    engine = create_engine(sqlite_url)
    engine.connect().close()
    connecting, probed = threading.Event(), threading.Event()

    @event.listens_for(engine, "do_connect")
    def wait(dialect: Any, record: Any, arguments: list[Any], options: dict[str, Any]) -> None:
        if threading.current_thread().name == "request":
            connecting.set()
            assert probed.wait(PATIENCE)

    engine.dispose()
    app = make(engine)
    failed: list[Exception] = []

    def request() -> None:
        try:
            engine.connect().close()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=request, name="request")
    thread.start()
    assert connecting.wait(PATIENCE)
    assert probe(app).ready
    probed.set()
    thread.join(PATIENCE)
    assert failed == []
