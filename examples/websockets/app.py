"""Messages that come by websocket, with Flask-Sock.

Run one of these in this folder, and then client.py::

    flask --app app run --port 8000
    gunicorn --bind 127.0.0.1:8000 --worker-class gthread --threads 50 app:app

Each open websocket occupies a thread of the server, but no connection: while it waits, there is none to be held.
"""

from flask import Flask
from flask_sock import Sock
from sqlalchemy import String, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqlasession_middleware import SQLASessionMiddleware, release, session

app = Flask(__name__)
sock = Sock(app)


class Base(DeclarativeBase):
    pass


class Message(Base):
    __tablename__ = "message"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(String(200))


@app.get("/")
def show():
    texts = session.scalars(select(Message.text).order_by(Message.id)).all()
    return "\n".join(texts), {"Content-Type": "text/plain; charset=utf-8"}


@sock.route("/messages")
def receive(ws):
    # The session of the handshake. It lives as long as the websocket, so its connection is returned before the wait.
    count = session.scalar(select(func.count(Message.id)))
    release()
    while True:
        text = ws.receive()
        # Each message has a scope, and thereby a session, of its own. Nothing commits it but the application.
        with database.context():
            message = Message(text=text[:200])
            session.add(message)
            session.commit()
            number = message.id
        ws.send(f"Message {number} is stored. There were {count} when you came.")


database = SQLASessionMiddleware(
    app.wsgi_app, "sqlite:///messages.db", metadata=Base.metadata, transaction=True, unavailable=True
)
database.init_database()
app.wsgi_app = database
