"""A stream that waits holds no connection, and what makes it hold on to one; release() by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import (
    Column,
    Integer,
    MetaData,
    String,
    Table,
    delete,
    event,
    func,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.exc import IntegrityError, PendingRollbackError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlasession_middleware import SQLASessionMiddleware, application, release, session
from sqlasession_middleware._sessions.statements import is_read
from sqlasession_middleware._wsgi.event_stream import unit_ends
from sqlasession_middleware.errors import ConfigurationError, ScopeError
from sqlasession_middleware.transaction import TransactionMiddleware

from .wsgi import Environ, StartResponse, assert_given_back, consume, environ

EVENTS = [("Content-Type", "text/event-stream; charset=utf-8")]
tables = MetaData()


class Base(DeclarativeBase):
    metadata = tables


class Item(Base):
    __tablename__ = "stream_item"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(40))

    def __init__(self, name: str) -> None:
        self.name = name


@pytest.fixture
def make(database_url: str) -> Iterator[Callable[..., SQLASessionMiddleware]]:
    """Makes applications on one database after the other, with one row in its table."""
    made: list[SQLASessionMiddleware] = []

    def make(app: Any, **options: Any) -> SQLASessionMiddleware:
        wrapped = SQLASessionMiddleware(app, database_url, metadata=tables, **options)
        if not made:
            wrapped.drop_database()
            wrapped.init_database()
            with wrapped.context():
                session.add(Item("one"))
                session.commit()
        made.append(wrapped)
        return wrapped

    yield make
    for each in made:
        each.drop_database()
        each.dispose()


def names(app: SQLASessionMiddleware) -> list[str]:
    """What the database holds, asked on a connection of its own."""
    with app.engine.connect() as connection:
        return list(connection.scalars(select(Item.name).order_by(Item.id)))


def held() -> int:
    """How many connections the current application's pool has given out."""
    return application.engine.pool.checkedout()  # type: ignore[attr-defined, no-any-return]


def held_between(app: SQLASessionMiddleware, **more: Any) -> list[int]:
    """How many connections are held while the server has each of the chunks."""
    result = app(environ(**more), lambda status, headers, exc_info=None: lambda data: None)
    counts = [app.engine.pool.checkedout() for _ in result]  # type: ignore[attr-defined]
    result.close()
    assert_given_back(app.engine)
    return counts


def read() -> None:
    assert session.scalar(select(func.count(Item.id)))


def read_text() -> None:
    session.execute(text("SELECT name FROM stream_item")).all()


def read_locked() -> None:
    session.execute(select(Item).with_for_update()).all()


def read_text_locked() -> None:
    session.execute(text("SELECT name FROM stream_item FOR UPDATE")).all()


def change_unsaved() -> None:
    with session.no_autoflush:
        session.scalars(select(Item)).first().name += "!"


def add_unsaved() -> None:
    read()
    session.add(Item("new"))


def delete_unsaved() -> None:
    session.delete(session.scalars(select(Item)).first())


def flush() -> None:
    session.add(Item("new"))
    session.flush()


def insert_core() -> None:
    session.execute(insert(Item).values(name="core"))


def update_orm() -> None:
    session.execute(update(Item).values(name="updated"))


def insert_text() -> None:
    session.execute(text("INSERT INTO stream_item (name) VALUES ('text')"))


def in_a_block() -> None:
    session.begin()
    read()


def in_a_savepoint() -> None:
    session.begin_nested()
    read()


READS = [read, read_text]
WRITES = [flush, insert_core, update_orm, insert_text]
UNSAVED = [change_unsaved, add_unsaved, delete_unsaved]
BLOCKS = [in_a_block, in_a_savepoint]


def streaming(work: Callable[[], object], headers: Any = EVENTS) -> Any:
    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        start("200 OK", headers)
        return steps()

    def steps() -> Iterator[bytes]:
        for _ in range(2):
            work()
            yield b"data: x\n\n"

    return app


@pytest.mark.parametrize("work", READS)
def test_connection_is_back_while_a_reading_stream_waits(make: Any, work: Any) -> None:
    assert held_between(make(streaming(work))) == [0, 0]


@pytest.mark.parametrize("work", WRITES + UNSAVED + BLOCKS)
def test_connection_is_kept_while_something_could_be_lost(make: Any, work: Any) -> None:
    def once() -> None:
        if not session().in_transaction():
            work()

    wrapped = make(streaming(once))
    assert held_between(wrapped) == [1, 1]
    assert names(wrapped) == ["one"]


@pytest.mark.parametrize("work", [read_locked, read_text_locked])
def test_connection_is_kept_while_rows_are_locked(make: Any, work: Any) -> None:
    wrapped = make(streaming(work))
    if wrapped.engine.dialect.name != "sqlite":  # It has no such locks, and no words for them.
        assert held_between(wrapped) == [1, 1]


@pytest.mark.parametrize("work", [read, *WRITES, *UNSAVED])
def test_event_is_committed_before_it_leaves(make: Any, work: Any) -> None:
    def once() -> None:
        if names(wrapped) == ["one"]:
            work()

    wrapped = make(streaming(once), transaction=True)
    result = wrapped(environ(), lambda status, headers, exc_info=None: lambda data: None)
    next(iter(result))
    assert wrapped.engine.pool.checkedout() == 0
    assert (names(wrapped) == ["one"]) is (work is read)
    result.close()


def test_events_before_an_error_are_kept_and_its_own_is_not(make: Any) -> None:
    def fail_later() -> None:
        session.add(Item("new"))
        if len(names(wrapped)) == 2:
            session.flush()
            raise LookupError

    wrapped = make(streaming(fail_later), transaction=True)
    result = wrapped(environ(), lambda status, headers, exc_info=None: lambda data: None)
    steps = iter(result)
    next(steps)
    with pytest.raises(LookupError):
        next(steps)
    assert_given_back(wrapped.engine)
    assert names(wrapped) == ["one", "new"]


def test_event_that_cannot_be_committed_does_not_leave(make: Any) -> None:
    def clash() -> None:
        session.execute(insert(Item).values(id=77, name="first"))
        with session.no_autoflush:
            session.add(Item("second"))
            next(iter(session.new)).id = 77

    wrapped = make(streaming(clash), transaction=True)
    heads: list[str] = []
    with pytest.raises(IntegrityError):
        wrapped(environ(), lambda status, headers, exc_info=None: heads.append(status) or heads.append)
    assert heads == []
    assert names(wrapped) == ["one"]


@pytest.mark.parametrize("transaction", [False, True])
def test_application_manages_its_transactions_itself_where_it_says_so(make: Any, transaction: bool) -> None:
    def app(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        start("200 OK", EVENTS)
        with session.begin():
            insert_core()
            yield b"data: 1\n\n"
            assert held() == 1
        yield b"data: 2\n\n"
        assert held() == 0

    wrapped = make(app, transaction=transaction)
    assert held_between(wrapped) == [1, 0]
    assert names(wrapped) == ["one", "core"]


@pytest.mark.parametrize("transaction", [False, True])
@pytest.mark.parametrize("option", ["yield_per", "stream_results"])
def test_connection_is_kept_until_the_last_row_of_a_server_side_cursor(
    make: Any, transaction: bool, option: str
) -> None:
    def app(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        start("200 OK", EVENTS)
        rows = session.execute(select(Item.name).execution_options(**{option: 1}))
        for row in rows.yield_per(1):
            yield b"data: %s\n\n" % row.name.encode()
        read()
        yield b"data: end\n\n"

    wrapped = make(app, transaction=transaction)
    with wrapped.context():
        session.add_all([Item("two"), Item("three")])
        session.commit()
    counts = held_between(wrapped)
    # The last row may have come with the end of the result.
    assert (counts[:2], counts[3:]) == ([1, 1], [0])


@pytest.mark.parametrize("expire", [True, False])
@pytest.mark.parametrize("transaction", [False, True])
def test_objects_stay_attached_and_readable(make: Any, transaction: bool, expire: bool) -> None:
    seen: list[str] = []

    def app(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        start("200 OK", EVENTS)
        item = session.scalars(select(Item)).one()
        for _ in range(2):
            yield b"data: %s\n\n" % item.name.encode()
            assert item in session
            seen.append(item.name)

    wrapped = make(app, transaction=transaction, session_options={"expire_on_commit": expire})
    result = wrapped(environ(), lambda status, headers, exc_info=None: lambda data: None)
    for _ in result:
        with wrapped.engine.begin() as connection:
            connection.execute(update(Item).values(name="changed"))
    result.close()
    assert seen == ["changed" if expire else "one"] * 2


def test_generator_is_a_stream_as_well_when_it_tells_its_head_in_the_first_step(make: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        start("200 OK", environ["headers"])
        for _ in range(environ["count"]):
            read()
            yield b"data: x\n\n"

    wrapped = make(app)
    assert held_between(wrapped, headers=EVENTS, count=2) == [0, 0]
    assert held_between(wrapped, headers=[("Content-Type", "text/plain")], count=2) == [1, 1]
    assert held_between(wrapped, headers=[], count=2) == [1, 1]
    assert held_between(wrapped, headers=EVENTS, count=0) == []


def test_parts_of_an_event_belong_together(make: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        start("200 OK", EVENTS)
        for part in (b"event: x\n", b"data: y\n", b"\n", b": comment\r", b"\n\r\n"):
            read()
            yield part

    wrapped = make(app, transaction=True)
    assert held_between(wrapped) == [1, 1, 0, 1, 0]


@pytest.mark.parametrize("transaction", [False, True])
def test_other_streams_are_the_ones_that_are_named(make: Any, transaction: bool) -> None:
    lines = [("content-type", "Application/X-NDJSON;charset=utf-8")]
    wrapped = make(streaming(read, lines), streams=["application/x-ndjson"], transaction=transaction)
    assert held_between(wrapped) == [0, 0]
    assert held_between(make(streaming(read, lines), transaction=transaction)) == [1, 1]


@pytest.mark.parametrize("more", [{}, {"binds": {"other": "sqlite://"}}])
def test_connection_by_its_engine_may_have_written(make: Any, more: dict[str, Any]) -> None:
    def work() -> None:
        connection = session.connection(bind_arguments={"bind": application.engine})
        connection.execute(text("INSERT INTO stream_item (name) VALUES ('apart')"))
        assert not release()

    def app(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        start("200 OK", EVENTS)
        work()
        yield b"data: x\n\n"
        session.commit()
        yield b"data: y\n\n"

    wrapped = make(app, **more)
    assert held_between(wrapped) == [1, 0]
    assert names(wrapped) == ["one", "apart"]


@pytest.mark.parametrize("binds", [{}, {"other": "sqlite://"}])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_replicas_take_nothing_from_a_stream(make: Any, database_url: str, method: str, binds: dict[str, str]) -> None:
    """It gives its connections back, also where only its statements tell whether it has written."""
    for work, held in ((read, 0), (insert_core, 1)):
        wrapped = make(streaming(work), replicas=[database_url], binds=binds)
        result = wrapped(environ(REQUEST_METHOD=method), lambda *head: lambda data: None)
        pools: list[Any] = [engine.pool for engine in wrapped.engines.values()]
        assert [sum(pool.checkedout() for pool in pools) for _ in result] == [held, held]
        result.close()
        assert_given_back(wrapped.engine)
        wrapped.dispose()


def test_stream_is_rolled_back_event_by_event_when_it_is_vetoed(make: Any) -> None:
    wrapped = make(streaming(insert_core, [*EVENTS, ("X-Tm", "abort")]), transaction=True)
    assert held_between(wrapped) == [0, 0]
    assert names(wrapped) == ["one"]


def test_stream_without_the_session_opens_none(make: Any) -> None:
    wrapped = make(streaming(lambda: None), transaction=True)
    assert held_between(wrapped) == [0, 0]


def test_other_middleware_may_stand_in_between(make: Any) -> None:
    inner = TransactionMiddleware(streaming(insert_core))

    def other(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        return (chunk.upper() for chunk in inner(environ, start))

    wrapped = make(other)
    assert held_between(wrapped) == [0, 0]
    assert names(wrapped) == ["one", "core", "core"]


def test_aborted_transaction_keeps_nothing(server_url: str) -> None:
    """PostgreSQL can save nothing of it any more; elsewhere there is no such thing."""

    def broken() -> None:
        session.execute(text("SELECT 1"))
        with pytest.raises(Exception, match="stream_missing"):
            session.execute(text("SELECT * FROM stream_missing"))

    wrapped = SQLASessionMiddleware(streaming(broken), server_url)
    assert held_between(wrapped) == [0, 0]
    wrapped.dispose()


def test_event_does_not_leave_when_its_flush_failed_and_the_application_went_on(make: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        start("200 OK", EVENTS)
        yield b": hello\n\n"
        insert_core()
        clashing = Item("clash")
        clashing.id = 1
        session.add(clashing)
        with pytest.raises(IntegrityError):
            session.flush()
        yield b"data: saved\n\n"

    wrapped = make(app, transaction=True)
    result = wrapped(environ(), lambda status, headers, exc_info=None: lambda data: None)
    steps = iter(result)
    assert next(steps) == b": hello\n\n"
    with pytest.raises(PendingRollbackError):
        next(steps)
    assert names(wrapped) == ["one"]


def test_event_is_committed_whatever_length_its_stream_declares(make: Any) -> None:
    wrapped = make(streaming(insert_core, [*EVENTS, ("Content-Length", "9")]), transaction=True)
    assert held_between(wrapped) == [0, 0]
    assert names(wrapped) == ["one", "core", "core"]


# -- by hand


def test_release_gives_back_what_only_reads_and_nothing_else(make: Any) -> None:
    wrapped = make(lambda environ, start: [])
    for transaction in (False, True):
        for work in [lambda: None, *READS, *WRITES, *UNSAVED, *BLOCKS]:
            with wrapped.context():
                work()
                is_free = work in READS or work not in (*WRITES, *UNSAVED, *BLOCKS)
                assert release() is is_free
                assert held() == (not is_free)
                session.rollback()
                assert release() is True

        def app(environ: Environ, start: StartResponse) -> list[bytes]:
            assert release() is True
            read()
            assert release() is True
            assert held() == 0
            insert_core()
            assert release() is False
            start("200 OK", [])
            return []

        consume(make(app, transaction=transaction)(environ(), lambda status, headers, exc_info=None: None))
    assert names(wrapped) == ["one", "core"]


@pytest.mark.parametrize("expire", [True, False])
def test_release_expires_what_a_commit_would_expire(make: Any, expire: bool) -> None:
    wrapped = make(lambda environ, start: [], session_options={"expire_on_commit": expire})
    with wrapped.context():
        item = session.scalars(select(Item)).one()
        session.connection()  # What was done with it is not known: a database that can tell is asked.
        can_tell = wrapped.engine.dialect.name not in ("mysql", "mariadb")
        assert release() is can_tell
        assert inspect(item).expired is (expire and can_tell)
        assert item.name == "one"


def test_release_commits_between_two_events_when_a_transaction_is_in_charge(make: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        start("200 OK", EVENTS)
        yield b"data: 1\n\n"
        insert_core()
        assert release() is True
        assert names(wrapped) == ["one", "core"]
        in_a_block()
        assert release() is False
        session.rollback()
        yield b"data: 2\n\n"

    wrapped = make(app, transaction=True)
    assert held_between(wrapped) == [0, 0]


def test_release_needs_a_scope() -> None:
    with pytest.raises(ScopeError, match="No application is bound here"):
        release()


def test_transaction_after_a_write_counts_for_itself(make: Any) -> None:
    """Where the database does not tell whether something was written, the session's own notes do."""

    def app(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        start("200 OK", EVENTS)
        insert_core()
        session.commit()
        read()
        yield b"data: read after a commit\n\n"
        read()
        insert_core()
        read()
        yield b"data: written after a read\n\n"
        session.rollback()
        read()
        yield b"data: read after a rollback\n\n"
        session.connection()
        yield b"data: who knows what was done with it\n\n"

    wrapped = make(app)
    counts = held_between(wrapped)
    assert counts[:3] == [0, 1, 0]
    # Only where the database cannot be asked it may have been a write.
    assert counts[3] == (wrapped.engine.dialect.name in ("mysql", "mariadb"))


def test_session_class_stays_the_users(make: Any) -> None:
    class Own(Session):
        def greet(self) -> str:
            return "hello"

    wrapped = make(lambda environ, start: [], session_options={"class_": Own})
    with wrapped.context():
        assert isinstance(session(), Own)
        assert session().greet() == "hello"  # type: ignore[attr-defined]
        first = type(session())
    with wrapped.context():
        assert type(session()) is first


def test_connection_is_freed_when_a_transaction_cannot_be_ended(sqlite_url: str) -> None:
    app = SQLASessionMiddleware(streaming(lambda: session.scalar(select(1))), sqlite_url)

    @event.listens_for(app.engine, "rollback")
    def fail(connection: Any) -> None:
        raise LookupError("rollback")

    with pytest.raises(LookupError):
        consume(app(environ(), lambda status, headers, exc_info=None: lambda data: None))
    assert_given_back(app.engine)
    app.dispose()


# -- what is a stream, an event, and a read


@given(st.lists(st.sampled_from([b"data: x", b": y", b"\n", b"\r\n", b"\n\n", b"\r\n\r\n"])), st.data())
def test_end_of_an_event_is_found_however_the_stream_is_cut(parts: list[bytes], data: Any) -> None:
    whole = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    ends = unit_ends(EVENTS)
    assert ends is not None
    found = [ends(piece) for piece in pieces]
    lines = whole.replace(b"\r\n", b"\n")
    assert any(found) == (b"\n\n" in lines)


@pytest.mark.parametrize(
    ("headers", "is_stream"),
    [
        (EVENTS, True),
        ([("X-Other", "1"), ("content-type", "TEXT/EVENT-STREAM")], True),
        ([("Content-Type", "text/event-streams")], False),
        ([("Content-Type", "text/plain")], False),
        ([], False),
    ],
)
def test_stream_is_known_by_its_content_type(headers: list[tuple[str, str]], is_stream: bool) -> None:
    assert (unit_ends(headers) is not None) is is_stream


@pytest.mark.parametrize(
    ("statement", "reads"),
    [
        (select(Item), True),
        (select(Item.id).union(select(Item.id)), True),
        (select(Item).with_for_update(), False),
        (insert(Item), False),
        (delete(Item), False),
        (func.now(), False),
        (Table("other", MetaData(), Column("id", Integer)).insert(), False),
        (text(" select 1"), True),
        (text("SHOW TABLES"), True),
        (text("SELECT 1 FOR SHARE"), False),
        (text("select * into copy from item"), False),
        (text("WITH x AS (DELETE FROM item RETURNING id) SELECT * FROM x"), False),
        (text("CALL something()"), False),
        (text("selection"), False),
        (select(Item).from_statement(text("SELECT * FROM stream_item")), True),
        (select(Item).from_statement(text("DELETE FROM stream_item RETURNING *")), False),
    ],
)
def test_statement_reads_when_it_surely_leaves_nothing(statement: Any, reads: bool) -> None:
    assert is_read(statement) is reads


@pytest.mark.parametrize("streams", ["text/csv", 3, ["csv"], [b"text/csv"], ["text/csv; charset=utf-8"]])
def test_error_names_streams_when_they_are_no_content_types(sqlite_url: str, streams: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^streams must "):
        SQLASessionMiddleware(lambda environ, start: [], sqlite_url, streams=streams)
