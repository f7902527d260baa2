"""A WebOb request with attributes and methods for its session.

.. code-block:: python

    @wsgify(RequestClass=Request)
    def show(request):
        guest = request.get_or_404(Guest, request.GET.get("id"))
        return Response(guest.name)
"""

from __future__ import annotations

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload
from urllib.parse import parse_qs

from sqlalchemy import Select, inspect
from sqlalchemy.exc import NoResultFound
from sqlalchemy.orm import Session

from ._database.binds import key_of_mapper
from ._database.values import read_value
from ._dependencies import current_object
from ._scope.local import application
from ._sessions.registry import session
from ._wsgi.webob import HTTPNotFound
from ._wsgi.webob import Request as WebObRequest
from .pages import KeysetPage, Page, check_statement, find_keyset_page, find_page

if TYPE_CHECKING:
    from sqlalchemy import Dialect

    from .middleware import SQLASessionMiddleware

__all__ = ["DatabaseRequest", "Request"]

Entity = TypeVar("Entity")

#: How many results a page has, if neither the application nor the client says it, and at most.
PER_PAGE, MAX_PER_PAGE = 20, 100
NO_PAGE = "There is no such page."

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
        dialect = self._dialect_of(entity)
        mapper = inspect(entity, raiseerr=True)
        columns = mapper.primary_key
        try:
            if isinstance(ident, dict):
                ident = [ident[mapper.get_property_by_column(column).key] for column in columns]
            parts = ident if isinstance(ident, tuple | list) else (ident,)
            key = tuple(read_value(part, column.type, dialect) for part, column in zip(parts, columns, strict=True))
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

    @overload
    def paginate(
        self,
        statement: Select[tuple[Entity]],
        *,
        page: int | None = ...,
        per_page: int | None = ...,
        max_per_page: int = ...,
        count: bool = ...,
    ) -> Page[Entity]: ...
    @overload
    def paginate(
        self,
        statement: Select[Entity],  # type: ignore[type-var, unused-ignore]
        *,
        page: int | None = ...,
        per_page: int | None = ...,
        max_per_page: int = ...,
        count: bool = ...,
    ) -> Page[Entity]: ...
    def paginate(
        self,
        statement: Any,
        *,
        page: int | None = None,
        per_page: int | None = None,
        max_per_page: int = MAX_PER_PAGE,
        count: bool = True,
    ) -> Page[Any]:
        """Return a page of a statement's results by its number.

        :param statement: selects one entity, or one column, in an order in which no two results have the same place.
        :param page: its number, from 1. The default is ``page`` in the query string of the request, or 1.
        :param per_page: how many results a page has. The default is ``per_page`` in the query string, or 20.
        :param max_per_page: how many a page has at most, whatever was asked for.
        :param count: whether to count all results, which takes another query unless this is the last page. The last
            page takes it in any case if a collection is loaded by a join.
        :raises Exception: :attr:`not_found_exception`, if there is no such page, or if a number is none. The first page
            may be empty.
        :raises TypeError: if it is no ``select()``, but a class or a ``Query``.
        """
        page = self._number("page", 1) if page is None else page
        per_page = self._number("per_page", PER_PAGE) if per_page is None else per_page
        try:
            return find_page(self.dbsession, statement, page, min(per_page, max_per_page), count)
        except LookupError:
            raise self.not_found_exception(NO_PAGE) from None

    @overload
    def paginate_by_key(
        self,
        statement: Select[tuple[Entity]],
        *,
        bookmark: str | None = ...,
        per_page: int | None = ...,
        max_per_page: int = ...,
    ) -> KeysetPage[Entity]: ...
    @overload
    def paginate_by_key(
        self,
        statement: Select[Entity],  # type: ignore[type-var, unused-ignore]
        *,
        bookmark: str | None = ...,
        per_page: int | None = ...,
        max_per_page: int = ...,
    ) -> KeysetPage[Entity]: ...
    def paginate_by_key(
        self,
        statement: Any,
        *,
        bookmark: str | None = None,
        per_page: int | None = None,
        max_per_page: int = MAX_PER_PAGE,
    ) -> KeysetPage[Any]:
        """Return a page of a statement's results by its place in their order.

        It takes one query, which is as fast for the last page as for the first, and no result is shown twice or left
        out when others are added before it. The extra ``pages`` has what it needs, sqlakeyset.

        :param statement: selects one entity, or one column, with an ``order_by()`` of columns that are never NULL. The
            last of them has to be unique, such as the primary key.
        :param bookmark: what the page beside it has as ``next`` or ``previous``. The default is ``bookmark`` in the
            query string, or that of the first page.
        :param per_page: and ``max_per_page``: as for :meth:`paginate`.
        :raises Exception: :attr:`not_found_exception`, if it is no bookmark of this statement, or a number is none.
        :raises ValueError: if the statement has no order.
        :raises TypeError: if it is no ``select()``, but a class or a ``Query``.
        :raises ImportError: if sqlakeyset is not installed.
        """
        bookmark = self._argument("bookmark", "") if bookmark is None else bookmark
        per_page = self._number("per_page", PER_PAGE) if per_page is None else per_page
        check_statement(statement, "paginate_by_key", Select)
        entity = statement.column_descriptions[0].get("entity")  # A column of a Table has none.
        try:
            return find_keyset_page(
                self.dbsession, statement, bookmark, min(per_page, max_per_page), self._dialect_of(entity)
            )
        except LookupError:
            raise self.not_found_exception(NO_PAGE) from None

    def _argument(self, name: str, default: str) -> str:
        """An argument of the query string."""
        text: str = self.environ.get("QUERY_STRING", "")
        return parse_qs(text, keep_blank_values=True).get(name, [default])[0]

    def _number(self, name: str, default: int) -> int:
        """A number in the query string; 0, which there is none of, if it is no number."""
        text = self._argument(name, str(default))
        return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else 0

    def _dialect_of(self, entity: type[Any] | None) -> Dialect:
        owner = self.application
        routing = getattr(owner, "routing", None)
        engine = owner.database_engine
        if routing is not None and entity is not None:
            engine = routing.source_of(key_of_mapper(entity), entity.__name__).engine
        return engine.dialect


class Request(DatabaseRequest, WebObRequest):
    """:class:`webob.request.Request` with the attributes and methods of :class:`DatabaseRequest`."""
