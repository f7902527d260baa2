"""``session``: the global scoped session, and how one Session is opened and removed.

The registry behind it is the scope itself: one slot, no dict to forget a key in.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from threading import RLock
from typing import TYPE_CHECKING, Any, cast
from weakref import ref

from sqlalchemy import Result, event
from sqlalchemy.orm import ORMExecuteState, Session, SessionTransaction, scoped_session, sessionmaker
from sqlalchemy.util import ScopedRegistry

from .context import ENDED, WAITING, Scope, begin, current
from .drivers import begin_writing, can_tell_writes, is_aborted
from .errors import ScopeError, TransactionAborted, shown
from .forks import after_fork, check_process, has_unseen_forks
from .statements import is_read
from .watch import attempts, read_only

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.engine import ExecutionContext

__all__ = [
    "close_transaction",
    "has_noted_cursor",
    "has_noted_write",
    "open_connections",
    "remove_session",
    "session",
    "session_class_for",
]

logger = logging.getLogger(__name__)

# Threads that share a scope (they were started with its context) must not open two sessions for it. Reentrant, because
# the garbage collector may run an abandoned body's code, and with it this module's, at any time.
_opening = RLock()


@after_fork
def _renew_lock() -> None:  # pragma: no cover  # in a child
    global _opening
    _opening = RLock()


class RequestSession(Session):
    """The Session of a request: it commits nothing that the database has given up, and its savepoints are inside."""

    #: whether it listens to what joins a savepoint
    __joins = False

    def begin(self, nested: bool = False) -> SessionTransaction:
        # Python's sqlite3 begins a transaction before a statement that writes, and not before a SAVEPOINT (its
        # "Transaction control"): one before the first write would be the transaction itself, committed by its RELEASE.
        if nested:
            self.connection()
            for connection in open_connections(self):
                _begin_on_sqlite(connection)
            if not self.__joins:
                self.__joins = True
                event.listen(self, "after_begin", _join_savepoint)
        return super().begin(nested)


def _begin_on_sqlite(connection: Connection) -> None:
    if connection.dialect.name == "sqlite":
        begin_writing(connection)


def _join_savepoint(opened: Session, transaction: SessionTransaction, connection: Connection) -> None:
    """A database that is first used inside of a savepoint joins the transaction around it first."""
    if not transaction.nested and opened.in_nested_transaction():
        _begin_on_sqlite(connection)


@event.listens_for(RequestSession, "before_commit")
def _refuse_given_up(opened: Session) -> None:
    """In the application's own commits, too. MySQL and MariaDB do not tell: there it is what the attempt has seen."""
    scope = current.get(None)
    attempt = scope.transaction if isinstance(scope, Scope) and scope.session is opened else None
    given_up = attempt is not None and attempt.rolled_back is opened.get_transaction()
    if given_up or any(is_aborted(connection) for connection in open_connections(opened)):
        raise TransactionAborted(
            "The transaction cannot be committed: the database has given it up after an error that the application"
            " caught. Let the error pass, or put what may fail into 'with session.begin_nested():'."
        )


@event.listens_for(RequestSession, "after_commit")
def _count_commit(opened: Session) -> None:
    """On whatever engine it was: an attempt that has committed is not repeated."""
    if opened.in_nested_transaction():
        return  # The release of a savepoint commits nothing.
    held = open_connections(opened)
    if held and all(connection.engine in read_only for connection in held):
        return
    for attempt in attempts():
        attempt.commits += 1


class NotingSession(RequestSession):
    """The same where neither database nor driver tell what a transaction has written and has still to read."""

    #: the transaction of the last statement that wrote; _NEXT if that one was about to begin it
    _written: object = None
    #: the execution contexts of server-side cursors, as long as somebody has their results
    _streamed: Sequence[ref[ExecutionContext]] = ()
    _NEXT = object()

    def get_bind(self, mapper: Any = None, *, clause: Any = None, **more: Any) -> Any:
        # SQLAlchemy asks for a bind before each statement; without a statement it is a flush, or the connection itself.
        if clause is None or not is_read(clause):
            self._written = self.get_transaction() or self._NEXT
        elif self._written is self._NEXT:
            self._written = self.get_transaction()
        return super().get_bind(mapper, clause=clause, **more)

    def connection(self, bind_arguments: Any = None, execution_options: Mapping[str, Any] | None = None) -> Connection:
        """As SQLAlchemy's, which does not ask for a bind where it is told one."""
        bind = (bind_arguments or {}).get("bind")
        if bind is not None and bind.engine not in read_only:
            self._written = self.get_transaction() or self._NEXT
        return super().connection(bind_arguments, execution_options)


def has_noted_write(opened: Session) -> bool:
    """Whether the open transaction may have written, by its statements; True where nobody has noted them."""
    written = opened._written if isinstance(opened, NotingSession) else NotingSession._NEXT
    return written is not None and (written is NotingSession._NEXT or written is opened.get_transaction())


def has_noted_cursor(opened: Session) -> bool:
    """Whether rows are still to be fetched from a server-side cursor; False where nobody has noted them."""
    if not isinstance(opened, NotingSession):
        return False
    contexts = (reference() for reference in opened._streamed)
    return any(context is not None and not _is_closed(context.cursor) for context in contexts)


def _is_closed(cursor: Any) -> bool:
    """Whether a driver's cursor is closed, as SQLAlchemy does after the last row. Some only forget their connection."""
    return bool(cursor.closed) if hasattr(cursor, "closed") else cursor.connection is None


@event.listens_for(NotingSession, "do_orm_execute")
def _note_server_side_cursor(state: ORMExecuteState) -> Result[Any] | None:
    options = state.execution_options
    if not (options.get("stream_results") or options.get("yield_per")):
        return None
    result = state.invoke_statement()
    opened = cast(NotingSession, state.session)
    # A result of entities has the one of the cursor behind it. As long as somebody has it, its context lives.
    # One from somebody's cache has none.
    context = getattr(getattr(result, "raw", None) or result, "context", None)
    known = [other() for other in opened._streamed]
    opened._streamed = [ref(each) for each in (*known, context) if each is not None]
    return result


_specialised: dict[tuple[type[Session], ...], type[Session]] = {}


def session_class_for(
    dialects: Iterable[str], session_class: type[Session], more: type[RequestSession] | None = None
) -> type[Session]:
    """``session_class``, with what the sessions of requests need beside it.

    There is one class for each, because SQLAlchemy keeps events by class.

    :param dialects: of the engines that a Session may work on.
    :param more: another mixin.
    """
    mixin = RequestSession if all(map(can_tell_writes, dialects)) else NotingSession
    bases: tuple[type[Session], ...] = (
        (mixin,) if more is None else (more,) if mixin is RequestSession else (mixin, more)
    )
    if session_class is not Session:
        bases = (*bases, session_class)
    if len(bases) == 1:
        return bases[0]
    made = _specialised.get(bases)
    if made is None:
        names = {"__module__": session_class.__module__, "__qualname__": session_class.__qualname__}
        made = _specialised.setdefault(bases, type(session_class.__name__, bases, names))
    return made


class ShellScope(Scope):
    """The scope behind ``local.application = app``, typed by hand.

    Nobody closes a response here: it ends when the Local lets go of it (``local_manager.cleanup()``, another
    thread's end), and what it holds is given back then.
    """

    __slots__ = ("process",)

    #: where it began: another thread's ends in a child of a fork, and its session is not the child's to remove
    process: int

    def __del__(self) -> None:
        try:
            check_process()
            if self.process == os.getpid():  # pragma: no branch
                remove_session(self)
        except Exception:
            logger.exception("The session of a dropped shell scope could not be closed")


class ScopeRegistry(ScopedRegistry[Session]):
    """Where ``session`` finds its Session: the slot of the current scope."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(new_session, current_scope)

    def __call__(self) -> Session:
        return open_session(current_scope())

    def has(self) -> bool:
        scope = current.get(None)
        return isinstance(scope, Scope) and scope.session is not None

    def set(self, obj: Session) -> None:
        self.scopefunc().session = obj

    def clear(self) -> None:
        scope = current.get(None)
        if isinstance(scope, Scope):
            scope.session = None


class ScopeSession(scoped_session[Session]):
    """A :class:`~sqlalchemy.orm.scoped_session` whose scope is the request."""

    def __init__(self) -> None:
        super().__init__(cast("sessionmaker[Session]", new_session))
        self.registry = ScopeRegistry()

    # SQLAlchemy's asks the registry in a call of its own, and so each use of the session would pay for two.
    @property
    def _proxied(self) -> Session:
        scope = current.get(None)
        if isinstance(scope, Scope):
            opened = scope.session
            if opened is not None:
                return opened
            if scope.state is not ENDED:
                return open_session(scope)
        return open_session(current_scope())

    def remove(self) -> None:
        """Close the scope's Session, if one is open. The next use opens another one.

        Not while a TransactionMiddleware is in charge and has something to commit: frameworks have their teardown, and
        the recipes that call this there, before the response is known to be a success.

        :raises Exception: what the Session's ``close()`` raised, after its connections were given back.
        """
        scope = current.get(None)
        # Between two steps a request's session is not for others to remove.
        if isinstance(scope, Scope) and scope.state is not WAITING:
            opened = scope.session
            if scope.transaction is None or opened is None or not opened.in_transaction():
                remove_session(scope)

    def configure(self, **options: Any) -> None:
        """Refused: sessions belong to an application, which has its own ``session_options``.

        :raises ScopeError: always.
        """
        raise ScopeError(
            f"session.configure({', '.join(options)}) would change the sessions of every application:"
            " give 'session_options' to SQLASessionMiddleware instead."
        )


def current_scope() -> Scope:
    """The scope that the calling code is in.

    :raises ScopeError: if there is none, or if it has ended.
    """
    values = current.get(None)
    if not isinstance(values, Scope):
        if not values or "application" not in values:
            raise ScopeError(
                "No application is bound here, so 'session' has no scope:"
                " run inside a request, or in 'with app.context():'."
            )
        values = ShellScope(values)
        values.process = os.getpid()
        begin(values)
    if values.state is ENDED:
        raise ScopeError(
            "The request is over, so 'session' has no scope any more:"
            " code that outlives its request runs in its own 'with app.context():'."
        )
    return values


def new_session(**options: Any) -> Session:
    """A Session of the current application that belongs to no scope: the caller closes it.

    :param options: of :class:`~sqlalchemy.orm.Session`, over the application's own ``session_options``.
    """
    scope = current_scope()
    make = getattr(scope.get("application"), "new_session", None) or _find_maker(scope)
    return make(**options)


def open_session(scope: Scope) -> Session:
    """The session of ``scope``: the open one, or one that is opened now."""
    if has_unseen_forks:  # pragma: no cover  # in uWSGI
        check_process()
    opened = scope.session
    if opened is not None:
        return opened
    make = getattr(scope.get("application"), "new_session", None) or _find_maker(scope)
    # Made outside of the lock: a Session class may do in its constructor what it likes.
    made = make()
    with _opening:
        opened = scope.session
        if opened is None:
            opened = scope.session = made
    if opened is not made:
        made.close()
    if scope.state is ENDED:
        # The request ended in another thread while this one was opening: its end may have seen no session.
        remove_session(scope)
        raise ScopeError("The request ended while 'session' was being opened.")
    return opened


def _find_maker(scope: Scope) -> Callable[..., Session]:
    """What makes a Session where ``local.application`` is not the middleware, but an object as in the pattern."""
    owner = scope.get("application")
    if owner is None:
        raise ScopeError("No application is bound here any more: 'local.application' was deleted.")
    if not hasattr(owner, "database_engine"):
        raise ScopeError(f"local.application is {shown(owner)}, which has no 'database_engine' to open a session on.")
    engine = owner.database_engine
    return partial(session_class_for([engine.dialect.name], Session), engine)


def remove_session(scope: Scope) -> None:
    """Take the Session out of its scope, then close it.

    :raises BaseException: what ``close()`` raised. By then every connection that the Session held has been
        invalidated and its place in the pool is free.
    """
    opened = scope.session
    if opened is None:
        return
    scope.session = None
    # Session.close() forgets its transaction first and stops at the first connection whose rollback fails. What it
    # was still holding is only known to that transaction, and neither has a public name that costs no call.
    transaction = getattr(opened, "_transaction", None)
    try:
        opened.close()
    except BaseException:
        _give_back_all(transaction)
        raise


def close_transaction(opened: Session) -> None:
    """End the open transaction without a commit, and leave the objects of the Session as they are.

    Session.rollback() would expire them whatever the application wants of a transaction's end; commit() would make
    durable what the end of a request undoes, such as PostgreSQL's SET.
    """
    transaction = opened.get_transaction()
    assert transaction is not None
    try:
        transaction.close()
    except BaseException:
        _give_back_all(transaction)
        raise


def open_connections(opened: Session) -> list[Connection]:
    """The connections that a Session's transaction holds at the moment."""
    transaction = opened.get_transaction()
    return [] if transaction is None else [connection for connection, _ in _connections_of(transaction)]


def _connections_of(transaction: Any) -> list[tuple[Connection, bool]]:
    """The connections of a SessionTransaction, and of each whether the Session has to give it back."""
    # Each is in there twice, by itself and by its engine. No public name leads to them.
    return [(connection, autoclose) for connection, _, _, autoclose in set(transaction._connections.values())]


def _give_back_all(transaction: Any) -> None:
    """Give up the connections that a SessionTransaction could not close."""
    while transaction is not None:
        for connection, autoclose in _connections_of(transaction):
            if autoclose and not connection.closed:
                _give_back(connection)
        transaction = transaction.parent


def _give_back(connection: Any) -> None:
    try:
        connection.invalidate()
        connection.close()
    except Exception:
        logger.exception("A connection of a session that could not be closed was given up")


#: The current scope's Session, opened at first use and removed with the scope.
session: scoped_session[Session] = ScopeSession()
