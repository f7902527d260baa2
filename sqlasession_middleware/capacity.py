"""How many connections a deployment can open, and how many the servers admit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

from sqlalchemy import URL, Connection, Engine, text
from sqlalchemy.pool import AssertionPool, Pool, QueuePool, StaticPool

from .errors import ConfigurationError, shown

__all__ = ["MAX_CONNECTIONS", "Capacity", "EngineCapacity", "Limit", "aligned", "ask_limits", "servers_of"]

#: the limit of a whole server
MAX_CONNECTIONS = "max_connections"

# PostgreSQL keeps some for superusers and, since 16, for roles that are granted them ("Connection Settings").
ASK_POSTGRESQL = """
    SELECT sum(setting::int) FILTER (WHERE name = 'max_connections'),
           sum(setting::int) FILTER (WHERE name <> 'max_connections')
    FROM pg_catalog.pg_settings
    WHERE name IN ('max_connections', 'superuser_reserved_connections', 'reserved_connections')
"""

# "CREATE ROLE", "CREATE DATABASE": -1 is no limit, and superusers have none.
ASK_POSTGRESQL_OF_ITS_OWN = """
    SELECT 'CONNECTION LIMIT of the role ' || rolname, rolconnlimit
    FROM pg_catalog.pg_roles WHERE rolname = session_user AND NOT rolsuper
    UNION ALL
    SELECT 'CONNECTION LIMIT of the database ' || datname, datconnlimit
    FROM pg_catalog.pg_database, pg_catalog.pg_roles
    WHERE datname = current_database() AND rolname = session_user AND NOT rolsuper
"""

# One more is admitted, for an administrator ("max_connections"). The other one is the account's own, 0 for no limit.
ASK_MYSQL = "SELECT @@max_connections, CONCAT('max_user_connections of ', CURRENT_USER()), @@max_user_connections"

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


class Limit(NamedTuple):
    """How many connections a server admits, or one of its roles, accounts or databases.

    :param name: :data:`MAX_CONNECTIONS`, or what has the limit.
    :param reserved: how many of them are for administrators.
    """

    name: str
    maximum: int
    reserved: int = 0

    @property
    def free(self) -> int:
        """Those that an application can have."""
        return self.maximum - self.reserved


def ask_limits(connection: Connection) -> list[Limit]:
    """What limits the connections of an engine that has this one; empty where nothing does, or nobody can be asked."""
    dialect = connection.dialect.name
    if dialect == "postgresql":
        found = connection.execute(text(ASK_POSTGRESQL)).one()
        own = [Limit(*row) for row in connection.execute(text(ASK_POSTGRESQL_OF_ITS_OWN))]
        return [Limit(MAX_CONNECTIONS, found[0], found[1]), *(limit for limit in own if limit.maximum >= 0)]
    if dialect in ("mysql", "mariadb"):
        maximum, account, of_account = connection.execute(text(ASK_MYSQL)).one()
        return [Limit(MAX_CONNECTIONS, maximum), *([Limit(account, of_account)] if of_account > 0 else [])]
    return []


def servers_of(engine: Engine) -> tuple[str, ...]:
    """What has the limits: servers, whatever the database, driver and user; or a file.

    Of an URL with several hosts each one: all connections may be to any of them.
    """
    url = engine.url
    backend = url.get_backend_name()
    if backend == "sqlite":
        return (f"sqlite:///{url.database or ''}",)
    backend = "mysql" if backend == "mariadb" else backend
    default = _PORTS.get(backend)
    if url.host:
        hosts = [(url.host, url.port)]
    else:
        names, ports = (_words(url.normalized_query.get(name, ())) for name in ("host", "port"))
        # As libpq: a port for each host, or one for all.
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
