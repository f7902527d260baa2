"""Pages of results, as a client asks for them: by numbers, and by bookmarks."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable, Iterator
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple
from urllib.parse import quote
from uuid import UUID

import flask
import pytest
from sqlalchemy import (
    BigInteger,
    Dialect,
    Enum,
    ForeignKey,
    MetaData,
    Numeric,
    String,
    TypeDecorator,
    Uuid,
    func,
    literal_column,
    select,
    text,
    union_all,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, contains_eager, joinedload, mapped_column, relationship
from sqlalchemy.types import UserDefinedType
from webob import Response
from webob.dec import wsgify
from webob.exc import HTTPNotFound
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware._database.values import check_value
from sqlasession_middleware.pages import KeysetPage, Page
from sqlasession_middleware.request import DatabaseRequest, Request
from sqlasession_middleware.testing import assert_queries

from .conftest import DATABASES, DATABASES_SEEN

metadata = MetaData()


class Base(DeclarativeBase):
    metadata = metadata


class Even(TypeDecorator[int]):
    """A type of the application's own, which does not take every value."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> int:
        if value % 2:
            raise ValueError("odd")
        return int(value)


class Kind(enum.Enum):
    tea = 1
    mate = 2


class Cup(Base):
    __tablename__ = "paged_cup"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(20))
    price: Mapped[Decimal] = mapped_column(Numeric(10, 2))
    weight: Mapped[float]
    is_full: Mapped[bool]
    made: Mapped[datetime]
    day: Mapped[date]
    token: Mapped[UUID] = mapped_column(Uuid)
    even: Mapped[int] = mapped_column(Even)
    kind: Mapped[Kind] = mapped_column(Enum(Kind, name="paged_kind"))
    sips: Mapped[list[Sip]] = relationship()


class Sip(Base):
    __tablename__ = "paged_sip"
    id: Mapped[int] = mapped_column(primary_key=True)
    cup_id: Mapped[int] = mapped_column(ForeignKey(Cup.id))


COUNT = 7


def cups() -> Iterator[Cup]:
    for number in range(1, COUNT + 1):
        yield Cup(
            id=number,
            name=f"cup~{number % 3}\n\\",  # What separates the values of a bookmark.
            price=Decimal(number) / 4,
            weight=number / 8,
            is_full=bool(number % 2),
            made=datetime(2026, 11, 27) + timedelta(hours=number),
            day=date(2026, 11, 27) + timedelta(days=number),
            token=UUID(int=number),
            even=2 * number,
            kind=Kind(1 + number % 2),
            sips=[Sip(), Sip()],
        )


@pytest.fixture(scope="module", params=DATABASES)
def app(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SQLASessionMiddleware]:
    """One with seven cups, for all tests on a database: none of them commits."""
    url = DATABASES_SEEN.url(request.param, f"sqlite:///{tmp_path_factory.mktemp('pages')}/test.db")
    app = SQLASessionMiddleware(lambda environ, start_response: [], url, metadata=metadata)
    app.drop_database()
    app.init_database()
    with app.context():
        session.add_all(cups())
        session.commit()
    yield app
    app.drop_database()
    app.dispose()


@pytest.fixture
def scope(app: SQLASessionMiddleware) -> Iterator[SQLASessionMiddleware]:
    with app.context():
        yield app
        # A page that there is not must not spoil the transaction of the page that says so.
        assert session.scalar(text("SELECT 1")) == 1


BY_ID = select(Cup).order_by(Cup.id)


def ids(page: Page[Cup] | KeysetPage[Cup]) -> list[int]:
    return [cup.id for cup in page]


# -- by numbers


class Numbered(NamedTuple):
    """A query string, the options of the application, and the page: its items, and what it says of itself."""

    query: str
    options: dict[str, Any]
    ids: list[int]
    says: dict[str, Any]


ALL = list(range(1, COUNT + 1))
NUMBERED = {
    "the first is the default": Numbered(
        "", {"per_page": 3}, ALL[:3], {"page": 1, "has_prev": False, "prev_num": None, "next_num": 2, "total": 7}
    ),
    "the client names one": Numbered(
        "?page=2", {"per_page": 3}, ALL[3:6], {"has_prev": True, "prev_num": 1, "pages": 3, "first": 4, "last": 6}
    ),
    "the last": Numbered(
        "?page=3", {"per_page": 3}, ALL[6:], {"has_next": False, "next_num": None, "total": 7, "first": 7, "last": 7}
    ),
    "the last is full": Numbered("", {"per_page": 7}, ALL, {"has_next": False, "total": 7, "pages": 1}),
    "the client names the size": Numbered("?per_page=2&page=4", {}, [7], {"per_page": 2, "pages": 4}),
    "the size has a limit": Numbered("?per_page=9999", {"max_per_page": 5}, ALL[:5], {"per_page": 5, "pages": 2}),
    "the default size": Numbered("", {}, ALL, {"per_page": 20}),
    "the default limit": Numbered("?per_page=99999999", {}, ALL, {"per_page": 100}),
    "the application names both": Numbered("?page=1&per_page=1", {"page": 2, "per_page": 4}, ALL[4:], {"page": 2}),
    "nothing is counted": Numbered(
        "?page=2", {"per_page": 3, "count": False}, ALL[3:6], {"has_next": True, "total": None, "pages": None}
    ),
    "of several values the first": Numbered("?page=2&page=x", {"per_page": 3}, ALL[3:6], {}),
}


@pytest.mark.parametrize("case", NUMBERED)
def test_page_is_that_of_its_number(scope: Any, case: str) -> None:
    query, options, expected, says = NUMBERED[case]
    page = Request.blank(f"/{query}").paginate(BY_ID, **options)
    assert ids(page) == expected
    assert {name: getattr(page, name) for name in says} == says


def test_first_page_is_empty_when_there_is_nothing(scope: Any) -> None:
    page = Request.blank("/").paginate(BY_ID.where(Cup.id < 0))
    assert (page.items, page.total, page.pages, page.first, page.last, page.has_next) == ([], 0, 0, 0, 0, False)
    assert list(page.iter_pages()) == []


NO_PAGES = [
    "0",
    "-1",
    "4",
    "abc",
    "1.5",
    "",
    "%FF",
    "%00",
    "1_0",
    "+1",
    "\N{ARABIC-INDIC DIGIT ONE}",
    "9" * 19,
    "9" * 5000,
]


@pytest.mark.parametrize("number", NO_PAGES, ids=ascii)
@pytest.mark.parametrize("name", ["page", "per_page"])
def test_there_is_no_such_page_when_the_number_is_none(scope: Any, name: str, number: str) -> None:
    query = f"?{name}={quote(number, safe='%')}"
    if name == "per_page" and number in ("4", "9" * 19):
        query += "&page=3"
    with pytest.raises(HTTPNotFound) as caught:
        Request.blank(f"/{query}").paginate(BY_ID, **({"per_page": 3} if name == "page" else {}))
    assert caught.value.detail == "There is no such page."


def test_rows_are_counted_by_another_query_only_where_that_is_needed(scope: Any) -> None:
    for query, options, count in (("?page=1", {}, 2), ("?page=3", {}, 1), ("?page=1", {"count": False}, 1)):
        with assert_queries(count):
            Request.blank(f"/{query}").paginate(BY_ID, per_page=3, **options)


def test_each_entity_is_one_item_when_others_are_joined(scope: Any) -> None:
    page = Request.blank("/").paginate(BY_ID.options(joinedload(Cup.sips)), per_page=2)
    assert ids(page) == [1, 2]
    assert page.total == COUNT
    with assert_queries(0):
        assert [len(cup.sips) for cup in page] == [2, 2]
    keyed = Request.blank("/").paginate_by_key(BY_ID.options(joinedload(Cup.sips)), per_page=2)
    assert ids(keyed) == [1, 2]


def test_items_are_values_when_a_column_is_selected(scope: Any) -> None:
    names = select(Cup.name).distinct().order_by(Cup.name)
    page = Request.blank("/").paginate(names, per_page=2)
    assert (page.items, page.total) == (["cup~0\n\\", "cup~1\n\\"], 3)
    keyed = Request.blank("/").paginate_by_key(names, per_page=2)
    assert keyed.items == page.items
    assert keyed.next is not None
    assert Request.blank("/").paginate_by_key(names, bookmark=keyed.next).items == ["cup~2\n\\"]


JOINED = select(Cup).join(Cup.sips)


def test_no_row_is_lost_when_the_statement_has_an_entity_twice(scope: Any) -> None:
    """pallets-eco/flask-sqlalchemy#804, fedora-infra/bodhi#4130, galaxyproject/galaxy#16016."""
    pages = [Request.blank("/").paginate(JOINED.order_by(Cup.id), page=number, per_page=4) for number in (1, 2, 3, 4)]
    assert [ids(page) for page in pages] == [[1, 1, 2, 2], [3, 3, 4, 4], [5, 5, 6, 6], [7, 7]]
    assert [page.has_next for page in pages] == [True, True, True, False]
    assert {page.total for page in pages} == {2 * COUNT}
    first = Request.blank("/").paginate_by_key(JOINED.order_by(Cup.id, Sip.id), per_page=3)
    assert ids(first) == [1, 1, 2]
    second = Request.blank("/").paginate_by_key(JOINED.order_by(Cup.id, Sip.id), per_page=3, bookmark=first.next)
    assert ids(second) == [2, 3, 3]
    with_sips = Request.blank("/").paginate(BY_ID.where(Cup.sips.any()), per_page=4)
    assert (ids(with_sips), with_sips.total, with_sips.has_next) == ([1, 2, 3, 4], COUNT, True)


@pytest.mark.parametrize("count", [True, False])
@pytest.mark.parametrize("load", [joinedload, contains_eager])
def test_next_page_is_not_lost_when_rows_are_merged(scope: Any, load: Any, count: bool) -> None:
    statement = JOINED.options(load(Cup.sips)).order_by(Cup.id)
    read = set()
    for number in range(1, 2 * COUNT):
        page = Request.blank("/").paginate(statement, page=number, per_page=2, count=count)
        read |= set(ids(page))
        assert page.total == (2 * COUNT if count else None)
        if not page.has_next:
            break
    assert (sorted(read), number) == (ALL, COUNT)


def test_equal_values_of_a_column_are_items_of_their_own(scope: Any) -> None:
    names = select(Cup.name).order_by(Cup.id)
    page = Request.blank("/").paginate(names, per_page=5)
    assert (len(page.items), page.has_next, page.total) == (5, True, COUNT)
    assert len(Request.blank("/").paginate(names, per_page=9).items) == COUNT


def test_column_of_a_table_is_paged_by_its_key(scope: Any) -> None:
    column = Cup.__table__.c.id
    assert Request.blank("/").paginate_by_key(select(column).order_by(column), per_page=2).items == [1, 2]


def test_items_of_a_union_have_numbers(scope: Any) -> None:
    both: Any = union_all(select(Cup.id), select(Sip.id))
    page = Request.blank("/").paginate(both.order_by("id"), per_page=2)
    assert (page.items, page.total) == ([1, 1], 3 * COUNT)


#: What is no statement, as those bring it along who know Flask-SQLAlchemy, and what the error calls it.
NO_STATEMENTS: dict[str, tuple[Callable[[], Any], str]] = {
    "a class": (lambda: Cup, "Cup"),
    "a query": (lambda: session().query(Cup), "Query"),
    "a list": (list, "list"),
    "a text": (lambda: text("SELECT 1"), "TextClause"),
}


@pytest.mark.parametrize("method", ["paginate", "paginate_by_key"])
@pytest.mark.parametrize("case", NO_STATEMENTS)
def test_error_says_what_a_page_is_made_of(scope: Any, case: str, method: str) -> None:
    make, name = NO_STATEMENTS[case]
    with pytest.raises(TypeError) as caught:
        getattr(Request.blank("/"), method)(make())
    assert str(caught.value) == (
        f"{method}() needs a select(), got {name}: pass a statement such as 'select(Guest).order_by(Guest.id)'."
    )


def test_union_has_no_bookmarks(scope: Any) -> None:
    request: Any = Request.blank("/")
    with pytest.raises(TypeError, match=r"^paginate_by_key\(\) needs a select\(\), got CompoundSelect: "):
        request.paginate_by_key(union_all(select(Cup.id), select(Sip.id)))


def test_numbers_are_left_out_when_there_are_many() -> None:
    page = Page([object()], page=10, per_page=1, has_next=True, total=20)
    assert list(page.iter_pages()) == [1, 2, None, 8, 9, 10, 11, 12, 13, 14, None, 19, 20]
    assert list(page.iter_pages(left_edge=0, left_current=0, right_current=0, right_edge=1)) == [None, 10, None, 20]
    assert list(Page([], page=1, per_page=1, has_next=False, total=None).iter_pages()) == []


# -- by bookmarks

ORDERS: dict[str, tuple[Any, ...]] = {
    "the key": (Cup.id,),
    "downwards": (Cup.id.desc(),),
    "a text": (Cup.name, Cup.id),
    "mixed": (Cup.name.desc(), Cup.id),
    "a decimal": (Cup.price.desc(), Cup.id),
    "a float": (Cup.weight, Cup.id),
    "a boolean": (Cup.is_full, Cup.id),
    "a time": (Cup.made, Cup.id),
    "a date": (Cup.day.desc(),),
    "a UUID": (Cup.token,),
    "a type of its own": (Cup.even,),
    "an expression": (func.lower(Cup.name), Cup.id),
    "an expression without a type": (literal_column("paged_cup.id").label("place"),),
}


@pytest.mark.parametrize("order", ORDERS)
def test_each_row_is_on_one_page_whichever_way_they_are_read(scope: Any, order: str) -> None:
    statement = select(Cup).order_by(*ORDERS[order])
    expected = [cup.id for cup in session.scalars(statement)]
    read: list[int] = []
    bookmark: str | None = ""
    pages: list[list[int]] = []
    while bookmark is not None and len(pages) < COUNT:
        request = Request.blank(f"/?bookmark={quote(bookmark)}&per_page=3")
        with assert_queries(1):
            page = request.paginate_by_key(statement)
        pages.append(ids(page))
        read += pages[-1]
        bookmark, previous = page.next, page.previous
    assert read == expected
    assert [len(each) for each in pages] == [3, 3, 1]
    assert previous is not None
    back = Request.blank("/").paginate_by_key(statement, bookmark=previous, per_page=3)
    assert ids(back) == pages[1]
    assert back.previous is not None
    first = Request.blank("/").paginate_by_key(statement, bookmark=back.previous, per_page=3)
    assert (ids(first), first.previous) == (pages[0], None)


def test_no_row_is_shown_twice_when_others_come_before_it(scope: Any) -> None:
    newest = select(Cup).order_by(Cup.id.desc())
    first = Request.blank("/").paginate_by_key(newest, per_page=3)
    session.add(next(cups()).__class__(**{**values_of(next(cups())), "id": COUNT + 1}))
    session.flush()
    second = Request.blank("/").paginate_by_key(newest, bookmark=first.next, per_page=3)
    assert (ids(first), ids(second)) == ([7, 6, 5], [4, 3, 2])
    session.rollback()


def values_of(cup: Cup) -> dict[str, Any]:
    return {name: value for name, value in vars(cup).items() if not name.startswith("_") and name != "sips"}


#: Bookmarks that are none, or of another statement, for an order by these columns.
BAD: list[tuple[tuple[Any, ...], str]] = [
    *(
        ((Cup.id,), bookmark)
        for bookmark in (
            *("x", "1", "\0", "\N{SNOWMAN}", ">", "<<", ">i:", ">i:x", ">i:1~i:2", ">i:1.5", ">q:1", ">~"),
            *(">x", ">true", ">s:a", ">f:1.0", ">n:1", ">d:2026-01-01", ">b:AAAA", ">b:A", ">i:" + "9" * 30),
            *(">i:" + "9" * 5000, '>"', ">s:\\", ">uuid:1", ">dt:x", ">t:x"),
        )
    ),
    *(((Cup.name, Cup.id), bookmark) for bookmark in (">i:1~i:1", ">s:a", ">s:\ud800~i:1", ">x~i:1")),
    *(((Cup.weight, Cup.id), bookmark) for bookmark in (">f:nan~i:1", ">f:inf~i:1", ">i:1~i:1", ">true~i:1")),
    *(((Cup.price, Cup.id), bookmark) for bookmark in (">n:NaN~i:1", ">n:x~i:1", ">f:1.0~i:1")),
    *(((Cup.is_full, Cup.id), bookmark) for bookmark in (">i:1~i:1", ">x~i:1")),
    *(((Cup.made, Cup.id), bookmark) for bookmark in (">s:now~i:1", ">d:2026-01-01~i:1")),
    *(((Cup.token,), bookmark) for bookmark in (">s:x", ">i:1")),
    *(((Cup.even,), bookmark) for bookmark in (">i:3", ">s:x")),
    *(((Cup.kind, Cup.id), bookmark) for bookmark in (">s:x~i:1", ">i:1~i:1")),
]
#: Those among them that begin at the first or the last row.
GOOD = (">",)


@pytest.mark.parametrize("number", range(len(BAD)))
def test_there_is_no_such_page_when_the_bookmark_is_none(scope: Any, number: int) -> None:
    order, bookmark = BAD[number]
    statement = select(Cup).order_by(*order)
    if bookmark in GOOD:
        assert len(Request.blank(f"/?bookmark={quote(bookmark)}").paginate_by_key(statement).items) == COUNT
        return
    with pytest.raises(HTTPNotFound) as caught:
        Request.blank("/").paginate_by_key(statement, bookmark=bookmark)
    assert caught.value.detail == "There is no such page."
    if bookmark.isprintable():  # Other texts come as replacement characters.
        with pytest.raises(HTTPNotFound):
            Request.blank(f"/?bookmark={quote(bookmark)}").paginate_by_key(statement)


def test_nul_in_a_bookmark_is_no_error_of_the_database(scope: SQLASessionMiddleware) -> None:
    statement, request = select(Cup).order_by(Cup.name, Cup.id), Request.blank("/?bookmark=%3Es%3Aa%00~i%3A1")
    if scope.engine.dialect.name == "postgresql":
        with pytest.raises(HTTPNotFound):
            request.paginate_by_key(statement)
    else:
        assert len(request.paginate_by_key(statement).items) == COUNT


@pytest.mark.parametrize("size", ["0", "x"])
def test_there_is_no_such_page_when_its_size_is_none(scope: Any, size: str) -> None:
    with pytest.raises(HTTPNotFound):
        Request.blank(f"/?per_page={size}").paginate_by_key(BY_ID)


def test_keyset_pages_have_the_limit_as_well(scope: Any) -> None:
    page = Request.blank("/?per_page=9999").paginate_by_key(BY_ID, max_per_page=5)
    assert (page.per_page, len(page.items)) == (5, 5)


def test_error_of_the_database_is_no_missing_page(scope: SQLASessionMiddleware) -> None:
    broken = select(Cup).where(text("nothing = 1")).order_by(Cup.id)
    for bookmark in ("", ">i:1"):
        with pytest.raises(DBAPIError), session.begin_nested():
            Request.blank("/").paginate_by_key(broken, bookmark=bookmark)


def test_statement_needs_an_order() -> None:
    app = SQLASessionMiddleware(lambda environ, start_response: [], "sqlite://", binds={"audit": "sqlite://"})
    with app.context(), pytest.raises(ValueError, match=r"^paginate_by_key\(\) needs a statement with order_by\(\): "):
        Request.blank("/").paginate_by_key(select(Cup))
    app.dispose()


def test_error_names_the_extra_when_sqlakeyset_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sqlakeyset", None)
    app = SQLASessionMiddleware(lambda environ, start_response: [], "sqlite://")
    with app.context(), pytest.raises(ImportError, match=r"pip install 'sqlasession_middleware\[pages\]'$"):
        Request.blank("/").paginate_by_key(BY_ID)
    app.dispose()


# -- in applications


def test_framework_answers_404_when_there_is_no_such_page(app: SQLASessionMiddleware) -> None:
    class CupRequest(DatabaseRequest, flask.Request):
        pass

    shop = flask.Flask("shop")
    shop.request_class = CupRequest

    @shop.get("/<way>")
    def show(way: str) -> Any:
        request: Any = flask.request
        paginate: Callable[..., Any] = {"numbers": request.paginate, "keys": request.paginate_by_key}[way]
        return ids(paginate(BY_ID, per_page=3))

    @wsgify(RequestClass=Request)
    def show_webob(request: Request) -> Response:
        page = request.paginate_by_key(BY_ID) if request.path == "/keys" else request.paginate(BY_ID)
        return Response(str(ids(page)))

    for wrapped in (shop.wsgi_app, show_webob):
        database = SQLASessionMiddleware(wrapped, app.engine)
        for path, status in (
            ("/numbers", 200),
            ("/numbers?page=x", 404),
            ("/numbers?page=9", 404),
            ("/keys", 200),
            ("/keys?bookmark=x", 404),
        ):
            assert Client(database).get(path, buffered=True).status_code == status


def test_value_of_a_type_that_tells_none_in_python_is_left_alone() -> None:
    class Own(UserDefinedType[Any]):
        cache_ok = True

        @property
        def python_type(self) -> type[Any]:
            raise NotImplementedError

    value = object()
    assert check_value(value, Own(), sqlite.dialect()) is value
