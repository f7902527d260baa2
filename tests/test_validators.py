"""Validators of the protocol on either side of the middleware, and what else a server may ask of its result."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextvars import Context
from io import BytesIO
from typing import Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest
from sqlalchemy import text
from werkzeug.middleware.lint import LintMiddleware
from werkzeug.wsgi import ClosingIterator

from sqlasession_middleware import SQLASessionMiddleware, local, session

Wsgi = Callable[..., Any]

TEXT = [("Content-Type", "text/plain")]


def select(value: str) -> bytes:
    """The value, by way of the database."""
    return session.scalar(text("SELECT :value"), {"value": value}).encode()


class Chunks:
    """A body that is its own iterator and has a ``close()``."""

    def __init__(self) -> None:
        self.left = ["a", "b", "c"]
        self.closed = 0

    def __iter__(self) -> Chunks:
        return self

    def __next__(self) -> bytes:
        if not self.left:
            raise StopIteration
        return select(self.left.pop(0))

    def close(self) -> None:
        self.closed += 1
        assert select("closing") == b"closing"


class SizedChunks:
    """A body with a length that is no list: its iterator is the application's own code."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[bytes]:
        return (select(value) for value in "abc")


class ListOfChunks(list[bytes]):
    """A list, and with an iterator of its own."""

    def __iter__(self) -> Iterator[bytes]:
        return (select(chunk.decode()) for chunk in super().__iter__())


def returning(make: Callable[[], Any], status: str = "200 OK", headers: Any = TEXT) -> Wsgi:
    def app(environ: Any, start_response: Any) -> Any:
        session.execute(text("SELECT 1"))
        start_response(status, list(headers))
        return make()

    return app


def chunks() -> Iterator[bytes]:
    for value in "abc":
        yield select(value)


def generator(environ: Any, start_response: Any) -> Iterator[bytes]:
    """The whole application is a generator: it answers at its first step."""
    start_response("200 OK", list(TEXT))
    yield from chunks()


def writer(environ: Any, start_response: Any) -> Any:
    write = start_response("200 OK", list(TEXT))
    write(select("a"))
    write(select("b"))
    return [select("c")]


def corrector(environ: Any, start_response: Any) -> Any:
    """Replaces a head that was not sent yet, as error handlers do."""
    start_response("200 OK", list(TEXT))
    try:
        raise ValueError(select("changed its mind"))
    except ValueError as error:
        start_response("500 Internal Server Error", list(TEXT), (ValueError, error, error.__traceback__))
    return chunks()


#: method, application, status, body
BODIES: dict[str, tuple[str, Wsgi, str, bytes]] = {
    "list": ("GET", returning(lambda: [b"a", b"b", b"c"]), "200", b"abc"),
    "tuple": ("GET", returning(lambda: (b"a", b"b", b"c")), "200", b"abc"),
    "list of a class of its own": ("GET", returning(lambda: ListOfChunks([b"a", b"b", b"c"])), "200", b"abc"),
    "sized": ("GET", returning(SizedChunks), "200", b"abc"),
    "generator": ("GET", returning(chunks), "200", b"abc"),
    "application that is a generator": ("GET", generator, "200", b"abc"),
    "iterator with close": ("GET", returning(Chunks), "200", b"abc"),
    "write": ("GET", writer, "200", b"abc"),
    "corrected head": ("GET", corrector, "500", b"abc"),
    "empty list": ("GET", returning(list), "200", b""),
    "empty generator": ("GET", returning(lambda: (chunk for chunk in ())), "200", b""),
    "HEAD": ("HEAD", returning(list), "200", b""),
    "HEAD that sends a body": ("HEAD", returning(chunks), "200", b"abc"),
    # Werkzeug's lint wants the length, whatever RFC 9110 says.
    "204": ("GET", returning(list, "204 No Content", [("Content-Length", "0")]), "204", b""),
    "304": ("GET", returning(list, "304 Not Modified", [("ETag", '"x"')]), "304", b""),
}


def lint(app: Wsgi) -> Wsgi:
    def with_input(environ: Any, start_response: Any) -> Any:
        # The lint's own input lacks the readlines() of PEP 3333, which a validator inside of it asks for.
        environ["wsgi.input"] = BytesIO()
        return app(environ, start_response)

    return LintMiddleware(with_input)


def both(app: Wsgi) -> Wsgi:
    return lint(validator(app))


def neither(app: Wsgi) -> Wsgi:
    return app


#: What is around the middleware, and what is around the application inside of it.
SIDES: dict[str, tuple[Callable[[Wsgi], Wsgi], Callable[[Wsgi], Wsgi]]] = {
    "validator outside": (validator, neither),
    "validator inside": (neither, validator),
    "validator on both sides": (validator, validator),
    "lint outside": (lint, neither),
    "lint inside": (neither, lint),
    "lint on both sides": (lint, lint),
    "validator outside and lint inside": (validator, lint),
    "lint outside and validator inside": (lint, validator),
    "both on both sides": (both, both),
}


@pytest.fixture
def wrap() -> Iterator[Callable[[Wsgi], SQLASessionMiddleware]]:
    made: list[SQLASessionMiddleware] = []

    def wrap(app: Wsgi) -> SQLASessionMiddleware:
        made.append(SQLASessionMiddleware(app, "sqlite://"))
        return made[-1]

    yield wrap
    for app in made:
        assert app.engine.pool.checkedout() == 0
        app.dispose()
    assert list(local) == []


def call(app: Wsgi, method: str = "GET") -> tuple[Any, list[str], list[bytes]]:
    """Call ``app``; its result, and where its status and what it writes will be found."""
    environ: dict[str, Any] = {"QUERY_STRING": "", "REQUEST_METHOD": method}
    setup_testing_defaults(environ)
    statuses: list[str] = []
    written: list[bytes] = []

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Callable[[bytes], None]:
        statuses.append(status)
        return written.append

    return app(environ, start_response), statuses, written


@pytest.mark.parametrize("case", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("leave", [False, True], ids=["to the end", "client leaves"])
def test_validators_find_nothing_when(sides, case, leave: bool, wrap) -> None:
    outside, inside = sides
    method, app, status, expected = case
    middleware = wrap(inside(app))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result, statuses, received = call(outside(middleware), method)
        for chunk in result:
            received.append(chunk)
            if leave:
                break
        result.close()
        # The lint swallows the error if its last warning is made one, so the warnings are recorded.
        del result
    assert [str(warning.message) for warning in found] == []
    assert statuses[-1].startswith(status)
    assert b"".join(received) == expected or (leave and expected.startswith(b"".join(received)))
    assert middleware.engine.pool.checkedout() == 0


@pytest.mark.parametrize("case", BODIES.values(), ids=BODIES)
def test_result_is_a_closing_iterator_when_the_body_is(case, wrap) -> None:
    method, app, _, expected = case
    result, _, received = call(wrap(app), method)
    assert isinstance(result, ClosingIterator)
    # As an iterator, as PEP 3333 has it, and not only as an iterable.
    while (chunk := next(result, None)) is not None:
        received.append(chunk)
    result.close()
    assert b"".join(received) == expected


@pytest.mark.parametrize("case", BODIES.values(), ids=BODIES)
def test_body_finds_its_session_when_each_step_is_taken_in_an_empty_context(case, wrap) -> None:
    """As by a server that hands a response from thread to thread."""
    method, app, _, expected = case
    result, _, received = Context().run(call, wrap(app), method)
    steps = Context().run(iter, result)
    while (chunk := Context().run(next, steps, None)) is not None:
        received.append(chunk)
    Context().run(result.close)
    assert b"".join(received) == expected


@pytest.mark.parametrize(
    ("make", "length"),
    [
        (lambda: [b"a", b"b"], 2),
        (lambda: (b"a",), 1),
        (list, 0),
        (tuple, 0),
        (SizedChunks, 3),
        (lambda: ListOfChunks([b"a"]), 1),
    ],
    ids=["list", "tuple", "empty list", "empty tuple", "sized", "list of a class of its own"],
)
def test_result_has_a_length_when_the_body_has_one(make: Callable[[], Any], length: int, wrap) -> None:
    """A server takes the Content-Length from a result of length 1."""
    result, *_ = call(wrap(returning(make)))
    assert len(result) == length
    assert len(list(result)) == length
    assert len(result) == length
    result.close()
    assert len(result) == length


@pytest.mark.parametrize("make", [chunks, Chunks, lambda: iter([b"a"])], ids=["generator", "iterator", "list iterator"])
def test_result_has_no_length_when_the_body_has_none(make: Callable[[], Any], wrap) -> None:
    result, *_ = call(wrap(returning(make)))
    assert not hasattr(result, "__len__")
    with pytest.raises(TypeError):
        len(result)
    result.close()


@pytest.mark.parametrize(
    "make", [lambda: [b"a", b"b"], lambda: (b"a", b"b"), list], ids=["list", "tuple", "empty list"]
)
def test_chunk_costs_nothing_when_the_body_is_a_list(make: Callable[[], Any], wrap) -> None:
    """The server steps through the list itself."""
    result, *_ = call(wrap(returning(make)))
    steps = iter(result)
    assert type(steps) is type(iter(make()))
    assert list(steps) == list(make())
    result.close()


@pytest.mark.parametrize("name", [name for name, (method, *_) in BODIES.items() if method == "GET"])
@pytest.mark.parametrize("taken", [0, 1, 9])
def test_second_close_is_harmless_when(name: str, taken: int, wrap) -> None:
    app = wrap(BODIES[name][1])
    result, *_ = call(app)
    for _, _ in zip(range(taken), result, strict=False):
        pass
    for _ in range(3):
        result.close()
        assert app.engine.pool.checkedout() == 0
        assert list(local) == []


def test_bodys_close_is_called_once_when_the_result_is_closed_twice(wrap) -> None:
    body = Chunks()
    result, *_ = call(wrap(returning(lambda: body)))
    assert body.closed == 0
    result.close()
    result.close()
    assert body.closed == 1
