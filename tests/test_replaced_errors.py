"""Engines whose listeners put errors of their own in the place of SQLAlchemy's, as oslo.db does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from oslo_db.exception import DBDeadlock, DBError
from oslo_db.sqlalchemy import exc_filters
from sqlalchemy import Column, Engine, Integer, MetaData, NullPool, Table, create_engine, event, insert, text, update
from sqlalchemy.exc import DBAPIError

from sqlasession_middleware import SQLASessionMiddleware, session
from tests.drivers import rows_of

from .ports import free_port
from .test_recovery import fail_to_lock, makes
from .test_unavailable import APPLICATIONS, call, kill
from .wsgi import Environ, StartResponse

TABLE = Table("replaced_item", MetaData(), Column("id", Integer, primary_key=True), Column("n", Integer))
PLAIN = [("Content-Type", "text/plain")]
TWICE = {"attempts": 2, "backoff_base": 0}


class ShopError(Exception):
    """What the application makes of errors of the database."""


def raises(context: Any) -> None:
    raise ShopError(str(context.original_exception))


def returns(context: Any) -> ShopError:
    return ShopError(str(context.original_exception))


#: When a listener is added: whether ours are there already, and whether it is one of all engines, which SQLAlchemy
#: calls before those of the engine.
ORDERS = {"before ours": (False, False), "after ours": (True, False), "of all engines": (False, True)}
ORDER = pytest.mark.parametrize("order", ORDERS)
LISTENER = pytest.mark.parametrize("listener", [raises, returns])


@pytest.fixture
def make(database_url: str) -> Iterator[Callable[..., SQLASessionMiddleware]]:
    yield from makes(database_url)


def ok(start: StartResponse) -> list[bytes]:
    start("200 OK", PLAIN)
    return [b"done"]


def ready(app: Any) -> Any:
    """An application that does nothing in its first request, which brings the listeners of the middleware."""

    def answer(environ: Environ, start: StartResponse) -> Any:
        return ok(start) if environ["PATH_INFO"] == "/first" else app(environ, start)

    return answer


@contextmanager
def listening(app: SQLASessionMiddleware, listener: Any, order: str) -> Iterator[None]:
    """Add a listener before or after those of the middleware."""
    after, to_all = ORDERS[order]
    if after:
        call(app, PATH_INFO="/first")
    target = Engine if to_all else app.engine
    event.listen(target, "handle_error", listener, retval=True)
    yield
    event.remove(target, "handle_error", listener)


# -- oslo.db, with real deadlocks


def rival_of(url: Any, begun: threading.Event, locked: threading.Event) -> None:
    """Lock the second row, then wait for the first. MariaDB gives up the transaction that has written less."""
    with create_engine(url, poolclass=NullPool).connect() as connection, suppress(DBAPIError):
        if connection.dialect.name == "postgresql":
            connection.execute(text("SET LOCAL deadlock_timeout = '60s'"))
        connection.execute(insert(TABLE), [{"id": number, "n": 0} for number in range(100, 300)])
        connection.execute(update(TABLE).where(TABLE.c.id == 2).values(n=5))
        assert begun.wait(10)
        locked.set()
        connection.execute(update(TABLE).where(TABLE.c.id == 1).values(n=5))


def wait_until_somebody_is_blocked(url: Any) -> None:
    """Wait until a session of this database waits for a lock."""
    asked = "SELECT count(*), pg_sleep(0.01) FROM pg_stat_activity"
    asked += " WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT").connect() as connection:
        assert any(connection.execute(text(asked)).one()[0] for _ in range(2000))


@pytest.mark.parametrize("row", rows_of("psycopg", "psycopg2", "pymysql", "MySQLdb"))
@pytest.mark.parametrize("registered", ["before ours", "after ours"])
@pytest.mark.parametrize("page", [False, True], ids=["raised", "page"])
def test_request_is_repeated_when_oslo_db_replaces_a_deadlock(row: Any, registered: str, page: bool) -> None:
    begun, locked = threading.Event(), threading.Event()
    met: list[BaseException] = []

    def cross() -> None:
        if met:
            # Else this attempt may take the first row before the rival does, and they are locked once more.
            rival.join()
        session.execute(update(TABLE).where(TABLE.c.id == 1).values(n=TABLE.c.n + 1))
        if not met:
            begun.set()
            assert locked.wait(10)
            if session().get_bind().dialect.name == "postgresql":
                # Whoever looks for the deadlock first is given up, and each looks once: so the rival waits already.
                session.execute(text("SET LOCAL deadlock_timeout = '10ms'"))
                wait_until_somebody_is_blocked(url)
        session.execute(update(TABLE).where(TABLE.c.id == 2).values(n=TABLE.c.n + 1))

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        try:
            cross()
        except DBDeadlock as error:
            met.append(error)
            if not page:
                raise
            start("500 Internal Server Error", PLAIN)
            return [b"sorry"]
        return ok(start)

    # oslo.db knows MySQL by this name, and not MariaDB.
    url = row.url().set(drivername=row.dialect.replace("mariadb", "mysql"))
    wrapped = SQLASessionMiddleware(ready(app), url, transaction=TWICE)
    if registered == "before ours":
        exc_filters.register_engine(wrapped.engine)
    TABLE.drop(wrapped.engine, checkfirst=True)
    TABLE.create(wrapped.engine)
    with wrapped.engine.begin() as connection:
        connection.execute(insert(TABLE), [{"id": 1, "n": 0}, {"id": 2, "n": 0}])
    if registered == "after ours":
        call(wrapped, PATH_INFO="/first")
        exc_filters.register_engine(wrapped.engine)
    rival = threading.Thread(target=rival_of, args=(url, begun, locked))
    rival.start()
    try:
        assert call(wrapped)[0] == "200 OK"
    finally:
        begun.set()
        rival.join()
    assert [type(error) for error in met] == [DBDeadlock]
    TABLE.drop(wrapped.engine)
    wrapped.dispose()


@pytest.mark.parametrize("app", APPLICATIONS)
@pytest.mark.parametrize("row", rows_of("psycopg", "psycopg2", "pymysql"))
def test_answer_is_503_when_oslo_db_replaces_an_outage(row: Any, app: Any) -> None:
    url = row.url().set(drivername=row.dialect.replace("mariadb", "mysql"), port=free_port())
    wrapped = SQLASessionMiddleware(app, url, unavailable=True)
    exc_filters.register_engine(wrapped.engine)
    assert call(wrapped)[0] == "503 Service Unavailable"


def test_error_stays_what_it_is_when_oslo_db_replaces_a_mistake(server_url: str) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        session.execute(text("SELECT * FROM replaced_missing"))
        return ok(start)

    wrapped = SQLASessionMiddleware(app, server_url, unavailable=True, transaction=TWICE)
    exc_filters.register_engine(wrapped.engine)
    with pytest.raises(DBError):
        call(wrapped)
    wrapped.dispose()


# -- any listener


@ORDER
@LISTENER
def test_request_is_repeated_when_a_listener_replaces_the_failure(make: Any, listener: Any, order: str) -> None:
    numbers: list[int] = []

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        numbers.append(environ["sqlasession.attempt"])
        if numbers == [1]:
            fail_to_lock()
        return ok(start)

    wrapped = make(ready(app), transaction=TWICE)
    with listening(wrapped, listener, order):
        assert call(wrapped)[0] == "200 OK"
    assert numbers == [1, 2]


@ORDER
@LISTENER
def test_nothing_is_repeated_when_a_listener_replaces_a_failure_that_is_dealt_with(
    make: Any, listener: Any, order: str
) -> None:
    numbers: list[int] = []

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        numbers.append(environ["sqlasession.attempt"])
        with suppress(ShopError):
            fail_to_lock()
        session.rollback()
        session.execute(text("SELECT 1"))
        raise TypeError("the application's own")

    wrapped = make(ready(app), transaction=TWICE)
    with listening(wrapped, listener, order), pytest.raises(TypeError):
        call(wrapped)
    assert numbers == [1]


@ORDER
@LISTENER
def test_answer_is_503_when_a_listener_replaces_the_loss_of_a_connection(
    server_url: str, listener: Any, order: str
) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        session.execute(text("SELECT 1"))
        kill(server_url)
        session.execute(text("SELECT 1"))
        return ok(start)

    wrapped = SQLASessionMiddleware(ready(app), server_url, unavailable=True)
    with listening(wrapped, listener, order):
        assert call(wrapped)[0] == "503 Service Unavailable"
    wrapped.dispose()


@pytest.mark.parametrize("error", [ShopError, LookupError])
def test_answer_is_503_when_a_listener_says_that_the_connection_is_lost(sqlite_url: str, error: Any) -> None:
    """SQLAlchemy's own way to tell of a dialect that does not know its server."""

    def says_lost(context: Any) -> None:
        context.is_disconnect = True

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        try:
            session.execute(text("no SQL"))
        except DBAPIError as cause:
            if error is LookupError:
                start("500 Internal Server Error", PLAIN)
                return [b"sorry"]
            raise error from cause
        return ok(start)

    wrapped = SQLASessionMiddleware(app, sqlite_url, unavailable=True)
    event.listen(wrapped.engine, "handle_error", says_lost, retval=True)
    assert call(wrapped)[0] == "503 Service Unavailable"
    wrapped.dispose()


@LISTENER
def test_refusal_of_a_replica_is_no_outage_when_a_listener_replaces_it(sqlite_url: str, listener: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        session.execute(text("SELECT 1"))
        session.connection(bind_arguments={"bind": wrapped.engines["replicas[0]"]}).exec_driver_sql(
            "CREATE TABLE replaced (n INTEGER)"
        )
        return ok(start)

    wrapped = SQLASessionMiddleware(app, sqlite_url, replicas=[sqlite_url], unavailable=True)
    event.listen(wrapped.engines["replicas[0]"], "handle_error", listener, retval=True)
    with pytest.raises(ShopError) as caught:
        call(wrapped)
    assert "call on_primary() before it" in caught.value.__cause__.__notes__[0]  # type: ignore[union-attr]
    wrapped.dispose()


@LISTENER
def test_replica_is_passed_over_when_a_listener_replaces_its_outage(server_url: str, listener: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        session.execute(text("SELECT 1"))
        return ok(start)

    url = create_engine(server_url).url
    wrapped = SQLASessionMiddleware(app, url, replicas=[url.set(port=free_port())])
    event.listen(wrapped.engines["replicas[0]"], "handle_error", listener, retval=True)
    assert call(wrapped)[0] == "200 OK"
    wrapped.dispose()


def test_error_of_another_engine_says_nothing_when_the_application_has_made_its_own_of_it(sqlite_url: str) -> None:
    """Only what a listener has replaced is looked through: this one may have been dealt with."""

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        try:
            create_engine(f"postgresql+psycopg://127.0.0.1:{free_port()}/shop").connect()
        except DBAPIError as error:
            raise ShopError from error.orig
        return ok(start)

    wrapped = SQLASessionMiddleware(app, sqlite_url, unavailable=True)
    with pytest.raises(ShopError):
        call(wrapped)
    wrapped.dispose()
