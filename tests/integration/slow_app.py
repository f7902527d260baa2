"""Pages of 5 MB that were made with a SELECT, by each framework, with and without a transaction.

``/plain/<kind>`` and ``/transaction/<kind>`` are such pages, ``/plain/ordinary`` and ``/transaction/ordinary`` small
ones. Run as a program, this module is a server.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import bottle
import django
import django.urls
import falcon
import flask
import webob
import webob.dec
from django.conf import settings
from django.core.handlers.wsgi import WSGIHandler
from django.http import HttpResponse
from pyramid.config import Configurator
from pyramid.response import Response as PyramidResponse
from sqlalchemy import literal, select
from werkzeug.wrappers import Request, Response

from sqlasession_middleware import SQLASessionMiddleware, session

#: ``url`` of the database.
SETTINGS: dict[str, Any] = json.loads(os.environ.get("SERVED", '{"url": "sqlite://"}'))
POOL_SIZE = 2
#: Those who do not read; together with the others they are fewer than the threads.
SLOW = 6
THREADS = 3 * SLOW
#: More than the kernel's buffers of a socket (tcp_wmem and a small receive buffer).
SIZE = 5 * 1024 * 1024


def text() -> str:
    return str(session.scalar(select(literal("x")))) * SIZE


def head(start_response: StartResponse) -> None:
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(SIZE))])


def of_list(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    body = text().encode()
    head(start_response)
    return [body]


def of_chunk(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
    head(start_response)
    yield text().encode()


def of_chunks(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
    """A beginning that the client gets at once, and the rest."""
    head(start_response)
    body = text().encode()
    yield body[:100]
    yield body[100:]


def of_werkzeug() -> Any:
    return Request.application(lambda request: Response(text()))


def of_webob() -> Any:
    return webob.dec.wsgify(lambda request: webob.Response(text(), content_type="text/plain"))


def of_flask() -> Any:
    app = flask.Flask("slow")
    app.add_url_rule("/<path:path>", "page", lambda path: text())
    return app


def of_pyramid() -> Any:
    config = Configurator()
    config.add_route("any", "/{path:.*}")
    config.add_view(lambda request: PyramidResponse(text()), route_name="any")
    return config.make_wsgi_app()


class Resource:
    def on_get(self, request: falcon.Request, response: falcon.Response, **path: str) -> None:
        response.text = text()


def of_falcon() -> Any:
    app = falcon.App()
    app.add_route("/{path}", Resource())
    return app


def of_bottle() -> Any:
    app = bottle.Bottle()
    app.route("/<path:path>", "GET", lambda path: text())
    return app


urlpatterns = [django.urls.path("<path:path>", lambda request, path: HttpResponse(text()))]


def of_django() -> Any:
    if not settings.configured:
        settings.configure(ALLOWED_HOSTS=["*"], SECRET_KEY="x", LOGGING_CONFIG=None, MIDDLEWARE=[], USE_TZ=True)
        django.setup()
    settings.ROOT_URLCONF = __name__
    return WSGIHandler()


#: Makes the application of each kind of page.
KINDS: dict[str, Callable[[], WSGIApplication]] = {
    "list": lambda: of_list,
    "chunk": lambda: of_chunk,
    "chunks": lambda: of_chunks,
    "werkzeug": of_werkzeug,
    "webob": of_webob,
    "flask": of_flask,
    "pyramid": of_pyramid,
    "falcon": of_falcon,
    "bottle": of_bottle,
    "django": of_django,
}
MODES = {"plain": False, "transaction": True}


class Pages:
    """The application in the middleware: the kind is the path."""

    def __init__(self) -> None:
        self.apps = {kind: make() for kind, make in KINDS.items()}

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        kind = environ["PATH_INFO"].strip("/")
        if kind == "ordinary":
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [str(session.scalar(select(literal("answer")))).encode()]
        return self.apps[kind](environ, start_response)


def make_app() -> WSGIApplication:
    # Whoever finds no connection in the pool fails. It is found at once, if nobody keeps one.
    options = {"pool_size": POOL_SIZE, "max_overflow": 0, "pool_timeout": 5}
    apps = {
        mode: SQLASessionMiddleware(Pages(), SETTINGS["url"], engine_options=options, transaction=transaction)
        for mode, transaction in MODES.items()
    }

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        mode, _, kind = environ["PATH_INFO"].strip("/").partition("/")
        if mode == "held":
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [str(apps[kind].engine.pool.checkedout()).encode()]  # type: ignore[attr-defined]
        environ["PATH_INFO"] = f"/{kind}"
        return apps[mode](environ, start_response)

    return app


if __name__ == "__main__":
    import waitress

    # A thread waits as soon as its client does not read, and not only after 16 MB.
    waitress.serve(make_app(), host="127.0.0.1", port=int(sys.argv[1]), threads=THREADS, outbuf_high_watermark=1 << 16)
else:
    app = make_app() if "SERVED" in os.environ else None
