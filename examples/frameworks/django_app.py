"""Django in one file: its WSGI handler, URLs and views with SQLAlchemy, without its own database layer.

Run it in this folder, and add a guest::

    python django_app.py runserver 8000
    curl --json '{"name": "Ada"}' http://127.0.0.1:8000/
"""

import json
import sys

from django.conf import settings
from django.core.management import execute_from_command_line
from django.core.wsgi import get_wsgi_application
from django.http import Http404, HttpResponseBadRequest, JsonResponse
from django.urls import path, re_path, reverse
from django.views import View
from guests import DATABASE_URL, Base, Guest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from sqlasession_middleware import SQLASessionMiddleware, session

settings.configure(
    ALLOWED_HOSTS=["127.0.0.1", "localhost"],
    ROOT_URLCONF=__name__,
    WSGI_APPLICATION=f"{__name__}.application",
)


class GuestsView(View):
    def get(self, request):
        guests = session.scalars(select(Guest).order_by(Guest.id))
        return JsonResponse({"guests": [guest.as_dict() for guest in guests]})

    def post(self, request):
        try:
            is_json = request.content_type == "application/json"
            guest = Guest.from_fields(json.loads(request.body) if is_json else request.POST)
        except ValueError as error:  # Invalid JSON raises it, too.
            return HttpResponseBadRequest(str(error), content_type="text/plain; charset=utf-8")
        session.add(guest)
        try:
            session.flush()  # This sets guest.id. The commit follows when the request is a success.
        except IntegrityError:  # Like any 4xx or 5xx, the response rolls back.
            return JsonResponse({"error": "There is a guest of that name."}, status=409)
        return JsonResponse(guest.as_dict(), status=201, headers={"Location": reverse("guest", args=[guest.id])})


def show_guest(request, number):
    guest = session.get(Guest, int(number))
    if guest is None:
        raise Http404
    return JsonResponse(guest.as_dict())


urlpatterns = [path("", GuestsView.as_view()), re_path(r"^([0-9]{1,9})$", show_guest, name="guest")]

database = SQLASessionMiddleware(
    get_wsgi_application(), DATABASE_URL, metadata=Base.metadata, transaction=True, unavailable=True
)
database.init_database()
application = database

if __name__ == "__main__":
    execute_from_command_line(sys.argv)
