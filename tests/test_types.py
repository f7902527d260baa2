"""What type checkers know of models and requests: mypy reads this module, with each SQLAlchemy that it is run with."""

from __future__ import annotations

from typing import assert_type

from sqlalchemy import MetaData, select
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, Session, mapped_column

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware.models import Queries, SavesItself
from sqlasession_middleware.pages import KeysetPage, Page
from sqlasession_middleware.request import Request


class Base(DeclarativeBase):
    metadata = MetaData()


class Guest(SavesItself, Queries, Base):
    __tablename__ = "typed_guest"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class DataBase(MappedAsDataclass, DeclarativeBase):
    metadata = Base.metadata


class Visit(SavesItself, Queries, DataBase):
    __tablename__ = "typed_visit"
    id: Mapped[int] = mapped_column(init=False, primary_key=True)
    page: Mapped[str]


def test_types() -> None:
    """Each object is asked for what it is, at run time as well."""
    app = SQLASessionMiddleware(lambda environ, start_response: [], "sqlite://", metadata=Base.metadata)
    app.init_database()
    request = Request.blank("/")
    with app.context():
        guest = Guest(name="Ada")
        visit = Visit(page="/")
        session.flush()
        assert assert_type(Guest.query.filter_by(name="Ada").one(), Guest) is guest
        assert assert_type(Guest.get(guest.id), Guest | None) is guest
        assert assert_type(session.scalars(Guest.select().where(Guest.name == "Ada")).one(), Guest) is guest
        assert assert_type(session.scalars(Visit.select()).one(), Visit) is visit
        assert assert_type(request.get_or_404(Guest, guest.id), Guest) is guest
        assert assert_type(request.one_or_404(Guest.select()), Guest) is guest
        assert assert_type(request.one_or_404(select(Guest.name)), str) == "Ada"
        assert assert_type(request.paginate(Guest.select()), Page[Guest]).items == [guest]
        assert [assert_type(each, str) for each in request.paginate(select(Guest.name), count=False)] == ["Ada"]
        keyed = assert_type(request.paginate_by_key(select(Guest).order_by(Guest.id)), KeysetPage[Guest])
        assert [assert_type(each, Guest) for each in keyed] == [guest]
        assert assert_type(request.dbsession, Session) is session()
        assert assert_type(Guest.transient(name="Ada"), Guest) not in session
        assert assert_type(session.merge(guest), Guest) is guest
        assert assert_type(request.application, SQLASessionMiddleware) is app
    app.dispose()
