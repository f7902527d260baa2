"""A WebOb request that knows its session.

.. code-block:: python

    @wsgify(RequestClass=Request)
    def show(request):
        guest = request.get_or_404(Guest, request.GET.get("id"))
        return Response(guest.name)
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload
from uuid import UUID

from sqlalchemy import BigInteger, Dialect, Enum, Integer, SmallInteger, String, Uuid, inspect
from sqlalchemy.exc import NoResultFound
from sqlalchemy.orm import Session
from sqlalchemy.types import TypeEngine

from ._webob import HTTPNotFound
from ._webob import Request as WebObRequest
from .binds import key_of_mapper
from .context import application
from .sessions import session

if TYPE_CHECKING:
    from sqlalchemy import Select

    from .middleware import SQLASessionMiddleware

__all__ = ["DatabaseRequest", "Request"]

Entity = TypeVar("Entity")


class DatabaseRequest:
    """A mixin for requests that are made from an environ, as WebOb's and Pyramid's are."""

    environ: dict[str, Any]

    @property
    def dbsession(self) -> Session:
        """The scope's Session, by the name that Pyramid's cookiecutters gave it. Opened at first use.

        :raises ScopeError: outside of a scope.
        """
        return session()

    @property
    def application(self) -> SQLASessionMiddleware:
        """The middleware that owns the scope.

        :raises RuntimeError: outside of a scope.
        """
        return cast("SQLASessionMiddleware", application._get_current_object())  # type: ignore[attr-defined]

    @property
    def attempt(self) -> int:
        """The number of the attempt at this request, from 1; see :doc:`transactions`."""
        return int(self.environ.get("sqlasession.attempt", 1))

    def get_or_404(self, entity: type[Entity], ident: Any, **options: Any) -> Entity:
        """The object with a primary key.

        :param ident: the key, a tuple or dict where it has several columns. A text, as it comes from a URL, may stand
            for a whole number or a UUID; None, and what cannot be a key, is not found, and the database is not asked
            for it.
        :param options: of :meth:`sqlalchemy.orm.Session.get`.
        :raises webob.exc.HTTPNotFound: if there is none.
        """
        owner = self.application
        routing = getattr(owner, "routing", None)
        engine = owner.database_engine
        if routing is not None:
            engine = routing.engine_of(key_of_mapper(entity), entity.__name__)
        mapper = inspect(entity, raiseerr=True)
        columns = mapper.primary_key
        try:
            if isinstance(ident, dict):
                ident = [ident[mapper.get_property_by_column(column).key] for column in columns]
            parts = ident if isinstance(ident, tuple | list) else (ident,)
            key = tuple(_read(part, column.type, engine.dialect) for part, column in zip(parts, columns, strict=True))
        except (LookupError, TypeError, ValueError):
            found = None
        else:
            found = self.dbsession.get(entity, key, **options)
        if found is None:
            raise HTTPNotFound(f"There is no {entity.__name__.lower()} of that key.")
        return found

    # As SQLAlchemy 2.0 types statements, and as 2.1 does.
    @overload
    def one_or_404(self, statement: Select[tuple[Entity]]) -> Entity: ...
    @overload
    def one_or_404(self, statement: Select[Entity]) -> Entity: ...  # type: ignore[type-var, unused-ignore]
    def one_or_404(self, statement: Any) -> Any:
        """The only result of a statement.

        :raises webob.exc.HTTPNotFound: if there is none.
        :raises sqlalchemy.exc.MultipleResultsFound: if there are several: that is no matter of the client's.
        """
        try:
            return self.dbsession.scalars(statement).unique().one()
        except NoResultFound:
            raise HTTPNotFound("There is nothing of that kind.") from None


class Request(DatabaseRequest, WebObRequest):
    """WebOb's request, with the mixin."""


#: How many bits a server's integers have beside the sign. SQLite's have 63 whatever they are called, and MySQL and
#: MariaDB have some without a sign, and know that no row has a number that is too large.
_BITS: Sequence[tuple[type[Any], int]] = ((SmallInteger, 15), (BigInteger, 63), (Integer, 31))
_BITS_OF_ALL = {"sqlite": 63, "mysql": 64, "mariadb": 64}


def _read(part: Any, declared: TypeEngine[Any], dialect: Dialect) -> Any:
    """A part of a key, as its column has it.

    :raises ValueError: if no row can have it: some databases would fail the transaction for the question, and others
        find a row of another key.
    :raises TypeError: likewise.
    """
    kind = declared.dialect_impl(dialect)  # with_variant() may have given this database another one.
    if part is None:
        raise ValueError
    if isinstance(kind, Integer):
        number = int(part) if isinstance(part, str) else index(part)
        bits = _BITS_OF_ALL.get(dialect.name) or next(bits for integer, bits in _BITS if isinstance(kind, integer))
        if not -(1 << bits) <= number < 1 << bits:
            raise ValueError
        return number
    if isinstance(kind, Uuid):
        known = part if isinstance(part, UUID) else UUID(_read_text(part, dialect))
        return known if kind.as_uuid else str(known)
    if isinstance(kind, Enum):
        if not (kind.enum_class and isinstance(part, kind.enum_class)) and part not in kind.enums:
            raise ValueError
        return part
    return _read_text(part, dialect) if isinstance(kind, String) else part


def _read_text(part: Any, dialect: Dialect) -> str:
    if not isinstance(part, str) or ("\0" in part and dialect.name == "postgresql"):
        raise ValueError
    part.encode()  # What is no Unicode cannot be sent.
    return part
