"""A failover after which the old primary stays up and refuses to write: its connections are given up (G11, G12)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from sqlalchemy import URL, Column, Engine, Integer, MetaData, Table, create_engine, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from sqlasession_middleware import SQLASessionMiddleware, session
from tests.drivers import Row, rows_of
from tests.test_unavailable import call
from tests.wsgi import Environ, StartResponse

from .own_servers import PASSWORD, OwnMariaDB, OwnPostgreSQL, OwnServer, running
from .proxy import Proxy
from .servers import PATIENCE

TABLE = Table("failover", MetaData(), Column("n", Integer))
SIZE = 3
PLAIN = [("Content-Type", "text/plain")]
KINDS: dict[str, type[OwnServer]] = {"postgresql": OwnPostgreSQL, "mariadb": OwnMariaDB}
#: What makes a server refuse to write, and allow it again. Open connections stay, as with Aurora, a managed server
#: whose disk is full, and a proxy or virtual address that is moved.
FENCES = {
    "postgresql": ("ALTER SYSTEM SET default_transaction_read_only = {}", "SELECT pg_reload_conf()"),
    "mariadb": ("SET GLOBAL read_only = {}",),
}


class Pair:
    """Two servers at one address, of which one is the primary."""

    def __init__(self, kind: str, old: OwnServer, new: OwnServer, proxy: Proxy) -> None:
        self.kind, self.old, self.new, self.proxy = kind, old, new, proxy

    def url(self, row: Row) -> URL:
        row.url()  # Skips where the driver is not installed.
        return URL.create(row.dialect, "writer", PASSWORD, self.proxy.host, self.proxy.port, "outage")

    def fence(self, on: bool) -> None:
        self.old.administer(*(statement.format("ON" if on else "OFF") for statement in FENCES[self.kind]))
        if self.kind == "postgresql":
            # The process that makes new connections has told the others by the time that one has the new setting.
            self._wait_for_setting("on" if on else "off")

    def _wait_for_setting(self, expected: str) -> None:
        engine = create_engine(self.old.administration, poolclass=NullPool)
        deadline = time.monotonic() + PATIENCE
        while True:
            with engine.connect() as connection:
                if connection.scalar(text("SHOW default_transaction_read_only")) == expected:
                    return
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def fail_over(self) -> None:
        """The old primary refuses to write, and the address leads to the new one."""
        self.fence(on=True)
        self.proxy.database = "127.0.0.1", self.new.port

    def numbers(self, server: OwnServer) -> list[int]:
        engine = create_engine(server.url, poolclass=NullPool)
        with engine.connect() as connection:
            return list(connection.scalars(select(TABLE.c.n).order_by(TABLE.c.n)))

    @contextmanager
    def before(self) -> Iterator[None]:
        """Begin with the old server as the primary, and empty tables."""
        self.fence(on=False)
        self.proxy.database = "127.0.0.1", self.old.port
        for server in (self.old, self.new):
            engine = create_engine(server.url, poolclass=NullPool)
            TABLE.drop(engine, checkfirst=True)
            TABLE.create(engine)
            if self.kind == "postgresql":
                with engine.begin() as connection:
                    connection.execute(text("GRANT ALL ON failover TO writer"))
        yield


@contextmanager
def pair_of(kind: str) -> Iterator[Pair]:
    with ExitStack() as stack:
        old, new = (stack.enter_context(running(KINDS[kind])) for _ in range(2))
        for server in (old, new):
            if kind == "postgresql":
                server.administer(f"CREATE ROLE writer LOGIN PASSWORD '{PASSWORD}'")
            else:  # Without the privilege to write on a server that is read-only.
                server.administer(
                    f"CREATE USER writer@'127.0.0.1' IDENTIFIED BY '{PASSWORD}'",
                    "GRANT SELECT, INSERT ON outage.* TO writer@'127.0.0.1'",
                    "REVOKE READ ONLY ADMIN ON *.* FROM outage@'127.0.0.1'",
                )
        proxy = stack.enter_context(Proxy(kind, "127.0.0.1", old.port))
        yield Pair(kind, old, new, proxy)


@pytest.fixture(scope="module")
def pairs() -> Iterator[dict[str, Pair]]:
    with ExitStack() as stack:
        made: dict[str, Pair] = {}

        class Pairs(dict[str, Pair]):
            def __missing__(self, kind: str) -> Pair:
                self[kind] = found = stack.enter_context(pair_of(kind))
                return found

        yield Pairs(made)


#: MariaDB Connector/Python keeps Python's lock in some of its calls, and the proxy is a thread of this process.
@pytest.fixture(params=rows_of("psycopg", "psycopg2", "pymysql", "MySQLdb"))
def row(request: pytest.FixtureRequest) -> Row:
    found: Row = request.param
    return found


@pytest.fixture
def pair(row: Row, pairs: dict[str, Pair]) -> Iterator[Pair]:
    with pairs[row.server].before():
        yield pairs[row.server]


class Writing:
    """An application that inserts the number of the request."""

    def __init__(self) -> None:
        self.attempts: list[tuple[int, int]] = []

    def __call__(self, environ: Environ, start: StartResponse) -> Iterable[bytes]:
        number = int(environ["PATH_INFO"].strip("/"))
        self.attempts.append((number, environ.get("sqlasession.attempt", 1)))
        session.execute(insert(TABLE).values(n=number))
        self.inserted()
        if "sqlasession.attempt" not in environ:
            session.commit()
        start("200 OK", PLAIN)
        return [b"done"]

    def inserted(self) -> None:
        pass


def fill_pool(engine: Engine) -> None:
    with ExitStack() as stack:
        for _ in range(SIZE):
            stack.enter_context(engine.connect())


def wrap(app: Any, url: URL, **options: Any) -> SQLASessionMiddleware:
    wrapped = SQLASessionMiddleware(app, url, engine_options={"pool_size": SIZE}, **options)
    fill_pool(wrapped.engine)
    return wrapped


def test_request_is_repeated_on_the_new_primary_when_the_old_one_refuses_to_write(pair: Pair, row: Row) -> None:
    app = Writing()
    wrapped = wrap(app, pair.url(row), transaction={"attempts": 2, "backoff_base": 0}, unavailable=True)
    assert call(wrapped, PATH_INFO="/1", REQUEST_METHOD="POST")[0] == "200 OK"
    pair.fail_over()
    for number in range(2, 2 + 2 * SIZE):
        assert call(wrapped, PATH_INFO=f"/{number}", REQUEST_METHOD="POST")[0] == "200 OK"
    assert [number for number, attempt in app.attempts if attempt == 2] == [2]
    assert pair.numbers(pair.old) == [1]
    assert pair.numbers(pair.new) == list(range(2, 2 + 2 * SIZE))
    wrapped.dispose()


@pytest.mark.parametrize("feature", ["transaction", "unavailable"])
def test_next_request_finds_the_new_primary_when_the_old_one_refuses_to_write(
    pair: Pair, row: Row, feature: str
) -> None:
    wrapped = wrap(Writing(), pair.url(row), **{feature: True})
    pair.fail_over()
    if feature == "unavailable":
        assert call(wrapped, PATH_INFO="/1")[0] == "503 Service Unavailable"
    else:
        with pytest.raises(DBAPIError):
            call(wrapped, PATH_INFO="/1")
    for number in range(2, 2 + 2 * SIZE):
        assert call(wrapped, PATH_INFO=f"/{number}")[0] == "200 OK"
    wrapped.dispose()


def test_request_is_repeated_when_the_old_primary_refuses_to_commit(pair: Pair, row: Row) -> None:
    """MariaDB rolls back; PostgreSQL lets a transaction that has begun commit."""
    app = Writing()
    wrapped = wrap(app, pair.url(row), transaction={"attempts": 2, "backoff_base": 0}, unavailable=True)
    app.inserted = lambda: None if len(app.attempts) > 1 else pair.fail_over()  # type: ignore[method-assign]
    assert call(wrapped, PATH_INFO="/1", REQUEST_METHOD="POST")[0] == "200 OK"
    assert pair.numbers(pair.old) + pair.numbers(pair.new) == [1]
    wrapped.dispose()


def test_connections_are_kept_when_the_application_has_made_its_transaction_read_only(pair: Pair, row: Row) -> None:
    def number_of_connection() -> int:
        query = "SELECT pg_backend_pid()" if row.server == "postgresql" else "SELECT connection_id()"
        return int(session.scalar(text(query)) or 0)

    seen: list[int] = []

    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        if row.server == "postgresql":
            session.execute(text("SET TRANSACTION READ ONLY"))
        else:
            session.connection().exec_driver_sql("START TRANSACTION READ ONLY")
        seen.append(number_of_connection())
        session.execute(insert(TABLE).values(n=1))
        return []

    wrapped = SQLASessionMiddleware(app, pair.url(row), unavailable=True, transaction={"attempts": 2})
    for _ in range(2):
        assert call(wrapped)[0] == "503 Service Unavailable"
    assert len(seen) == 2
    assert len(set(seen)) == 1
    wrapped.dispose()
