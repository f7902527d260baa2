"""What the ini files of the tests name: an application, a way to mount several, and some objects to import."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Column, MetaData, String, Table, insert, select
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session
from werkzeug.exceptions import NotFound
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from sqlasession_middleware import session

metadata = MetaData()
guests = Table("guests", metadata, Column("name", String(40)))
audit = MetaData()
Table("visits", audit, Column("path", String(40)))
no_tables = MetaData()


class SpecialSession(Session):
    """A session class to be named in an ini file."""


def guest_book(global_conf: Any, **settings: str) -> Any:
    """A ``paste.app_factory``: the path is a name to write down, the response all names so far."""

    def serve(environ: Any, start_response: Any) -> Iterable[bytes]:
        name = environ["PATH_INFO"].strip("/")
        if name:
            session.execute(insert(guests).values(name=name))
            session.commit()
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [" ".join(session.scalars(select(guests.c.name))).encode()]

    return serve


def veto_guests(environ: Any, status: str, headers: Any) -> bool:
    """A commit veto that an ini can name."""
    return bool(environ["PATH_INFO"] == "/vetoed")


def uncommitted_book(global_conf: Any, **settings: str) -> Any:
    """A ``paste.app_factory``: as :func:`guest_book`, but it leaves the commit to others, and fails where told to."""

    def serve(environ: Any, start_response: Any) -> Iterable[bytes]:
        name = environ["PATH_INFO"].strip("/")
        attempt = environ.get("sqlasession.attempt")
        if name:
            session.execute(insert(guests).values(name=name))
        if name == "twice" and attempt == 1:
            raise LookupError
        if name == "lost":
            raise PoolTimeoutError("QueuePool limit")
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [" ".join(session.scalars(select(guests.c.name))).encode()]

    return serve


def mount(loader: Any, global_conf: Any, **mounts: str) -> Any:
    """A ``paste.composite_factory``: path -> the section of an application."""
    apps = {path: loader.get_app(name, global_conf=global_conf) for path, name in mounts.items()}
    return DispatcherMiddleware(NotFound(), apps)


def exits(global_conf: Any, **settings: str) -> Any:
    """A ``paste.app_factory`` that thinks that it is a program."""
    raise SystemExit(0)


def breaks(global_conf: Any, **settings: str) -> Any:
    """A ``paste.app_factory`` that fails, and shows its URL."""
    raise ValueError("mysql://me:my/secret:word@db/shop")  # SQLAlchemy takes such a password.
