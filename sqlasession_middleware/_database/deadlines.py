"""Has everything that waits for an engine end by the deadline of the request or context that waits (G19).

The pool
    waits for a free connection until the deadline at most.

Connecting
    takes place in a thread, because names are resolved, and TLS is agreed upon, in functions that nobody can end. The
    request leaves it alone at the deadline, and the thread closes what it gets afterwards.

Everything on a connection
    is watched while the connection is out of its pool (:mod:`.watchdog`): statements, locks, rows, COMMIT, ROLLBACK,
    and what the pool does when it hands it out and when it takes it back.

After the deadline
    nothing is sent any more but what gives the connection back. So a COMMIT that was not sent has not taken place.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, ref

from sqlalchemy import event

from .._dependencies import came_from_commit, is_server_side, root_engine
from .._drivers.registry import driver_of
from .._scope.deadline import begin_unit, current_deadline, now
from ..errors import DeadlineError
from ..failures import Failure, classify
from .breaker import note_silence, unguarded_pool
from .forks import fork_safe_lock
from .liveness import ping_in_checkout
from .lost_commits import stores_nothing
from .observers import engines_of, note_late
from .pool import limit_pool
from .read_only import is_read_only
from .watchdog import Watch, end_watch, watch, watch_of

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine
    from sqlalchemy.engine import Dialect, ExceptionContext
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

    from .._scope.protocols import Application

__all__ = ["limit_nested", "limit_waits"]

_limited: WeakSet[Engine] = WeakSet()
_listening = fork_safe_lock()


def limit_nested(owner: Application) -> None:
    """Have an application's engines heed the deadline of what is around the running code."""
    if current_deadline() is not None:
        for engine in engines_of(owner):
            limit_waits(engine)


def limit_waits(engine: Engine) -> None:
    """Have all waits for an engine end by the deadline of the scope that waits."""
    root = root_engine(engine)
    if root in _limited:
        return
    with _listening:
        if root not in _limited:  # pragma: no branch  # another thread may have been faster
            _listen(root, engine)
            _limited.add(root)


def _listen(engine: Engine, given: Engine) -> None:
    waits = _Waits(engine, given)
    limit_pool(engine.pool)
    ping_in_checkout(engine)
    # First, because the other listeners may send something.
    event.listen(engine, "connect", waits.watch_new, insert=True)
    event.listen(engine, "checkout", waits.watch, insert=True)
    event.listen(engine, "checkin", waits.end)
    event.listen(engine, "detach", waits.end)
    if driver_of(engine).server.is_networked:
        event.listen(engine, "do_connect", waits.connect)
    event.listen(engine, "before_cursor_execute", _refuse_statement)
    if driver_of(engine).ends_rows_silently:
        event.listen(engine, "before_cursor_execute", _mind_rows)
    # Before a commit is counted.
    for name in ("commit", "prepare_twophase"):
        event.listen(engine, name, _refuse_commit, insert=True)
    event.listen(engine, "handle_error", _explain, retval=True)


class _Waits:
    """The listeners that know their engine.

    :param given: the same, or one that was made of it by ``execution_options()``.
    """

    def __init__(self, engine: Engine, given: Engine) -> None:
        self._driver = driver_of(engine)
        self._engine = ref(engine)  # It has these listeners.
        self._given = ref(given)

    def watch(self, driver_connection: Any, record: ConnectionPoolEntry, proxy: PoolProxiedConnection) -> None:
        """Watch a connection that is handed out."""
        begin_unit()
        self.watch_new(driver_connection, record)

    def watch_new(self, driver_connection: Any, record: ConnectionPoolEntry) -> None:
        """Watch a connection on which the pool, or a listener, may send something now."""
        deadline = current_deadline()
        if deadline is None:
            return
        left = deadline - now()
        if left <= 0:
            raise note_late("nothing is sent to the database any more")
        watched = Watch(deadline, self._driver, driver_connection, self._connect_again)
        self._driver.prepare_for_watch(driver_connection)
        before = self._driver.limit_waits(driver_connection, left)
        known = end_watch(record)  # since it was made
        watched.before = before if known is None or known.before is None else known.before
        watch(record, watched)

    def end(self, driver_connection: Any, record: ConnectionPoolEntry) -> None:
        """End the watch of a connection that is returned, or was lost."""
        watched = end_watch(record)
        if watched is None:
            return
        if watched.is_cancelled:
            record.invalidate()  # The server may hear only now of what it is to cancel.
        elif watched.before is not None and driver_connection is not None:
            self._driver.restore_waits(driver_connection, watched.before)

    def connect(self, dialect: Dialect, record: Any, arguments: list[Any], options: dict[str, Any]) -> Any:
        """Connect in a thread."""
        begin_unit()
        deadline = current_deadline()
        if deadline is None:
            return None
        left = deadline - now()
        given = self._given()
        if given is not None and is_read_only(given):
            left /= 2  # Another one, or the primary, may answer.
        options = self._driver.share_time(options, left)
        return _Attempt(partial(self._connect, dialect, record, arguments, options)).wait(left)

    def _connect(self, dialect: Dialect, record: Any, arguments: list[Any], options: dict[str, Any]) -> Any:
        """What SQLAlchemy would do after this listener."""
        listeners: list[Any] = list(dialect.dispatch.do_connect)
        for listener in listeners[listeners.index(self.connect) + 1 :]:
            made = listener(dialect, record, arguments, options)
            if made is not None:
                return made
        return dialect.connect(*arguments, **options)

    def _connect_again(self) -> Any:
        """Another connection to the same database, outside of the pool and of its limits.

        It is the driver's own. SQLAlchemy would roll it back before it closes it, which a server that is silent does
        not answer.
        """
        engine = self._engine()
        assert engine is not None  # One of its connections is in use.
        connection = unguarded_pool(engine).connect()
        connection.detach()
        return connection.dbapi_connection


class _Attempt:
    """A connection that a thread makes."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._made: Any = None
        self._error: BaseException | None = None
        self._is_left = False
        self._lock = Lock()
        # A "creator" or a resolver may look at the scope.
        self._thread = Thread(target=copy_context().run, args=(self._run,), name="connecting", daemon=True)

    def wait(self, seconds: float) -> Any:
        """The connection.

        :raises DeadlineError: if it is not there after so many seconds.
        """
        if seconds > 0:
            self._thread.start()
            self._thread.join(seconds)
        with self._lock:
            self._is_left = True
            made, error = self._made, self._error
        if error is not None:
            try:
                raise error
            finally:
                del error  # Else its traceback and this frame refer to each other.
        if made is None:
            late = note_late("no connection to the database was made")
            late.is_silent = seconds > 0
            raise late
        return made

    def _run(self) -> None:
        try:
            made = self._connect()
        except BaseException as error:
            self._error = error
            return
        with self._lock:
            self._made = made
            is_left = self._is_left
        if is_left:
            made.close()


def _refuse_statement(connection: Connection, *more: object) -> None:
    deadline = current_deadline()
    if deadline is not None and deadline <= now():
        raise note_late("nothing is sent to the database any more")


def _mind_rows(connection: Connection, cursor: Any, statement: str, given: Any, context: Any, many: bool) -> None:
    """Have rows end with an error if that is why they end."""
    watched = watch_of(connection.connection.dbapi_connection) if is_server_side(context) else None
    if watched is None:
        return

    def check(has_ended: bool) -> None:
        # Before the server has ended it, closing the cursor would read all the rest, and keep all of Python waiting.
        if watched.is_cancelled and (has_ended or watched.is_heard):
            raise note_late("what the database did was ended")

    driver_of(connection).mind_rows(cursor, check)


def _refuse_commit(connection: Connection, xid: object = None) -> None:
    deadline = current_deadline()
    if deadline is None or deadline > now():
        return
    if not driver_of(connection).has_nothing_to_lose(connection):
        raise note_late("the COMMIT was not sent, and nothing is stored")


def _explain(context: ExceptionContext) -> BaseException | None:
    """Replace the error of a wait that was ended."""
    deadline = current_deadline()
    if deadline is None or deadline > now() or context.is_pre_ping:
        return None
    error = context.original_exception
    if isinstance(error, DeadlineError):
        return None  # A listener of this module has raised it.
    driver = driver_of(context)
    committing = came_from_commit(error.__traceback__)
    was_cancelled = driver.was_cancelled(error)
    failure = classify(error, committing=committing, disconnected=context.is_disconnect)
    is_unknown = was_cancelled and committing and not driver.server.undoes_cancelled_commits
    if (failure is Failure.UNKNOWN or is_unknown) and not (committing and stores_nothing(context.connection)):
        what = "the COMMIT was ended, and it is not known whether it took place"
        late = note_late(what, context, is_outcome_unknown=True)
    elif failure is None and not was_cancelled:
        return None
    else:
        late = note_late("what the database did was ended", context)
    if _is_silent(context):
        late.is_silent = True
        note_silence(context.engine, late)
    return late


def _is_silent(context: ExceptionContext) -> bool:
    """Whether the server has not even answered the request to cancel what it does."""
    connection = context.connection
    if connection is None or connection.closed or connection.invalidated:
        return False
    watched = watch_of(connection.connection.dbapi_connection)
    return watched is not None and watched.is_cut and not watched.is_heard
