"""Models that know the global session."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Iterator
from dataclasses import InitVar
from typing import Any

import pytest
from sqlalchemy import Column, ForeignKey, Integer, MetaData, String, Table, inspect, select
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Query,
    Session,
    mapped_column,
    object_session,
    registry,
    relationship,
)

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware import metadata as shared
from sqlasession_middleware.errors import ScopeError
from sqlasession_middleware.models import Model, Queries, SavesItself, transient_objects

from .conftest import DATABASES, DATABASES_SEEN

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


class Shelf(SavingBase):
    __tablename__ = "shelf"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(20))
    books: Mapped[list[Book]] = relationship(back_populates="shelf")

    def __init__(self, *titles: str, **values: Any) -> None:
        super().__init__(**values)
        if titles:
            self.books = [Book(title=title) for title in titles]


class Book(SavingBase):
    __tablename__ = "book"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(20))
    shelf_id: Mapped[int | None] = mapped_column(ForeignKey("shelf.id"))
    shelf: Mapped[Shelf | None] = relationship(back_populates="books")


SAVED = (Saved, Picky, Data, Imperative, Bare, Decorated, OfSavingBase)


@pytest.fixture(scope="module", params=DATABASES)
def with_tables(request, tmp_path_factory) -> Iterator[SQLASessionMiddleware]:
    """One for all tests on a database: the tables are many."""
    url = DATABASES_SEEN.url(request.param, f"sqlite:///{tmp_path_factory.mktemp('models')}/test.db")
    app = SQLASessionMiddleware(lambda environ, start: [], url, metadata=metadata)
    app.drop_database()
    app.init_database()
    yield app
    app.drop_database()
    app.dispose()


@pytest.fixture
def app(with_tables: SQLASessionMiddleware) -> Iterator[SQLASessionMiddleware]:
    yield with_tables
    with with_tables.engine.begin() as connection:
        for table in reversed(metadata.sorted_tables):
            connection.execute(table.delete())


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


# -- objects that are not to be saved


@pytest.fixture
def shelf_id(app) -> int:
    """The key of a shelf that is stored, with a book."""
    with app.context():
        shelf = Shelf(name="stored", books=[Book(title="stored")])
        session.commit()
        return shelf.id


def stored() -> tuple[list[str], list[str]]:
    """The names of all shelves, and the titles of all books."""
    return (
        list(session.scalars(select(Shelf.name).order_by(Shelf.name))),
        list(session.scalars(select(Book.title).order_by(Book.title))),
    )


@pytest.mark.parametrize("model", SAVED)
def test_object_is_not_saved_when_it_is_made_transient(app, model):
    with app.context():
        made = model.transient(name="Ada")
        assert inspect(made).transient
        with transient_objects():
            assert inspect(model(name="Grace")).transient
        session.commit()
        assert model.query.count() == 0
        assert inspect(model(name="Bea")).pending


def test_transient_object_can_be_made_outside_of_a_scope(app):
    with transient_objects():
        made = Shelf(name="made before")
    assert inspect(made).transient
    with app.context():
        session.add(Shelf.transient(name="added by hand"))
        session.add(made)
        session.commit()
        assert stored() == (["added by hand", "made before"], [])


def test_objects_are_saved_again_when_a_transient_one_could_not_be_made(app):
    with app.context():
        with pytest.raises(ValueError, match=r"^$"):
            Picky.transient("")
        with pytest.raises(ZeroDivisionError), transient_objects():
            raise ZeroDivisionError
        assert inspect(Picky("Ada")).pending


def test_objects_of_another_scope_are_saved_when_it_begins_among_transient_ones(app):
    with app.context():
        with transient_objects():
            with app.context():
                Shelf(name="saved")
                session.commit()
            assert inspect(Shelf(name="not saved")).transient
        session.commit()
        assert stored() == (["saved"], [])


def factory(model: type, **values: Any) -> Any:
    """What factory_boy's build() does: it makes the objects that others refer to, too."""
    return model(**{name: value() if callable(value) else value for name, value in values.items()})


def unpickled(ident: int) -> Shelf:
    shelf = session.get(Shelf, ident)
    copy: Shelf = pickle.loads(pickle.dumps(shelf))
    copy.name = "merged"
    return copy


def by_a_factory(ident: int) -> Shelf:
    with transient_objects():
        made: Shelf = factory(Shelf, id=ident, name="merged", books=lambda: [factory(Book, title="merged")])
        return made


#: How a template is made of the shelf with that key, and the books that are there after it was merged.
TEMPLATES: dict[str, tuple[Callable[[int], Shelf], list[str]]] = {
    "transient": (lambda ident: Shelf.transient(id=ident, name="merged"), ["stored"]),
    "transient with others": (
        lambda ident: Shelf.transient(id=ident, name="merged", books=[Book.transient(title="merged")]),
        ["merged", "stored"],
    ),
    "transient whose constructor makes others": (
        lambda ident: Shelf.transient("merged", id=ident, name="merged"),
        ["merged", "stored"],
    ),
    "of a factory": (by_a_factory, ["merged", "stored"]),
    "unpickled": (unpickled, ["stored"]),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_template_is_merged_when_it_is(app, shelf_id, template):
    make, titles = TEMPLATES[template]
    with app.context():
        made = make(shelf_id)
        assert made not in session
        merged = session.merge(made)
        assert merged is not made
        session.commit()
        assert stored() == (["merged"], titles)


def test_dataclass_is_merged_when_it_was_made_transient(app):
    with app.context():
        ident = Data(name="Ada")
        session.commit()
        template = Data.transient(name="Grace")
        template.id = ident.id
        assert session.merge(template) is ident
        with transient_objects():
            replaced = dataclasses.replace(ident, name="Bea")
        assert inspect(replaced).transient
        session.commit()
        assert [each.name for each in Data.query] == ["Grace"]


def merge_all(orm_session: Any, instance: object) -> None:
    if not hasattr(orm_session, "merge_all"):
        pytest.skip("merge_all() is there since SQLAlchemy 2.1")
    orm_session.merge_all(iter([instance]))


def merge_unflushed(orm_session: Any, instance: object) -> None:
    with orm_session.no_autoflush:
        orm_session.merge(instance)


#: What is refused for an object that has added itself, and how the error begins.
REFUSED: dict[str, tuple[Callable[[Any, int], object], str]] = {
    "merge": (lambda to, ident: to.merge(Shelf(id=ident, name="x")), r"merge\(\) would insert the Shelf with .* \(\d"),
    "merge that cascades": (
        lambda to, ident: to.merge(Book.transient(title="x", shelf=Shelf(id=ident, name="x"))),
        r"merge\(\) would insert the Shelf",
    ),
    "merge_all": (
        lambda to, ident: merge_all(to, Shelf(id=ident, name="x")),
        r"merge\(\) would insert the Shelf",
    ),
    "merge without a key and without autoflush": (
        lambda to, ident: merge_unflushed(to, Shelf(name="x")),
        r"merge\(\) would insert the Shelf",
    ),
    "bulk_save_objects": (
        lambda to, ident: to.bulk_save_objects(iter([Shelf(name="x")])),
        r"bulk_save_objects\(\) would insert a Shelf that the next flush inserts as well",
    ),
}


@pytest.mark.parametrize("by", ["session", "Session", "the application's own Session", "another Session"])
@pytest.mark.parametrize("case", REFUSED)
def test_error_names_transient_when_an_object_has_added_itself_to(app, shelf_id, case, by):
    class Own(Session):
        pass

    call, message = REFUSED[case]
    own = SQLASessionMiddleware(app.app, app.engine, session_options={"class_": Own})
    scope = (own if by.startswith("the") else app).context()
    with scope, app.new_session() as another, pytest.raises(InvalidRequestError, match=message) as caught:
        call({"session": session, "another Session": another}.get(by, session()), shelf_id)
    assert "Shelf.transient(…)" in str(caught.value)
    with app.context():
        assert stored() == (["stored"], ["stored"])


def test_error_names_transient_when_another_session_merges_an_object_without_a_key(app, shelf_id):
    with app.context(), app.new_session() as another, pytest.raises(InvalidRequestError, match=r"transient\(…\)"):
        another.merge(Shelf(name="x"))
    with app.context():
        assert stored() == (["stored"], ["stored"])


def test_another_session_merges_what_was_flushed(app, shelf_id):
    with app.context(), app.new_session() as another:
        shelf = session.get(Shelf, shelf_id)
        Book(title="pending")
        merged = another.merge(shelf)
        assert (merged.id, object_session(merged)) == (shelf_id, another)


def test_merge_and_bulk_save_are_as_before_when_no_object_has_added_itself(app, shelf_id):
    with app.context():
        shelf = session.get(Shelf, shelf_id)
        # Pending as well, but not what is merged.
        Book(id=shelf_id + 100, title="pending")
        assert session.merge(shelf) is shelf
        # Without a primary key there is no row that could be meant.
        unkeyed = Shelf(name="new")
        assert session.merge(unkeyed) is unkeyed
        session.bulk_save_objects([Shelf.transient(name="bulk"), Plain(name="Ada")])
        merge_all_or_merge = getattr(session(), "merge_all", lambda instances: list(map(session.merge, instances)))
        assert merge_all_or_merge([shelf]) == [shelf]
        session.commit()
        assert stored() == (["bulk", "new", "stored"], ["pending", "stored"])
        Book(title="pending again")
        with pytest.raises(InvalidRequestError):
            session.merge("no object")
