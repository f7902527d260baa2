"""Computes how many connections a deployment can open, and asks servers how many they admit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

from sqlalchemy import URL, Connection, Engine
from sqlalchemy.pool import AssertionPool, Pool, QueuePool, StaticPool

from ._database.secrets import without_rest_of_password
from ._dependencies import max_overflow
from ._drivers.registry import driver_of, server_of_url
from ._drivers.server import MAX_CONNECTIONS, Limit
from .errors import ConfigurationError, shown

__all__ = ["MAX_CONNECTIONS", "Capacity", "EngineCapacity", "Limit", "aligned", "ask_limits", "servers_of"]


class EngineCapacity(NamedTuple):
    """The connections of one engine.

    :param name: in ``app.engines``.
    :param server: the server of its connections, as a URL without user and password.
    :param each: the largest number of connections that the pool of one process opens; None if the pool has no limit.
    :param total: the largest number that all processes open; if the pool has no limit, one for each thread.
    :param waiting: the number of threads of a process that wait for a connection if all of them use this engine.
    """

    name: str
    server: str
    each: int | None
    total: int
    waiting: int

    def cells(self) -> tuple[str, ...]:
        """Return the cells of a row in the table of :class:`Capacity`."""
        each = "no limit" if self.each is None else str(self.each)
        return (self.name, self.server, each, str(self.total), str(self.waiting))


class Capacity(tuple[EngineCapacity, ...]):
    """The capacities of the engines of an application. ``str()`` returns them as a table."""

    TITLES: ClassVar = ("engine", "server", "each process", "in all", "waiting threads")

    processes: int
    threads: int
    #: the largest number of connections of all engines; an engine with several names counts once
    total: int

    @classmethod
    def of(cls, engines: Mapping[str, Engine], processes: int, threads: int) -> Capacity:
        """Return the capacity of engines.

        :param engines: the engines by their names.
        :param processes: the number of processes.
        :param threads: the number of threads in each process.
        :raises ConfigurationError: if ``processes`` or ``threads`` is not a whole number from 1.
        """
        for name, number in (("processes", processes), ("threads", threads)):
            if type(number) is not int or number < 1:
                raise ConfigurationError(name, f"must be a whole number from 1, got {shown(number)}.")
        capacity = cls(_capacity(name, engine, processes, threads) for name, engine in engines.items())
        capacity.processes, capacity.threads = processes, threads
        capacity.total = sum({engines[each.name].pool: each.total for each in capacity}.values())
        return capacity

    def __str__(self) -> str:
        return "\n".join(aligned([self.TITLES, *(each.cells() for each in self)]))


# The public module, for pickles.
Limit.__module__ = __name__


def ask_limits(connection: Connection) -> list[Limit]:
    """The limits of the server, role, database or account of a connection; empty if there are none."""
    return driver_of(connection).server.limits(connection)


def servers_of(engine: Engine) -> tuple[str, ...]:
    """The servers that an engine connects to, whatever the database, driver and user; or a file.

    A URL may have several hosts. Each counts, because all connections may be to one of them.
    """
    url = engine.url
    server = server_of_url(url)
    backend = server.names[0] if server.names else url.get_backend_name()
    if not server.is_networked:
        return (f"{backend}:///{url.database or ''}",)
    default = server.default_port
    if url.host:
        hosts = [(url.host, url.port)]
    else:
        names, ports = (_words(url.normalized_query.get(name, ())) for name in ("host", "port"))
        # As in libpq: a port for each host, or one for all.
        ports = ports * len(names) if len(ports) == 1 else ports + [""] * (len(names) - len(ports))
        hosts = [_host_and_port(name, port) for name, port in zip(names, ports, strict=False)] or [("", None)]
    return tuple(
        f"{backend}://{host}:{port or default}" if host and (port or default) else f"{backend}://{host}"
        for host, port in hosts
    )


def _words(values: Iterable[str]) -> list[str]:
    return [word for value in values for word in value.split(",")]


def _host_and_port(host: str, port: str) -> tuple[str, Any]:
    name, colon, own = host.rpartition(":")
    return (name, own) if colon and own.isdecimal() else (host, port)


def aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Return the rows as lines, with columns padded to the same width."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _capacity(name: str, engine: Engine, processes: int, threads: int) -> EngineCapacity:
    each = _limit(engine.pool)
    url = without_rest_of_password(engine.url)
    server = f"{url.drivername}://{_hosts(url)}/{url.database or ''}"
    total = processes * (threads if each is None else each)
    return EngineCapacity(name, server, each, total, 0 if each is None else max(0, threads - each))


def _hosts(url: URL) -> str:
    """Return host and port of a URL. The rest of its query may hold secrets and is left out."""
    if url.host:
        return url.host if url.port is None else f"{url.host}:{url.port}"
    hosts = url.normalized_query.get("host", ())
    ports = url.normalized_query.get("port", ())
    return ",".join(hosts) + (f":{','.join(ports)}" if ports else "")


def _limit(pool: Pool) -> int | None:
    if isinstance(pool, QueuePool):
        overflow = max_overflow(pool)  # -1 is no limit, and a pool_size of 0 makes it -1.
        return None if overflow < 0 else pool.size() + overflow
    return 1 if isinstance(pool, StaticPool | AssertionPool) else None
