"""The application of test_websockets.py: websockets of Flask-Sock, Flask-SocketIO and gevent-websocket.

``python -m tests.integration.websocket_app KIND PORT`` is a server; gunicorn imports ``app`` or ``of_gevent``.
``DATABASE_URL`` is the database.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from flask import Flask, Response, jsonify, request
from flask_sock import Sock
from flask_socketio import SocketIO, send
from sqlalchemy import Integer, QueuePool, String, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqlasession_middleware import SQLASessionMiddleware, release, session

logging.basicConfig(format="%(levelname)s %(name)s %(message)s")


class Base(DeclarativeBase):
    pass


class Message(Base):
    __tablename__ = "websocket_message"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    text: Mapped[str] = mapped_column(String(40))


flask = Flask("websockets")
sock = Sock(flask)
socketio = SocketIO(flask, async_mode="threading")


@flask.get("/")
def state() -> Response:
    texts = session.scalars(select(Message.text).order_by(Message.text)).all()
    release()
    return jsonify(rows=texts, checked_out=database.engine.pool.checkedout())


def store(text: str) -> None:
    """Store a message, in a scope of its own."""
    with database.context():
        session.add(Message(text=text))
        session.commit()


def serve(receive: Callable[[], Any], answer: Callable[[str], object], query: str) -> None:
    """Store the messages that are received, until the websocket is closed.

    :param query: "read" stores each message in a scope of its own; "commit" and "lose" use the handshake's scope.
    """
    session.scalar(select(func.count(Message.id)))
    release()
    while (text := receive()) is not None:
        if query == "read":
            store(text)
        else:
            session.add(Message(text=text))
            session.flush()
        if query == "commit":
            session.commit()
        answer(f"{text} was here")


@sock.route("/socket")
def socket(ws: Any) -> None:
    serve(ws.receive, ws.send, request.args["query"])


@socketio.on("connect")
def connect() -> None:
    # Engine.IO calls this in the thread of the websocket's request, or of the request before it.
    session.scalar(select(func.count(Message.id)))
    release()


@socketio.on("message")
def message(text: str) -> None:
    # It calls this in a thread of its own, outside of the request.
    store(text)
    send(f"{text} was here")


def gevent_websocket(environ: dict[str, Any], start_response: Any) -> Any:
    ws = environ.get("wsgi.websocket")
    if ws is None:
        return flask_app(environ, start_response)
    serve(ws.receive, ws.send, environ["QUERY_STRING"].partition("=")[2])
    return []


def choose(environ: dict[str, Any], start_response: Any) -> Any:
    return (gevent_websocket if sys.modules.get("geventwebsocket") else flask_app)(environ, start_response)


flask_app = flask.wsgi_app
database = SQLASessionMiddleware(
    choose,
    os.environ["DATABASE_URL"],
    metadata=Base.metadata,
    # One connection more than a request needs: if a websocket keeps one, other requests wait and fail.
    engine_options={"poolclass": QueuePool, "pool_size": 2, "max_overflow": 0, "pool_timeout": 5},
    transaction={"attempts": 2},
    unavailable=True,
)
database.init_database()
flask.wsgi_app = database  # type: ignore[method-assign]
app = flask


def main(kind: str, port: int) -> None:
    if kind == "werkzeug":
        app.run("127.0.0.1", port, threaded=True)
    else:
        from gevent.pywsgi import WSGIServer  # type: ignore[import-untyped,unused-ignore]
        from geventwebsocket.handler import WebSocketHandler  # type: ignore[import-untyped,unused-ignore]

        WSGIServer(("127.0.0.1", port), database, handler_class=WebSocketHandler).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
