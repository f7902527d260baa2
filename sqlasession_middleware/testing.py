"""Helpers for the tests of applications: roll back a test's changes, count its statements, find its leaks.

.. code-block:: python

    with isolated(app):
        client.post("/guests", data={"name": "Ada"})  # commits
        with assert_queries(1):
            assert "Ada" in client.get("/guests").text
    # "Ada" was rolled back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import Session
from sqlalchemy.pool import Pool
from sqlalchemy.util import immutabledict

from ._database.observers import commits_each_statement
from ._database.read_only import is_read_only
from ._database.reads import BEGINS, without_first
from ._lifecycle.background import BackgroundThreads, call_logged
from ._recording.blocks import recorded
from ._recording.repeats import find_repeats
from ._scope.scope import running_scope
from ._sessions.isolated_connection import TRANSACTION_STATEMENT, IsolatedConnection
from .leaks import Checkouts, exempt_connections
from .middleware import SQLASessionMiddleware

__all__ = ["assert_queries", "isolated", "no_leaks"]


@contextmanager
def isolated(*applications: SQLASessionMiddleware) -> Iterator[None]:
    """Run requests and contexts in one transaction per engine, which is rolled back at the end of the block.

    The application commits as usual, also with ``transaction=True``: each commit releases a savepoint, and later
    requests see its changes. Deferred constraints are checked where a COMMIT would check them. Statements for a replica
    run in the primary's transaction. Create the tables before the block. Code that uses ``app.engine`` directly is not
    isolated. The isolation level is that of the engine, and two-phase commit is off.

    All sessions of an engine share one connection. They may end in any order, and none undoes the commits of another,
    but only one of them at a time can have uncommitted changes. Give a server under test a single thread. What the
    application gives to :meth:`~sqlasession_middleware.SQLASessionMiddleware.background` is called at once, in the same
    thread.

    Blocks may be nested: the inner one rolls back its own changes and keeps those of the outer one.

    :param applications: the applications to isolate. Those that share an Engine share its transaction.
    :raises IsolationError: if a session begins while another one has uncommitted changes. The error names the request
        or context of the other one.
    """
    with ExitStack() as stack:
        isolation = _Isolation(stack)
        for application in applications:
            application._background.wait()
            stack.callback(setattr, application, "_background", application._background)
            application._background = _AtOnce()
            stack.callback(_restore, application, vars(application).get("new_session"))
            vars(application)["new_session"] = _IsolatedSessionMaker(application, isolation)
        yield


class _AtOnce(BackgroundThreads):
    """Makes the calls in the background at once: a thread would need the connection, or come after the isolation."""

    def submit(self, call: Callable[[], object], name: str) -> None:
        call_logged(call, name)


class _IsolatedSession(Session):
    """A mixin for the application's Session class, which takes the connections from an isolation."""

    #: set by :meth:`_IsolatedSessionMaker.derive`, in a subclass for each application in each isolation
    _isolated_by: _IsolatedSessionMaker
    #: how errors describe this Session
    _isolated_owner: str

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.twophase = False  # A savepoint cannot be prepared.
        if getattr(self, "execution_options", None):  # since SQLAlchemy 2.1
            self.execution_options = immutabledict(_without_level(self.execution_options))
        self._isolated_owner = self._isolated_by.describe_owner()

    def get_bind(self, *arguments: Any, **options: Any) -> Any:
        """Return the isolation's connection to the engine that the application's class chooses."""
        return self._isolated_by.isolate(self, super().get_bind(*arguments, **options))

    def connection(self, bind_arguments: Any = None, execution_options: Mapping[str, Any] | None = None) -> Connection:
        """Return the isolation's connection. SQLAlchemy does not call get_bind() if ``bind_arguments`` have a bind."""
        options = _without_level(execution_options or {})
        bind = (bind_arguments or {}).get("bind")
        if bind is not None:
            bind_arguments = {**bind_arguments, "bind": self._isolated_by.isolate(self, bind)}
            if isinstance(bind, Engine) and is_read_only(bind):
                # Bypasses RoutingSession.connection(), which treats any use of a primary's connection as a write.
                return Session.connection(self, bind_arguments, options or None)
        return super().connection(bind_arguments=bind_arguments, execution_options=options or None)


def _without_level(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the execution options that can be set after a transaction has begun."""
    return {name: value for name, value in options.items() if name != "isolation_level"}


class _IsolatedSessionMaker:
    """Replaces the ``new_session`` of one application during one isolation."""

    def __init__(self, application: SQLASessionMiddleware, isolation: _Isolation) -> None:
        self._isolation = isolation
        self._application = repr(application)
        self._default = application.engine
        #: the maker of the outer isolation, if the application is already isolated
        self._outer = vars(application).get("new_session")
        self._make = partial(application._session_maker(self.derive), join_transaction_mode="create_savepoint")

    def __call__(self, **options: Any) -> Session:
        return self._make(**options)

    def derive(self, base: type[Session]) -> type[Session]:
        """Return an isolated subclass of ``base``. SQLAlchemy propagates the events of ``base`` to it."""
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "_isolated_by": self}
        return type(base.__name__, (_IsolatedSession, base), names)

    def describe_owner(self) -> str:
        """Describe the request or context that is making a Session, for errors."""
        scope = running_scope()
        if scope is None:
            return f"a session of {self._application}"
        environ = scope.environ
        if environ is None:
            return f"a context of {self._application}"
        return f"the request {environ.get('REQUEST_METHOD')} {environ.get('PATH_INFO')!r} of {self._application}"

    def isolate(self, session: Session, bind: Any) -> Any:
        """Return the isolation's connection to an engine, for a Session. Any other bind is returned unchanged."""
        if isinstance(bind, Engine):
            bind = self._connection(self._default if is_read_only(bind) else without_first(bind))
        elif isinstance(bind, IsolatedConnection):
            self._isolation.nest(bind)
        if isinstance(bind, IsolatedConnection):
            bind.serve(session)
        return bind

    def _connection(self, engine: Engine) -> IsolatedConnection:
        connection = self._isolation.connections.get(engine)
        if connection is not None:
            return connection
        if isinstance(self._outer, _IsolatedSessionMaker):
            return self._isolation.nest(self._outer._connection(engine))
        return self._isolation.connect(engine)


class _Isolation:
    """The connections of one ``with isolated(…):`` block. Its exit stack rolls back and closes them."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.connections: dict[Engine, IsolatedConnection] = {}

    def connect(self, engine: Engine) -> IsolatedConnection:
        """Open a connection, and begin a transaction on it."""
        connection = IsolatedConnection(engine)
        self._stack.enter_context(connection)
        exempt_connections.add(connection.connection)
        if commits_each_statement(connection):
            # Autocommit leaves nothing to roll back.
            connection.execution_options(isolation_level=connection.default_isolation_level)
        self.connections[engine] = connection
        self._stack.callback(connection.begin_isolation())
        return connection

    def nest(self, connection: IsolatedConnection) -> IsolatedConnection:
        """Begin a savepoint on a connection of the outer isolation, unless this isolation already has one there."""
        if connection.engine not in self.connections:
            self._stack.callback(connection.begin_block("an isolated() block"))
            self.connections[connection.engine] = connection
        return connection


def _restore(application: SQLASessionMiddleware, make: Callable[..., Session] | None) -> None:
    if make is None:
        vars(application).pop("new_session", None)
    else:
        vars(application)["new_session"] = make


@contextmanager
def assert_queries(count: int) -> Iterator[list[str]]:
    """Check how many statements the block sends to the databases of all engines.

    Yields the list of these statements, which grows while the block runs. Statements that begin or end a transaction
    (BEGIN, COMMIT, ROLLBACK, those for savepoints and for two phases) are not counted.

    :param count: the expected number.
    :raises AssertionError: if the number differs; the message shows the statements.
    """
    statements: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool) -> None:
        is_part_of_begin = BEGINS in context.execution_options or TRANSACTION_STATEMENT.match(statement)
        if not (getattr(connection, "is_internal", False) or is_part_of_begin):
            statements.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield statements
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    if len(statements) != count:
        shown = "".join(f"\n{number}. {statement}" for number, statement in enumerate(statements, 1))
        raise AssertionError(f"expected {count} statements, but {len(statements)} were sent:{shown or ' none'}")


@contextmanager
def no_n_plus_one(*, allow: Iterable[str] = ()) -> Iterator[None]:
    """Check that the block does not send one SELECT after another for what a single one could load.

    A SELECT counts if it comes three times or more from the same line, with the same calls before it, in the same
    attempt at a request and on the same connection.

    :param allow: what may be repeated: relationships such as ``"Author.books"``, or parts of statements.
    :raises AssertionError: if there is such a SELECT; the message shows it, how often it came and from where, and what
        to do about it.
    :raises TypeError: if ``allow`` is a text instead of a collection of texts.
    """
    if isinstance(allow, str):
        raise TypeError(f"allow must be a collection of texts, such as [{allow!r}].")
    with recorded() as record:
        yield
    repeats = find_repeats(record.statements, tuple(allow))
    if repeats:
        shown = "\n\n".join(map(str, repeats))
        raise AssertionError(f"N+1: these statements were sent for one object after another.\n\n{shown}")


@contextmanager
def no_leaks() -> Iterator[None]:
    """Check that each connection that the block checks out of a pool is returned before the block ends.

    :raises AssertionError: if one is not returned; the message shows the stack that checked it out.
    """
    checkouts = Checkouts()
    event.listen(Pool, "checkout", checkouts.note)
    try:
        yield
    finally:
        event.remove(Pool, "checkout", checkouts.note)
    stacks = checkouts.stacks()
    if stacks:
        places = "\n\n".join(stacks)
        raise AssertionError(
            f"{len(stacks)} connections were checked out and not returned. Checked out here:\n\n{places}"
        )
