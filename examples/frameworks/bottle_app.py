"""Bottle. Its own error pages roll back, too.

Run it in this folder, and add a guest::

    bottle --bind 127.0.0.1:8000 bottle_app:app
    curl --json '{"name": "Ada"}' http://127.0.0.1:8000/
"""

from bottle import Bottle, abort, request, response
from guests import DATABASE_URL, Base, Guest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from sqlasession_middleware import SQLASessionMiddleware, session

book = Bottle()


@book.get("/")
def list_guests():
    return {"guests": [guest.as_dict() for guest in session.scalars(select(Guest).order_by(Guest.id))]}


@book.post("/")
def add_guest():
    try:
        guest = Guest.from_fields(request.forms.decode() if request.json is None else request.json)
    except ValueError as error:
        abort(400, str(error))
    session.add(guest)
    try:
        session.flush()  # This sets guest.id. The commit follows when the request is known to be a success.
    except IntegrityError:
        abort(409, "There is a guest of that name.")  # Like any 4xx or 5xx, it rolls back.
    response.status = 201
    response.set_header("Location", book.get_url("guest", number=guest.id))
    return guest.as_dict()


@book.get("/<number:re:[0-9]{1,9}>", name="guest")
def show_guest(number):
    guest = session.get(Guest, int(number))
    if guest is None:
        abort(404, "There is no such guest.")
    return guest.as_dict()


database = SQLASessionMiddleware(book, DATABASE_URL, metadata=Base.metadata, transaction=True, unavailable=True)
database.init_database()
app = database
