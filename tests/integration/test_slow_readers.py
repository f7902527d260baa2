"""Clients that do not read their finished answers hold no connection (G18): six of them on a pool of two."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gunicorn
import pytest

from ..conftest import DATABASES_SEEN
from ..ports import free_port
from .servers import PATIENCE, ROOT, connect, end_group, request, split
from .slow_app import KINDS, MODES, SLOW, THREADS

MODULE = "tests.integration.slow_app"
DATABASES = ("sqlite", "postgresql")


def gunicorn_command(port: int) -> list[str]:
    # All servers of a user would share one path for the control socket.
    control = ["--no-control-socket"] if gunicorn.version_info >= (25, 1) else []
    return [
        *(sys.executable, "-m", "gunicorn", f"{MODULE}:app", "--bind", f"127.0.0.1:{port}", "--workers", "1"),
        *("--worker-class", "gthread", "--threads", str(THREADS), "--graceful-timeout", "1", *control),
    ]


def waitress_command(port: int) -> list[str]:
    return [sys.executable, "-m", MODULE, str(port)]


SERVERS = {"gunicorn-gthread": gunicorn_command, "waitress": waitress_command}


def get(port: int, path: str) -> tuple[bytes, bytes]:
    """The status line and the body of an answer."""
    with connect(port) as client:
        client.sendall(request("GET", path))
        answer = b""
        while received := client.recv(1 << 16):
            answer += received
    head, body = split(answer)
    return head.splitlines()[0], body


@pytest.fixture(scope="module", params=[(server, database) for database in DATABASES for server in SERVERS])
def port(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of each server in turn, on each of the databases."""
    server, database = request.param
    folder = tmp_path_factory.mktemp(server)
    url = DATABASES_SEEN.url(database, f"sqlite:///{folder}/test.db")
    port, log = free_port(), folder / "log"
    environ = {**os.environ, "SERVED": json.dumps({"url": url}), "PYTHONPATH": os.pathsep.join((str(ROOT), *sys.path))}
    with log.open("wb") as output:
        process = subprocess.Popen(
            SERVERS[server](port), cwd=ROOT, env=environ, stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_for(port, process, log)
        yield port
    finally:
        end_group(process)


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError, IndexError, http.client.HTTPException):
            if b" 200 " in get(port, "/held/plain")[0]:
                return
        time.sleep(0.02)
    pytest.fail(f"the server does not answer:\n{log.read_text(errors='replace')}")


def begin_to_read(port: int, path: str) -> socket.socket:
    """A client that reads the first bytes of an answer, and no more."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # Before connect(), so that it counts.
    client.settimeout(2 * PATIENCE)
    client.connect(("127.0.0.1", port))
    client.sendall(request("GET", path))
    answer = b""
    while b"\r\n\r\n" not in answer:
        received = client.recv(256)
        assert received, answer
        answer += received
    assert b" 200 " in answer.splitlines()[0], answer
    return client


def wait_until_none_is_held(port: int, mode: str) -> None:
    """A client may have the beginning of its answer before the server has taken the rest from the application."""
    deadline = time.monotonic() + PATIENCE
    while (held := get(port, f"/held/{mode}")[1]) != b"0":
        assert time.monotonic() < deadline, f"{held!r} connections are held"
        time.sleep(0.02)


def leave(client: socket.socket) -> None:
    """Reset the connection, so that the server's thread is free at once."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_others_are_answered_when_more_clients_than_connections_do_not_read(port: int, kind: str, mode: str) -> None:
    slow: list[socket.socket] = []
    try:
        for _ in range(SLOW):
            slow.append(begin_to_read(port, f"/{mode}/{kind}"))
            status, body = get(port, f"/{mode}/ordinary")
            assert (b" 200 " in status, body) == (True, b"answer")
        wait_until_none_is_held(port, mode)
    finally:
        for client in slow:
            leave(client)
