"""``session`` and the names around it: the pattern of Werkzeug's documentation, feature by feature."""

from __future__ import annotations

import contextlib
import contextvars
import gc
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, String, create_engine, event, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker
from werkzeug.wsgi import ClosingIterator

from sqlasession_middleware import SQLASessionMiddleware, application, local, local_manager, metadata, session
from sqlasession_middleware._sessions import registry as sessions
from sqlasession_middleware.errors import ScopeError, TransactionAborted
from sqlasession_middleware.testing import isolated
from tests.wsgi import Environ, RecordedSession, StartResponse, assert_given_back, consume, environ, select_one
from tests.wsgi import start_response as send_nothing


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "test_sessions_note"
    query = session.query_property()

    id: Mapped[int] = mapped_column(primary_key=True)
    content: Mapped[str] = mapped_column(String(50))


def nothing(environ: Environ, start: StartResponse) -> Iterable[bytes]:
    return [b""]


@pytest.fixture
def app(database_url: str) -> Iterator[SQLASessionMiddleware]:
    app = SQLASessionMiddleware(
        nothing, database_url, session_options={"class_": RecordedSession}, metadata=Base.metadata
    )
    app.init_database()
    yield app
    app.drop_database()
    app.dispose()


def test_several_instances_of_one_class_have_an_engine_each(tmp_path) -> None:
    """Werkzeug's pattern exists for this."""

    def guestbook(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        start("200 OK", [])
        if environ["REQUEST_METHOD"] == "POST":
            session.add(Note(content=environ["PATH_INFO"]))
            session.commit()
        return [note.content.encode() for note in Note.query.order_by(Note.id)]

    red, blue = (
        SQLASessionMiddleware(guestbook, f"sqlite:///{tmp_path}/{name}.db", metadata=Base.metadata)
        for name in ("red", "blue")
    )
    for app in (red, blue):
        app.init_database()
    consume(red(environ("POST", PATH_INFO="/red"), send_nothing))
    consume(blue(environ("POST", PATH_INFO="/blue"), send_nothing))
    assert consume(red(environ(), send_nothing)) == b"/red"
    assert consume(blue(environ(), send_nothing)) == b"/blue"
    for app in (red, blue):
        app.dispose()


@pytest.mark.parametrize("where", ["a context", "a request that commits by itself"])
def test_commit_of_what_the_database_has_given_up_is_refused(app: SQLASessionMiddleware, where: str) -> None:
    """PostgreSQL answers such a COMMIT with a ROLLBACK. Elsewhere a failed statement undoes only itself."""

    def work() -> None:
        session.add(Note(content="kept"))
        session.flush()
        with pytest.raises(DBAPIError):
            session.execute(text("no SQL"))
        session.commit()

    def serve(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        work()
        return nothing(environ, start)

    gives_up = app.engine.dialect.name == "postgresql"
    with pytest.raises(TransactionAborted) if gives_up else contextlib.nullcontext():
        if where == "a context":
            with app.context():
                work()
        else:
            consume(SQLASessionMiddleware(serve, app.engine)(environ(), send_nothing))
    with app.context():
        assert [note.content for note in Note.query] == ([] if gives_up else ["kept"])
    assert_given_back(app.engine)


def test_application_is_the_instance_and_knows_its_engine(app: SQLASessionMiddleware) -> None:
    with app.context():
        assert application == app
        assert application.database_engine is application.engine is app.engine
        assert session.bind is app.engine
    assert not application


def test_context_gives_the_scoped_session_and_rolls_back_what_was_not_committed(app: SQLASessionMiddleware) -> None:
    with app.context() as given:
        assert given is session
        given.add(Note(content="kept"))
        given.commit()
        given.add(Note(content="lost"))
        given.flush()
    assert_given_back(app.engine)
    with app.context():
        assert session.scalars(select(Note.content)).all() == ["kept"]


def test_context_ends_when_its_block_raises(app: SQLASessionMiddleware) -> None:
    def fail() -> None:
        select_one()
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"), app.context():
        fail()
    assert_given_back(app.engine)
    assert dict(local) == {}


def test_contexts_nest(app: SQLASessionMiddleware) -> None:
    with app.context():
        outer = session()
        local.word = "outer"
        with app.context():
            assert session() is not outer
            assert not hasattr(local, "word")
        assert session() is outer
        assert local.word == "outer"


def test_context_is_refused_when_it_is_entered_twice_at_once(app: SQLASessionMiddleware) -> None:
    context = app.context()
    with context, pytest.raises(ScopeError, match="already entered"):
        context.__enter__()
    with context:  # One after the other is fine.
        select_one()
    context.__exit__(None, None, None)


def test_context_warns_and_ends_when_it_is_dropped(app: SQLASessionMiddleware) -> None:
    context = app.context()
    context.__enter__()
    select_one()
    with pytest.warns(ResourceWarning, match="dropped with its session open"):
        del context
    assert_given_back(app.engine)
    assert dict(local) == {}


def test_shell_can_bind_an_application_by_hand(app: SQLASessionMiddleware) -> None:
    local.application = app
    session.add(Note(content="by hand"))
    session.commit()
    assert [note.content for note in Note.query] == ["by hand"]
    assert app.engine.pool.checkedout() == 1
    first = session()
    session.remove()
    assert_given_back(app.engine)
    assert select_one() == 1  # The application is still bound: the next use opens another session.
    assert session() is not first
    local_manager.cleanup()
    assert_given_back(app.engine)
    assert not application


def test_shell_keeps_other_values_when_the_session_is_used(app: SQLASessionMiddleware) -> None:
    local.word = "kept"
    local.application = app
    select_one()
    assert local.word == "kept"
    local.other = 1
    assert dict(local) == {"word": "kept", "application": app, "other": 1}
    del local.other
    local_manager.cleanup()


def test_shell_finds_its_binding_again_after_a_request(app: SQLASessionMiddleware) -> None:
    local.application = app
    mine = session()
    consume(app(environ(), send_nothing))
    assert session() is mine
    local_manager.cleanup()


def test_shell_cannot_change_the_application_when_its_session_is_open(app: SQLASessionMiddleware) -> None:
    """Or the session would go on writing to the database of the application before."""
    other = SQLASessionMiddleware(nothing, "sqlite://")
    local.application = app
    select_one()
    with pytest.raises(ScopeError, match=r"call session\.remove\(\) first"):
        local.application = other
    local.application = app
    session.remove()
    local.application = other
    assert session.bind is other.engine
    select_one()
    local_manager.cleanup()
    assert_given_back(app.engine)
    assert other.engine.pool.checkedout() == 0
    other.dispose()


def test_connection_is_freed_when_a_shell_thread_ends(app: SQLASessionMiddleware) -> None:
    def shell() -> None:
        local.application = app
        select_one()
        assert app.engine.pool.checkedout() == 1

    thread = threading.Thread(target=shell)
    thread.start()
    thread.join()
    del thread
    gc.collect()
    assert_given_back(app.engine)


def test_failing_close_is_logged_when_a_shell_scope_is_dropped(sqlite_url: str, caplog) -> None:
    class Failing(Session):
        def close(self) -> None:
            raise ValueError("close")

    app = SQLASessionMiddleware(nothing, sqlite_url, session_options={"class_": Failing})
    local.application = app
    select_one()
    local_manager.cleanup()
    assert "dropped shell scope" in caplog.text
    assert app.engine.pool.checkedout() == 0
    app.dispose()


class SeedApplication:
    """The pattern as Werkzeug's documentation had it, on this library's names."""

    def __init__(self, database_uri: str) -> None:
        self.database_engine = create_engine(database_uri)

    def __call__(self, environ: Environ, start: StartResponse) -> Iterable[bytes]:
        local.application = self
        response = [str(session.execute(text("SELECT 7")).scalar_one()).encode()]
        return ClosingIterator(response, [local_manager.cleanup, session.remove])

    def init_database(self) -> None:
        metadata.create_all(self.database_engine)


def test_literal_pattern_leaks_nothing(sqlite_url: str) -> None:
    """It cleans the Local before it removes the session, and still the connection comes back."""
    app = SeedApplication(sqlite_url)
    app.init_database()
    assert consume(app(environ(), send_nothing)) == b"7"
    assert app.database_engine.pool.checkedout() == 0
    assert dict(local) == {}
    app.database_engine.dispose()


def test_error_says_what_is_missing_when_the_bound_object_has_no_engine() -> None:
    local.application = "shop"
    with pytest.raises(ScopeError, match="'shop', which has no 'database_engine'"):
        select_one()
    local_manager.cleanup()


def test_error_names_context_when_nothing_is_bound() -> None:
    with pytest.raises(ScopeError, match=r"with app\.context\(\)"):
        select_one()
    with pytest.raises(RuntimeError, match=r"with app\.context\(\)"):
        application.engine  # noqa: B018
    local.word = "a Local in use, but no application"
    with pytest.raises(ScopeError, match=r"with app\.context\(\)"):
        session()
    assert not session.registry.has()
    session.remove()
    session.registry.clear()
    del local.word


def test_error_says_that_the_request_is_over_when_its_context_was_kept(app: SQLASessionMiddleware) -> None:
    """A background thread started by the request, for one."""
    kept: list[contextvars.Context] = []

    def keeping(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        kept.append(contextvars.copy_context())
        kept[0].run(select_one)
        return [b"x"]

    consume(SQLASessionMiddleware(keeping, app.engine)(environ(), send_nothing))
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(ScopeError, match="The request is over"):
            pool.submit(kept[0].run, select_one).result()
        with pytest.raises(RuntimeError, match="request is over"):
            pool.submit(kept[0].run, lambda: application.engine).result()
    assert_given_back(app.engine)

    def bind_anew() -> int:
        local.application = app
        return select_one()

    assert kept[0].run(bind_anew) == 1
    kept[0].run(local_manager.cleanup)
    assert_given_back(app.engine)


def test_threads_of_one_request_share_its_session(app: SQLASessionMiddleware) -> None:
    def in_threads(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        barrier = threading.Barrier(8)

        def open_it() -> Session:
            barrier.wait(timeout=30)
            return session()

        with ThreadPoolExecutor(8) as pool:
            opened = {
                each.result() for each in [pool.submit(contextvars.copy_context().run, open_it) for _ in range(8)]
            }
        assert opened == {session()}
        return [b"x"]

    wrapped = SQLASessionMiddleware(in_threads, app.engine)
    for _ in range(20):
        consume(wrapped(environ(), send_nothing))


def test_session_is_the_one_that_another_thread_opened_in_the_meantime(
    app: SQLASessionMiddleware, monkeypatch: pytest.MonkeyPatch
) -> None:
    with app.context():
        others = app.new_session()

        class LockOfALoser:
            def __enter__(self) -> None:
                session.registry.set(others)

            def __exit__(self, *error: object) -> None:
                pass

        monkeypatch.setattr(sessions, "_opening", LockOfALoser())
        assert session() is others


def test_session_opened_by_a_thread_as_the_request_ends_is_closed(app: SQLASessionMiddleware) -> None:
    """The end cannot see a session that is only being made. Whoever makes it has to."""
    making, ended = threading.Event(), threading.Event()

    class Slow(RecordedSession):
        def __init__(self, **options: object) -> None:
            super().__init__(**options)
            making.set()
            assert ended.wait(timeout=30)
            self.connection()

    workers: list[contextvars.Context] = []

    def starting(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        workers.append(contextvars.copy_context())
        return [b"x"]

    wrapped = SQLASessionMiddleware(starting, app.engine, session_options={"class_": Slow})
    result = wrapped(environ(), send_nothing)
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(workers[0].run, session)
        assert making.wait(timeout=30)
        result.close()
        ended.set()
        with pytest.raises(ScopeError, match="ended while"):
            opening.result()
    assert_given_back(app.engine)


def test_remove_ends_the_session_and_the_next_use_opens_another(app: SQLASessionMiddleware) -> None:
    with app.context():
        first = session()
        select_one()
        session.remove()
        assert app.engine.pool.checkedout() == 0
        assert session() is not first


def test_remove_raises_after_giving_back_when_the_close_fails(sqlite_url: str) -> None:
    app = SQLASessionMiddleware(nothing, sqlite_url)
    with app.context():
        session.connection().connection.dbapi_connection.close()
        with pytest.raises(Exception, match="closed database"):
            session.remove()
        assert not session.registry.has()
        assert app.engine.pool.checkedout() == 0
        select_one()
    app.dispose()


def test_connection_is_clean_when_the_database_has_refused_a_commit(sqlite_url: str) -> None:
    """SQLite leaves the transaction open when a deferred constraint is violated."""
    engine = create_engine(sqlite_url)
    event.listen(engine, "connect", lambda connection, record: connection.execute("PRAGMA foreign_keys = ON"))
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE tree (id INTEGER PRIMARY KEY, up REFERENCES tree DEFERRABLE INITIALLY DEFERRED)"
        )

    def swallowing(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        session.execute(text("INSERT INTO tree (up) VALUES (2)"))
        with pytest.raises(IntegrityError):
            session.commit()
        return [b""]

    app = SQLASessionMiddleware(swallowing, engine)
    consume(app(environ(), send_nothing))
    with app.context():
        assert not session.connection().connection.dbapi_connection.in_transaction
        # This row would have made the other one valid.
        session.execute(text("INSERT INTO tree (id) VALUES (2)"))
        session.commit()
        assert session.scalars(text("SELECT id FROM tree")).all() == [2]
    assert engine.pool.checkedout() == 0
    engine.dispose()


def test_connections_of_every_bind_are_freed_when_the_first_one_fails(tmp_path) -> None:
    """Session.close() stops at the first rollback that raises."""
    engines = [create_engine(f"sqlite:///{tmp_path}/{number}.db") for number in range(3)]
    app = SQLASessionMiddleware(nothing, engines[0])
    with app.context():
        for engine in engines:
            session.connection(bind_arguments={"bind": engine}).connection.dbapi_connection.close()
    assert [engine.pool.checkedout() for engine in engines] == [0, 0, 0]
    for engine in engines:
        engine.dispose()


def test_connection_of_the_caller_is_left_to_it_when_the_close_fails(sqlite_url: str) -> None:
    """A Session bound to a Connection, as in a test's outer transaction, does not own it."""
    engine = create_engine(sqlite_url)
    app = SQLASessionMiddleware(nothing, engine)

    def fail(connection: Connection) -> None:
        raise ValueError("rollback")

    with engine.connect() as connection:
        with app.context():
            session(bind=connection).execute(text("SELECT 1"))
            event.listen(engine, "rollback", fail)
        event.remove(engine, "rollback", fail)
        assert not connection.invalidated
        assert not connection.closed
    assert engine.pool.checkedout() == 0
    engine.dispose()


def test_scoped_session_is_sqlalchemys_own(app: SQLASessionMiddleware) -> None:
    assert isinstance(session, scoped_session)
    with app.context():
        special = session(autoflush=False)
        assert session() is special
        assert special.autoflush is False
        session.registry.clear()
        assert not session.registry.has()
        session.registry.set(special)
        assert session() is special
        other = session.session_factory()
        assert other is not special
        assert other.bind is app.engine
        other.close()


#: What sessions are made of: options of the middleware.
MADE_OF: dict[str, dict[str, Any]] = {
    "SQLAlchemy's Session": {},
    "the application's own Session": {"session_options": {"class_": RecordedSession}},
    "binds": {"binds": {"audit": "sqlite://"}},
    "replicas": {"replicas": ["sqlite://"]},
    "binds and replicas": {"binds": {"audit": "sqlite://"}, "replicas": ["sqlite://"]},
    "replicas and the application's own Session": {
        "replicas": ["sqlite://"],
        "session_options": {"class_": RecordedSession},
    },
}


@contextlib.contextmanager
def heard(name: str) -> Iterator[list[Session]]:
    """The sessions that an event of the global session was heard of in the block."""
    sessions: list[Session] = []

    def hear(each: Session, *more: object) -> None:
        sessions.append(each)

    event.listen(session, name, hear)
    try:
        assert event.contains(session, name, hear)
        yield sessions
    finally:
        event.remove(session, name, hear)
    assert not event.contains(session, name, hear)


@pytest.mark.parametrize("made_of", MADE_OF)
def test_event_is_heard_when_the_target_is_the_global_session(database_url: str, made_of: str) -> None:
    """In each session: one made before and one made after, in a request, in a context, in isolation, and by hand."""
    used: list[Session] = []

    def write() -> None:
        used.append(session())
        session.add(Note(content="heard"))
        session.commit()

    def writing(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        write()
        start("200 OK", [])
        return [b""]

    app = SQLASessionMiddleware(writing, database_url, metadata=Base.metadata, **MADE_OF[made_of])
    app.init_database()
    with app.new_session() as before, heard("before_flush") as sessions:
        before.add(Note(content="heard"))
        before.flush()
        before.rollback()
        for method in ("GET", "POST"):
            consume(app(environ(method), send_nothing))
        with app.context():
            write()
        with isolated(app):
            consume(app(environ(), send_nothing))
        with app.new_session() as after:
            after.add(Note(content="heard"))
            after.flush()
    assert sessions == [before, *used, after]
    assert len(used) == 4
    with app.context():
        write()
    assert len(sessions) == 6
    app.drop_database()
    app.dispose()


def test_event_is_heard_when_an_application_was_made_after_the_listener() -> None:
    class Later(Session):
        pass

    with heard("after_begin") as sessions:
        app = SQLASessionMiddleware(nothing, "sqlite://", session_options={"class_": Later})
        with app.context():
            select_one()
            assert sessions == [session()]
    app.dispose()


def test_event_is_not_heard_when_a_session_is_not_of_the_library(sqlite_engine: Engine) -> None:
    with heard("after_begin") as sessions, Session(sqlite_engine) as other:
        other.execute(text("SELECT 1"))
    assert sessions == []


def test_object_event_is_heard_when_the_target_is_the_global_session(app: SQLASessionMiddleware) -> None:
    """These are wrapped by SQLAlchemy, so that they are removed in another way."""
    with heard("pending_to_persistent") as sessions:
        with app.context():
            session.add(Note(content="heard"))
            session.flush()
        assert len(sessions) == 1
    with app.context():
        session.add(Note(content="unheard"))
        session.flush()
    assert len(sessions) == 1


def test_session_factory_makes_sessions_of_the_current_application(app: SQLASessionMiddleware) -> None:
    """As extensions use it that need a Session of their own."""
    factory = session.session_factory
    assert isinstance(factory, sessionmaker)
    assert session.registry.createfunc is factory
    with pytest.raises(ScopeError):
        factory()
    with app.context():
        with factory.begin() as own:
            own.add(Note(content="kept"))
            assert own is not session()
            assert own.bind is app.engine
            assert isinstance(own, factory.class_)
            assert isinstance(own, RecordedSession)
        assert session.scalars(select(Note.content)).all() == ["kept"]
        with factory(expire_on_commit=False) as own:
            assert own.expire_on_commit is False


@pytest.mark.parametrize("configure", [session.configure, session.session_factory.configure])
def test_configure_is_refused_and_names_session_options(configure: Callable[..., None]) -> None:
    with pytest.raises(ScopeError, match=r"session\.configure\(autoflush\).*'session_options'"):
        configure(autoflush=False)


def test_nothing_keeps_session_or_application_alive_after_the_request(sqlite_url: str) -> None:
    seen: list[weakref.ref[object]] = []

    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        seen.append(weakref.ref(session()))
        select_one()
        return [b"x"]

    wrapped = SQLASessionMiddleware(app, sqlite_url)
    consume(wrapped(environ(), send_nothing))
    wrapped.dispose()
    seen.append(weakref.ref(wrapped))
    del wrapped, app
    gc.collect()
    assert [each() for each in seen] == [None, None]


def test_values_on_local_live_as_long_as_the_request(app: SQLASessionMiddleware) -> None:
    def storing(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        local.word = "mine"
        local.other = "too"
        del local.other
        return iter([local.word.encode(), b"!"])

    with app.context():
        local.word = "the caller's"
        assert consume(SQLASessionMiddleware(storing, app.engine)(environ(), send_nothing)) == b"mine!"
        assert local.word == "the caller's"
        with pytest.raises(AttributeError):
            local.other  # noqa: B018
