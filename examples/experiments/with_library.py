"""The ticket shop with sqlasession_middleware. ``by_hand.py`` is the same shop without it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from time import sleep
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine, Result, select
from sqlalchemy.orm import selectinload
from webob import Request, Response

from sqlasession_middleware import SQLASessionMiddleware, application, session

from .hooks import before_each_attempt, meet
from .models import Concert, Order
from .responses import list_buyers, list_concerts, no_such_page, page, thanks

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

#: What the report has left open.
forgotten: list[Result[Any]] = []


def make_shop(engine: Engine) -> SQLASessionMiddleware:
    """The WSGI application."""
    return SQLASessionMiddleware(
        before_each_attempt(shop),
        engine,
        transaction={"attempts": 3},
        unavailable={"retry_after": 1, "breaker_seconds": 1},
        report_leaks=True,
    )


def shop(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    request = Request(environ)
    view = VIEWS.get(f"{request.method} {request.path_info}", no_such_page)
    return view(request)(environ, start_response)


def front(request: Request) -> Response:
    return page(list_concerts(session.scalars(select(Concert)).all()))


def order(request: Request) -> Response:
    session.add(Order(concert_id=1, buyer="Linus"))
    session.flush()
    return thanks(request)


def buy(request: Request) -> Response:
    concert = session.get_one(Concert, 1)
    meet(request)
    if concert.tickets == 0:
        return page("Sold out.", status=409)
    concert.tickets -= 1
    session.add(Order(concert_id=1, buyer="Linus"))
    return page(f"You have it, in attempt {request.environ['sqlasession.attempt']}.")


def events(request: Request) -> Response:
    def watch() -> Iterator[bytes]:
        while True:
            yield b"data: %d\n\n" % session.scalars(select(Concert.tickets).filter_by(id=1)).one()
            sleep(1)

    return Response(app_iter=watch(), content_type="text/event-stream")


def catalogue(request: Request) -> Response:
    concerts = session.scalars(select(Concert)).all()
    return page(list_concerts(concerts) * 5000)


def report(request: Request) -> Response:
    connection = application.engine.connect()
    forgotten.append(connection.execute(select(Concert.name)))  # A result keeps its connection.
    return page("The report is ready.")


def buyers(request: Request) -> Response:
    return page(list_buyers(session.scalars(select(Concert)).all()))


def buyers_at_once(request: Request) -> Response:
    return page(list_buyers(session.scalars(select(Concert).options(selectinload(Concert.orders))).all()))


VIEWS = {
    "GET /": front,
    "POST /order": order,
    "POST /buy": buy,
    "GET /events": events,
    "GET /catalogue": catalogue,
    "GET /report": report,
    "GET /buyers": buyers,
    "GET /buyers-at-once": buyers_at_once,
}
