"""The models, and the set-up of the session: the cookiecutter's, or the line that takes its place."""

from __future__ import annotations

from typing import Any

import zope.sqlalchemy
from pyramid.settings import asbool
from sqlalchemy import String, engine_from_config
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker


class Base(DeclarativeBase):
    pass


class Guest(Base):
    __tablename__ = "site_guest"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(80), unique=True)


def get_tm_session(factory: Any, manager: Any, request: Any = None) -> Any:
    session = factory(info={"request": request})
    zope.sqlalchemy.register(session, transaction_manager=manager)
    return session


def includeme(config: Any) -> None:
    settings = config.get_settings()
    settings["tm.manager_hook"] = "pyramid_tm.explicit_manager"
    if asbool(settings["moved"]):
        config.include("sqlasession_middleware.pyramid")
        return
    config.include("pyramid_tm")
    config.include("pyramid_retry")
    engine = settings.get("dbengine") or engine_from_config(settings, "sqlalchemy.")
    factory = sessionmaker(engine)
    config.registry["dbsession_factory"] = factory

    def dbsession(request: Any) -> Any:
        given = request.environ.get("app.dbsession")
        return get_tm_session(factory, request.tm, request) if given is None else given

    config.add_request_method(dbsession, reify=True)
