"""Flask, without an extension.

Run it in this folder, and add a guest::

    flask --app flask_app run --port 8000
    curl --json '{"name": "Ada"}' http://127.0.0.1:8000/

The middleware wraps ``wsgi_app``, so ``app`` is still a Flask object: ``flask run`` and ``app.test_client()`` use it.
"""

from flask import Flask, abort, request, url_for
from guests import DATABASE_URL, Base, Guest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from sqlasession_middleware import SQLASessionMiddleware, session

app = Flask(__name__)


@app.get("/")
def list_guests():
    return {"guests": [guest.as_dict() for guest in session.scalars(select(Guest).order_by(Guest.id))]}


@app.post("/")
def add_guest():
    try:
        guest = Guest.from_fields(request.get_json() if request.is_json else request.form)
    except ValueError as error:
        abort(400, str(error))
    session.add(guest)
    session.flush()  # This sets guest.id. The commit follows when the request is known to be a success.
    return guest.as_dict(), 201, {"Location": url_for("show_guest", number=guest.id)}


@app.get("/<int(max=2147483647):number>")
def show_guest(number):
    return (session.get(Guest, number) or abort(404)).as_dict()


@app.errorhandler(IntegrityError)
def refuse_taken_name(error):
    return {"error": "There is a guest of that name."}, 409  # Like any 4xx or 5xx, it rolls back.


database = SQLASessionMiddleware(app.wsgi_app, DATABASE_URL, metadata=Base.metadata, transaction=True, unavailable=True)
database.init_database()
app.wsgi_app = database
