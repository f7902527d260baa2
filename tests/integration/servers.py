"""Real servers as subprocesses, and clients for them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gunicorn

from ..ports import free_port
from .served import CHUNK, STREAM_STEPS, THREADS

ROOT = Path(__file__).parents[2]
MODULE = "tests.integration.served"
#: Seconds to wait for anything that should happen soon. Long, because only a failing test waits this long.
PATIENCE = 60.0

Command = Callable[[int], list[str]]


def own_command(name: str) -> Command:
    return lambda port: [sys.executable, "-m", MODULE, name, str(port)]


def gunicorn_command(worker: str, *options: str) -> Command:
    # All servers of a user would share one path for the control socket.
    control = ["--no-control-socket"] if gunicorn.version_info >= (25, 1) else []
    return lambda port: [
        *(sys.executable, "-m", "gunicorn", f"{MODULE}:app", "--bind", f"127.0.0.1:{port}"),
        *("--workers", "1", "--worker-class", worker, "--graceful-timeout", "1", *options, *control),
    ]


def uwsgi_command(port: int) -> list[str]:
    return [
        *(os.path.join(sysconfig.get_path("scripts"), "uwsgi"), "--http-socket", f"127.0.0.1:{port}"),
        *("--home", sys.prefix, "--pythonpath", str(ROOT), "--module", f"{MODULE}:app", "--need-app"),
        # Otherwise, a reader that waits longer than four seconds is disconnected.
        *("--threads", str(THREADS), "--socket-timeout", "60", "--die-on-term"),
    ]


@dataclass(frozen=True)
class Kind:
    """A server to test.

    :param streams: the number of streams that it can have open while it still answers other requests.
    :param file_wrapper: whether it has a ``wsgi.file_wrapper``.
    :param hangs_up: whether it closes connections without announcing it in its answer.
    """

    name: str
    command: Command
    streams: int = THREADS - 2
    file_wrapper: bool = False
    hangs_up: bool = False


KINDS = {
    kind.name: kind
    for kind in (
        Kind("waitress", own_command("waitress"), file_wrapper=True),
        Kind("gunicorn-sync", gunicorn_command("sync"), streams=0, file_wrapper=True),
        Kind("gunicorn-gthread", gunicorn_command("gthread", "--threads", str(THREADS)), file_wrapper=True),
        Kind("gunicorn-gevent", gunicorn_command("gevent"), file_wrapper=True),
        Kind("uwsgi", uwsgi_command, file_wrapper=True, hangs_up=True),
        Kind("cheroot", own_command("cheroot")),
        Kind("werkzeug", own_command("werkzeug")),
        Kind("a2wsgi", own_command("a2wsgi")),
    )
}


def end_group(leader: subprocess.Popen[bytes]) -> None:
    """End a process and its child processes, by force if necessary."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        leader.wait(5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)
    leader.wait()


@dataclass
class Server:
    """One running server."""

    kind: Kind
    database: str
    log: Path
    settings: dict[str, Any]
    port: int = 0
    failures: int = 0
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        """Return when it answers.

        :raises RuntimeError: if it ends, or does not answer in time.
        """
        self.port = free_port()
        environ = {**os.environ, "SERVED": json.dumps(self.settings), "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.kind.command(self.port),
                cwd=ROOT,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError, http.client.HTTPException):
                assert self.admin()["token"] == self.settings["token"]
                return
            time.sleep(0.02)
        self.stop()
        raise RuntimeError(f"{self.kind.name} does not answer:\n{self.log.read_text(errors='replace')}")

    def stop(self) -> None:
        """End the server and its workers."""
        end_group(self.process)

    def admin(self) -> dict[str, Any]:
        head, body = split(self.raw("GET", "/admin/"))
        assert b" 200 " in head.splitlines()[0], head
        found: dict[str, Any] = json.loads(body)
        return found

    def wait_for(self, **expected: Any) -> dict[str, Any]:
        """Query the admin route until it reports the expected values. Fails with the values that it reports instead."""
        deadline = time.monotonic() + PATIENCE
        while True:
            found = self.admin()
            seen = {name: found[name.replace("_", " ")] for name in expected}
            if seen == expected:
                return found
            assert time.monotonic() < deadline, f"expected {expected}, found {found}"
            time.sleep(0.02)

    def wait_until_idle(self, failures: Collection[int] = (0,)) -> dict[str, Any]:
        """Wait until no connection is in use, no body is open and no Session exists. No request may have had a problem.

        :param failures: the numbers of finishers that may have failed since the last call.
        """
        found = self.wait_for(checked_out={"a": 0, "b": 0}, open=0, alive=0, bodies=0)
        assert found["problems"] == []
        seen, self.failures = self.failures, len(found["failures"])
        assert len(found["failures"]) - seen in failures, found["failures"][seen:]
        assert "was dropped with its session open" not in self.log.read_text(errors="replace")
        return found

    def wait_for_log(self, pattern: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not re.search(pattern, self.log.read_text(errors="replace")):
            assert time.monotonic() < deadline, f"the log has no {pattern!r}"
            time.sleep(0.02)

    def raw(self, method: str, target: str, body: bytes = b"") -> bytes:
        """The server's whole answer, byte by byte, except the date."""
        with connect(self.port) as client:
            client.sendall(request(method, target, body))
            answer = bytearray()
            with contextlib.suppress(ConnectionResetError):
                while received := client.recv(1 << 16):
                    answer += received
        head, separator, rest = bytes(answer).partition(b"\r\n\r\n")
        lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"date:")]
        return b"\r\n".join(lines) + separator + rest

    def get(self, target: str) -> bytes:
        """The body of a 200."""
        head, body = split(self.raw("GET", target))
        assert b" 200 " in head.splitlines()[0], head
        return body


def connect(port: int, buffer: int | None = None) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), 2 * PATIENCE)
    if buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    return client


def request(method: str, target: str, body: bytes = b"") -> bytes:
    length = f"Content-Length: {len(body)}\r\n" if method == "POST" else ""
    return f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{length}\r\n".encode() + body


def split(answer: bytes) -> tuple[bytes, bytes]:
    """Head and body of an answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" not in head.lower():
        return head, body
    chunks = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        chunks += body[: int(size, 16)]
        body = body[int(size, 16) + 2 :]
    return head, chunks


class Reader:
    """A client of a stream that reads only when a test calls it."""

    def __init__(self, server: Server, name: str, ident: str) -> None:
        self.expected = (f"{name} {ident} {step}\n".encode().ljust(CHUNK, b".") for step in range(STREAM_STEPS))
        self.socket = connect(server.port, buffer=64 * 1024)
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port)
        self.connection.sock = self.socket
        self.connection.request("GET", f"/{name}/stream?ident={ident}", headers={"Connection": "close"})
        self.response = self.connection.getresponse()
        self.read_one()

    def read_one(self) -> bool:
        """Read a chunk; False if there is none left."""
        expected = next(self.expected, b"")
        found = self.response.read(len(expected) or 1)
        assert found == expected
        return bool(found)

    def read_rest(self) -> None:
        while self.read_one():
            pass
        self.close()

    def close(self) -> None:
        self.response.close()
        self.connection.close()

    def reset(self) -> None:
        """Reset the connection, as a machine does after a power failure."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()


@contextlib.contextmanager
def readers(server: Server, count: int) -> Iterator[list[Reader]]:
    """Clients of streams of both applications. Each has read its first chunk."""
    opened: list[Reader] = []
    try:
        for number in range(count):
            opened.append(Reader(server, "ab"[number % 2], f"reader-{number}"))
        yield opened
    finally:
        for reader in opened:
            reader.close()
