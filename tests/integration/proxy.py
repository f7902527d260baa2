"""A proxy between an application and its database that breaks a connection at a chosen message.

It takes the address of the database and a :class:`Cut`. It provides an address for the application, and records the
traffic as :class:`Message` objects. It can split PostgreSQL's protocol 3 ("Message Formats") and MySQL's ("MySQL
Packets") into messages, and recognizes COMMIT and its answer. It declines TLS for PostgreSQL. With MySQL, the client
must not ask for TLS, because the packets would be unreadable.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from .servers import PATIENCE

Sender = Literal["client", "server"]
When = Literal["before", "during", "after"]

#: Also those of two-phase transactions: "COMMIT PREPARED", "XA COMMIT".
COMMIT = re.compile(rb"\s*(XA\s+)?COMMIT\b", re.IGNORECASE)


@dataclass(frozen=True)
class Message:
    """One message that the proxy has read.

    :param number: counts the sender's messages on this connection from 1, since :meth:`Proxy.watch` or its opening.
    :param kind: PostgreSQL's type byte ("" for the start-up message); MySQL's command, "" for other packets.
    :param commit: counts the sender's messages that are COMMIT, or the answer to it; 0 for all others.
    """

    connection: int
    sender: Sender
    number: int
    kind: str
    commit: int


@dataclass(frozen=True)
class Cut:
    """Where to break a connection.

    :param number: the number of the message, as in :class:`Message`.
    :param when: "before": none of it is forwarded; "during": half; "after": all.
    :param commit: count only the messages that are COMMIT or the answer to it.
    :param every: break every connection that gets there, not only the first one.
    :param reset: the client sees a reset instead of an end of file.
    """

    sender: Sender
    number: int
    when: When
    commit: bool = False
    every: bool = False
    reset: bool = False

    def is_at(self, message: Message) -> bool:
        return message.sender == self.sender and self.number == (message.commit if self.commit else message.number)


class PostgreSQL:
    """Protocol 3: a type byte, then the length of the rest. The client's first message has no type."""

    #: SSLRequest and GSSENCRequest, which a client may send before the start-up message.
    ENCRYPTION = (80877103, 80877104)

    def __init__(self) -> None:
        self.started = False
        self.committing = False

    async def read(self, sender: Sender, reader: asyncio.StreamReader, decline: Callable[[], None]) -> bytes:
        while sender == "client" and not self.started:
            length = await reader.readexactly(4)
            rest = await reader.readexactly(int.from_bytes(length) - 4)
            self.started = int.from_bytes(rest[:4]) not in self.ENCRYPTION
            if self.started:
                return length + rest
            decline()
        head = await reader.readexactly(5)
        return head + await reader.readexactly(int.from_bytes(head[1:]) - 4)

    def is_flush(self, data: bytes) -> bool:
        """Whether a message is a Flush: it has no answer, and it is a matter of time whether psycopg sends it."""
        return data[:1] == b"H"

    def note(self, sender: Sender, data: bytes, number: int) -> tuple[str, bool]:
        """The kind of a message, and whether it belongs to a COMMIT."""
        if sender == "client" and number == 1 and data[0] == 0:
            return "", False
        kind = chr(data[0])
        if sender == "client" and kind in "QP":
            # A Query is the statement; a Parse has a name before it.
            statement = data[5:] if kind == "Q" else data[5:].partition(b"\0")[2]
            self.committing = COMMIT.match(statement) is not None
        belongs = self.committing
        if sender == "server" and kind == "Z":
            self.committing = False
        return kind, belongs


class MySQL:
    """Packets: three bytes of length, one of sequence. The server sends first; a command restarts the sequence."""

    QUERY = 3

    def __init__(self) -> None:
        self.committing = False

    async def read(self, sender: Sender, reader: asyncio.StreamReader, decline: Callable[[], None]) -> bytes:
        head = await reader.readexactly(4)
        return head + await reader.readexactly(int.from_bytes(head[:3], "little"))

    def is_flush(self, data: bytes) -> bool:
        return False

    def note(self, sender: Sender, data: bytes, number: int) -> tuple[str, bool]:
        if sender == "server":
            # The answer is a single packet, OK or ERR.
            belongs, self.committing = self.committing, False
            return "", belongs
        command = data[4] if data[3] == 0 and len(data) > 4 else None
        self.committing = command == self.QUERY and COMMIT.match(data[5:]) is not None
        return "" if command is None else str(command), self.committing


#: by the name of SQLAlchemy's backend
PROTOCOLS = {"postgresql": PostgreSQL, "mariadb": MySQL, "mysql": MySQL}


@dataclass(eq=False)
class Link:
    """One connection: the client's socket, the database's socket, and the messages so far."""

    ident: int
    protocol: PostgreSQL | MySQL
    readers: dict[Sender, asyncio.StreamReader]
    #: by the sender of the data that is written there
    writers: dict[Sender, asyncio.StreamWriter]
    severed: bool = False
    #: whether the next message of the client is answered with a reset, and nothing more is forwarded
    forgotten: bool = False
    numbers: dict[Sender, int] = field(default_factory=lambda: {"client": 0, "server": 0})
    commits: dict[Sender, int] = field(default_factory=lambda: {"client": 0, "server": 0})

    def message(self, sender: Sender, data: bytes) -> Message:
        self.numbers[sender] += 1
        kind, belongs = self.protocol.note(sender, data, self.numbers[sender])
        self.commits[sender] += belongs
        return Message(self.ident, sender, self.numbers[sender], kind, self.commits[sender] if belongs else 0)

    def sever(self, reset: bool) -> None:
        """End the connection for both sides. Further data of the database is dropped until it closes its side."""
        self.severed = True
        to_client = self.writers["server"]
        if reset:
            linger = struct.pack("ii", 1, 0)
            to_client.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        to_client.close()
        with suppress(OSError):
            self.writers["client"].write_eof()


class Proxy:
    """The proxy, in a thread of its own: ``with Proxy("postgresql", "127.0.0.1", 5432) as proxy:``.

    :param protocol: "postgresql", "mariadb" or "mysql".
    """

    def __init__(self, protocol: str, host: str, port: int) -> None:
        self.protocol = PROTOCOLS[protocol]
        self.database = host, port
        self.host = "127.0.0.1"
        self.port = 0
        self.cut: Cut | None = None
        #: how many connections were cut since watch()
        self.hits = 0
        #: the messages that were read since watch()
        self.messages: list[Message] = []
        self._links: set[Link] = set()
        self._opened = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy")

    def __enter__(self) -> Self:
        self._thread.start()
        self.accept()
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._run(self._end)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(PATIENCE)
            self._loop.close()

    def watch(self, cut: Cut | None = None) -> None:
        """Restart the counts, also those of open connections, and cut at ``cut``."""

        async def watch() -> None:
            self.cut, self.hits, self.messages = cut, 0, []
            for link in self._links:
                link.numbers = {"client": 0, "server": 0}
                link.commits = {"client": 0, "server": 0}

        self._run(watch)

    def refuse(self) -> None:
        """Refuse new connections. Those that are open stay."""

        async def refuse() -> None:
            if self._server is not None:
                self._server.close()
                self._server = None

        self._run(refuse)

    def accept(self) -> None:
        """Accept connections, on the same port as before."""

        async def accept() -> None:
            if self._server is None:
                listener = socket.create_server((self.host, self.port))
                self.port = listener.getsockname()[1]
                self._server = await asyncio.start_server(self._serve, sock=listener)

        self._run(accept)

    def sever(self) -> None:
        """Break all connections."""

        async def sever() -> None:
            for link in self._links:
                link.sever(reset=False)

        self._run(sever)

    def forget(self) -> None:
        """Forget all connections, as a firewall does: nobody is told, and who sends on one of them gets a reset."""

        async def forget() -> None:
            for link in self._links:
                link.forgotten = True

        self._run(forget)

    def wait_until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not done():
            assert time.monotonic() < deadline, f"open: {self._links}"
            time.sleep(0.001)

    def wait_until_severed(self) -> None:
        """Return when the database has closed the connections that were cut."""
        self.wait_until(lambda: not any(link.severed for link in tuple(self._links)))

    def wait_until_closed(self) -> None:
        """Return when all connections are closed."""
        self.wait_until(lambda: not self._links)

    def _run(self, work: Callable[[], Awaitable[None]]) -> None:
        async def run() -> None:
            await work()

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(PATIENCE)

    async def _end(self) -> None:
        if self._server is not None:
            self._server.close()
        for link in self._links:
            link.sever(reset=False)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=PATIENCE)

    async def _serve(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            from_server, to_server = await asyncio.open_connection(*self.database)
        except OSError:
            to_client.close()
            return
        # asyncio sets it only if the socket has a protocol number. Without it, messages wait for acknowledgements.
        to_client.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._opened += 1
        link = Link(
            self._opened,
            self.protocol(),
            {"client": from_client, "server": from_server},
            {"client": to_server, "server": to_client},
        )
        self._links.add(link)
        try:
            await asyncio.gather(self._forward(link, "client"), self._forward(link, "server"))
        finally:
            for writer in link.writers.values():
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()
            self._links.discard(link)

    async def _forward(self, link: Link, sender: Sender) -> None:
        reader, writer = link.readers[sender], link.writers[sender]
        with suppress(OSError, asyncio.IncompleteReadError):
            while not link.severed:
                data = await link.protocol.read(sender, reader, lambda: link.writers["server"].write(b"N"))
                if link.forgotten:
                    link.sever(reset=True)
                if link.severed:
                    break
                if sender == "client" and link.protocol.is_flush(data):
                    writer.write(data)
                    continue
                message = link.message(sender, data)
                self.messages.append(message)
                cut = self.cut
                if cut is not None and cut.is_at(message) and (cut.every or not self.hits):
                    self.hits += 1
                    writer.write({"before": b"", "during": data[: len(data) // 2], "after": data}[cut.when])
                    link.sever(cut.reset)
                    break
                writer.write(data)
                await writer.drain()
        if sender == "server":
            with suppress(OSError):
                while link.severed and await reader.read(1 << 16):
                    pass
            link.writers["server"].close()
        elif not link.severed:
            with suppress(OSError):
                writer.write_eof()
