"""How many connections a deployment can open, and how many the servers admit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from sqlalchemy import URL, Engine
from sqlalchemy.pool import AssertionPool, Pool, QueuePool, StaticPool

from .errors import ConfigurationError

__all__ = ["Capacity", "EngineCapacity"]


class EngineCapacity(NamedTuple):
    """The connections of one engine.

    :param name: in ``app.engines``.
    :param server: ``dialect://host:port``, or a file; without user and password.
    :param each: how many connections the pool of one process opens at most; None if it has no limit of its own.
    :param total: how many all processes open at most; where the pool has no limit, one for each thread.
    :param waiting: how many threads of a process wait for a connection, if all of them use this engine at once.
    """

    name: str
    server: str
    each: int | None
    total: int
    waiting: int


class Capacity(tuple[EngineCapacity, ...]):
    """What the engines of an application can open, one after the other; ``str()`` makes a table of it."""

    processes: int
    threads: int

    @classmethod
    def of(cls, engines: Mapping[str, Engine], processes: int, threads: int) -> Capacity:
        """Of engines by name.

        :raises ConfigurationError: if a number is none.
        """
        for name, number in (("processes", processes), ("threads", threads)):
            if type(number) is not int or number < 1:
                raise ConfigurationError(name, f"must be a whole number from 1, got {number!r}.")
        made = cls(_capacity(name, engine, processes, threads) for name, engine in engines.items())
        made.processes, made.threads = processes, threads
        return made

    @property
    def total(self) -> int:
        """The connections of all engines."""
        return sum(each.total for each in self)

    def __str__(self) -> str:
        rows = [("engine", "server", "each process", "in all", "waiting threads")]
        for name, server, each, total, waiting in self:
            rows.append((name, server, "no limit" if each is None else str(each), str(total), str(waiting)))
        return "\n".join(_aligned(rows))


def _aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _capacity(name: str, engine: Engine, processes: int, threads: int) -> EngineCapacity:
    each = _limit(engine.pool)
    total = processes * (threads if each is None else each)
    waiting = 0 if each is None else max(0, threads - each)
    return EngineCapacity(name, _server(engine), each, total, waiting)


def _limit(pool: Pool) -> int | None:
    if isinstance(pool, QueuePool):
        overflow = pool._max_overflow  # No public name tells it; -1 is without a limit, and so is a size of 0.
        return None if overflow < 0 or pool.size() <= 0 else pool.size() + overflow
    return 1 if isinstance(pool, StaticPool | AssertionPool) else None


def _server(engine: Engine) -> str:
    url = engine.url
    return URL.create(url.drivername, host=url.host, port=url.port, database=url.database).render_as_string()
