"""What makes the pool replace its connections: one error for each of them would be one too many."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from sqlalchemy import Column, Engine, Integer, MetaData, Table, create_engine, insert, select, text
from sqlalchemy.exc import DBAPIError, NotSupportedError

from sqlasession_middleware import SQLASessionMiddleware, session

from .drivers import Row, rows_of
from .test_unavailable import call
from .wsgi import Environ, StartResponse

TABLE = Table(f"outdated_{os.getpid()}", MetaData(), Column("id", Integer, primary_key=True))
ALL = text(f"SELECT * FROM {TABLE.name}")
SIZE = 4
PLAIN = [("Content-Type", "text/plain")]
ANSWERED = ("200 OK", dict(PLAIN), b"id,more")


def shows_all_columns(environ: Environ, start: StartResponse) -> Iterable[bytes]:
    names = ",".join(session.execute(ALL).keys())
    start("200 OK", PLAIN)
    return [names.encode()]


def fill_pool(engine: Engine) -> None:
    """Have each connection of a pool prepare the statement."""
    with ExitStack() as stack:
        for connection in [stack.enter_context(engine.connect()) for _ in range(SIZE)]:
            connection.execute(ALL)
            connection.execute(ALL)
            connection.commit()


@pytest.fixture(params=rows_of("psycopg"))
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., SQLASessionMiddleware]]:
    """Makes applications with a pool of connections that have prepared a statement, which is then outdated."""
    row: Row = request.param
    url = row.url()
    other = create_engine(url)
    with ExitStack() as stack:
        stack.callback(other.dispose)

        def make(app: Any, engine_options: Any = None, **options: Any) -> SQLASessionMiddleware:
            TABLE.drop(other, checkfirst=True)
            TABLE.create(other)
            engine_options = {"pool_size": SIZE, "connect_args": {"prepare_threshold": 0}, **(engine_options or {})}
            wrapped = SQLASessionMiddleware(app, url, engine_options=engine_options, **options)
            stack.callback(wrapped.dispose)
            fill_pool(wrapped.engine)
            with other.begin() as connection:
                connection.execute(text(f"ALTER TABLE {TABLE.name} ADD COLUMN more INTEGER"))
            return wrapped

        yield make
        TABLE.drop(other)


def test_request_is_repeated_when_a_migration_has_outdated_all_connections(make: Any) -> None:
    app = make(shows_all_columns, transaction={"attempts": 2, "backoff_base": 0})
    for _ in range(2 * SIZE):
        assert call(app) == ANSWERED


@pytest.mark.parametrize("options", [{}, {"isolation_level": "AUTOCOMMIT"}], ids=["", "autocommit"])
@pytest.mark.parametrize("feature", ["transaction", "unavailable"])
def test_next_request_succeeds_when_a_migration_has_outdated_all_connections(
    make: Any, options: Any, feature: str
) -> None:
    app = make(shows_all_columns, options, **{feature: True})
    with pytest.raises(NotSupportedError, match="cached plan"):
        call(app)
    for _ in range(2 * SIZE):
        assert call(app) == ANSWERED


def test_transaction_goes_on_when_the_application_has_caught_an_outdated_plan(make: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        session.execute(insert(TABLE).values(id=1))
        with pytest.raises(DBAPIError), session.begin_nested():
            session.execute(ALL)
        return shows_all_columns(environ, start)

    wrapped = make(app, transaction=True)
    assert call(wrapped) == ANSWERED
    with wrapped.context():
        assert session.scalars(select(TABLE.c.id)).all() == [1]


def test_new_connections_are_kept_when_an_old_one_meets_the_error_late(make: Any) -> None:
    app = make(shows_all_columns, {"max_overflow": SIZE}, unavailable=True)

    def number_of_a_connection() -> int:
        with app.engine.connect() as connection:
            return int(connection.connection.driver_connection.info.backend_pid)

    with app.engine.connect() as late:
        with pytest.raises(NotSupportedError):
            call(app)
        numbers = {number_of_a_connection() for _ in range(SIZE)}
        with pytest.raises(NotSupportedError):
            late.execute(ALL)
    assert {number_of_a_connection() for _ in range(SIZE)} & numbers
