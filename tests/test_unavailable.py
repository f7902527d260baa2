"""UnavailableMiddleware: what is a 503, what it says, and what stays what it is."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from typing import Any

import pytest
from flask import Flask
from flask import request as flask_request
from sqlalchemy import (
    Column,
    Integer,
    MetaData,
    Table,
    Text,
    create_engine,
    event,
    insert,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from werkzeug.wsgi import FileWrapper

from sqlasession_middleware import SQLASessionMiddleware, application, local, session
from sqlasession_middleware.errors import ConfigurationError
from sqlasession_middleware.transaction import TransactionMiddleware
from sqlasession_middleware.unavailable import UnavailableMiddleware

from .conftest import DATABASES_SEEN
from .ports import free_port
from .wsgi import Environ, StartResponse, consume, environ, select_one

pytestmark = pytest.mark.usefixtures("disposes")

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
            "code": 503,
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
        ({"page": 3}, r"^unavailable\['page'\] must be callable, or the dotted name of"),
        ({"page": "no.such:page"}, r"^unavailable\['page'\] must be the dotted name .* got 'no.such:page'"),
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
        assert json.loads(call(wrapped, HTTP_ACCEPT="application/json")[2])["code"] == 500
    finally:
        wrapped.drop_database()
        wrapped.dispose()


# -- a page of the application's


class Page:
    """A page that notes what it was told, and whether its body was closed.

    :param fault: where it fails: "call", "head", "step", "close", "no head", "text" or "500".
    """

    def __init__(
        self, status: str = "503 Closed", headers: Any = (), fault: str = "", error: Any = LookupError
    ) -> None:
        self.head = status, [*PLAIN, *headers]
        self.fault = fault
        self.error = error
        self.told: list[tuple[str, str]] = []
        self.closed = 0

    def __str__(self) -> str:
        return self.fault

    def fail_at(self, place: str) -> None:
        if place == self.fault:
            raise self.error(place)

    def __call__(self, environ: Environ, start: StartResponse) -> Any:
        self.told.append((environ["sqlasession.unavailable"], environ["sqlasession.retry_after"]))
        self.fail_at("call")
        if self.fault == "500":
            start("500 Broken", PLAIN, (LookupError, LookupError("500"), None))
        elif self.fault != "no head":
            start(*self.head)
        self.fail_at("head")
        return self

    def __iter__(self) -> Iterator[bytes]:
        yield b"back "
        self.fail_at("step")
        yield "soon" if self.fault == "text" else b"soon"  # type: ignore[misc]

    def close(self) -> None:
        self.closed += 1
        self.fail_at("close")


def page_in_flask(told: list[tuple[str, str]]) -> Flask:
    flask = Flask("page")

    @flask.route("/")
    def view() -> Any:
        told.append(
            (flask_request.environ["sqlasession.unavailable"], flask_request.environ["sqlasession.retry_after"])
        )
        return "back soon", 503

    return flask


KINDS = ["unreachable", "pool", "busy"]


@contextmanager
def failing(kind: str, url: str, app: Any, **options: Any) -> Iterator[SQLASessionMiddleware]:
    """An application that cannot use its database, for a reason."""
    if kind == "unreachable":
        yield SQLASessionMiddleware(
            app, make_url("postgresql+psycopg://shop@127.0.0.1").set(port=free_port()), **options
        )
    elif kind == "pool":
        pool = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0}
        wrapped = SQLASessionMiddleware(app, url, engine_options=pool, **options)
        with wrapped.engine.connect():
            yield wrapped
        wrapped.dispose()
    else:
        wrapped = SQLASessionMiddleware(app, url, metadata=LOCKED, **options)
        with locked(wrapped):
            yield wrapped


@pytest.mark.parametrize("of_flask", [False, True], ids=["bare", "flask"])
@pytest.mark.parametrize("app", ["raises", "makes a page"])
@pytest.mark.parametrize("transaction", [False, {"attempts": 2, "backoff_base": 0}], ids=["", "attempts"])
@pytest.mark.parametrize("kind", KINDS)
def test_page_is_told_why(database_url: str, kind: str, transaction: Any, app: str, of_flask: bool) -> None:
    use = meet_a_lock if kind == "busy" else select_one

    def raises(environ: Environ, start: StartResponse) -> list[bytes]:
        use()
        raise AssertionError

    flask = Flask("shop")
    flask.add_url_rule("/", view_func=lambda: str(use()))
    page = Page()
    told = page.told
    given = {"page": page_in_flask(told) if of_flask else page, "retry_after": 7, "transient": True}
    with failing(
        kind, database_url, raises if app == "raises" else flask, unavailable=given, transaction=transaction
    ) as wrapped:
        status, headers, body = call(wrapped, **WEB)
        assert told == [(kind, "7")]
    assert (status[:3], headers["Retry-After"], body) == ("503", "7", b"back soon")


def page_as_a_generator(environ: Environ, start: StartResponse) -> Iterator[bytes]:
    start("503 Closed", PLAIN)
    yield b"back soon"


def page_that_writes(environ: Environ, start: StartResponse) -> list[bytes]:
    write = start("503 Closed", PLAIN)
    write(b"ba")
    write(b"ck ")
    return [b"soon"]


def page_that_is_a_file(environ: Environ, start: StartResponse) -> Any:
    start("503 Closed", PLAIN)
    return environ["wsgi.file_wrapper"](BytesIO(b"back soon"))


@pytest.mark.parametrize(
    ("page", "status", "retry_after"),
    [
        (Page(), "503 Closed", "10"),
        (Page(headers=[("retry-after", "99")]), "503 Closed", "99"),
        (Page("200 OK"), "200 OK", None),
        (Page("404 Not Found"), "404 Not Found", None),
        (page_as_a_generator, "503 Closed", "10"),
        (page_that_writes, "503 Closed", "10"),
        (page_that_is_a_file, "503 Closed", "10"),
        (f"{__name__}:page_that_writes", "503 Closed", "10"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_status_of_the_page_stands(
    unreachable_url: str, page: Any, status: str, retry_after: str | None, method: str
) -> None:
    wrapped = SQLASessionMiddleware(lets_it_pass, unreachable_url, unavailable={"page": page})
    seen = call(wrapped, REQUEST_METHOD=method, **{"wsgi.file_wrapper": FileWrapper})
    assert (seen[0], seen[2]) == (status, b"" if method == "HEAD" else b"back soon")
    assert {name.lower(): value for name, value in seen[1].items()}.get("retry-after") == retry_after
    if isinstance(page, Page):
        assert page.closed == len(page.told)


def page_that_queries(environ: Environ, start: StartResponse) -> list[bytes]:
    start("200 OK", PLAIN)
    return [b"%d" % select_one()]


def flask_page_that_queries() -> Flask:
    flask = Flask("page")
    flask.add_url_rule("/", view_func=lambda: str(select_one()))
    return flask


FAULTS = ["call", "head", "step", "close", "no head", "text", "500"]


@pytest.mark.parametrize(
    "page",
    [*(Page(fault=fault) for fault in FAULTS), page_that_queries, flask_page_that_queries()],
    ids=[*FAULTS, "queries", "flask that queries"],
)
@pytest.mark.parametrize("transaction", [False, True], ids=["", "transaction"])
def test_default_page_is_sent_when_the_page_fails(
    unreachable_url: str, page: Any, transaction: bool, caplog: pytest.LogCaptureFixture
) -> None:
    wrapped = SQLASessionMiddleware(lets_it_pass, unreachable_url, transaction=transaction, unavailable={"page": page})
    before = getattr(page, "closed", 0)
    status, headers, body = call(wrapped, **WEB)
    assert (status, headers["Retry-After"]) == ("503 Service Unavailable", "10")
    assert b"cannot be reached" in body
    assert SECRET.encode() not in body
    said = [record.getMessage() for record in caplog.records if record.name == "sqlasession_middleware.unavailable"]
    assert [text.partition(" GET ")[0] for text in said] == [
        "The database is out of reach:",
        "The page of 'unavailable' failed at",
    ]
    assert SECRET not in caplog.text
    if isinstance(page, Page):
        assert page.closed - before == (page.fault not in ("call", "head"))
        assert page.fault == "text" or page.fault == "no head" or f"LookupError: {page.fault}" in caplog.text
    assert wrapped.engine.pool.checkedout() == 0


def test_exit_is_no_failure_of_the_page(unreachable_url: str) -> None:
    page = Page(fault="step", error=SystemExit)
    with pytest.raises(SystemExit):
        call(SQLASessionMiddleware(lets_it_pass, unreachable_url, unavailable={"page": page}))
    assert page.closed == 1


def test_page_belongs_to_the_scope_of_the_request(unreachable_url: str) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        local.title = "Guests"
        environ["wsgi.input"].read()
        return lets_it_pass(environ, start)

    def page(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        start("200 OK", PLAIN)
        yield f"{local.title} {application is not None} {environ['wsgi.input'].read()!r}".encode()

    wrapped = SQLASessionMiddleware(app, unreachable_url, unavailable={"page": page})
    assert call(wrapped, **{"wsgi.input": BytesIO(b"name=Ada")})[2] == b"Guests True b''"


def test_page_stands_where_no_scope_is(unreachable_url: str) -> None:
    engine = create_engine(unreachable_url)
    page = Page()

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        with engine.connect():
            raise AssertionError

    assert call(UnavailableMiddleware(app, page=page))[::2] == ("503 Closed", b"back soon")
    assert page.told == [("unreachable", "10")]


def test_page_is_left_alone_when_the_database_is_there(database_url: str) -> None:
    page = Page()
    for app in APPLICATIONS:
        wrapped = SQLASessionMiddleware(app, database_url, unavailable={"page": page})
        seen = environ()
        assert consume(wrapped(seen, lambda *head: lambda data: None)) == b"done"
        assert seen == environ()
        wrapped.dispose()
    assert page.told == []


# -- what is still there after the last attempt


class Deadlock(Exception):  # noqa: N818
    """What a driver raises when the database has given up the transaction."""

    sqlstate = "40P01"


Deadlock.__module__ = "psycopg.errors"
LOCKED = MetaData()
ROWS = Table("unavailable_row", LOCKED, Column("id", Integer, primary_key=True), Column("number", Integer))


def in_flask() -> Any:
    """A view that meets a lock, of which Flask makes a 500."""
    flask = Flask("unavailable")
    flask.add_url_rule("/", view_func=lambda: str(meet_a_lock()))
    return flask


def bare(environ: Environ, start: StartResponse) -> list[bytes]:
    meet_a_lock()
    start("200 OK", PLAIN)
    return [b"done"]


def meet_a_lock() -> int:
    """55P03, 1205, SQLITE_BUSY: somebody else has the row for as long as it takes."""
    if session().get_bind().dialect.name == "sqlite":
        session.execute(text("PRAGMA busy_timeout = 0"))
        session.execute(insert(ROWS).values(number=2))
    return session.scalars(select(ROWS.c.id).with_for_update(nowait=True)).one()


@contextmanager
def locked(wrapped: SQLASessionMiddleware) -> Iterator[None]:
    wrapped.drop_database()
    wrapped.init_database()
    try:
        with wrapped.engine.begin() as connection:
            connection.execute(insert(ROWS).values(number=1))
        other = create_engine(wrapped.engine.url)
        with other.connect() as connection:
            if other.dialect.name == "sqlite":
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            connection.execute(update(ROWS).values(number=3))
            yield
        other.dispose()
    finally:
        wrapped.drop_database()
        wrapped.dispose()


REPEATED = {"attempts": 2, "backoff_base": 0}
WEB = {"SERVER_NAME": "localhost", "SERVER_PORT": "80", "wsgi.url_scheme": "http"}
#: The options, and whether a lock that is not available is a 503.
TRANSIENT: dict[str, tuple[dict[str, Any], bool]] = {
    "attempts": ({"transaction": REPEATED, "unavailable": True}, True),
    "attempts, switched off": ({"transaction": REPEATED, "unavailable": {"transient": False}}, False),
    "one attempt": ({"transaction": True, "unavailable": True}, False),
    "one attempt, switched on": ({"transaction": True, "unavailable": {"transient": True}}, True),
    "no transaction": ({"unavailable": True}, False),
    "no transaction, switched on": ({"unavailable": {"transient": True}}, True),
}


@pytest.mark.parametrize("app", [bare, in_flask], ids=["bare", "flask"])
@pytest.mark.parametrize("options", TRANSIENT)
def test_lock_that_is_not_available_is_a_503_when_told_so(
    database_url: str, options: str, app: Any, caplog: pytest.LogCaptureFixture
) -> None:
    given, expected = TRANSIENT[options]
    wrapped = SQLASessionMiddleware(app() if app is in_flask else app, database_url, metadata=LOCKED, **given)
    with locked(wrapped):
        if app is bare and not expected:
            with pytest.raises(OperationalError):
                call(wrapped)
            return
        status, headers, body = call(wrapped, **WEB)
    assert status[:3] == ("503" if expected else "500")
    if expected:
        assert headers["Retry-After"] == "10"
        assert b"too busy" in body
        assert "The database is too busy: GET '/' is answered with 503: " in caplog.text


def test_transient_failure_is_a_503_when_the_two_middlewares_are_stacked_by_hand() -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        raise Deadlock

    inner = TransactionMiddleware(app, **REPEATED)
    wrapped = SQLASessionMiddleware(UnavailableMiddleware(inner), "sqlite://")
    assert call(wrapped)[0] == "503 Service Unavailable"


def kills_its_connection(environ: Environ, start: StartResponse) -> list[bytes]:
    """A statement that the server answers by closing the connection, each time."""
    if session().get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
    else:
        session.execute(text(f"KILL {session.scalar(text('SELECT CONNECTION_ID()'))}"))
        session.execute(text("SELECT 1"))
    start("200 OK", PLAIN)
    return [b"done"]


def send_too_much() -> str:
    """One megabyte more than the server admits."""
    most = session.scalar(text("SELECT @@max_allowed_packet"))
    session.execute(text("SELECT :text"), {"text": "x" * (most + 2**20)})
    return "done"


class Base(DeclarativeBase):
    pass


class Letter(Base):
    __tablename__ = "unavailable_letter"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    text: Mapped[str] = mapped_column(Text(2**31))


def add_too_much() -> str:
    session.add(Letter(text="x" * (session.scalar(text("SELECT @@max_allowed_packet")) + 2**20)))
    return "done"


def flush_too_much() -> str:
    """The ROLLBACK of the flush finds that the connection is closed, and its error takes the place of the first."""
    add_too_much()
    session.flush()
    return "done"


def make_a_mistake() -> str:
    """The connection dies between the application's mistake and the ROLLBACK."""
    number = session.scalar(text(BACKEND[session().get_bind().dialect.name]))
    try:
        session.execute(text("no SQL"))
    finally:
        with application.engine.connect() as other:
            other.execute(text(f"{END[other.dialect.name]}({number})"))
    return "done"


BACKEND = {"postgresql": "SELECT pg_backend_pid()", "mariadb": "SELECT CONNECTION_ID()"}
END = {"postgresql": "SELECT pg_terminate_backend", "mariadb": "KILL "}


def test_request_that_the_database_can_never_take_is_no_503(server_url: str, caplog: pytest.LogCaptureFixture) -> None:
    wrapped = SQLASessionMiddleware(kills_its_connection, server_url, transaction=REPEATED, unavailable=True)
    with pytest.raises(DBAPIError):
        call(wrapped)
    wrapped.dispose()
    assert "GET '/' has lost its connection in each attempt, and the database answers others" in caplog.text


@pytest.mark.parametrize("number", [1, 2])
def test_answer_is_503_when_an_attempt_before_was_not_lost(server_url: str, number: int) -> None:
    """A busy database that goes away and comes back: nothing says that it cannot take the request."""

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        if environ["sqlasession.attempt"] == number:
            raise Deadlock
        return kills_its_connection(environ, start)

    wrapped = SQLASessionMiddleware(app, server_url, transaction={**REPEATED, "attempts": 3}, unavailable=True)
    assert call(wrapped)[0] == "503 Service Unavailable"
    wrapped.dispose()


def flask_with(view: Any) -> Flask:
    flask = Flask("unavailable")
    flask.add_url_rule("/", view_func=view)

    @flask.teardown_appcontext
    def remove(error: BaseException | None) -> None:
        with suppress(DBAPIError):
            session.remove()

    return flask


def test_packet_that_is_too_large_is_no_503() -> None:
    """MariaDB says so, and closes the connection: the client sees the one or the other."""
    url = DATABASES_SEEN.url("mariadb", "")
    wrapped = SQLASessionMiddleware(flask_with(send_too_much), url, transaction=REPEATED, unavailable=True)
    assert call(wrapped, **WEB)[0] == "500 INTERNAL SERVER ERROR"
    wrapped.dispose()


@pytest.mark.parametrize("send", [send_too_much, add_too_much, flush_too_much])
def test_packet_that_is_too_large_is_the_applications_exception(send: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        start("200 OK", PLAIN)
        return [send().encode()]

    url = DATABASES_SEEN.url("mariadb", "")
    wrapped = SQLASessionMiddleware(app, url, metadata=Base.metadata, transaction=REPEATED, unavailable=True)
    wrapped.init_database()
    try:
        with pytest.raises(OperationalError):
            call(wrapped)
    finally:
        wrapped.drop_database()
        wrapped.dispose()


@pytest.mark.parametrize("transaction", [False, True, REPEATED], ids=["", "transaction", "attempts"])
def test_mistake_is_no_503_when_the_connection_is_lost_before_the_rollback(server_url: str, transaction: Any) -> None:
    wrapped = SQLASessionMiddleware(flask_with(make_a_mistake), server_url, transaction=transaction, unavailable=True)
    assert call(wrapped, **WEB)[0] == "500 INTERNAL SERVER ERROR"
    wrapped.dispose()


def test_answer_is_503_when_the_database_is_away_after_the_last_attempt(server_url: str) -> None:
    wrapped = SQLASessionMiddleware(kills_its_connection, server_url, transaction=REPEATED, unavailable=True)
    connects: list[int] = []

    @event.listens_for(wrapped.engine, "do_connect")
    def refuse(*arguments: Any) -> None:
        connects.append(1)
        if len(connects) > 2:  # One for each attempt.
            raise OSError("refused")

    assert call(wrapped)[0] == "503 Service Unavailable"
    assert len(connects) == 3
    wrapped.dispose()


def test_answer_is_503_when_a_single_attempt_loses_its_connection(server_url: str) -> None:
    """It may have been a restart: nobody knows."""
    wrapped = SQLASessionMiddleware(kills_its_connection, server_url, unavailable=True)
    assert call(wrapped)[0] == "503 Service Unavailable"
    wrapped.dispose()
