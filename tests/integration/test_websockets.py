"""Websockets through real servers, with real clients."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import gunicorn
import pytest
from simple_websocket import Client, ConnectionClosed

from ..ports import free_port
from .servers import PATIENCE, ROOT, end_group

MODULE = "tests.integration.websocket_app"
CONTROL = ["--no-control-socket"] if gunicorn.version_info >= (25, 1) else []
GUNICORN = ["-m", "gunicorn", f"{MODULE}:app", "--graceful-timeout", "1", *CONTROL]
#: How each server is started; its port comes last.
SERVERS = {
    "gunicorn-gthread": [*GUNICORN, "--worker-class", "gthread", "--threads", "20", "--bind"],
    "gunicorn-gevent": [*GUNICORN, "--worker-class", "gevent", "--bind"],
    "werkzeug": ["-m", MODULE, "werkzeug"],
    "gevent-websocket": ["-m", MODULE, "gevent-websocket"],
}
WARNING = re.compile(r"WARNING sqlasession_middleware\.transaction The websocket at '/socket' has ended, (.*)")
#: What has to be in no log. Werkzeug's server writes the head of a response that nobody gets: its own affair.
BAD_NEWS = re.compile(r"Traceback|AssertionError|ResourceWarning|\[ERROR\]")


class Server:
    """A server of the application, on a database of its own."""

    def __init__(self, name: str, folder: Path) -> None:
        self.port = free_port()
        self.log = folder / "log"
        address = f"127.0.0.1:{self.port}" if name.startswith("gunicorn") else str(self.port)
        environ = {**os.environ, "DATABASE_URL": f"sqlite:///{folder}/test.db", "PYTHONUNBUFFERED": "1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *SERVERS[name], address],
                cwd=ROOT,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def state(self) -> dict[str, Any]:
        with urlopen(f"http://127.0.0.1:{self.port}/", timeout=PATIENCE) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def wait(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < deadline:
            with suppress(URLError, ConnectionError):
                self.state()
                return
            time.sleep(0.02)
        raise RuntimeError("The server does not answer.")

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for_warnings(self, count: int) -> list[str]:
        """Wait until the log has that many."""
        deadline = time.monotonic() + PATIENCE
        while len(found := WARNING.findall(self.text())) < count:
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.02)
        return found

    def connect(self, path: str) -> Client:
        """A client, which has to send something first: it loses what comes in one piece with the handshake's answer."""
        client = Client.connect(f"ws://127.0.0.1:{self.port}{path}")
        assert isinstance(client, Client)
        return client


@contextmanager
def served(name: str, folder: Path) -> Iterator[Server]:
    server = Server(name, folder)
    try:
        server.wait()
        yield server
    finally:
        end_group(server.process)
        print(server.text())


def receive(client: Client) -> str:
    received = client.receive(timeout=PATIENCE)
    assert isinstance(received, str), "nothing was received"
    return received


def close(client: Client) -> None:
    with suppress(ConnectionClosed):
        client.close()


@pytest.mark.parametrize("name", SERVERS)
def test_waiting_websockets_hold_no_connection_when_there_are_more_of_them(name: str, tmp_path: Path) -> None:
    with served(name, tmp_path) as server, ExitStack() as stack:
        clients = []
        for _ in range(6):
            clients.append(server.connect("/socket?query=read"))
            stack.callback(close, clients[-1])
        for part in (0, 6):
            for number, client in enumerate(clients, part):
                client.send(f"message {number:02}")
                assert receive(client) == f"message {number:02} was here"
            rows = [f"message {number:02}" for number in range(part + 6)]
            assert server.state() == {"rows": rows, "checked_out": 0}
    assert not BAD_NEWS.search(server.text())
    assert WARNING.findall(server.text()) == []


@pytest.mark.parametrize("name", SERVERS)
def test_log_says_once_what_was_not_committed_when_a_websocket_ends(name: str, tmp_path: Path) -> None:
    """The transaction commits nothing, on each server; what the application has committed was here."""
    with served(name, tmp_path) as server:
        # The one that commits ends before the other: after that one's warning its end was seen, too.
        for query in ("commit", "lose"):
            client = server.connect(f"/socket?query={query}")
            client.send(query)
            assert receive(client) == f"{query} was here"
            close(client)
        (said,) = server.wait_for_warnings(1)
        assert "rolled back with uncommitted changes" in said
        assert server.state() == {"rows": ["commit"], "checked_out": 0}
    assert len(WARNING.findall(server.text())) == 1
    assert not BAD_NEWS.search(server.text())


@pytest.mark.parametrize("name", ["gunicorn-gthread", "werkzeug"])
def test_events_are_stored_when_flask_socketio_has_threads(name: str, tmp_path: Path) -> None:
    with served(name, tmp_path) as server, ExitStack() as stack:
        clients = []
        for _ in range(4):
            client = server.connect("/socket.io/?EIO=4&transport=websocket")
            stack.callback(close, client)
            client.send("40")
            assert receive(client).startswith("0{")  # Engine.IO is open.
            assert receive(client).startswith("40{")  # And so is Socket.IO.
            clients.append(client)
        assert server.state() == {"rows": [], "checked_out": 0}
        for number, client in enumerate(clients):
            client.send(f'42["message","event {number}"]')
            assert receive(client) == f'42["message","event {number} was here"]'
        assert server.state() == {"rows": [f"event {number}" for number in range(4)], "checked_out": 0}
    assert not BAD_NEWS.search(server.text())
    assert WARNING.findall(server.text()) == []
