"""A ``start_response`` that stores the head of a response and calls the server's ``start_response`` later.

Until then another response can take its place: an error page, or the response of a repeated request.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .bodies import content_length

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse

__all__ = ["HeldHead"]

#: The beginnings of statuses without a body (RFC 9110, 6.4.1). A response to a HEAD request has none either.
BODILESS = ("1", "204", "304")


class HeldHead:
    """The head of a response, which is held until :meth:`release`. An application calls it as ``start_response``.

    :param start_response: the server's ``start_response``.
    """

    #: the status, empty until the application calls start_response()
    status = ""
    headers: list[tuple[str, str]]
    exc_info: Any = None
    #: chunks passed to write() that were not handed to the server yet; None if write() was not called
    written: list[bytes] | None = None
    #: the number of bytes passed to write()
    sent = 0
    #: the response's Content-Length, once write() was called
    length: int | None = None
    #: whether the head was handed to the server; after that no other response can take its place
    released = False
    _server_write: Callable[[bytes], object]

    def __init__(self, start_response: StartResponse) -> None:
        self.start_response = start_response

    def __call__(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        if self.status:
            if self.released:
                # Too late: the server raises the exception in exc_info, or rejects the second call (PEP 3333).
                self.start_response(status, headers, exc_info)
                return self.write
            if exc_info is None:
                raise AssertionError("start_response() was called a second time without exc_info.")
            self.written = None  # It belonged to the response that this one replaces.
            self.sent = 0
        self.status = status
        self.headers = headers
        self.exc_info = exc_info
        return self.write

    def release(self) -> None:
        """Hand the head to the server.

        :raises AssertionError: if the application has not called ``start_response``.
        """
        if not self.released:
            if not self.status and not self.check():
                return
            self.released = True
            exc_info = self.exc_info
            if exc_info is None:
                self._server_write = self.start_response(self.status, self.headers)
            else:
                self.exc_info = None
                self._server_write = self.start_response(self.status, self.headers, exc_info)

    def check(self) -> bool:
        """Check that there is a head.

        :returns: whether there is one. A subclass may do without.
        :raises AssertionError: if the application has not called ``start_response``.
        """
        if not self.status:
            raise AssertionError("The application returned a body, but it has not called start_response().")
        return True

    def has_no_body(self) -> bool:
        """Return whether the response ends with its head."""
        return self.status.startswith(BODILESS)

    def write(self, data: bytes) -> None:
        """Write a chunk; ``start_response`` returns this method.

        The first chunk is held, and so is one that completes the ``Content-Length``. Any other chunk is handed to the
        server, after the head and the first chunk. Without a body nothing is handed on.
        """
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
