"""Transactions of jobs and scripts, and calls in the background."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import create_engine, event, func, select, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.orm.exc import StaleDataError
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, after_commit, doom, has_scope, local, repeat, session
from sqlasession_middleware.errors import ConfigurationError, DeadlineError, ScopeError
from sqlasession_middleware.testing import isolated

from .wsgi import Environ, StartResponse

PATIENCE = 30.0


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = f"jobs_{uuid4().hex[:12]}"
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(default=0)


def answer(environ: Environ, start_response: StartResponse) -> list[bytes]:
    environ["work"]()
    start_response(environ.get("status", "200 OK"), [("Content-Type", "text/plain")])
    return [b"done"]


@pytest.fixture
def make(database_url: str) -> Iterator[Callable[..., SQLASessionMiddleware]]:
    made: list[SQLASessionMiddleware] = []

    def make(**options: Any) -> SQLASessionMiddleware:
        app = SQLASessionMiddleware(answer, database_url, metadata=Base.metadata, **options)
        if not made:
            app.init_database()
        made.append(app)
        return app

    yield make
    for app in made:
        app.dispose()
    if made:
        made[0].drop_database()
        made[0].dispose()


def write(number: int = 0) -> int:
    item = Item(number=number)
    session.add(item)
    session.flush()
    return item.id


def numbers(app: SQLASessionMiddleware) -> list[int]:
    with app.context():
        return list(session.scalars(select(Item.number).order_by(Item.number)))


def ask(app: SQLASessionMiddleware, work: Callable[[], object], **more: Any) -> int:
    return Client(app).get("/", buffered=True, environ_overrides={"work": work, **more}).status_code


# -- run()


def test_run_commits_what_returns_and_rolls_back_what_raises(make: Any) -> None:
    app = make()
    assert isinstance(app.run(write, 1), int)
    assert not has_scope()

    def fail() -> None:
        write(2)
        raise KeyError("reason")

    with pytest.raises(KeyError, match="reason"):
        app.run(fail)
    app.run(lambda: (write(3), doom()))
    assert numbers(app) == [1]


class Conflicts:
    """A job that meets a conflict in its first attempts.

    :param before: what each attempt does before it writes.
    :param after: what it does after that.
    """

    def __init__(
        self, times: int, before: Callable[[], object] = lambda: None, after: Callable[[], object] = lambda: None
    ) -> None:
        self.times, self.before, self.after = times, before, after
        self.attempts = 0

    def __call__(self) -> int:
        self.attempts += 1
        assert not hasattr(local, "mark")
        local.mark = self.attempts
        self.before()
        write(self.attempts)
        self.after()
        if self.attempts <= self.times:
            raise StaleDataError
        return self.attempts


QUICK = {"backoff_base": 0}


@pytest.mark.parametrize(
    ("options", "given", "attempts"),
    [
        ({}, None, 1),
        ({}, 3, 3),
        ({"transaction": True}, None, 1),
        ({"transaction": {"attempts": 3, **QUICK}}, None, 3),
        ({"transaction": {"attempts": 3, **QUICK}, "unavailable": True}, 2, 2),
    ],
)
def test_run_repeats_what_may_not_recur(
    make: Any, caplog: pytest.LogCaptureFixture, options: Any, given: int | None, attempts: int
) -> None:
    app = make(**options)
    job = Conflicts(attempts - 1)
    assert app.run(job, attempts=given) == attempts
    assert numbers(app) == [attempts]
    assert [record.getMessage().partition(" of Conflicts")[0] for record in caplog.records] == [
        f"Attempt {number} of {attempts}" for number in range(1, attempts)
    ]
    job = Conflicts(attempts)
    with pytest.raises(StaleDataError):
        app.run(job, attempts=given)
    assert job.attempts == attempts


def commit() -> None:
    session.commit()


def commit_elsewhere(app: SQLASessionMiddleware) -> None:
    app.run(write, 9)


@pytest.mark.parametrize("other", [False, True], ids=["its own commit", "that of another job"])
def test_run_repeats_nothing_that_has_committed(make: Any, other: bool) -> None:
    app = make()
    job = Conflicts(1, before=lambda: commit_elsewhere(app)) if other else Conflicts(1, after=commit)
    with pytest.raises(StaleDataError):
        app.run(job, attempts=3)
    assert job.attempts == 1


def test_run_repeats_when_asked_to(make: Any) -> None:
    app = make()
    attempts: list[int] = []

    def job() -> int:
        attempts.append(write(len(attempts)))
        repeat(RuntimeError("busy"))
        return len(attempts)

    assert app.run(job, attempts=3) == 3
    assert numbers(app) == []


def test_run_repeats_further_errors_of_the_option(make: Any) -> None:
    app = make(transaction={"attempts": 2, "retry_on": [KeyError], **QUICK})
    attempts: list[int] = []

    def job() -> None:
        attempts.append(1)
        if len(attempts) < 2:
            raise KeyError

    app.run(job)
    assert len(attempts) == 2


def test_run_is_not_repeated_when_it_is_interrupted(make: Any) -> None:
    app = make()
    job = Conflicts(0, after=lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        app.run(job, attempts=3)
    assert job.attempts == 1
    assert numbers(app) == []


def test_run_tells_an_unknown_outcome_and_repeats_nothing(
    make: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make()
    job = Conflicts(0)
    driver_error = app.engine.dialect.loaded_dbapi.OperationalError

    @event.listens_for(app.engine, "handle_error")
    def note(context: Any) -> None:
        context.is_disconnect = True

    def do_commit(driver_connection: Any) -> None:
        raise driver_error("server closed the connection unexpectedly")

    monkeypatch.setattr(app.engine.dialect, "do_commit", do_commit)
    with pytest.raises(OperationalError):
        app.run(job, attempts=3)
    assert job.attempts == 1
    assert any("It is not known whether" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("unfinished", ["generator", "coroutine"])
def test_run_refuses_a_function_that_has_not_done_its_work(make: Any, unfinished: str) -> None:
    app = make()

    def generator() -> Iterator[int]:
        yield write()

    async def coroutine() -> None:
        pass

    made = {"generator": generator, "coroutine": coroutine}[unfinished]()

    with pytest.raises(TypeError, match=f"returns {unfinished}: call it in a function that uses up"):
        app.run(lambda: made)
    made.close()  # type: ignore[union-attr]


def test_run_ends_all_attempts_by_its_deadline(server_url: str) -> None:
    app = SQLASessionMiddleware.without_app(server_url)
    sleep = func.pg_sleep(20) if server_url.startswith("postgresql") else func.sleep(20)
    begun = time.monotonic()
    with pytest.raises(DeadlineError):
        app.run(lambda: session.execute(select(sleep)).all(), attempts=3, deadline=0.5)
    assert time.monotonic() - begun < 10
    app.dispose()


def test_jobs_that_lock_each_other_all_succeed(server_url: str) -> None:
    app = SQLASessionMiddleware.without_app(server_url, metadata=Base.metadata)
    app.init_database()
    first, second = app.run(lambda: (write(), write()))
    meet = threading.Barrier(2)
    attempts: list[int] = []

    def job(one: int, two: int) -> None:
        attempts.append(one)
        for number, key in enumerate((one, two)):
            session.execute(update(Item).where(Item.id == key).values(number=Item.number + 1))
            if number == 0 and len(attempts) <= 2:
                meet.wait(PATIENCE)

    try:
        with ThreadPoolExecutor(2) as threads:
            jobs = [threads.submit(app.run, job, *keys, attempts=3) for keys in ((first, second), (second, first))]
            for each in jobs:
                each.result(PATIENCE)
        assert len(attempts) == 3
        assert numbers(app) == [2, 2]
    finally:
        app.drop_database()
        app.dispose()


def test_run_in_a_request_has_a_transaction_of_its_own(make: Any) -> None:
    app = make(transaction=True)
    called: list[str] = []

    def job() -> None:
        write(1)
        after_commit(lambda: called.append("job"))

    def work() -> None:
        after_commit(lambda: called.append("request"))
        app.run(job)
        assert called == ["job"]
        raise KeyError

    with pytest.raises(KeyError):
        ask(app, work)
    assert called == ["job"]
    assert numbers(app) == [1]


@pytest.mark.parametrize("attempts", [0, True, "3"])
def test_run_refuses_attempts_that_are_no_number(make: Any, attempts: Any) -> None:
    with pytest.raises(ConfigurationError, match="attempts must be a whole number from 1"):
        make().run(print, attempts=attempts)


# -- background()


class Gate:
    """Holds calls in the background until it is opened."""

    def __init__(self) -> None:
        self.is_open = threading.Event()
        self.begun = threading.Semaphore(0)
        self.done: list[Any] = []

    def __call__(self, name: Any = None) -> None:
        self.begun.release()
        assert self.is_open.wait(PATIENCE)
        self.done.append(name)


def test_call_in_the_background_is_a_job(make: Any) -> None:
    app = make(transaction={"attempts": 3, **QUICK})
    job = Conflicts(2)
    app.background(job)
    app.dispose()
    assert job.attempts == 3
    assert numbers(app) == [3]


@pytest.mark.parametrize("status", ["200 OK", "404 Not Found"])
def test_call_in_the_background_follows_the_commit_of_its_request(make: Any, status: str) -> None:
    app = make(transaction=True)
    seen: list[Any] = []

    def work() -> None:
        write(7)
        app.background(lambda: seen.append((numbers(app), threading.current_thread().name)))

    ask(app, work, status=status)
    app.dispose()
    assert seen == ([([7], "sqlasession-background")] if status.startswith("2") else [])


def test_call_in_the_background_follows_the_commit_of_a_context(make: Any) -> None:
    app, other = make(), make()
    gate = Gate()
    gate.is_open.set()
    with app.context():
        app.background(gate, "after the commit")
        other.background(gate, "of another application")
        other.dispose()
        assert gate.done == ["of another application"]
        session.commit()
    app.dispose()
    assert gate.done == ["of another application", "after the commit"]


def test_calls_in_the_background_are_made_by_so_many_threads_in_their_order(make: Any) -> None:
    app = make(background={"threads": 3})
    gate = Gate()
    for number in range(7):
        app.background(gate, number)
    for _ in range(3):
        assert gate.begun.acquire(timeout=PATIENCE)
    assert not gate.begun.acquire(blocking=False)
    gate.is_open.set()
    app.dispose()
    assert sorted(gate.done) == list(range(7))
    one = make(background={"threads": 1})
    done: list[int] = []
    for number in range(20):
        one.background(done.append, number)
    one.dispose()
    assert done == list(range(20))


def test_failure_in_the_background_is_logged(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    app = make()

    def fail() -> None:
        raise SystemExit("reason")

    app.background(fail)
    app.background(write, 1)
    app.dispose()
    assert numbers(app) == [1]
    (record,) = [each for each in caplog.records if each.name == "sqlasession_middleware.background"]
    assert record.levelno == logging.ERROR
    assert record.exc_info
    assert "reason" in str(record.exc_info[1])


def test_log_shows_no_arguments_of_a_job(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    app = make(transaction={"attempts": 2, **QUICK})

    def fail(password: str) -> None:
        raise StaleDataError

    app.background(fail, "pa55word")
    app.dispose()
    repeated, failed = [record.getMessage() for record in caplog.records]
    assert "Attempt 1 of 2 of test_log_shows_no_arguments_of_a_job.<locals>.fail failed" in repeated
    assert "A call in the background failed: test_log_shows_no_arguments_of_a_job.<locals>.fail" in failed
    assert "pa55word" not in caplog.text


def test_call_in_the_background_of_an_isolated_application_is_made_at_once(make: Any) -> None:
    app = make(transaction=True)
    gate = Gate()
    app.background(gate)
    assert gate.begun.acquire(timeout=PATIENCE)
    threading.Timer(0.1, gate.is_open.set).start()
    with isolated(app):
        assert gate.done == [None]  # What was begun before is not isolated, and is waited for.
        assert ask(app, lambda: app.background(write, 5)) == 200
        assert numbers(app) == [5]
        with isolated(app):
            app.background(write, 6)
            assert numbers(app) == [5, 6]
    assert numbers(app) == []
    app.background(write, 7)
    app.dispose()
    assert numbers(app) == [7]


def test_call_in_the_background_needs_a_thread(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    app = make(background={"threads": 2})
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't create"):
        app.background(write, 1)
    app.dispose()  # It waits for nothing.
    monkeypatch.setattr(threading.Thread, "start", start)
    gate = Gate()
    app.background(gate)
    assert gate.begun.acquire(timeout=PATIENCE)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    app.background(write, 2)  # There is one thread.
    gate.is_open.set()
    app.dispose()
    assert numbers(app) == [2]


def test_failure_in_the_background_of_an_isolated_application_is_logged(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    app = make()

    def fail() -> None:
        raise KeyError("reason")

    with isolated(app):
        app.background(fail)
    assert [each.name for each in caplog.records] == ["sqlasession_middleware.background"]


def test_dispose_waits_so_many_seconds(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    app = make(background={"threads": 1, "seconds": 0.05})
    gate = Gate()
    app.background(gate)
    app.background(gate)
    assert gate.begun.acquire(timeout=PATIENCE)
    app.dispose()
    (record,) = caplog.records
    assert "The time of 0.05 s for calls in the background is up: 1 have not ended, 1 have not begun" in record.message
    gate.is_open.set()
    app.dispose()


def test_deadline_of_the_request_is_none_of_the_jobs(make: Any) -> None:
    app = make(deadline=0.3, transaction=True)
    gate = Gate()

    def job() -> None:
        gate()
        write(1)

    ask(app, lambda: app.background(job))
    assert gate.begun.acquire(timeout=PATIENCE)
    time.sleep(0.35)
    gate.is_open.set()
    app.dispose()
    assert numbers(app) == [1]


def test_arguments_that_another_thread_must_not_use_are_refused(make: Any) -> None:
    app = make()
    with app.context():
        item = Item()
        session.add(item)
        with pytest.raises(TypeError, match="cannot take Item, which belongs to a Session"):
            app.background(print, item)
        app.background(print, Item(number=1))  # It belongs to none.
        app.background(print, Item)
        for belonging in (session, session()):
            with pytest.raises(TypeError, match="which belongs to a Session"):
                app.background(print, belonging)
        # It is not asked for a connection.
        app.background(print, create_engine("postgresql+psycopg://127.0.0.1:1/nowhere"))
    with pytest.raises(TypeError, match=r"background\(\) needs a function, got 3"):
        app.background(3)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"threads": 0}, r"background\['threads'\] must be a whole number from 1, got 0"),
        ({"seconds": -1}, r"background\['seconds'\] must be a number of seconds from 0, got -1"),
        ({"thread": 1}, r"background\['thread'\] is not an option; did you mean 'threads'"),
        (3, "background must be a dict of options, got 3"),
    ],
)
def test_error_names_the_option_of_the_background(options: Any, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        SQLASessionMiddleware(answer, "sqlite://", background=options)


SCRIPT = """
import os, sys, time
from sqlasession_middleware import SQLASessionMiddleware

app = SQLASessionMiddleware.without_app("sqlite://", background={"seconds": float(sys.argv[1])})

def job():
    time.sleep(float(sys.argv[2]))
    print("done", flush=True)

app.background(job)
"""


@pytest.mark.parametrize(
    ("patience", "duration", "said"), [("30", "0.3", "done\n"), ("0.1", "60", "")], ids=["in time", "too late"]
)
def test_end_of_the_process_waits_so_many_seconds(patience: str, duration: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, patience, duration], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0
    assert done.stdout == said
    assert ("have not ended" in done.stderr) is (said == "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
def test_child_of_a_fork_has_its_own_threads_and_none_of_the_parents_calls(make: Any) -> None:
    app = make(background={"threads": 1})
    gate = Gate()
    app.background(gate, "first")
    app.background(gate, "second")
    assert gate.begun.acquire(timeout=PATIENCE)
    pid = os.fork()
    if pid == 0:  # pragma: no cover  # in the child
        status = 1
        try:
            gate.is_open = threading.Event()
            gate.is_open.set()
            gate.done = []
            app.background(gate, "the child's")
            app._background.wait()
            status = 0 if gate.done == ["the child's"] else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    gate.is_open.set()
    app.dispose()
    assert gate.done == ["first", "second"]


# -- has_scope() and without_app()


def test_has_scope_where_the_session_finds_one(make: Any) -> None:
    app = make()
    assert not has_scope()
    seen: list[bool] = []
    ask(app, lambda: seen.append(has_scope()))
    assert seen == [True]
    with app.context():
        assert has_scope()
        local.release = True
    assert not has_scope()
    local.application = app
    assert has_scope()
    session()
    session.remove()
    assert has_scope()
    del local.application
    assert not has_scope()


def test_without_app_is_for_scripts(sqlite_url: str) -> None:
    app = SQLASessionMiddleware.without_app(sqlite_url, metadata=Base.metadata, transaction={"attempts": 2})
    app.init_database()
    app.run(write, 4)
    assert numbers(app) == [4]
    with pytest.raises(ConfigurationError, match=r"app is missing: without_app\(\) made this for scripts"):
        app({}, print)
    with pytest.raises(ScopeError):
        session()
    app.dispose()
