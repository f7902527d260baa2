"""How many connections a deployment can open, and how many the servers admit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar, NamedTuple

from sqlalchemy import URL, Connection, Engine, text
from sqlalchemy.pool import AssertionPool, Pool, QueuePool, StaticPool

from .errors import ConfigurationError, shown

__all__ = ["Capacity", "EngineCapacity", "ServerLimit", "aligned", "ask_limit", "server_of"]

# PostgreSQL keeps some for superusers and, since 16, for roles that are granted them ("Connection Settings").
ASK_POSTGRESQL = """
    SELECT sum(setting::int) FILTER (WHERE name = 'max_connections'),
           sum(setting::int) FILTER (WHERE name <> 'max_connections')
    FROM pg_catalog.pg_settings
    WHERE name IN ('max_connections', 'superuser_reserved_connections', 'reserved_connections')
"""


#: Where a server listens unless the URL says otherwise.
_PORTS = {"postgresql": 5432, "mysql": 3306}


class EngineCapacity(NamedTuple):
    """The connections of one engine.

    :param name: in ``app.engines``.
    :param server: where its connections go, without user and password.
    :param each: how many connections the pool of one process opens at most; None if it has no limit of its own.
    :param total: how many all processes open at most; where the pool has no limit, one for each thread.
    :param waiting: how many threads of a process wait for a connection, if all of them use this engine at once.
    """

    name: str
    server: str
    each: int | None
    total: int
    waiting: int

    def cells(self) -> tuple[str, ...]:
        """What a table shows of it."""
        each = "no limit" if self.each is None else str(self.each)
        return (self.name, self.server, each, str(self.total), str(self.waiting))


class Capacity(tuple[EngineCapacity, ...]):
    """What the engines of an application can open, one after the other; ``str()`` makes a table of it."""

    TITLES: ClassVar = ("engine", "server", "each process", "in all", "waiting threads")

    processes: int
    threads: int
    #: the connections of all engines; one with several names counts once
    total: int

    @classmethod
    def of(cls, engines: Mapping[str, Engine], processes: int, threads: int) -> Capacity:
        """Of engines by name.

        :raises ConfigurationError: if a number is none.
        """
        for name, number in (("processes", processes), ("threads", threads)):
            if type(number) is not int or number < 1:
                raise ConfigurationError(name, f"must be a whole number from 1, got {shown(number)}.")
        made = cls(_capacity(name, engine, processes, threads) for name, engine in engines.items())
        made.processes, made.threads = processes, threads
        made.total = sum({engines[each.name].pool: each.total for each in made}.values())
        return made

    def __str__(self) -> str:
        return "\n".join(aligned([self.TITLES, *(each.cells() for each in self)]))


class ServerLimit(NamedTuple):
    """How many connections a server admits, and how many of them are for administrators."""

    max_connections: int
    reserved: int

    @property
    def free(self) -> int:
        """Those that an application can have."""
        return self.max_connections - self.reserved


def ask_limit(connection: Connection) -> ServerLimit | None:
    """What the server of a connection admits; None where there is none, or it is not known how to ask."""
    dialect = connection.dialect.name
    if dialect == "postgresql":
        found = connection.execute(text(ASK_POSTGRESQL)).one()
        return ServerLimit(found[0], found[1])
    if dialect in ("mysql", "mariadb"):
        # One more is admitted, for an administrator ("max_connections").
        return ServerLimit(connection.execute(text("SELECT @@max_connections")).scalar_one(), 0)
    return None


def server_of(engine: Engine) -> str:
    """What has the limit: a server, whatever the database, driver and user; or a file."""
    url = engine.url
    backend = url.get_backend_name()
    if backend == "sqlite":
        return f"sqlite:///{url.database or ''}"
    backend = "mysql" if backend == "mariadb" else backend
    port = _PORTS.get(backend)
    return f"{backend}://{_hosts(url if url.port or not url.host else url.set(port=port))}"


def aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """The lines of a table."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _capacity(name: str, engine: Engine, processes: int, threads: int) -> EngineCapacity:
    each = _limit(engine.pool)
    url = engine.url
    server = f"{url.drivername}://{_hosts(url)}/{url.database or ''}"
    total = processes * (threads if each is None else each)
    return EngineCapacity(name, server, each, total, 0 if each is None else max(0, threads - each))


def _hosts(url: URL) -> str:
    """Without the rest of the query, which may hold secrets."""
    if url.host:
        return url.host if url.port is None else f"{url.host}:{url.port}"
    hosts = url.normalized_query.get("host", ())
    ports = url.normalized_query.get("port", ())
    return ",".join(hosts) + (f":{','.join(ports)}" if ports else "")


def _limit(pool: Pool) -> int | None:
    if isinstance(pool, QueuePool):
        overflow = pool._max_overflow  # No public name tells it. -1, and so a pool_size of 0, is without a limit.
        return None if overflow < 0 else pool.size() + overflow
    return 1 if isinstance(pool, StaticPool | AssertionPool) else None
