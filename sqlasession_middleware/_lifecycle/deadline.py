"""The deadline of each request."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from .._scope.deadline import begin_deadline
from .._scope.scope import current
from .._settings.checks import check_deadline

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["with_deadline"]


def with_deadline(app: WSGIApplication, deadline: float | Callable[[WSGIEnvironment], float | None]) -> WSGIApplication:
    """Wrap an application so that the deadline of the current scope begins before it is called.

    :param deadline: the seconds, or a callable of environ that gives them.
    """

    def call(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        seconds: Any = deadline
        if callable(deadline):
            seconds = deadline(environ)
            check_deadline(seconds)
        begin_deadline(current.get(), seconds)
        return app(environ, start_response)

    return call
