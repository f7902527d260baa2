"""A proxy that counts how often a client waits for its database, without a clock.

It takes the address of the database and provides one for the application. While a thread is watched, each answer stays
in the proxy until that thread can do nothing but wait: until it sleeps in a system call that reads. Then the proxy
delivers all that the database has answered, and counts one wait. So what a client sends ahead, in a pipeline or on two
connections, is waited for once, and an answer that nobody waits for does not count. This is what a request costs if the
database is far away, and a busy machine does not change the number.

If the answer comes in pieces, only the first one counts: each piece belongs to the moment at which the client last sent
something before the piece came.

What a thread does is known on Linux only, from ``/proc/self/task/…/syscall``.
"""

from __future__ import annotations

import platform
import re
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Self

from .servers import PATIENCE

#: The numbers of the system calls in which a thread waits for data, by the machine: read, recvfrom, recvmsg, poll,
#: ppoll, select, pselect6, epoll_wait and epoll_pwait (Linux, arch/*/entry/syscalls). A thread that waits for the
#: interpreter is in futex instead, and one that runs is in none.
READING = {
    "x86_64": {0, 45, 47, 7, 271, 23, 270, 232, 281},
    "aarch64": {63, 207, 212, 73, 72, 22},
}.get(platform.machine(), set())
#: Seconds between two looks at a thread whose answer is held. It decides how long a test takes, and no number.
INTERVAL = 0.0002


def is_reading(thread: int) -> bool:
    """Whether a thread of this process sleeps until it has data to read.

    :param thread: its ``threading.get_native_id()``.
    """
    number = Path(f"/proc/self/task/{thread}/syscall").read_text().split()[0]
    return number.isdecimal() and int(number) in READING


def can_watch() -> bool:
    """Whether this machine tells what a thread waits for."""
    with suppress(OSError):
        is_reading(threading.get_native_id())
        return bool(READING)
    return False


@dataclass(eq=False)
class Link:
    """One connection: both sockets, and the answers that the client has not been given."""

    client: socket.socket
    server: socket.socket
    #: when the client sent something last, in the time of the proxy
    asked: float
    #: each with its time; without data at the end of the connection
    held: deque[tuple[float, bytes]] = field(default_factory=deque)


class Relay:
    """Passes on at once what clients send, and holds what the server answers until its time has come.

    A subclass says what time is: :meth:`now`, :meth:`time_of`, :meth:`may_pass` and :meth:`patience`.
    """

    def __init__(self, host: str, port: int) -> None:
        self.database = host, port
        self.host = "127.0.0.1"
        self.listener = socket.create_server((self.host, 0))
        self.listener.setblocking(False)
        self.port: int = self.listener.getsockname()[1]
        self.links: set[Link] = set()
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ, self.accept)

    def now(self) -> float:
        raise NotImplementedError

    def time_of(self, link: Link) -> float:
        """The time of an answer that has just come."""
        raise NotImplementedError

    def may_pass(self, time: float) -> bool:
        """Whether an answer of that time is delivered now."""
        raise NotImplementedError

    def patience(self) -> float | None:
        """Seconds until the answers that are held are looked at again; None if nothing can have changed."""
        raise NotImplementedError

    def turn(self) -> None:
        """Wait for something to read, pass it on or hold it, and deliver what may pass."""
        for react in self.ready():
            react()
        self.deliver()

    def ready(self) -> list[Callable[[], object]]:
        return [key.data for key, _ in self.selector.select(self.patience())]

    def holds(self) -> bool:
        return any(link.held for link in self.links)

    def deliver(self) -> None:
        for link in tuple(self.links):
            while link.held and self.may_pass(link.held[0][0]):
                _, data = link.held.popleft()
                if not data:
                    self.close_link(link)
                    break
                with suppress(OSError):
                    link.client.sendall(data)

    def accept(self) -> None:
        client, _ = self.listener.accept()
        try:
            server = socket.create_connection(self.database, PATIENCE)
        except OSError:
            client.close()
            return
        link = Link(client, server, self.now())
        self.links.add(link)
        for source, read in ((client, self.read_client), (server, self.read_server)):
            source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            source.settimeout(None)  # With another, recv() would wait for it.
            self.selector.register(source, selectors.EVENT_READ, partial(self.react, read, link))

    def react(self, read: Callable[[Link], None], link: Link) -> None:
        # The other side may have been read just before, and the connection closed.
        if link in self.links:
            read(link)

    def read_client(self, link: Link) -> None:
        """Pass on what a client has sent, if anything."""
        while (data := self.read(link.client)) is not None:
            if not data:
                return self.close_link(link)
            self.passed_on(link, data)
            with suppress(OSError):  # What the database has said before it closed is still to be read.
                link.server.sendall(data)
        return None

    def passed_on(self, link: Link, data: bytes) -> None:
        link.asked = self.now()

    def read_server(self, link: Link) -> None:
        data = self.read(link.server)
        if data is None:
            return
        link.held.append((self.time_of(link), data))
        if not data:
            self.selector.unregister(link.server)

    @staticmethod
    def read(source: socket.socket) -> bytes | None:
        """What can be read at once: None if nothing, empty at the end."""
        try:
            return source.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def close_link(self, link: Link) -> None:
        self.links.discard(link)
        for each in (link.client, link.server):
            with suppress(KeyError):  # The server's is no more, once it has ended.
                self.selector.unregister(each)
            each.close()

    def close(self) -> None:
        for link in tuple(self.links):
            self.close_link(link)
        self.listener.close()
        self.selector.close()


@dataclass
class Waits:
    """What a watched thread has waited for: before each wait, all that it had sent since the last one."""

    sent: list[bytes] = field(default_factory=list)
    #: what it has sent since, without waiting for an answer
    unawaited: bytes = b""

    def __len__(self) -> int:
        return len(self.sent)

    def __str__(self) -> str:
        """Readable, for a test that fails: the words of each wait in a line."""
        each = [*self.sent, self.unawaited] if self.unawaited else self.sent
        words = [b" ".join(re.findall(rb"[\x20-\x7e]{3,}", sent)).decode() for sent in each]
        lines = [f"{number}. {line}" for number, line in enumerate(words, 1)]
        if self.unawaited:
            lines[-1] = f"not waited for: {words[-1]}"
        return "\n".join(lines)


class FarProxy(Relay):
    """The proxy, in a thread of its own: ``with FarProxy("127.0.0.1", 5432) as proxy:``.

    It watches one thread at a time, over all connections. Its time is the number of waits. The beginning of a watch
    counts as well, so that all that was sent before is of an earlier time.
    """

    def __init__(self, host: str, port: int) -> None:
        super().__init__(host, port)
        self._waits_so_far = 0
        self._watched: tuple[int, Waits] | None = None
        self._ended = False
        self._waker, self._woken = socket.socketpair()
        self.selector.register(self._woken, selectors.EVENT_READ, lambda: self._woken.recv(1))
        # The watched thread and the proxy's own take turns.
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="far proxy")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended = True
        self._waker.send(b"x")
        self._thread.join(PATIENCE)
        self._waker.close()
        self._woken.close()

    @contextmanager
    def watch(self) -> Iterator[Waits]:
        """Count the waits of this thread, in the block."""
        waits = Waits()
        with self._lock:
            assert self._watched is None, "another thread is watched"
            self._read_clients()
            self._waits_so_far += 1
            self._watched = threading.get_native_id(), waits
        try:
            yield waits
        finally:
            with self._lock:
                self._read_clients()
                self._watched = None
            self._waker.send(b"x")

    # -- in the proxy's thread

    def _serve(self) -> None:
        try:
            while not self._ended:
                self.turn()
        finally:
            self.close()

    def turn(self) -> None:
        ready = self.ready()
        with self._lock:
            for react in ready:
                react()
            self.deliver()
            if self._is_awaited():
                self._waits_so_far += 1
                self.deliver()

    def _is_awaited(self) -> bool:
        """Whether the client can do nothing until it gets what is held; this is noted as a wait."""
        if self._watched is None or not self.holds():
            return False
        thread, waits = self._watched
        if not is_reading(thread):
            return False
        # On loopback, all that it has sent before is there to be read.
        self._read_clients()
        waits.sent.append(waits.unawaited)
        waits.unawaited = b""
        return True

    def _read_clients(self) -> None:
        for link in tuple(self.links):
            self.read_client(link)

    def now(self) -> float:
        return self._waits_so_far

    def time_of(self, link: Link) -> float:
        return link.asked

    def may_pass(self, time: float) -> bool:
        return self._watched is None or time < self._waits_so_far

    def patience(self) -> float | None:
        return INTERVAL if self.holds() else None

    def passed_on(self, link: Link, data: bytes) -> None:
        super().passed_on(link, data)
        if self._watched is not None:
            self._watched[1].unawaited += data
