"""Ways to a database on which something goes silent: what a deadline has to end."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Self

__all__ = ["Gate", "full_backlog", "silent_listener"]

#: CLIENT_SSL, in the second byte of a MySQL server's capabilities ("Protocol::HandshakeV10").
CLIENT_SSL = 0x08


class Gate:
    """Passes on what a client and a server say, until it is told to lose all of it: also that one of them has gone.

    :param host: and port: of the server.
    """

    def __init__(self, host: str, port: int) -> None:
        self.server = host, port
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        #: loses everything
        self.is_shut = threading.Event()
        #: loses everything from the client's message on that has these bytes
        self.shuts_at: bytes | None = None
        #: changes the server's first message
        self.first: Callable[[bytes], bytes] = lambda data: data
        self._is_open = threading.Event()
        self._is_open.set()
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.open()
        self.listener.close()
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def shut(self) -> None:
        self._is_open.clear()
        self.is_shut.set()

    def open(self) -> None:
        """Pass on again, beginning with what was lost in the meantime: as TCP sends it once more."""
        self.shuts_at = None
        self.is_shut.clear()
        self._is_open.set()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection(self.server)
                self._sockets += [client, server]
                for ends in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._pass, args=ends, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, is_client: bool) -> None:
        is_first = True
        with suppress(OSError):
            while True:
                data = source.recv(65536)
                if is_first and not is_client:
                    data, is_first = self.first(data), False
                if is_client and self.shuts_at is not None and self.shuts_at in data:
                    self.shut()
                self._is_open.wait()
                if not data:
                    break
                target.sendall(data)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def offers_tls(greeting: bytes) -> bytes:
    """A MySQL server's greeting that says that it has TLS."""
    at = greeting.index(b"\0", 5) + 1 + 4 + 8 + 1 + 1
    return greeting[:at] + bytes([greeting[at] | CLIENT_SSL]) + greeting[at + 1 :]


@contextmanager
def silent_listener(answer: bytes = b"") -> Iterator[int]:
    """A port that accepts connections and says nothing, but an answer to the first message of each."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    stack.callback(connection.close)
                    if answer:
                        connection.recv(65536)
                        connection.sendall(answer)

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]


@contextmanager
def full_backlog() -> Iterator[int]:
    """A port whose queue of connections is full, so that the system answers to no further one."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with suppress(BlockingIOError):
                waiting.connect(listener.getsockname())
        yield listener.getsockname()[1]
