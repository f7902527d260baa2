"""Whether a COMMIT without an answer can have stored anything.

In: the connection that was lost. Out: whether the Session of the running scope, which commits on it, is known to have
only read: because its engine has noted no other statement (:mod:`.reads`), or because it is a replica's. If the Session
has several connections, this has to be known of all: the COMMIT on another one may have stored something already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._dependencies import open_connections_of
from .._scope.scope import running_scope
from .read_only import is_read_only
from .reads import has_only_read

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["stores_nothing"]


def stores_nothing(lost: object) -> bool:
    """Whether the COMMIT that has just failed cannot have stored anything, as far as that is known.

    :param lost: the connection: SQLAlchemy's, the pool's, or the driver's own.
    """
    scope = running_scope()
    session = None if scope is None else scope.session
    transaction = None if session is None else session.get_transaction()
    # In two phases, what was prepared stays, and needs an administrator.
    if session is None or transaction is None or session.twophase:
        return False
    held = open_connections_of(transaction)
    return any(_is_same(each, lost) for each in held) and all(
        is_read_only(each.engine) or has_only_read(each) for each in held
    )


def _is_same(connection: Connection, lost: Any) -> bool:
    if connection is lost or connection.closed or connection.invalidated:
        return connection is lost
    return connection.connection.dbapi_connection is getattr(lost, "dbapi_connection", lost)
