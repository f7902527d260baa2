"""``release()``: a transaction that has only read is ended, and its connection given back, before the request ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy.orm import Session, SessionTransaction, SessionTransactionOrigin
from sqlalchemy.orm.session import SessionTransactionState

from .._database.reads import has_locked, has_only_read, has_unread_rows, was_handed_out
from .._dependencies import innermost_transaction, is_clean, open_connections_of, state_of_transaction
from .._drivers.registry import driver_by_dialect
from .._scope.scope import Scope
from .connections import close_transaction, open_connections
from .registry import current_scope
from .write_tracking import has_tracked_write

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from .._drivers.driver import Driver

__all__ = ["end_known_reading", "end_reading", "has_handed_out", "held_connections", "release", "uncommitted"]

_ACTIVE = SessionTransactionState.ACTIVE
_AUTOBEGIN = SessionTransactionOrigin.AUTOBEGIN


def release() -> bool:
    """End the transaction of the current scope's session, and give its connection back to the pool.

    Call it before something that takes long and needs no database. Loaded objects stay attached; they are reloaded if
    the session has ``expire_on_commit``, which is the default. In a stream of events that a
    :class:`~sqlasession_middleware.transaction.TransactionMiddleware` manages, after the first event was sent, it
    commits the changes, as at the end of each event. Anywhere else it ends only a transaction that has only read.

    :returns: whether no connection is held any more. Unsaved or uncommitted changes keep it, as do row locks, rows
        that are still to be fetched from a server-side cursor, and a block such as ``with session.begin():``.
    :raises ScopeError: outside of a scope.
    """
    scope = current_scope()
    transaction = scope.transaction
    if transaction is not None and transaction.in_units:
        return transaction.end_unit()
    return end_reading(scope)


def end_reading(scope: Scope) -> bool:
    """End the transaction if it has only read. The database is asked whether it has, if nothing else tells.

    :returns: whether no connection is held any more.
    """
    session = scope.session
    if session is None or end_known_reading(session):
        return True
    transaction = session.get_transaction()
    held = open_connections(session)
    assert transaction is not None  # It has connections.
    if not _may_end(session, transaction) or not is_clean(session):
        return False
    if any(_would_lose(session, connection) for connection in held):
        return False
    close_transaction(transaction)
    if session.expire_on_commit:
        session.expire_all()
    return True


def end_known_reading(session: Session, expire: bool = True) -> bool:
    """End the transaction if it is known to have only read. Nothing is waited for to find out.

    :param expire: whether objects expire as at a commit, which code that follows requires.
    :returns: whether no connection is held any more.
    """
    transaction = innermost_transaction(session)
    if transaction is None:
        return True
    held = open_connections_of(transaction)
    if not held:
        return True
    if (
        transaction.origin is not _AUTOBEGIN
        or transaction.nested
        or state_of_transaction(transaction) is not _ACTIVE
        or not is_clean(session)
    ):
        return False
    for connection in held:
        driver = driver_by_dialect[type(connection.dialect)]
        # A connection that was handed out has not only read, as far as that is known.
        if not _has_only_read(session, connection, driver) and (
            was_handed_out(connection) or not driver.has_nothing_to_lose(connection)
        ):
            return False
    close_transaction(transaction)
    if expire and session.expire_on_commit:
        session.expire_all()
    return True


def has_handed_out(session: Session) -> bool:
    """Whether the application may have a connection of the open transaction in hand."""
    return any(map(was_handed_out, open_connections(session)))


def held_connections(session: Session) -> list[Connection] | None:
    """The connections that the end of the transaction would give back; None if it must not be ended now."""
    transaction = session.get_transaction()
    if transaction is None:
        return []
    held = open_connections(session)
    if held and (
        not _may_end(session, transaction)
        or any(map(has_unread_rows, held))
        or any(driver_by_dialect[type(connection.dialect)].has_open_cursor(connection) for connection in held)
    ):
        return None
    return held


def uncommitted(session: Session) -> str:
    """What a session has not committed, in words for the log; empty if there is nothing, or if it has failed."""
    if not session.is_active:
        return ""
    unsaved = sorted({type(each).__name__ for each in (*session.new, *session.dirty, *session.deleted)})
    if unsaved:
        return f"unsaved objects ({', '.join(unsaved)})"
    try:
        written = any(_may_have_written(session, each) for each in open_connections(session))
    except Exception:
        written = True  # The connection is lost. It cannot be asked any more.
    return "uncommitted changes" if written else ""


def _may_end(session: Session, transaction: SessionTransaction) -> bool:
    """Whether the transaction is not a block of the application's, and has not failed."""
    return transaction.origin is _AUTOBEGIN and not session.in_nested_transaction() and session.is_active


def _would_lose(session: Session, connection: Connection) -> bool:
    driver = driver_by_dialect[type(connection.dialect)]
    if driver.server.can_tell_writes:
        # Of a transaction that was aborted, the error of its COMMIT: the application must not take it for done.
        return has_locked(connection) or driver.is_aborted(connection) or driver.has_something_to_lose(connection)
    return not _is_tracked_read(session, connection) or driver.has_open_cursor(connection)


def _may_have_written(session: Session, connection: Connection) -> bool:
    driver = driver_by_dialect[type(connection.dialect)]
    if driver.server.can_tell_writes:
        return driver.has_written(connection)
    return has_tracked_write(session)


def _has_only_read(session: Session, connection: Connection, driver: Driver) -> bool:
    """Whether it is known, without a question, that the transaction has only read."""
    if driver.server.asks_for_writes:
        return has_only_read(connection)
    return not driver.server.can_tell_writes and _is_tracked_read(session, connection)


def _is_tracked_read(session: Session, connection: Connection) -> bool:
    return not (has_tracked_write(session) or has_locked(connection) or has_unread_rows(connection))
