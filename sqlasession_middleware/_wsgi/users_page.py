"""A page of the user's that answers in place of the library's own 503 page."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .bodies import close_quietly
from .file_wrapper import is_file
from .held_head import HeldHead

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["RETRY_AFTER", "UNAVAILABLE", "answer_with_page"]

logger = logging.getLogger("sqlasession_middleware.unavailable")

#: The environ key that tells the page why the database cannot be used.
UNAVAILABLE = "sqlasession.unavailable"
#: The environ key with the value for the header ``Retry-After``.
RETRY_AFTER = "sqlasession.retry_after"


class WholeHead(HeldHead):
    """The head of a response that is read to its end before any of it is released."""

    def write(self, data: bytes) -> None:
        """Keep a chunk."""
        self.written = [*(self.written or ()), data]


def answer_with_page(
    page: WSGIApplication, own: WSGIApplication, environ: WSGIEnvironment, start_response: StartResponse
) -> Iterable[bytes]:
    """Answer with ``page``; with ``own`` if that fails, wherever it does: nothing was released by then.

    :param own: the library's page.
    :param environ: with the two keys of this module.
    """
    retry_after = environ[RETRY_AFTER]
    is_head = environ.get("REQUEST_METHOD") == "HEAD"
    head = WholeHead(start_response)
    try:
        body = _read(page(environ, head), head, environ, is_head)
        head.check()
    except Exception:
        _log_failure(environ, True)
        return own(environ, start_response)
    if head.status.startswith("500"):  # Frameworks answer an exception so.
        close_quietly(body)
        _log_failure(environ, head.exc_info)
        return own(environ, start_response)
    if head.status.startswith("503") and not any(name.lower() == "retry-after" for name, _ in head.headers):
        head.headers = [*head.headers, ("Retry-After", retry_after)]
    head.release()
    return body


def _read(body: Iterable[bytes], head: WholeHead, environ: WSGIEnvironment, is_head: bool) -> Iterable[bytes]:
    """Read a body to its end, and close it. A file is left to the server.

    :returns: the body for the server; a list with one element, from which servers take the Content-Length.
    """
    if not is_head and not head.written and is_file(environ, body):
        return body
    try:
        for chunk in body:
            head.write(chunk)
    finally:
        close = getattr(body, "close", None)
        if close is not None:
            close()
    return [] if is_head else [b"".join(head.written or ())]


def _log_failure(environ: WSGIEnvironment, exc_info: Any) -> None:
    request = environ.get("REQUEST_METHOD"), environ.get("PATH_INFO")
    logger.error("The page of 'unavailable' failed at %s %r: the default page is sent", *request, exc_info=exc_info)
