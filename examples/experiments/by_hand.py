"""The ticket shop of ``with_library.py`` with a plain Session of SQLAlchemy for each request.

It is written with care: the session is closed when the response is closed, as Werkzeug's documentation did it, and also
if the application raises. Each view commits what it has done, because nobody else does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from time import sleep
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine, Result, select
from sqlalchemy.orm import Session, selectinload
from webob import Request, Response
from werkzeug.wsgi import ClosingIterator

from .hooks import meet
from .models import Concert, Order
from .responses import list_buyers, list_concerts, no_such_page, page, thanks

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

#: What the report has left open.
forgotten: list[Result[Any]] = []


def make_shop(engine: Engine) -> WSGIApplication:
    """The WSGI application."""

    def with_session(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        environ["shop.session"] = session = Session(engine)
        try:
            body = shop(environ, start_response)
        except BaseException:
            session.close()
            raise
        return ClosingIterator(body, session.close)

    return with_session


def shop(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    request = Request(environ)
    view = VIEWS.get(f"{request.method} {request.path_info}", no_such_page)
    return view(request)(environ, start_response)


def session_of(request: Request) -> Session:
    session: Session = request.environ["shop.session"]
    return session


def front(request: Request) -> Response:
    return page(list_concerts(session_of(request).scalars(select(Concert)).all()))


def order(request: Request) -> Response:
    session = session_of(request)
    session.add(Order(concert_id=1, buyer="Linus"))
    session.commit()
    return thanks(request)


def buy(request: Request) -> Response:
    session = session_of(request)
    concert = session.get_one(Concert, 1)
    meet(request)
    if concert.tickets == 0:
        return page("Sold out.", status=409)
    concert.tickets -= 1
    session.add(Order(concert_id=1, buyer="Linus"))
    session.commit()
    return page("You have it.")


def events(request: Request) -> Response:
    session = session_of(request)

    def watch() -> Iterator[bytes]:
        while True:
            yield b"data: %d\n\n" % session.scalars(select(Concert.tickets).filter_by(id=1)).one()
            sleep(1)

    return Response(app_iter=watch(), content_type="text/event-stream")


def catalogue(request: Request) -> Response:
    concerts = session_of(request).scalars(select(Concert)).all()
    return page(list_concerts(concerts) * 5000)


def report(request: Request) -> Response:
    connection = session_of(request).get_bind().engine.connect()
    forgotten.append(connection.execute(select(Concert.name)))
    return page("The report is ready.")


def buyers(request: Request) -> Response:
    return page(list_buyers(session_of(request).scalars(select(Concert)).all()))


def buyers_at_once(request: Request) -> Response:
    concerts = session_of(request).scalars(select(Concert).options(selectinload(Concert.orders)))
    return page(list_buyers(concerts.all()))


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
