"""Has a Session take part in a transaction of the ``transaction`` package: ``request.tm`` commits it or rolls it back.

A Session joins when it begins a transaction of its own, and leaves when that ends, as often as the application does so.
What else takes part, such as a mailer, is committed with it: the Session is the last one that is asked.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction

from .._database.attribution import failure_of
from .._database.recovery import pending_failure
from .._scope.scope import running_scope
from .._sessions.calls import find_calls
from .._transaction.request_transaction import RequestTransaction
from ..failures import Failure, classify

if TYPE_CHECKING:
    from transaction import Transaction, TransactionManager

__all__ = ["CHARGE", "JOINED", "Charge", "JoinedSession", "joining"]

#: The environ key of the request's Charge.
CHARGE = "sqlasession.charge"
#: The key of the JoinedSession in the ``info`` of its Session.
JOINED = "sqlasession_middleware.joined"

REPEATABLE = (Failure.TRANSIENT, Failure.LOST)


class Charge:
    """Who commits a request: the manager of its transaction.

    :param manager: of the ``transaction`` package.
    :param managed: what the WSGI middleware knows of the same transaction.
    :param waits: whether the application may, or may not, begin a transaction of the manager.
    """

    def __init__(self, manager: TransactionManager, managed: RequestTransaction | None, waits: bool = False) -> None:
        self.manager = manager
        self.managed = managed
        self.waits = waits
        #: whether the tween has committed or rolled back
        self.is_over = False

    def join(self, session: Session) -> JoinedSession:
        """Have the Session of the request take part from now on."""
        joined = session.info[JOINED] = JoinedSession(session, self.manager, self.managed, self.waits)
        return joined

    def end(self, session: Session | None) -> None:
        """Leave what is done with the Session from now on to the WSGI middleware."""
        self.is_over = True
        joined = None if session is None else session.info.pop(JOINED, None)
        if joined is not None:
            joined.detach()


class JoinedSession:
    """A Session as a data manager and a synchronizer (``IDataManager``, ``ISynchronizer``).

    :param managed: the transaction of the request, if it is the request's Session.
    :param waits: whether it works without a transaction of the manager, too, and is not committed then.
    """

    def __init__(
        self,
        session: Session,
        manager: TransactionManager,
        managed: RequestTransaction | None = None,
        waits: bool = False,
    ) -> None:
        self.session = session
        self.transaction_manager = manager
        self._managed = managed
        self._waits = waits
        self._is_attached = False
        self._transaction: Transaction | None = None

    def attach(self) -> None:
        """Take part: the Session has begun a transaction.

        :raises transaction.interfaces.NoTransaction: if the manager is explicit, and none was begun.
        """
        if not self._is_attached:
            self._is_attached = True
            # The manager refers to it weakly.
            self.transaction_manager.registerSynch(self)
        if not self._waits:
            self._join(self.transaction_manager.get())

    def detach(self) -> None:
        """Take part no more, after :meth:`attach`."""
        self._is_attached = False
        self.transaction_manager.unregisterSynch(self)

    def _join(self, transaction: Transaction) -> None:
        if self._transaction is not transaction:
            self._transaction = transaction
            transaction.join(self)

    # ISynchronizer

    def newTransaction(self, transaction: Transaction) -> None:  # noqa: N802  # the interface's name
        """The application has begun a transaction, and may have used the Session before.

        A new synchronizer also hears of the transaction that there is, which may be in its commit.
        """
        if self.session.in_transaction() and transaction.status in ("Active", "Doomed"):
            self._join(transaction)

    def beforeCompletion(self, transaction: Transaction) -> None:  # noqa: N802
        """A transaction is about to end that was not begun: the manager has made it when it was asked for one."""
        if self.session.in_transaction():
            self._join(transaction)

    def afterCompletion(self, transaction: Transaction) -> None:  # noqa: N802
        """Nothing is left to do."""

    # IDataManager

    def sortKey(self) -> str:  # noqa: N802
        """The Session commits in ``tpc_vote()``, so it is to be the last that votes."""
        return f"~sqlasession:{id(self)}"

    def tpc_begin(self, transaction: Transaction) -> None:
        """Nothing is to be prepared."""

    def commit(self, transaction: Transaction) -> None:
        """The Session sends what is unsaved when it commits."""

    def tpc_vote(self, transaction: Transaction) -> None:
        """Commit. If that fails, nobody else has committed."""
        if self._managed is None:
            self.session.commit()
        else:
            calls = find_calls(self.session)
            if calls is not None:
                calls.is_held = True  # They may begin a transaction of the manager, which has this one until its end.
            self._managed.commit()

    def tpc_finish(self, transaction: Transaction) -> None:
        self._transaction = None

    def tpc_abort(self, transaction: Transaction) -> None:
        self.abort(transaction)

    def abort(self, transaction: Transaction) -> None:
        """Roll back, unless nobody knows whether the commit took place: the WSGI middleware deals with that."""
        self._transaction = None
        managed = self._managed
        if managed is None:
            self.session.rollback()
        elif managed.scope.failure is None or managed.scope.failure.failure is not Failure.UNKNOWN:
            managed.roll_back()

    def should_retry(self, error: BaseException) -> bool:
        """Whether another attempt may succeed."""
        if self._managed is None:
            return classify(error) in REPEATABLE
        return failure_of(error, pending_failure(self._managed.scope)) in REPEATABLE

    def savepoint(self) -> SessionTransaction:
        """For ``request.tm.savepoint()``: what it returns has a ``rollback()``."""
        return self.session.begin_nested()


@cache
def joining(session_class: Any) -> type[Session]:
    """Derive a class whose Sessions take part in the transactions of requests."""
    derived = type(session_class.__name__, (session_class,), {"__doc__": session_class.__doc__})
    event.listen(derived, "after_transaction_create", _join_transaction)
    return derived


def _join_transaction(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is not None:
        return
    joined: Any = session.info.get(JOINED)
    if joined is None:
        scope = running_scope()
        if scope is None or scope.session is not session or scope.environ is None:
            return
        charge = scope.environ.get(CHARGE)
        if charge is None or charge.is_over:
            return
        joined = charge.join(session)
    joined.attach()
