"""Applications and servers that make it hard to end a scope right."""

from __future__ import annotations

import io
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from gevent import GreenletExit
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session
from werkzeug.local import Local

from sqlasession_middleware import SQLASessionMiddleware, application, local, local_manager, session
from sqlasession_middleware.errors import ScopeError
from tests.wsgi import Environ, StartResponse, assert_given_back, consume, environ, select_one
from tests.wsgi import start_response as send_nothing


def wrap(app: Callable[..., Iterable[bytes]], engine: Engine | str, **options: Any) -> SQLASessionMiddleware:
    return SQLASessionMiddleware(app, engine, **options)


def nothing(environ: Environ, start: StartResponse) -> Iterable[bytes]:
    return []


@pytest.fixture
def tenants(tmp_path) -> Iterator[dict[str, SQLASessionMiddleware]]:
    """Two applications, each with a table that holds its name."""
    apps = {name: wrap(nothing, f"sqlite:///{tmp_path}/{name}.db") for name in ("main", "red")}
    for name, app in apps.items():
        with app.engine.begin() as connection:
            connection.execute(text("CREATE TABLE who (name VARCHAR(10))"))
            connection.execute(text("INSERT INTO who VALUES (:name)"), {"name": name})
    yield apps
    for app in apps.values():
        assert app.engine.pool.checkedout() == 0
        app.dispose()


def who() -> bytes:
    return b"+".join(name.encode() for name in session.scalars(text("SELECT name FROM who ORDER BY name")))


@pytest.mark.parametrize("by", [iter, lambda result: result], ids=["iterator", "next()"])
def test_step_goes_on_in_the_context_that_the_last_one_has_left_open(tenants: Any, by: Any) -> None:
    """A report that streams over several databases: each step finds what it would find without a middleware."""

    def report(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        yield who()
        with tenants["red"].context():
            session.execute(text("INSERT INTO who VALUES ('seen')"))
            yield who()
            session.commit()
            yield who()
        yield who()

    result = wrap(report, tenants["main"].engine)(environ(), send_nothing)
    steps = by(result)
    for expected in (b"main", b"red+seen", b"red+seen", b"main"):
        assert next(steps) == expected
        assert getattr(local, "application", result._scope.owner) is result._scope.owner
    assert next(steps, None) is None
    result.close()
    assert dict(local) == {}


def test_open_context_of_a_step_is_left_when_the_client_leaves(tenants: Any) -> None:
    left: list[bytes] = []

    def report(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        with tenants["red"].context():
            try:
                yield who()
            finally:
                left.append(who())

    result = wrap(report, tenants["main"].engine)(environ(), send_nothing)
    assert next(iter(result)) == b"red"
    result.close()
    assert left == [b"red"]
    assert dict(local) == {}


def stream(environ: Environ, start: StartResponse) -> Iterator[bytes]:
    local.word = "mine"
    select_one()
    yield b"1"
    assert local.word == "mine"
    session.execute(text("CREATE TABLE t (x INTEGER)"))
    yield b"2"
    session.commit()
    yield application.app.__name__.encode()


def test_others_can_use_the_local_between_two_steps(tenants: Any) -> None:
    """A shell, or a server's thread: they have their own values, and the request keeps its."""
    app = wrap(stream, tenants["main"].engine)
    result = app(environ(), send_nothing)
    steps = iter(result)
    assert next(steps) == b"1"
    local.application = tenants["red"]
    assert who() == b"red"
    assert next(steps) == b"2"
    session.remove()
    assert next(steps) == b"stream"
    result.close()
    assert dict(local) == {"application": tenants["red"]}
    local_manager.cleanup()


def test_session_of_a_waiting_request_is_not_for_others_to_remove(tenants: Any) -> None:
    result = wrap(stream, tenants["main"].engine)(environ(), send_nothing)
    steps = iter(result)
    assert [next(steps), next(steps)] == [b"1", b"2"]
    session.remove()
    local.other = 1
    assert next(steps) == b"stream"
    result.close()
    assert dict(local) == {"other": 1}
    del local.other


def cleaned(*, after: Callable[[], Any]) -> Callable[..., Iterable[bytes]]:
    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        select_one()
        local_manager.cleanup()
        return after()

    return app


def fail() -> Any:
    raise LookupError


class File:
    """What ``wsgi.file_wrapper`` makes here."""

    def __init__(self, file: object, size: int = 8192) -> None:
        self.file = file

    def read(self, size: int = -1) -> bytes:
        return b""


@pytest.mark.parametrize(
    "after",
    [fail, lambda: [b"x"], lambda: iter([b"x"]), lambda: File(None), lambda: setattr(local, "junk", 1) or [b"x"]],
    ids=["raises", "list", "iterator", "file", "junk"],
)
@pytest.mark.parametrize("outer", ["application", "values"])
def test_caller_finds_its_local_when_the_application_has_cleaned_it_up(tenants: Any, after: Any, outer: str) -> None:
    """As the pattern of Werkzeug's documentation does, in an application that is wrapped now."""
    inner = wrap(cleaned(after=after), tenants["red"].engine)

    def call() -> None:
        try:
            result = inner(environ(**{"wsgi.file_wrapper": File}), send_nothing)
            if not isinstance(result, File):
                consume(result)
        except LookupError:
            pass

    if outer == "values":
        local.mine = 1
        call()
        assert dict(local) == {"mine": 1}
        del local.mine
    else:
        with tenants["main"].context():
            call()
            assert who() == b"main"


def test_outer_context_is_found_again_when_an_inner_one_has_cleaned_up(tenants: Any) -> None:
    with tenants["main"].context():
        with tenants["red"].context():
            local_manager.cleanup()
        assert who() == b"main"


def test_outer_context_is_found_again_when_inner_ones_are_left_in_another_order(tenants: Any) -> None:
    with tenants["main"].context():
        first, second = tenants["red"].context(), tenants["red"].context()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert who() == b"red"
        second.__exit__(None, None, None)
        assert who() == b"main"


@pytest.mark.parametrize("body", [list, iter], ids=["list", "iterator"])
def test_nothing_is_left_when_the_application_binds_itself_by_hand(tenants: Any, body: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        local_manager.cleanup()
        local.application = wrapped
        select_one()
        return body([b"x"])

    wrapped = wrap(app, tenants["main"].engine)
    assert consume(wrapped(environ(), send_nothing)) == b"x"
    assert dict(local) == {}
    assert_given_back(tenants["main"].engine)


class OnlyNext:
    """An iterator that is not iterable itself: ``iter()`` of a body may return one."""

    def __init__(self) -> None:
        self.left = 2

    def __next__(self) -> bytes:
        if not self.left:
            raise StopIteration
        self.left -= 1
        return b"x"


class Once(OnlyNext):
    """A body that may be asked for its iterator once."""

    asked = False

    def __iter__(self) -> Iterator[bytes]:
        assert not self.asked
        self.asked = True
        return self


class Hostile(Once):
    """A body that answers to no unknown name but with an error of its own."""

    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)


@pytest.mark.parametrize(
    "make", [lambda: type("Body", (), {"__iter__": lambda self: OnlyNext()})(), Once], ids=["next only", "once"]
)
@pytest.mark.parametrize("by", [iter, lambda result: result], ids=["iterator", "next()"])
def test_body_is_asked_for_its_iterator_once(sqlite_engine: Engine, make: Any, by: Any) -> None:
    result = wrap(lambda environ, start: make(), sqlite_engine)(environ(), send_nothing)
    steps = by(result)
    assert [next(steps, None) for _ in range(3)] == [b"x", b"x", None]
    result.close()


@pytest.mark.parametrize("wrapper", [None, File, lambda file: file], ids=["no wrapper", "class", "function"])
def test_session_is_removed_when_the_body_fails_to_be_looked_at(sqlite_engine: Engine, wrapper: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        select_one()
        return Hostile()

    result = wrap(app, sqlite_engine)(environ(**({"wsgi.file_wrapper": wrapper} if wrapper else {})), send_nothing)
    assert list(result) == [b"x", b"x"]
    with pytest.raises(KeyError, match="close"):
        result.close()
    assert_given_back(sqlite_engine)
    assert dict(local) == {}


def test_only_what_the_server_wrapped_is_handed_on_when_its_wrapper_is_a_function(sqlite_engine: Engine) -> None:
    """uWSGI's is one, and returns the very file. Another body with a ``read()`` keeps its scope."""
    request = environ(**{"wsgi.file_wrapper": lambda file, size=8192: file})
    wrapper, file = request["wsgi.file_wrapper"], io.BytesIO()

    class Readable(Once):
        def read(self, size: int = -1) -> bytes:
            return b""

        def __next__(self) -> bytes:
            select_one()
            return super().__next__()

    def sends(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        return environ["wsgi.file_wrapper"](file)

    wrapped = wrap(sends, sqlite_engine)
    assert wrap(wrapped, sqlite_engine)(request, send_nothing) is file
    assert request["wsgi.file_wrapper"] is wrapper
    assert consume(wrap(lambda environ, start: Readable(), sqlite_engine)(request, send_nothing)) == b"xx"


def test_other_locals_are_kept_until_the_outermost_application_ends(
    sqlite_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = Local()
    monkeypatch.setattr(local_manager, "locals", [local, others])
    app = wrap(nothing, sqlite_engine)
    with app.context():
        others.word = "kept"
        with app.context():
            pass
        consume(app(environ(), send_nothing))
        assert others.word == "kept"
    assert not hasattr(others, "word")


@pytest.mark.parametrize("body", [list, iter], ids=["list", "iterator"])
@pytest.mark.parametrize("uses_session", [False, True], ids=["no session", "session"])
def test_kill_goes_on_to_the_server_when_it_comes_as_a_local_is_released(
    sqlite_engine: Engine, monkeypatch: pytest.MonkeyPatch, uses_session: bool, body: Any
) -> None:
    class Killed:
        def __release_local__(self) -> None:
            raise GreenletExit

    monkeypatch.setattr(local_manager, "locals", [local, Killed()])
    app = wrap(lambda environ, start: body([b"x"] * (select_one() if uses_session else 1)), sqlite_engine)
    result = app(environ(), send_nothing)
    with pytest.raises(GreenletExit):
        result.close()
    assert_given_back(sqlite_engine)
    assert dict(local) == {}


def test_session_class_may_use_another_scope_in_its_constructor(tenants: Any) -> None:
    class Named(Session):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            with tenants["red"].context():
                self.info["name"] = who()

    app = wrap(lambda environ, start: [session.info["name"], who()], tenants["main"].engine)
    app = wrap(app.app, tenants["main"].engine, session_options={"class_": Named})
    assert consume(app(environ(), send_nothing)) == b"redmain"


def test_error_says_so_when_the_binding_was_deleted(sqlite_engine: Engine) -> None:
    with wrap(nothing, sqlite_engine).context():
        del local.application
        with pytest.raises(ScopeError, match=r"'local\.application' was deleted"):
            session()


def test_collector_may_drop_a_response_while_another_is_begun() -> None:
    """Python 3.11 crashes where a finalizer changes the context in which a variable is just being set."""
    program = """
        import contextvars, random
        from sqlasession_middleware import SQLASessionMiddleware
        variables = [contextvars.ContextVar(str(number)) for number in range(40)]
        for variable in variables:
            variable.set(1)
        random.seed(1)
        def app(environ, start_response):
            yield b"1"
            yield b"2"
        wrapped = SQLASessionMiddleware(app, "sqlite://")
        for _ in range(20000):
            response = wrapped({}, print)
            steps = iter(response)
            next(steps)
            cycle = [response, steps]
            cycle.append(cycle)
            del response, steps, cycle
            junk = [[] for _ in range(random.randrange(9))]
        print("survived")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False, timeout=100
    )
    assert (done.returncode, done.stdout) == (0, "survived\n"), done.stderr
