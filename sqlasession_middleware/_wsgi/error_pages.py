"""The error pages that the library returns. They tell the client what to do, and no details of the failure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .webob import HTTPInternalServerError, HTTPNotFound, HTTPServiceUnavailable

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication, WSGIEnvironment

__all__ = ["not_found", "outcome_unknown", "unavailable"]

_NO_STORE = ("Cache-Control", "no-store")


class UnavailablePage(HTTPServiceUnavailable):
    explanation = "The database cannot be reached at the moment. Please try again later."


class BusyPage(HTTPServiceUnavailable):
    explanation = "The database is too busy at the moment. Please try again later."


class OutcomeUnknownPage(HTTPInternalServerError):  # noqa: N818  # WebOb's error pages are exceptions
    explanation = (
        "It is not known whether your change was saved: the connection to the database was lost at that moment."
        " Please check before you try again."
    )


class NotFoundPage(HTTPNotFound):
    explanation = "There is nothing at this address."


def _without_html(body: str, status: str, title: str, environ: WSGIEnvironment) -> dict[str, str | int]:
    """A ``json_formatter`` for WebOb: the message is the explanation without the HTML that WebOb appends."""
    return {"message": body.partition("<br />")[0], "code": int(status[:3]), "title": title}


def unavailable(retry_after: int, is_busy: bool = False) -> WSGIApplication:
    """Return a page with status 503 and a ``Retry-After`` header.

    :param retry_after: the value of the header, in seconds.
    :param is_busy: whether the database answers, but has given up the transaction.
    """
    kind = BusyPage if is_busy else UnavailablePage
    page: WSGIApplication = kind(headers=[("Retry-After", str(retry_after)), _NO_STORE], json_formatter=_without_html)
    return page


def not_found() -> WSGIApplication:
    """Return a page with status 404, which repeats nothing of the request."""
    page: WSGIApplication = NotFoundPage(headers=[_NO_STORE], json_formatter=_without_html)
    return page


def outcome_unknown() -> WSGIApplication:
    """Return a page with status 500. It has no ``Retry-After``, because a repeated request might be stored twice."""
    page: WSGIApplication = OutcomeUnknownPage(headers=[_NO_STORE], json_formatter=_without_html)
    return page
