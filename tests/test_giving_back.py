"""No connection is held that the request does not need (G18): when it goes back before the response is closed."""

from __future__ import annotations

import io
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4
from wsgiref.util import FileWrapper as ServersWrapper

import bottle
import django.http
import falcon
import flask
import pyramid.request
import pyramid.response
import pytest
import webob
import webob.static
from django.conf import settings
from sqlalchemy import (
    Column,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from werkzeug.test import EnvironBuilder
from werkzeug.wrappers import Response
from werkzeug.wsgi import ClosingIterator, FileWrapper, wrap_file

from sqlasession_middleware import SQLASessionMiddleware, application, local, release, session
from sqlasession_middleware._database.plain_reads import Reading, judge
from sqlasession_middleware._sessions.release import uncommitted
from sqlasession_middleware._sessions.write_tracking import has_tracked_write
from sqlasession_middleware._wsgi.file_wrapper import is_whole_file
from sqlasession_middleware.errors import ScopeError, TransactionAborted
from sqlasession_middleware.transaction import TransactionMiddleware

from .conftest import DATABASES, DATABASES_SEEN
from .drivers import Row, rows_on
from .wsgi import Environ, StartResponse, consume, environ

SIZE = 40_000
PIECES = [b"x" * 10_000] * 4
TEXT = ("Content-Type", "text/plain")
LENGTH = ("Content-Length", str(SIZE))
EVENTS = [("Content-Type", "text/event-stream")]


class Base(DeclarativeBase):
    pass


class Item(Base):
    # Other test runs may share the database servers.
    __tablename__ = f"giving_back_{uuid4().hex[:8]}"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(40))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "file.bin"
    path.write_bytes(b"x" * SIZE)
    return path


@pytest.fixture(scope="module", params=DATABASES)
def module_engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("database")
    engine = create_engine(DATABASES_SEEN.url(request.param, f"sqlite:///{folder}/test.db"))
    Base.metadata.create_all(engine)
    yield engine
    Base.metadata.drop_all(engine)
    engine.dispose()


@pytest.fixture
def engine(module_engine: Engine) -> Engine:
    """Each database in turn, with one row."""
    with module_engine.begin() as connection:
        connection.execute(Item.__table__.delete())
        connection.execute(insert(Item).values(name="one"))
    return module_engine


def stored(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.scalars(select(Item.name).order_by(Item.id)))


def held(app: SQLASessionMiddleware) -> int:
    return app.engine.pool.checkedout()  # type: ignore[attr-defined, no-any-return]


# -- the table: kinds of responses and what was done before


class Body:
    """An iterable with a ``close()`` that uses the session, as Flask's and Werkzeug's ``call_on_close`` do."""

    def __init__(self, chunks: Iterable[bytes], close: Callable[[], object]) -> None:
        self.chunks = chunks
        self.close = close

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.chunks)


Make = Callable[[Environ, StartResponse, Path], Iterable[bytes]]


class Inside:
    """As Django's responses: iterable, with a list inside and no length."""

    def __iter__(self) -> Iterator[bytes]:
        return iter(PIECES)


class Kind(NamedTuple):
    """A kind of response.

    :param make: makes it, after the work was done.
    :param whole: whether it is known to be complete before its first chunk.
    :param environ: what the request has.
    :param over: whether the server gets it without its scope.
    """

    make: Make
    whole: bool = False
    environ: dict[str, Any] = {}  # noqa: RUF012  # never changed
    over: bool = False


def plain(chunks: Callable[[], Iterable[bytes]], status: str = "200 OK", headers: Any = (TEXT, LENGTH)) -> Make:
    def make(environ: Environ, start: StartResponse, path: Path) -> Iterable[bytes]:
        start(status, list(headers))
        return chunks()

    return make


def generated(pieces: Iterable[bytes]) -> Iterator[bytes]:
    yield from pieces


def of_werkzeug(environ: Environ, start: StartResponse, path: Path) -> Iterable[bytes]:
    return Response(b"x" * SIZE)(environ, start)


def of_werkzeug_file(environ: Environ, start: StartResponse, path: Path) -> Iterable[bytes]:
    response = Response(wrap_file(environ, path.open("rb")), direct_passthrough=True, content_type="text/plain")
    response.content_length = SIZE
    response.make_conditional(environ, accept_ranges=True, complete_length=SIZE)
    return response(environ, start)


def of_flask(environ: Environ, start: StartResponse, path: Path) -> Iterable[bytes]:
    app = flask.Flask("files")
    app.add_url_rule("/", "file", lambda: flask.send_file(path, conditional=True))
    return app(environ, start)  # type: ignore[arg-type]


def of_webob(environ: Environ, start: StartResponse, path: Path) -> Iterable[bytes]:
    return webob.static.FileApp(str(path))(environ, start)  # type: ignore[no-any-return]


def of_pyramid(environ: Environ, start: StartResponse, path: Path) -> Iterable[bytes]:
    request = pyramid.request.Request(environ)
    response = pyramid.response.FileResponse(str(path), request=request)
    response.conditional_response = True
    return response(environ, start)


def of_falcon(environ: Environ, start: StartResponse, path: Path) -> Iterable[bytes]:
    class Resource:
        def on_get(self, request: Any, response: Any) -> None:
            response.set_stream(path.open("rb"), SIZE)

    app = falcon.App()
    app.add_route("/", Resource())
    return app(environ, start)


def of_bottle(environ: Environ, start: StartResponse, path: Path) -> Iterable[bytes]:
    app = bottle.Bottle()
    app.route("/", "GET", lambda: bottle.static_file(path.name, root=str(path.parent)))
    return app(environ, start)  # type: ignore[no-any-return]


def of_django(environ: Environ, start: StartResponse, path: Path) -> Iterable[bytes]:
    if not settings.configured:
        settings.configure(ALLOWED_HOSTS=["*"], SECRET_KEY="x", LOGGING_CONFIG=None, MIDDLEWARE=[], USE_TZ=True)
    response = django.http.FileResponse(path.open("rb"), content_type="text/plain")
    start("200 OK", list(response.items()))
    return response


def of_open_file(environ: Environ, start: StartResponse, path: Path) -> Iterable[bytes]:
    start("200 OK", [TEXT, LENGTH])
    return path.open("rb")


def of_temporary_file(environ: Environ, start: StartResponse, path: Path) -> Iterable[bytes]:
    file = tempfile.SpooledTemporaryFile()  # noqa: SIM115  # the response closes it
    file.write(path.read_bytes())
    file.seek(0)
    start("200 OK", [TEXT, LENGTH])
    return FileWrapper(file)


def of_server(environ: Environ, start: StartResponse, path: Path) -> Iterable[bytes]:
    start("200 OK", [TEXT, LENGTH])
    return environ["wsgi.file_wrapper"](path.open("rb"))  # type: ignore[no-any-return]


RANGE = {"HTTP_RANGE": "bytes=5-39990"}
WRAPPER = {"wsgi.file_wrapper": ServersWrapper}
KINDS = {
    "list": Kind(plain(lambda: list(PIECES)), whole=True),
    "tuple": Kind(plain(lambda: tuple(PIECES)), whole=True),
    "list without a length": Kind(plain(lambda: list(PIECES), headers=[TEXT]), whole=True),
    "iterator of one chunk": Kind(plain(lambda: map(bytes, [b"x" * SIZE]))),
    "iterator of several chunks": Kind(plain(lambda: map(bytes, PIECES))),
    "iterator of a list without a length": Kind(plain(lambda: iter(PIECES), headers=[TEXT])),
    "list inside of a response": Kind(plain(Inside, headers=[TEXT])),
    "generator": Kind(plain(lambda: generated(PIECES))),
    "generator with empty chunks": Kind(plain(lambda: generated([b"", *PIECES]))),
    "Werkzeug's response": Kind(of_werkzeug),
    "HEAD": Kind(plain(lambda: ClosingIterator(())), environ={"REQUEST_METHOD": "HEAD"}),
    "HEAD with a body": Kind(plain(lambda: generated(PIECES)), environ={"REQUEST_METHOD": "HEAD"}),
    "HEAD as a list": Kind(plain(list), whole=True, environ={"REQUEST_METHOD": "HEAD"}),
    "204": Kind(plain(lambda: ClosingIterator(()), "204 No Content", ())),
    "304": Kind(plain(lambda: iter([]), "304 Not Modified", (LENGTH,))),
    "no bytes": Kind(plain(lambda: iter([b""]), headers=(TEXT, ("Content-Length", "0")))),
    "server's file": Kind(of_server, whole=True, environ=WRAPPER, over=True),
    "server's file by a function": Kind(
        of_server, whole=True, environ={"wsgi.file_wrapper": lambda file, size=8192: file}, over=True
    ),
    "open file": Kind(of_open_file, whole=True),
    "temporary file": Kind(of_temporary_file, whole=True),
    "Werkzeug's file": Kind(of_werkzeug_file, whole=True),
    "range of Werkzeug's file": Kind(of_werkzeug_file, whole=True, environ=RANGE),
    "range of the server's file": Kind(of_werkzeug_file, whole=True, environ={**RANGE, **WRAPPER}),
    "Flask's file": Kind(of_flask, whole=True),
    "Flask's file by the server": Kind(of_flask, whole=True, environ=WRAPPER, over=True),
    "range of Flask's file": Kind(of_flask, whole=True, environ=RANGE),
    "WebOb's file": Kind(of_webob, whole=True),
    "range of WebOb's file": Kind(of_webob, whole=True, environ=RANGE),
    "Pyramid's file": Kind(of_pyramid, whole=True),
    "range of Pyramid's file": Kind(of_pyramid, whole=True, environ=RANGE),
    "Falcon's file": Kind(of_falcon, whole=True),
    "Bottle's file": Kind(of_bottle, whole=True),
    "range of Bottle's file": Kind(of_bottle, environ=RANGE),
    "Django's file": Kind(of_django, whole=True),
}


def first() -> Item:
    return session.scalars(select(Item).order_by(Item.id).limit(1)).one()


def read() -> None:
    assert first().name == "one"


def read_text() -> None:
    assert session.execute(text(f"SELECT name FROM {Item.__tablename__}")).all()


def write() -> None:
    read()
    session.add(Item(name="new"))
    session.flush()


def write_and_commit() -> None:
    write()
    session.commit()


CLOSABLE = [name for name, kind in KINDS.items() if not kind.whole]
WORKS = {"read": read, "written": write, "committed": write_and_commit}


def of_kind(kind: Kind, path: Path) -> Environ:
    environ = EnvironBuilder("/").get_environ()
    environ.update(kind.environ)
    return environ


@pytest.mark.parametrize("transaction", [False, True], ids=["plain", "transaction"])
@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_connection_is_back_before_the_response_is_complete(
    engine: Engine, path: Path, kind: Kind, work: str, transaction: bool
) -> None:
    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        WORKS[work]()
        return kind.make(environ, start, path)

    wrapped = SQLASessionMiddleware(app, engine, transaction=transaction)
    result: Any = wrapped(of_kind(kind, path), lambda status, headers, exc_info=None: lambda data: None)
    # What is not committed may be in the response's close().
    kept = 1 if work == "written" and not transaction and not kind.over else 0
    if kind.whole:
        assert held(wrapped) == kept
    counts = [held(wrapped) for chunk in result if chunk]
    assert counts[-1:] in ([], [kept])
    if kind.whole:
        assert set(counts) <= {kept}
    assert held(wrapped) == kept
    result.close()
    assert held(wrapped) == 0
    assert stored(engine) == (["one"] if work == "read" or (work == "written" and not transaction) else ["one", "new"])


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize(
    "kind", [name for name in KINDS if "generator" in name or "iterator" in name or "HEAD" in name]
)
def test_session_is_usable_in_close(engine: Engine, path: Path, kind: str, work: str) -> None:
    """It takes a connection again. What was written is there, and can still be committed."""
    seen: list[object] = []

    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        item, opened, local.word = first(), session(), "mine"
        WORKS[work]()

        def close() -> None:
            assert (session(), local.word) == (opened, "mine")
            assert item in session
            seen.append(item.name)
            item.name = "changed"
            session.commit()

        return Body(KINDS[kind].make(environ, start, path), close)

    wrapped = SQLASessionMiddleware(app, engine)
    consume(wrapped(of_kind(KINDS[kind], path), lambda status, headers, exc_info=None: lambda data: None))
    assert seen == ["one"]
    assert stored(engine) == ["changed", *([] if work == "read" else ["new"])]
    assert held(wrapped) == 0


# -- what is kept, and what is not


def open_cursor() -> Any:
    rows = session.execute(select(Item.id).execution_options(yield_per=1))
    next(rows)
    return rows


def open_cursor_by_option() -> Any:
    rows = session.execute(select(Item.id), execution_options={"yield_per": 1})
    next(rows)
    return rows


def begin() -> None:
    session.begin()
    read()


def begin_nested() -> None:
    session.begin_nested()
    read()


def lock() -> None:
    session.scalars(select(Item).with_for_update()).all()


def lock_by_text() -> None:
    session.execute(text(f"SELECT name FROM {Item.__tablename__} FOR UPDATE")).all()


def insert_core() -> None:
    session.execute(insert(Item).values(name="core"))


def insert_many() -> None:
    session.execute(insert(Item), [{"name": "core"}, {"name": "core"}])


def update_orm() -> None:
    session.execute(update(Item).values(name="updated"))


def insert_text() -> None:
    session.execute(text(f"INSERT INTO {Item.__tablename__} (name) VALUES ('text')"))


def insert_by_the_connection() -> None:
    session.connection().execute(insert(Item).values(name="connection"))


def insert_by_the_driver() -> None:
    read()
    cursor = session.connection().connection.cursor()
    cursor.execute(f"INSERT INTO {Item.__tablename__} (name) VALUES ('driver')")
    cursor.close()


def add() -> None:
    read()
    session.add(Item(name="unsaved"))


def change() -> None:
    first().name = "changed"


CURSORS = [open_cursor, open_cursor_by_option]
BLOCKS = [begin, begin_nested]
LOCKS = [lock, lock_by_text]
WRITES = [insert_core, insert_many, update_orm, insert_text, insert_by_the_connection, insert_by_the_driver]


@pytest.fixture
def rows(engine: Engine) -> None:
    """More than one row, so that a cursor has rows left."""
    with engine.begin() as connection:
        connection.execute(insert(Item), [{"name": "one"}] * 40)


@pytest.mark.parametrize("kind", ["list", "iterator of one chunk", "iterator of several chunks", "Werkzeug's file"])
@pytest.mark.parametrize("work", [*CURSORS, *BLOCKS, *LOCKS, *WRITES, add, change])
def test_connection_stays_where_something_would_be_lost(
    engine: Engine, rows: None, path: Path, kind: str, work: Callable[[], Any]
) -> None:
    if engine.dialect.name == "sqlite" and work in LOCKS:
        return  # It has no such locks, and no words for them.

    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        left.append(work())
        return KINDS[kind].make(environ, start, path)

    left: list[Any] = []
    wrapped = SQLASessionMiddleware(app, engine)
    result: Any = wrapped(of_kind(KINDS[kind], path), lambda status, headers, exc_info=None: lambda data: None)
    assert {held(wrapped) for _ in result} == {1}
    if work in CURSORS:
        assert next(left[0])
        left[0].close()
    result.close()
    assert held(wrapped) == 0


def read_in_batches() -> None:
    assert len(list(session.scalars(select(Item).execution_options(yield_per=1)))) == 1


READS = [
    read,
    read_text,
    read_in_batches,
    lambda: session.scalar(select(func.count(Item.id))),
    lambda: session.get(Item, 1),
]


@pytest.mark.parametrize("work", READS)
def test_reads_are_known_as_such(engine: Engine, work: Callable[[], object]) -> None:
    """Nothing is asked, neither the database nor the driver's connection."""
    sent: list[str] = []

    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        work()
        sent.clear()
        start("200 OK", [TEXT])
        return [b"x"]

    wrapped = SQLASessionMiddleware(app, engine)
    event.listen(engine, "reset", lambda connection, record, state: sent.append("reset"))
    result: Any = wrapped(environ(), lambda status, headers, exc_info=None: lambda data: None)
    assert (held(wrapped), sent) == (0, ["reset"])
    result.close()
    assert sent == ["reset"]


# -- what the application has in hand


def connection_not_used() -> Callable[[], object]:
    connection = session.connection()
    return lambda: connection.scalar(select(func.count(Item.id)))


def connection_that_has_read() -> Callable[[], object]:
    read()
    connection = session.connection()
    connection.execute(select(Item.id)).all()
    return lambda: connection.scalar(select(func.count(Item.id)))


def cursor_of_the_driver() -> Callable[[], object]:
    cursor: Any = session.connection().connection.cursor()

    def use() -> object:
        cursor.execute(f"SELECT COUNT(*) FROM {Item.__tablename__}")
        return cursor.fetchone()[0]

    return use


def on_mariadb() -> bool:
    return application.engine.dialect.name != "postgresql"


def temporary_table() -> Callable[[], object]:
    session.execute(text("CREATE TEMPORARY TABLE giving_back_own AS SELECT 1 AS one"))
    return lambda: session.scalar(text("SELECT one FROM giving_back_own"))


def named_lock() -> Callable[[], object]:
    name = zlib.crc32(Item.__tablename__.encode())
    if on_mariadb():
        assert session.scalar(select(func.get_lock(str(name), 0))) == 1
        return lambda: session.scalar(select(func.release_lock(str(name))))
    assert session.scalar(select(func.pg_try_advisory_lock(name)))
    return lambda: session.scalar(select(func.pg_advisory_unlock(name)))


def named_lock_by_text(suffix: str = "", **options: Any) -> Callable[[], object]:
    name = zlib.crc32(Item.__tablename__.encode())
    functions = ("GET_LOCK", "RELEASE_LOCK") if on_mariadb() else ("pg_advisory_lock", "pg_advisory_unlock")
    arguments = (f"'{name}', 0", f"'{name}'") if on_mariadb() else (name, name)
    session.execute(text(f"SELECT {functions[0]}({arguments[0]}){suffix}"), execution_options=options)
    return lambda: session.scalar(text(f"SELECT {functions[1]}({arguments[1]})"))


def named_lock_by_long_text() -> Callable[[], object]:
    return named_lock_by_text(" " * 10_000)


def named_lock_without_parameters() -> Callable[[], object]:
    return named_lock_by_text(no_parameters=True)


def variable() -> Callable[[], object]:
    if on_mariadb():
        session.execute(text("SELECT @giving_back \\:= 1"))
        return lambda: session.scalar(text("SELECT @giving_back"))
    session.execute(text("SELECT set_config('giving.back', '1', false)"))
    return lambda: int(session.scalar(text("SELECT current_setting('giving.back')")) or 0)


HANDS = [connection_not_used, connection_that_has_read, cursor_of_the_driver]
LOCKED = [named_lock, named_lock_by_text, named_lock_by_long_text, named_lock_without_parameters]
KEPT = [temporary_table, *LOCKED, variable]


class InHand:
    """An application that goes on, when its response is complete, with what its call has got.

    Meanwhile other requests have the connections that were given back.
    """

    def __init__(self, get: Callable[[], Callable[[], object]], kind: str, engine: Engine) -> None:
        self.get = get
        self.kind = kind
        self.engine = engine
        self.found: object = None
        self.held = 0

    def __call__(self, environ: Environ, start: StartResponse) -> Iterable[bytes]:
        use = self.get()
        start("200 OK", EVENTS if "event" in self.kind else [TEXT, ("Content-Length", "1")])
        return self.steps(use) if self.kind != "close" else Body(iter([b"x"]), lambda: self.use(use))

    def steps(self, use: Callable[[], object]) -> Iterator[bytes]:
        if self.kind == "generator":
            yield b"x"
        if self.kind == "second event":
            yield b"data: first\n\n"
        self.use(use)
        if "event" in self.kind:
            yield b"data: x\n\n"

    def use(self, use: Callable[[], object]) -> None:
        with self.engine.connect():
            self.found, self.held = use(), self.engine.pool.checkedout()  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["close", "generator", "event"])
@pytest.mark.parametrize("level", [None, "AUTOCOMMIT"])
@pytest.mark.parametrize("get", HANDS)
def test_connection_in_hand_is_not_closed(
    engine: Engine, get: Callable[[], Callable[[], object]], level: Any, kind: str
) -> None:
    own = create_engine(engine.url, **({"isolation_level": level} if level else {}))
    app = InHand(get, kind, own)
    wrapped = SQLASessionMiddleware(app, own)
    consume(wrapped(environ(), lambda status, headers, exc_info=None: lambda data: None))
    assert (app.found, app.held, held(wrapped)) == (1, 2, 0)
    own.dispose()


@pytest.mark.parametrize("kind", ["close", "generator"])
@pytest.mark.parametrize("level", [None, "AUTOCOMMIT"])
@pytest.mark.parametrize("get", KEPT)
def test_what_a_connection_keeps_is_there_when_the_response_is_complete(
    server_url: str, get: Callable[[], Callable[[], object]], level: Any, kind: str
) -> None:
    """It may be kept by the connection, whether there is a transaction or not."""
    own = create_engine(server_url, **({"isolation_level": level} if level else {}))
    app = InHand(get, kind, own)
    wrapped = SQLASessionMiddleware(app, own)
    consume(wrapped(environ(), lambda status, headers, exc_info=None: lambda data: None))
    assert (app.found, app.held, held(wrapped)) == (1, 2, 0)
    own.dispose()


@pytest.mark.parametrize("level", [None, "AUTOCOMMIT"])
@pytest.mark.parametrize("get", LOCKED)
def test_lock_of_the_session_is_there_in_the_first_event(
    server_url: str, get: Callable[[], Callable[[], object]], level: Any
) -> None:
    """Otherwise it would stay with a connection that others get."""
    own = create_engine(server_url, **({"isolation_level": level} if level else {}))
    app = InHand(get, "event", own)
    wrapped = SQLASessionMiddleware(app, own)
    consume(wrapped(environ(), lambda status, headers, exc_info=None: lambda data: None))
    assert (app.found, app.held, held(wrapped)) == (1, 2, 0)
    own.dispose()


def row_locked_in_a_subquery() -> Callable[[], object]:
    session.execute(select(select(Item.id).with_for_update().subquery())).all()

    def use() -> int:
        with pytest.raises(DBAPIError), application.engine.begin() as other:
            other.execute(select(Item.id).with_for_update(nowait=True))
        return 1

    return use


@pytest.mark.parametrize("kind", ["close", "generator", "event"])
def test_row_that_a_subquery_has_locked_stays_locked(engine: Engine, kind: str) -> None:
    if engine.dialect.name == "sqlite":
        return
    app = InHand(row_locked_in_a_subquery, kind, engine)
    wrapped = SQLASessionMiddleware(app, engine)
    consume(wrapped(environ(), lambda status, headers, exc_info=None: lambda data: None))
    assert (app.found, app.held, held(wrapped)) == (1, 2, 0)


MANY = Table(f"giving_back_{uuid4().hex[:8]}", MetaData(), Column("id", Integer))


def aborted() -> Callable[[], object]:
    """PostgreSQL has given up the INSERT. MariaDB can still commit it."""
    insert_core()
    with pytest.raises(DBAPIError):
        session.execute(text("SELECT * FROM giving_back_missing"))

    def use() -> int:
        if on_mariadb():
            session.commit()
        else:
            with pytest.raises(TransactionAborted):
                session.commit()
            session.rollback()
        return 1

    return use


@pytest.mark.parametrize("kind", ["close", "generator", "event", "second event"])
def test_commit_after_an_error_is_an_error_when_the_response_is_complete(engine: Engine, kind: str) -> None:
    """The work is lost, and the application must not take it for done."""
    app = InHand(aborted, kind, engine)
    wrapped = SQLASessionMiddleware(app, engine)
    consume(wrapped(environ(), lambda status, headers, exc_info=None: lambda data: None))
    assert (app.found, held(wrapped)) == (1, 0)
    assert stored(engine) == (["one", "core"] if engine.dialect.name != "postgresql" else ["one"])


def rows_half_read() -> Callable[[], object]:
    rows = session.execute(select(MANY))
    rows.fetchone()
    return lambda: len(rows.all())


STREAMING = {
    "an option of the engine": lambda row: {"execution_options": {"stream_results": True, "max_row_buffer": 2}},
    "a class of cursors": lambda row: {
        "connect_args": {"cursorclass": import_module(f"{row.module}.cursors").SSCursor}
    },
}


@pytest.mark.parametrize("kind", ["close", "generator", "event"])
@pytest.mark.parametrize("option", STREAMING)
@pytest.mark.parametrize("row", rows_on("postgresql", "mariadb"))
def test_rows_are_all_there_when_the_engine_streams_them(row: Row, option: str, kind: str) -> None:
    if option == "a class of cursors" and row.module not in ("pymysql", "MySQLdb"):
        return
    plain = create_engine(row.url())
    MANY.create(plain)
    with plain.begin() as connection:
        connection.execute(insert(MANY), [{"id": number} for number in range(1000)])
    app = InHand(rows_half_read, kind, plain)
    wrapped = SQLASessionMiddleware(app, row.url(), engine_options=STREAMING[option](row))
    consume(wrapped(environ(), lambda status, headers, exc_info=None: lambda data: None))
    assert (app.found, held(wrapped)) == (999, 0)
    wrapped.dispose()
    MANY.drop(plain)
    plain.dispose()


PLAIN = [
    "SELECT a.id, a.name AS insert_name FROM a WHERE a.id IN (1, 2) ORDER BY a.id LIMIT 3",
    "SELECT count(*) AS n FROM (SELECT DISTINCT a.id FROM a) AS b",
    "WITH c AS (SELECT 1) SELECT * FROM c",
    "SELECT CAST(a.id AS VARCHAR(40)), lower(a.name) FROM a WHERE NOT (EXISTS (SELECT 1 FROM b))",
    "SELECT now(), current_date FROM a",
    "SELECT version(), pg_backend_pid(), inet_server_port() FROM a",
]
DOUBTFUL = [
    "INSERT INTO a VALUES (1)",
    "SELECT a.id FROM a FOR UPDATE",
    "SELECT a.id FROM a FOR KEY SHARE",
    "SELECT * INTO b FROM a",
    "WITH c AS (DELETE FROM a RETURNING id) SELECT * FROM c",
    "SELECT nextval('s')",
    "SELECT pg_catalog.set_config('a', 'b', true)",
    'SELECT "count"(1)',
    "SELECT mine.count(1)",
    "SELECT mine.version()",
    "SELECT mine /* hidden */ (1)",
    "SELECT mine -- hidden\n (1)",
    "SELECT 1; DROP TABLE a",
    "EXPLAIN ANALYZE DELETE FROM a",
    "SET LOCAL a = 'b'",
    "CALL p()",
    "LOCK TABLE a",
]


@pytest.mark.parametrize("statement", PLAIN)
def test_plain_reads_leave_nothing(statement: str) -> None:
    assert judge(statement) > Reading.DOUBTFUL


@pytest.mark.parametrize("statement", DOUBTFUL)
def test_doubt_counts_as_a_write(statement: str) -> None:
    assert judge(statement) is Reading.DOUBTFUL


def test_failure_to_give_back_is_logged_and_the_response_sent(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """The database goes away between the SELECT and the ROLLBACK."""

    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        read()
        start("200 OK", [TEXT, ("Content-Length", "1")])
        return environ["body"]  # type: ignore[no-any-return]

    def fail(connection: Any) -> None:
        raise OperationalError("ROLLBACK", {}, Exception("away"))

    own = create_engine(engine.url)
    wrapped = SQLASessionMiddleware(app, own)
    event.listen(own, "rollback", fail)
    for body in ([b"x"], iter([b"x"])):
        caplog.clear()
        result: Any = wrapped(environ(body=body), lambda status, headers, exc_info=None: lambda data: None)
        chunks = [(chunk, held(wrapped)) for chunk in result]
        result.close()
        assert chunks == [(b"x", 0)]
        assert [record.finisher for record in caplog.records] == ["session.remove"]  # type: ignore[attr-defined]
    own.dispose()


def test_kill_while_the_connection_goes_back_ends_the_request(engine: Engine) -> None:
    closed: list[bool] = []

    class Killed(BaseException):
        pass

    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        read()
        start("200 OK", EVENTS)
        return Body((), lambda: closed.append(session.registry.has()))

    def kill(connection: Any) -> None:
        raise Killed

    own = create_engine(engine.url)
    wrapped = SQLASessionMiddleware(app, own)
    event.listen(own, "rollback", kill)
    with pytest.raises(Killed):
        wrapped(environ(), lambda status, headers, exc_info=None: lambda data: None)
    assert (closed, held(wrapped)) == ([True], 0)
    own.dispose()


def test_body_without_a_length_is_as_it_was(engine: Engine) -> None:
    """Nobody knows that it is complete."""

    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        read()
        start("200 OK", [TEXT])
        return generated(PIECES)

    wrapped = SQLASessionMiddleware(app, engine)
    result: Any = wrapped(environ(), lambda status, headers, exc_info=None: lambda data: None)
    assert {held(wrapped) for _ in result} == {1}
    result.close()


def test_steps_after_the_length_was_reached_can_go_on(engine: Engine) -> None:
    def app(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        start("200 OK", [TEXT, ("Content-Length", "2")])
        item = first()
        yield b"x"
        counts.append(held(wrapped))
        yield b"y"
        counts.append(held(wrapped))
        item.name = "after"
        session.commit()
        yield b""

    counts: list[int] = []
    wrapped = SQLASessionMiddleware(app, engine)
    assert consume(wrapped(environ(), lambda status, headers, exc_info=None: lambda data: None)) == b"xy"
    assert counts == [1, 0]
    assert stored(engine) == ["after"]


def test_transaction_that_is_in_charge_ends_by_itself(engine: Engine) -> None:
    """Another middleware declares a length that its own transaction does not know of."""
    inner = TransactionMiddleware(lambda environ, start: start("200 OK", [TEXT]) and generated_with_reads())

    def generated_with_reads() -> Iterator[bytes]:
        read()
        yield b"x"
        counts.append(held(wrapped))
        yield b"y"

    def outer(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        body = inner(environ, lambda status, headers, exc_info=None: start(status, [TEXT, ("Content-Length", "1")]))
        return (chunk for chunk in body)

    counts: list[int] = []
    wrapped = SQLASessionMiddleware(outer, engine)
    result: Any = wrapped(environ(), lambda status, headers, exc_info=None: lambda data: None)
    assert [chunk for chunk in result if chunk] == [b"x", b"y"]
    result.close()
    assert (counts, held(wrapped)) == ([1], 0)


# -- event streams, before the first event


class Waiting:
    """A stream of events that tells how many connections are held while it waits for the first one."""

    def __init__(self, work: Callable[[], object], headers: Any = EVENTS, fails: bool = False) -> None:
        self.work = work
        self.headers = headers
        self.fails = fails
        self.seen: list[int] = []
        self.while_waiting: Callable[[], object] = lambda: None

    def __call__(self, environ: Environ, start: StartResponse) -> Iterable[bytes]:
        self.work()
        start("200 OK", self.headers)
        return self.events()

    def events(self) -> Iterator[bytes]:
        self.seen.append(application.engine.pool.checkedout())  # type: ignore[attr-defined]
        self.while_waiting()
        if self.fails:
            raise LookupError
        yield b"data: x\n\n"


def first_event(app: SQLASessionMiddleware) -> None:
    result: Any = app(environ(), lambda status, headers, exc_info=None: lambda data: None)
    assert next(iter(result)) == b"data: x\n\n"
    result.close()


@pytest.mark.parametrize("transaction", [False, True])
@pytest.mark.parametrize("streams", [(), ("application/x-ndjson",)])
@pytest.mark.parametrize("work", [read, read_text, write_and_commit])
def test_stream_holds_nothing_before_its_first_event(
    engine: Engine, transaction: bool, streams: Any, work: Callable[[], object]
) -> None:
    waiting = Waiting(work, [("Content-Type", streams[0])] if streams else EVENTS)
    first_event(SQLASessionMiddleware(waiting, engine, transaction=transaction, streams=streams))
    assert waiting.seen == [0]


@pytest.mark.parametrize("work", [write, insert_text, update_orm, lock])
def test_row_is_free_before_the_first_event_when_there_is_a_transaction(
    engine: Engine, work: Callable[[], object]
) -> None:
    """What the call has done is a unit of its own: it is committed, and its locks are released."""

    def change_it() -> None:
        with engine.begin() as other:
            if engine.dialect.name != "sqlite":
                other.execute(select(Item.id).with_for_update(nowait=True)).all()
            other.execute(update(Item).values(name="other's"))

    waiting = Waiting(work)
    waiting.while_waiting = change_it
    first_event(SQLASessionMiddleware(waiting, engine, transaction=True))
    assert waiting.seen == [0]
    assert set(stored(engine)) == {"other's"}


@pytest.mark.parametrize("work", [write, insert_text, begin])
def test_stream_without_a_transaction_keeps_what_is_not_committed(engine: Engine, work: Callable[[], object]) -> None:
    waiting = Waiting(work)
    first_event(SQLASessionMiddleware(waiting, engine))
    assert waiting.seen == [1]
    assert stored(engine) == ["one"]


def test_block_of_the_application_stays_open_before_the_first_event(engine: Engine) -> None:
    waiting = Waiting(begin)
    first_event(SQLASessionMiddleware(waiting, engine, transaction=True))
    assert waiting.seen == [1]


def test_stream_is_rolled_back_before_its_first_event_when_it_is_vetoed(engine: Engine) -> None:
    asked: list[str] = []

    def veto(environ: Environ, status: str, headers: Any) -> bool:
        asked.append(status)
        return True

    waiting = Waiting(write)
    first_event(SQLASessionMiddleware(waiting, engine, transaction={"commit_veto": veto}))
    assert (waiting.seen, asked) == ([0], ["200 OK"])
    assert stored(engine) == ["one"]


@pytest.mark.parametrize(("work", "calls"), [(read, 2), (write, 1)])
def test_request_is_repeated_if_it_has_only_read_before_its_first_event(
    engine: Engine, work: Callable[[], object], calls: int
) -> None:
    waiting = Waiting(work, fails=True)
    options = {"attempts": 2, "retry_on": LookupError, "backoff_base": 0.0}
    with pytest.raises(LookupError):
        first_event(SQLASessionMiddleware(waiting, engine, transaction=options))
    assert len(waiting.seen) == calls


def test_stream_does_not_begin_when_its_call_was_given_up(server_url: str) -> None:
    """PostgreSQL has aborted the transaction: the work is lost, and the client must not take it for done."""
    if not server_url.startswith("postgresql"):
        return

    def work() -> None:
        session.execute(text("SELECT 1"))
        with pytest.raises(DBAPIError):
            session.execute(text("SELECT * FROM giving_back_missing"))

    waiting = Waiting(work)
    wrapped = SQLASessionMiddleware(waiting, server_url, transaction=True)
    with pytest.raises(Exception, match="aborted"):
        first_event(wrapped)
    assert waiting.seen == []
    wrapped.dispose()


# -- files that the application reads


class Rows:
    """A file without a descriptor, each read of which is a query."""

    def __init__(self, wrapped: SQLASessionMiddleware | None = None) -> None:
        self.left = 3
        self.closed = 0
        self.opened: Session | None = None

    def read(self, size: int = -1) -> bytes:
        assert size == 4096
        self.opened = self.opened or session()
        assert session() is self.opened
        self.left -= 1
        return session.scalar(select(Item.name).order_by(Item.id)).encode() if self.left >= 0 else b""

    def close(self) -> None:
        assert session() is self.opened
        self.closed += 1


class Decorated(io.RawIOBase):
    """Below a buffer of Python's: that calls it."""

    def __init__(self) -> None:
        self.rows = Rows()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.rows.read(4096)
        buffer[: len(data)] = data
        return len(data)


WRAPPERS = {"a class": ServersWrapper, "a function": lambda file, size=8192: file}


@pytest.mark.parametrize("transaction", [False, True])
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_file_keeps_its_scope_when_the_application_reads_it(
    engine: Engine, wrapper: str, used: bool, transaction: bool
) -> None:
    rows = Rows()

    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        local.word = "mine"
        if used:
            read()
        start("200 OK", [TEXT])
        return environ["wsgi.file_wrapper"](rows, 4096)  # type: ignore[no-any-return]

    wrapped = SQLASessionMiddleware(app, engine, transaction=transaction)
    request = environ(**{"wsgi.file_wrapper": WRAPPERS[wrapper]})
    result: Any = wrapped(request, lambda status, headers, exc_info=None: lambda data: None)
    assert request["wsgi.file_wrapper"] is WRAPPERS[wrapper]
    assert b"".join(result) == b"oneoneone"
    result.close()
    assert (rows.closed, held(wrapped)) == (1, 0)


@pytest.mark.parametrize("transaction", [False, True])
def test_what_a_file_writes_is_committed_with_its_response(engine: Engine, transaction: bool) -> None:
    class Log(Rows):
        def read(self, size: int = -1) -> bytes:
            insert_core()
            return super().read(size)

    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        start("200 OK", [TEXT, ("Content-Length", "6")])
        return environ["wsgi.file_wrapper"](log, 4096)  # type: ignore[no-any-return]

    log = Log()
    log.left = 2
    wrapped = SQLASessionMiddleware(app, engine, transaction=transaction)
    result = wrapped(environ(**WRAPPER), lambda status, headers, exc_info=None: lambda data: None)
    assert consume(result) == b"oneone"
    assert stored(engine) == (["one", "core", "core", "core"] if transaction else ["one"])


def test_buffer_around_the_applications_file_is_the_applications(engine: Engine) -> None:
    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        start("200 OK", [TEXT])
        return environ["wsgi.file_wrapper"](io.BufferedReader(Decorated(), 4096))  # type: ignore[no-any-return]

    wrapped = SQLASessionMiddleware(app, engine)
    result = wrapped(environ(**WRAPPER), lambda status, headers, exc_info=None: lambda data: None)
    assert consume(result) == b"oneoneone"


FILES = {
    "in memory": lambda path: io.BytesIO(b"x"),
    "opened": lambda path: path.open("rb"),
    "temporary": lambda path: tempfile.TemporaryFile(),  # noqa: SIM115
    "temporary with a name": lambda path: tempfile.NamedTemporaryFile(),  # noqa: SIM115
}


@pytest.mark.parametrize("make", FILES.values(), ids=FILES)
def test_other_files_are_the_servers_alone(engine: Engine, path: Path, make: Callable[[Path], Any]) -> None:
    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        read()
        start("200 OK", [TEXT])
        return environ["wsgi.file_wrapper"](make(path))  # type: ignore[no-any-return]

    wrapped = SQLASessionMiddleware(app, engine)
    result: Any = wrapped(environ(**WRAPPER), lambda status, headers, exc_info=None: lambda data: None)
    assert type(result) is ServersWrapper
    assert held(wrapped) == 0
    with pytest.raises(ScopeError):
        release()
    result.close()


def test_what_is_not_committed_is_named(engine: Engine) -> None:
    wrapped = SQLASessionMiddleware(lambda environ, start: [], engine)
    with wrapped.context():
        assert uncommitted(session()) == ""
        session.execute(insert(Item).values(name="new"))
        assert uncommitted(session()) == "uncommitted changes"


def test_session_of_another_class_may_have_written() -> None:
    assert has_tracked_write(Session())


class Unreadable:
    """A file whose ``read`` cannot even be looked at."""

    @property
    def read(self) -> object:
        raise LookupError


def test_body_that_is_no_known_file_is_none(path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"x"

    ended = pieces()
    list(ended)
    nested: Any = path.open("rb")
    with nested:
        for _ in range(4):
            nested = FileWrapper(nested)
        assert [is_whole_file(body) for body in (ended, pieces(), FileWrapper(Unreadable()), nested)] == [False] * 4  # type: ignore[arg-type]


@pytest.mark.parametrize("veto", [None, lambda environ, status, headers: session.remove()], ids=["none", "removes"])
@pytest.mark.parametrize("status", ["200 OK", "500 Internal Server Error"])
def test_stream_is_what_it_was_whatever_the_veto_and_the_status(engine: Engine, veto: Any, status: str) -> None:
    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        read()
        start(status, EVENTS)
        return iter([b"data: 1\n\n", b"data: 2\n\n"])

    wrapped = SQLASessionMiddleware(app, engine, transaction={"commit_veto": veto})
    assert consume(wrapped(environ(), lambda *arguments: lambda data: None)) == b"data: 1\n\ndata: 2\n\n"
    assert held(wrapped) == 0
