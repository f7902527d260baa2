"""Protocols of the objects that own a scope or manage its transaction. Their classes are in higher layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment
    from sqlalchemy import Connection, Engine
    from sqlalchemy.orm import Session, SessionTransaction

    from ..failures import Failure

__all__ = ["Application", "ManagedTransaction"]


class Application(Protocol):
    """The owner of a scope: a :class:`~sqlasession_middleware.SQLASessionMiddleware`.

    In a shell, where ``local.application`` may be any object, only ``database_engine`` is guaranteed.
    """

    #: whether a failure of the database is answered with 503; an UnavailableMiddleware sets it in its first request
    answers_503: Callable[[WSGIEnvironment, Failure | None], bool] | None

    @property
    def database_engine(self) -> Engine:
        """The default engine."""

    @property
    def engines(self) -> Mapping[str, Engine]:
        """All engines by name."""

    @property
    def new_session(self) -> Callable[..., Session]:
        """A factory of Sessions: each call opens a new one, and passes its options on to the class."""

    @property
    def routing(self) -> Any:
        """The engines by bind key, and the replicas; None if there is only one engine."""

    @property
    def streams(self) -> Collection[str]:
        """Content types whose chunks are units, in addition to ``text/event-stream``."""

    def context(self) -> Any:
        """A context manager for a scope outside of a request."""


class ManagedTransaction(Protocol):
    """The transaction of a request that a TransactionMiddleware manages.

    Observers of engines and sessions, ``doom()`` and ``repeat()`` set its attributes.
    """

    #: whether it is rolled back even if the request succeeds
    doomed: bool
    #: the error that the application asks to repeat the request for
    repeat_for: BaseException | None
    #: whether the request may be repeated
    may_repeat: bool
    #: how many commits took place, the middleware's own among them; counted only where requests are repeated
    commits: int
    #: the connection whose commit was counted last
    committing: Connection | None
    #: the Session's transaction, if the database has rolled it back by itself
    rolled_back: SessionTransaction | None
    #: whether the response is a stream whose units are committed one by one, and the first unit has ended
    in_units: bool

    def end_unit(self) -> bool:
        """Commit the work of one unit of a stream.

        :returns: whether no connection is held any more.
        """
