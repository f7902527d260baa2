"""A page that shows new messages as they are written: server-sent events.

Run it in this folder, and open http://127.0.0.1:8000/ in two windows::

    waitress-serve --listen 127.0.0.1:8000 --threads 50 app:app
    gunicorn --bind 127.0.0.1:8000 --worker-class gthread --threads 50 app:app

Each open page occupies a thread of the server, but no connection: between two events, it is back in the pool.
"""

import json
from pathlib import Path
from time import sleep

from sqlalchemy import String, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from webob import Response
from webob.dec import wsgify
from webob.exc import HTTPBadRequest, HTTPMethodNotAllowed, HTTPNotFound

from sqlasession_middleware import SQLASessionMiddleware, session

PAGE = Path(__file__).with_name("page.html").read_text("utf-8")


class Base(DeclarativeBase):
    pass


class Message(Base):
    __tablename__ = "message"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(String(200))


@wsgify
def app(request):
    match request.method, request.path_info:
        case "GET", "/":
            return Response(PAGE)
        case "POST", "/":
            text = request.POST.get("text", "")
            if not text.isprintable() or not 1 <= len(text) <= 200:
                raise HTTPBadRequest("A message has 1 to 200 printable characters.")
            session.add(Message(text=text))
            return Response(status=204)
        case "GET", "/events":
            # The last event that a browser has received, if it reconnects.
            last = request.headers.get("Last-Event-ID", "0")
            if not last.isdecimal() or len(last) > 9:
                raise HTTPBadRequest("Last-Event-ID is the number of an event.")
            return Response(app_iter=events(int(last)), content_type="text/event-stream", cache_control="no-store")
    raise HTTPNotFound if request.method == "GET" else HTTPMethodNotAllowed


def events(last):
    while True:
        for message in session.scalars(select(Message).where(Message.id > last).order_by(Message.id)).all():
            last = message.id
            yield f"id: {last}\ndata: {json.dumps(message.text)}\n\n".encode()
        # A comment returns the connection, and lets the server notice that the browser has disconnected.
        yield b": waiting\n\n"
        sleep(1)


app = database = SQLASessionMiddleware(
    app, "sqlite:///messages.db", metadata=Base.metadata, transaction=True, unavailable=True
)
database.init_database()
