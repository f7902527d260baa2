"""The Session class of tenants whose settings are sent together with the first statement of a transaction."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import event
from sqlalchemy.orm import Session

from .._database.lazy_begin import begin_now
from .._database.reads import with_first

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.orm import SessionTransaction

__all__ = ["tenant_session"]

_PACKAGE: Final = __name__.partition(".")[0]


class _TenantSession(Session):
    """A mixin for the application's Session class.

    Whichever way an engine of the tenant's is named, the Session has one transaction on it.
    """

    def get_bind(self, *arguments: Any, **options: Any) -> Any:
        """Return the engine that the application's class chooses, with settings that may wait."""
        return with_first(super().get_bind(*arguments, **options))

    def connection(self, bind_arguments: Any = None, execution_options: Mapping[str, Any] | None = None) -> Connection:
        """Return the Session's connection. SQLAlchemy does not call get_bind() if ``bind_arguments`` have a bind."""
        bind = (bind_arguments or {}).get("bind")
        if bind is not None:
            bind_arguments = {**bind_arguments, "bind": with_first(bind)}
        return super().connection(bind_arguments, execution_options)


@event.listens_for(_TenantSession, "after_begin")
def _begin_before_others(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    """Send the settings now if the application listens as well: it may use a cursor of the driver.

    The listeners of this class come first, because it is the first base of the Session's.
    """
    if any(_package_of(listener) != _PACKAGE for listener in session.dispatch.after_begin):
        begin_now(connection)


def _package_of(listener: object) -> str:
    return str(getattr(listener, "__module__", "")).partition(".")[0]


@cache
def tenant_session(base: type[Session]) -> type[Session]:
    """A subclass of ``base`` whose transactions begin with the settings of a tenant."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (_TenantSession, base), names)
