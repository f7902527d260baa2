"""WebOb's requests and responses without a framework. The library's request adds ``dbsession`` and ``get_or_404()``.

Run it in this folder, and add a guest::

    waitress-serve --listen 127.0.0.1:8000 webob_app:app
    curl --json '{"name": "Ada"}' http://127.0.0.1:8000/
"""

from guests import DATABASE_URL, Base, Guest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from webob import Response
from webob.dec import wsgify
from webob.exc import HTTPBadRequest, HTTPConflict, HTTPMethodNotAllowed

from sqlasession_middleware import SQLASessionMiddleware
from sqlasession_middleware.request import Request


@wsgify(RequestClass=Request)
def app(request):
    match request.method, request.path_info.removeprefix("/"):
        case "GET" | "HEAD", "":
            return list_guests(request)
        case "POST", "":
            return add_guest(request)
        case "GET" | "HEAD", number:
            return Response(json=request.get_or_404(Guest, number).as_dict())
    raise HTTPMethodNotAllowed


def list_guests(request):
    guests = request.dbsession.scalars(select(Guest).order_by(Guest.id))
    return Response(json={"guests": [guest.as_dict() for guest in guests]})


def add_guest(request):
    try:
        guest = Guest.from_fields(request.json if request.content_type == "application/json" else request.POST)
    except ValueError as error:  # Invalid JSON or UTF-8 raises it, too.
        raise HTTPBadRequest(str(error)) from error
    request.dbsession.add(guest)
    try:
        request.dbsession.flush()  # This sets guest.id. The commit follows when the request is a success.
    except IntegrityError as error:
        raise HTTPConflict("There is a guest of that name.") from error  # Like any 4xx or 5xx, it rolls back.
    return Response(json=guest.as_dict(), status=201, location=f"{request.application_url}/{guest.id}")


database = SQLASessionMiddleware(app, DATABASE_URL, metadata=Base.metadata, transaction=True, unavailable=True)
database.init_database()
app = database
