"""The head of a response that is held back: a ``start_response`` that remembers, and does not call the server's.

What is held can still become another response: a 500, a 503, or the answer of a repeated attempt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .bodies import content_length

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse

__all__ = ["Head"]

#: Statuses whose responses have no body (RFC 9110, 6.4.1); neither has the response to a HEAD request.
BODILESS = ("1", "204", "304")


class Head:
    """A ``start_response`` that remembers.

    :param start_response: the server's.
    """

    #: empty until the application has called
    status = ""
    headers: list[tuple[str, str]]
    exc_info: Any = None
    #: what the application gave to write() and the server does not have yet; None if it never wrote
    written: list[bytes] | None = None
    #: how many bytes it gave to write(), and how many the response has by its own word
    sent = 0
    length: int | None = None
    #: whether the server has the head: from then on nothing can be taken back
    released = False
    _server_write: Callable[[bytes], object]

    def __init__(self, start_response: StartResponse) -> None:
        self.start_response = start_response

    def __call__(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        if self.released:
            # Too late: the server raises what exc_info holds, or complains of the second call (PEP 3333).
            self.start_response(status, headers, exc_info)
        elif self.status and exc_info is None:
            raise AssertionError("start_response() was called a second time without exc_info.")
        else:
            self.status = status
            self.headers = headers
            self.exc_info = exc_info
            self.written = None  # It belonged to the response that this one replaces.
            self.sent = 0
        return self.write

    def release(self) -> None:
        """Hand the head to the server.

        :raises AssertionError: if the application has not called ``start_response``.
        """
        if not self.released:
            self.check()
            exc_info, self.exc_info = self.exc_info, None
            self.released = True
            if exc_info is None:
                self._server_write = self.start_response(self.status, self.headers)
            else:
                self._server_write = self.start_response(self.status, self.headers, exc_info)

    def check(self) -> None:
        """:raises AssertionError: if the application has not called ``start_response``."""
        if not self.status:
            raise AssertionError("The application returned a body, but it has not called start_response().")

    def has_no_body(self) -> bool:
        """Whether the response is complete with its head."""
        return self.status.startswith(BODILESS)

    def write(self, data: bytes) -> None:
        """What ``start_response`` returns. As with an iterator, the first chunk and the completing one are held."""
        if self.written is None:
            self.written = []
            self.length = content_length(self.headers)
        self.sent += len(data)
        if self.written and not self.has_no_body():
            self.release()
        if self.released:
            while self.written:
                self._server_write(self.written.pop(0))
            if self.length is None or self.sent < self.length:
                self._server_write(data)
                return
        self.written.append(data)
