"""Pages of results: by their number, or by the key of the row where the page before them ends.

:class:`~sqlasession_middleware.request.DatabaseRequest` reads from the request which page is asked for: :doc:`models`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Generic, TypeVar

from sqlalchemy import Dialect, Result, Select, func, select
from sqlalchemy.exc import DBAPIError, StatementError
from sqlalchemy.orm import Session, lazyload
from sqlalchemy.sql.expression import GenerativeSelect

from ._database.values import check_value
from ._dependencies import repeats_entities

__all__ = ["KeysetPage", "Page"]

Item = TypeVar("Item")

#: No server takes a larger OFFSET.
_LARGEST_OFFSET = 2**63 - 1


@dataclass(frozen=True)
class Page(Generic[Item]):
    """A page of results by its number. Its attributes are those of Flask-SQLAlchemy's ``Pagination``.

    :param items: what is on it.
    :param page: its number, from 1.
    :param per_page: how many items a page has.
    :param has_next: whether there is another page after it.
    :param total: how many items all pages have; None if they were not counted.
    """

    items: Sequence[Item]
    page: int
    per_page: int
    has_next: bool
    total: int | None

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    @property
    def pages(self) -> int | None:
        """How many pages there are; None if the items were not counted."""
        return None if self.total is None else ceil(self.total / self.per_page)

    @property
    def has_prev(self) -> bool:
        """Whether there is a page before it."""
        return self.page > 1

    @property
    def prev_num(self) -> int | None:
        """The number of the page before it; None if there is none."""
        return self.page - 1 if self.has_prev else None

    @property
    def next_num(self) -> int | None:
        """The number of the page after it; None if there is none."""
        return self.page + 1 if self.has_next else None

    @property
    def first(self) -> int:
        """The number of its first item, from 1; 0 if there is none."""
        return (self.page - 1) * self.per_page + 1 if self.items else 0

    @property
    def last(self) -> int:
        """The number of its last item."""
        return self.first + len(self.items) - 1 if self.items else 0

    def iter_pages(
        self, *, left_edge: int = 2, left_current: int = 2, right_current: int = 4, right_edge: int = 2
    ) -> Iterator[int | None]:
        """The numbers of pages for links, with a None where numbers are left out.

        :param left_edge: how many of the first pages; and ``right_edge``, of the last ones.
        :param left_current: how many pages before this one; and ``right_current``, after it.
        """
        last = 0
        for number in range(1, (self.pages or 0) + 1):
            is_near = self.page - left_current <= number <= self.page + right_current
            if number <= left_edge or is_near or number > (self.pages or 0) - right_edge:
                if number != last + 1:
                    yield None
                yield number
                last = number


@dataclass(frozen=True)
class KeysetPage(Generic[Item]):
    """A page of results by its place in their order.

    :param items: what is on it.
    :param per_page: how many items a page has.
    :param next: the bookmark of the page after it; None if there is none.
    :param previous: the bookmark of the page before it; None if there is none.
    """

    items: Sequence[Item]
    per_page: int
    next: str | None
    previous: str | None

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)


def check_statement(statement: object, method: str, kind: type[GenerativeSelect]) -> None:
    """Refuse what is no statement that a page can be made of.

    :raises TypeError: naming the method.
    """
    if not isinstance(statement, kind):
        found = statement if isinstance(statement, type) else type(statement)
        raise TypeError(
            f"{method}() needs a select(), got {found.__name__}:"
            " pass a statement such as 'select(Guest).order_by(Guest.id)'."
        )


def _read(session: Session, statement: Select[Any]) -> tuple[Result[Any], bool]:
    """Return its result, and whether an item of it may be several rows of the statement."""
    # Elsewhere unique() would take rows away that the statement has, such as equal values of a column. The page would
    # then be too short, and seem to be the last one.
    result = session.execute(statement)
    return (result.unique(), True) if repeats_entities(result) else (result, False)


def find_page(session: Session, statement: Select[Any], page: int, per_page: int, count: bool) -> Page[Any]:
    """Query a page by its number.

    :raises LookupError: if there is no such page.
    :raises TypeError: if it is no select().
    """
    check_statement(statement, "paginate", GenerativeSelect)
    before = (page - 1) * per_page
    if page < 1 or per_page < 1 or before + per_page > _LARGEST_OFFSET:
        raise LookupError
    # One more tells whether there is another page.
    result, is_merged = _read(session, statement.limit(per_page + 1).offset(before))
    items = result.scalars().all()
    if not items and page > 1:
        raise LookupError
    has_next = len(items) > per_page
    total = None
    if not has_next and not is_merged:
        total = before + len(items)
    elif count or not has_next:
        counted = statement.options(lazyload("*")).order_by(None).subquery()
        total = session.scalars(select(func.count()).select_from(counted)).one()
        has_next = has_next or total > before + per_page
    return Page(items[:per_page], page, per_page, has_next, total if count else None)


def find_keyset_page(
    session: Session, statement: Select[Any], bookmark: str, per_page: int, dialect: Dialect
) -> KeysetPage[Any]:
    """Query a page by the bookmark that the page beside it had.

    :param bookmark: empty for the first page.
    :raises LookupError: if it is no bookmark of this statement.
    :raises ValueError: if the statement has no order.
    """
    try:
        from sqlakeyset import Paging, serialize_bookmark, unserialize_bookmark
        from sqlakeyset.paging import prepare_paging
    except ImportError as error:
        raise ImportError("paginate_by_key() needs sqlakeyset: pip install 'sqlasession_middleware[pages]'") from error
    if per_page < 1:
        raise LookupError
    try:
        place, backwards = unserialize_bookmark(bookmark)
    except (ValueError, csv.Error, StopIteration) as error:
        raise LookupError from error

    def prepare(place: tuple[Any, ...] | None) -> Any:
        return prepare_paging(statement, per_page, place, backwards, orm=False, dialect=dialect)

    # Not select_page(): it asks the database for the names of the columns first.
    prepared = prepare(None)
    columns = prepared.order_columns
    if not columns:
        raise ValueError(
            "paginate_by_key() needs a statement with order_by(): the last column makes each row's key unique."
        )
    if place is not None:
        try:
            kinds = [each.comparable_value.type for each in columns]
            place = tuple(check_value(*pair, dialect) for pair in zip(place, kinds, strict=True))
            prepared = prepare(place)
        except (TypeError, ValueError) as error:
            raise LookupError from error
    try:
        rows = _read(session, prepared.select)[0].all()
    except StatementError as error:
        if place is None or isinstance(error, DBAPIError):
            raise
        raise LookupError from error  # A type of the application's own does not take the value.
    places = [tuple(each.get_from_row(row) for each in prepared.mapped_order_columns) for row in rows]
    paging = Paging([row[0] for row in rows], per_page, backwards, place, places)
    return KeysetPage(
        paging.rows,
        per_page,
        serialize_bookmark(paging.next) if paging.has_next else None,
        serialize_bookmark(paging.previous) if paging.has_previous else None,
    )
