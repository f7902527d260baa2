"""Falcon: resources that use the session, and an error handler for integrity errors.

Run it in this folder, and add a guest::

    waitress-serve --listen 127.0.0.1:8000 falcon_app:app
    curl --json '{"name": "Ada"}' http://127.0.0.1:8000/
"""

import falcon
from guests import DATABASE_URL, Base, Guest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from sqlasession_middleware import SQLASessionMiddleware, session


class GuestsResource:
    def on_get(self, req, resp):
        resp.media = {"guests": [guest.as_dict() for guest in session.scalars(select(Guest).order_by(Guest.id))]}

    def on_post(self, req, resp):
        try:
            guest = Guest.from_fields(req.get_media())  # JSON or a form, depending on the Content-Type.
        except ValueError as error:
            raise falcon.HTTPBadRequest(description=str(error)) from error
        session.add(guest)
        session.flush()  # This sets guest.id. The commit follows when the request is known to be a success.
        resp.status = falcon.HTTP_CREATED
        resp.location = f"{req.prefix}/{guest.id}"
        resp.media = guest.as_dict()


class GuestResource:
    def on_get(self, req, resp, number):
        guest = session.get(Guest, number)
        if guest is None:
            raise falcon.HTTPNotFound
        resp.media = guest.as_dict()


def refuse_taken_name(req, resp, error, params):
    raise falcon.HTTPConflict(description="There is a guest of that name.")  # Like any 4xx or 5xx, it rolls back.


app = falcon.App()
app.add_route("/", GuestsResource())
app.add_route("/{number:int(min=1, max=2147483647)}", GuestResource())
app.add_error_handler(IntegrityError, refuse_taken_name)

database = SQLASessionMiddleware(app, DATABASE_URL, metadata=Base.metadata, transaction=True, unavailable=True)
database.init_database()
app = database
