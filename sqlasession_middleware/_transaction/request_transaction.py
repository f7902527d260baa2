"""The transaction of one attempt: its state, and how it is committed or rolled back."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from .._database.read_only import is_read_only
from .._drivers.registry import driver_by_dialect
from .._scope.deadline import remaining
from .._scope.scope import Scope
from .._sessions.connections import open_connections, remove_session
from .._sessions.release import end_known_reading, held_connections
from ..failures import Failure

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session, SessionTransaction

__all__ = ["RequestTransaction"]

logger = logging.getLogger("sqlasession_middleware.transaction")


class RequestTransaction:
    """A :class:`~sqlasession_middleware._scope.protocols.ManagedTransaction`, which documents the attributes.

    :param scope: the scope whose session is committed.
    :param may_repeat: whether the request may be repeated.
    """

    # Defaults are class attributes, so that a request that does not change them does not have to set them.
    doomed = False
    has_calls = False
    repeat_for: BaseException | None = None
    #: whether the commit veto decided to roll back
    vetoed = False
    commits = 0
    committing: Connection | None = None
    rolled_back: SessionTransaction | None = None
    in_units = False
    #: whether the transaction was committed or rolled back for good
    concluded = False
    #: whether the middleware's own commit has failed
    commit_failed = False

    def __init__(self, scope: Scope, may_repeat: bool) -> None:
        self.scope = scope
        self.may_repeat = may_repeat

    def conclude(self) -> None:
        """Commit the transaction, or roll it back if it is vetoed or doomed.

        :raises Exception: if the commit failed. Nothing was stored then, unless the outcome is unknown.
        """
        session = self.scope.session
        if session is not None:
            if self.doomed or self.vetoed:
                self.roll_back()
            else:
                self.commit()
        self.concluded = True

    def commit(self) -> None:
        """Commit what there is. More may follow, which :meth:`conclude` commits.

        :raises Exception: if the commit failed.
        """
        session = self.scope.session
        if session is None or not (session.in_transaction() or self.has_calls):
            return
        if self.may_repeat and not session.twophase and _commits_to_several(session):
            self.may_repeat = False  # One database may commit before another one fails.
        try:
            session.commit()
        except Exception:
            self.commit_failed = True
            raise

    def end_unit(self) -> bool:
        """Commit the work of one unit of a stream.

        :returns: whether the session no longer holds a connection.
        """
        session = self.scope.session
        if session is None:
            return True
        if session.is_active and held_connections(session) is None:
            return False
        if self.doomed or self.vetoed:
            self.roll_back()
        elif session.in_transaction() or self.has_calls:
            try:
                session.commit()
            except Exception:
                self.commit_failed = True
                raise
        return True

    def end_before_units(self) -> None:
        """End the transaction before the first unit of a stream. What has only read is not committed.

        So the request can still be repeated if the first unit fails.
        """
        session = self.scope.session
        if session is None:
            return
        given_up = self.rolled_back is not None or any(
            driver_by_dialect[type(connection.dialect)].is_aborted(connection)
            for connection in open_connections(session)
        )
        if self.doomed or self.vetoed or given_up or not end_known_reading(session):
            self.end_unit()

    def roll_back(self) -> None:
        """Roll back the session, in any state. If that fails, close the session."""
        session = self.scope.session
        if session is not None:
            try:
                session.rollback()
            except Exception:
                logger.exception("A transaction could not be rolled back: its session is closed")
                self.remove_session()

    def abort(self, failure: Failure | None = None) -> None:
        """Roll back and conclude the transaction.

        :param failure: the failure of the database that is the reason, if there is one.
        """
        self.concluded = True
        session = self.scope.session
        if failure is Failure.UNKNOWN and session is not None and session.twophase:
            # The other databases have prepared their parts, and one may have committed. The parts stay prepared until
            # an administrator commits them or rolls them back.
            session.invalidate()
        else:
            self.roll_back()

    def reason_to_repeat(
        self, failure: Failure | None, cause: BaseException, retry_on: tuple[type[Exception], ...]
    ) -> BaseException | None:
        """Decide whether to try again, after a failure or because the application has asked for it.

        :param cause: the error, or what the application has given as the reason.
        :param retry_on: further errors that may not recur.
        :returns: the reason; None if the attempt is the last one.
        """
        asked, self.repeat_for = self.repeat_for, None
        repeatable = failure in (Failure.TRANSIENT, Failure.LOST) or isinstance(cause, retry_on)
        if (repeatable or asked is not None) and self.may_repeat and self.commits == 0 and remaining() != 0:
            return asked or cause
        return None

    def remove_session(self) -> None:
        """Close the session. A failure is logged."""
        try:
            remove_session(self.scope)
        except Exception:
            logger.exception("A session could not be closed")


def _commits_to_several(session: Session) -> bool:
    """Whether a commit of the session commits on more than one connection."""
    held = open_connections(session)
    return len(held) > 1 and sum(not is_read_only(connection.engine) for connection in held) > 1
