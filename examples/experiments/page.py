"""The page of experiments: a button for each, and what the last press has found."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from webob import Request, Response
from webob.exc import HTTPException, HTTPMethodNotAllowed, HTTPNotFound, HTTPSeeOther

from .experiments import Experiment, make_experiments
from .runs import Shop

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

__all__ = ["Page"]

STYLE = Path(__file__).parent / "templates" / "style.css"
#: No script runs on the page, and no style but its own.
POLICY = (
    "default-src 'none'; style-src 'self'; img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)

templates = Environment(
    loader=PackageLoader("experiments"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class Page:
    """A WSGI application.

    :param shops: the one with the library first.
    """

    #: For the page that links to it.
    title, color = "Experiments", "grey"

    def __init__(self, shops: list[Shop]) -> None:
        self.shops = shops
        self.experiments = {each.name: each for each in make_experiments()}
        self._running = Lock()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        request = Request(environ)
        try:
            return self.respond(request)(environ, start_response)
        except HTTPException as error:
            return error(environ, start_response)

    def respond(self, request: Request) -> Response:
        if not request.path_info:
            return HTTPSeeOther(location=f"{request.application_url}/")
        if request.path_info == "/style.css":
            return Response(STYLE.read_bytes(), content_type="text/css", charset="utf-8")
        if request.path_info == "/":
            return self.show(request)
        experiment = self.experiments.get(request.path_info[1:])
        if experiment is None:
            raise HTTPNotFound("There is no such experiment.")
        if request.method != "POST":
            raise HTTPMethodNotAllowed(headers={"Allow": "POST"})
        self.run(experiment, environ=request.environ)
        # Redirect, because reloading the page would run it again.
        return HTTPSeeOther(location=f"{request.application_url}/#{experiment.name}")

    def run(self, experiment: Experiment, environ: WSGIEnvironment) -> None:
        """Run an experiment with both shops. One at a time: they share the shops' databases."""
        with self._running:
            for shop in self.shops:
                shop.environ = environ
            experiment.found = {shop.title: experiment.run(shop) for shop in self.shops}

    def show(self, request: Request) -> Response:
        text = templates.get_template("page.html").render(
            experiments=self.experiments.values(),
            shops=self.shops,
            url=request.application_url,
            is_away=self.shops[0].database.is_away,
        )
        response = Response(text, cache_control="no-store")
        response.headers["Content-Security-Policy"] = POLICY
        return response
