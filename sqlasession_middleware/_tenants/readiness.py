"""What a health check asks, and what the answers mean: of one application, or where there are tenants.

Where each tenant has a database, there may be thousands. One engine of each server is asked in place of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Engine

from .._database.binds import DEFAULT
from .._database.breaker import place_of_server
from .._database.pings import State
from .._database.pool import has_open_connections
from .._drivers.registry import driver_of

if TYPE_CHECKING:
    from ..middleware import SQLASessionMiddleware
    from .application import TenantApplication
    from .names import KnownNames

__all__ = ["Readiness", "readiness_of_application", "readiness_of_tenants"]

States = Mapping[str, State]

#: What the answer calls the database that has the names of the tenants.
DIRECTORY = "tenants.known"


class Readiness(NamedTuple):
    """What is asked, and what the answers mean."""

    engines: Mapping[str, Engine]
    #: whether requests can be served, by the answers
    is_ready: Callable[[States], bool]
    without_secrets: Callable[[str], str]


def readiness_of_application(application: SQLASessionMiddleware) -> Readiness:
    """All engines of one application."""
    routing = application.routing
    # The primary serves the reads of a replica that is away.
    needed = (DEFAULT, *(() if routing is None else routing.binds))
    return Readiness(
        application.engines, lambda states: all(states[name].answers for name in needed), application.without_secrets
    )


def readiness_of_tenants(
    shared: SQLASessionMiddleware | None, applications: Iterable[TenantApplication], known: KnownNames
) -> Readiness:
    """The directory, if there is one, and the engines that all tenants share, or one open engine of each server.

    :param applications: those of the tenants.
    """
    asked = _of_servers(applications) if shared is None else readiness_of_application(shared)
    directory, are_known = known.directory, known.are_known()
    if directory is None:
        return asked

    def is_ready(states: States) -> bool:
        # Those that were known go on while the directory is away.
        return (are_known or states[DIRECTORY].answers) and asked.is_ready(states)

    def hide(said: str) -> str:
        return directory.without_secrets(asked.without_secrets(said))

    return Readiness({DIRECTORY: directory.engine, **asked.engines}, is_ready, hide)


def _of_servers(applications: Iterable[TenantApplication]) -> Readiness:
    best: dict[str, tuple[Any, Engine, TenantApplication]] = {}
    for application in applications:
        for engine in application.open_engines():
            if driver_of(engine).server.is_networked:
                place = place_of_server(engine.url)
                # One that has connections, because the database of a tenant may be missing.
                rank = has_open_connections(engine.pool), application.last_used
                if place not in best or rank > best[place][0]:
                    best[place] = rank, engine, application
    engines = {f"servers[{number}]": engine for number, (_, engine, _) in enumerate(best.values())}

    def is_ready(states: States) -> bool:
        # The tenants on another server can be served.
        return not engines or any(states[name].answers for name in engines)

    def hide(said: str) -> str:
        for _, _, application in best.values():
            said = application.without_secrets(said)
        return said

    return Readiness(engines, is_ready, hide)
