"""The functions that ``use = call:guestbook:…`` in an ini file calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from webob import Response
from webob.exc import HTTPNotFound
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from sqlasession_middleware.request import Request

from .app import Guestbook
from .pages import Site


def guestbook(global_conf: Mapping[str, str], title: str = "Guestbook", color: str = "grey") -> Guestbook:
    """A ``paste.app_factory``.

    :param title: the title of the guestbook.
    :param color: red, blue or grey.
    """
    return Guestbook(title, color)


def mount(loader: Any, global_conf: Mapping[str, str], **sections: str) -> DispatcherMiddleware:
    """A ``paste.composite_factory``: guestbooks side by side, and a page at ``/`` that links to them.

    :param sections: path -> the ini's section with the application, ``/red = red``.
    """
    books = {path: loader.get_app(section, global_conf=global_conf) for path, section in sections.items()}
    return DispatcherMiddleware(Landing({path: book.app for path, book in books.items()}), books)


class Landing(Site):
    """The page that links to the guestbooks. It needs no database."""

    def __init__(self, books: Mapping[str, Guestbook]) -> None:
        super().__init__("Guestbooks", "grey")
        self.books = books

    def respond(self, request: Request) -> Response:
        if request.path_info != "/":
            raise HTTPNotFound("There is no such page here.")
        return Response(self.render(request, "landing.html", books=self.books))
