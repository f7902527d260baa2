"""Calls that wait for the commit of a Session's transaction.

The events of the Session tell what becomes of it. A Session that nothing waits for has none of these listeners.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction

__all__ = ["Calls", "calls_of", "waiting"]

logger = logging.getLogger("sqlasession_middleware.after_commit")

#: By the Session that they wait for.
waiting: WeakKeyDictionary[Session, Calls] = WeakKeyDictionary()


class _Call(NamedTuple):
    call: Callable[[], object]
    #: the innermost transaction or savepoint when it was added; None if there was none yet
    transaction: SessionTransaction | None


class Calls:
    """What waits for the next commit of one Session.

    :param session: the Session.
    :param open_context: opens the context manager in which each call runs.
    """

    def __init__(self, session: Session, open_context: Callable[[], Any]) -> None:
        self._open_context = open_context
        self._waiting: list[_Call] = []
        self._is_durable = False
        #: set while a transaction is ended that has only read: nothing is undone by that
        self.is_end_of_reading = False
        event.listen(session, "after_commit", self._note_commit)
        event.listen(session, "after_soft_rollback", self._note_rollback)
        event.listen(session, "after_transaction_end", self._note_end)

    def add(self, session: Session, call: Callable[[], object]) -> None:
        """Have a call wait."""
        self._waiting.append(_Call(call, session.get_nested_transaction() or session.get_transaction()))

    def forget(self) -> None:
        """Forget what waits: it will not become durable."""
        self._waiting.clear()

    def _note_commit(self, session: Session) -> None:
        # The release of a savepoint commits nothing.
        self._is_durable = not session.in_nested_transaction()

    def _note_rollback(self, session: Session, ended: SessionTransaction) -> None:
        self._waiting = [each for each in self._waiting if not _is_inside(each.transaction, ended)]

    def _note_end(self, session: Session, ended: SessionTransaction) -> None:
        if ended.parent is not None:
            return
        # Only now are the Session's connections back in their pools, and the calls may need them.
        if self._is_durable:
            self._is_durable = False
            durable, self._waiting = self._waiting, []
            for each in durable:
                self._run(each.call)
        elif not self.is_end_of_reading:
            self._waiting.clear()

    def _run(self, call: Callable[[], object]) -> None:
        try:
            with self._open_context():
                call()
        except Exception:
            logger.exception("A call after the commit failed: %r", call)


def calls_of(session: Session, open_context: Callable[[], Any]) -> Calls:
    """What waits for a Session."""
    calls = waiting.get(session)
    if calls is None:
        calls = waiting[session] = Calls(session, open_context)
    return calls


def _is_inside(transaction: SessionTransaction | None, outer: SessionTransaction) -> bool:
    while transaction is not None and transaction is not outer:
        transaction = transaction.parent
    return transaction is outer
