"""One small guest book, written in each framework the way its own documentation does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import bottle
import django
import django.urls
import falcon
import flask
import webob.dec
import webob.static
import werkzeug.routing
import werkzeug.wsgi
from django.conf import settings
from django.core.handlers.wsgi import WSGIHandler
from django.http import FileResponse, HttpResponse, StreamingHttpResponse
from pyramid.config import Configurator
from pyramid.response import FileResponse as PyramidFileResponse
from pyramid.response import Response as PyramidResponse
from sqlalchemy import String, literal, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from werkzeug.exceptions import InternalServerError
from werkzeug.wrappers import Request, Response

from sqlasession_middleware import application, local, session

#: What ``/file`` sends.
FILE = Path(__file__)
#: The applications that ``application`` referred to, one for each access.
seen: list[Any] = []


class Base(DeclarativeBase):
    pass


class Guest(Base):
    # Other test runs may share the database servers.
    __tablename__ = f"framework_guests_{uuid4().hex[:8]}"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(40))


class BrokenError(Exception):
    """The error that the views raise."""


def names() -> str:
    seen.append(application._get_current_object())
    return " ".join(session.scalars(select(Guest.name).order_by(Guest.id)))


def write() -> str:
    session.add(Guest(name="Ada"))
    session.commit()
    return names()


def forget() -> str:
    session.add(Guest(name="Nobody"))
    return names()


def fail() -> str:
    raise BrokenError(forget())


def stream() -> Iterator[bytes]:
    local.title = "Guests"
    local.opened = session()
    session.add(Guest(name="Nobody"))
    return steps()


def broken_stream() -> Iterator[bytes]:
    yield from stream()
    raise BrokenError("the stream")


def steps() -> Iterator[bytes]:
    for number in range(3):
        assert session() is local.opened
        seen.append(application._get_current_object())
        yield f"{local.title} {session.scalar(select(literal(number)))}\n".encode()


TEXTS: dict[str, Callable[[], str]] = {"/names": names, "/write": write, "/forget": forget, "/fail": fail}
STREAMS: dict[str, Callable[[], Iterator[bytes]]] = {"/stream": stream, "/broken-stream": broken_stream}
# And /empty, a 204, and /file.


def bare(propagate: bool) -> Any:
    def serve(environ: Any, start_response: Any) -> Any:
        path = environ["PATH_INFO"]
        status, headers, body = "200 OK", [("Content-Type", "text/plain")], [b""]
        try:
            if path in TEXTS:
                body = [TEXTS[path]().encode()]
            elif path in STREAMS:
                body = STREAMS[path]()
            elif path == "/empty":
                forget()
                status, headers, body = "204 No Content", [], []
            else:
                forget()
                body = environ.get("wsgi.file_wrapper", werkzeug.wsgi.FileWrapper)(FILE.open("rb"))
        except BrokenError:
            if propagate:
                raise
            status = "500 Internal Server Error"
        start_response(status, headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else body

    return serve


def of_werkzeug(propagate: bool) -> Any:
    rules = werkzeug.routing.Map(
        [werkzeug.routing.Rule(path, endpoint=path) for path in (*TEXTS, *STREAMS, "/empty", "/file")]
    )

    def respond(request: Request, path: str) -> Response:
        if path in TEXTS:
            return Response(TEXTS[path]())
        if path in STREAMS:
            return Response(STREAMS[path](), mimetype="text/plain")
        forget()
        if path == "/empty":
            return Response(status=204)
        return Response(werkzeug.wsgi.wrap_file(request.environ, FILE.open("rb")), direct_passthrough=True)

    @Request.application
    def serve(request: Request) -> Any:
        path, _ = rules.bind_to_environ(request.environ).match()
        try:
            return respond(request, path)
        except BrokenError:
            if propagate:
                raise
            return InternalServerError()

    return serve


def of_webob(propagate: bool) -> Any:
    @webob.dec.wsgify
    def serve(request: webob.Request) -> Any:
        if request.path_info in TEXTS:
            try:
                return TEXTS[request.path_info]()
            except BrokenError:
                if propagate:
                    raise
                raise webob.exc.HTTPInternalServerError from None
        if request.path_info in STREAMS:
            return webob.Response(app_iter=STREAMS[request.path_info](), content_type="text/plain")
        forget()
        return webob.Response(status=204) if request.path_info == "/empty" else webob.static.FileApp(str(FILE))

    return serve


def of_flask(propagate: bool) -> Any:
    app = flask.Flask("guests")
    app.config["PROPAGATE_EXCEPTIONS"] = propagate

    @app.get("/empty")
    def empty() -> Any:
        forget()
        return "", 204

    @app.get("/file")
    def file() -> Any:
        forget()
        return flask.send_file(FILE)

    def streaming(view: Callable[[], Iterator[bytes]]) -> Any:
        return lambda: app.response_class(flask.stream_with_context(view()), mimetype="text/plain")

    for path, view in TEXTS.items():
        app.add_url_rule(path, path, view, methods=["GET", "POST"])
    for path, view in STREAMS.items():
        app.add_url_rule(path, path, streaming(view))
    return app


def of_pyramid(propagate: bool) -> Any:
    def answer(request: Any) -> Any:
        if request.path_info in TEXTS:
            return PyramidResponse(TEXTS[request.path_info]())
        if request.path_info in STREAMS:
            return PyramidResponse(app_iter=STREAMS[request.path_info](), content_type="text/plain")
        forget()
        return request.response if request.path_info == "/empty" else PyramidFileResponse(FILE, request=request)

    def empty(request: Any) -> Any:
        forget()
        request.response.status_int = 204
        return request.response

    config = Configurator()
    config.add_route("empty", "/empty")
    config.add_view(empty, route_name="empty")
    config.add_route("any", "/{path}")
    config.add_view(answer, route_name="any")
    if not propagate:
        config.add_exception_view(lambda error, request: PyramidResponse("sorry", status=500), context=BrokenError)
    return config.make_wsgi_app()


class FalconResource:
    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        response.content_type = falcon.MEDIA_TEXT
        if request.path in TEXTS:
            response.text = TEXTS[request.path]()
        elif request.path in STREAMS:
            response.stream = STREAMS[request.path]()
        else:
            forget()
            if request.path == "/empty":
                response.status = falcon.HTTP_204
            else:
                response.set_stream(FILE.open("rb"), FILE.stat().st_size)

    on_head = on_post = on_get


def of_falcon(propagate: bool) -> Any:
    def raise_again(request: Any, response: Any, error: Exception, parameters: Any) -> None:
        raise error

    app = falcon.App()
    for path in (*TEXTS, *STREAMS, "/empty", "/file"):
        app.add_route(path, FalconResource())
    if propagate:
        app.add_error_handler(Exception, raise_again)
    return app


def of_bottle(propagate: bool) -> Any:
    app = bottle.Bottle()
    app.config["catchall"] = not propagate

    @app.get("/empty")
    def empty() -> Any:
        forget()
        return bottle.HTTPResponse(status=204)

    @app.get("/file")
    def file() -> Any:
        forget()
        return bottle.static_file(FILE.name, root=str(FILE.parent))

    for path, view in {**TEXTS, **STREAMS}.items():
        app.route(path, ["GET", "POST"], view)
    return app


def django_view(request: Any) -> Any:
    if request.path_info in TEXTS:
        return HttpResponse(TEXTS[request.path_info]())
    if request.path_info in STREAMS:
        return StreamingHttpResponse(STREAMS[request.path_info](), content_type="text/plain")
    forget()
    return HttpResponse(status=204) if request.path_info == "/empty" else FileResponse(FILE.open("rb"))


urlpatterns = [django.urls.path("<path:path>", lambda request, path: django_view(request))]


def of_django(propagate: bool) -> Any:
    # Django's settings apply to the whole process. Its own database layer is not used.
    if not settings.configured:
        settings.configure(ALLOWED_HOSTS=["*"], SECRET_KEY="x", LOGGING_CONFIG=None, MIDDLEWARE=[], USE_TZ=True)
        django.setup()
    settings.ROOT_URLCONF = __name__
    settings.DEBUG_PROPAGATE_EXCEPTIONS = propagate
    return WSGIHandler()


#: Each takes ``propagate``: whether an error of a view leaves the framework, or becomes its error page.
FRAMEWORKS: dict[str, Callable[[bool], Any]] = {
    "wsgi": bare,
    "werkzeug": of_werkzeug,
    "webob": of_webob,
    "flask": of_flask,
    "pyramid": of_pyramid,
    "falcon": of_falcon,
    "bottle": of_bottle,
    "django": of_django,
}
