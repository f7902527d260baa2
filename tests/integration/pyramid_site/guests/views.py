"""Views that succeed and fail in the ways that there are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyramid.httpexceptions import HTTPBadRequest, HTTPFound, HTTPNotFound
from pyramid.response import Response
from pyramid_retry import is_last_attempt, mark_error_retryable
from sqlalchemy import func, select, text
from sqlalchemy.exc import IntegrityError

from .models import Guest


class OccupiedError(Exception):
    pass


mark_error_retryable(OccupiedError)


def names(request: Any) -> dict[str, Any]:
    return {"names": request.dbsession.scalars(select(Guest.name).order_by(Guest.name)).all()}


def add(request: Any) -> Any:
    """Adds a guest, and then does what the request asks for."""
    how = request.matchdict["how"]
    request.dbsession.add(Guest(name=request.params["name"]))
    if how == "flush":
        request.dbsession.flush()
    elif how == "redirect":
        return HTTPFound("/names")
    elif how == "raise-redirect":
        raise HTTPFound("/names")
    elif how == "bad":
        return HTTPBadRequest()
    elif how == "missing":
        raise HTTPNotFound
    elif how == "error":
        raise KeyError
    elif how == "doom":
        request.tm.doom()
    elif how == "occupied" and not is_last_attempt(request):
        raise OccupiedError
    elif how == "stream":
        return Response(app_iter=stream(), content_type="text/plain")
    elif how == "savepoint":
        request.dbsession.flush()
        savepoint = request.tm.savepoint()
        request.dbsession.add(Guest(name=request.params["name"] + " again"))
        request.dbsession.flush()
        savepoint.rollback()
    return {"added": request.params["name"], "guests": request.dbsession.scalar(select(func.count(Guest.id)))}


def stream() -> Iterator[bytes]:
    yield b"one "
    yield b"two"


def backends(request: Any) -> dict[str, Any]:
    """What the other connections of this database do."""
    query = "SELECT state FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    states = request.dbsession.scalars(text(f"{query} AND backend_type = 'client backend'")).all()
    return {"states": states}


def taken(error: Exception, request: Any) -> dict[str, Any]:
    request.response.status = 409
    return {"error": "taken"}


def failed(error: Exception, request: Any) -> dict[str, Any]:
    request.response.status = 500
    return {"error": type(error).__name__}


def includeme(config: Any) -> None:
    config.add_route("names", "/names")
    config.add_view(names, route_name="names", renderer="json")
    config.add_route("backends", "/backends")
    config.add_view(backends, route_name="backends", renderer="json")
    config.add_route("add", "/add/{how}")
    config.add_view(add, route_name="add", renderer="json")
    config.add_exception_view(taken, context=IntegrityError, renderer="json")
    config.add_exception_view(failed, context=Exception, renderer="json")
