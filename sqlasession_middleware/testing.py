"""For the tests of applications: nothing that a test stores stays, and what it asks of the database can be counted.

.. code-block:: python

    with isolated(app):
        client.post("/guests", data={"name": "Ada"})  # commits
        with assert_queries(1):
            assert "Ada" in client.get("/guests").text
    # and is gone
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import Session
from sqlalchemy.pool import Pool

from .drivers import begin_writing
from .leaks import Checkouts, lasting
from .middleware import SQLASessionMiddleware
from .watch import is_in_autocommit, read_only

__all__ = ["assert_queries", "isolated", "no_leaks"]


@contextmanager
def isolated(*applications: SQLASessionMiddleware) -> Iterator[None]:
    """Run requests and contexts inside of one transaction per engine, which is rolled back at the end.

    The application commits as it likes, ``transaction=True`` included: each commit is that of a savepoint, and later
    requests see it. Replicas are read from the primary's transaction. Tables have to be there before, and what works on
    ``app.engine`` by itself is outside. The isolation level is the engine's, and nothing is committed in two phases.
    All sessions of an engine share one connection, so requests have to come one at a time: a server that is tested is
    best given one thread.

    It may be nested: what an inner block stores is gone at its end, what the outer one has stored stays until its own.

    :param applications: several share a transaction where they share an Engine.
    """
    with ExitStack() as stack:
        isolation = _Isolation(stack)
        for application in applications:
            stack.callback(_restore, application, vars(application).get("new_session"))
            vars(application)["new_session"] = isolation.maker(application)
        yield


#: the connections of all that are isolated at the moment
_isolating: WeakSet[Connection] = WeakSet()


class _Isolation:
    """The connections of an isolated test, and their transactions."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._connections: dict[Engine, Connection] = {}

    def maker(self, application: SQLASessionMiddleware) -> Callable[..., Session]:
        """Makes Sessions of the application, on the test's connections."""
        make, default = application.new_session, application.engine

        def make_isolated(**options: Any) -> Session:
            made = make(**{"join_transaction_mode": "create_savepoint", **options})
            made.twophase = False
            choose, connect = made.get_bind, made.connection

            def get_bind(*arguments: Any, **more: Any) -> Any:
                bind = choose(*arguments, **more)
                if isinstance(bind, Engine):
                    return self._connection(default if bind in read_only else bind)
                if bind in _isolating:
                    self._nest(bind)
                return bind

            def connection(
                bind_arguments: Any = None, execution_options: Mapping[str, Any] | None = None
            ) -> Connection:
                options = dict(execution_options or {})
                options.pop("isolation_level", None)  # The transaction has begun, with the one that it has.
                bind = (bind_arguments or {}).get("bind")
                if isinstance(bind, Engine) and bind in read_only:  # It was chosen to be read from.
                    arguments = {**bind_arguments, "bind": self._connection(default)}
                    return Session.connection(made, arguments, options or None)
                if isinstance(bind, Engine):
                    bind_arguments = {**bind_arguments, "bind": self._connection(bind)}
                return connect(bind_arguments=bind_arguments, execution_options=options or None)

            made.get_bind = get_bind  # type: ignore[method-assign]
            made.connection = connection  # type: ignore[method-assign]
            return made

        return make_isolated

    def _connection(self, engine: Engine) -> Connection:
        connection = self._connections.get(engine)
        if connection is None:
            connection = self._connections[engine] = self._stack.enter_context(_connect(engine))
            self._stack.callback(connection.begin().rollback)
            if engine.dialect.name == "sqlite":
                begin_writing(connection, always=True)  # Else the driver would commit the first savepoint.
            _isolating.add(connection)
        return connection

    def _nest(self, connection: Connection) -> None:
        """Be a part of another isolation, which goes on after this one."""
        if connection.engine not in self._connections:
            self._connections[connection.engine] = connection
            self._stack.callback(connection.begin_nested().rollback)


def _connect(engine: Engine) -> Connection:
    connection = engine.connect()
    lasting.add(connection.connection)
    if is_in_autocommit(connection):
        # Nothing could be rolled back there.
        connection.execution_options(isolation_level=connection.default_isolation_level)
    return connection


def _restore(application: SQLASessionMiddleware, make: Callable[..., Session] | None) -> None:
    if make is None:
        vars(application).pop("new_session", None)
    else:
        vars(application)["new_session"] = make


#: What SQLAlchemy, this library, and who begins SQLite's transactions by hand, send as a statement.
_OF_TRANSACTIONS = re.compile(
    r"BEGIN( \w+)*$|COMMIT\b|ROLLBACK\b|SAVEPOINT\b|RELEASE SAVEPOINT\b|PREPARE TRANSACTION\b|XA ", re.IGNORECASE
)


@contextmanager
def assert_queries(count: int) -> Iterator[list[str]]:
    """Check how many statements the block sends to databases, of all engines.

    Gives the list of them, which grows. What a transaction needs by itself (BEGIN, COMMIT, savepoints, two phases) is
    not counted.

    :raises AssertionError: if there were more or fewer; it shows them.
    """
    statements: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool) -> None:
        if _OF_TRANSACTIONS.match(statement) is None:
            statements.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield statements
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    if len(statements) != count:
        shown = "".join(f"\n{number}. {statement}" for number, statement in enumerate(statements, 1))
        raise AssertionError(f"{count} statements were expected, and {len(statements)} were sent:{shown or ' none'}")


@contextmanager
def no_leaks() -> Iterator[None]:
    """Check that every connection that is taken from a pool in the block is given back in it.

    :raises AssertionError: if one is not; it shows where that was taken.
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
        raise AssertionError(f"{len(stacks)} connections were taken and not given back. Taken here:\n\n{places}")
