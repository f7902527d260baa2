"""The connections that a Session holds, and how they are given back whatever fails."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.session import SessionTransactionState

from .._dependencies import (
    TRANSACTION,
    connections_of,
    disown,
    forget_connection,
    open_connections_of,
    state_of_transaction,
)
from .._scope.scope import Scope
from .calls import find_calls

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.pool import PoolProxiedConnection

__all__ = ["close_transaction", "disown_returned", "give_back", "open_connections", "remove_session"]

_ACTIVE = SessionTransactionState.ACTIVE

logger = logging.getLogger("sqlasession_middleware.sessions")


def open_connections(session: Session) -> list[Connection]:
    """The connections that a Session's transaction holds at the moment."""
    transaction = session.get_transaction()
    return [] if transaction is None else open_connections_of(transaction)


def remove_session(scope: Scope) -> None:
    """Take the Session out of its scope, then close it.

    :raises BaseException: what ``close()`` raised. By then every connection that the Session held has been
        invalidated, and its place in the pool is free.
    """
    session = scope.session
    if session is None:
        return
    scope.session = None
    # Session.close() forgets its transaction first and stops at the first connection whose rollback fails. Only that
    # transaction knows which connections the Session still holds.
    transaction = getattr(session, TRANSACTION, None)
    try:
        if transaction is not None and state_of_transaction(transaction) is not _ACTIVE:
            # After a COMMIT that failed, close() takes the transaction to have ended. SQLite leaves it open if a
            # deferred constraint is violated, and the next request would find it on the connection.
            session.rollback()
        session.close()
    except BaseException:
        _invalidate_all(transaction)
        raise


def disown_returned(scope: Scope) -> None:
    """Have the Session of a scope that was dropped forget the connections that its pools have taken back already.

    If a cycle is collected, the pools hear of it first: they roll back the connections, and hand them to whoever asks.
    The scope is ended after that. Closing its Session would roll back the transaction of another request, and make its
    connection available to a third one.
    """
    for connection in () if scope.session is None else open_connections(scope.session):
        if not (connection.closed or connection.invalidated) and _was_taken_back(connection.connection):
            disown(connection.connection)
            connection.invalidate()


def _was_taken_back(proxy: PoolProxiedConnection) -> bool:
    # A pool refers weakly to what it has handed out. The collector clears these references before it calls anybody.
    return not proxy.is_detached and weakref.getweakrefcount(proxy) == 0


def give_back(session: Session, connection: Connection) -> None:
    """Give a connection back that has only read, although the Session's transaction goes on."""
    transaction = session.get_transaction()
    assert transaction is not None  # It has the connection.
    forget_connection(transaction, connection)
    try:
        connection.close()
    except Exception:
        # It is lost, and nothing with it. Older versions of SQLAlchemy have not given it back by now.
        if not connection.closed:  # pragma: no cover
            _invalidate(connection)


def close_transaction(transaction: SessionTransaction) -> None:
    """End the transaction of a Session without a commit, and leave the Session's objects as they are.

    ``Session.rollback()`` would expire them, whatever ``expire_on_commit`` says. ``Session.commit()`` would make
    durable what the end of a request undoes, such as PostgreSQL's SET.

    :param transaction: one that has only read: what waits for its commit goes on waiting.
    """
    calls = find_calls(transaction.session)
    if calls is not None:
        calls.is_end_of_reading = True
    try:
        transaction.close()
    except BaseException:
        _invalidate_all(transaction)
        raise
    finally:
        if calls is not None:
            calls.is_end_of_reading = False


def _invalidate_all(transaction: Any) -> None:
    """Invalidate the connections of a SessionTransaction that could not be closed."""
    while transaction is not None:
        for connection, autoclose in connections_of(transaction):
            if autoclose and not connection.closed:
                _invalidate(connection)
        transaction = transaction.parent


def _invalidate(connection: Any) -> None:
    try:
        connection.invalidate()
        connection.close()
    except Exception:
        logger.exception("A connection of a session that could not be closed could not be invalidated either")
