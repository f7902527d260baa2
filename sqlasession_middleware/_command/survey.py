"""What ``sqlasession check`` finds out: whether the engines answer, and whether the servers admit their connections.

:func:`make_survey` asks the servers and returns data. ``report`` prints them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Engine, text
from sqlalchemy.pool import Pool

from .._wsgi.wrapped import applications_in
from ..capacity import MAX_CONNECTIONS, EngineCapacity, Limit, ask_limits, servers_of
from ..inspector import InspectorMiddleware
from .messages import describe_error, title_of
from .server import Workers

if TYPE_CHECKING:
    from ..middleware import SQLASessionMiddleware

__all__ = ["ApplicationSurvey", "Demand", "Demands", "EngineSurvey", "Ping", "Survey", "find_inspectors", "make_survey"]

#: How many seconds an engine has to answer.
PING_TIMEOUT = 10


class Ping(NamedTuple):
    """The answer of an engine.

    :param milliseconds: how long it took; None if the engine did not answer.
    :param limits: the limits of its connections.
    :param problem: why there is no answer.
    """

    milliseconds: float | None
    limits: list[Limit]
    problem: str | None = None


class EngineSurvey(NamedTuple):
    """An engine of an application."""

    capacity: EngineCapacity
    ping: Ping


class ApplicationSurvey(NamedTuple):
    """An application, and all of its engines."""

    name: str
    engines: list[EngineSurvey]


class Demand(NamedTuple):
    """How many connections the engines can open that share a limit of a server."""

    server: str
    connections: int
    limit: Limit

    @property
    def is_met(self) -> bool:
        """Whether the limit suffices."""
        return self.connections <= self.limit.free


class Survey(NamedTuple):
    """The result of a check.

    :param inspectors: the paths of inspectors that should not be there.
    """

    workers: Workers
    applications: list[ApplicationSurvey]
    demands: list[Demand]
    inspectors: list[str]

    def unanswered(self) -> Iterator[EngineSurvey]:
        """The engines that did not answer."""
        for application in self.applications:
            yield from (engine for engine in application.engines if engine.ping.problem is not None)

    def unmet(self) -> Iterator[Demand]:
        """The demands that exceed their limits."""
        return (demand for demand in self.demands if not demand.is_met)

    @property
    def has_problems(self) -> bool:
        """Whether the command fails."""
        return any(self.unanswered()) or any(self.unmet()) or bool(self.inspectors)


def find_inspectors(app: Any) -> list[str]:
    """The paths of the inspectors that are part of an application."""
    return [each.path for each in applications_in(app) if isinstance(each, InspectorMiddleware)]


def make_survey(
    applications: Iterable[SQLASessionMiddleware], workers: Workers, inspectors: list[str] | None = None
) -> Survey:
    """Ping every engine, and sum up what all of them can open.

    :param inspectors: the paths of inspectors that should not be there.
    """
    demands = Demands()
    surveyed = []
    for application in applications:
        all_engines = application.engines
        engines = []
        for capacity in application.capacity(*workers):
            engine = all_engines[capacity.name]
            answer = ping(engine, application)
            demands.add(engine, capacity.total, answer.limits)
            engines.append(EngineSurvey(capacity, answer))
        surveyed.append(ApplicationSurvey(title_of(application), engines))
    return Survey(workers, surveyed, list(demands), inspectors or [])


def ping(engine: Engine, application: SQLASessionMiddleware) -> Ping:
    """Ask an engine for an answer and for the limits of its connections."""
    answers: list[Ping] = []

    def ask() -> None:
        began = time.perf_counter()
        try:
            with engine.connect() as connection:
                connection.execute(text("SELECT 1"))
                milliseconds = (time.perf_counter() - began) * 1000
                answers.append(Ping(milliseconds, ask_limits(connection)))
        except Exception as error:
            answers.append(Ping(None, [], describe_error(error, application)))

    # A thread, because not every driver has a timeout for a server that accepts a connection and then sends nothing.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PING_TIMEOUT)
    return answers[0] if answers else Ping(None, [], f"no response within {PING_TIMEOUT} seconds")


class Demands:
    """Adds up the connections of engines by the servers, and by the other limits, that they share."""

    def __init__(self) -> None:
        self._pools: set[Pool] = set()
        self._connections: dict[str, int] = {}
        self._max_connections: dict[str, Limit] = {}
        # By server and limit: those of roles, accounts and databases.
        self._further: dict[tuple[str, Limit], int] = {}

    def add(self, engine: Engine, connections: int, limits: Iterable[Limit]) -> None:
        """Add the connections of an engine. An engine with several names is counted once."""
        if engine.pool in self._pools:
            connections = 0
        self._pools.add(engine.pool)
        servers = servers_of(engine)
        for server in servers:
            self._connections[server] = self._connections.get(server, 0) + connections
            for limit in limits:
                if limit.name != MAX_CONNECTIONS:
                    self._further[server, limit] = self._further.get((server, limit), 0) + connections
                elif server not in self._max_connections or len(servers) == 1:
                    # If the URL has several hosts, the limit may be another one's: a URL with one host is certain.
                    self._max_connections[server] = limit

    def __iter__(self) -> Iterator[Demand]:
        for server, connections in self._connections.items():
            if server in self._max_connections:
                yield Demand(server, connections, self._max_connections[server])
        for (server, limit), connections in self._further.items():
            yield Demand(server, connections, limit)
