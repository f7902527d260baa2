"""The private names of dependencies that this library relies on, each behind one name of its own.

A private name may go away with any release. Each one here has no public counterpart, or one that costs a Python call
where this library runs for every request; the comment above it says which. ``tests/test_dependencies.py`` fails with
the name of the attribute when it is gone or has another meaning, and also when another module uses a private name.

Belongs here: attributes, methods and modules of dependencies that begin with an underscore, and names of functions that
are found in tracebacks. Does not belong here: what follows from them. Imports no dependency at run time.

Three forms are in use. A function is for code that is not run for every request. ``attrgetter`` and ``methodcaller``
take no Python frame. A constant is for ``getattr(object, NAME, default)``, for objects that may not have the attribute.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from operator import attrgetter, itemgetter, methodcaller
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from threading import Lock, RLock
    from types import FrameType, TracebackType

    from sqlalchemy import Connection, Engine, Result
    from sqlalchemy.engine import Dialect, ExecutionContext
    from sqlalchemy.orm import Session, SessionTransaction
    from sqlalchemy.orm.session import SessionTransactionState
    from sqlalchemy.pool import ConnectionPoolEntry, Pool, PoolProxiedConnection, QueuePool

__all__ = [
    "AUTOCOMMIT",
    "FILE_ATTRIBUTES",
    "FILE_VARIABLES",
    "FOR_UPDATE",
    "LAST_STATEMENT",
    "ON_CONNECT_ISOLATION_LEVEL",
    "OVERRIDDEN",
    "PIPELINE",
    "PREFIXES",
    "RAW_COLUMNS",
    "READ_TIMEOUT",
    "SUFFIXES",
    "TRANSACTION",
    "answers_within",
    "call_first",
    "calling_frame",
    "came_from_commit",
    "came_from_rollback",
    "catches_errors_of_views",
    "connections_of",
    "creator_of",
    "current_object",
    "disown",
    "flush_error",
    "forget_connection",
    "goes_on_after",
    "has_prepared",
    "idle_queue",
    "innermost_transaction",
    "is_clean",
    "is_server_side",
    "known_records",
    "max_overflow",
    "open_connections_of",
    "origins_of",
    "outdate_connections",
    "ping",
    "reinitialize_lock",
    "repeats_entities",
    "root_engine",
    "set_execution_options",
    "socket_number_of",
    "socket_of",
    "state_of_transaction",
    "take_pre_ping",
    "was_handled",
]

# SQLAlchemy: sessions

#: A Session's innermost transaction, or None. ``get_transaction()`` returns the outermost one, and
#: ``in_transaction()`` is a Python call in each request.
TRANSACTION: Final = "_transaction"
innermost_transaction: Callable[[Session], SessionTransaction | None] = attrgetter(TRANSACTION)

#: The state of a transaction. ``is_active`` is a Python call in each request.
state_of_transaction: Callable[[SessionTransaction], SessionTransactionState] = attrgetter("_state")

#: Whether a flush of a Session would do nothing. ``new``, ``dirty`` and ``deleted`` each build a set.
is_clean: Callable[[Session], bool] = methodcaller("_is_clean")


_CONNECTION: Final = itemgetter(0)


def connections_of(transaction: SessionTransaction) -> list[tuple[Connection, bool]]:
    """The connections of a transaction, and for each whether the Session has to give it back.

    ``SessionTransaction.connection()`` opens one for a given bind; nothing public lists those that are open.
    """
    # SQLAlchemy has an entry for each connection and another one for its engine, both with the same tuple.
    return [(connection, autoclose) for connection, _, _, autoclose in set(transaction._connections.values())]


def open_connections_of(transaction: SessionTransaction) -> list[Connection]:
    """The connections of a transaction, without a Python frame for each: each commit asks three times."""
    return list(set(map(_CONNECTION, transaction._connections.values())))


def forget_connection(transaction: SessionTransaction, connection: Connection) -> None:
    """Have a transaction end without one of its connections.

    ``Connection.close()`` alone would leave a transaction there that the commit finds closed.
    """
    for key in (connection, connection.engine):
        del transaction._connections[key]


def flush_error(session: Session | None) -> BaseException | None:
    """The error of the flush that has ended a Session's transaction, until the Session is rolled back.

    SQLAlchemy has only its text in a ``PendingRollbackError``. A ``flush()`` of this library's own would see the error
    as well, but each query with autoflush calls it.
    """
    error: BaseException | None = getattr(getattr(session, TRANSACTION, None), "_rollback_exception", None)
    return error


def repeats_entities(result: Result[Any]) -> bool:
    """Whether an entity has several rows in a result because a collection was joined to be loaded with it.

    SQLAlchemy says so only by the error of a result that is read without ``unique()``, and its rows are gone then.
    """
    return result._unique_filter_state is not None


# SQLAlchemy: statements. Each statement of an application with binds or replicas is looked at. What has the attribute
# depends on the kind of the statement.

#: The ``FOR UPDATE`` clause of a SELECT. ``get_children()`` returns it with all other elements, and takes much longer.
FOR_UPDATE: Final = "_for_update_arg"

#: The columns of a SELECT as they were given. ``selected_columns`` builds a collection of them.
RAW_COLUMNS: Final = "_raw_columns"

#: The texts before and after a SELECT (``prefix_with()``, ``suffix_with()``). They are not among its children.
PREFIXES: Final = "_prefixes"
SUFFIXES: Final = "_suffixes"

# SQLAlchemy: engines and pools


def set_execution_options(connection: Connection, options: Any) -> None:
    """Replace the execution options of a connection. ``execution_options()`` only adds to them."""
    connection._execution_options = options


#: The ``isolation_level`` of ``create_engine()``, which a dialect sets on each new connection.
#: ``Connection.get_isolation_level()`` asks the database.
ON_CONNECT_ISOLATION_LEVEL: Final = "_on_connect_isolation_level"


#: Whether a statement is executed by a server-side cursor. Its options do not tell: a dialect may decide otherwise.
is_server_side: Callable[[ExecutionContext], bool] = attrgetter("_is_server_side")


def max_overflow(pool: QueuePool) -> int:
    """The ``max_overflow`` of a pool. ``overflow()`` is the current number, and ``size()`` is ``pool_size``."""
    return pool._max_overflow


def origins_of(engine: Engine) -> Iterator[Engine]:
    """The engine itself, and those that ``execution_options()`` has made it of, the first of them last.

    They share the pool and the dialect, and with them most listeners. Nothing public leads from one to the other.
    """
    origin: Engine | None = engine
    while origin is not None:
        yield origin
        origin = getattr(origin, "_proxied", None)


def root_engine(engine: Engine) -> Engine:
    """The last of :func:`origins_of`."""
    while (proxied := getattr(engine, "_proxied", None)) is not None:
        engine = proxied
    return engine


def creator_of(pool: Pool) -> Callable[[ConnectionPoolEntry], Any]:
    """What makes the driver's connections of a pool, its ``creator`` or SQLAlchemy's own, called with their record.

    Each public method of a pool takes its turn in the pool's queue.
    """
    creator: Callable[[ConnectionPoolEntry], Any] = pool._invoke_creator
    return creator


def idle_queue(pool: QueuePool) -> Any:
    """The queue of a pool's idle connections: ``queue`` holds their records, ``mutex`` guards it.

    ``dispose()`` replaces the pool, so that a connection that is checked out goes back to one that nobody uses.
    """
    return pool._pool


def outdate_connections(connection: Connection) -> None:
    """Have a pool replace a connection and all that it made before, each when it is checked out next.

    ``ExceptionContext.is_disconnect`` and ``Connection.invalidate()`` also end the transaction that is open, and
    ``Engine.dispose()`` leaves the connections in use to a pool that nobody has.
    """
    connection.engine.pool._invalidate(connection.connection, _checkin=False)


def outdate_pool(pool: Pool) -> None:
    """Have a pool replace all connections that it has made so far, each when it is checked out next."""
    pool._invalidate(None, _checkin=False)  # type: ignore[arg-type]  # of no connection, so of all


def disown(proxy: PoolProxiedConnection) -> None:
    """Have what a pool has handed out forget its connection, and do nothing to the connection.

    ``close()``, ``detach()`` and ``invalidate()`` all act on the connection, also where the pool has it again.
    """
    proxy.dbapi_connection = None  # type: ignore[misc]  # a property in the public class only
    proxy._connection_record = None  # type: ignore[attr-defined]


def ping(dialect: Dialect, driver_connection: Any) -> bool:
    """Whether a connection answers a ping; ``pool_pre_ping`` does the same.

    ``do_ping()`` raises if it does not, and tells no listener of ``handle_error`` that the error is a ping's.

    :raises Exception: the driver's, or a listener's, if it says anything else than that the connection is lost.
    """
    return dialect._do_ping_w_event(driver_connection)


def take_pre_ping(pool: Pool) -> bool:
    """Whether a pool pings each connection before its listeners of ``checkout`` are called. It does not do so any more.

    Nothing tells of such a ping before it is sent, so that nobody could end one that is not answered.
    """
    pings: bool = pool._pre_ping
    pool._pre_ping = False
    return pings


def known_records(pool: Pool) -> list[ConnectionPoolEntry]:
    """The records of the connections that a pool holds. Its events tell only of those that come later."""
    names = vars(pool)
    idle: Iterable[Any] = getattr(names.get("_pool"), "queue", ())  # QueuePool
    only = (names.get("connection"), names.get("_conn"))  # StaticPool, AssertionPool
    known = (*idle, *only, *names.get("_all_conns", ()))  # SingletonThreadPool
    return [record for record in known if hasattr(record, "dbapi_connection")]


#: The methods of a dialect that commit and roll back. ``handle_error`` has no statement and no other sign of either.
_COMMITS: Final = ("do_commit", "do_commit_twophase")
_ROLLBACKS: Final = ("do_rollback", "do_rollback_twophase")


def came_from_commit(traceback: TracebackType | None) -> bool:
    """Whether an error was raised while SQLAlchemy committed."""
    return _came_from(_COMMITS, traceback)


def came_from_rollback(traceback: TracebackType | None) -> bool:
    """Whether an error was raised while SQLAlchemy rolled back."""
    return _came_from(_ROLLBACKS, traceback)


def _came_from(methods: tuple[str, ...], traceback: TracebackType | None) -> bool:
    while traceback is not None:
        if traceback.tb_frame.f_code.co_name in methods:
            return True
        traceback = traceback.tb_next
    return False


def call_first(engine: Engine, listener: Callable[..., object], name: str = "handle_error") -> None:
    """Have a listener of one of a dialect's events called before the others of its engine.

    ``event.listen(…, insert=True)`` has no effect on the events of a dialect.
    """
    listeners = getattr(engine.dialect.dispatch, name).listeners
    listeners.remove(listener)
    listeners.appendleft(listener)


class _Before:
    """One listener, and those of a class of engines, which may become more."""

    def __init__(self, listener: Callable[..., object], others: Iterable[Any]) -> None:
        self._listener = listener
        self._others = others

    def __iter__(self) -> Iterator[Any]:
        yield self._listener
        yield from self._others

    def __bool__(self) -> bool:
        return True


def call_before_all(engine: Engine, listener: Callable[..., object]) -> None:
    """Have a listener of an engine's ``handle_error`` called before the others, also those of the class ``Engine``.

    SQLAlchemy calls a class's listeners first, and one that raises keeps the others from being called.
    """
    found: Any = engine.dialect.dispatch.handle_error
    found.listeners.remove(listener)
    found.parent_listeners = _Before(listener, found.parent_listeners)


#: The methods of a Connection that call the listeners of ``handle_error`` and raise the result. Nothing in an error
#: says that it is a listener's own.
_HANDLERS: Final = ("_handle_dbapi_exception", "_handle_dbapi_exception_noconnection")


def was_handled(traceback: TracebackType | None) -> bool:
    """Whether an error was raised after the listeners of ``handle_error`` were called."""
    while traceback is not None:
        if traceback.tb_frame.f_code.co_name in _HANDLERS:
            return True
        traceback = traceback.tb_next
    return False


#: The private names that a class of this library overrides. All methods of a ``scoped_session`` find their Session by
#: ``_proxied``; to override each of them instead would add a call to each. Flask-SQLAlchemy documents its methods as
#: "internal setup", whose names and signatures may change; without them its ``init_app()`` would have to be copied. The
#: extra names the versions, and its own tests are run: ``tests/drop_in``. psycopg calls ``_communicate_gen()`` to send
#: a statement that a cursor has added to a pipeline, and nothing else keeps it from that.
OVERRIDDEN: Final = frozenset(
    {
        ("ScopeSession", "_proxied"),
        ("FlaskSession", "_proxied"),
        ("SQLAlchemy", "_apply_driver_defaults"),
        ("SQLAlchemy", "_make_engine"),
        ("SQLAlchemy", "_make_scoped_session"),
        ("SQLAlchemy", "_teardown_session"),
        ("_Batch", "_communicate_gen"),
    }
)

# Werkzeug

#: The object that a LocalProxy stands for. Werkzeug documents the method, in spite of its underscore.
current_object: Callable[[Any], Any] = methodcaller("_get_current_object")

# Frameworks

#: The functions in which frameworks catch what a view raises, to make a page of it: of each the module, the name, and
#: the name of the function around it that goes on with the page. Nothing but a traceback tells who has caught an error.
_CATCHERS: Final[dict[tuple[str, str], str | None]] = {
    ("flask.app", "full_dispatch_request"): "wsgi_app",
    ("flask.app", "wsgi_app"): None,
    ("pyramid.tweens", "excview_tween"): None,
    ("falcon.app", "__call__"): None,
    ("bottle", "_handle"): "wsgi",
    ("bottle", "_cast"): None,
    ("bottle", "wsgi"): None,
    ("django.core.handlers.base", "_get_response"): None,
    ("django.core.handlers.exception", "inner"): None,
}


def catches_errors_of_views(frame: FrameType) -> bool:
    """Whether a frame runs a function of a framework that makes pages of its views' errors."""
    return _name_of(frame) in _CATCHERS


def goes_on_after(catcher: FrameType, frame: FrameType) -> bool:
    """Whether a frame runs the function that goes on with the page when ``catcher`` has returned."""
    module, name = _name_of(frame)
    return module == _name_of(catcher)[0] and name == _CATCHERS.get(_name_of(catcher))


def _name_of(frame: FrameType) -> tuple[str, str]:
    # Cython, which Falcon may be compiled with, has the name of the class as well.
    return frame.f_globals.get("__name__", ""), frame.f_code.co_name.rpartition(".")[2]


# Frameworks and servers: what they make of a file

#: The classes that send a file, by module and name, and the attribute with the file, or with what sends it. Some of
#: these modules may not be installed.
FILE_ATTRIBUTES: Final[Mapping[tuple[str, str], str]] = {
    ("bottle", "WSGIFileWrapper"): "fp",
    ("django.http.response", "FileResponse"): "file_to_stream",
    ("falcon.app_helpers", "CloseableStreamIterator"): "_stream",
    ("gunicorn.http.wsgi", "FileWrapper"): "filelike",
    ("pyramid.response", "FileIter"): "file",
    ("waitress.buffers", "ReadOnlyFileBasedBuffer"): "file",
    ("webob.response", "AppIterRange"): "app_iter",
    ("webob.static", "FileIter"): "file",
    ("werkzeug.wsgi", "FileWrapper"): "file",
    ("werkzeug.wsgi", "_RangeWrapper"): "iterable",
    ("wsgiref.util", "FileWrapper"): "filelike",
}

#: The same for generators that have not begun: by module and name, and the variable.
FILE_VARIABLES: Final[Mapping[tuple[str, str], str]] = {
    ("webob.static", "FileIter.app_iter_range"): "self",
}

# Drivers


#: The ``read_timeout`` of PyMySQL's connection.
READ_TIMEOUT: Final = "_read_timeout"


def socket_of(driver_connection: Any) -> Any:
    """The socket of PyMySQL's connection, and of other drivers in Python that name it alike; None of any other.

    PyMySQL has no ``fileno()``.
    """
    return getattr(driver_connection, "_sock", None)


@contextmanager
def answers_within(connection: Any, seconds: float | None) -> Iterator[None]:
    """Limit the wait for each answer of the server, for PyMySQL's connection while it connects.

    Its ``read_timeout`` is an argument of its constructor, for as long as it lives. The connection sets its socket to
    the attribute before it reads, each time.
    """
    if not hasattr(connection, READ_TIMEOUT):
        yield
        return
    usual = getattr(connection, READ_TIMEOUT)
    setattr(connection, READ_TIMEOUT, seconds)
    try:
        yield
    finally:
        setattr(connection, READ_TIMEOUT, usual)


#: The ``autocommit`` of psycopg's connection, to be set also in a transaction, where the public attribute refuses it. A
#: transaction that was begun by an explicit BEGIN goes on as if psycopg had begun it. By ``setattr()``: a function of
#: Python's own may be left by the exception of a signal before it has set anything.
AUTOCOMMIT: Final = "_autocommit"


def has_prepared(connection: Any) -> bool:
    """Whether a connection of psycopg has had the server prepare statements. False of a version that is not known."""
    return bool(getattr(getattr(connection, "_prepared", None), "_names", None))


#: The Pipeline of psycopg's connection that its cursors add their statements to, None outside of pipeline mode.
#: ``connection.pipeline()`` makes one of its own, which sends each statement by itself: that costs the client and the
#: server several system calls.
PIPELINE: Final = "_pipeline"


#: Where the cursors of MariaDB Connector/Python, which send by themselves, note each statement at their connection
#: before that. The connection counts what is sent, but to ask a lost one for the number ends the process.
LAST_STATEMENT: Final = "_last_executed_statement"

#: The descriptor of the socket of MariaDB Connector/Python. Its ``socket`` is an object that closes the descriptor once
#: more when it is finalized, whoever has the number by then.
socket_number_of: Callable[[Any], int] = methodcaller("_get_socket")

# Python

#: ``sys._getframe(depth)``. ``inspect.currentframe()`` is the same with a frame of its own.
calling_frame = sys._getframe


def reinitialize_lock(lock: Lock | RLock) -> None:
    """Release a lock in a forked child, where the thread that holds it does not exist.

    An RLock of the thread that has forked stays: that thread goes on in the child, and releases it there. The
    standard library does the same for its own locks, and has no public way.
    """
    is_owned = getattr(lock, "_is_owned", None)  # A Lock has no owner.
    if is_owned is None or not is_owned():
        lock._at_fork_reinit()  # type: ignore[union-attr]  # not in typeshed
