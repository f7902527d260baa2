"""A stream that waits holds no connection (G13): two hundred of them on a pool of five, and what is held on to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any
from urllib.parse import parse_qs
from uuid import uuid4
from wsgiref.types import StartResponse, WSGIEnvironment

import pytest
from sqlalchemy import Engine, ForeignKey, String, create_engine, func, insert, select, text, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from sqlasession_middleware import SQLASessionMiddleware, release, session

from ..conftest import DATABASES
from ..wsgi import consume, environ
from .servers import PATIENCE

STREAMS = 200
EVENTS = 3
ITEMS = 7
POOL = {"pool_size": 5, "max_overflow": 0}
RUN = uuid4().hex[:12]


class Base(DeclarativeBase):
    pass


class Item(Base):
    """What the streams read."""

    __tablename__ = f"streams_{RUN}_item"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(String(20))
    notes: Mapped[list[Note]] = relationship(order_by="Note.id")


class Note(Base):
    """What the streams write."""

    __tablename__ = f"streams_{RUN}_note"
    id: Mapped[int] = mapped_column(primary_key=True)
    item_id: Mapped[int] = mapped_column(ForeignKey(Item.id))
    stream: Mapped[int]
    event: Mapped[int]


def item_of(stream: int) -> int:
    return stream % ITEMS + 1


def event(*words: object) -> bytes:
    return f"data: {' '.join(map(str, words))}\n\n".encode()


class Events:
    """The application. ``/ordinary`` is a list; other routes are generators, called with the stream's number."""

    def __init__(self, content_type: str = "text/event-stream") -> None:
        self.content_type = content_type

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        route = environ["PATH_INFO"].strip("/")
        if route == "ordinary":
            body = [str(session.scalars(select(func.count()).select_from(Item)).one()).encode()]
            start_response("200 OK", [("Content-Type", "text/plain")])
            return body
        start_response("200 OK", [("Content-Type", self.content_type)])
        handler: Callable[[int], Iterable[bytes]] = getattr(self, route)
        return handler(int(parse_qs(environ["QUERY_STRING"])["stream"][0]))

    def read(self, stream: int) -> Iterator[bytes]:
        item = session.get_one(Item, item_of(stream))
        for number in range(EVENTS):
            assert item in session
            assert session.get_one(Item, item_of(stream)) is item
            count = session.scalars(select(func.count()).select_from(Item)).one()
            yield event(stream, number, item.name, count)

    def write(self, stream: int) -> Iterator[bytes]:
        item = session.get_one(Item, item_of(stream))
        for number in range(EVENTS):
            session.add(Note(item_id=item.id, stream=stream, event=number))
            assert item in session
            yield event(stream, number, item.name, ITEMS)


class Stream:
    """A response as a server steps through it."""

    def __init__(self, app: SQLASessionMiddleware, route: str, number: int = 0) -> None:
        self.number = number
        self.heads: list[tuple[str, list[tuple[str, str]]]] = []
        self.body = app(environ(PATH_INFO=f"/{route}", QUERY_STRING=f"stream={number}"), self.start_response)
        self.iterator = iter(self.body)

    def start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[..., None]:
        self.heads.append((status, headers))
        return lambda data: None

    def step(self) -> bytes:
        """The next event; empty at the end."""
        return next(self.iterator, b"")

    def close(self) -> None:
        self.body.close()  # type: ignore[attr-defined]


def ask(app: SQLASessionMiddleware) -> bytes:
    """An ordinary request."""
    return consume(app(environ(PATH_INFO="/ordinary"), lambda *head: lambda data: None))


@pytest.fixture
def direct(database_url: str) -> Iterator[Engine]:
    """Another client of the database, who sees what is committed."""
    engine = create_engine(database_url, isolation_level="AUTOCOMMIT")
    Base.metadata.create_all(engine)
    with Session(engine) as preparing:
        preparing.execute(insert(Item), [{"id": number + 1, "name": f"item-{number + 1}"} for number in range(ITEMS)])
    yield engine
    Base.metadata.drop_all(engine)
    engine.dispose()


def notes(direct: Engine, **where: int) -> int:
    with Session(direct) as asking:
        return asking.scalars(select(func.count()).select_from(Note).filter_by(**where)).one()


@pytest.fixture
def wrap(database_url: str, direct: Engine) -> Iterator[Callable[..., SQLASessionMiddleware]]:
    """Puts an application on a pool of five connections: ``wrap(app, transaction=True)``."""
    made = []

    def wrap(app: Any = None, pool_timeout: float = 0.01, **options: Any) -> SQLASessionMiddleware:
        # By default whoever has to wait for a connection fails: there is always one.
        engine_options: dict[str, Any] = {**POOL, "pool_timeout": pool_timeout}
        if database_url.startswith("sqlite"):
            engine_options["connect_args"] = {"timeout": PATIENCE}
        made.append(SQLASessionMiddleware(app or Events(), database_url, engine_options=engine_options, **options))
        return made[-1]

    yield wrap
    for app in made:
        assert app.engine.pool.checkedout() == 0
        app.dispose()


# A stream that writes without a transaction commits by itself, if at all: see below. One that writes reads as well: a
# transaction of one that only reads is shown once.
ROUTES = [
    pytest.param(database, route, transaction, id=f"{database}-{name}")
    for database in DATABASES
    for name, (route, transaction) in {
        "reading": ("read", False),
        "reading in transactions": ("read", True),
        "writing in transactions": ("write", True),
    }.items()
    if database == "sqlite" or (route, transaction) != ("read", True)
]
each_route = pytest.mark.parametrize(("database_url", "route", "transaction"), ROUTES, indirect=["database_url"])


@each_route
def test_streams_hold_no_connection_when_a_server_steps_through_them(
    wrap: Callable[..., SQLASessionMiddleware], direct: Engine, route: str, transaction: bool
) -> None:
    """One thread serves all of them, event by event."""
    app = wrap(transaction=transaction)
    streams = [Stream(app, route, number) for number in range(STREAMS)]
    for number in range(EVENTS):
        for stream in streams:
            expected = event(stream.number, number, f"item-{item_of(stream.number)}", ITEMS)
            assert stream.step() == expected
            assert app.engine.pool.checkedout() == 0
            if route == "write":
                assert notes(direct, stream=stream.number, event=number) == 1
        assert ask(app) == str(ITEMS).encode()
    for stream in streams:
        assert stream.step() == b""
        stream.close()
    assert notes(direct) == (STREAMS * EVENTS if route == "write" else 0)


@each_route
def test_streams_hold_no_connection_when_each_has_a_thread(
    wrap: Callable[..., SQLASessionMiddleware], direct: Engine, route: str, transaction: bool
) -> None:
    """They queue for a connection where they are busy at once; where all of them wait, all connections are free."""
    app = wrap(pool_timeout=PATIENCE, transaction=transaction)
    waiting = threading.Barrier(STREAMS + 1, timeout=3 * PATIENCE)
    ended = threading.Event()

    def watch(number: int) -> None:
        try:
            with closing(Stream(app, route, number)) as stream:
                for each in range(EVENTS):
                    assert stream.step() == event(number, each, f"item-{item_of(number)}", ITEMS)
                    if route == "write":
                        assert notes(direct, stream=number, event=each) == 1
                    waiting.wait()
                    waiting.wait()
                assert stream.step() == b""
        except BaseException:
            waiting.abort()
            raise

    def visit() -> int:
        """Others ask meanwhile."""
        answered = 0
        while not ended.is_set():
            assert ask(app) == str(ITEMS).encode()
            answered += 1
            ended.wait(0.01)
        return answered

    with ThreadPoolExecutor(STREAMS + 1) as threads:
        visitor = threads.submit(visit)
        watching = [threads.submit(watch, number) for number in range(STREAMS)]
        try:
            for _ in range(EVENTS):
                waiting.wait()
                # The visitor is the only one who has one.
                assert app.engine.pool.checkedout() <= 1
                assert ask(app) == str(ITEMS).encode()
                waiting.wait()
        except threading.BrokenBarrierError:
            pass  # A thread has failed: its error follows.
        finally:
            ended.set()
        for done in watching:
            done.result()
        assert visitor.result() > 0
    assert notes(direct) == (STREAMS * EVENTS if route == "write" else 0)


def add(stream: int) -> None:
    session.add(Note(item_id=1, stream=stream, event=0))


def add_and_flush(stream: int) -> None:
    add(stream)
    session.flush()


def insert_many(stream: int) -> None:
    session.execute(insert(Note), [{"item_id": 1, "stream": stream, "event": 0}])


def insert_text(stream: int) -> None:
    session.execute(
        text(f"INSERT INTO {Note.__tablename__} (item_id, stream, event) VALUES (1, :stream, 0)"), {"stream": stream}
    )


def insert_after_reading(stream: int) -> None:
    session.get_one(Item, 1)
    session.connection().execute(insert(Note.__table__).values(item_id=1, stream=stream, event=0))


WRITES = {
    "added": add,
    "flushed": add_and_flush,
    "inserted": insert_many,
    "inserted by text": insert_text,
    "inserted by the connection": insert_after_reading,
}


@pytest.mark.parametrize("how", WRITES)
def test_uncommitted_writes_are_kept_when_there_is_no_transaction(
    wrap: Callable[..., SQLASessionMiddleware], direct: Engine, how: str
) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        session.get_one(Item, 1)
        yield b"data: nothing\n\n"
        WRITES[how](7)
        yield b"data: written\n\n"
        assert session.scalars(select(func.count()).select_from(Note)).one() == 1
        yield b"data: seen\n\n"
        session.commit()
        yield b"data: committed\n\n"

    app = wrap(app)
    with closing(Stream(app, "")) as stream:
        assert stream.step() == b"data: nothing\n\n"
        assert app.engine.pool.checkedout() == 0
        assert stream.step() == b"data: written\n\n"
        # What is only in the session needs no connection, and is not lost.
        assert app.engine.pool.checkedout() == (0 if how == "added" else 1)
        assert ask_count(direct) == 0
        assert stream.step() == b"data: seen\n\n"
        assert app.engine.pool.checkedout() == 1
        assert ask_count(direct) == 0
        assert stream.step() == b"data: committed\n\n"
        assert app.engine.pool.checkedout() == 0
        assert ask_count(direct) == 1
        assert stream.step() == b""


def ask_count(direct: Engine) -> int:
    return notes(direct, stream=7)


@pytest.mark.parametrize("transaction", [False, True])
@pytest.mark.parametrize("leave", [1, 2])
def test_event_is_undone_when_the_client_leaves_before_it(
    wrap: Callable[..., SQLASessionMiddleware], direct: Engine, transaction: bool, leave: int
) -> None:
    """What was not told of is not stored; without a transaction nothing is."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        for _ in range(EVENTS):
            add_and_flush(7)
            yield b"data: half "  # No event has ended here.
            yield b"an event\n\n"

    with closing(Stream(wrap(app, transaction=transaction), "")) as stream:
        for _ in range(leave):
            assert stream.step()
    assert ask_count(direct) == (leave // 2 if transaction else 0)


# Seven rows, of which it takes two at a time. Entities without yield_per are all fetched before the first one.
CURSORS = {
    "entities by yield_per": select(Item).order_by(Item.id).execution_options(yield_per=2),
    "columns by yield_per": select(Item.name).order_by(Item.id).execution_options(yield_per=2),
    "rows by stream_results": select(Item.__table__.c.name)
    .order_by(Item.__table__.c.id)
    .execution_options(stream_results=True, max_row_buffer=2),
}


@pytest.mark.parametrize("transaction", [False, True])
@pytest.mark.parametrize("cursor", CURSORS)
def test_cursor_keeps_its_connection_until_it_is_exhausted(
    wrap: Callable[..., SQLASessionMiddleware], cursor: str, transaction: bool
) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        for row in session.execute(CURSORS[cursor]):
            yield event(row[0].name if isinstance(row[0], Item) else row[0])
        yield event("end")
        assert session.scalars(select(Item.name).where(Item.id == 1)).one() == "item-1"
        yield event("again")

    app = wrap(app, transaction=transaction)
    with closing(Stream(app, "")) as stream:
        for number in range(1, ITEMS + 1):
            assert stream.step() == event(f"item-{number}")
            if number < ITEMS - 1:
                assert app.engine.pool.checkedout() == 1
        assert stream.step() == event("end")
        assert app.engine.pool.checkedout() == 0
        assert stream.step() == event("again")
        assert app.engine.pool.checkedout() == 0


@pytest.mark.parametrize("transaction", [False, True])
@pytest.mark.parametrize("expire_on_commit", [False, True])
def test_objects_stay_attached_when_their_connection_is_given_back(
    wrap: Callable[..., SQLASessionMiddleware], direct: Engine, transaction: bool, expire_on_commit: bool
) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        item = session.get_one(Item, 1)
        yield event("loaded")
        assert item in session
        yield event(item.name)
        yield event(len(item.notes))  # Loaded now.
        assert session.get_one(Item, 1) is item
        yield event(item.name)

    app = wrap(app, transaction=transaction, session_options={"expire_on_commit": expire_on_commit})
    with closing(Stream(app, "")) as stream:
        assert stream.step() == event("loaded")
        with Session(direct) as other:
            other.execute(update(Item).where(Item.id == 1).values(name="new"))
            other.execute(insert(Note).values(item_id=1, stream=0, event=0))
        # As at any other commit: what is not to expire is not loaded anew.
        name = "new" if expire_on_commit else "item-1"
        assert stream.step() == event(name)
        assert stream.step() == event(1)
        assert stream.step() == event(name)
        assert app.engine.pool.checkedout() == 0


@pytest.mark.parametrize("transaction", [False, True])
@pytest.mark.parametrize("configured", [False, True])
def test_other_streams_hold_no_connection_when_they_are_configured(
    wrap: Callable[..., SQLASessionMiddleware], configured: bool, transaction: bool
) -> None:
    app = wrap(
        Events("application/x-ndjson; charset=utf-8"),
        transaction=transaction,
        streams=("application/x-ndjson",) if configured else (),
    )
    with closing(Stream(app, "read")) as stream:
        for number in range(EVENTS):
            assert stream.step() == event(0, number, "item-1", ITEMS)
            assert app.engine.pool.checkedout() == (0 if configured else 1)


def read_release_write_release(app: SQLASessionMiddleware, transaction: bool) -> None:
    """What code does by itself, before something that takes long."""
    pool = app.engine.pool
    item = session.get_one(Item, 1)
    assert pool.checkedout() == 1
    assert release()
    assert pool.checkedout() == 0
    assert item in session
    assert item.name == "item-1"
    assert release()
    add_and_flush(7)
    assert not release()
    assert pool.checkedout() == 1
    assert session.scalars(select(func.count()).select_from(Note)).one() == 1
    if not transaction:
        session.commit()
        assert item.name == "item-1"
        assert release()
        assert pool.checkedout() == 0
        assert item in session


@pytest.mark.parametrize("transaction", [False, True])
def test_connection_is_given_back_when_a_request_releases_it(
    wrap: Callable[..., SQLASessionMiddleware], direct: Engine, transaction: bool
) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        read_release_write_release(app, transaction)
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"done"]

    app = wrap(app, transaction=transaction)
    with closing(Stream(app, "")) as stream:
        assert stream.step() == b"done"
    assert ask_count(direct) == 1


@pytest.mark.parametrize("transaction", [False, True])
def test_connection_is_given_back_when_a_context_releases_it(
    wrap: Callable[..., SQLASessionMiddleware], direct: Engine, transaction: bool
) -> None:
    """No transaction is in charge here, whatever the application's requests have."""
    app = wrap(transaction=transaction)
    with app.context():
        read_release_write_release(app, transaction=False)
    assert ask_count(direct) == 1
