"""The Session class of requests, without binds and replicas.

It adds three things to SQLAlchemy's: a COMMIT of a transaction that the database has given up is an error, a savepoint
is always inside of a transaction, and an object that has added itself to the Session cannot be a template for merge().
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction

from .._database.lazy_begin import begin_now
from .._database.observers import enclosing_transactions
from .._database.read_only import is_read_only
from .._database.reads import READS, note_handed_out
from .._drivers.registry import driver_by_dialect
from .._scope.scope import Scope, current
from ..errors import TransactionAborted
from .calls import find_calls
from .connections import open_connections
from .templates import refuse_bulk_save, refuse_merge

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.orm.interfaces import ORMOption

__all__ = ["GIVEN_UP", "RequestSession"]

GIVEN_UP = (
    "The transaction cannot be committed: the database aborted it after an error that the application caught."
    " Let the error propagate, or run the statement that may fail in 'with session.begin_nested():'."
)

Merged = TypeVar("Merged", bound=object)


class RequestSession(Session):
    """The Session of a request."""

    #: whether a transaction of this Session has read on a connection that it gave back before its end
    _gave_back = False
    #: whether this Session listens for databases that join a savepoint
    __joins = False

    def begin(self, nested: bool = False) -> SessionTransaction:
        # Python's sqlite3 begins a transaction before a statement that writes, and not before a SAVEPOINT (its
        # "Transaction control"). A savepoint before the first write would be the transaction itself, and its RELEASE
        # would commit it.
        if nested:
            super().connection()
            for connection in open_connections(self):
                driver_by_dialect[type(connection.dialect)].begin_writing(connection)
            if not self.__joins:
                self.__joins = True
                event.listen(self, "after_begin", _join_savepoint)
        return super().begin(nested)

    def rollback(self) -> None:
        """Roll back, as SQLAlchemy does. What waits for the commit is forgotten, too."""
        try:
            super().rollback()
        finally:
            # No event tells of a transaction that has not begun.
            if not self.in_transaction() and (calls := find_calls(self)) is not None:
                calls.forget()

    def connection(
        self, bind_arguments: Mapping[str, Any] | None = None, execution_options: Mapping[str, Any] | None = None
    ) -> Connection:
        """The Session's connection. What is done with it, or with the driver's, is not seen."""
        is_own = bind_arguments is not None and READS in bind_arguments
        connection = super().connection(bind_arguments, execution_options)  # type: ignore[arg-type]  # a dict, in SQLAlchemy
        if not is_own:
            note_handed_out(connection)
            begin_now(connection)
        return connection

    def merge(self, instance: Merged, *, load: bool = True, options: Sequence[ORMOption] | None = None) -> Merged:
        """Merge an object, as SQLAlchemy does, unless it has added itself to this Session."""
        refuse_merge(self, [instance])
        return super().merge(instance, load=load, options=options)

    if hasattr(Session, "merge_all"):  # pragma: no branch  # since SQLAlchemy 2.1

        def merge_all(
            self, instances: Iterable[Merged], *, load: bool = True, options: Sequence[ORMOption] | None = None
        ) -> Sequence[Merged]:
            """Merge objects, as SQLAlchemy does, unless one has added itself to this Session."""
            instances = list(instances)
            refuse_merge(self, instances)
            return super().merge_all(instances, load=load, options=options)

    def bulk_save_objects(self, objects: Iterable[object], *arguments: Any, **options: Any) -> None:
        """Save objects in bulk, as SQLAlchemy does, unless one has added itself to this Session."""
        objects = list(objects)
        refuse_bulk_save(self, objects)
        super().bulk_save_objects(objects, *arguments, **options)


def _join_savepoint(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    """A database that is first used inside of a savepoint joins the transaction around it first."""
    if not transaction.nested and session.in_nested_transaction():
        driver_by_dialect[type(connection.dialect)].begin_writing(connection)


@event.listens_for(RequestSession, "before_commit")
def _refuse_aborted(session: Session) -> None:
    """Refuse to commit a transaction that the database has given up, also in the application's own commits."""
    scope = current.get(None)
    transaction = scope.transaction if isinstance(scope, Scope) and scope.session is session else None
    # MySQL and MariaDB do not report this, so the observers' record is used.
    given_up = None if transaction is None else transaction.rolled_back
    if given_up is not None and given_up is session.get_transaction():
        raise TransactionAborted(GIVEN_UP)
    for connection in open_connections(session):
        if driver_by_dialect[type(connection.dialect)].is_aborted(connection):
            raise TransactionAborted(GIVEN_UP)


@event.listens_for(RequestSession, "after_commit")
def _count_session_commit(session: RequestSession) -> None:
    """Count the commit, on whatever engine it was: an attempt that has committed is not repeated."""
    if session.in_nested_transaction():
        return  # The release of a savepoint commits nothing.
    transactions = list(enclosing_transactions())
    held = open_connections(session) if transactions else []
    if (held or session._gave_back) and all(is_read_only(connection.engine) for connection in held):
        return
    for transaction in transactions:
        transaction.commits += 1
