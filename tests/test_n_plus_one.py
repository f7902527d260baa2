"""no_n_plus_one(): what is sent for one object after another, and what only looks like it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import FetchedValue, ForeignKey, Integer, MetaData, String, bindparam, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    joinedload,
    mapped_column,
    relationship,
    selectinload,
    undefer,
)
from sqlalchemy.orm.exc import StaleDataError
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware._recording.blocks import recorded
from sqlasession_middleware.testing import isolated, no_n_plus_one

from .wsgi import Environ, StartResponse

pytest_plugins = ["pytester"]

PREFIX = f"n_plus_one_{uuid4().hex[:12]}"
AUTHORS = 4


class Base(DeclarativeBase):
    metadata = MetaData()


class Author(Base):
    __tablename__ = f"{PREFIX}_author"
    id: Mapped[int] = mapped_column(primary_key=True)
    life: Mapped[str | None] = mapped_column(String(20), deferred=True)
    books: Mapped[list[Book]] = relationship(back_populates="author")


class Book(Base):
    __tablename__ = f"{PREFIX}_book"
    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey(Author.id))
    author: Mapped[Author] = relationship(back_populates="books")


class Numbered(Base):
    """A flush asks for the number of each row."""

    __tablename__ = f"{PREFIX}_numbered"
    __table_args__ = {"implicit_returning": False}  # noqa: RUF012  # as SQLAlchemy wants it
    __mapper_args__ = {"eager_defaults": True}  # noqa: RUF012  # as SQLAlchemy wants it
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(Integer, FetchedValue(), nullable=True)


def answer(environ: Environ, start_response: StartResponse) -> list[bytes]:
    environ["work"]()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"done"]


@pytest.fixture
def app(database_url: str) -> Iterator[SQLASessionMiddleware]:
    app = SQLASessionMiddleware(answer, database_url, metadata=Base.metadata, transaction={"attempts": 3})
    app.init_database()
    app.run(lambda: session.add_all([Author(books=[Book(), Book()]) for _ in range(AUTHORS)]))
    yield app
    app.drop_database()
    app.dispose()


def ask(app: SQLASessionMiddleware, work: Callable[[], object]) -> None:
    assert Client(app).get("/", buffered=True, environ_overrides={"work": work}).status_code == 200


def authors(*options: Any) -> list[Author]:
    return list(session.scalars(select(Author).options(*options).order_by(Author.id)))


# -- what is one statement after another, and what the message says of it


def load_books() -> None:
    for author in authors():
        assert len(author.books) == 2


def load_authors() -> None:
    for book in session.scalars(select(Book)).all():
        session.expunge(book.author)


def load_deferred() -> None:
    for author in authors():
        assert author.life is None


def get_each() -> None:
    for number in session.scalars(select(Author.id)).all():
        session.get_one(Author, number, populate_existing=True)


def core_each() -> None:
    for number in range(AUTHORS):
        session.execute(select(Book.id).where(Book.author_id == number)).all()


def lists_of_each_length() -> None:
    for number in range(1, AUTHORS):
        session.execute(select(Book.id).where(Book.id.in_(range(number)))).all()


def text_of_each() -> None:
    for number in range(AUTHORS):
        session.connection().exec_driver_sql(f"SELECT id FROM {Book.__tablename__} WHERE author_id = {number}").all()


def in_a_function() -> None:
    def books_of(number: int) -> list[int]:
        return list(session.scalars(text(f"SELECT id FROM {Book.__tablename__} WHERE id = :id"), {"id": number}))

    for number in range(AUTHORS):
        books_of(number)


def in_a_context(app: SQLASessionMiddleware, work: Callable[[], object]) -> None:
    with app.context():
        work()


def in_a_thread(app: SQLASessionMiddleware, work: Callable[[], object]) -> None:
    with ThreadPoolExecutor(1) as threads:
        threads.submit(app.run, work).result()


WAYS = {"request": ask, "context": in_a_context, "thread": in_a_thread}
REPEATED: dict[Callable[[], None], tuple[str, str]] = {
    load_books: ("4 times: SELECT .*_book", r"\.options\(selectinload\(Author\.books\)\)"),
    load_authors: ("times: SELECT .*_author", r"\.options\(selectinload\(Book\.author\)\)"),
    load_deferred: ("4 times: SELECT .*life", r"Deferred or expired attributes of Author"),
    get_each: ("4 times: SELECT .*_author", "Ask for all of them at once, with IN"),
    core_each: ("4 times: SELECT .*_book", "Ask for all of them at once"),
    lists_of_each_length: ("3 times: SELECT .* IN ", "Ask for all of them at once"),
    text_of_each: ("4 times: SELECT id", "Ask for all of them at once"),
    in_a_function: ("4 times: SELECT id", "Ask for all of them at once"),
}


@pytest.mark.parametrize("work", REPEATED, ids=lambda work: work.__name__)
@pytest.mark.parametrize("way", WAYS)
def test_repeated_select_is_told_with_its_place_and_the_remedy(
    app: SQLASessionMiddleware, work: Callable[[], None], way: str
) -> None:
    with pytest.raises(AssertionError) as caught, no_n_plus_one():
        WAYS[way](app, work)
    said = " ".join(str(caught.value).split())
    statement, remedy = REPEATED[work]
    assert re.search(statement, said)
    assert re.search(remedy, said)
    assert re.search(rf'File "[^"]*{re.escape(__file__.rpartition("/")[2])}", line \d+, in {work.__name__}', said)
    assert said.count(" times: ") == 1


def test_repeated_select_on_a_connection_that_was_there_before_is_told(app: SQLASessionMiddleware) -> None:
    with isolated(app):
        ask(app, load_authors)
        with pytest.raises(AssertionError, match="4 times: SELECT"), no_n_plus_one():
            ask(app, load_books)
        with no_n_plus_one(), pytest.raises(DBAPIError):
            ask(app, lambda: session.execute(text("SELECT nothing FROM nowhere")))
        with recorded() as record:
            ask(app, core_each)
            with app.engine.connect():  # Now it is recorded in full.
                ask(app, core_each)
    selects = [each for each in record.statements if each.is_read]
    assert len(selects) == 2 * AUTHORS
    assert record.seconds == pytest.approx(sum(each.seconds for each in record.statements))


@pytest.mark.parametrize(
    ("work", "allowed"),
    [(load_books, "Author.books"), (load_deferred, "Author"), (core_each, f"FROM {Book.__tablename__}")],
    ids=["relationship", "attributes", "statement"],
)
def test_what_is_allowed_may_be_repeated(app: SQLASessionMiddleware, work: Callable[[], None], allowed: str) -> None:
    with no_n_plus_one(allow=[allowed, "Another.name"]):
        ask(app, work)
    with pytest.raises(AssertionError), no_n_plus_one(allow=["Another.name"]):
        ask(app, work)


def test_error_says_that_a_text_is_no_collection() -> None:
    with pytest.raises(TypeError, match=r"allow must be a collection of texts, such as \['Author.books'\]"):
        no_n_plus_one(allow="Author.books").__enter__()


# -- what is none


def load_at_once() -> None:
    for options in ([selectinload(Author.books)], [joinedload(Author.books)], [undefer(Author.life)]):
        for author in session.scalars(select(Author).options(*options).order_by(Author.id)).unique():
            assert author.id
        session.expunge_all()


def only_two() -> None:
    for author in authors()[:2]:
        assert author.books


def from_three_lines() -> None:
    first, second, third = authors()[:3]
    assert first.books
    assert second.books
    assert third.books


def write_each() -> None:
    for number in range(AUTHORS):
        session.add(Author(id=1000 + number))
        session.flush()


def flush_rows_that_the_database_completes() -> None:
    session.add_all([Numbered() for _ in range(AUTHORS)])
    session.flush()


def one_statement_with_many_parameters() -> None:
    table: Any = Author.__table__
    session.connection().execute(
        table.update().where(table.c.id == bindparam("key")).values(life="long"),
        [{"key": number} for number in range(AUTHORS)],
    )


ONCE = [
    load_at_once,
    only_two,
    from_three_lines,
    write_each,
    flush_rows_that_the_database_completes,
    one_statement_with_many_parameters,
]


@pytest.mark.parametrize("work", ONCE, ids=lambda work: work.__name__)
def test_nothing_is_said_of_what_is_sent_once(app: SQLASessionMiddleware, work: Callable[[], None]) -> None:
    with no_n_plus_one():
        ask(app, work)


def test_attempts_at_a_request_are_no_repetition(app: SQLASessionMiddleware) -> None:
    attempts: list[int] = []

    def work() -> None:
        attempts.append(1)
        session.scalars(select(Book)).all()
        if len(attempts) < 3:
            raise StaleDataError

    with no_n_plus_one():
        ask(app, work)
    assert len(attempts) == 3


def test_events_of_a_stream_are_no_repetition(app: SQLASessionMiddleware) -> None:
    def stream(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        for number in range(4):
            count = len(session.scalars(select(Book)).all())
            yield b"data: %d %d\n\n" % (number, count)

    streaming = SQLASessionMiddleware(stream, app.engine, transaction=True)
    with no_n_plus_one():
        assert len(Client(streaming).get("/", buffered=True).text.split("\n\n")) == 5


def test_several_requests_are_no_repetition(app: SQLASessionMiddleware) -> None:
    with no_n_plus_one():
        for _ in range(4):
            ask(app, only_two)


def test_statements_of_several_databases_are_no_repetition(app: SQLASessionMiddleware, sqlite_url: str) -> None:
    others = [SQLASessionMiddleware(answer, f"{sqlite_url}{number}", metadata=Base.metadata) for number in range(3)]
    for other in others:
        other.init_database()

    def work() -> None:
        for other in others:
            with other.context():
                session.scalars(select(Book)).all()

    with no_n_plus_one():
        ask(app, work)
    for other in others:
        other.dispose()


def test_blocks_may_be_nested_and_end(app: SQLASessionMiddleware) -> None:
    outer = no_n_plus_one()
    outer.__enter__()
    with no_n_plus_one(allow=["Author.books"]):
        ask(app, load_books)
    with pytest.raises(AssertionError, match=r"Author\.books"):
        outer.__exit__(None, None, None)
    ask(app, load_books)


def test_plugin_fails_tests_that_repeat(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nsqlasession_n_plus_one = true\nsqlasession_n_plus_one_allow =\n    AS allowed\n")
    pytester.makepyfile(
        """
        import pytest
        from sqlalchemy import text
        from sqlasession_middleware import SQLASessionMiddleware, session

        app = SQLASessionMiddleware.without_app("sqlite://")

        def send(sql, times):
            for _ in range(times):
                session.execute(text(sql))

        @pytest.fixture(autouse=True)
        def scope():
            with app.context():
                yield

        def test_once():
            send("SELECT 1", 1)

        def test_repeated():
            send("SELECT 1", 3)

        def test_allowed():
            send("SELECT 1 AS allowed", 3)

        def test_fixture(no_n_plus_one):
            with pytest.raises(AssertionError), no_n_plus_one():
                send("SELECT 2", 3)
            app.dispose()
        """
    )
    done = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    done.assert_outcomes(passed=4, errors=2)
    done.stdout.fnmatch_lines(["*3 times: SELECT 1*"])
