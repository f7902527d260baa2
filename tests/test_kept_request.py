"""The body of a request that may be repeated: how much of it is kept, and that the application gets all of it."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from wsgiref.validate import InputWrapper

import bottle
import falcon
import flask
import pytest
import webob
import webob.dec
from django.core.handlers.wsgi import WSGIHandler, WSGIRequest
from django.http import HttpResponse
from django.urls import path
from pyramid.config import Configurator
from pyramid.response import Response as PyramidResponse
from webtest import TestApp as WebTestApp
from werkzeug.exceptions import ClientDisconnected
from werkzeug.wrappers import Request, Response

from sqlasession_middleware import SQLASessionMiddleware

from .framework_apps import FRAMEWORKS
from .wsgi import Environ, StartResponse, consume, environ

MEMORY, MAXIMUM = 10, 100
OPTIONS = {"attempts": 2, "backoff_base": 0, "replay_body_memory": MEMORY, "replay_body_max": MAXIMUM}
TERMINATED = {"wsgi.input_terminated": True}
CHUNKED = {"HTTP_TRANSFER_ENCODING": "chunked"}


class AgainError(Exception):
    """What the first attempt ends with."""


class Stream:
    """A server's stream: it can be read once, and counts what was read.

    :param error: what it ends with.
    :param at_once: how many bytes a call of read() returns at most. A socket hands out what is there, which may be less
        than was asked for; not all frameworks know that.
    """

    def __init__(self, body: bytes, error: Exception | None = None, at_once: int = 33) -> None:
        self.body = io.BytesIO(body)
        self.error = error
        self.at_once = at_once

    def _or_error(self, read: bytes) -> bytes:
        if not read and self.error is not None:
            raise self.error
        return read

    def read(self, size: int = -1) -> bytes:
        return self._or_error(self.body.read(min(size, self.at_once) if size > 0 else size))

    def readline(self, size: int = -1) -> bytes:
        return self._or_error(self.body.readline(size))

    def readlines(self, hint: int = -1) -> list[bytes]:
        return self.body.readlines(hint)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")


def body_of(size: int) -> bytes:
    """Lines of seven bytes, the last one without its end."""
    return (b"abcdef\n" * size)[:size]


class Case(NamedTuple):
    """A request's body, what the server says of it, and what becomes of it.

    :param read_first: how many bytes are read before the application is called.
    :param error: ends the stream.
    """

    size: int
    said: dict[str, Any]
    is_repeated: bool
    read_first: int
    error: Exception | None = None


LEFT = ConnectionResetError("the client has left")
CASES = {
    "there is no body": Case(0, {}, True, 0),
    "its length is empty": Case(0, {"CONTENT_LENGTH": ""}, True, 0),
    "its length is 0": Case(0, {"CONTENT_LENGTH": "0"}, True, 0),
    "it fits into memory": Case(MEMORY, {"CONTENT_LENGTH": "10"}, True, 10),
    "it needs a file": Case(MEMORY + 1, {"CONTENT_LENGTH": "11"}, True, 11),
    "it is as long as it may be": Case(MAXIMUM, {"CONTENT_LENGTH": "100"}, True, 100),
    "it is longer": Case(MAXIMUM + 1, {"CONTENT_LENGTH": "101"}, False, 0),
    "it is chunked and empty": Case(0, TERMINATED | CHUNKED, True, 0),
    "it is chunked": Case(50, TERMINATED | CHUNKED, True, 50),
    "it is chunked and as long as it may be": Case(MAXIMUM, TERMINATED | CHUNKED, True, 100),
    "it is chunked and longer": Case(1000, TERMINATED | CHUNKED, False, 101),
    "it is chunked and nobody tells its end": Case(50, CHUNKED, False, 0),
    "it is chunked and has a length and nobody tells its end": Case(50, CHUNKED | {"CONTENT_LENGTH": "10"}, False, 0),
    "it ends and is longer than was said": Case(50, TERMINATED | {"CONTENT_LENGTH": "10"}, True, 50),
    "it ends and is shorter than was said": Case(50, TERMINATED | {"CONTENT_LENGTH": "80"}, True, 50),
    "it ends and was said to be too long": Case(50, TERMINATED | {"CONTENT_LENGTH": "200"}, False, 0),
    "it ends and was said to be short": Case(1000, TERMINATED | {"CONTENT_LENGTH": "10"}, False, 101),
    "the client leaves": Case(50, {"CONTENT_LENGTH": "80"}, False, 50),
    "the client leaves with an error": Case(50, {"CONTENT_LENGTH": "80"}, False, 50, LEFT),
    "the client leaves in a chunk": Case(50, TERMINATED, False, 50, LEFT),
    **{
        f"its length is {length!r}": Case(50, {"CONTENT_LENGTH": length}, False, 0)
        for length in ("ten", "-50", "5_0", "٥٠", "1" * 5000)
    },
}


def read_all(stream: Any) -> bytes:
    return bytes(stream.read())


def read_in_parts(stream: Any) -> bytes:
    return b"".join(iter(lambda: stream.read(7), b""))


def read_lines(stream: Any) -> bytes:
    return b"".join(iter(lambda: stream.readline(5), b""))


def read_long_lines(stream: Any) -> bytes:
    return b"".join(iter(stream.readline, b""))


def read_lists(stream: Any) -> bytes:
    return b"".join(b"".join(lines) for lines in iter(lambda: stream.readlines(20), []))


def read_all_lines(stream: Any) -> bytes:
    return b"".join(stream.readlines())


WAYS: list[Callable[[Any], bytes]] = [read_all, read_in_parts, read_lines, read_long_lines, read_lists, read_all_lines]


@pytest.fixture
def make() -> Iterator[Callable[..., SQLASessionMiddleware]]:
    made: list[SQLASessionMiddleware] = []

    def make(app: Any, **options: Any) -> SQLASessionMiddleware:
        settings = {**OPTIONS, "retry_on": AgainError, **options}
        made.append(SQLASessionMiddleware(app, "sqlite://", transaction=settings))
        return made[-1]

    yield make
    for app in made:
        app.dispose()


@pytest.mark.parametrize("read", WAYS, ids=lambda read: read.__name__)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_application_gets_the_whole_body_in_each_attempt_when(make, case: Case, read: Callable[[Any], bytes]) -> None:
    body = body_of(case.size)
    stream = Stream(body, case.error)
    attempts: list[int] = []

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        if not attempts:
            assert stream.body.tell() == case.read_first
        attempts.append(environ["sqlasession.attempt"])
        assert environ["sqlasession.body_replayable"] is case.is_repeated
        if case.error is None:
            got = read(environ["wsgi.input"])
        else:
            got = environ["wsgi.input"].read(case.size)
            with pytest.raises(ConnectionResetError):
                read(environ["wsgi.input"])
        environ["wsgi.input"].close() if case.is_repeated and case.size else None
        assert got == body
        raise AgainError

    request = environ("POST", **case.said, **{"wsgi.input": stream})
    with pytest.raises(AgainError):
        consume(make(app)(request, lambda status, headers, exc_info=None: None))
    assert attempts == ([1, 2] if case.is_repeated else [1])


@pytest.mark.parametrize(
    ("memory", "size", "files"), [(10, 10, 0), (10, 11, 1), (0, 1, 1), (100, 100, 0)]
)  # fmt: skip
def test_file_is_used_when_the_body_does_not_fit_into_memory(
    make, memory: int, size: int, files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    temporary_file = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **options: opened.append(1) or temporary_file(**options))

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        assert len(environ["wsgi.input"].read()) == size
        start("200 OK", [])
        return []

    request = environ("POST", **{"CONTENT_LENGTH": str(size), "wsgi.input": Stream(body_of(size))})
    consume(make(app, replay_body_memory=memory)(request, lambda status, headers, exc_info=None: None))
    assert len(opened) == files


def test_body_of_a_kilobyte_is_kept_when_nothing_is_set(make) -> None:
    """And one of eleven megabytes is not: the defaults."""
    seen: list[bool] = []

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        seen.append(environ["sqlasession.body_replayable"])
        start("200 OK", [])
        return []

    wrapped = SQLASessionMiddleware(app, "sqlite://", transaction={"attempts": 2})
    for size in (1024, 11 * 1024 * 1024):
        request = environ("POST", **{"CONTENT_LENGTH": str(size), "wsgi.input": Stream(b"x" * size)})
        consume(wrapped(request, lambda status, headers, exc_info=None: None))
    wrapped.dispose()
    assert seen == [True, False]


def test_reading_is_over_when_it_is_killed(make) -> None:
    """A file that was begun is closed: otherwise a ResourceWarning would be an error."""

    class Killed(Stream):
        def read(self, size: int = -1) -> bytes:
            if self.body.tell():
                raise GeneratorExit
            return super().read(size)

    request = environ("POST", **{"CONTENT_LENGTH": "90", "wsgi.input": Killed(body_of(90))})
    with pytest.raises(GeneratorExit):
        make(lambda environ, start: [])(request, lambda status, headers, exc_info=None: None)


# -- frameworks


def seen(environ: Environ, body: bytes) -> bytes:
    """What a view has seen; the first attempt of two fails."""
    if environ.get("sqlasession.attempt") == 1 and environ.get("sqlasession.body_replayable"):
        raise AgainError
    return b"%d bytes" % len(body) if body == body_of(len(body)) else b"others"


def bare(app_environ: Environ, start: StartResponse) -> Iterable[bytes]:
    body = seen(app_environ, app_environ["wsgi.input"].read())
    start("200 OK", [("Content-Type", "text/plain")])
    return [body]


@webob.dec.wsgify
def of_webob(request: webob.Request) -> webob.Response:
    return webob.Response(seen(request.environ, request.body))


@Request.application
def of_werkzeug(request: Request) -> Response:
    return Response(seen(request.environ, request.get_data()))


def of_flask() -> Any:
    app = flask.Flask("bodies")
    app.config["PROPAGATE_EXCEPTIONS"] = True
    app.add_url_rule("/", view_func=lambda: seen(flask.request.environ, flask.request.get_data()), methods=["POST"])
    return app


def of_pyramid() -> Any:
    config = Configurator()
    config.add_route("any", "/")
    config.add_view(lambda request: PyramidResponse(seen(request.environ, request.body)), route_name="any")
    return config.make_wsgi_app()


class Resource:
    def on_post(self, request: Any, response: Any) -> None:
        response.data = seen(request.env, request.bounded_stream.read())


def of_falcon() -> Any:
    def raise_again(request: Any, response: Any, error: Exception, parameters: Any) -> None:
        raise error

    app = falcon.App()
    app.add_route("/", Resource())
    app.add_error_handler(AgainError, raise_again)
    return app


def of_bottle() -> Any:
    app = bottle.Bottle()
    app.config["catchall"] = False
    app.post("/", callback=lambda: seen(bottle.request.environ, bottle.request.body.read()))
    return app


def of_django() -> Any:
    FRAMEWORKS["django"](True)  # It configures Django.

    class Mine(WSGIRequest):
        urlconf = (path("", lambda request: HttpResponse(seen(request.environ, request.body))),)

    handler = WSGIHandler()
    handler.request_class = Mine
    return handler


READERS: dict[str, Callable[[], Any]] = {
    "wsgi": lambda: bare, "webob": lambda: of_webob, "werkzeug": lambda: of_werkzeug, "flask": of_flask,
    "pyramid": of_pyramid, "falcon": of_falcon, "bottle": of_bottle, "django": of_django,
}  # fmt: skip


def answer(app: Any, size: int, said: dict[str, Any]) -> bytes:
    base = {"SERVER_NAME": "localhost", "SERVER_PORT": "80", "wsgi.url_scheme": "http", "SCRIPT_NAME": ""}
    stream = Stream(body_of(size), at_once=10_000)
    request = environ("POST", **base, **said, **{"wsgi.input": stream, "wsgi.errors": io.StringIO()})
    return consume(app(request, lambda status, headers, exc_info=None: None))


@pytest.mark.parametrize("size", [MAXIMUM, MAXIMUM + 1, 5000])
@pytest.mark.parametrize("reader", READERS)
def test_framework_reads_the_whole_body_when_it_is_kept_or_not(make, reader: str, size: int) -> None:
    said = {"CONTENT_LENGTH": str(size)}
    assert answer(make(READERS[reader]()), size, said) == b"%d bytes" % size


@pytest.mark.parametrize("size", [MAXIMUM, MAXIMUM + 1, 5000])
@pytest.mark.parametrize("reader", READERS)
def test_framework_reads_what_it_reads_without_us_when_the_body_has_no_length(make, reader: str, size: int) -> None:
    """Some read nothing without a length. Where the body is kept there is one."""
    without = answer(READERS[reader](), size, TERMINATED)
    assert answer(make(READERS[reader]()), size, TERMINATED) in {without, b"%d bytes" % MAXIMUM}


@pytest.mark.parametrize("form", ["application/x-www-form-urlencoded", "multipart/form-data"])
@pytest.mark.parametrize("attempts", [1, 2])
def test_form_is_read_when_something_inside_wraps_the_input(make, attempts: int, form: str) -> None:
    """As validators do, and whoever counts bytes: such an input cannot be rewound."""

    def wrapping(app: Any) -> Any:
        def wrapped(environ: Environ, start: StartResponse) -> Any:
            environ["wsgi.input"] = InputWrapper(environ["wsgi.input"])
            return app(environ, start)

        return wrapped

    @webob.dec.wsgify
    def show(request: webob.Request) -> webob.Response:
        return webob.Response(request.POST["name"])

    app = make(wrapping(show), attempts=attempts)
    uploads = [("file", "x.txt", b"x")] if "multipart" in form else None
    assert WebTestApp(app, lint=False).post("/", {"name": "Ada"}, upload_files=uploads).text == "Ada"


@pytest.mark.parametrize("attempts", [1, 2])
def test_upload_is_refused_unread_when_it_is_longer_than_the_application_wants(make, attempts: int) -> None:
    class Unread(Stream):
        def read(self, size: int = -1) -> bytes:
            raise AssertionError("It was read.")

    app = flask.Flask("uploads")
    app.config["MAX_CONTENT_LENGTH"] = 1000
    app.post("/")(lambda: flask.request.form)
    request = {"CONTENT_LENGTH": str(200 * 1024 * 1024), "CONTENT_TYPE": "application/x-www-form-urlencoded"}
    base = {"SERVER_NAME": "localhost", "SERVER_PORT": "80", "wsgi.url_scheme": "http"}
    statuses: list[str] = []
    consume(
        make(app, attempts=attempts)(
            environ("POST", **base, **request, **{"wsgi.input": Unread(b"")}),
            lambda status, headers, exc_info=None: statuses.append(status),
        )
    )
    assert statuses == ["413 REQUEST ENTITY TOO LARGE"]


@pytest.mark.parametrize("attempts", [1, 2])
def test_framework_sees_that_the_client_has_left_when_the_body_is_short(make, attempts: int) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        with pytest.raises(ClientDisconnected):
            Request(environ).get_data()
        start("400 Bad Request", [])
        return []

    request = environ("POST", **{"CONTENT_LENGTH": "80", "wsgi.input": Stream(body_of(50))})
    consume(make(app, attempts=attempts)(request, lambda status, headers, exc_info=None: None))
