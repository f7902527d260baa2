"""Pyramid, with the session as ``request.dbsession``, without pyramid_tm and zope.sqlalchemy.

Run it in this folder, and add a guest::

    waitress-serve --listen 127.0.0.1:8000 pyramid_app:app
    curl --json '{"name": "Ada"}' http://127.0.0.1:8000/
"""

from guests import DATABASE_URL, Base, Guest
from pyramid.config import Configurator
from pyramid.httpexceptions import HTTPBadRequest, HTTPNotFound
from pyramid.view import exception_view_config, view_config, view_defaults
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from sqlasession_middleware import SQLASessionMiddleware, session


@view_defaults(route_name="guests", renderer="json")
class Guests:
    def __init__(self, request):
        self.request = request

    @view_config(request_method="GET")
    def list(self):
        guests = self.request.dbsession.scalars(select(Guest).order_by(Guest.id))
        return {"guests": [guest.as_dict() for guest in guests]}

    @view_config(request_method="POST")
    def add(self):
        request = self.request
        try:
            guest = Guest.from_fields(request.json if request.content_type == "application/json" else request.POST)
        except ValueError as error:  # Invalid JSON or UTF-8 raises it, too.
            raise HTTPBadRequest(str(error)) from error
        request.dbsession.add(guest)
        request.dbsession.flush()  # This sets guest.id. The commit follows when the request is a success.
        request.response.status = 201
        request.response.location = request.route_path("guest", number=guest.id)
        return guest.as_dict()


@view_config(route_name="guest", request_method="GET", renderer="json")
def show_guest(request):
    guest = request.dbsession.get(Guest, int(request.matchdict["number"]))
    if guest is None:
        raise HTTPNotFound
    return guest.as_dict()


@exception_view_config(IntegrityError, renderer="json")
def refuse_taken_name(error, request):
    request.response.status = 409  # Like any 4xx or 5xx, it rolls back.
    return {"error": "There is a guest of that name."}


with Configurator() as config:
    config.add_request_method(lambda request: session(), "dbsession", property=True)
    config.add_route("guests", "/")
    config.add_route("guest", r"/{number:[0-9]{1,9}}")
    config.scan(__name__)
    app = config.make_wsgi_app()

database = SQLASessionMiddleware(app, DATABASE_URL, metadata=Base.metadata, transaction=True, unavailable=True)
database.init_database()
app = database
