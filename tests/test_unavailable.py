"""UnavailableMiddleware: what is a 503, what it says, and what stays what it is."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, create_engine, event, insert, make_url, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware.errors import ConfigurationError
from sqlasession_middleware.unavailable import UnavailableMiddleware

from .ports import free_port
from .wsgi import Environ, StartResponse, consume, environ, select_one

PLAIN = [("Content-Type", "text/plain")]
SECRET = "hunter2-s3cret"


@pytest.fixture(params=["postgresql+psycopg", "postgresql+psycopg2", "mysql+pymysql"])
def unreachable_url(request: pytest.FixtureRequest) -> str:
    """The URL of a server that is not there, with a password in it."""
    return f"{request.param}://shop:{SECRET}@127.0.0.1:{free_port()}/shop"


def kill(url: Any) -> None:
    """End the connection of the current session from the server's side."""
    killer = create_engine(url)
    with killer.connect() as other:
        if killer.dialect.name == "postgresql":
            number = session.scalar(text("SELECT pg_backend_pid()"))
            other.execute(text("SELECT pg_terminate_backend(:number, 5000)"), {"number": number})
        else:
            other.exec_driver_sql(f"KILL {session.scalar(text('SELECT CONNECTION_ID()'))}")
    killer.dispose()


def call(app: Any, **more: Any) -> tuple[str, dict[str, str], bytes]:
    """What a server is given: status, headers and body."""
    heads: list[tuple[str, dict[str, str]]] = []

    def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        heads.append((status, dict(headers)))
        return lambda data: None

    body = consume(app(environ(**more), start))
    (head,) = heads
    return *head, body


def lets_it_pass(environ: Environ, start: StartResponse) -> list[bytes]:
    select_one()
    start("200 OK", PLAIN)
    return [b"done"]


def makes_a_page(environ: Environ, start: StartResponse) -> list[bytes]:
    try:
        select_one()
    except Exception as error:
        start("500 Internal Server Error", PLAIN)
        return [str(error).encode()]
    start("200 OK", PLAIN)
    return [b"done"]


def raises_its_own(environ: Environ, start: StartResponse) -> list[bytes]:
    try:
        select_one()
    except Exception as error:
        raise LookupError("shop") from error
    start("200 OK", PLAIN)
    return [b"done"]


def fails_in_the_first_step(environ: Environ, start: StartResponse) -> Iterator[bytes]:
    start("200 OK", PLAIN)
    yield b""
    select_one()
    yield b"done"


def page_in_steps(environ: Environ, start: StartResponse) -> Iterator[bytes]:
    yield from makes_a_page(environ, start)


APPLICATIONS = [lets_it_pass, makes_a_page, raises_its_own, fails_in_the_first_step, page_in_steps]


@pytest.mark.parametrize("transaction", [False, {"attempts": 2, "backoff_base": 0}], ids=["", "transaction"])
@pytest.mark.parametrize("app", APPLICATIONS)
def test_answer_is_503_when_the_server_is_not_there(
    unreachable_url: str, app: Any, transaction: Any, caplog: pytest.LogCaptureFixture
) -> None:
    wrapped = SQLASessionMiddleware(app, unreachable_url, unavailable=True, transaction=transaction)
    status, headers, body = call(wrapped)
    assert status == "503 Service Unavailable"
    assert headers["Retry-After"] == "10"
    assert headers["Cache-Control"] == "no-store"
    assert b"cannot be reached" in body
    for detail in (b"127.0.0.1", b"refused", b"OperationalError", SECRET.encode()):
        assert detail not in body
    (record,) = (record for record in caplog.records if record.levelno >= logging.ERROR)
    assert record.exc_info is not None
    error = record.exc_info[1]
    assert isinstance(error, OperationalError) or isinstance(error.__cause__, OperationalError)
    assert " is answered with 503: " in record.getMessage()
    assert "127.0.0.1" in record.getMessage()
    assert SECRET not in caplog.text
    assert wrapped.engine.pool.checkedout() == 0


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("text/html,*/*;q=0.8", "text/html"),
        ("application/json", "application/json"),
        ("application/json, text/html;q=0.5", "application/json"),
        ("text/plain", "text/plain"),
        ("image/png", "text/plain"),
        (None, "text/plain"),
    ],
)
def test_page_is_what_the_client_accepts(accept: str | None, content_type: str) -> None:
    wrapped = SQLASessionMiddleware(
        lets_it_pass, f"mysql+pymysql://shop@127.0.0.1:{free_port()}/shop", unavailable={"retry_after": 3}
    )
    status, headers, body = call(wrapped, **({} if accept is None else {"HTTP_ACCEPT": accept}))
    assert status.startswith("503 ")
    assert headers["Content-Type"].partition(";")[0] == content_type
    assert headers["Retry-After"] == "3"
    assert int(headers["Content-Length"]) == len(body)
    if content_type == "application/json":
        assert json.loads(body) == {
            "title": "Service Unavailable",
            "code": "503 Service Unavailable",
            "message": "The database cannot be reached at the moment. Please try again later.",
        }


def test_page_has_no_body_when_only_its_head_is_asked_for() -> None:
    url = f"mysql+pymysql://shop@127.0.0.1:{free_port()}/shop"
    status, _, body = call(SQLASessionMiddleware(lets_it_pass, url, unavailable=True), REQUEST_METHOD="HEAD")
    assert (status, body) == ("503 Service Unavailable", b"")


@pytest.mark.parametrize("app", APPLICATIONS)
def test_answer_is_503_when_the_pool_is_exhausted(database_url: str, app: Any) -> None:
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0}
    wrapped = SQLASessionMiddleware(app, database_url, engine_options=options, unavailable=True)
    with wrapped.engine.connect():
        assert call(wrapped)[0] == "503 Service Unavailable"
    assert call(wrapped)[::2] == ("200 OK", b"done")
    wrapped.dispose()


@pytest.mark.parametrize("app", APPLICATIONS)
def test_answer_is_503_when_the_connection_is_killed_and_the_next_one_is_right(server_url: str, app: Any) -> None:
    def killed(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        if environ["kill"]:
            kill(server_url)
        return app(environ, start)

    wrapped = SQLASessionMiddleware(killed, server_url, unavailable=True)
    assert call(wrapped, kill=True)[0] == "503 Service Unavailable"
    assert call(wrapped, kill=False)[::2] == ("200 OK", b"done")
    assert wrapped.engine.pool.checkedout() == 0
    wrapped.dispose()


def integrity(environ: Environ, start: StartResponse) -> list[bytes]:
    for _ in range(2):
        session.execute(text("INSERT INTO unavailable_item (id) VALUES (1)"))
    return []


def schema(environ: Environ, start: StartResponse) -> list[bytes]:
    session.execute(text("SELECT nothing FROM unavailable_missing"))
    return []


def bug(environ: Environ, start: StartResponse) -> list[bytes]:
    raise LookupError


@pytest.mark.parametrize(
    ("app", "error"),
    [(integrity, IntegrityError), (schema, (ProgrammingError, OperationalError)), (bug, LookupError)],
)
def test_other_errors_stay_what_they_are(database_url: str, app: Any, error: Any) -> None:
    wrapped = SQLASessionMiddleware(app, database_url, unavailable=True)
    with wrapped.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE IF EXISTS unavailable_item")
        connection.exec_driver_sql("CREATE TABLE unavailable_item (id INTEGER PRIMARY KEY)")
    try:
        with pytest.raises(error):
            call(wrapped)
    finally:
        with wrapped.engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE unavailable_item")
        wrapped.dispose()


def test_login_errors_stay_what_they_are(server_url: str) -> None:
    url = create_engine(server_url).url.set(username="nobody_of_that_name", password=SECRET)
    with pytest.raises(DBAPIError) as caught:
        call(SQLASessionMiddleware(lets_it_pass, url, unavailable=True))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("status", ["404 Not Found", "503 Slow Down", "200 OK"])
def test_applications_own_answer_stays_when_it_is_no_500(unreachable_url: str, status: str) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        with pytest.raises(OperationalError):
            select_one()
        start(status, PLAIN)
        return [b"of the application"]

    assert call(SQLASessionMiddleware(app, unreachable_url, unavailable=True))[::2] == (status, b"of the application")


def test_page_of_a_bug_stays_when_the_database_is_there(sqlite_url: str) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        select_one()
        start("500 Internal Server Error", PLAIN)
        return [b"of the application"]

    wrapped = SQLASessionMiddleware(app, sqlite_url, unavailable=True, transaction=True)
    assert call(wrapped)[::2] == ("500 Internal Server Error", b"of the application")
    wrapped.dispose()


def test_nothing_is_taken_back_when_something_was_released(unreachable_url: str) -> None:
    def app(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        start("200 OK", PLAIN)
        yield b"x"
        select_one()

    result = SQLASessionMiddleware(app, unreachable_url, unavailable=True)(environ(), lambda *head: lambda data: None)
    steps = iter(result)
    assert next(steps) == b"x"
    with pytest.raises(OperationalError):
        next(steps)

    def writes(environ: Environ, start: StartResponse) -> list[bytes]:
        write = start("200 OK", PLAIN)
        write(b"x")
        write(b"y")
        select_one()
        return []

    with pytest.raises(OperationalError):
        SQLASessionMiddleware(writes, unreachable_url, unavailable=True)(environ(), lambda *head: lambda data: None)


def test_pool_is_the_callers_affair_outside_of_a_scope(database_url: str) -> None:
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0}
    wrapped = SQLASessionMiddleware(lets_it_pass, database_url, engine_options=options, unavailable=True)
    with wrapped.engine.connect(), pytest.raises(PoolTimeoutError):
        wrapped.engine.connect()
    wrapped.dispose()


class Closing:
    """A body whose steps and close() can be told to fail."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        if self.error is not None:
            raise self.error
        yield b"x"

    def close(self) -> None:
        self.closed += 1
        if self.error is not None:
            raise ValueError("close")


@pytest.mark.parametrize("error", [None, LookupError("step"), SystemExit(), PoolTimeoutError("busy")])
def test_body_is_closed_once_whatever_becomes_of_it(error: BaseException | None) -> None:
    body = Closing(error)

    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        start("200 OK", PLAIN)
        return body

    wrapped = UnavailableMiddleware(app)
    if error is None:
        assert call(wrapped)[2] == b"x"
    elif isinstance(error, PoolTimeoutError):
        assert call(wrapped)[0] == "503 Service Unavailable"
    else:
        with pytest.raises(type(error)):
            call(wrapped)
    assert body.closed == 1


def test_it_goes_by_the_exception_when_it_stands_alone(unreachable_url: str) -> None:
    engine = create_engine(unreachable_url)

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        with engine.connect():
            raise AssertionError

    assert call(UnavailableMiddleware(app))[0] == "503 Service Unavailable"
    with pytest.raises(LookupError):
        call(UnavailableMiddleware(bug))


@pytest.mark.parametrize("make", [lambda: [b"c"], lambda: iter([b"c"]), list], ids=["list", "iterator", "empty"])
@pytest.mark.parametrize("written", [[b"a"], [b"a", b"b"], []])
def test_what_is_written_arrives_in_order(make: Any, written: list[bytes]) -> None:
    received: list[bytes] = []

    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        write = start("200 OK", PLAIN)
        for chunk in written:
            write(chunk)
        return make()

    rest = consume(UnavailableMiddleware(app)(environ(), lambda *head: received.append))
    assert b"".join(received) + rest == b"".join(written) + b"".join(make())


@pytest.mark.parametrize("stacked", [True, {"retry_after": 0}])
def test_success_is_untouched(database_url: str, stacked: Any) -> None:
    for app in APPLICATIONS:
        wrapped = SQLASessionMiddleware(app, database_url, unavailable=stacked, transaction=True)
        assert call(wrapped)[::2] == ("200 OK", b"done")
        assert wrapped.engine.pool.checkedout() == 0
        wrapped.dispose()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retry_after": -1}, r"^unavailable\['retry_after'\] must be a whole number of seconds from 0, got -1\."),
        ({"retry_after": True}, "got True"),
        ({"retry_later": 1}, r"^unavailable\['retry_later'\] is not an option; did you mean 'retry_after'\?"),
        (1, r"^unavailable must be true, false or a dict of options, got int\."),
    ],
)
def test_error_names_the_option_when_it_is_wrong(sqlite_url: str, options: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SQLASessionMiddleware(lets_it_pass, sqlite_url, unavailable=options)


def test_error_says_app_when_that_is_none() -> None:
    with pytest.raises(ConfigurationError, match="app must be a WSGI application"):
        UnavailableMiddleware(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_outcome_is_told_as_unknown_when_the_connection_dies_with_the_commit(
    server_url: str, driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An event of the session kills its own connection just before: COMMIT is sent into the void."""
    url = make_url(server_url)
    if url.get_backend_name() == "postgresql":
        url = url.set(drivername=f"postgresql+{driver}")
    numbers: list[int] = []
    tables = MetaData()
    rows = Table("unavailable_row", tables, Column("id", Integer, primary_key=True))

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        numbers.append(environ["sqlasession.attempt"])
        session.execute(insert(rows))
        event.listen(session(), "before_commit", lambda opened: kill(url))
        start("200 OK", PLAIN)
        return [b"done"]

    wrapped = SQLASessionMiddleware(
        app, url, metadata=tables, transaction={"attempts": 3}, unavailable=True, session_options={"autoflush": False}
    )
    wrapped.init_database()
    try:
        status, headers, body = call(wrapped)
        assert status == "500 Internal Server Error"
        assert "Retry-After" not in headers
        assert b"not known whether your change was saved" in body
        assert numbers == [1]
        assert "not known whether a transaction was committed" in caplog.text
    finally:
        wrapped.drop_database()
        wrapped.dispose()
