"""A request that can be repeated: what the application found, to be found again by the next attempt."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from ._webob import Request
from .context import Scope

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

__all__ = ["Repeatable"]


class Repeatable:
    """A request as it was before the first attempt."""

    def __init__(self, environ: WSGIEnvironment, scope: Scope) -> None:
        request = Request(environ)
        self._input: KeptInput | None = None
        #: whether the body can be read again: nobody knows where one without a length ends
        self.is_repeatable = request.is_body_readable or "HTTP_TRANSFER_ENCODING" not in environ
        if request.is_body_readable:
            # The server's stream can be read once: WebOb reads all of it, into a temporary file where it is long.
            request.is_body_seekable = False
            request.make_body_seekable()
            self._input = environ["wsgi.input"] = KeptInput(environ["wsgi.input"])
        self._environ = environ
        self._scope = scope
        self._was = dict(environ)
        self._local = dict(scope)

    def restore(self) -> None:
        """Undo what the attempt did to the environ, the body and the Local, in place."""
        self._environ.clear()
        self._environ.update(self._was)
        if self._input is not None:
            self._input.seek(0)
        self._scope.clear()
        self._scope.update(self._local)
        self._scope.failure = None


class KeptInput(io.BufferedReader):
    """A request body that the application cannot close: the next attempt needs it."""

    def close(self) -> None:
        """Nothing."""

    def __del__(self) -> None:
        self.raw.close()
