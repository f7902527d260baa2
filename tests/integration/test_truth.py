"""What a client sees and what the database holds, whatever goes wrong: no success without rows, no failure with some.

The table is in ``truth_app.py``. Here real servers answer it, and the client is a socket that believes what HTTP's
framing says: a response is complete where its Content-Length or its last chunk was reached, and else it was cut.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple
from uuid import uuid4

import pytest

from ..conftest import DATABASES, DATABASES_SEEN
from . import truth_app
from .servers import Command, Kind, Server, connect, gunicorn_command
from .truth_app import (
    ANYTHING,
    BODY,
    CUT,
    DECISIONS,
    ERROR,
    EXITS,
    KILLED,
    KINDS,
    LARGE_CHUNK,
    LEAVES,
    ROWS,
    THREADS,
    WHOLE,
    WORKS,
    Case,
    Observer,
    Row,
    observing,
    table,
    without_repetitions,
)

WORKING = Case("2xx", KINDS["list"], WORKS)


def own_command(name: str) -> Command:
    return lambda port: [sys.executable, "-m", truth_app.__name__, name, str(port)]


def gunicorn_gthread_command(port: int) -> list[str]:
    command = gunicorn_command("gthread", "--threads", str(THREADS))(port)
    command[command.index("gunicorn") + 1] = f"{truth_app.__name__}:served()"
    return command


def most(database: str) -> list[Case]:
    """All that a server could make something else of. The whole table is in ``test_transaction_table.py``."""
    cases = without_repetitions(table(database))
    return [case for case in cases if database == "postgresql" or case.status_class in ("2xx", "4xx")]


def reduced(database: str) -> list[Case]:
    """A success with every fault, and a failure. A kill ends a worker of gunicorn, which takes time: few of them."""
    some = ("list", "length", "generator")
    return [
        case
        for case in table(database)
        if (case.status_class == "2xx" and case.fault not in (KILLED, EXITS))
        or (case.status_class == "2xx" and case.kind.name in some and database == "postgresql")
        or (case.status_class == "5xx" and case.kind.name in some and case.fault not in (KILLED, EXITS))
    ]


def fewest(database: str, but: tuple[str, ...] = (KILLED, EXITS)) -> list[Case]:
    """The same, on the database with the most faults. SystemExit may end a server of one process for good."""
    return [case for case in reduced(database) if database == "postgresql" and case.fault not in but]


# Not uWSGI: it ends a body of unknown length with the connection (PEP 3333 lets it), where nobody sees what is missing.
SERVERS: dict[str, tuple[Command, Callable[[str], list[Case]]]] = {
    "waitress": (own_command("waitress"), most),
    "gunicorn-gthread": (gunicorn_gthread_command, reduced),
    "cheroot": (own_command("cheroot"), fewest),
    "werkzeug": (own_command("werkzeug"), fewest),
    # It takes all of a body, whether there is still somebody who wants it or not.
    "a2wsgi": (own_command("a2wsgi"), partial(fewest, but=(KILLED, EXITS, LEAVES))),
}


class Seen(NamedTuple):
    """What a client can tell of its response.

    :param status: 0 where not even the head came.
    :param complete: whether it has all that the head announced.
    """

    status: int
    complete: bool
    body: bytes

    @property
    def succeeded(self) -> bool:
        return self.complete and 200 <= self.status < 400

    @classmethod
    def of(cls, answer: bytes, method: str) -> Seen:
        head, end, body = answer.partition(b"\r\n\r\n")
        if not end:
            return cls(0, False, b"")
        first, *lines = head.decode("latin-1").lower().split("\r\n")
        status = int(first.split()[1])
        headers = dict(line.split(": ", 1) for line in lines)
        if method == "HEAD" or status in (204, 304):
            return cls(status, True, b"")
        if headers.get("transfer-encoding") == "chunked":
            return cls(status, *unchunk(body))
        # No server of these tests may leave it to the end of the connection, where nobody sees what is missing.
        return cls(status, len(body) == int(headers["content-length"]), body)


#: What a client sees that leaves.
LEFT = Seen(0, False, b"")


def unchunk(coded: bytes) -> tuple[bool, bytes]:
    """Whether the last chunk is there, and the others."""
    body = b""
    while True:
        size, end, coded = coded.partition(b"\r\n")
        length = int(size, 16) if end else 0
        if not end or len(coded) < length + 2:
            return False, body + coded
        if not length:
            return True, body
        body += coded[:length]
        coded = coded[length + 2 :]


class Client:
    """Asks for cases, and looks into the database afterwards."""

    def __init__(self, server: Server, observer: Observer) -> None:
        self.server = server
        self.observer = observer

    def send(self, case: Case, ident: str, **more: str) -> socket.socket:
        client = connect(self.server.port)
        client.sendall(
            f"{case.kind.method} /?{case.query(ident, **more)} HTTP/1.1\r\nHost: localhost\r\n"
            f"Connection: close\r\n\r\n".encode()
        )
        return client

    def ask(self, case: Case, ident: str, **more: str) -> Seen:
        """Read everything that comes."""
        with self.send(case, ident, **more) as client:
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while received := client.recv(1 << 16):
                    answer += received
        return Seen.of(answer, case.kind.method)

    def ask_and_leave(self, case: Case, ident: str) -> Seen:
        """Leave without a word, where the application is half-way."""
        with self.send(case, ident) as client:
            assert self.admin("reached", ident)["calls"] == 1
            if case.kind.streamed:
                read = 0
                while read < len(LARGE_CHUNK):
                    received = client.recv(1 << 16)
                    assert received
                    read += len(received)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.admin("left", ident)
        return LEFT

    def ask_to_be_killed(self, case: Case, ident: str) -> Seen:
        """Read until there is nothing more to come: some servers then leave the connection as it is."""
        with self.send(case, ident) as client:
            answer = b""
            over = False
            with contextlib.suppress(ConnectionResetError):
                while True:
                    if select.select([client], [], [], 0.02)[0]:
                        received = client.recv(1 << 16)
                        if not received:
                            break
                        answer += received
                    elif over:
                        break
                    else:
                        found = self.admin("", ident)
                        over = found["killed"] and found["checked out"] == 0
        return Seen.of(answer, case.kind.method)

    def admin(self, page: str, ident: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.server.get(f"/admin/{page}?ident={ident}"))
        return found

    def assert_idle(self) -> None:
        """No connection is checked out, or will soon be none."""
        self.server.wait_for(checked_out=0, problems=[])


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], Client]]:
    """Each server on each database, started where it is first asked for."""
    with contextlib.ExitStack() as stack:

        @cache
        def observe(database: str) -> Observer:
            folder = tmp_path_factory.mktemp(database)
            return stack.enter_context(observing(DATABASES_SEEN.url(database, f"sqlite:///{folder}/test.db")))

        @cache
        def start(database: str, name: str) -> Client:
            observer = observe(database)
            url = observer.engine.url.render_as_string(hide_password=False)
            settings = {"token": uuid4().hex, "url": url, "table": Row.__tablename__}
            server = Server(Kind(name, SERVERS[name][0]), database, tmp_path_factory.mktemp(name) / "log", settings)
            server.start()
            stack.callback(server.stop)
            return Client(server, observer)

        yield start


@pytest.fixture
def client(database: str, server: str, started: Callable[[str, str], Client]) -> Iterator[Client]:
    """A client of the server; the server's log of this test is shown where the test fails."""
    client = started(database, server)
    with client.server.log.open("rb") as log:
        log.seek(0, os.SEEK_END)
        yield client
        print(log.read().decode(errors="replace"))


# Database and server are a part of the case: not each has every line of the table.
CASES = [
    pytest.param(database, server, case, id=f"{database}-{server}-{case}")
    for database in DATABASES
    for server, (_, cases) in SERVERS.items()
    for case in cases(database)
]


@pytest.mark.parametrize(("database", "server", "case"), CASES)
def test_success_is_stored_and_failure_is_not_when(client: Client, case: Case) -> None:
    ident = uuid4().hex
    ask = {LEAVES: client.ask_and_leave, KILLED: client.ask_to_be_killed, EXITS: client.ask_to_be_killed}
    seen = ask.get(case.fault, client.ask)(case, ident)
    client.assert_idle()
    stored = client.observer.stored(ident)
    expected, is_stored = case.outcome
    assert stored == (ROWS if is_stored else set())
    if not case.documented:
        assert seen.succeeded == bool(stored)
    if expected is not ANYTHING:
        assert (seen.complete, seen.status) == {
            WHOLE: (True, int(case.status[:3])),
            CUT: (False, int(case.status[:3])),
            ERROR: (True, 500),
        }[expected]
    if case.is_unknown:
        assert b"not known whether" in seen.body
    # The next request finds nothing amiss.
    ident = uuid4().hex
    assert client.ask(WORKING, ident) == (201, True, BODY)
    assert client.observer.stored(ident) == ROWS


@pytest.mark.parametrize("kind", ["list", "generator", "head"])
@pytest.mark.parametrize(("status_class", "asked", "is_stored"), DECISIONS.values(), ids=DECISIONS)
@pytest.mark.parametrize(("database", "server"), [("sqlite", "waitress")])
def test_application_has_the_last_word_where(
    client: Client, kind: str, status_class: str, asked: dict[str, str], is_stored: bool
) -> None:
    case = Case(status_class, KINDS[kind], WORKS)
    ident = uuid4().hex
    seen = client.ask(case, ident, **asked)
    assert (seen.complete, seen.status) == (True, int(case.status[:3]))
    client.assert_idle()
    assert client.observer.stored(ident) == (ROWS if is_stored else set())
