"""What both shops respond with. Nothing here depends on a session."""

from __future__ import annotations

from collections.abc import Iterable

from webob import Request, Response

from .models import Concert


def page(text: str, status: int = 200) -> Response:
    return Response(text, status=status, content_type="text/plain", charset="utf-8")


def no_such_page(request: Request) -> Response:
    return page("There is no such page here.", status=404)


def thanks(request: Request) -> Response:
    """The page after an order. It has a bug."""
    raise ValueError("the page of thanks has a bug")


def list_concerts(concerts: Iterable[Concert]) -> str:
    return "".join(f"{each.name}: tickets left: {each.tickets}\n" for each in concerts)


def list_buyers(concerts: Iterable[Concert]) -> str:
    return "".join(f"{each.name}: {', '.join(order.buyer for order in each.orders)}\n" for each in concerts)
