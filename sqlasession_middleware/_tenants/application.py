"""The application of one tenant: a SQLASessionMiddleware that knows whether it is in use."""

from __future__ import annotations

from functools import cache
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from .._database.reads import sends_first
from .._database.schema import create_schema
from .._scope.scope import ENDED, Scope
from ..middleware import SQLASessionMiddleware
from .sessions import tenant_session

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed.wsgi import WSGIApplication
    from sqlalchemy.orm import Session

    from .._database.breaker import Breaker
    from .._lifecycle.background import BackgroundThreads

__all__ = ["TenantApplication"]

#: A clock that nobody sets, but for tests.
now = monotonic


class Keeper(Protocol):
    """What keeps the applications of tenants."""

    applications: dict[str, TenantApplication]

    def keep(self, application: TenantApplication) -> None:
        """Keep one again."""

    def relieve(self) -> None:
        """Forget some, if there are too many."""


class TenantApplication(SQLASessionMiddleware):
    """What ``application`` is in a request of a tenant.

    :param tenant: its name.
    :param table: what keeps it.
    :param schema: the tenant's, if it has one.
    :param shared: the application of the pool that all tenants share; None if each has its own.
    :param breakers: and ``background``: what all tenants share.
    :param options: of :class:`~sqlasession_middleware.SQLASessionMiddleware`.
    """

    def __init__(
        self,
        app: WSGIApplication,
        bind: Any,
        *,
        tenant: str,
        table: Keeper,
        schema: str | None,
        shared: SQLASessionMiddleware | None,
        breakers: dict[str, Breaker],
        background: BackgroundThreads,
        options: dict[str, Any],
    ) -> None:
        super().__init__(app, bind, **options)
        #: the name of the tenant
        self.tenant = tenant
        #: the tenant's schema; None where it has a database, or shares its tables
        self.schema = schema
        #: the application of the pool that all tenants share; None if each has its own
        self.shared = shared
        self.breakers = breakers
        self._background = background
        self._table = table
        #: whether there was a tenant of that name when it was looked for last
        self.is_known = True
        #: the ids of the scopes that are open
        self.users: set[int] = set()
        #: when the last one began, by :data:`now`
        self.last_used = now()
        self._new_scope = counted(self._new_scope)
        self.context_scope = counted(self.context_scope)

    def begin_use(self, scope: Scope) -> None:
        """Note a scope that begins."""
        self.users.add(id(scope))
        self.last_used = now()
        if self._table.applications.get(self.tenant) is not self:
            self._table.keep(self)  # It was forgotten after it was looked up.

    def end_use(self, scope: Scope) -> None:
        """Note a scope that has ended."""
        self.users.discard(id(scope))
        if not self.users and self._table.applications.get(self.tenant) is not self:
            self.close_idle()  # Another one has its name by now, or nobody.
        self._table.relieve()

    def is_in_use(self) -> bool:
        """Whether a request, an open response, a context or a connection is there."""
        return bool(self.users) or any(_is_out(engine) for engine in self.open_engines())

    def open_engines(self) -> list[Any]:
        """The engines of its own that were created."""
        return [source.created for source in self._sources() if not source.given and source.created is not None]

    def close_idle(self) -> None:
        """Close the idle connections. Nothing is waited for."""
        for source in self._sources():
            source.dispose()

    def _session_maker(
        self, derive: Callable[[type[Session]], type[Session]] = lambda base: base
    ) -> Callable[..., Session]:
        if not any(sends_first(engine) for engine in self.engines.values()):
            return super()._session_maker(derive)
        return super()._session_maker(lambda base: derive(tenant_session(base)))  # type: ignore[arg-type]  # a class can be hashed

    def create_schema(self) -> None:
        """Create the tenant's schema, where it has one and it does not exist yet."""
        if self.schema is not None:
            create_schema(self.engine, self.schema)

    def init_database(self) -> None:
        """Create the tables that do not exist yet, and before them the tenant's schema, where it has one."""
        self.create_schema()
        super().init_database()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.tenant!r} of {self.app!r} on {self._source!r}>"


def _is_out(engine: Any) -> bool:
    checked_out = getattr(engine.pool, "checkedout", None)  # Not every pool counts its connections.
    return checked_out is not None and checked_out() > 0


class TenantScope(Scope):
    """A scope that its application counts."""

    def __init__(self, application: TenantApplication) -> None:
        super().__init__(application=application)
        application.begin_use(self)

    def clear(self) -> None:
        """Forget the scope's values; at the end of the scope, count it as ended."""
        super().clear()
        if self.state is ENDED:
            owner: Any = self.owner
            owner.end_use(self)


@cache
def counted(scope_class: type[Scope]) -> type[Scope]:
    """A subclass of ``scope_class`` that is counted."""
    return TenantScope if scope_class is Scope else type(scope_class.__name__, (TenantScope, scope_class), {})
