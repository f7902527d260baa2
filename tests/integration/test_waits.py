"""How often a request waits for an answer of the database, counted without a clock: see far_proxy.py."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from sqlalchemy import URL, Connection, create_engine
from sqlalchemy.schema import DropSchema

from sqlasession_middleware.tenants import TenantsMiddleware

from ..drivers import Row, rows_of, rows_on
from .far_proxy import FarProxy, can_watch
from .servers import PATIENCE
from .waits import KINDS, MOST, OPTIONS, WARM, Application, by_hand, create, drop, ours, serve

#: The waits of a request by hand, without a ping: the statements, and on PostgreSQL BEGIN, and COMMIT or ROLLBACK. With
#: the drivers of MySQL, which need no BEGIN, the pool sends another ROLLBACK.
BY_HAND = (0, 3, 5, 3, 3, 4)
DRIVERS = rows_on("postgresql", "mariadb")


@pytest.fixture(autouse=True)
def system() -> None:
    if not can_watch():
        message = "this system does not tell what a thread waits for"
        if os.environ.get("CI"):
            pytest.fail(f"{message} and CI is set")
        pytest.skip(message)


@pytest.fixture(params=DRIVERS)
def row(request) -> Row:
    return request.param


@pytest.fixture
def proxy(row) -> Iterator[FarProxy]:
    """A proxy before a database with the tables."""
    url = row.url()
    with disposed(create_engine(url)) as direct, FarProxy(url.host, url.port) as proxy:
        create(direct)
        yield proxy
        drop(direct)


@contextmanager
def disposed(owner: Any) -> Iterator[Any]:
    """An engine, or an application that owns one, whose connections are closed at the end."""
    try:
        yield owner
    finally:
        owner.dispose()


def far(row: Row, proxy: FarProxy) -> URL:
    return row.url().set(host=proxy.host, port=proxy.port)


def assert_waits(proxy: FarProxy, app: Application, name: str, least: int, most: int) -> None:
    """Each request of a kind, once its connection is in the pool, waits that often; if not, show what it sends."""
    method = KINDS[name].method
    for _ in range(WARM):
        serve(app, method)
    for _ in range(3):
        with proxy.watch() as waits:
            serve(app, method)
        assert least <= len(waits) <= most, f"{len(waits)} waits instead of {most}:\n{waits}"


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("options", OPTIONS)
def test_request_waits_for_no_answer_that_it_does_not_need(options, name, row, proxy):
    most = dict(zip(KINDS, MOST[row.module], strict=True))[name]
    with disposed(ours(KINDS[name], far(row, proxy), **OPTIONS[options])) as app:
        # At least once, if it asks the database at all: otherwise nothing was counted.
        assert_waits(proxy, app, name, min(most, 1), most)


READS = [name for name, kind in KINDS.items() if not kind.writes]


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("options", OPTIONS)
def test_read_waits_as_often_where_there_is_a_replica(options, name, row, proxy):
    most = dict(zip(KINDS, MOST[row.module], strict=True))[name]
    url = far(row, proxy)
    with disposed(ours(KINDS[name], url, replicas=[url], **OPTIONS[options])) as app:
        assert_waits(proxy, app, name, min(most, 1), most)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("has_replica", [False, True], ids=["primary", "replica"])
@pytest.mark.parametrize("row", rows_of("psycopg"), indirect=True)
def test_schema_of_a_tenant_is_set_without_a_wait(has_replica, name, row, proxy):
    most = dict(zip(KINDS, MOST[row.module], strict=True))[name]
    most += KINDS[name].writes and has_replica  # After the commit it asks for the position in the server's log.
    url = far(row, proxy)
    tenants = TenantsMiddleware(
        ours(KINDS[name], url).app,
        url,
        tenant=lambda environ: "acme",
        known=["acme"],
        schema="waits_{tenant}",
        replicas=[url] if has_replica else [],
    )
    with disposed(tenants), disposed(create_engine(row.url())) as direct:
        acme = tenants.application("acme")
        acme.create_schema()
        create(acme.engine)
        assert_waits(proxy, tenants, name, min(most, 1), most)
        with direct.begin() as connection:
            connection.execute(DropSchema("waits_acme", cascade=True))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("ping", [False, True], ids=["no ping", "ping"])
def test_session_by_hand_waits_as_often_as_is_known(ping, name, row, proxy):
    """The proxy counts what SQLAlchemy is known to do."""
    waits = dict(zip(KINDS, BY_HAND, strict=True))[name]
    waits += ping and waits > 0
    with disposed(create_engine(far(row, proxy), pool_pre_ping=ping)) as engine:
        assert_waits(proxy, by_hand(KINDS[name], engine), name, waits, waits)


@pytest.fixture
def connection(row, proxy) -> Iterator[Connection]:
    with (
        disposed(create_engine(far(row, proxy), isolation_level="AUTOCOMMIT")) as engine,
        engine.connect() as connection,
    ):
        connection.exec_driver_sql("SELECT 1").one()
        yield connection


# The driver "mariadb" keeps the interpreter to itself while it reads rows, so the proxy could not send the rest.
@pytest.mark.parametrize("row", rows_of("psycopg", "psycopg2", "pymysql", "MySQLdb"), indirect=True)
def test_long_answer_is_waited_for_once(connection, proxy):
    """It is longer than all buffers on its way."""
    with proxy.watch() as waits:
        assert len(connection.exec_driver_sql("SELECT repeat('x', 8000000)").scalar_one()) == 8000000
    assert len(waits) == 1


@pytest.mark.parametrize("row", rows_of("psycopg"), indirect=True)
def test_statements_in_a_pipeline_are_waited_for_once(connection, proxy):
    driver = connection.connection.driver_connection
    with proxy.watch() as waits:
        for number in range(3):
            driver.execute(f"SELECT {number}")
    assert len(waits) == 3
    with proxy.watch() as waits:
        with driver.pipeline():
            cursors = [driver.execute(f"SELECT {number}") for number in range(3)]
        assert [cursor.fetchone() for cursor in cursors] == [(0,), (1,), (2,)]
    assert len(waits) == 1


# -- the proxy by itself


class Echo:
    """A server that sends back each byte that it receives.

    :ivar may: it sends one for each ``release()``.
    :ivar sent: released for each that it has sent.
    """

    def __init__(self) -> None:
        self.may = threading.Semaphore(0)
        self.sent = threading.Semaphore(0)
        self.listener = socket.create_server(("127.0.0.1", 0))

    def serve(self) -> None:
        threads = []
        with suppress(OSError):  # It was closed.
            while True:
                threads.append(threading.Thread(target=self.echo, args=self.listener.accept()))
                threads[-1].start()
        for thread in threads:
            thread.join(PATIENCE)

    def echo(self, client: socket.socket, _: object) -> None:
        with client:
            while data := client.recv(1):
                assert self.may.acquire(timeout=PATIENCE)
                client.sendall(data)
                self.sent.release()

    def allow(self, number: int) -> None:
        """Return when it has sent so many bytes."""
        self.may.release(number)
        for _ in range(number):
            assert self.sent.acquire(timeout=PATIENCE)


@pytest.fixture
def echo() -> Iterator[Echo]:
    echo = Echo()
    thread = threading.Thread(target=echo.serve)
    thread.start()
    yield echo
    echo.listener.shutdown(socket.SHUT_RDWR)
    echo.listener.close()
    thread.join(PATIENCE)


@pytest.fixture
def echo_proxy(echo) -> Iterator[FarProxy]:
    with FarProxy(*echo.listener.getsockname()) as proxy:
        yield proxy


@pytest.fixture
def clients(echo_proxy) -> Iterator[list[socket.socket]]:
    """Two connections to the server."""
    opened = [socket.create_connection((echo_proxy.host, echo_proxy.port)) for _ in range(2)]
    yield opened
    for each in opened:
        each.close()


def test_each_answer_is_waited_for_when_nothing_is_sent_ahead(echo, echo_proxy, clients):
    echo.may.release(3)
    with echo_proxy.watch() as waits:
        for client in (clients[0], clients[0], clients[1]):
            client.sendall(b"1")
            assert client.recv(1) == b"1"
    assert waits.sent == [b"1", b"1", b"1"]


def test_what_is_sent_ahead_is_waited_for_once(echo, echo_proxy, clients):
    """Also if the first answer was there before the second question: nobody has read it."""
    with echo_proxy.watch() as waits:
        for client, data in zip((clients[0], clients[0], clients[1]), (b"1", b"2", b"3"), strict=True):
            client.sendall(data)
            echo.allow(1)
        assert (clients[1].recv(1), clients[0].recv(1), clients[0].recv(1)) == (b"3", b"1", b"2")
    assert waits.sent == [b"123"]


def test_answer_in_pieces_is_waited_for_once(echo, echo_proxy, clients):
    with echo_proxy.watch() as waits:
        clients[0].sendall(b"12")
        for piece in (b"1", b"2"):
            echo.may.release()
            assert clients[0].recv(2) == piece
    assert waits.sent == [b"12"]


def test_answer_that_nobody_reads_is_not_waited_for(echo, echo_proxy, clients):
    with echo_proxy.watch() as waits:
        clients[0].sendall(b"1")
        echo.allow(1)
    assert (waits.sent, waits.unawaited) == ([], b"1")
    assert str(waits).startswith("not waited for")
    echo.may.release()
    with echo_proxy.watch() as waits:
        clients[0].sendall(b"2")
        assert clients[0].recv(2, socket.MSG_WAITALL) == b"12"
    assert waits.sent == [b"2"]


def test_thread_that_waits_for_something_else_gets_no_answer(echo, echo_proxy, clients):
    with echo_proxy.watch() as waits:
        clients[0].sendall(b"1")
        echo.allow(1)
        time.sleep(0.05)
        with pytest.raises(BlockingIOError):
            clients[0].recv(1, socket.MSG_DONTWAIT)
    assert waits.sent == []
    assert clients[0].recv(1) == b"1"
