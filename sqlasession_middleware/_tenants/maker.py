"""Makes the applications of tenants: each on an engine of its own, or all on one pool."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from .._database.binds import DEFAULT
from .._database.engines import read_source
from .._database.replicas import replica_name
from .._drivers.registry import server_of_url
from .._lifecycle.background import BackgroundThreads
from .._settings.arguments import make_with_options
from ..errors import ConfigurationError, shown
from ..middleware import SQLASessionMiddleware
from .application import TenantApplication
from .binds import OPTION, PLACE, TenantSource, asks_for_name, identifiers_of, is_template, template_of
from .local_settings import begin_with_settings, prepare_nothing, setting_statement
from .names import is_name
from .replicas import TenantReplica

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

    from .._database.breaker import Breaker
    from .table import TenantTable

__all__ = ["ApplicationMaker"]

_SETTING: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")


class ApplicationMaker:
    """What is the same for all tenants.

    :param schema: and the others: see :class:`~sqlasession_middleware.tenants.TenantsMiddleware`.
    :raises ConfigurationError: if a setting is wrong.
    """

    def __init__(self, app: WSGIApplication, bind: Any, schema: Any, set_local: Any, options: dict[str, Any]) -> None:
        self._app = app
        self._options = options
        self._schema = _read_schema(schema)
        self._set_local = _read_set_local(set_local)
        self._breakers: dict[str, Breaker] = {}
        #: the threads of all of them
        self.background = make_with_options("background", BackgroundThreads, options.get("background"))
        #: called with each application that is made
        self.on_making: list[Callable[[TenantApplication], None]] = []
        #: the SQLASessionMiddleware of the pool that all tenants share; None if each has its own
        self.shared: SQLASessionMiddleware | None = None
        # The names of its engines that differ by tenant.
        self._differing: set[str] = set()
        self._bind = template_of("bind", bind)
        binds, replicas = options.get("binds") or {}, options.get("replicas") or ()
        self._binds = {key: template_of(f"binds[{key!r}]", each) for key, each in binds.items()}
        self._replicas = [template_of(replica_name(number), each) for number, each in enumerate(replicas)]
        given = {
            "bind": bind,
            **{f"binds[{key!r}]": each for key, each in binds.items()},
            **{replica_name(number): each for number, each in enumerate(replicas)},
        }
        #: what is made of a tenant's name on servers
        self.identifiers = identifiers_of(given.values(), self._schema, self._set_local)
        if self._schema is not None or self._set_local:
            self._share(bind, given)
        elif not is_template(bind):
            problem = "must have {tenant} in its database or user, or differ by 'schema' or 'set_local'."
            raise ConfigurationError("bind", problem)
        elif not any(map(asks_for_name, given.values())):
            self._make_on_own("tenant")  # Nobody's: it checks the options.

    def _share(self, bind: Any, given: Mapping[str, Any]) -> None:
        for parameter, each in given.items():
            if is_template(each):
                problem = (
                    "cannot have {tenant} or be a callable together with 'schema' or 'set_local', which share a pool."
                )
                raise ConfigurationError(parameter, problem)
        if (self._options.get("session_options") or {}).get("twophase"):
            problem = "cannot be used together with 'schema' or 'set_local', which are set when a transaction begins."
            raise ConfigurationError("session_options", problem, "twophase")
        self.shared = SQLASessionMiddleware(self._app, self._source_of(bind), **self._options)
        self._options = {name: value for name, value in self._options.items() if name != "engine_options"}
        sources = self.shared.named_sources()
        server = server_of_url(sources[DEFAULT].url)
        has_settings = "postgresql" in server.names
        if self._set_local and not has_settings:
            raise ConfigurationError("set_local", "is for PostgreSQL only: give each tenant a schema or a database.")
        for number in range(len(self._replicas)):
            if server_of_url(sources[replica_name(number)].url) is not server:
                raise ConfigurationError(replica_name(number), "must be on a server of the same kind as 'bind'.")
        for name, source in sources.items():
            if server_of_url(source.url) is server:
                self._differing.add(name)
                if has_settings:
                    source.on_creation(begin_with_settings)
                    if self._schema is not None and not source.sets("prepare_threshold"):
                        source.on_creation(prepare_nothing)

    def make(self, name: str, table: TenantTable) -> TenantApplication:
        """Make the application of a tenant.

        :param table: what keeps it.
        """
        application = self._make_on_own(name, table) if self.shared is None else self._make_on_shared(name, table)
        for call in self.on_making:
            call(application)
        return application

    def _make_on_own(self, name: str, table: Any = None) -> TenantApplication:
        options = {
            **self._options,
            "binds": {key: template(name) for key, template in self._binds.items()},
            "replicas": [template(name) for template in self._replicas],
        }
        return self._make(name, table, self._source_of(self._bind(name)), options)

    def _make_on_shared(self, name: str, table: TenantTable) -> TenantApplication:
        assert self.shared is not None
        own = self._execution_options(name)
        sources = {
            key: TenantSource(source, own if key in self._differing else {})
            for key, source in self.shared.named_sources().items()
        }
        routing = self.shared.routing
        shared = () if routing is None or routing.replicas is None else routing.replicas.members
        replicas = [TenantReplica(each, sources.pop(replica_name(number))) for number, each in enumerate(shared)]
        return self._make(name, table, sources.pop(DEFAULT), {**self._options, "binds": sources, "replicas": replicas})

    def _source_of(self, bind: Any) -> Any:
        """What the middleware takes as ``bind``, which is no dict."""
        return read_source("bind", bind, self._options.get("engine_options")) if isinstance(bind, Mapping) else bind

    def _make(self, name: str, table: Any, bind: Any, options: dict[str, Any]) -> TenantApplication:
        return TenantApplication(
            self._app,
            bind,
            tenant=name,
            table=table,
            schema=None if self._schema is None else self._schema.replace(PLACE, name),
            shared=self.shared,
            breakers=self._breakers,
            background=self.background,
            options=options,
        )

    def _execution_options(self, name: str) -> dict[str, Any]:
        """What makes the shared engine one tenant's."""
        options: dict[str, Any] = {}
        settings = self._set_local
        if self._schema is not None:
            schema = self._schema.replace(PLACE, name)
            options["schema_translate_map"] = {None: schema}
            # Temporary tables are the connection's, and would be looked for first ("search_path"): those of another
            # tenant would hide a table.
            settings = {"search_path": f'"{schema}", pg_temp', **settings}
        return {**options, OPTION: setting_statement(settings, name)}


def _read_schema(schema: Any) -> str | None:
    if schema is None:
        return None
    if not isinstance(schema, str) or PLACE not in schema or not is_name(schema.replace(PLACE, "x")):
        problem = f"must be {{tenant}} with letters a to z, digits, '-' or '_' around it, got {shown(schema)}."
        raise ConfigurationError("schema", problem)
    return schema


def _read_set_local(settings: Any) -> dict[str, str]:
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        raise ConfigurationError("set_local", f"must be a dict of settings, got {type(settings).__name__}.")
    for name, value in settings.items():
        if not isinstance(name, str) or not _SETTING.fullmatch(name):
            raise ConfigurationError(
                "set_local", f"must have names of PostgreSQL's settings as keys, got {shown(name)}."
            )
        if not isinstance(value, str) or "%" in value:
            raise ConfigurationError("set_local", f"must be a text without '%', got {shown(value)}.", name)
    return dict(settings)
