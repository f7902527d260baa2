"""One application, and a database, a schema or rows for each of its tenants.

.. code-block:: python

    app = TenantsMiddleware(
        app,
        "postgresql+psycopg://localhost/shop_{tenant}",
        tenant="subdomain",
        domain="example.com",
        known={"bind": "postgresql+psycopg://localhost/directory", "query": "SELECT name FROM tenant"},
    )

A request to ``acme.example.com`` runs as in a :class:`~sqlasession_middleware.SQLASessionMiddleware` on the database
``shop_acme``. That is made when it is needed first, and forgotten when it was idle. See :doc:`tenants`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

from ._recording.record import RECORD, TENANT
from ._settings.checks import check_application, check_boolean, check_count, check_seconds_above_0
from ._settings.ini import TENANTS_PREFIX, ini_names, ini_place, read_settings, split_tenants
from ._settings.options import TENANTS_OPTIONS
from ._tenants.application import TenantApplication, now
from ._tenants.maker import ApplicationMaker
from ._tenants.names import KnownNames
from ._tenants.readiness import Readiness, readiness_of_tenants
from ._tenants.resolvers import make_resolver, shift_path
from ._tenants.table import TenantTable
from ._wsgi import error_pages
from .errors import ConfigurationError, UnknownTenantError, shown

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy import Engine

    from ._lifecycle.context import ScopeContext
    from .middleware import SQLASessionMiddleware

__all__ = ["TenantsMiddleware"]

logger = logging.getLogger(__name__)

#: Seconds, where nobody knows the names.
_RETRY_AFTER = 10

#: Seconds between two looks through the table, while one request asks for the names and the others go on.
_PAUSE = 1.0


class TenantsMiddleware:
    """Runs each request in the application of its tenant.

    :param app: any WSGI application.
    :param bind: the database of a tenant, as for :class:`~sqlasession_middleware.SQLASessionMiddleware`, with
        ``{tenant}`` in its database or user; or a callable of the tenant's name that returns it. Without either, all
        tenants share one pool, and differ by ``schema`` or ``set_local``.
    :param tenant: how a request tells its tenant: ``"subdomain"`` of ``domain``, ``"host"`` by ``hosts``, ``"path"``,
        ``"header:NAME"``; or a callable of environ that returns the name, or None for none, or its dotted name.
    :param known: the names of all tenants; or a callable that returns them, or its dotted name; or a dict with the
        ``query`` that selects them, and the ``bind`` of the database to ask.
    :param domain: with ``tenant="subdomain"``: the domain that all tenants are below of.
    :param hosts: with ``tenant="host"``: a dict of tenants by hosts, or a callable of the host.
    :param schema: the schema of a tenant, with ``{tenant}``.
    :param set_local: settings of PostgreSQL for each transaction of a tenant, with ``{tenant}`` in their values.
    :param required: whether a request without a tenant is answered with 404. If not, it is handed to ``app`` as it is.
    :param known_seconds: for how many seconds the names hold that were asked for.
    :param idle: after how many seconds without a request a tenant is forgotten, and its connections are closed.
    :param most: how many tenants may have pools of their own, except for those that are in use.
    :param options: of :class:`~sqlasession_middleware.SQLASessionMiddleware`. ``binds`` and ``replicas`` may have
        ``{tenant}`` as well.
    :raises ConfigurationError: if a setting is wrong. No database is contacted to find that out.
    """

    def __init__(
        self,
        app: WSGIApplication,
        bind: Any,
        *,
        tenant: str | Callable[[WSGIEnvironment], str | None],
        known: Any,
        domain: str | None = None,
        hosts: Any = None,
        schema: str | None = None,
        set_local: Mapping[str, str] | None = None,
        required: bool = True,
        known_seconds: float = 60.0,
        idle: float = 600.0,
        most: int = 100,
        **options: Any,
    ) -> None:
        check_application(app)
        self.app = app
        #: what health checks call it
        self.name: str | None = options.get("name")
        self._resolve = make_resolver(tenant, domain, hosts)
        self._shifts = tenant == "path"
        check_boolean("required", required)
        self._required = required
        check_seconds_above_0("known_seconds", known_seconds)
        check_seconds_above_0("idle", idle)
        check_count("most", most)
        self._maker = ApplicationMaker(app, bind, schema, set_local, options)
        #: the SQLASessionMiddleware of the pool that all tenants share; None if each has its own
        self.shared = self._maker.shared
        self._known = KnownNames(known, known_seconds, self._maker.identifiers)
        self._table = TenantTable(self._maker.make, idle, most)
        #: until when nothing has to be looked at but the table
        self._look_again = 0.0
        #: the names when the table was looked through
        self._swept: frozenset[str] | None = None

    @classmethod
    def from_config(cls, app: WSGIApplication, config: Mapping[str, str], prefix: str = "sqlalchemy.") -> Self:
        """Build the middleware from an ini section.

        :param config: the keys of :meth:`SQLASessionMiddleware.from_config`, and those that begin with ``tenants.``.
        :param prefix: the prefix of the engine's keys.
        :raises ConfigurationError: if a key is missing, unknown or wrong. The error names the key and the file.
        """
        own, rest = split_tenants(config)
        arguments = read_settings(rest, prefix)
        try:
            return cls(app, **arguments, **own)
        except ConfigurationError as error:
            names = {**ini_names(prefix, arguments), **{name: f"{TENANTS_PREFIX}{name}" for name in TENANTS_OPTIONS}}
            raise error.renamed(names, ini_place(config)) from error.__cause__

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        name = self._resolve(environ)
        application = self._table.applications.get(name)  # type: ignore[arg-type]  # None is nobody's name
        if application is None or now() >= self._look_again:
            answer = self._look(name)
            if not isinstance(answer, TenantApplication):
                return answer(environ, start_response)
            application = answer
        environ[TENANT] = name
        record = environ.get(RECORD)
        if record is not None:
            record.tenant = name
        if self._shifts:
            shift_path(environ, application.tenant)
        return application(environ, start_response)

    def _look(self, name: str | None) -> WSGIApplication:
        """The application of a tenant, or what answers in its place."""
        if name is None:
            return error_pages.not_found() if self._required else self.app
        try:
            is_known = name in self._known
        except Exception:
            logger.exception("The names of the tenants cannot be asked for: a request is answered with 503")
            return error_pages.unavailable(_RETRY_AFTER)
        self._sweep()
        if is_known:
            return self._table.find(name)
        return error_pages.not_found()

    def _sweep(self) -> None:
        """Forget who is idle or not known any more, if it is time to look."""
        # Nothing is asked here: one request may be asking, for long, while the others go on.
        names = self._known.last
        if names is not None and (names is not self._swept or now() >= self._look_again):
            self._table.sweep(names)
            self._swept = names
            self._look_again = max(min(self._known.until, self._table.next_sweep), now() + _PAUSE)

    def application(self, name: str) -> TenantApplication:
        """The application of a tenant: a :class:`~sqlasession_middleware.SQLASessionMiddleware`.

        :raises UnknownTenantError: if there is no tenant of that name.
        """
        if name not in self._known and name not in self._known.ask():
            raise UnknownTenantError(f"There is no tenant {shown(name)}: 'known' does not have it.")
        self._sweep()
        return self._table.find(name)

    def context(self, name: str, *, deadline: float | None = None) -> ScopeContext:
        """Open a scope of a tenant outside of a request, as :meth:`SQLASessionMiddleware.context` does.

        :raises UnknownTenantError: if there is no tenant of that name.
        """
        return self.application(name).context(deadline=deadline)

    def init_database(self, name: str) -> None:
        """Create a tenant's schema, where it has one, and the tables that do not exist yet. The database has to exist.

        :raises UnknownTenantError: if there is no tenant of that name.
        """
        self.application(name).init_database()

    def names(self) -> list[str]:
        """The names of all tenants, in their order. They are asked for now."""
        return sorted(self._known.ask())

    def on_making(self, call: Callable[[TenantApplication], None]) -> None:
        """Call a function with each tenant's application when it is made, and with those that are there."""
        self._maker.on_making.append(call)
        for application in list(self._table.applications.values()):
            call(application)

    def prepare_readiness(self, prepare: Callable[[Engine], None]) -> None:
        """Have a function called with each engine that a health check may ask, when it is created."""

        def prepare_all(application: SQLASessionMiddleware) -> None:
            for source in application.named_sources().values():
                source.on_creation(prepare)

        if self._known.directory is not None:
            self._known.directory.on_creation(prepare)
        if self.shared is None:
            self.on_making(prepare_all)
        else:
            prepare_all(self.shared)

    def readiness(self) -> Readiness:
        """What a health check asks now."""
        return readiness_of_tenants(self.shared, list(self._table.applications.values()), self._known)

    def dispose(self) -> None:
        """Close the idle connections of all tenants. What they have begun in the background is waited for first."""
        self._maker.background.wait()
        self._table.close()
        self._known.dispose()
        if self.shared is not None:
            self.shared.dispose()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.app!r}>"
