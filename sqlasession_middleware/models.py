"""Models that know the global ``session``: a base class, and mixins for any other one.

.. code-block:: python

    class Guest(SavesItself, Model):
        __tablename__ = "guest"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

    with app.context():
        Guest(name="Ada")
        session.commit()
        ada = Guest.query.filter_by(name="Ada").one()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from sqlalchemy import event, inspect, select
from sqlalchemy.orm import DeclarativeBase, QueryPropertyDescriptor, object_session

from .errors import ScopeError
from .schema import metadata
from .sessions import session

if TYPE_CHECKING:
    from ._typing import selects_of_this_version

__all__ = ["Model", "Queries", "SavesItself"]


class Queries:
    """A mixin for mapped classes, however they are mapped: the class can be asked for its rows."""

    #: A :class:`~sqlalchemy.orm.Query` of the class on the current session, as in Werkzeug's pattern. SQLAlchemy calls
    #: it legacy; :meth:`select` is today's.
    query: ClassVar[QueryPropertyDescriptor] = session.query_property()

    if TYPE_CHECKING:
        select = selects_of_this_version
    else:

        @classmethod
        def select(cls):
            """``select(cls)``, for ``session.scalars()``."""
            return select(cls)

    @classmethod
    def get(cls, ident: Any, **options: Any) -> Self | None:
        """The object with a primary key, from the current session.

        :param ident: the key, a tuple or dict where it has several columns.
        :param options: of :meth:`sqlalchemy.orm.Session.get`.
        :raises ScopeError: outside of a scope.
        """
        return session.get(cls, ident, **options)


class SavesItself:
    """A mixin for mapped classes whose new objects are in the session of the scope that they are made in.

    It comes before the declarative base: ``class Guest(SavesItself, Model)``. With
    :class:`~sqlalchemy.orm.MappedAsDataclass` it works by ``__post_init__``, which a class with one of its own calls by
    ``super()``. Outside of a scope, and for objects that are loaded, nothing happens. What was made is written at the
    next flush, and stays if the transaction is committed.
    """

    def __init__(self, *arguments: Any, **values: Any) -> None:
        mapper = inspect(type(self), raiseerr=False)
        if mapper is not None and super(SavesItself, type(self)).__init__ is object.__init__:
            # SQLAlchemy gives its own to a class that has none, and has found this one.
            mapper.registry.constructor(self, *arguments, **values)
        else:
            super().__init__(*arguments, **values)
        _save(self)

    def __post_init__(self, *values: Any) -> None:
        following = getattr(super(), "__post_init__", None)
        if following is not None:
            following(*values)
        _save(self)


class Model(Queries, DeclarativeBase):
    """A declarative base on the shared :data:`~sqlasession_middleware.metadata`."""

    #: the tables of every application that was not given a metadata of its own
    metadata = metadata


def _save(made: object) -> None:
    try:
        opened = session()
    except ScopeError:
        return
    opened.add(made)


@event.listens_for(SavesItself, "init_failure", propagate=True)
def _forget(made: SavesItself, arguments: Any, values: Any) -> None:
    """An object whose constructor has failed, after it was saved, is none."""
    opened = object_session(made)
    if opened is None:
        return
    if made in opened.new:
        opened.expunge(made)
    else:
        opened.delete(made)  # The constructor has asked the database for something, and so it was written.
