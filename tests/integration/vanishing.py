"""A network whose packets can vanish: a namespace of Linux, joined to this one by a pair of virtual interfaces.

The server's address is in the namespace, and its port is forwarded to a real server by a process of its own: some
drivers keep Python's lock while they wait. Needs root, and ``ip`` of the package ``iproute2``.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from .own_servers import program

ROOT = Path(__file__).parents[2]

#: The hardware's address of the interface in the namespace: an administered one.
HARDWARE = "02:00:00:00:00:02"

#: Listens in the namespace, and hands the socket to this process.
LISTEN = """
import socket, sys
listener = socket.create_server((sys.argv[1], 0))
with socket.socket(fileno=int(sys.argv[2])) as channel:
    socket.send_fds(channel, [b"%d" % listener.getsockname()[1]], [listener.fileno()])
"""


class VanishingNetwork:
    """A way to a server that can be cut so that neither side is told.

    :param host: where the server listens.
    """

    def __init__(self, host: str, port: int) -> None:
        self._ip = program("ip", "/usr/sbin", "/sbin")
        self._target = host, str(port)
        number = os.getpid() % 0x8000  # Several processes may test.
        self._name, self._near, self._far = (f"{kind}{number}" for kind in ("vanish", "near", "far"))
        # The network for measurements, 198.18.0.0/15, in parts of four addresses.
        base = f"198.{18 + (number >> 14)}.{number >> 6 & 255}."
        self._here, self.host = base + str((number & 63) * 4 + 1), base + str((number & 63) * 4 + 2)
        self.port = 0
        self._forwarder: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if os.geteuid():
            pytest.skip("only root may make a network namespace")
        done = subprocess.run([self._ip, "netns", "add", self._name], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no network namespace can be made: {done.stderr}")  # As in most containers.
        try:
            peer = ("peer", "name", self._far, "address", HARDWARE, "netns", self._name)
            self._call("link", "add", self._near, "type", "veth", *peer)
            self._call("address", "add", f"{self._here}/30", "dev", self._near)
            self._call("link", "set", self._near, "up")
            # Otherwise the system notices that nobody has the address, and says that there is no route.
            self._call("neighbour", "add", self.host, "lladdr", HARDWARE, "dev", self._near)
            self._call("-n", self._name, "link", "set", self._far, "up")
            self.mend()
            self._forward()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def cut(self) -> None:
        """Have all packets vanish, in both directions."""
        self._call("-n", self._name, "address", "delete", f"{self.host}/30", "dev", self._far)

    def mend(self) -> None:
        """Have them arrive again."""
        self._call("-n", self._name, "address", "replace", f"{self.host}/30", "dev", self._far)

    def end(self) -> None:
        """End the connections, so that a request that would wait for hours fails its test."""
        if self._forwarder is not None:
            self._forwarder.kill()
        self.mend()

    def close(self) -> None:
        if self._forwarder is not None:
            self._forwarder.kill()
            self._forwarder.wait()
        # It has one end of the pair, and the other one goes with it.
        for command in (("link", "delete", self._near), ("netns", "delete", self._name)):
            subprocess.run([self._ip, *command], capture_output=True, check=False)

    def _call(self, *arguments: str) -> None:
        subprocess.run([self._ip, *arguments], check=True, capture_output=True)

    def _forward(self) -> None:
        here, there = socket.socketpair()
        with here, there:
            listen = [sys.executable, "-c", LISTEN, self.host, str(there.fileno())]
            inside = [self._ip, "netns", "exec", self._name, *listen]
            subprocess.run(inside, pass_fds=[there.fileno()], check=True)
            port, (listener,), _, _ = socket.recv_fds(here, 100, 1)
        self.port = int(port)
        command = [sys.executable, "-m", __name__, str(listener), *self._target]
        self._forwarder = subprocess.Popen(command, cwd=ROOT, pass_fds=[listener])
        os.close(listener)


def forward(listener: socket.socket, host: str, port: int) -> None:
    while True:
        client, _ = listener.accept()
        server = socket.create_connection((host, port))
        for source, target in ((client, server), (server, client)):
            threading.Thread(target=copy, args=(source, target), daemon=True).start()


def copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


if __name__ == "__main__":
    forward(socket.socket(fileno=int(sys.argv[1])), sys.argv[2], int(sys.argv[3]))
