"""Requests end although nobody says that their connection is gone (G19)."""

from __future__ import annotations

import fcntl
import socket
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from wsgiref.types import StartResponse, WSGIEnvironment

import pytest
from sqlalchemy import Column, Integer, MetaData, NullPool, Table, create_engine, event, insert, text
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware._drivers import keepalive
from sqlasession_middleware._drivers.registry import driver_of

from ..drivers import Row, rows_on
from .servers import PATIENCE
from .vanishing import VanishingNetwork

PORTS = {"postgresql": 5432, "mariadb": 3306}
SLEEP = {"postgresql": "SELECT pg_sleep(600) /* {} */", "mariadb": "SELECT SLEEP(600) /* {} */"}
RUNNING = {
    "postgresql": "SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND query LIKE '%/* {} */'",
    "mariadb": "SELECT ID FROM information_schema.PROCESSLIST WHERE ID <> CONNECTION_ID() AND INFO LIKE '%/* {} */'",
}
KILL = {"postgresql": "SELECT pg_terminate_backend({})", "mariadb": "KILL {}"}
#: Far above what the tests allow, and far below what the system by itself takes.
SOON = 20.0

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")


@pytest.fixture(params=rows_on("postgresql", "mariadb"))
def row(request: pytest.FixtureRequest) -> Row:
    found: Row = request.param
    return found


@pytest.fixture
def network(row: Row) -> Iterator[VanishingNetwork]:
    url = row.url()
    with VanishingNetwork(str(url.host), url.port or PORTS[row.server]) as found:
        yield found


class Site:
    """An application whose statements go through a network that can be cut."""

    def __init__(self, row: Row, network: VanishingNetwork, transaction: bool = False, **said: Any) -> None:
        self.network = network
        self.direct = create_engine(row.url(), poolclass=NullPool)
        url = row.url().set(host=network.host, port=network.port)
        self.app = SQLASessionMiddleware(
            self.page,
            url,
            engine_options={"connect_args": said},
            unavailable=True,
            transaction=transaction,
            ping_after=None,
        )
        self.work: Callable[[], None] = lambda: None
        self.descriptor: int | None = None

    def page(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        connection = session.connection()
        self.descriptor = driver_of(connection).file_number(connection.connection.dbapi_connection)
        connection.execute(text("SELECT 1"))
        self.work()
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"done"]

    def ask(self, work: Callable[[], None] = lambda: None) -> tuple[int, float]:
        self.work = work
        began = time.monotonic()
        rescue = threading.Timer(PATIENCE, self.network.end)
        rescue.start()
        try:
            response = Client(self.app).get(buffered=True)
            self.said = response.data
        finally:
            rescue.cancel()
        return response.status_code, time.monotonic() - began

    def unacknowledged(self) -> int:
        """How many bytes were sent to the server, and its system has not said that it has them."""
        assert self.descriptor is not None
        return int.from_bytes(fcntl.ioctl(self.descriptor, termios.TIOCOUTQ, bytes(4)), sys.byteorder)

    def find(self, row: Row, mark: str) -> list[int]:
        with self.direct.connect() as connection:
            return list(connection.execute(text(RUNNING[row.server].format(mark))).scalars())

    def kill(self, row: Row, mark: str) -> None:
        for number in self.find(row, mark):
            with self.direct.connect() as connection:
                connection.execute(text(KILL[row.server].format(number)))


def set_times(row: Row, monkeypatch: pytest.MonkeyPatch, idle: int, user_timeout: int) -> dict[str, int]:
    """Have connections watched with short times: what the application says to a driver, or else our own."""
    if row.server == "postgresql":
        times = {"keepalives_idle": idle, "keepalives_interval": 1, "keepalives_count": 2}
        return {**times, "tcp_user_timeout": user_timeout * 1000}
    options = {
        socket.TCP_KEEPIDLE: idle,
        socket.TCP_KEEPINTVL: 1,
        socket.TCP_KEEPCNT: 2,
        socket.TCP_USER_TIMEOUT: user_timeout * 1000,
    }
    monkeypatch.setattr(keepalive, "_OPTIONS", options)
    return {}


@pytest.mark.parametrize("user_timeout", [3, 0], ids=["both", "keepalives"])
def test_request_ends_when_no_answer_can_come_any_more(
    row: Row, network: VanishingNetwork, user_timeout: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statement has arrived: there is nothing to be acknowledged, and only keepalives find it out."""
    site = Site(row, network, **set_times(row, monkeypatch, idle=1, user_timeout=user_timeout))
    mark = f"vanish {network.port}"
    began = [0.0]

    def cut_when_it_runs() -> None:
        patience = time.monotonic() + PATIENCE
        while (not site.find(row, mark) or site.unacknowledged()) and time.monotonic() < patience:
            time.sleep(0.05)
        began[0] = time.monotonic()
        network.cut()

    assert site.ask()[0] == 200
    cutter = threading.Thread(target=cut_when_it_runs)
    cutter.start()
    status, _ = site.ask(lambda: session.execute(text(SLEEP[row.server].format(mark))) and None)
    seconds = time.monotonic() - began[0]
    cutter.join()
    network.mend()
    site.kill(row, mark)
    assert (status, site.ask()[0]) == (503, 200)
    assert 1 < seconds < SOON
    site.app.dispose()


def test_request_ends_when_nothing_arrives_any_more(
    row: Row, network: VanishingNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was sent is not acknowledged. Keepalives are not sent meanwhile."""
    site = Site(row, network, **set_times(row, monkeypatch, idle=600, user_timeout=2))

    def send_nowhere() -> None:
        network.cut()
        session.execute(text("SELECT 1"))

    assert site.ask()[0] == 200
    status, seconds = site.ask(send_nowhere)
    network.mend()
    assert (status, site.ask()[0]) == (503, 200)
    assert 1 < seconds < SOON
    site.app.dispose()


def test_request_ends_when_no_connection_can_be_made(row: Row, network: VanishingNetwork) -> None:
    site = Site(row, network, connect_timeout=2)
    network.cut()
    status, seconds = site.ask()
    network.mend()
    assert (status, site.ask()[0]) == (503, 200)
    assert seconds < SOON
    site.app.dispose()


def test_outcome_is_unknown_when_the_commit_vanishes(
    row: Row, network: VanishingNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = set_times(row, monkeypatch, idle=1, user_timeout=2)
    site = Site(row, network, transaction=True, **times)
    table = Table("vanishing_item", MetaData(), Column("number", Integer, primary_key=True))
    table.create(site.direct)

    def commit_nowhere() -> None:
        session.execute(insert(table).values(number=1))
        event.listen(site.app.engine, "commit", lambda connection: network.cut(), once=True)

    try:
        assert site.ask()[0] == 200
        status, seconds = site.ask(commit_nowhere)
        said = site.said
        network.mend()
        assert site.ask()[0] == 200
    finally:
        network.end()  # The server knows nothing yet, and keeps the lock.
        site.app.dispose()
        table.drop(site.direct)
    assert status == 500
    assert b"not known" in said
    assert 1 < seconds < SOON
