"""Shows developers what requests do to databases, in a browser.

.. code-block:: python

    app = InspectorMiddleware(SQLASessionMiddleware(app, "postgresql+psycopg://localhost/shop"))

The pages are below ``/_sqlasession/``, for who has the token, and on this machine only. The address with the token is
logged when the inspector is made. It belongs on the machines of developers: see :doc:`inspector`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import Engine

from ._database.forks import fork_safe_lock
from ._database.pings import prepare_pings
from ._dependencies import root_engine
from ._inspector.access import Access
from ._inspector.kept import Engines
from ._inspector.memory import Memory
from ._inspector.store import Store
from ._inspector.watch import Keeper, Watch
from ._recording.listeners import record_engine, record_objects, recorded_name
from ._scope.scope import current, outwards
from ._settings.checks import check_application, check_boolean, check_bytes, check_count, check_path
from ._tenants.application import TenantApplication
from ._wsgi.wrapped import applications_in
from .errors import ConfigurationError, shown
from .middleware import SQLASessionMiddleware
from .tenants import TenantsMiddleware

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from ._inspector.pages import Pages

__all__ = ["InspectorMiddleware"]

logger = logging.getLogger("sqlasession_middleware.inspector")

#: The names of this machine, and its own addresses.
_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_PEERS = ("127.0.0.0/8", "::1")


class InspectorMiddleware:
    """Keeps what the last requests did to databases, and answers below its path with pages that show it.

    :param app: any WSGI application: a :class:`~sqlasession_middleware.SQLASessionMiddleware`, or what leads to one or
        several; or what is inside of one.
    :param path: where the pages are.
    :param token: what a browser has to have: 16 characters or more. None makes one: for each
        process, or for ``store``.
    :param hosts: the names that a request may be sent to, as in ``Host``, without a port.
    :param peers: the addresses, or networks, that a request may come from.
    :param proxied: admit requests that have passed a proxy. ``hosts`` and ``peers`` still apply.
    :param requests: how many requests are kept.
    :param memory: how many bytes they may take, about.
    :param store: a folder to keep them in, so that several processes show the same. None keeps them in memory.
    :param applications: further :class:`~sqlasession_middleware.SQLASessionMiddleware`\\ s, which ``app`` does not lead
        to and which are not around it.
    :raises ConfigurationError: if an option is wrong, or if a package is missing that the pages need.
    """

    def __init__(
        self,
        app: WSGIApplication,
        *,
        path: str = "/_sqlasession",
        token: str | None = None,
        hosts: Collection[str] = _HOSTS,
        peers: Collection[str] = _PEERS,
        proxied: bool = False,
        requests: int = 100,
        memory: int = 16 * 1024 * 1024,
        store: str | None = None,
        applications: Collection[SQLASessionMiddleware] = (),
    ) -> None:
        check_application(app)
        check_path("path", path)
        check_boolean("proxied", proxied)
        check_count("requests", requests)
        check_bytes("memory", memory)
        for each in applications:
            if not isinstance(each, SQLASessionMiddleware):
                raise ConfigurationError("applications", f"must be SQLASessionMiddlewares, got {shown(each)}.")
        self.app = app
        self.path = path.rstrip("/")
        self.store = store
        self._applications = _Applications(applications)
        engines = Engines(self._applications.find, self._applications.without_secrets)
        keeper: Keeper
        if store is None:
            keeper = Memory(requests, memory)
        else:
            keeper = files = Store(store, requests, memory)
            token = files.token() if token is None else token
        self._access = Access(token, hosts, peers, proxied)
        self._watch = Watch(keeper, engines)
        self._pages = _make_pages(self, engines)
        self._is_ready = False
        logger.warning("What requests do to databases is shown at %s", self.url(""))

    def url(self, site: str) -> str:
        """The address of the pages, with the token.

        :param site: the address of the site, ``"http://127.0.0.1:8000"``.
        """
        return f"{site.rstrip('/')}{quote(self.path)}/?token={self._access.token}"

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path.startswith(self.path) and path[len(self.path) : len(self.path) + 1] in ("", "/"):
            response = self._pages.answer(environ)
            if response is not None:
                return response(environ, start_response)
        if not self._is_ready:
            # At the first request, because an application may become part of another one after it was wrapped.
            self._applications.add(each for each in applications_in(self.app))
            self._is_ready = True
        around = current.get(None)
        if around:
            self._applications.add(scope.owner for scope in outwards(around))
        return self._watch.call(self.app, environ, start_response)


class _Applications:
    """The applications whose engines are recorded.

    :param given: those that are known from the beginning.
    """

    def __init__(self, given: Iterable[Any]) -> None:
        # In the order in which they were found. Those of tenants that are forgotten are not kept.
        self._known: WeakKeyDictionary[SQLASessionMiddleware, int] = WeakKeyDictionary()
        self._tenants: WeakSet[TenantsMiddleware] = WeakSet()
        self._lock = fork_safe_lock()
        self.add(given)

    def add(self, found: Iterable[Any]) -> None:
        """Record the engines of applications that are not known yet."""
        with self._lock:
            for application in found:
                if isinstance(application, TenantsMiddleware):
                    self._add_tenants(application)
                    continue
                if isinstance(application, TenantApplication) and application.shared is not None:
                    application = application.shared
                if isinstance(application, SQLASessionMiddleware) and application not in self._known:
                    self._record(application)

    def _add_tenants(self, tenants: TenantsMiddleware) -> None:
        if tenants not in self._tenants:
            self._tenants.add(tenants)
            tenants.on_making(lambda application: self.add([application]))

    def _record(self, application: SQLASessionMiddleware) -> None:
        record_objects()
        number = len(self._known)
        of = f" of application {number + 1}" if number else ""
        if isinstance(application, TenantApplication):
            of = f" of {application.tenant}"
        self._known[application] = number
        for name, source in application.named_sources().items():
            source.on_creation(prepare_pings)
            source.on_creation(partial(record_engine, name=f"{name}{of}"))

    def engines(self) -> Mapping[str, Engine]:
        """All engines by the names that records have."""
        found = {}
        for application in list(self._known):
            for name, engine in application.engines.items():
                found[recorded_name(engine) or name] = engine
        return found

    def find(self, name: str) -> list[Engine]:
        """The engines that records call so."""
        found = {root_engine(each) for app in list(self._known) for each in app.engines.values()}
        return [engine for engine in found if recorded_name(engine) == name]

    def without_secrets(self, text: str) -> str:
        """Replace the passwords of all engines in a text."""
        for application in list(self._known):
            text = application.without_secrets(text)
        return text


def _make_pages(inspector: InspectorMiddleware, engines: Engines) -> Pages:
    try:
        from ._inspector.pages import Pages
    except ImportError as error:
        problem = f"needs {error.name}: pip install 'sqlasession_middleware[inspector]'."
        raise ConfigurationError("inspector", problem) from error
    return Pages(inspector.path, inspector._access, inspector._watch, engines, inspector._applications.engines)
