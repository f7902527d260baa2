"""TransactionMiddleware: its options, doom(), what is repeated and what never is, and what a repetition finds."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import (
    Column,
    Engine,
    Integer,
    MetaData,
    NullPool,
    String,
    Table,
    create_engine,
    event,
    func,
    insert,
    select,
    text,
)
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.orm.exc import StaleDataError

from sqlasession_middleware import SQLASessionMiddleware, application, doom, local, session
from sqlasession_middleware.errors import ConfigurationError, ScopeError, TransactionAborted
from sqlasession_middleware.transaction import TransactionMiddleware, default_commit_veto

from .drivers import under_another_name
from .wsgi import Environ, StartResponse, assert_given_back, consume, environ

NO_WAIT = {"backoff_base": 0}
tables = MetaData()
ITEMS = Table("transaction_item", tables, Column("id", Integer, primary_key=True), Column("name", String(40)))
PLAIN = [("Content-Type", "text/plain")]
FLASK = {"SERVER_NAME": "localhost", "SERVER_PORT": "80", "wsgi.url_scheme": "http"}


class Deadlock(Exception):  # noqa: N818
    """What a driver raises when the database wants the transaction to be repeated."""

    sqlstate = "40001"


Deadlock.__module__ = "psycopg.errors"


def add(name: str = "one") -> None:
    session.execute(insert(ITEMS).values(name=name))


def answer(start: StartResponse, status: str = "200 OK", body: bytes = b"done") -> list[bytes]:
    start(status, PLAIN)
    return [body]


@pytest.fixture
def make(database_url: str) -> Iterator[Callable[..., SQLASessionMiddleware]]:
    """Makes applications on one database after the other, whose tables are empty."""
    made: list[SQLASessionMiddleware] = []

    def make(app: Any, transaction: Any = True, **options: Any) -> SQLASessionMiddleware:
        wrapped = SQLASessionMiddleware(app, database_url, metadata=tables, transaction=transaction, **options)
        if not made:
            wrapped.drop_database()
            wrapped.init_database()
        made.append(wrapped)
        return wrapped

    yield make
    for each in made[:1]:
        each.drop_database()
    for each in made:
        each.dispose()


@pytest.fixture
def make_sqlite(sqlite_url: str) -> Iterator[Callable[..., SQLASessionMiddleware]]:
    """The same on SQLite alone, for what does not depend on the database."""
    made: list[SQLASessionMiddleware] = []

    def make(app: Any, transaction: Any = True, **options: Any) -> SQLASessionMiddleware:
        wrapped = SQLASessionMiddleware(app, sqlite_url, metadata=tables, transaction=transaction, **options)
        wrapped.init_database()
        made.append(wrapped)
        return wrapped

    yield make
    for each in made:
        each.dispose()


def names(app: SQLASessionMiddleware) -> list[str]:
    """What the database holds, asked on a connection of its own."""
    with app.engine.connect() as connection:
        return list(connection.scalars(select(ITEMS.c.name).order_by(ITEMS.c.id)))


def call(app: SQLASessionMiddleware, **more: Any) -> tuple[str, bytes]:
    """The status and the body that a server is given."""
    heads: list[str] = []
    body = consume(app(environ(**more), lambda status, headers, exc_info=None: heads.append(status) or heads.append))
    assert_given_back(app.engine)
    return heads[-1], body


# -- what is committed


@pytest.mark.parametrize(
    ("status", "headers", "committed"),
    [
        ("200 OK", [], True),
        ("302 Found", [], True),
        ("404 Not Found", [], False),
        ("500 Internal Server Error", [], False),
        ("404 Not Found", [("X-Tm", "commit")], True),
        ("404 Not Found", [("x-tm", " Commit ")], True),
        ("200 OK", [("X-TM", "abort")], False),
        ("200 OK", [("X-Tm", "")], False),
    ],
)
def test_status_and_header_decide_when_nothing_else_is_said(
    make: Any, status: str, headers: list[tuple[str, str]], committed: bool
) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        add()
        start(status, headers)
        return [b"done"]

    wrapped = make(app)
    assert call(wrapped) == (status, b"done")
    assert names(wrapped) == ["one"] * committed
    assert default_commit_veto({}, status, headers) is not committed


def never(environ: Environ, status: str, headers: list[tuple[str, str]]) -> bool:
    """A veto by its dotted name."""
    return True


@pytest.mark.parametrize(
    ("veto", "status", "committed"),
    [
        (None, "500 Internal Server Error", True),
        (never, "200 OK", False),
        (f"{__name__}:never", "200 OK", False),
        (lambda environ, status, headers: environ["PATH_INFO"] == "/", "200 OK", False),
        (lambda environ, status, headers: dict(headers)["Content-Type"] != "text/plain", "200 OK", True),
    ],
)
def test_veto_is_the_users_when_one_is_given(make_sqlite: Any, veto: Any, status: str, committed: bool) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        add()
        return answer(start, status)

    wrapped = make_sqlite(app, {"commit_veto": veto})
    call(wrapped)
    assert names(wrapped) == ["one"] * committed


def test_nothing_is_stored_when_the_veto_raises(make_sqlite: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        add()
        return answer(start)

    wrapped = make_sqlite(app, {"commit_veto": lambda environ, status, headers: 1 / 0})
    with pytest.raises(ZeroDivisionError):
        call(wrapped)
    assert names(wrapped) == []


@pytest.mark.parametrize("activate", [lambda environ: environ["PATH_INFO"] != "/", f"{__name__}:is_active"])
def test_request_has_no_transaction_when_it_is_not_active(make_sqlite: Any, activate: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        add()
        if environ["PATH_INFO"] == "/":
            with pytest.raises(ScopeError, match=r"doom\(\) needs a transaction"):
                doom()
        return answer(start)

    wrapped = make_sqlite(app, {"activate": activate})
    call(wrapped)
    assert names(wrapped) == []
    call(wrapped, PATH_INFO="/shop")
    assert names(wrapped) == ["one"]


def is_active(environ: Environ) -> bool:
    """An ``activate`` by its dotted name."""
    return environ["PATH_INFO"] != "/"


def test_success_is_rolled_back_when_it_is_doomed(make: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        add()
        doom()
        add("two")
        return answer(start)

    wrapped = make(app)
    assert call(wrapped) == ("200 OK", b"done")
    assert names(wrapped) == []


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["call", "first step", "later step"])
def test_nothing_is_stored_when_the_application_fails(make: Any, error: type[BaseException], place: str) -> None:
    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        start("200 OK", PLAIN)
        add()
        if place == "call":
            raise error
        return steps()

    def steps() -> Iterator[bytes]:
        if place == "later step":
            yield b"x"
        raise error

    wrapped = make(app)
    with pytest.raises(error):
        call(wrapped)
    assert_given_back(wrapped.engine)
    assert names(wrapped) == []


def test_application_may_commit_roll_back_and_use_savepoints_itself(make: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        add("rolled back")
        session.rollback()
        add("committed")
        session.commit()
        add("kept")
        with session.begin_nested() as savepoint:
            add("in a savepoint")
            savepoint.rollback()
        return answer(start)

    wrapped = make(app)
    call(wrapped)
    assert names(wrapped) == ["committed", "kept"]


def test_teardown_of_a_framework_may_remove_the_session(make: Any) -> None:
    flask_app = Flask("shop")
    flask_app.teardown_appcontext(lambda error: session.remove())

    @flask_app.route("/<status>")
    def view(status: str) -> Any:
        session.remove()  # There is nothing in it yet.
        first = session()
        add(status)
        session.remove()
        assert session() is first
        return "done", status

    wrapped = make(flask_app.wsgi_app)
    assert call(wrapped, PATH_INFO="/200", **FLASK)[0] == "200 OK"
    assert call(wrapped, PATH_INFO="/404", **FLASK)[0] == "404 NOT FOUND"
    assert names(wrapped) == ["200"]


def test_transaction_is_joined_when_the_middleware_is_met_again(make_sqlite: Any) -> None:
    def inner(environ: Environ, start: StartResponse) -> list[bytes]:
        add("inner")
        return answer(start)

    def outer(environ: Environ, start: StartResponse) -> list[bytes]:
        body = TransactionMiddleware(inner)(environ, lambda status, headers, exc_info=None: None)
        assert names(wrapped) == []
        add("outer")
        start("200 OK", PLAIN)
        return [*body]

    wrapped = make_sqlite(outer)
    call(wrapped)
    assert names(wrapped) == ["inner", "outer"]


def test_rows_are_there_when_the_server_is_told_of_the_success(make: Any) -> None:
    seen: list[list[str]] = []

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        add()
        start("200 OK", PLAIN)
        assert seen == []
        return [b"done"]

    wrapped = make(app)
    consume(wrapped(environ(), lambda status, headers, exc_info=None: seen.append(names(wrapped)) or seen.append))
    assert seen == [["one"]]


def test_nothing_is_opened_when_the_session_is_not_used(make_sqlite: Any) -> None:
    wrapped = make_sqlite(lambda environ, start: answer(start))
    event.listen(wrapped.engine, "checkout", lambda *arguments: pytest.fail("a connection was taken"))
    assert call(wrapped) == ("200 OK", b"done")


def test_error_says_what_to_do_when_there_is_no_scope() -> None:
    wrapped = TransactionMiddleware(lambda environ, start: answer(start))
    with pytest.raises(ScopeError, match="put it inside of a SQLASessionMiddleware"):
        wrapped(environ(), lambda status, headers, exc_info=None: None)
    with pytest.raises(ScopeError):
        doom()


# -- the protocol


def test_second_head_replaces_the_first_when_it_has_exc_info(make_sqlite: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        write = start("200 OK", [("Content-Length", "100")])
        write(b"of the first")
        try:
            raise ValueError
        except ValueError as error:
            write = start("500 Internal Server Error", [("Content-Length", "3")], (type(error), error, None))
        write(b"of ")
        return [b"the second"]

    assert call(make_sqlite(app)) == ("500 Internal Server Error", b"of the second")


def test_second_head_is_an_error_when_it_has_no_exc_info(make_sqlite: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        start("200 OK", PLAIN)
        return answer(start)

    with pytest.raises(AssertionError, match="a second time without exc_info"):
        call(make_sqlite(app))


@pytest.mark.parametrize("raises", [True, False])
def test_servers_word_holds_when_a_second_head_comes_too_late(make_sqlite: Any, raises: bool) -> None:
    seen: list[str] = []

    def app(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        start("200 OK", PLAIN)
        yield b"x"
        yield b"y"
        try:
            raise ValueError("late")
        except ValueError as error:
            start("500 Internal Server Error", PLAIN, (type(error), error, error.__traceback__))

    def start_once(status: str, headers: Any, exc_info: Any = None) -> Callable[[bytes], object]:
        seen.append(status)
        if raises and exc_info is not None:
            raise exc_info[1]
        return lambda data: None

    with pytest.raises(ValueError, match="late") if raises else nullcontext():
        consume(make_sqlite(app)(environ(), start_once))
    assert seen == ["200 OK", "500 Internal Server Error"]


@pytest.mark.parametrize("body", [[b"x"], [], iter([b"x"])], ids=["list", "empty", "iterator"])
def test_nothing_is_stored_when_no_head_was_sent(make_sqlite: Any, body: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> Any:
        add()
        return body

    wrapped = make_sqlite(app)
    with pytest.raises(AssertionError, match=r"it has not called start_response\(\)"):
        call(wrapped)
    assert names(wrapped) == []


class Body:
    """An iterator that can be closed, and says when it was."""

    def __init__(self, *chunks: bytes, failing: bool = False) -> None:
        self.chunks = iter(chunks)
        self.closed = 0
        self.failing = failing

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self.chunks)

    def close(self) -> None:
        self.closed += 1
        if self.failing:
            raise ValueError("close")


@pytest.mark.parametrize(
    ("chunks", "headers", "held"),
    [
        ((b"", b"a", b"b"), [], [b"a", b"b"]),
        ((b"a", b"b"), [("Content-Length", "2")], [b"a", b"b"]),
        ((b"ab",), [("content-length", "2")], [b"ab"]),
        ((b"a", b"b", b"", b"surplus", b"more"), [("Content-Length", "2")], [b"a", b"b", b"surplus", b"more"]),
        ((b"ab", b"surplus"), [("Content-Length", "2")], [b"ab", b"surplus"]),
        ((b"ab",), [("Content-Length", "many")], [b"ab"]),
        ((), [("Content-Length", "0")], []),
    ],
)
def test_chunks_arrive_as_they_are_and_the_body_is_closed_once(
    make_sqlite: Any, chunks: tuple[bytes, ...], headers: list[tuple[str, str]], held: list[bytes]
) -> None:
    body = Body(*chunks)

    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        add()
        start("200 OK", headers)
        return body

    wrapped = make_sqlite(app)
    result = wrapped(environ(), lambda status, headers, exc_info=None: None)
    assert [chunk for chunk in result if chunk] == held
    assert names(wrapped) == ["one"]
    assert body.closed == 0
    result.close()
    result.close()
    assert body.closed == 1


@pytest.mark.parametrize(
    ("method", "status"), [("HEAD", "200 OK"), ("GET", "204 No Content"), ("GET", "304 Not Modified")]
)
def test_commit_comes_first_when_the_response_has_no_body(make_sqlite: Any, method: str, status: str) -> None:
    def app(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        add()
        start(status, [])
        yield b"dropped by the server"
        add("later")

    wrapped = make_sqlite(app)
    seen: list[list[str]] = []
    result = wrapped(environ(method), lambda status, headers, exc_info=None: seen.append(names(wrapped)))
    assert seen == [["one", "later"]]
    assert consume(result) == b"dropped by the server"


def test_writes_arrive_when_the_application_uses_write(make_sqlite: Any) -> None:
    received: list[bytes] = []

    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        write = start("200 OK", environ["headers"])
        add()
        for chunk in (b"a", b"b", b"c"):
            write(chunk)
        return environ["body"]

    def start(status: str, headers: Any, exc_info: Any = None) -> Callable[[bytes], object]:
        return received.append

    wrapped = make_sqlite(app)
    for headers in ([], [("Content-Length", "3")], [("Content-Length", "4")]):
        for body in ([], [b"d"], iter([b"d"])):
            received.clear()
            result = wrapped(environ(headers=headers, body=body), start)
            given = b"".join(received)
            assert given in (b"ab", b"abc")
            rest = consume(result)
            assert given + rest in (b"abc", b"abcd")
    assert len(names(wrapped)) == 9


def test_body_is_closed_when_its_first_step_fails(make_sqlite: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Body):
        def __next__(self) -> bytes:
            raise KeyError("step")

    body = Failing(failing=True)

    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        start("200 OK", PLAIN)
        return body

    with pytest.raises(KeyError, match="step"):
        call(make_sqlite(app))
    assert body.closed == 1
    assert "could not be closed" in caplog.text


def test_server_sends_the_file_itself_when_it_made_its_wrapper(make_sqlite: Any) -> None:
    class Wrapper:
        def __init__(self, file: Any) -> None:
            self.file = file

    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        add()
        start("200 OK", PLAIN)
        return environ["wsgi.file_wrapper"](io.BytesIO(b"x"))

    wrapped = make_sqlite(app)
    for wrapper in (Wrapper, lambda file: file):
        result = wrapped(environ(**{"wsgi.file_wrapper": wrapper}), lambda status, headers, exc_info=None: None)
        assert isinstance(result, Wrapper | io.BytesIO)
    assert names(wrapped) == ["one", "one"]


# -- attempts


def test_attempt_is_repeated_until_it_succeeds(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    attempts: list[int] = []

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        attempts.append(environ["sqlasession.attempt"])
        add(str(attempts[-1]))
        if len(attempts) < 3:
            raise Deadlock("serialize")
        return answer(start)

    wrapped = make(app, {"attempts": 4, **NO_WAIT})
    with caplog.at_level(logging.WARNING):
        assert call(wrapped) == ("200 OK", b"done")
    assert attempts == [1, 2, 3]
    assert names(wrapped) == ["3"]
    assert [(record.getMessage()[:18], record.exc_info[0]) for record in caplog.records if record.exc_info] == [
        ("Attempt 1 of 4 at ", Deadlock),
        ("Attempt 2 of 4 at ", Deadlock),
    ]


def test_error_is_the_last_attempts_when_all_fail(make_sqlite: Any) -> None:
    count = 0

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        nonlocal count
        count += 1
        raise Deadlock(count)

    with pytest.raises(Deadlock, match="3"):
        call(make_sqlite(app, {"attempts": 3, **NO_WAIT}))


@pytest.mark.parametrize("attempts", [1, 3])
@pytest.mark.parametrize(
    ("error", "retry_on", "again"),
    [
        (Deadlock("x"), (), True),
        (StaleDataError("x"), (), True),
        (ValueError("x"), (), False),
        (ValueError("x"), ValueError, True),
        (ValueError("x"), [KeyError, "builtins:ValueError"], True),
        (KeyError("x"), "builtins:LookupError", True),
        (SystemExit(), (), False),
    ],
)
def test_only_what_may_succeed_is_repeated(
    make_sqlite: Any, error: BaseException, retry_on: Any, again: bool, attempts: int
) -> None:
    numbers: list[int] = []

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        numbers.append(environ["sqlasession.attempt"])
        raise error

    with pytest.raises(type(error)):
        call(make_sqlite(app, {"attempts": attempts, "retry_on": retry_on, **NO_WAIT}))
    assert numbers == (list(range(1, attempts + 1)) if again else [1])


def test_repetition_finds_what_the_first_attempt_found(make_sqlite: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        assert "left" not in environ
        assert not hasattr(local, "left")
        assert environ["PATH_INFO"] == "/"
        body = environ["wsgi.input"].read()
        environ["wsgi.input"].close()
        environ.update(left=1, PATH_INFO="/other")
        local.left = 1
        if environ["sqlasession.attempt"] < 3:
            raise Deadlock
        assert application._get_current_object() is wrapped
        return answer(start, body=body)

    class Stream:
        """A socket's file: it can be read once."""

        def __init__(self, body: bytes) -> None:
            self.body = io.BytesIO(body)

        def read(self, size: int = -1) -> bytes:
            return self.body.read(size)

        def readline(self, size: int = -1) -> bytes:
            return self.body.readline(size)

    wrapped = make_sqlite(app, {"attempts": 3, **NO_WAIT})
    for body in (b"short", b"x" * 100_000):
        for length in ({"CONTENT_LENGTH": str(len(body))}, {"wsgi.input_terminated": True}):
            request = environ("POST", **{"wsgi.input": Stream(body), **length})
            assert consume(wrapped(request, lambda status, headers, exc_info=None: None)) == body
    seekable = environ("POST", **{"wsgi.input": io.BytesIO(b"seekable"), "CONTENT_LENGTH": "8"})
    assert consume(wrapped(seekable, lambda status, headers, exc_info=None: None)) == b"seekable"


def test_body_can_be_read_line_by_line_when_it_is_kept(make_sqlite: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        return answer(start, body=b"|".join(environ["wsgi.input"]))

    wrapped = make_sqlite(app, {"attempts": 2})
    request = environ("POST", **{"wsgi.input": io.BytesIO(b"a\nb\n"), "CONTENT_LENGTH": "4"})
    assert consume(wrapped(request, lambda status, headers, exc_info=None: None)) == b"a\n|b\n"


def commit_by_itself() -> None:
    session.commit()


def commit_in_a_context() -> None:
    with application.context():
        add("in a context")
        session.commit()


def commit_in_another_application() -> None:
    def inner(environ: Environ, start: StartResponse) -> list[bytes]:
        session.execute(select(1))
        session.commit()
        return answer(start)

    other = SQLASessionMiddleware(inner, "sqlite://", transaction=True)
    consume(other(environ(), lambda status, headers, exc_info=None: None))
    other.dispose()


def commit_of_a_session_of_its_own() -> None:
    with application.new_session() as own:
        own.execute(select(1))
        own.commit()


def commit_on_the_side() -> None:
    with application.engine.begin() as connection:
        connection.execute(select(1))


def write_in_autocommit() -> None:
    with application.engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").execute(select(1))


@pytest.mark.parametrize(
    "commits",
    [
        commit_by_itself,
        commit_in_a_context,
        commit_in_another_application,
        commit_of_a_session_of_its_own,
        commit_on_the_side,
        write_in_autocommit,
    ],
)
def test_nothing_is_repeated_when_the_application_has_committed_something(
    make_sqlite: Any, commits: Callable[[], None]
) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        assert environ["sqlasession.attempt"] == 1
        add("of the application")
        if commits is not commit_by_itself:
            session.rollback()
        commits()
        raise Deadlock

    with pytest.raises(Deadlock):
        call(make_sqlite(app, {"attempts": 3, **NO_WAIT}))


def test_release_of_a_savepoint_is_no_commit(make: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        with session.begin_nested():
            add(str(environ["sqlasession.attempt"]))
        if environ["sqlasession.attempt"] == 1:
            raise Deadlock
        return answer(start)

    wrapped = make(app, {"attempts": 2, **NO_WAIT})
    assert call(wrapped) == ("200 OK", b"done")
    assert names(wrapped) == ["2"]


def test_nothing_is_repeated_when_the_application_has_committed_in_two_phases(server_url: str) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        assert environ["sqlasession.attempt"] == 1
        add()
        session.commit()
        raise Deadlock

    wrapped = SQLASessionMiddleware(
        app, server_url, metadata=tables, transaction={"attempts": 2}, session_options={"twophase": True}
    )
    if wrapped.engine.dialect.name == "postgresql":
        pytest.skip("PostgreSQL's max_prepared_transactions is 0 unless it is set")
    wrapped.drop_database()
    wrapped.init_database()
    try:
        with pytest.raises(Deadlock):
            call(wrapped)
        assert names(wrapped) == ["one"]
    finally:
        wrapped.drop_database()
        wrapped.dispose()


@pytest.mark.parametrize("options", [{}, {"engine_options": {"connect_args": {"autocommit": True}}}])
def test_nothing_is_repeated_when_the_driver_was_told_to_commit_each_statement(server_url: str, options: Any) -> None:
    numbers: list[int] = []

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        numbers.append(environ["sqlasession.attempt"])
        session.execute(select(1))
        raise Deadlock

    wrapped = SQLASessionMiddleware(app, server_url, transaction={"attempts": 2, **NO_WAIT}, **options)
    with pytest.raises(Deadlock):
        call(wrapped)
    assert numbers == ([1] if options else [1, 2])
    wrapped.dispose()


def test_nothing_is_repeated_when_one_of_two_engines_may_be_committed(tmp_path: Any) -> None:
    engines = [create_engine(f"sqlite:///{tmp_path}/{name}.db") for name in ("one", "two")]

    class Both(Session):
        def get_bind(self, mapper: Any = None, *, clause: Any = None, **more: Any) -> Any:
            return engines[more.get("number", 0)]

    numbers: list[int] = []

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        numbers.append(environ["sqlasession.attempt"])
        for number in range(2):
            session.execute(insert(ITEMS).values(name="x"), bind_arguments={"number": number})
        return answer(start)

    for engine in engines:
        tables.create_all(engine)
        event.listen(engine, "commit", lambda connection: (_ for _ in ()).throw(Deadlock()))
    wrapped = SQLASessionMiddleware(
        app, engines[0], transaction={"attempts": 3, **NO_WAIT}, session_options={"class_": Both}
    )
    with pytest.raises(Deadlock):
        call(wrapped)
    assert numbers == [1]
    for engine in engines:
        engine.dispose()


def test_commits_are_counted_once_when_two_applications_share_an_engine(sqlite_engine: Engine) -> None:
    tables.create_all(sqlite_engine)
    numbers: list[int] = []

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        numbers.append(environ["sqlasession.attempt"])
        add()
        if len(numbers) % 2:
            raise Deadlock
        return answer(start)

    for _ in range(2):
        wrapped = SQLASessionMiddleware(
            app, sqlite_engine, metadata=tables, transaction={"attempts": 2, **NO_WAIT}, unavailable=True
        )
        call(wrapped)
    assert numbers == [1, 2, 1, 2]
    assert names(wrapped) == ["one", "one"]


def test_nothing_is_repeated_when_the_engine_is_in_autocommit(make_sqlite: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        assert environ["sqlasession.attempt"] == 1
        add()
        raise Deadlock

    wrapped = make_sqlite(app, {"attempts": 3}, engine_options={"isolation_level": "AUTOCOMMIT"})
    with pytest.raises(Deadlock):
        call(wrapped)
    assert names(wrapped) == ["one"]


def test_nothing_is_repeated_when_something_was_released(make_sqlite: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        start("200 OK", PLAIN)
        assert environ["sqlasession.attempt"] == 1
        add()
        yield b"x"
        raise Deadlock

    wrapped = make_sqlite(app, {"attempts": 3})
    with pytest.raises(Deadlock):
        call(wrapped)
    assert names(wrapped) == []


@pytest.mark.parametrize("where", ["call", "first step", "write"])
def test_repetition_is_invisible_when_nothing_was_released(make_sqlite: Any, where: str) -> None:
    closed: list[int] = []

    class Steps:
        def __init__(self, number: int) -> None:
            self.number = number

        def __iter__(self) -> Iterator[bytes]:
            if self.number < 3:
                raise Deadlock
            yield b"done"

        def close(self) -> None:
            closed.append(self.number)

    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        number = environ["sqlasession.attempt"]
        write = start("200 OK", PLAIN)
        if where == "write":
            write(b"done")
        if number < 3 and where != "first step":
            raise Deadlock
        return [] if where == "write" else Steps(number)

    wrapped = make_sqlite(app, {"attempts": 3, **NO_WAIT})
    heads: list[str] = []
    result = wrapped(environ(), lambda status, headers, exc_info=None: heads.append(status) or heads.append)
    assert consume(result) == b"done"
    assert heads == ["200 OK"]
    assert closed == {"call": [3], "first step": [1, 2, 3], "write": []}[where]


def raise_in_the_database() -> None:
    """A transient failure that the engine's event sees: SQLite's BUSY."""
    other = create_engine(application.engine.url)
    try:
        with other.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            session.execute(text("PRAGMA busy_timeout = 0"))
            add("busy")
    finally:
        other.dispose()


@pytest.mark.parametrize("status", ["500 Internal Server Error", "200 OK"])
def test_framework_is_seen_through_when_it_answers_500(make_sqlite: Any, status: str) -> None:
    numbers: list[int] = []

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        numbers.append(environ["sqlasession.attempt"])
        if numbers[-1] == 1:
            try:
                raise_in_the_database()
            except OperationalError:
                return answer(start, status, b"swallowed")
        return answer(start)

    body = call(make_sqlite(app, {"attempts": 3, **NO_WAIT}))
    if status.startswith("500"):
        assert (body, numbers) == (("200 OK", b"done"), [1, 2])
    else:  # The application knows how to go on: nothing is to be repeated.
        assert (body, numbers) == (("200 OK", b"swallowed"), [1])


def test_page_is_the_frameworks_when_the_last_attempt_fails_too(make_sqlite: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        try:
            raise_in_the_database()
        except OperationalError:
            session.rollback()
            return answer(start, "500 Internal Server Error", b"%d" % environ["sqlasession.attempt"])

    wrapped = make_sqlite(app, {"attempts": 2, **NO_WAIT})
    assert call(wrapped) == ("500 Internal Server Error", b"2")
    assert names(wrapped) == []


def test_commit_is_repeated_when_the_database_says_that_it_did_not_take_place(make_sqlite: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        session.execute(text("PRAGMA busy_timeout = 0"))
        if environ["sqlasession.attempt"] == 2:
            reader.rollback()
        add(str(environ["sqlasession.attempt"]))
        return answer(start)

    wrapped = make_sqlite(app, {"attempts": 3, **NO_WAIT})
    other = create_engine(wrapped.engine.url)
    with other.connect() as reader:
        # A reader keeps SQLite's COMMIT from taking place.
        reader.exec_driver_sql("BEGIN")
        reader.execute(select(func.count(ITEMS.c.id))).all()
        assert call(wrapped) == ("200 OK", b"done")
    other.dispose()
    assert names(wrapped) == ["2"]


def test_stale_data_is_seen_through_when_a_framework_answers_500(make_sqlite: Any) -> None:
    class Versioned(DeclarativeBase):
        pass

    class Thing(Versioned):
        __tablename__ = "transaction_thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        version = mapped_column(Integer, nullable=False)
        name: Mapped[str]
        __mapper_args__ = {"version_id_col": version}  # noqa: RUF012

    numbers: list[int] = []

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        numbers.append(environ["sqlasession.attempt"])
        thing = session.get_one(Thing, 1)
        if len(numbers) == 1:
            session.execute(text("UPDATE transaction_thing SET version = 9"))
        thing.name = "new"
        try:
            session.flush()
        except StaleDataError:
            return answer(start, "500 Internal Server Error")
        return answer(start)

    wrapped = make_sqlite(app, {"attempts": 2, **NO_WAIT})
    Versioned.metadata.create_all(wrapped.engine)
    with wrapped.context():
        session.add(Thing(id=1, name="old"))
        session.commit()
    assert call(wrapped) == ("200 OK", b"done")
    assert numbers == [1, 2]


def test_waits_grow_and_have_a_cap(make_sqlite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        add()
        raise Deadlock

    wrapped = make_sqlite(app, {"attempts": 6, "backoff_base": 0.1, "backoff_cap": 0.5})
    monkeypatch.setattr("time.sleep", lambda seconds: (waits.append(seconds), assert_given_back(wrapped.engine)))
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    with pytest.raises(Deadlock):
        call(wrapped)
    assert waits == [0.1, 0.2, 0.4, 0.5, 0.5]


# -- failures at the end


def test_session_is_given_up_when_it_cannot_be_rolled_back(make_sqlite: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Session):
        def rollback(self) -> None:
            raise ValueError("rollback")

        def close(self) -> None:
            super().close()
            raise ValueError("close")

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        add()
        raise KeyError("application")

    wrapped = make_sqlite(app, session_options={"class_": Broken})
    with pytest.raises(KeyError, match="application"):
        call(wrapped)
    assert_given_back(wrapped.engine)
    assert "could not be rolled back" in caplog.text


@pytest.mark.parametrize("own", [False, True], ids=["the middleware's commit", "the application's commit"])
@pytest.mark.parametrize("kindred", [False, True], ids=["", "dialect of another name"])
def test_aborted_transaction_is_an_error_when_the_application_swallowed_its_cause(
    server_url: str, own: bool, kindred: bool
) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        session.execute(insert(ITEMS).values(id=1, name="first"))
        with pytest.raises(IntegrityError):
            session.execute(insert(ITEMS).values(id=1, name="again"))
        if own:
            session.commit()
        return answer(start)

    url = under_another_name(server_url) if kindred else server_url
    wrapped = SQLASessionMiddleware(app, url, metadata=tables, transaction=True)
    wrapped.drop_database()
    wrapped.init_database()
    try:
        if server_url.startswith("postgresql"):
            with pytest.raises(TransactionAborted, match="aborted it after an error"):
                call(wrapped)
            assert names(wrapped) == []
        else:  # Elsewhere an error undoes its own statement and nothing else.
            call(wrapped)
            assert names(wrapped) == ["first"]
    finally:
        wrapped.drop_database()
        wrapped.dispose()


@pytest.mark.parametrize("kindred", [False, True], ids=["", "dialect of another name"])
def test_deadlock_that_was_swallowed_means_another_attempt(server_url: str, kindred: bool) -> None:
    """MariaDB has rolled back what came before it: to commit what comes after it would be a lie."""
    numbers: list[int] = []
    begun, locked = threading.Event(), threading.Event()

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        numbers.append(environ["sqlasession.attempt"])
        add("before")
        if numbers == [1]:
            session.execute(text("UPDATE transaction_item SET name = 'mine' WHERE id = 1001"))
            begun.set()
            assert locked.wait(30)
            try:
                session.execute(text("UPDATE transaction_item SET name = 'mine' WHERE id = 1002"))
            except OperationalError:
                pass
            else:
                session.rollback()
                raise Deadlock
        add("after")
        return answer(start)

    def rival() -> None:
        # It has done more than the application, so that MariaDB does not choose it as the victim. PostgreSQL may.
        with create_engine(server_url, poolclass=NullPool).connect() as connection, suppress(OperationalError):
            connection.execute(insert(ITEMS), [{"name": "rival"} for _ in range(200)])
            connection.execute(text("UPDATE transaction_item SET name = 'theirs' WHERE id = 1002"))
            assert begun.wait(30)
            locked.set()
            connection.execute(text("UPDATE transaction_item SET name = 'theirs' WHERE id = 1001"))
            connection.commit()

    url = under_another_name(server_url) if kindred else server_url
    wrapped = SQLASessionMiddleware(app, url, metadata=tables, transaction={"attempts": 2, **NO_WAIT})
    wrapped.drop_database()
    wrapped.init_database()
    try:
        with wrapped.engine.begin() as connection:
            connection.execute(insert(ITEMS), [{"id": 1001, "name": "x"}, {"id": 1002, "name": "y"}])
        thread = threading.Thread(target=rival)
        thread.start()
        assert call(wrapped) == ("200 OK", b"done")
        thread.join()
        assert numbers == [1, 2]
        kept = [name for name in names(wrapped) if name in ("before", "after")]
        assert kept == ["before", "after"]
    finally:
        wrapped.drop_database()
        wrapped.dispose()


def test_waiting_stream_is_rolled_back_at_once_when_its_status_is_vetoed(make_sqlite: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        add()
        start("404 Not Found", PLAIN)
        yield b"x"
        assert application.engine.pool.checkedout() == 0
        add("later")
        yield b"y"

    wrapped = make_sqlite(app)
    call(wrapped)
    assert names(wrapped) == []


@pytest.mark.parametrize("watchdog", [TimeoutError, LookupError])
def test_outcome_is_unknown_when_a_commit_was_cut_short(
    make_sqlite: Any, monkeypatch: pytest.MonkeyPatch, watchdog: type[Exception]
) -> None:
    """A worker's timeout raises wherever the code is at that moment, and here it is in the driver's COMMIT."""

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        add()
        return answer(start)

    wrapped = make_sqlite(app, {"attempts": 3, "retry_on": watchdog, **NO_WAIT})

    def do_commit(connection: Any) -> None:
        raise watchdog("the worker's")

    monkeypatch.setattr(wrapped.engine.dialect, "do_commit", do_commit)
    status, body = call(wrapped)
    assert status == "500 Internal Server Error"
    assert b"not known whether your change was saved" in body


def test_outcome_stays_unknown_when_something_else_fails_afterwards(
    make_sqlite: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lost(Exception):  # noqa: N818
        """What a driver raises when the connection goes away during COMMIT."""

        sqlstate = "08006"

    Lost.__module__ = "psycopg.errors"

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        add()
        try:
            session.commit()
        except Exception:
            session.rollback()
            options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0}
            other = SQLASessionMiddleware(app, "sqlite://", engine_options=options).engine
            with suppress(Exception), other.connect():
                other.connect()
            other.dispose()
            return answer(start, "500 Internal Server Error")
        raise AssertionError

    wrapped = make_sqlite(app, {"attempts": 3, **NO_WAIT}, unavailable=True)

    def do_commit(connection: Any) -> None:
        raise Lost

    monkeypatch.setattr(wrapped.engine.dialect, "do_commit", do_commit)
    monkeypatch.setattr(wrapped.engine.dialect.loaded_dbapi, "Error", Exception)
    monkeypatch.setattr(wrapped.engine.dialect, "is_disconnect", lambda *arguments: True)
    status, body = call(wrapped)
    assert status == "500 Internal Server Error"
    assert b"not known whether your change was saved" in body


def test_failure_that_was_handled_is_not_the_cause_of_a_later_error(make_sqlite: Any) -> None:
    numbers: list[int] = []

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        numbers.append(environ["sqlasession.attempt"])
        with pytest.raises(OperationalError):
            raise_in_the_database()
        session.rollback()
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        call(make_sqlite(app, {"attempts": 3, **NO_WAIT}, unavailable=True))
    assert numbers == [1]


def test_request_whose_body_nobody_can_repeat_is_tried_once(make_sqlite: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        assert environ["wsgi.input"].read() == b"chunks"
        raise Deadlock

    request = environ("POST", **{"wsgi.input": io.BytesIO(b"chunks"), "HTTP_TRANSFER_ENCODING": "chunked"})
    with pytest.raises(Deadlock):
        make_sqlite(app, {"attempts": 3, **NO_WAIT})(request, lambda status, headers, exc_info=None: None)


def test_nothing_is_repeated_when_the_server_refuses_the_head(make_sqlite: Any) -> None:
    calls: list[str] = []

    def start(status: str, headers: Any, exc_info: Any = None) -> Any:
        calls.append(status)
        raise Deadlock

    wrapped = make_sqlite(lambda environ, start: answer(start), {"attempts": 3, **NO_WAIT})
    with pytest.raises(Deadlock):
        wrapped(environ(), start)
    assert calls == ["200 OK"]


def test_line_of_the_log_is_one_whatever_the_path_holds(make_sqlite: Any, caplog: pytest.LogCaptureFixture) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        raise Deadlock("x\nforged")

    with pytest.raises(Deadlock):
        call(make_sqlite(app, {"attempts": 2, **NO_WAIT}), PATH_INFO="/x\nERROR:root:forged")
    (record,) = caplog.records
    assert "\n" not in record.getMessage()


# -- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attempts": 0}, r"^transaction\['attempts'\] must be a whole number from 1, got 0\."),
        ({"attempts": True}, "must be a whole number from 1, got True"),
        ({"attempts": "3"}, "must be a whole number from 1, got '3'"),
        ({"backoff_base": -1}, r"\['backoff_base'\] must be a number of seconds from 0, got -1"),
        ({"backoff_cap": float("inf")}, r"\['backoff_cap'\] must be a number of seconds"),
        ({"backoff_cap": "1"}, r"\['backoff_cap'\] must be a number of seconds"),
        ({"commit_veto": 3}, r"\['commit_veto'\] must be callable, or the dotted name"),
        ({"commit_veto": "no.such:thing"}, r"\['commit_veto'\] must be the dotted name .* got 'no.such:thing'"),
        ({"activate": 3}, r"\['activate'\] must be callable"),
        ({"commit_failed": 3}, r"\['commit_failed'\] must be callable"),
        ({"retry_on": 3}, r"\['retry_on'\] must be"),
        ({"retry_on": int}, r"\['retry_on'\] must be exception classes or their dotted names"),
        ({"retry_on": [KeyboardInterrupt]}, r"\['retry_on'\] must be exception classes"),
        ({"atempts": 3}, r"\['atempts'\] is not an option; did you mean 'attempts'\?"),
        ("yes", r"^transaction must be true, false or a dict of options, got str\."),
        (None, r"^transaction must be true, false or a dict of options, got NoneType\."),
    ],
)
def test_error_names_the_option_when_it_is_wrong(sqlite_url: str, options: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SQLASessionMiddleware(lambda environ, start: answer(start), sqlite_url, transaction=options)


def test_error_says_app_when_that_is_none() -> None:
    with pytest.raises(ConfigurationError, match="app must be a WSGI application"):
        TransactionMiddleware("app")  # type: ignore[arg-type]


def test_engines_tell_once_when_several_requests_come_at_once(make_sqlite: Any) -> None:
    wrapped = make_sqlite(lambda environ, start: answer(start), {"attempts": 2})
    barrier = threading.Barrier(8)

    def request() -> None:
        barrier.wait(10)
        call(wrapped)

    threads = [threading.Thread(target=request) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    listeners = list(wrapped.engine.dialect.dispatch.handle_error)
    assert len(listeners) == len(set(listeners)) == 2  # one that is called first, and one that is called last


def test_several_applications_share_one_transaction_middleware(tmp_path: Any) -> None:
    """As one factory's pipeline may have it: each application's engines are watched."""

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        add(environ["name"])
        return answer(start)

    shared = TransactionMiddleware(app)
    engines: list[Engine] = []
    for name in ("red", "blue"):
        wrapped = SQLASessionMiddleware(shared, f"sqlite:///{tmp_path}/{name}.db", metadata=tables)
        wrapped.init_database()
        call(wrapped, name=name)
        assert names(wrapped) == [name]
        engines.append(wrapped.engine)
        wrapped.dispose()
    assert engines[0] is not engines[1]
