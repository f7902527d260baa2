"""How long a connection waits for its network: by default, and where the application has said it (G19)."""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from sqlalchemy import URL, Engine, NullPool, Pool, create_engine, event, literal, make_url, select, text
from sqlalchemy.exc import OperationalError

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware._drivers import keepalive, libpq
from sqlasession_middleware._drivers.libpq import LibpqDriver
from sqlasession_middleware._drivers.registry import driver_by_dialect, driver_of

from .drivers import Row, rows_of, rows_on
from .integration.faulty_ways import silent_listener
from .wsgi import Environ, StartResponse, consume, environ, start_response

NETWORKED = rows_on("postgresql", "mariadb")
OF_LIBPQ = rows_on("postgresql")
#: The drivers whose sockets are set.
SET = rows_on("mariadb")
PATIENCE = 60.0
ROOT = Path(__file__).parents[1]
UNIX_SOCKET = {
    "postgresql": "SELECT split_part(current_setting('unix_socket_directories'), ',', 1)",
    "mariadb": "SELECT @@socket",
}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have other options of sockets")


class Watch(NamedTuple):
    """The options of a socket."""

    keepalive: int
    idle: int
    interval: int
    count: int
    user_timeout: int


def watch_of(found: socket.socket) -> Watch:
    tcp = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
    values = [found.getsockopt(socket.IPPROTO_TCP, number) for number in tcp]
    return Watch(found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), *values)


with socket.socket() as new:
    #: What the system sets. Each of the drivers switches keepalives on.
    SYSTEM = watch_of(new)._replace(keepalive=1)
OURS = Watch(keepalive=1, idle=30, interval=10, count=3, user_timeout=60_000)


class Site:
    """An application, and what it has seen of its last connection: arguments of the driver, options of the socket."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.app = SQLASessionMiddleware(self.page, *arguments, **options)
        self.watch: Watch | None = None
        self.family: socket.AddressFamily | None = None
        self.arguments: dict[str, Any] = {}

    def page(self, environ: Environ, start: StartResponse) -> Iterable[bytes]:
        result = session.execute(select(literal(1)))
        connection = result.connection.connection.dbapi_connection  # type: ignore[attr-defined]  # of a CursorResult
        number = driver_of(result.connection).file_number(connection)  # type: ignore[attr-defined]
        assert number is not None
        with socket.socket(fileno=os.dup(number)) as found:
            self.family = socket.AddressFamily(found.family)
            self.watch = watch_of(found) if found.family != socket.AF_UNIX else None
        start("200 OK", [])
        return [b"%d" % result.scalar_one()]

    def note(self, dialect: Any, record: Any, arguments: Any, options: dict[str, Any]) -> None:
        self.arguments = {**options}

    def visit(self, engine: Engine | None = None) -> Site:
        engine = engine or self.app.engine
        event.listen(engine, "do_connect", self.note)
        assert consume(self.app(environ(), start_response)) == b"1"
        self.app.dispose()
        return self


@pytest.fixture(params=NETWORKED)
def row(request: pytest.FixtureRequest) -> Row:
    found: Row = request.param
    return found


def through(url: URL, **query: Any) -> URL:
    return url.update_query_dict({name: str(value) for name, value in query.items()})


def test_connection_is_watched_when_nothing_was_said(row: Row) -> None:
    site = Site(row.url()).visit()
    assert (site.watch, site.arguments["connect_timeout"]) == (OURS, 10)


def test_each_connection_of_a_pool_is_watched(row: Row) -> None:
    """Also those after ``dispose()``."""
    site = Site(row.url(), engine_options={"poolclass": NullPool})
    for _ in range(3):
        site.watch = None
        site.visit()
        assert site.watch == OURS


def test_connections_of_binds_and_replicas_are_watched(row: Row) -> None:
    """A replica that does not answer is passed over sooner."""
    site = Site(row.url(), replicas=[row.url()])
    site.visit(site.app.engines["replicas[0]"])
    assert (site.watch, site.arguments["connect_timeout"]) == (OURS, 3)
    said = Site(row.url(), replicas=[through(row.url(), connect_timeout=7)])
    assert int(said.visit(said.app.engines["replicas[0]"]).arguments["connect_timeout"]) == 7

    def of_bind(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        connection = session.connection(bind_arguments={"bind": app.engines["audit"]})
        number = driver_of(connection).file_number(connection.connection.dbapi_connection)
        with socket.socket(fileno=os.dup(number or 0)) as found:
            seen.append(watch_of(found))
        start("200 OK", [])
        return [b""]

    seen: list[Watch] = []
    app = SQLASessionMiddleware(of_bind, "sqlite://", binds={"audit": row.url()})
    consume(app(environ(), start_response))
    app.dispose()
    assert seen == [OURS]


# What is said to libpq, and what the socket has then.
SAID_TO_LIBPQ: dict[str, tuple[dict[str, int], Watch]] = {
    # libpq sets the user timeout only together with keepalives.
    "off": ({"keepalives": 0}, SYSTEM._replace(keepalive=0)),
    "on": ({"keepalives": 1}, SYSTEM._replace(user_timeout=60_000)),
    # The system would end the connection sooner than these say.
    "idle": ({"keepalives_idle": 120}, SYSTEM._replace(idle=120)),
    "interval": ({"keepalives_interval": 50}, SYSTEM._replace(interval=50)),
    "count": ({"keepalives_count": 20}, SYSTEM._replace(count=20)),
    "user timeout": ({"tcp_user_timeout": 5000}, OURS._replace(user_timeout=5000)),
    "no user timeout": ({"tcp_user_timeout": 0}, OURS._replace(user_timeout=0)),
    "nothing at all": ({"keepalives": 0, "tcp_user_timeout": 0}, SYSTEM._replace(keepalive=0)),
    "connect timeout": ({"connect_timeout": 5}, OURS),
    "no connect timeout": ({"connect_timeout": 0}, OURS),
}


@pytest.mark.parametrize("row", OF_LIBPQ, indirect=True)
@pytest.mark.parametrize(("said", "expected"), SAID_TO_LIBPQ.values(), ids=SAID_TO_LIBPQ)
@pytest.mark.parametrize("place", ["query", "connect_args", "inherited", "connection string"])
def test_what_was_said_to_libpq_stays(row: Row, said: dict[str, int], expected: Watch, place: str) -> None:
    url = row.url()
    if place == "query":
        site = Site(through(url, **said)).visit()
    elif place == "connect_args":
        site = Site(url, engine_options={"connect_args": said}).visit()
    elif place == "inherited":
        site = Site(url, engine_options={"connect_args": said}, replicas=[url])
        site.visit(site.app.engines["replicas[0]"])
    else:
        name = "dsn" if row.module == "psycopg2" else "conninfo"
        string = " ".join(f"{key}={value}" for key, value in said.items())
        site = Site(url, engine_options={"connect_args": {name: string}}).visit()
    assert site.watch == expected
    usual = None if place == "connection string" else 3 if place == "inherited" else 10
    if "connect_timeout" not in said and usual:
        assert site.arguments["connect_timeout"] == usual
    elif place != "connection string":
        assert int(site.arguments["connect_timeout"]) == said["connect_timeout"]
    else:
        assert ("connect_timeout" in site.arguments) is ("connect_timeout" not in said)


@pytest.mark.parametrize("row", OF_LIBPQ, indirect=True)
@pytest.mark.parametrize("place", ["query", "environment", "connection string"])
def test_what_a_service_says_stays(row: Row, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may set anything, and an argument would take precedence."""
    file = tmp_path / "services.conf"
    file.write_text("[shop]\nkeepalives_idle=77\nconnect_timeout=8\ntcp_user_timeout=9000\n")
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    url, options = row.url(), {}
    if place == "query":
        url = through(url, service="shop")
    elif place == "environment":
        monkeypatch.setenv("PGSERVICE", "shop")
    else:
        options["connect_args"] = {"dsn" if row.module == "psycopg2" else "conninfo": "service=shop"}
    site = Site(url, engine_options=options).visit()
    assert site.watch == SYSTEM._replace(idle=77, user_timeout=9000)
    assert not {"connect_timeout", "tcp_user_timeout", "keepalives_idle"} & site.arguments.keys()


@pytest.mark.parametrize("row", OF_LIBPQ, indirect=True)
@pytest.mark.parametrize("replica", [False, True])
def test_what_the_environment_says_stays(row: Row, replica: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "8")
    site = Site(row.url(), replicas=[row.url()] if replica else [])
    site.visit(site.app.engines["replicas[0]"] if replica else None)
    assert "connect_timeout" not in site.arguments
    assert site.watch == OURS


@pytest.mark.parametrize("row", OF_LIBPQ, indirect=True)
def test_parameter_that_an_old_libpq_refuses_is_left_out(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libpq, "HAS_USER_TIMEOUT", 10_000_000)
    assert Site(row.url()).visit().watch == OURS._replace(user_timeout=0)


@pytest.mark.parametrize("row", OF_LIBPQ, indirect=True)
def test_version_of_libpq_is_that_of_the_driver(row: Row) -> None:
    driver = driver_of(make_url(row.url()).get_dialect()())
    assert isinstance(driver, LibpqDriver)
    module = row.url().get_dialect().import_dbapi()
    assert driver.libpq_version(module) > 120000
    assert driver.libpq_version(object()) == 0


@pytest.mark.parametrize("row", SET, indirect=True)
@pytest.mark.parametrize("place", ["query", "connect_args"])
@pytest.mark.parametrize("seconds", [5, 0])
def test_connect_timeout_that_was_said_stays(row: Row, place: str, seconds: int) -> None:
    if row.module == "pymysql":
        seconds = seconds or 31_536_000  # It refuses 0. This is the longest that it accepts.
    if place == "query":
        site = Site(through(row.url(), connect_timeout=seconds)).visit()
    else:
        site = Site(row.url(), engine_options={"connect_args": {"connect_timeout": seconds}}).visit()
    assert site.arguments["connect_timeout"] == seconds
    assert site.watch == OURS


@pytest.mark.parametrize("row", rows_of("MySQLdb", "mariadb"), indirect=True)
@pytest.mark.parametrize("replica", [False, True])
def test_connect_timeout_is_left_to_the_file_that_is_read(row: Row, replica: bool, tmp_path: Path) -> None:
    file = tmp_path / "my.cnf"
    file.write_text("[client]\nconnect_timeout=8\n")
    url = through(row.url(), **{"default_file" if row.module == "mariadb" else "read_default_file": file})
    site = Site(url, replicas=[url] if replica else [])
    site.visit(site.app.engines["replicas[0]"] if replica else None)
    assert "connect_timeout" not in site.arguments
    assert site.watch == OURS


def connect(url: URL) -> Any:
    return create_engine(url).raw_connection().driver_connection


@pytest.mark.parametrize("given", ["creator", "module", "pool", "Engine"])
def test_connections_from_elsewhere_are_left_as_they_are(row: Row, given: str) -> None:
    url, options = row.url(), {}
    bind: Any = url
    if given == "creator":
        options["creator"] = lambda: connect(url)
    elif given == "module":
        options["module"] = url.get_dialect().import_dbapi()
    elif given == "pool":
        options["pool"] = create_engine(url).pool
    else:
        bind = create_engine(url)
    site = Site(bind, **({"engine_options": options} if options else {})).visit()
    assert site.watch == SYSTEM
    assert "connect_timeout" not in site.arguments
    site.app.engine.dispose()


@pytest.mark.parametrize("target", ["Pool", "engine"])
def test_options_that_a_listener_sets_stay(row: Row, target: str) -> None:
    """The way to say it to the drivers that have no words for it."""
    site = Site(row.url())

    def set_idle(driver_connection: Any, record: Any) -> None:
        number = driver_of(site.app.engine).file_number(driver_connection)
        with socket.socket(fileno=os.dup(number or 0)) as found:
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 111)

    whose: Any = Pool if target == "Pool" else site.app.engine
    event.listen(whose, "connect", set_idle)
    try:
        site.visit()
    finally:
        event.remove(whose, "connect", set_idle)
    assert site.watch is not None
    assert site.watch.idle == 111
    if row.server == "mariadb" and target == "Pool":
        assert site.watch == SYSTEM._replace(idle=111)


def test_listener_of_do_connect_may_say_it_as_well(row: Row) -> None:
    site = Site(row.url())

    @event.listens_for(site.app.engine, "do_connect")
    def change(dialect: Any, record: Any, arguments: Any, options: dict[str, Any]) -> None:
        assert options["connect_timeout"] == 10
        options["connect_timeout"] = 4

    assert site.visit().arguments["connect_timeout"] == 4


def test_socket_of_the_file_system_is_no_network(row: Row) -> None:
    engine = create_engine(row.url(), poolclass=NullPool)
    with engine.connect() as connection:
        path = connection.execute(text(UNIX_SOCKET[row.server])).scalar_one().strip()
    if not os.path.exists(path):
        pytest.skip(f"the server is on another machine: there is no {path}")
    query = {"host": path} if row.server == "postgresql" else {"unix_socket": path}
    url = row.url()
    site = Site(URL.create(url.drivername, url.username, url.password, database=url.database, query=query)).visit()
    assert (site.family, site.watch) == (socket.AF_UNIX, None)


@pytest.mark.parametrize("row", OF_LIBPQ, indirect=True)
def test_url_with_several_hosts_is_watched(row: Row) -> None:
    """The first refuses: each host has the timeout for itself."""
    url = row.url()
    hosts = ("127.0.0.1:1", f"{url.host}:{url.port or 5432}")
    query = {"host": hosts}
    site = Site(URL.create(url.drivername, url.username, url.password, database=url.database, query=query)).visit()
    assert (site.watch, site.arguments["connect_timeout"]) == (OURS, 10)


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as listener:
        yield listener.getsockname()[1]


def statuses(app: Any) -> tuple[str, float]:
    seen: list[str] = []
    began = time.monotonic()
    consume(app(environ(), lambda status, headers, exc_info=None: seen.append(status)))
    return seen[-1], time.monotonic() - began


@pytest.mark.parametrize("place", ["query", "connect_args"])
def test_request_ends_when_the_server_accepts_and_says_nothing(row: Row, place: str, silent: int) -> None:
    url, options = row.url().set(host="127.0.0.1", port=silent), {}
    if place == "query":
        url = through(url, connect_timeout=2)
    else:
        options["connect_args"] = {"connect_timeout": 2}
    site = Site(url, engine_options=options, unavailable=True)
    status, seconds = statuses(site.app)
    assert status.startswith("503")
    assert 1.5 < seconds < 9


def test_replica_that_accepts_and_says_nothing_is_passed_over(row: Row, silent: int) -> None:
    replica = through(row.url().set(host="127.0.0.1", port=silent), connect_timeout=2)
    site = Site(row.url(), replicas=[replica])
    assert site.visit().watch == OURS
    began = time.monotonic()
    site.visit()
    assert time.monotonic() - began < 1.5  # It is not tried again so soon.


@pytest.mark.parametrize("row", SET, indirect=True)
def test_connect_timeout_does_not_limit_statements(row: Row) -> None:
    app = SQLASessionMiddleware(sleeps, through(row.url(), connect_timeout=1), transaction=True)
    assert statuses(app)[0] == "200 OK"
    app.dispose()


def sleeps(environ: Environ, start: StartResponse) -> list[bytes]:
    is_postgresql = session.get_bind().dialect.name == "postgresql"
    session.execute(text("SELECT pg_sleep(4)" if is_postgresql else "SELECT SLEEP(4)"))
    start("200 OK", [])
    return [b""]


def test_server_that_takes_its_time_is_not_gone(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its system acknowledges what it gets, and that it is there."""
    url = row.url()
    if row.server == "postgresql":
        url = through(url, keepalives_idle=1, keepalives_interval=1, keepalives_count=1, tcp_user_timeout=1000)
    else:
        times = {socket.TCP_KEEPIDLE: 1, socket.TCP_KEEPINTVL: 1, socket.TCP_KEEPCNT: 1, socket.TCP_USER_TIMEOUT: 1000}
        monkeypatch.setattr(keepalive, "_OPTIONS", times)
    app = SQLASessionMiddleware(sleeps, url, transaction=True)
    assert statuses(app)[0] == "200 OK"
    app.dispose()


@pytest.mark.parametrize("row", rows_of("pymysql"), indirect=True)
def test_read_timeout_of_pymysql_stays(row: Row, silent: int) -> None:
    app = SQLASessionMiddleware(sleeps, through(row.url(), read_timeout=1), unavailable=True)
    assert statuses(app)[0].startswith("503")
    app.dispose()
    url = through(row.url().set(host="127.0.0.1", port=silent), read_timeout=1, connect_timeout=50)
    assert statuses(Site(url, unavailable=True).app)[1] < 9


@pytest.mark.parametrize("row", SET, indirect=True)
def test_socket_of_the_driver_blocks_as_before(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket of Python's with a default timeout makes the descriptor non-blocking, and so that of the driver."""

    def blocks(engine: Engine) -> bool:
        with engine.connect() as connection:
            number = driver_of(engine).file_number(connection.connection.dbapi_connection)
            return os.get_blocking(number or 0)

    usual, ours = create_engine(row.url(), poolclass=NullPool), Site(row.url()).app.engine
    socket.setdefaulttimeout(30)
    try:
        assert blocks(ours) == blocks(usual)
    finally:
        socket.setdefaulttimeout(None)
        ours.dispose()


GREENLETS = """
import gevent.monkey
gevent.monkey.patch_all()
from tests import test_network as tests
from sqlalchemy import make_url

site = tests.Site(make_url({url!r}))
for _ in range(3):
    assert site.visit().watch == tests.OURS, site.watch
print("done")
"""


def test_connections_of_greenlets_are_watched(row: Row) -> None:
    pytest.importorskip("gevent.monkey")
    script = GREENLETS.format(url=row.url().render_as_string(hide_password=False))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.stdout == "done\n", done.stderr


WAITING_BY_A_CALLBACK = """
import gevent.monkey
gevent.monkey.patch_all()
from gevent.socket import wait_read, wait_write
from psycopg2 import extensions

def wait(connection):  # as psycogreen does
    while (state := connection.poll()) != extensions.POLL_OK:
        (wait_read if state == extensions.POLL_READ else wait_write)(connection.fileno())

extensions.set_wait_callback(wait)
import os
from sqlalchemy import URL, select
from sqlalchemy.exc import OperationalError
from sqlasession_middleware import SQLASessionMiddleware
from tests.integration.faulty_ways import full_backlog, silent_listener
from tests.test_network import WAITS

for make in (silent_listener, full_backlog):
    with make() as port:
        for options in WAITS:
            app = SQLASessionMiddleware(
                lambda environ, start: [],
                URL.create("postgresql+psycopg2", "shop", host="127.0.0.1", port=port),
                engine_options={{"connect_args": options}},
            )
            for deadline in (None, 0.3):
                with app.context(**({{"deadline": deadline}} if deadline else {{}})) as session:
                    try:
                        session.scalar(select(1))
                    except OperationalError:
                        assert deadline is None
                    except Exception as error:
                        assert deadline, error
app = SQLASessionMiddleware(lambda environ, start: [], {url!r})
with app.context() as session:
    assert session.scalar(select(1)) == 1
app = SQLASessionMiddleware(lambda environ, start: [], {url!r}, engine_options={{"connect_args": WRONG}})
with app.context() as session:
    try:
        session.scalar(select(1))
    except Exception as error:
        assert "connect_timeout" in str(error), error
print("done")
""".replace("WRONG", '{{"connect_timeout": "soon"}}')
#: Arguments of psycopg2 that limit the time for connecting.
WAITS: list[dict[str, Any]] = [{"connect_timeout": 1}, {"dsn": "connect_timeout=1"}]


@pytest.mark.parametrize("row", rows_of("psycopg2"))
def test_connect_timeout_holds_where_a_callback_waits(row: Row) -> None:
    pytest.importorskip("gevent.monkey")
    script = WAITING_BY_A_CALLBACK.format(url=row.url().render_as_string(hide_password=False))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.stdout == "done\n", done.stderr


def test_what_is_no_socket_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(writing)
    keepalive.keep_alive(reading)
    os.close(reading)
    keepalive.keep_alive(reading)
    # An option that the system does not have.
    monkeypatch.setattr(keepalive, "_OPTIONS", {9999: 1, socket.TCP_KEEPIDLE: 30})
    with closing(socket.socket()) as found:
        keepalive.keep_alive(found.fileno())
        assert watch_of(found) == SYSTEM._replace(idle=30)
    monkeypatch.setattr(os, "name", "nt")
    with closing(socket.socket()) as found:
        keepalive.keep_alive(found.fileno())
        assert watch_of(found) == SYSTEM._replace(keepalive=0)


def wait_in_python(connection: Any) -> None:
    """As psycogreen does, without greenlets."""
    from psycopg2 import extensions

    while (state := connection.poll()) != extensions.POLL_OK:
        with selectors.DefaultSelector() as selector:
            reads = state == extensions.POLL_READ
            selector.register(connection.fileno(), selectors.EVENT_READ if reads else selectors.EVENT_WRITE)
            selector.select()


@pytest.mark.parametrize("options", WAITS)
@pytest.mark.parametrize("row", rows_of("psycopg2"))
def test_callback_that_waits_in_threads_heeds_connect_timeout(row: Row, options: dict[str, Any]) -> None:
    from psycopg2 import extensions

    extensions.set_wait_callback(wait_in_python)
    try:
        with silent_listener() as port:
            url = URL.create("postgresql+psycopg2", "shop", host="127.0.0.1", port=port)
            app = SQLASessionMiddleware.without_app(url, engine_options={"connect_args": options})
            with pytest.raises(OperationalError):
                app.run(lambda: session.scalar(text("SELECT 1")))
            app.dispose()
        for connect_args in ({}, {"connect_timeout": "soon"}):
            app = SQLASessionMiddleware.without_app(row.url(), engine_options={"connect_args": connect_args})
            # libpq itself may refuse what is no number.
            with suppress(OperationalError) if connect_args else nullcontext():
                assert app.run(lambda: session.scalar(text("SELECT 1"))) == 1
            app.dispose()
    finally:
        extensions.set_wait_callback(None)


@pytest.mark.parametrize(
    ("said", "is_cancelled"), [("FATAL:  sorry, too many clients already", True), ("could not connect", False)]
)
def test_full_postgresql_is_asked_to_cancel_by_the_driver_itself(said: str, is_cancelled: bool) -> None:
    def connect() -> Any:
        raise RuntimeError(said)

    driver, asked = driver_by_dialect[make_url("postgresql+psycopg2://").get_dialect()], []
    info = SimpleNamespace(backend_pid=1)
    busy = SimpleNamespace(cancel=lambda: asked.append(True), get_backend_pid=lambda: 1, info=info)
    if is_cancelled:
        assert driver.cancel(busy, connect)
    else:
        with pytest.raises(RuntimeError):
            driver.cancel(busy, connect)
    assert bool(asked) is is_cancelled


def test_time_is_shared_among_hosts_unless_the_driver_has_to_complain() -> None:
    driver = driver_by_dialect[make_url("postgresql+psycopg://").get_dialect()]
    assert driver.share_time({"host": "a,b", "connect_timeout": "soon"}, 8) == {
        "host": "a,b",
        "connect_timeout": "soon",
    }
    assert driver.share_time({"host": "a,b"}, 8) == {"host": "a,b", "connect_timeout": 4}
    assert driver.share_time({"host": "a"}, 8) == {"host": "a"}
