"""The connection of ``isolated()``, which several Sessions use one after the other.

Each transaction of a Session is a savepoint on this connection. Savepoints form a stack: RELEASE and ROLLBACK TO also
end the savepoints that began later. So only one Session has a savepoint at a time, the Session that executed the last
statement. It is called the holder:

- A holder that has only read loses its savepoint when another Session begins, because it has nothing to roll back. It
  gets a new savepoint with its next statement.
- A holder that has changed something keeps its savepoint until it commits or rolls back. If another Session begins
  before that, an :class:`~sqlasession_middleware.errors.IsolationError` is raised.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary, ref

from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import Session

from .._dependencies import set_execution_options
from .._drivers.registry import driver_of
from ..errors import IsolationError, TransactionAborted
from .deferred_constraints import DeferredConstraints
from .request_session import GIVEN_UP
from .statements import changes_rows

__all__ = ["TRANSACTION_STATEMENT", "IsolatedConnection"]

#: Statements that begin or end a transaction, as SQLAlchemy, this library, or an application sends them on a cursor.
TRANSACTION_STATEMENT = re.compile(
    r"BEGIN( \w+)*$|COMMIT\b|ROLLBACK\b|SAVEPOINT\b|RELEASE SAVEPOINT\b|PREPARE TRANSACTION\b|XA ", re.IGNORECASE
)

_numbers = count(1)


class SessionSavepoint:
    """The transaction of one Session. SQLAlchemy uses it in place of the connection's own transaction."""

    def __init__(self, connection: IsolatedConnection, session: Session) -> None:
        self._connection = connection
        self._session = ref(session)
        #: how errors describe the Session
        self.owner: str = getattr(session, "_isolated_owner", "a Session")
        #: the name of the savepoint; None if the Session is not the holder
        self.name: str | None = None
        #: whether the savepoint has changes that a rollback would undo
        self.written = False
        self.is_active = True
        #: the error that a commit raises, if the changes were already rolled back
        self.lost: Exception | None = None
        #: the execution options that the Session has set on the connection
        self.execution_options = connection.get_execution_options()

    @property
    def is_dropped(self) -> bool:
        """Whether the Session was garbage collected."""
        return self._session() is None

    def commit(self) -> None:
        """Release the savepoint."""
        if self.lost is not None:
            raise self.lost
        self._connection.end(self, keep=True)
        self.is_active = False

    def rollback(self) -> None:
        """Roll back to the savepoint, and release it."""
        self.is_active = False
        self._connection.end(self, keep=False)

    close = rollback


class IsolatedConnection(Connection):
    """The connection of one isolation to one engine, in a transaction that is never committed."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        #: whether the isolation is executing a statement of its own
        self.is_internal = False
        self._holder: SessionSavepoint | None = None
        #: the Session that requested this connection and has not begun its transaction yet
        self._beginning: ref[Session] | None = None
        self._savepoints: WeakKeyDictionary[Session, SessionSavepoint] = WeakKeyDictionary()
        event.listen(self, "before_cursor_execute", self._note_batch)
        event.listen(self, "after_cursor_execute", self._note_statement)

    def begin_isolation(self) -> Callable[[], None]:
        """Begin the transaction.

        :returns: a function that rolls it back.
        """
        transaction = self.begin()
        driver_of(self).begin_writing(self, always=True)  # Otherwise SQLite's driver commits the first savepoint.
        with self.internal():
            self._constraints = DeferredConstraints(self)
        self._own_options = self.get_execution_options()

        def roll_back() -> None:
            self._abandon_holder()
            transaction.rollback()

        return roll_back

    def begin_block(self, owner: str) -> Callable[[], None]:
        """Begin a nested isolation.

        :returns: a function that rolls it back.
        """
        self._take_from_holder(owner)
        name = self._new_savepoint()

        def roll_back() -> None:
            self._cut_off_holder()
            self._roll_back_to(name)

        return roll_back

    def serve(self, session: Session) -> None:
        """Prepare for a Session that is about to use this connection."""
        savepoint = self._savepoints.get(session)
        if savepoint is None or not savepoint.is_active:
            self._beginning = ref(session)
            set_execution_options(self, self._own_options)
            return
        self._beginning = None
        set_execution_options(self, savepoint.execution_options)
        if savepoint is not self._holder:
            self._hold(savepoint)

    def execution_options(self, **options: Any) -> IsolatedConnection:
        """Set execution options of the Session that uses this connection, until its transaction ends."""
        super().execution_options(**options)
        if self._beginning is None and self._holder is not None:
            self._holder.execution_options = self.get_execution_options()
        return self

    def commit(self) -> None:
        """Commit the work of the holder, as ``session.connection().commit()`` does outside of an isolation."""
        self._end_by_hand(keep=True)

    def rollback(self) -> None:
        """Roll back the work of the holder, as ``session.connection().rollback()`` does outside of an isolation."""
        self._end_by_hand(keep=False)

    def _end_by_hand(self, keep: bool) -> None:
        holder = self._holder
        if holder is not None:
            self.end(holder, keep)
            self._hold(holder)

    def begin_nested(self) -> Any:
        """Begin the transaction of a Session that requested this connection; otherwise, SQLAlchemy's savepoint."""
        session = None if self._beginning is None else self._beginning()
        if session is None:
            return super().begin_nested()
        self._beginning = None
        savepoint = SessionSavepoint(self, session)
        self._hold(savepoint)
        self._savepoints[session] = savepoint
        return savepoint

    def in_nested_transaction(self) -> bool:
        """Whether there is a savepoint that another Session would have to join."""
        return self._holder is not None or super().in_nested_transaction()

    def end(self, savepoint: SessionSavepoint, keep: bool) -> None:
        """End the savepoint of a Session, if it still has one.

        :param keep: whether to keep the changes.
        :raises IntegrityError: if a deferred constraint is violated. The savepoint is not ended then.
        """
        name = savepoint.name
        if savepoint is not self._holder or name is None:
            return
        if keep:
            with self.internal():
                if savepoint.written:
                    self._constraints.check()
                self.dialect.do_release_savepoint(self, name)
        self._holder = savepoint.name = None
        if not keep:
            self._roll_back_to(name)

    @contextmanager
    def internal(self) -> Iterator[None]:
        """Mark the statements of the block as those of the isolation, not of the application."""
        before, self.is_internal = self.is_internal, True
        try:
            yield
        finally:
            self.is_internal = before

    def _hold(self, savepoint: SessionSavepoint) -> None:
        self._take_from_holder(savepoint.owner)
        savepoint.name = self._new_savepoint()
        savepoint.written = False
        self._holder = savepoint

    def _take_from_holder(self, other: str) -> None:
        """End the savepoint of the holder, unless the holder still needs it.

        :param other: how the error describes the Session or block that needs the connection.
        :raises IsolationError: if the holder has uncommitted changes.
        """
        holder = self._holder
        if holder is None:
            return
        if driver_of(self).is_aborted(self):
            # The holder can only roll back, with or without changes.
            holder.lost = TransactionAborted(GIVEN_UP)
            self._cut_off_holder()
        elif holder.is_dropped:
            self._cut_off_holder()
        elif holder.written or super().in_nested_transaction():
            raise IsolationError(
                f"{other} cannot use the database yet, because {holder.owner} has changes that are not committed, and"
                " in an isolated() block all sessions share one transaction: commit or roll back the changes, or end"
                " the request or context first (close the response, or read it with buffered=True)."
            )
        else:
            self.end(holder, keep=True)

    def _cut_off_holder(self) -> None:
        """End the savepoint of the holder, and undo its changes."""
        while (nested := self.get_nested_transaction()) is not None:
            nested.close()
        name = self._abandon_holder()
        if name is not None:
            self._roll_back_to(name)

    def _abandon_holder(self) -> str | None:
        """Take the connection from the holder, without ending its savepoint.

        :returns: the name of the savepoint, if there is one. The caller has to end it.
        """
        holder, self._holder = self._holder, None
        if holder is None:
            return None
        if holder.written and holder.lost is None:
            holder.lost = IsolationError(
                f"{holder.owner} cannot commit: its changes were rolled back at the end of the isolated() block."
            )
        name, holder.name = holder.name, None
        return name

    def _new_savepoint(self) -> str:
        name = f"sqlasession_{next(_numbers)}"
        with self.internal():
            self.dialect.do_savepoint(self, name)
        return name

    def _roll_back_to(self, name: str) -> None:
        with self.internal():
            self.dialect.do_rollback_to_savepoint(self, name)
            self.dialect.do_release_savepoint(self, name)
            self._constraints.reset()

    def _note_batch(
        self, connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
    ) -> None:
        # A batch may change rows before it fails.
        if executemany:
            self._note_statement(connection, cursor, statement, parameters, context, executemany)

    def _note_statement(
        self, connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
    ) -> None:
        holder = self._holder
        if holder is None or holder.written or self.is_internal or TRANSACTION_STATEMENT.match(statement):
            return
        holder.written = changes_rows(statement)
