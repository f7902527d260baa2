"""after_commit(): once what the request has done is durable, and never otherwise."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import event, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.orm.exc import StaleDataError
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, after_commit, doom, local, release, session
from sqlasession_middleware.errors import ScopeError
from sqlasession_middleware.testing import isolated

from .wsgi import Environ, StartResponse


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = f"after_commit_{uuid4().hex[:12]}"
    id: Mapped[int] = mapped_column(primary_key=True)


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "transaction": {"transaction": True},
    "attempts": {"transaction": {"attempts": 3, "backoff_base": 0}},
}
MANAGED = ("transaction", "attempts")


class World:
    """An application whose requests do what a test says, and what was called after their commits."""

    def __init__(self, url: str, mode: str = "plain", **options: Any) -> None:
        #: the names, each with the number of rows that its call saw
        self.called: list[tuple[str, int]] = []
        self.work: Callable[[], object] = lambda: None
        self.status = "200 OK"
        # With one connection a call that is made before it was given back would wait for it.
        pool = {} if url.startswith("sqlite") else {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}
        self.app = SQLASessionMiddleware(
            self.answer, url, metadata=Base.metadata, engine_options=pool, **MODES[mode], **options
        )

    def answer(self, environ: Environ, start_response: StartResponse) -> list[bytes]:
        self.work()
        start_response(self.status, [("Content-Type", "text/plain")])
        return [b"done"]

    def ask(self) -> int:
        return Client(self.app).get("/", buffered=True).status_code

    def later(self, name: str) -> None:
        after_commit(lambda: self.called.append((name, count())))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.called]


def count() -> int:
    return session.scalars(select(func.count()).select_from(Item)).one()


def write() -> None:
    session.add(Item())
    session.flush()


@pytest.fixture
def make(database_url: str) -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def make(mode: str = "plain", **options: Any) -> World:
        world = World(database_url, mode, **options)
        if not worlds:
            world.app.init_database()
        worlds.append(world)
        return world

    yield make
    if worlds:
        worlds[0].app.drop_database()
    for world in worlds:
        world.app.dispose()


# -- what the application does, and what is called. In "plain" a commit of its own comes last.


def write_between(world: World) -> None:
    world.later("a")
    write()
    world.later("b")


def send_nothing(world: World) -> None:
    world.later("a")


def only_read(world: World) -> None:
    world.later("a")
    count()
    release()  # In isolation it gives nothing back.
    world.later("b")
    count()


def commit_itself(world: World) -> None:
    world.later("a")
    write()
    session.commit()
    assert world.called == [("a", 1)]
    world.later("b")


def roll_back_itself(world: World) -> None:
    world.later("a")
    write()
    session.rollback()
    world.later("b")
    write()


def close_itself(world: World) -> None:
    world.later("a")
    write()
    session.close()
    world.later("b")
    write()


def roll_back_before_any_sql(world: World) -> None:
    world.later("a")
    session.rollback()
    world.later("b")


def give_in_a_listener_of_the_commit(world: World) -> None:
    write()
    event.listen(session(), "after_commit", lambda session: world.later("a"))


def give_another_in_a_listener_of_the_commit(world: World) -> None:
    world.later("a")
    event.listen(session(), "after_commit", lambda session: world.later("b"))
    write()


def release_savepoint(world: World) -> None:
    world.later("a")
    with session.begin_nested():
        write()
        world.later("b")
    assert world.called == []


def roll_back_after_a_savepoint(world: World) -> None:
    with session.begin_nested():
        write()
        world.later("a")
    session.rollback()
    world.later("b")
    write()


def roll_back_savepoints(world: World) -> None:
    world.later("a")
    outer = session.begin_nested()
    world.later("of the outer one")
    with session.begin_nested():
        world.later("of the inner one")
        write()
    outer.rollback()
    world.later("b")
    write()


def remove_session(world: World) -> None:
    """As recipes for frameworks do in their teardown. In "plain" that ends the work."""
    world.later("a")
    if world.app._policy is not None:
        session.remove()


STORIES: dict[Callable[[World], None], list[tuple[str, int]]] = {
    write_between: [("a", 1), ("b", 1)],
    send_nothing: [("a", 0)],
    only_read: [("a", 0), ("b", 0)],
    commit_itself: [("a", 1), ("b", 1)],
    roll_back_itself: [("b", 1)],
    close_itself: [("b", 1)],
    roll_back_before_any_sql: [("b", 0)],
    give_in_a_listener_of_the_commit: [("a", 1)],
    give_another_in_a_listener_of_the_commit: [("a", 1), ("b", 1)],
    release_savepoint: [("a", 1), ("b", 1)],
    roll_back_after_a_savepoint: [("b", 1)],
    roll_back_savepoints: [("a", 1), ("b", 1)],
    remove_session: [("a", 0)],
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_calls_are_made_once_the_work_is_durable(make: Any, story: Callable[[World], None], mode: str) -> None:
    world = make(mode)

    def work() -> None:
        story(world)
        if mode == "plain":
            session.commit()

    world.work = work
    assert world.ask() == 200
    assert world.called == STORIES[story]


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
@pytest.mark.parametrize("way", ["context", "isolated"])
def test_calls_are_made_outside_of_a_request_and_in_isolation(make: Any, story: Any, way: str) -> None:
    world = make("plain" if way == "context" else "transaction")
    if way == "context":
        with world.app.context():
            story(world)
            session.commit()
    else:
        world.work = lambda: story(world)
        with isolated(world.app):
            assert world.ask() == 200
    assert world.called == STORIES[story]


def fail(world: World) -> None:
    raise RuntimeError


def answer_404(world: World) -> None:
    world.status = "404 Not Found"


def fail_to_commit(world: World) -> None:
    event.listen(session(), "before_commit", lambda session: fail(world))


ENDS = [fail, answer_404, lambda world: doom(), fail_to_commit]


@pytest.mark.parametrize("mode", MANAGED)
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("work", [lambda: None, write], ids=["nothing sent", "write"])
def test_nothing_is_called_when_the_request_is_rolled_back(make: Any, mode: str, end: Any, work: Any) -> None:
    world = make(mode)

    def do() -> None:
        world.later("a")
        work()
        end(world)

    world.work = do
    try:
        world.ask()
    except RuntimeError:
        pass
    assert world.called == []
    assert rows(world) == 0


def rows(world: World) -> int:
    with world.app.context():
        return count()


def test_nothing_is_called_without_a_commit(make: Any) -> None:
    world = make()
    world.work = lambda: write_between(world)
    assert world.ask() == 200
    assert world.called == []


def test_nothing_of_a_stream_that_is_vetoed_is_called_by_a_later_commit(make: Any) -> None:
    world = make("transaction")

    def app(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
        start_response("404 Not Found", [("Content-Type", "text/event-stream")])
        world.later("a")
        yield b"data: 1\n\n"
        session.commit()
        yield b"data: 2\n\n"

    world.app._inner.app = app
    assert world.ask() == 404
    assert world.called == []


def test_calls_of_each_event_are_made_before_it_leaves(make: Any) -> None:
    world = make("transaction")

    def app(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        for number in range(2):
            write()
            world.later(f"call {number}")
            yield b"data: %d\n\n" % number

    world.app._inner.app = app
    seen = []
    response = Client(world.app).get("/")
    for _ in response.response:
        seen.append(list(world.called))
    response.close()
    assert seen == [[("call 0", 1)], [("call 0", 1), ("call 1", 2)]]


def test_calls_are_made_once_over_all_attempts(make: Any) -> None:
    world = make("attempts")
    attempts = []

    def work() -> None:
        attempts.append(1)
        world.later(f"attempt {len(attempts)}")
        write()
        if len(attempts) < 3:
            raise StaleDataError

    world.work = work
    assert world.ask() == 200
    assert world.called == [("attempt 3", 1)]


def test_failure_of_a_call_is_logged_and_changes_nothing(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    world = make("transaction")

    def work() -> None:
        write()
        after_commit(lambda: fail(world))
        world.later("b")

    world.work = work
    assert world.ask() == 200
    assert world.called == [("b", 1)]
    (record,) = [each for each in caplog.records if each.name == "sqlasession_middleware.after_commit"]
    assert record.levelno == logging.ERROR
    assert record.exc_info


def test_call_has_a_scope_of_its_own_and_commits_by_itself(make: Any) -> None:
    world = make("transaction")
    seen: list[Any] = []

    def inner() -> None:
        seen.append((hasattr(local, "mark"), session()))
        after_commit(lambda: seen.append(count()))
        write()
        session.commit()
        write()

    def work() -> None:
        local.mark = True
        seen.append(session())
        write()
        after_commit(inner)

    world.work = work
    assert world.ask() == 200
    outer, (has_mark, own), in_call = seen
    assert not has_mark
    assert own is not outer
    assert in_call == 2
    assert rows(world) == 2


def leave_uncommitted() -> None:
    write()


def leave_unsaved() -> None:
    session.add(Item())


def fail_at_the_end() -> None:
    raise RuntimeError


INSIDE: dict[Callable[[], object], bool] = {
    lambda: None: True,
    count: True,
    lambda: (write(), session.commit()): True,
    leave_uncommitted: False,
    leave_unsaved: False,
    fail_at_the_end: False,
}


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("way", ["after_commit", "background"])
def test_what_a_call_gives_follows_it_unless_it_leaves_work_undone(make: Any, inside: Any, way: str) -> None:
    world = make("transaction")

    def call() -> None:
        if way == "after_commit":
            world.later("inner")
        else:
            world.app.background(world.called.append, ("inner", 0))
        inside()

    world.work = lambda: (write(), after_commit(call))
    assert world.ask() == 200
    world.app.dispose()
    assert world.names == (["inner"] if INSIDE[inside] else [])


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interruption_of_a_call_comes_after_the_others(make: Any, error: Any) -> None:
    world = make("transaction")

    def interrupt() -> None:
        raise error

    def work() -> None:
        write()
        after_commit(interrupt)
        world.later("b")

    world.work = work
    with pytest.raises(error):
        world.ask()
    assert world.called == [("b", 1)]


async def coroutine() -> None:
    pass


def generator() -> Iterator[None]:
    yield


@pytest.mark.parametrize("function", [coroutine, generator])
def test_call_that_has_not_done_its_work_is_logged(make: Any, function: Any, caplog: pytest.LogCaptureFixture) -> None:
    world = make("transaction")
    world.work = lambda: after_commit(partial(function))
    assert world.ask() == 200
    (record,) = caplog.records
    assert record.getMessage() == f"A call after the commit failed: {function.__name__}"
    assert "after_commit() needs a function that has done its work" in str(record.exc_info[1])  # type: ignore[index]


def test_log_shows_no_arguments_of_a_call(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    world = make("transaction")
    world.work = lambda: after_commit(partial(fail, "pa55word"))  # type: ignore[arg-type]
    assert world.ask() == 200
    assert "A call after the commit failed: fail" in caplog.text
    assert "pa55word" not in caplog.text


def test_session_that_a_call_refers_to_is_freed_with_its_request(make: Any) -> None:
    world = make()
    sessions: list[weakref.ref[Any]] = []

    def work() -> None:
        own = session()
        sessions.append(weakref.ref(own))
        after_commit(lambda: own)

    world.work = work
    assert world.ask() == 200
    gc.collect()
    assert sessions[0]() is None


def test_call_belongs_to_the_innermost_scope(make: Any) -> None:
    world = make("transaction")

    def work() -> None:
        world.later("of the request")
        with world.app.context():
            world.later("of the context")
        with world.app.context():
            world.later("committed")
            session.commit()
        assert world.names == ["committed"]

    world.work = work
    assert world.ask() == 200
    assert world.names == ["committed", "of the request"]


def test_error_says_what_is_wrong(make: Any) -> None:
    with pytest.raises(ScopeError, match="No application is bound"):
        after_commit(print)
    world = make()
    with world.app.context(), pytest.raises(TypeError, match="after_commit\\(\\) needs a function, got 3"):
        after_commit(3)  # type: ignore[type-var]

    class Old:
        database_engine = world.app.engine

    local.application = Old()
    try:
        with pytest.raises(ScopeError, match=r"needs an application with context\(\)"):
            after_commit(print)
    finally:
        del local.application


def test_decorator_returns_the_function(make: Any) -> None:
    world = make()
    with world.app.context():

        @after_commit
        def call() -> None:
            world.called.append(("decorated", 0))

        session.commit()
        call()
    assert world.names == ["decorated"] * 2
