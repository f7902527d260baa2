"""Calls that wait for the commit of a Session's transaction.

The events of the Session tell what becomes of it. A Session that nothing waits for has none of these listeners.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Final, NamedTuple
from weakref import ref

from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.session import SessionTransactionState

from .._dependencies import state_of_transaction
from ..errors import named

__all__ = ["Calls", "calls_of", "find_calls", "refuse_unfinished"]

logger = logging.getLogger("sqlasession_middleware.after_commit")

#: An attribute that this module adds to a Session: a weak reference to its Calls. Only its listeners keep these alive.
#: Each end of a transaction looks at it, so that a dictionary of weak references would cost more than the rest.
_CALLS: Final = "sqlasession_calls"


class _Call(NamedTuple):
    call: Callable[[], object]
    #: the innermost transaction or savepoint when it was added; None if there was none yet
    transaction: SessionTransaction | None


class Calls:
    """What waits for the next commit of one Session.

    :param session: the Session.
    :param run: makes a call, in a context of its own.
    """

    def __init__(self, session: Session, run: Callable[[Callable[[], object]], object]) -> None:
        self._run = run
        self._waiting: list[_Call] = []
        #: what follows a commit that has taken place
        self._due: list[_Call] = []
        self._is_durable = False
        #: set until what has committed the Session is done with its other work: :meth:`make` is called then
        self.is_held = False
        #: set while a transaction is ended that has only read: nothing is undone by that
        self.is_end_of_reading = False
        self._hears_commits = False
        event.listen(session, "after_soft_rollback", self._note_rollback)
        event.listen(session, "after_transaction_end", self._note_end)

    def add(self, session: Session, call: Callable[[], object]) -> None:
        """Have a call wait."""
        root = session.get_transaction()
        if root is not None and state_of_transaction(root) is SessionTransactionState.COMMITTED:
            # A listener of the same event has added it, and SQLAlchemy takes no other one in that time.
            self._is_durable = True
        else:
            self._hear_commits(session)
        self._waiting.append(_Call(call, session.get_nested_transaction() or session.get_transaction()))

    def forget(self) -> None:
        """Forget what waits: it will not become durable."""
        self._waiting.clear()

    def make(self) -> None:
        """Make the calls whose commit has taken place."""
        self.is_held = False
        due, self._due = self._due, []
        fatal = None
        for each in due:
            try:
                self._run(each.call)
            except BaseException as failure:
                logger.exception("A call after the commit failed: %s", named(each.call))
                if not isinstance(failure, Exception):
                    fatal = failure
        if fatal is not None:
            raise fatal

    def note_durable(self) -> None:
        """Have nothing wait any more: what it has waited for is durable."""
        waiting, self._waiting = self._waiting, []
        self._due += waiting

    def _hear_commits(self, session: Session) -> None:
        if not self._hears_commits:
            self._hears_commits = True
            event.listen(session, "after_commit", self._note_commit)

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
            self.note_durable()
            if not self.is_held:
                self.make()
        elif not self.is_end_of_reading:
            self._waiting.clear()


def calls_of(session: Session, run: Callable[[Callable[[], object]], object]) -> Calls:
    """What waits for a Session; new, with ``run``, if nothing has waited for it yet."""
    calls = find_calls(session)
    if calls is None:
        calls = Calls(session, run)
        setattr(session, _CALLS, ref(calls))
    return calls


def find_calls(session: Session) -> Calls | None:
    """What waits for a Session; None if nothing has waited for it yet."""
    found: ref[Calls] | None = getattr(session, _CALLS, None)
    return None if found is None else found()


def refuse_unfinished(function: str, call: object, result: object) -> None:
    """Refuse what a function has returned if its work is still to be done.

    :param function: what it was given to.
    :raises TypeError: if the result is a generator or a coroutine.
    """
    if inspect.isgenerator(result) or inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()  # Python would warn that it was never awaited.
        raise TypeError(
            f"{function}() needs a function that has done its work when it returns, and {named(call)} returns"
            f" {type(result).__name__}: call it in a function that uses up what it returns."
        )


def _is_inside(transaction: SessionTransaction | None, outer: SessionTransaction) -> bool:
    while transaction is not None and transaction is not outer:
        transaction = transaction.parent
    return transaction is outer
