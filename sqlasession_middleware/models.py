"""A declarative base and mixins for models that use the global ``session``.

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

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, Self
from weakref import ref

from sqlalchemy import event, inspect, select
from sqlalchemy.orm import DeclarativeBase, QueryPropertyDescriptor, object_session

from ._database.schema import metadata
from ._sessions.registry import current_scope, session
from ._sessions.templates import AddsItself
from .errors import ScopeError

if TYPE_CHECKING:
    from ._scope.scope import Scope
    from ._typing import selects_of_this_version

__all__ = ["Model", "Queries", "SavesItself", "transient_objects"]

#: the scope whose new objects are currently not added to its session. The reference is weak, because a step of a
#: response's body may leave it to the server's thread, where nothing may lead to the response.
_transient_in: ContextVar[ref[Scope] | None] = ContextVar("sqlasession_middleware.transient_in", default=None)


class Queries:
    """A mixin that lets a mapped class query its rows. The mapping may be declarative or imperative."""

    #: A :class:`~sqlalchemy.orm.Query` of the class on the current session, as in Werkzeug's pattern. SQLAlchemy calls
    #: it legacy; new code uses :meth:`select`.
    query: ClassVar[QueryPropertyDescriptor] = session.query_property()

    if TYPE_CHECKING:
        select = selects_of_this_version
    else:

        @classmethod
        def select(cls):
            """Return ``select(cls)``, for ``session.scalars()``."""
            return select(cls)

    @classmethod
    def get(cls, ident: Any, **options: Any) -> Self | None:
        """Return the object with the given primary key from the current session, or None.

        :param ident: the key; a tuple or dict if the key has several columns.
        :param options: passed to :meth:`sqlalchemy.orm.Session.get`.
        :raises ScopeError: outside of a scope.
        """
        return session.get(cls, ident, **options)


class SavesItself(AddsItself):
    """A mixin for mapped classes that adds each new object to the session of the current scope.

    List it before the declarative base: ``class Guest(SavesItself, Model)``. With
    :class:`~sqlalchemy.orm.MappedAsDataclass` the mixin uses ``__post_init__()``; a class that defines this method has
    to call ``super().__post_init__()``. Outside of a scope an object is not added. The next flush inserts the object,
    and a commit stores it. :meth:`transient` makes an object that is not added, such as one for ``session.merge()``.
    """

    def __init__(self, *arguments: Any, **values: Any) -> None:
        mapper = inspect(type(self), raiseerr=False)
        if mapper is not None and super(SavesItself, type(self)).__init__ is object.__init__:
            # SQLAlchemy adds its default constructor only to classes without a constructor, and this mixin has one.
            mapper.registry.constructor(self, *arguments, **values)
        else:
            super().__init__(*arguments, **values)
        _save(self)

    def __post_init__(self, *values: Any) -> None:
        following = getattr(super(), "__post_init__", None)
        if following is not None:
            following(*values)
        _save(self)

    @classmethod
    def transient(cls, *arguments: Any, **values: Any) -> Self:
        """Make an object that is not added to the session, in SQLAlchemy's terms a transient object.

        Objects that its constructor makes are not added either. Arguments are made before the call, so they are added:
        use :func:`transient_objects` to make several transient objects.

        :param arguments: and ``values``: the arguments of the constructor.
        """
        with transient_objects():
            return cls(*arguments, **values)


@contextmanager
def transient_objects() -> Iterator[None]:
    """Make objects of :class:`SavesItself` in a block without adding them to the session.

    Use it for code that makes objects itself, such as a factory or a schema that loads data, and for objects that refer
    to each other. It applies to the current scope: requests and contexts that begin in the block are not affected.
    """
    before = _transient_in.get()
    try:
        _transient_in.set(ref(current_scope()))
    except ScopeError:
        pass  # Outside of a scope no object is added anyway.
    try:
        yield
    finally:
        _transient_in.set(before)


class Model(Queries, DeclarativeBase):
    """A declarative base on the shared :data:`~sqlasession_middleware.metadata`."""

    #: the tables of all applications without a metadata of their own
    metadata = metadata


def _save(instance: object) -> None:
    try:
        transient_in = _transient_in.get()
        if transient_in is not None and transient_in() is current_scope():
            return
        orm_session = session()
    except ScopeError:
        return
    orm_session.add(instance)


@event.listens_for(SavesItself, "init_failure", propagate=True)
def _remove_failed(instance: SavesItself, arguments: Any, values: Any) -> None:
    """Remove an object from the session if its constructor fails after it was added."""
    orm_session = object_session(instance)
    if orm_session is None:
        return
    if instance in orm_session.new:
        orm_session.expunge(instance)
    else:
        orm_session.delete(instance)  # A query in the constructor has flushed the object.
