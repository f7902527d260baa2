"""Makes a tenant's database of its name: another URL, or the shared engine with options of the tenant's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from sqlalchemy import Engine
from sqlalchemy.engine import URL

from .._database.engines import EngineSource
from .._database.forks import fork_safe_lock
from .._database.lazy_begin import begins_lazily
from .._database.reads import give_first
from .._database.urls import parse_url
from .._drivers.registry import server_of_url
from ..errors import ConfigurationError
from .names import PLACE

__all__ = [
    "OPTION",
    "PLACE",
    "TenantSource",
    "asks_for_name",
    "identifiers_of",
    "is_template",
    "template_of",
]

#: The execution option with the statement that sets the tenant for a transaction.
OPTION: Final = "sqlasession_local_settings"

# Reentrant, as that of other engines.
_creating = fork_safe_lock()

#: Makes what the middleware takes as a bind of the name of a tenant.
Template = Callable[[str], Any]


def is_template(given: Any) -> bool:
    """Whether a bind differs by tenant."""
    if isinstance(given, Mapping):
        given = given.get("url")
    if isinstance(given, URL):
        given = given.render_as_string(hide_password=False).replace("%7B", "{").replace("%7D", "}")
    return (callable(given) and not isinstance(given, Engine)) or (isinstance(given, str) and PLACE in given)


def asks_for_name(given: Any) -> bool:
    """Whether a bind is found by a call of the application's, or in a folder of the tenant's: it takes a real name."""
    if isinstance(given, Mapping):
        given = given.get("url")
    if isinstance(given, str | URL):
        return PLACE in os.path.dirname(parse_url(given).database or "")
    return is_template(given)


def template_of(parameter: str, given: Any) -> Template:
    """What makes the bind of each tenant.

    :param parameter: its name in errors.
    :param given: a bind with the place of the name, a dict of engine options with such a ``url``; or a callable of the
        name that returns a bind. Anything else is the same for all of them.
    :raises ConfigurationError: if the place of the name is not in the database or user of a URL.
    """
    if not is_template(given):
        return lambda name: given
    if isinstance(given, Mapping):
        options, template = dict(given), template_of(parameter, given["url"])
        return lambda name: {**options, "url": template(name)}
    if callable(given):
        template = given
        return lambda name: template(name)
    try:
        url = parse_url(given)
    except ConfigurationError as error:
        raise ConfigurationError(parameter, error.problem) from None
    if is_template(url.set(database="", username="")):
        raise ConfigurationError(parameter, "may have {tenant} in its database and its user, and nowhere else.")

    def fill(name: str) -> URL:
        # The form of a name needs no quotes, neither here nor in a file's name.
        return url.set(
            database=url.database and url.database.replace(PLACE, name),
            username=url.username and url.username.replace(PLACE, name),
        )

    return fill


def identifiers_of(given: Iterable[Any], schema: str | None, settings: Mapping[str, str]) -> list[str]:
    """What a server takes as names of databases, users and schemas, with the place of the tenant's name in them.

    :param given: binds and replicas.
    :param settings: those that are set for a transaction.
    """
    found = [schema or ""]
    for each in given:
        bind = each.get("url") if isinstance(each, Mapping) else each
        if isinstance(bind, str | URL) and is_template(bind):
            url = parse_url(bind)
            if server_of_url(url).is_networked:
                found += [url.database or "", url.username or ""]
    for name, value in settings.items():
        if name.lower() in ("search_path", "role"):
            found += [each.strip(' "') for each in value.split(",")]
    return [each for each in found if PLACE in each]


class TenantSource(EngineSource):
    """The engine that all tenants share, with options for one of them.

    :param shared: its source. What listens to it is there once, and hears of all tenants.
    :param options: execution options.
    """

    __slots__ = ("_shared", "_tenant_options")

    def __init__(self, shared: EngineSource, options: Mapping[str, Any]) -> None:
        # Not the constructor of the class: there is nothing to make and to check.
        self._shared = shared
        self._tenant_options = options
        self._engine: Engine | None = None
        self.url = shared.url
        #: It is not this one's to dispose of.
        self.given = True
        self.connect_timeout = shared.connect_timeout
        self.ping_after = shared.ping_after

    @property
    def engine(self) -> Engine:
        """The engine, with the tenant's options. There is one, whoever is first: it is compared with others."""
        if self._engine is None:
            shared = self._shared.engine
            with _creating:
                if self._engine is None:  # pragma: no branch  # another thread may have been faster
                    engine = shared.execution_options(**self._tenant_options)
                    if OPTION in self._tenant_options and begins_lazily(engine):
                        give_first(engine, self._tenant_options[OPTION])
                    self._engine = engine
        return self._engine

    def on_creation(self, call: Callable[[Engine], None]) -> None:
        """Do nothing: it was called with the shared engine."""

    def dispose(self) -> None:
        """Do nothing: the connections are those of all tenants."""

    def without_secrets(self, text: str) -> str:
        return self._shared.without_secrets(text)
