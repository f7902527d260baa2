"""repeat(): the application asks for another attempt, from wherever it notices that one would help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask
from pyramid.config import Configurator
from pyramid.response import Response

from sqlasession_middleware import SQLASessionMiddleware, repeat, session
from sqlasession_middleware.errors import ScopeError
from sqlasession_middleware.transaction import TransactionMiddleware

from .test_transaction import ITEMS, NO_WAIT, add, answer, call, tables
from .wsgi import Environ, StartResponse

ATTEMPTS = {"attempts": 3, **NO_WAIT}
WEB = {"SERVER_NAME": "localhost", "SERVER_PORT": "80", "wsgi.url_scheme": "http", "SCRIPT_NAME": ""}


class OccupiedError(Exception):
    """What a framework makes a page of."""


def in_flask(view: Callable[[], str]) -> Any:
    flask = Flask("repeat")
    flask.add_url_rule("/", view_func=view, methods=["GET"])

    @flask.errorhandler(OccupiedError)
    def handle(error: OccupiedError) -> tuple[str, int]:
        repeat(error)
        return "occupied", 409

    return flask


def in_pyramid(view: Callable[[], str]) -> Any:
    def handle(error: OccupiedError, request: Any) -> Response:
        repeat(error)
        return Response("occupied", status=409)

    with Configurator() as config:
        config.add_route("view", "/")
        config.add_view(lambda request: Response(view()), route_name="view")
        config.add_exception_view(handle, context=OccupiedError)
        return config.make_wsgi_app()


def bare(view: Callable[[], str]) -> Any:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        try:
            return answer(start, body=view().encode())
        except OccupiedError as error:
            repeat(error)
            return answer(start, "409 Conflict", b"occupied")

    return app


def as_a_success(view: Callable[[], str]) -> Any:
    """The handler makes a 200 of it."""

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        try:
            return answer(start, body=view().encode())
        except OccupiedError as error:
            repeat(error)
            return answer(start, body=b"occupied")

    return app


def raising(view: Callable[[], str]) -> Any:
    """The handler raises another error, which is not known to be repeated."""

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        try:
            return answer(start, body=view().encode())
        except OccupiedError as error:
            repeat(error)
            raise LookupError("occupied") from None

    return app


def in_the_first_step(view: Callable[[], str]) -> Any:
    """The application is a generator."""

    def app(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        try:
            text = view()
        except OccupiedError as error:
            repeat(error)
            start("409 Conflict", [])
            yield b"occupied"
        else:
            start("200 OK", [])
            yield text.encode()

    return app


SHAPES = [in_flask, in_pyramid, bare, as_a_success, raising, in_the_first_step]


@pytest.fixture
def make(sqlite_url: str) -> Iterator[Callable[..., SQLASessionMiddleware]]:
    made: list[SQLASessionMiddleware] = []

    def make(app: Any, transaction: Any = ATTEMPTS) -> SQLASessionMiddleware:
        made.append(SQLASessionMiddleware(app, sqlite_url, metadata=tables, transaction=transaction))
        made[-1].init_database()
        return made[-1]

    yield make
    for each in made:
        each.dispose()


def stored(app: SQLASessionMiddleware) -> list[str]:
    with app.engine.connect() as connection:
        return list(connection.scalars(ITEMS.select().with_only_columns(ITEMS.c.name).order_by(ITEMS.c.id)))


@pytest.mark.parametrize("shape", SHAPES)
def test_request_is_repeated_when_the_application_asks_for_it(make: Any, shape: Any, caplog: Any) -> None:
    numbers: list[int] = []

    def view() -> str:
        numbers.append(len(numbers) + 1)
        add(str(numbers[-1]))
        if len(numbers) < 3:
            raise OccupiedError(numbers[-1])
        return "done"

    app = make(shape(view))
    status, body = call(app, **WEB)
    assert (status[:3], body, numbers) == ("200", b"done", [1, 2, 3])
    assert stored(app) == ["3"]
    assert ["OccupiedError(1)" in record.getMessage() for record in caplog.records] == [True, False]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transaction", [True, {"attempts": 2, **NO_WAIT}], ids=["one attempt", "two attempts"])
def test_answer_of_the_application_stands_when_no_attempt_is_left(make: Any, shape: Any, transaction: Any) -> None:
    def view() -> str:
        add("occupied")
        raise OccupiedError

    app = make(shape(view), transaction)
    if shape is raising:
        with pytest.raises(LookupError, match="occupied"):
            call(app, **WEB)
    else:
        status, body = call(app, **WEB)
        assert (status[:3], body) == ("200" if shape is as_a_success else "409", b"occupied")
    assert stored(app) == []  # Rolled back, also as a success.


def test_nothing_is_repeated_when_the_application_has_committed(make: Any) -> None:
    called: list[int] = []

    def view() -> str:
        called.append(1)
        add("kept")
        session.commit()
        raise OccupiedError

    app = make(bare(view))
    assert call(app) == ("409 Conflict", b"occupied")
    assert (called, stored(app)) == ([1], ["kept"])


def test_nothing_is_repeated_when_something_was_released(make: Any) -> None:
    called: list[int] = []

    def app(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        called.append(1)
        start("200 OK", [])
        add("first")
        yield b"first"
        repeat(OccupiedError())
        add("second")
        yield b"second"

    wrapped = make(app)
    assert call(wrapped) == ("200 OK", b"firstsecond")
    assert (called, stored(wrapped)) == ([1], [])


def test_error_says_that_a_transaction_is_needed(make: Any) -> None:
    with (
        make(lambda environ, start: []).context(),
        pytest.raises(ScopeError, match=r"^repeat\(\) needs a transaction:"),
    ):
        repeat(OccupiedError())


@pytest.mark.parametrize("reason", [None, "busy", ValueError])
def test_error_says_that_an_exception_is_needed(make: Any, reason: Any) -> None:
    def view() -> str:
        add("kept")
        with pytest.raises(TypeError, match=r"^repeat\(\) needs the exception that is the reason, got "):
            repeat(reason)
        return "done"

    app = make(bare(view), transaction=True)
    call(app)
    assert stored(app) == ["kept"]


def test_transaction_that_is_met_again_asks_the_one_in_charge(make: Any) -> None:
    numbers: list[int] = []

    def view() -> str:
        numbers.append(1)
        if len(numbers) < 2:
            raise OccupiedError
        return "done"

    assert call(make(TransactionMiddleware(bare(view)))) == ("200 OK", b"done")
    assert len(numbers) == 2
