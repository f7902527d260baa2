"""Which transactions have written, and which cursors are open, where neither database nor driver can tell.

A Session knows its own statements before they are compiled. What they lock, and how their rows are fetched, also
depends on what is nested in them and on the options of the engine: that is seen where the engine sends them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import event
from sqlalchemy.orm import Session

from .._database.read_only import is_read_only
from .._database.reads import note_locked, note_rows
from .._dependencies import call_first, is_server_side
from .._drivers.registry import driver_of
from .request_session import RequestSession
from .statements import is_read, leaves_lock

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.engine import ExecutionContext
    from sqlalchemy.orm import SessionTransaction

__all__ = ["WriteTrackingSession", "has_tracked_write"]

#: An attribute that this module adds to a dialect of SQLAlchemy: whether its engines are watched.
_WATCHED: Final = "sqlasession_tracked"

#: Longer texts are not remembered.
_LONGEST: Final = 10_000


class WriteTrackingSession(RequestSession):
    """The Session of a request that keeps a record of its own statements."""

    #: the transaction of the last statement that wrote; _NEXT if that statement was about to begin it
    _written: object = None
    _NEXT = object()

    def get_bind(self, mapper: Any = None, *, clause: Any = None, **more: Any) -> Any:
        # SQLAlchemy asks for a bind before each statement. Without a statement it is a flush, or a request for the
        # connection itself.
        if clause is None or not is_read(clause):
            self._written = self.get_transaction() or self._NEXT
        elif self._written is self._NEXT:
            self._written = self.get_transaction()
        return super().get_bind(mapper, clause=clause, **more)

    def connection(self, bind_arguments: Any = None, execution_options: Mapping[str, Any] | None = None) -> Connection:
        """The Session's connection. SQLAlchemy does not call ``get_bind()`` if ``bind_arguments`` name the bind."""
        bind = (bind_arguments or {}).get("bind")
        if bind is not None and not is_read_only(bind.engine):
            self._written = self.get_transaction() or self._NEXT
        return super().connection(bind_arguments, execution_options)


def has_tracked_write(session: Session) -> bool:
    """Whether the open transaction may have written, by its statements; True where they are not tracked."""
    if not isinstance(session, WriteTrackingSession):
        return True
    written = session._written
    return written is not None and (written is session._NEXT or written is session.get_transaction())


@event.listens_for(WriteTrackingSession, "after_begin")
def _watch(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    """Watch the statements of an engine, from its first transaction on: a Session may have engines of its own."""
    dialect = connection.dialect
    if hasattr(dialect, _WATCHED) or driver_of(dialect).server.can_tell_writes:
        return
    setattr(dialect, _WATCHED, True)  # Several engines may share it.
    engine = connection.engine
    for name, listener in (("do_execute", _note), ("do_executemany", _note), ("do_execute_no_params", _note_alone)):
        event.listen(engine, name, listener)
        # A listener may execute the statement by itself, and then no other is called after it.
        call_first(engine, listener, name)


def _note(cursor: Any, statement: Any, parameters: Any, context: ExecutionContext) -> None:
    if is_server_side(context) or _is_unbuffered(cursor.__class__):
        note_rows(context)
    # Some drivers have statements that are no texts.
    if not isinstance(statement, str) or (_leaves_lock if len(statement) < _LONGEST else leaves_lock)(statement):
        note_locked(context.root_connection)


def _note_alone(cursor: Any, statement: Any, context: ExecutionContext) -> None:
    _note(cursor, statement, None, context)


_leaves_lock = lru_cache(1000)(leaves_lock)


@cache
def _is_unbuffered(kind: type) -> bool:
    """Whether the cursors of a class fetch rows while they are read: PyMySQL's and mysqlclient's ``cursorclass``."""
    return any(base.__name__ == "SSCursor" for base in kind.__mro__)
