"""The report of connections that a request did not give back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool, QueuePool, SingletonThreadPool, StaticPool
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, application, session
from sqlasession_middleware.errors import ConfigurationError
from sqlasession_middleware.leaks import Checkouts
from sqlasession_middleware.testing import isolated

TOKEN = "2f7a"

#: what the application has taken, and keeps
kept: list[Any] = []
#: applications and engines of a test
used: list[Any] = []


@pytest.fixture(autouse=True)
def clean_up() -> Iterator[None]:
    """Close what was kept before its pool, which would not see it again."""
    yield
    while kept:
        kept.pop().close()
    while used:
        used.pop().dispose()


def use(owner: Any) -> Any:
    """Dispose of an application or engine when the test is over."""
    used.append(owner)
    return owner


@pytest.fixture
def reports(caplog) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO, "sqlasession_middleware.leaks")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "sqlasession_middleware.leaks"]


def take_connection() -> None:
    kept.append(application.engine.connect())


def take_raw_connection() -> None:
    kept.append(application.engine.raw_connection())


def take_session() -> None:
    kept.append(application.new_session())
    kept[-1].execute(text("SELECT 1"))


def take_of_a_bind() -> None:
    kept.append(application.engines["audit"].connect())


def take_of_a_replica() -> None:
    kept.append(application.engines["replicas[0]"].connect())


def take_in_an_inner_context() -> None:
    outer = application.engine
    with other.context():
        kept.append(outer.connect())


def take_after_another() -> None:
    with application.engine.connect():
        pass
    take_connection()


def use_the_session() -> None:
    session.execute(text("SELECT 1"))


def take_and_give_back() -> None:
    with application.engine.connect() as connection, application.new_session() as own:
        connection.execute(text("SELECT 1"))
        own.execute(text("SELECT 1"))


def take_and_detach() -> None:
    take_connection()
    kept[-1].detach()


def take_and_invalidate() -> None:
    take_connection()
    kept[-1].invalidate()


def take_and_drop() -> None:
    application.engine.raw_connection()  # Back in the pool as soon as it is garbage.


other = SQLASessionMiddleware(lambda environ, start_response: [], "sqlite://")

LEAKS = [
    take_connection,
    take_raw_connection,
    take_session,
    take_of_a_bind,
    take_of_a_replica,
    take_in_an_inner_context,
    take_after_another,
]
CLEAN = [use_the_session, take_and_give_back, take_and_detach, take_and_invalidate, take_and_drop]


def answer_with_a_list(work, environ, start_response):
    work()
    start_response("200 OK", [])
    return [b"done"]


def answer_with_a_stream(work, environ, start_response):
    start_response("200 OK", [])

    def stream():
        yield b"first"
        work()
        yield b"second"

    return stream()


def fail(work, environ, start_response):
    work()
    raise ZeroDivisionError


def made(folder, work: Callable[[], None], how=answer_with_a_list, **options: Any) -> SQLASessionMiddleware:
    def app(environ, start_response) -> Iterable[bytes]:
        return how(work, environ, start_response)

    return use(
        SQLASessionMiddleware(
            app,
            f"sqlite:///{folder}/primary.db",
            binds={"audit": f"sqlite:///{folder}/audit.db"},
            replicas=[f"sqlite:///{folder}/primary.db"],
            **{"report_leaks": True, **options},
        )
    )


@pytest.mark.parametrize("how", [answer_with_a_list, answer_with_a_stream, fail])
@pytest.mark.parametrize("work", LEAKS)
def test_tells_what_was_not_given_back_and_who_took_it(tmp_path, reports, work, how):
    app = made(tmp_path, work, how)
    try:
        Client(app).get("/guests", query_string={"token": TOKEN}, buffered=True)
    except ZeroDivisionError:
        assert how is fail
    (report,) = reports()
    assert report.startswith(f"GET '/guests' of {app!r} has ended without returning 1 of its connections")
    assert f"in {work.__name__}" in report
    assert "/sqlalchemy/" not in report
    assert TOKEN not in report


@pytest.mark.parametrize("work", CLEAN)
def test_tells_nothing_of_what_was_given_back(tmp_path, reports, work):
    app = made(tmp_path, work)
    Client(app).get("/", buffered=True)
    assert reports() == []


@pytest.mark.parametrize("pool", [NullPool, StaticPool, SingletonThreadPool, QueuePool])
def test_tells_it_of_each_pool(tmp_path, reports, pool):
    engine = use(create_engine(f"sqlite:///{tmp_path}/pool.db", poolclass=pool))
    app = SQLASessionMiddleware(lambda environ, start_response: [], engine, report_leaks=True)
    with app.context():
        take_connection()
        use_the_session()
        take_and_give_back()
    (report,) = reports()
    assert "without returning 1 of its connections" in report
    assert "in take_connection" in report


@pytest.mark.parametrize("folder", ["sqlalchemy", "sqlasession_middleware"])
def test_shows_an_application_whose_folder_is_called_as_the_library(tmp_path, reports, folder):
    (tmp_path / folder).mkdir()
    path = tmp_path / folder / "shop.py"
    path.write_text("def take_in_shop(): take_connection()")
    names = {"take_connection": take_connection}
    exec(compile(path.read_text(), path, "exec"), names)
    app = made(tmp_path, names["take_in_shop"])
    Client(app).get("/", buffered=True)
    (report,) = reports()
    assert "in take_in_shop" in report


def test_session_of_an_outer_scope_may_be_first_used_in_an_inner_one(tmp_path, reports):
    app, inner = made(tmp_path, use_the_session), made(tmp_path, use_the_session)
    with app.context():
        outer = session()
        with inner.context():
            outer.execute(text("SELECT 1"))
            take_connection()
        (report,) = reports()
        assert "without returning 1 of" in report
        assert "in take_connection" in report
    assert len(reports()) == 1


def test_connection_is_of_the_inner_scope_when_the_outer_one_has_no_session(tmp_path, reports):
    app = made(tmp_path, use_the_session)
    with app.context(), app.context():
        take_connection()
    (report,) = reports()
    assert "without returning 1 of" in report


def test_context_reports_as_a_request_does(tmp_path, reports):
    app = made(tmp_path, take_connection)
    with app.context():
        take_connection()
        assert reports() == []
    (report,) = reports()
    assert report.startswith("A context of ")


def test_each_request_answers_for_its_own(tmp_path, reports):
    app = made(tmp_path, take_connection)
    for number in range(3):
        Client(app).get(f"/{number}", buffered=True)
    assert [report.partition(" of ")[0] for report in reports()] == ["GET '/0'", "GET '/1'", "GET '/2'"]


def test_what_an_attempt_took_is_told_once_at_the_end(tmp_path, reports):
    def work() -> None:
        take_connection()
        if len(kept) == 1:
            raise_locked()

    app = made(tmp_path, work, transaction={"attempts": 2, "backoff_base": 0})
    assert Client(app).get("/", buffered=True).status_code == 200
    (report,) = reports()
    assert "without returning 2 of its connections" in report


def raise_locked() -> None:
    import sqlite3

    error = sqlite3.OperationalError("database is locked")
    error.sqlite_errorcode = sqlite3.SQLITE_BUSY
    raise OperationalError("SELECT 1", {}, error)


def test_an_engine_that_was_given_reports_once_for_two_applications(tmp_path, reports):
    engine = use(create_engine(f"sqlite:///{tmp_path}/given.db"))

    def app(environ, start_response):
        return answer_with_a_list(take_connection, environ, start_response)

    for wrapped in [SQLASessionMiddleware(app, engine, report_leaks=True) for _ in range(2)]:
        Client(wrapped).get("/", buffered=True)
    assert ["without returning 1 of" in report for report in reports()] == [True, True]


def test_tells_nothing_of_what_was_taken_outside_of_requests(tmp_path, reports):
    app = made(tmp_path, use_the_session)
    kept.append(app.engine.connect())
    Client(app).get("/", buffered=True)
    assert reports() == []


def test_without_the_option_nobody_listens(tmp_path, reports):
    app = made(tmp_path, take_connection, report_leaks=False)
    Client(app).get("/", buffered=True)
    assert reports() == []
    assert not list(app.engine.pool.dispatch.checkout)


def test_isolation_of_a_test_is_no_leak(tmp_path, reports):
    app = made(tmp_path, use_the_session)
    with isolated(app):
        Client(app).get("/", buffered=True)
        assert reports() == []
        take_within = made(tmp_path, take_connection)
        Client(take_within).get("/", buffered=True)
        assert len(reports()) == 1


def test_a_request_that_goes_on_for_long_remembers_nothing_that_was_given_back(tmp_path):
    engine = use(create_engine(f"sqlite:///{tmp_path}/long.db", pool_size=1, max_overflow=0))
    app = SQLASessionMiddleware(lambda environ, start_response: [], engine, report_leaks=True)
    with app.context():
        scope = application._get_current_object() and session.registry.scopefunc()
        for _ in range(100):
            with engine.connect():
                pass
        assert isinstance(scope.checkouts, Checkouts)
        assert len(scope.checkouts._stacks) == 0


def test_ini_key(tmp_path, reports):
    def app(environ, start_response):
        return answer_with_a_list(take_connection, environ, start_response)

    settings = {"sqlalchemy.url": f"sqlite:///{tmp_path}/ini.db", "report_leaks": "true"}
    wrapped = use(SQLASessionMiddleware.from_config(app, settings))
    Client(wrapped).get("/", buffered=True)
    assert len(reports()) == 1


@pytest.mark.parametrize(
    ("given", "shown"), [(1, "1"), ("yes", "'yes'"), ("postgresql://me:secret@db/shop", "a URL")], ids=repr
)
def test_wrong_value(given, shown):
    with pytest.raises(ConfigurationError) as caught:
        SQLASessionMiddleware(lambda environ, start_response: [], "sqlite://", report_leaks=given)
    assert str(caught.value) == f"report_leaks must be true or false, got {shown}."
