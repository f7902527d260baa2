"""Models that know the global session."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import InitVar

import pytest
from sqlalchemy import Column, Integer, MetaData, String, Table
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, Query, mapped_column, registry

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware import metadata as shared
from sqlasession_middleware.errors import ScopeError
from sqlasession_middleware.models import Model, Queries, SavesItself

metadata = MetaData()


class Base(DeclarativeBase):
    metadata = metadata


class Plain(Queries, Base):
    __tablename__ = "plain"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(20))


class Saved(SavesItself, Plain):
    __tablename__ = "saved"
    __mapper_args__ = {"concrete": True}  # noqa: RUF012
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(20))


class Picky(SavesItself, Queries, Base):
    __tablename__ = "picky"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(20))

    def __init__(self, name: str) -> None:
        super().__init__(name=name)
        if not name:
            raise ValueError(name)


class Unique(SavesItself, Queries, Base):
    __tablename__ = "only_one"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(20))

    def __init__(self, name: str) -> None:
        super().__init__(name=name)
        if Unique.query.filter_by(name=name).count() > 1:  # Writes it first.
            raise ValueError(name)


class DataBase(MappedAsDataclass, DeclarativeBase):
    metadata = metadata


class Data(SavesItself, Queries, DataBase):
    __tablename__ = "data"
    id: Mapped[int] = mapped_column(init=False, primary_key=True)
    name: Mapped[str] = mapped_column(String(20))


class Imperative(SavesItself, Queries):
    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__()


registry(metadata=metadata).map_imperatively(
    Imperative, Table("imperative", metadata, Column("id", Integer, primary_key=True), Column("name", String(20)))
)


class Bare(SavesItself, Queries):
    """Without a constructor of its own: SQLAlchemy has one for it."""


registry(metadata=metadata).map_imperatively(
    Bare, Table("bare", metadata, Column("id", Integer, primary_key=True), Column("name", String(20)))
)


@registry(metadata=metadata).mapped
class Decorated(SavesItself, Queries):
    __tablename__ = "decorated"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(20))


class SavingBase(SavesItself, Queries, DeclarativeBase):
    metadata = metadata


class OfSavingBase(SavingBase):
    __tablename__ = "of_saving_base"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(20))


SAVED = (Saved, Picky, Data, Imperative, Bare, Decorated, OfSavingBase)


@pytest.fixture
def app(database_url: str) -> Iterator[SQLASessionMiddleware]:
    app = SQLASessionMiddleware(lambda environ, start: [], database_url, metadata=metadata)
    app.drop_database()
    app.init_database()
    yield app
    app.drop_database()
    app.dispose()


@pytest.mark.parametrize("model", SAVED)
def test_object_saves_itself_and_can_be_asked_for(app, model):
    with app.context():
        made = model(name="Ada")
        session.commit()
        ident = made.id
    with app.context():
        assert isinstance(model.query, Query)
        assert [each.name for each in model.query] == ["Ada"]
        assert model.query.filter_by(name="Grace").count() == 0
        assert session.scalars(model.select()).one() is model.get(ident)
        assert model.get(ident + 1) is None
        assert not session.new


def test_object_of_another_class_does_not(app):
    with app.context():
        Plain(name="Ada")
        session.commit()
        assert Plain.query.count() == 0


@pytest.mark.parametrize("model", SAVED)
def test_outside_of_a_scope_it_is_an_object_like_any_other(model):
    assert model(name="Ada").name == "Ada"
    with pytest.raises(ScopeError):
        model.query.all()


def test_object_that_could_not_be_made_is_not_saved(app):
    with app.context():
        with pytest.raises(ValueError, match=r"^$"):
            Picky("")
        assert not session.new
        session.commit()
        assert Picky.query.all() == []
    with pytest.raises(ValueError, match=r"^$"):
        Picky("")


def test_object_that_was_written_before_it_could_not_be_made_is_not_stored(app):
    with app.context():
        Unique("Ada")
        with pytest.raises(ValueError, match="Ada"):
            Unique("Ada")
        session.commit()
        assert Unique.query.count() == 1


def test_class_that_is_not_mapped_yet():
    class Later(SavesItself):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

    assert Later("Ada").name == "Ada"


class Stamped(MappedAsDataclass, DeclarativeBase):
    """A base with a __post_init__, and a field that is for it alone."""

    metadata = metadata

    def __post_init__(self, title: str) -> None:
        self.name = f"{title} {self.name}"


class Titled(SavesItself, Queries, Stamped):
    __tablename__ = "titled"
    id: Mapped[int] = mapped_column(init=False, primary_key=True)
    name: Mapped[str] = mapped_column(String(20))
    title: InitVar[str]


def test_base_with_a_post_init_keeps_it(app):
    with app.context():
        Titled(name="Lovelace", title="Lady")
        session.commit()
        assert [each.name for each in Titled.query] == ["Lady Lovelace"]


def test_what_is_not_committed_is_gone(app):
    with app.context():
        Data(name="Ada")
        session.flush()
    with app.context():
        assert Data.query.all() == []


def test_each_application_has_its_own(app, tmp_path):
    other = SQLASessionMiddleware(lambda environ, start: [], f"sqlite:///{tmp_path}/other.db", metadata=metadata)
    other.init_database()
    with app.context():
        Data(name="Ada")
        with other.context():
            Data(name="Grace")
            assert [each.name for each in Data.query] == ["Grace"]
        assert [each.name for each in Data.query] == ["Ada"]
    other.dispose()


def test_model_is_on_the_shared_metadata():
    assert Model.metadata is shared
    assert issubclass(Model, Queries)
