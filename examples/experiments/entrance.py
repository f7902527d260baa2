"""The way in for the requests that the experiments send: the same as that of a browser's.

So whatever is around the shops, such as the inspector, sees these requests as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["Entrance", "enter", "way_in"]

_KEY = "experiments.entrance"


class Entrance:
    """A middleware to be the outermost one.

    :param app: what it leads to.
    """

    def __init__(self, app: WSGIApplication) -> None:
        self.app = app

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        enter(environ, self.app)
        return self.app(environ, start_response)


def enter(environ: WSGIEnvironment, app: WSGIApplication) -> None:
    """Note where the request has come in, unless that is known."""
    environ.setdefault(_KEY, (app, environ.get("SCRIPT_NAME", "")))


def way_in(environ: Mapping[str, Any]) -> tuple[WSGIApplication, str, str]:
    """How to get to the application that has the request ``environ``.

    :returns: the outermost application, its SCRIPT_NAME, and the path from there.
    """
    app, mounted = environ[_KEY]
    return app, mounted, environ["SCRIPT_NAME"].removeprefix(mounted)
