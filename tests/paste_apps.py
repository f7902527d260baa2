"""Factories and objects that the tests' ini files refer to: applications, a composite of several, a session class."""

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
    """A session class that an ini file refers to."""


def guest_book(global_conf: Any, **settings: str) -> Any:
    """A ``paste.app_factory``: stores the path as a name, and responds with all names."""

    def serve(environ: Any, start_response: Any) -> Iterable[bytes]:
        name = environ["PATH_INFO"].strip("/")
        if name:
            session.execute(insert(guests).values(name=name))
            session.commit()
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [" ".join(session.scalars(select(guests.c.name))).encode()]

    return serve


def veto_guests(environ: Any, status: str, headers: Any) -> bool:
    """A commit veto that an ini file refers to."""
    return bool(environ["PATH_INFO"] == "/vetoed")


def uncommitted_book(global_conf: Any, **settings: str) -> Any:
    """A ``paste.app_factory``: like :func:`guest_book`, but it does not commit, and fails at some paths."""

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
    """A ``paste.app_factory`` that exits, as a program does."""
    raise SystemExit(0)


def breaks(global_conf: Any, **settings: str) -> Any:
    """A ``paste.app_factory`` that fails with an error that shows a URL."""
    raise ValueError("mysql://me:my/secret:word@db/shop")  # SQLAlchemy accepts this password.
