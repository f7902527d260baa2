"""The pages that the library answers by itself. They say what the client may do, and nothing of what went wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._webob import HTTPInternalServerError, HTTPServiceUnavailable

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication, WSGIEnvironment

__all__ = ["outcome_unknown", "unavailable"]

_NO_STORE = ("Cache-Control", "no-store")


class UnavailablePage(HTTPServiceUnavailable):
    explanation = "The database cannot be reached at the moment. Please try again later."


class OutcomeUnknownPage(HTTPInternalServerError):  # noqa: N818  # WebOb's pages are exceptions as well
    explanation = (
        "It is not known whether your change was saved: the connection to the database was lost in that very moment."
        " Please look before you repeat it."
    )


def _without_html(body: str, status: str, title: str, environ: WSGIEnvironment) -> dict[str, str]:
    """What WebOb makes the JSON of. Its message is the explanation, and lines that the HTML needs."""
    return {"message": body.partition("<br />")[0], "code": status, "title": title}


def unavailable(retry_after: int) -> WSGIApplication:
    """503.

    :param retry_after: seconds.
    """
    page: WSGIApplication = UnavailablePage(
        headers=[("Retry-After", str(retry_after)), _NO_STORE], json_formatter=_without_html
    )
    return page


def outcome_unknown() -> WSGIApplication:
    """500, without a Retry-After: what is repeated might be done twice."""
    page: WSGIApplication = OutcomeUnknownPage(headers=[_NO_STORE], json_formatter=_without_html)
    return page
