"""A WebOb request with attributes and methods for its session.

.. code-block:: python

    @wsgify(RequestClass=Request)
    def show(request):
        guest = request.get_or_404(Guest, request.GET.get("id"))
        return Response(guest.name)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload
from uuid import UUID

from sqlalchemy import BigInteger, Dialect, Enum, Integer, SmallInteger, String, Uuid, inspect
from sqlalchemy.exc import NoResultFound
from sqlalchemy.orm import Session
from sqlalchemy.types import TypeEngine

from ._database.binds import key_of_mapper
from ._dependencies import current_object
from ._drivers.registry import driver_by_dialect
from ._scope.local import application
from ._sessions.registry import session
from ._wsgi.webob import HTTPNotFound
from ._wsgi.webob import Request as WebObRequest

if TYPE_CHECKING:
    from sqlalchemy import Select

    from .middleware import SQLASessionMiddleware

__all__ = ["DatabaseRequest", "Request"]

Entity = TypeVar("Entity")

#: The exception that a framework renders as its 404, by the top package of the framework's request class. A framework
#: renders the exceptions of others as a 500.
_NOT_FOUND: Mapping[str, str] = {
    "django": "django.http:Http404",
    "pyramid": "pyramid.httpexceptions:HTTPNotFound",
    "werkzeug": "werkzeug.exceptions:NotFound",
}


class DatabaseRequest:
    """A mixin for request classes with an ``environ``, such as those of WebOb, Pyramid, Werkzeug, Flask and Django."""

    environ: dict[str, Any]
    #: The class of the exception that :meth:`get_or_404` and :meth:`one_or_404` raise. It is called with one argument,
    #: a text. The default is the 404 of the framework whose request class this mixin is combined with: Pyramid's,
    #: Werkzeug's (which is Flask's) or Django's, otherwise WebOb's. Set it for other frameworks.
    not_found_exception: type[Exception] = HTTPNotFound

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.not_found_exception is not DatabaseRequest.not_found_exception:
            return  # This class, or one of its bases, has set it.
        for base in cls.__mro__:
            name = _NOT_FOUND.get(base.__module__.partition(".")[0])
            if name is not None:
                cls.not_found_exception = resolve_name(name)
                return

    @property
    def dbsession(self) -> Session:
        """The scope's Session, opened at first use. Pyramid's cookiecutters use this name.

        :raises ScopeError: outside of a scope.
        """
        return session()

    @property
    def application(self) -> SQLASessionMiddleware:
        """The middleware that owns the scope.

        :raises RuntimeError: outside of a scope.
        """
        return cast("SQLASessionMiddleware", current_object(application))

    @property
    def attempt(self) -> int:
        """The number of this attempt at the request, starting at 1; see :doc:`transactions`."""
        return int(self.environ.get("sqlasession.attempt", 1))

    def get_or_404(self, entity: type[Entity], ident: Any, **options: Any) -> Entity:
        """Return the object with the given primary key.

        :param ident: the key; a tuple or dict if the key has several columns. A string, as found in a URL, is converted
            to an integer or a UUID where the column has one. The database is not queried for None, nor for a value that
            the column cannot hold: there is no such object.
        :param options: passed to :meth:`sqlalchemy.orm.Session.get`.
        :raises Exception: :attr:`not_found_exception`, if there is no such object.
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
            raise self.not_found_exception(f"There is no {entity.__name__.lower()} with that key.")
        return found

    # The first overload is for the types of SQLAlchemy 2.0, the second one for those of 2.1.
    @overload
    def one_or_404(self, statement: Select[tuple[Entity]]) -> Entity: ...
    @overload
    def one_or_404(self, statement: Select[Entity]) -> Entity: ...  # type: ignore[type-var, unused-ignore]
    def one_or_404(self, statement: Any) -> Any:
        """Return the only result of a statement.

        :raises Exception: :attr:`not_found_exception`, if there is no result.
        :raises sqlalchemy.exc.MultipleResultsFound: if there are several. This is not an error of the client.
        """
        try:
            return self.dbsession.scalars(statement).unique().one()
        except NoResultFound:
            raise self.not_found_exception("There is no such object.") from None


class Request(DatabaseRequest, WebObRequest):
    """:class:`webob.request.Request` with the attributes and methods of :class:`DatabaseRequest`."""


#: The number of bits of an integer, not counting the sign, for servers where it depends on the type.
_BITS: Sequence[tuple[type[Any], int]] = ((SmallInteger, 15), (BigInteger, 63), (Integer, 31))


def _read(part: Any, declared: TypeEngine[Any], dialect: Dialect) -> Any:
    """Convert a part of a key to the type of its column.

    :raises ValueError: if no row can have it: some databases would fail the transaction for the question, and others
        find a row of another key.
    :raises TypeError: if it is of another type than the column.
    """
    kind = declared.dialect_impl(dialect)  # with_variant() may set another type for this database.
    if part is None:
        raise ValueError
    if isinstance(kind, Integer):
        number = int(part) if isinstance(part, str) else index(part)
        bits = driver_by_dialect[type(dialect)].server.integer_bits
        bits = bits or next(bits for integer, bits in _BITS if isinstance(kind, integer))
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
    if not isinstance(part, str) or ("\0" in part and not driver_by_dialect[type(dialect)].server.accepts_nul):
        raise ValueError
    part.encode()  # A text with lone surrogates cannot be sent.
    return part
