"""Shared by all applications of this package: pages rendered from templates, and error pages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from webob import Response
from webob.exc import HTTPBadRequest, HTTPError, HTTPFound

from sqlasession_middleware.request import Request

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

templates = Environment(
    loader=PackageLoader("guestbook"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


class Site:
    """A WSGI application with a title and a color. Subclasses implement :meth:`respond`."""

    def __init__(self, title: str, color: str) -> None:
        self.title = title
        self.color = color

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        request = Request(environ)
        try:
            response = self.respond(request) if request.path_info else HTTPFound(add_slash=True)
        except UnicodeDecodeError:  # WebOb decodes the address and the form at their first use.
            response = self.error_page(request, HTTPBadRequest("The request holds text that is not UTF-8."))
        except HTTPError as error:
            response = self.error_page(request, error)
        return response(environ, start_response)

    def respond(self, request: Request) -> Response:
        """Respond to a request.

        :raises HTTPError: it is shown as a page.
        """
        raise NotImplementedError

    def render(self, request: Request, template: str, **values: object) -> str:
        """Render a page. Its links begin with ``url``, the address at which this application is mounted."""
        return templates.get_template(template).render(site=self, url=request.application_url, **values)

    def error_page(self, request: Request, error: HTTPError) -> Response:
        error.text = self.render(request, "error.html", error=error)
        return error
