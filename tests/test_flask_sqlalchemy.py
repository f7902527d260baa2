"""The class that stands for Flask-SQLAlchemy's: its session, its contexts, its commit and its configuration.

What is the same with both is asked by Flask-SQLAlchemy's own suite, see tests/drop_in.
"""

from __future__ import annotations

import gc
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from contextvars import copy_context
from pathlib import Path
from typing import Any

import flask
import flask_sqlalchemy
import pytest
from flask import Flask, Response, g, request
from flask.sessions import SecureCookieSessionInterface
from flask_sqlalchemy.record_queries import get_recorded_queries
from flask_sqlalchemy.session import Session as TheirSession
from flask_sqlalchemy.track_modifications import models_committed
from sqlalchemy import Engine, String, create_engine, delete, event, insert, select, text
from sqlalchemy.exc import IntegrityError, OperationalError, UnboundExecutionError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool, StaticPool

import sqlasession_middleware
from sqlasession_middleware import SQLASessionMiddleware, after_commit
from sqlasession_middleware._database.pool import ObservedPool
from sqlasession_middleware._flask.middleware import FlaskMiddleware
from sqlasession_middleware._flask.settings import KEYS
from sqlasession_middleware.errors import ConfigurationError, ScopeError
from sqlasession_middleware.flask_sqlalchemy import SQLAlchemy
from sqlasession_middleware.testing import isolated

from .conftest import DATABASES, DATABASES_SEEN
from .ports import free_port
from .wsgi import start_response

View = Callable[[], Any]
NO_WAIT = {"backoff_base": 0}


class Site:
    """An application with one table, and the ``db`` that it is registered with.

    :param config: keys of the Flask configuration, over a URL of SQLite's memory.
    :param options: of the class.
    """

    def __init__(self, config: Mapping[str, Any] = {}, db: Any = None, name: str = "guests", **options: Any) -> None:
        class Base(DeclarativeBase):
            pass

        self.app = Flask(name)
        self.app.config.update({"SQLALCHEMY_DATABASE_URI": "sqlite://", "SECRET_KEY": "key", **config})
        self.db: Any = SQLAlchemy(model_class=Base, **options) if db is None else db
        if db is None:

            class Guest(self.db.Model):  # type: ignore[name-defined]
                id: Mapped[int] = mapped_column(primary_key=True)
                name: Mapped[str] = mapped_column(String(20), unique=True)

            self.Guest: Any = Guest
        self.db.init_app(self.app)

    def view(self, view: View) -> View:
        self.app.add_url_rule("/", view.__name__, view, methods=["GET", "POST"])
        return view

    def create(self, *names: str) -> Site:
        with self.app.app_context():
            self.db.drop_all()
            self.db.create_all()
            self.db.session.add_all(self.Guest(name=name) for name in names)
            self.db.session.commit()
        return self

    def add(self, name: str) -> None:
        self.db.session.add(self.Guest(name=name))

    def names(self) -> list[str]:
        return list(self.db.session.scalars(select(self.Guest.name).order_by(self.Guest.name)))

    def stored(self) -> list[str]:
        with self.app.app_context():
            return self.names()

    def get(self, path: str = "/", **options: Any) -> Any:
        return self.app.test_client().open(path, buffered=True, **options)

    def ask(self, view: View) -> Any:
        self.view(view)
        return self.get()

    @property
    def middleware(self) -> FlaskMiddleware:
        with self.app.app_context():
            return self.db.middleware


pytestmark = pytest.mark.usefixtures("disposes")


@pytest.fixture
def site() -> Site:
    return Site().create()


@pytest.fixture
def file_site(sqlite_url: str) -> Site:
    return Site({"SQLALCHEMY_DATABASE_URI": sqlite_url}).create()


# -- The session and its scopes


def test_session_is_the_request_s_in_db_and_in_the_package(site: Site) -> None:
    def view() -> str:
        assert sqlasession_middleware.session() is site.db.session()
        assert sqlasession_middleware.application._get_current_object() is site.db.middleware is site.app.wsgi_app
        return str(isinstance(site.db.session(), TheirSession))

    assert site.ask(view).text == "True"


def test_request_gives_its_connection_back_when_it_is_over(file_site: Site) -> None:
    pool = file_site.middleware.engine.pool

    def view() -> str:
        file_site.add("Ada")
        file_site.db.session.flush()
        return str(pool.checkedout())

    assert (file_site.ask(view).text, pool.checkedout(), file_site.stored()) == ("1", 0, [])


def test_application_contexts_outside_of_a_request_have_scopes_of_their_own(file_site: Site) -> None:
    app, db = file_site.app, file_site.db
    pool = file_site.middleware.engine.pool
    with app.app_context():
        outer = db.session()
        file_site.names()
        with app.app_context():
            inner = db.session()
            assert inner is not outer
            file_site.names()
            assert pool.checkedout() == 2
        assert pool.checkedout() == 1
        assert db.session() is outer is sqlasession_middleware.session()
    assert pool.checkedout() == 0
    with pytest.raises(RuntimeError, match="outside of application context"):
        db.session()
    with pytest.raises(ScopeError, match="No application is bound"):
        sqlasession_middleware.session()


def test_context_inside_of_a_request_leaves_its_session_alone(site: Site) -> None:
    def view() -> str:
        outer = site.db.session()
        site.add("Ada")
        with site.app.app_context():
            assert site.db.session() is outer
        with site.app.test_request_context():
            assert site.db.session() is outer
        site.db.session.commit()
        return "done"

    assert (site.ask(view).text, site.stored()) == ("done", ["Ada"])


def test_context_of_another_application_has_a_scope_inside_of_a_request(tmp_path) -> None:
    first = Site({"SQLALCHEMY_DATABASE_URI": f"sqlite:///{tmp_path}/first.db"}).create("Ada")
    second = Site({"SQLALCHEMY_DATABASE_URI": f"sqlite:///{tmp_path}/second.db"}, db=first.db, name="other")
    second.Guest = first.Guest
    second.create("Bea")
    kept: list[Any] = []

    def view() -> str:
        guest = first.db.session.scalars(select(first.Guest)).one()
        first.db.session.expire(guest)
        with second.app.app_context():
            kept.append(first.names())
            # It is loaded from where it belongs to, not from the database of the innermost context.
            kept.append(guest.name)
        return " ".join(first.names())

    assert first.ask(view).text == "Ada"
    assert kept == [["Bea"], "Ada"]


def test_another_db_does_not_find_the_scope_of_an_application_inside(site: Site) -> None:
    other = Site(name="other").create("Bea")

    def inner() -> str:
        assert sqlasession_middleware.session() is other.db.session() is not site.db.session()
        assert site.db.session.registry.has()
        return " ".join(other.names() + site.names())

    def view() -> str:
        site.add("Ada")
        return other.ask(inner).text

    assert site.ask(view).text == "Bea Ada"


def test_context_that_was_pushed_before_init_app_has_a_scope_at_first_use() -> None:
    app = Flask("late")
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    with app.app_context():
        db = SQLAlchemy(app)
        assert db.session.registry.has() is False
        db.session.remove()
        db.session.registry.clear()
        assert db.session.scalar(text("SELECT 1")) == 1
        assert db.session() is db.session() is sqlasession_middleware.session()
        session = db.session()
        db.session.registry.clear()
        assert db.session() is not session
        session.close()


def test_context_that_is_entered_twice_has_one_scope(site: Site) -> None:
    context = site.app.app_context()
    with context:
        outer = site.db.session()
        with context:
            assert site.db.session() is outer
        assert site.db.session() is outer

    # What Flask's test client does after a request, so that a test sees the request's contexts.
    site.view(lambda: "done")
    with site.app.test_client() as client:
        client.get("/", buffered=True)
        assert request.path == "/"
        assert site.names() == []
        client.get("/", buffered=True)
    with pytest.raises(RuntimeError, match="outside of application context"):
        site.db.session()


def test_what_a_request_has_loaded_can_be_read_after_it(file_site: Site) -> None:
    file_site.create("Ada")

    def view() -> Any:
        g.guest = file_site.db.session.scalars(select(file_site.Guest)).one()
        return "done"

    file_site.view(view)
    with file_site.app.test_client() as client:
        assert client.get("/", buffered=True).text == "done"
        assert g.guest.name == "Ada"
        assert g.guest not in file_site.db.session


@pytest.mark.parametrize("options", [{}, {"transaction": True}])
def test_response_that_nobody_closes_leaves_no_session(sqlite_url: str, options: Any) -> None:
    site = Site({"SQLALCHEMY_DATABASE_URI": sqlite_url}, **options).create("Ada")
    sessions: list[Any] = []

    def view() -> str:
        sessions.append(weakref.ref(site.db.session()))
        with site.app.app_context():
            site.add("Bea")
            site.db.session.flush()
        return " ".join(site.names())

    site.view(view)
    response = site.app.test_client().get("/")
    assert (response.text, sessions[0](), site.middleware.engine.pool.checkedout()) == ("Ada Bea", None, 0)
    assert site.stored() == (["Ada", "Bea"] if options else ["Ada"])


@pytest.mark.parametrize("status", [404, 500])
def test_error_page_that_nobody_closes_leaves_no_session(file_site: Site, status: int) -> None:
    sessions: list[Any] = []

    def view() -> str:
        sessions.append(weakref.ref(file_site.db.session()))
        file_site.names()
        flask.abort(404) if status == 404 else file_site.add(1 / 0)  # type: ignore[arg-type]

    file_site.view(view)
    response = file_site.app.test_client().get("/")
    gc.collect()
    assert (response.status_code, sessions[0](), file_site.middleware.engine.pool.checkedout()) == (status, None, 0)
    assert response.text.startswith("<!doctype html>")


def test_outage_is_a_503_also_when_the_session_is_gone() -> None:
    url = f"postgresql+psycopg://nobody@127.0.0.1:{free_port()}/none"
    site = Site({"SQLALCHEMY_DATABASE_URI": url}, unavailable=True)
    assert site.ask(lambda: " ".join(site.names())).status_code == 503


def test_thread_with_a_context_has_a_scope(file_site: Site) -> None:
    context, seen = file_site.app.app_context(), []

    def run() -> None:
        with context:
            seen.append(file_site.db.session())

    with context:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert seen[0] is not file_site.db.session()


def test_context_whose_teardown_fails_is_ended_when_it_is_dropped(file_site: Site) -> None:
    pool = file_site.middleware.engine.pool

    @file_site.app.teardown_appcontext
    def fail(error: BaseException | None) -> None:
        raise ZeroDivisionError

    # Flask calls no teardown function after one that fails: that of db is the last.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with file_site.app.app_context():
                file_site.names()
        except ZeroDivisionError:
            pass
        gc.collect()
    assert "dropped with its session open" in str(caught[0].message)
    assert pool.checkedout() == 0
    with pytest.raises(ScopeError, match="The request is over"):
        file_site.db.session()


def test_streamed_body_has_the_session_and_the_engines(site: Site) -> None:
    site.create("Ada")

    def view() -> Response:
        def body() -> Iterator[str]:
            yield "first "
            assert not flask.has_app_context()
            yield from site.names()
            assert site.db.engine is site.db.middleware.engine

        response = Response(body())
        response.call_on_close(lambda: closed.extend(site.names()))
        return response

    closed: list[str] = []
    assert (site.ask(view).text, closed) == ("first Ada", ["Ada"])


def test_code_after_the_request_gets_an_error(site: Site) -> None:
    kept: list[Any] = []

    def view() -> str:
        site.names()
        kept.append(copy_context())
        return "done"

    assert site.ask(view).text == "done"

    def late() -> None:
        with pytest.raises(ScopeError, match="The request is over"):
            site.db.session()

    kept[0].run(late)


def test_application_that_was_registered_with_another_db_is_an_error(site: Site) -> None:
    with site.app.app_context(), pytest.raises(RuntimeError, match="is not registered with this 'SQLAlchemy'"):
        SQLAlchemy().session()
    with pytest.raises(RuntimeError, match="already been registered"):
        site.db.init_app(site.app)


def test_applications_are_freed() -> None:
    site = Site().create("Ada")
    assert site.ask(lambda: "done").text == "done"
    app, db = weakref.ref(site.app), site.db
    del site
    gc.collect()
    assert app() is None
    assert len(db._app_engines) == 0


# -- Requests inside of a context, as in tests


def test_request_in_a_context_shares_its_session(site: Site) -> None:
    def view() -> str:
        site.db.session.scalars(select(site.Guest)).one().name = "Bea"
        site.db.session.commit()
        return g.mark

    site.view(view)
    with site.app.app_context():
        g.mark = "shared"
        guest = site.Guest(name="Ada")
        site.db.session.add(guest)
        session = site.db.session()
        assert site.get().text == "shared"
        assert guest.name == "Bea"
        assert site.db.session() is session
        # Not closed, and not read: the test's session is there all the same.
        site.app.test_client().get("/")
        assert site.db.session() is session
        assert guest in session


def test_request_in_a_context_that_removes_the_session_has_removed_the_context_s(site: Site) -> None:
    site.view(lambda: str(site.db.session.remove()))
    with site.app.app_context():
        session = site.db.session()
        site.get()
        assert site.db.session() is not session


def test_stream_in_a_context_has_the_context_s_session(site: Site) -> None:
    def view() -> Response:
        def body() -> Iterator[str]:
            seen.append(site.db.session())
            yield "done"

        response = Response(body())
        response.call_on_close(lambda: seen.append(site.db.session()))
        return response

    seen: list[Any] = []
    site.view(view)
    with site.app.app_context():
        session = site.db.session()
        response = site.app.test_client().get("/")
        late = site.app.test_client().get("/")
        assert response.text == "done"
        response.close()
        assert seen == [session] * 3
    late.close()
    assert seen[3] is not session


def test_body_without_close_in_a_context_is_served() -> None:
    def shortcut(environ: Any, start: Any) -> list[bytes]:
        start("200 OK", [])
        db.session.info["mark"] = True
        return [b"done"]

    app = Flask("shortcut")
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    app.wsgi_app = shortcut  # type: ignore[method-assign,assignment]  # as middleware does
    db = SQLAlchemy(app)
    with app.app_context():
        assert app.test_client().get("/", buffered=True).text == "done"
        assert db.session.info == {"mark": True}


def test_application_that_calls_itself_has_another_session(file_site: Site) -> None:
    def inner() -> str:
        return str(id(file_site.db.session()))

    def view() -> str:
        own = file_site.db.session()  # Another one may get the identity of one that is gone.
        return str(file_site.get("/inner").text == str(id(own)))

    file_site.app.add_url_rule("/inner", view_func=inner)
    assert file_site.ask(view).text == "False"


def test_stream_of_an_application_that_calls_itself_has_its_session(file_site: Site) -> None:
    file_site.create("Ada")

    def view() -> Response:
        assert file_site.get("/inner").text == "inner"
        guests = file_site.db.session.scalars(select(file_site.Guest)).all()
        file_site.db.session.commit()
        return Response(guest.name for guest in guests)

    file_site.app.add_url_rule("/inner", view_func=lambda: "inner")
    assert file_site.ask(view).text == "Ada"


def test_request_in_a_context_pushed_before_init_app_shares_its_session() -> None:
    app = Flask("late")
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    with app.app_context():
        db = SQLAlchemy(app)
        app.add_url_rule("/", view_func=lambda: db.session.info.update(mark=True) or "done")
        assert app.test_client().get("/", buffered=True).text == "done"
        assert db.session.info == {"mark": True}


def test_isolated_rolls_back_what_requests_commit(file_site: Site) -> None:
    def view() -> str:
        file_site.add("Ada")
        file_site.db.session.commit()
        return "done"

    with isolated(file_site.middleware):
        assert file_site.ask(view).text == "done"
        assert file_site.stored() == ["Ada"]
    assert file_site.stored() == []


# -- What tests of public applications do with their db


def test_engines_replaced_by_connections_roll_back_a_test(sqlite_url: str) -> None:
    """The recipe of pallets-eco/flask-sqlalchemy#1171."""
    site = Site({"SQLALCHEMY_DATABASE_URI": sqlite_url, "SQLALCHEMY_BINDS": {"a": "sqlite://"}}).create()

    def view() -> str:
        site.add("Ada")
        site.db.session.commit()
        return "done"

    site.view(view)
    with site.app.app_context():
        engine = site.db.engine
        with engine.connect() as connection:
            connection.begin()
            site.db.engines[None] = connection
            assert site.get().text == "done"
            assert site.stored() == ["Ada"]
            site.db.drop_all("a")
            site.db.engines[None] = engine
    assert site.stored() == []


def test_session_may_be_replaced(file_site: Site) -> None:
    db = file_site.db
    with file_site.app.app_context():
        ours, db.session = db.session, db._make_scoped_session({"expire_on_commit": False})
        assert db.session().expire_on_commit is False
        assert db.session() is not ours()
        file_site.names()
        db.drop_all()
    assert file_site.middleware.engine.pool.checkedout() == 0


def test_session_s_options_may_be_changed(site: Site) -> None:
    site.db.session.configure(expire_on_commit=False)
    with site.app.app_context():
        assert site.db.session().expire_on_commit is False
        with site.db.session.session_factory(autoflush=False) as other:
            assert (other.expire_on_commit, other.autoflush) == (False, False)
            assert other is not site.db.session()
        with pytest.warns(Warning, match="already present"):
            site.db.session.configure(expire_on_commit=True)
        site.db.session.remove()
        assert site.db.session(autoflush=False).autoflush is False


def test_drop_all_ends_what_was_read_and_refuses_to_wait(server_url: str) -> None:
    site = Site({"SQLALCHEMY_DATABASE_URI": server_url}).create("Ada")
    with site.app.app_context():
        assert site.names() == ["Ada"]
        site.db.drop_all()
        site.db.create_all()
        site.add("Bea")
        site.db.session.flush()
        for key in ("__all__", None, [None]):
            with pytest.raises(ScopeError, match=r"drop_all\(\) would wait for a context of <FlaskMiddleware '"):
                site.db.drop_all(key)
        site.db.session.rollback()
        site.db.drop_all()


# -- Transactions


@pytest.fixture
def committing(database_url: str) -> Iterator[Site]:
    site = Site({"SQLALCHEMY_DATABASE_URI": database_url}, transaction={"attempts": 3, **NO_WAIT}).create("Taken")
    yield site
    with site.app.app_context():
        site.db.drop_all()


def test_error_handler_sees_the_commit_fail(committing: Site) -> None:
    site, calls = committing, []
    site.app.after_request(lambda response: calls.append("after_request") or response)
    site.app.teardown_request(lambda error: calls.append(f"teardown {error!r}"))
    site.app.teardown_appcontext(lambda error: calls.append(f"context {error!r}"))

    @site.app.errorhandler(IntegrityError)
    def taken(error: IntegrityError) -> Any:
        calls.append("handler")
        assert request.form["name"] == "Taken"
        assert g.mark == "kept"
        flask.flash("That name is taken")
        assert site.names() == ["Taken"]
        return "taken", 409

    def view() -> str:
        g.mark = "kept"
        site.add(request.form["name"])
        return "done"

    site.view(view)
    answer = site.get(method="POST", data={"name": "Taken"})
    assert (answer.status_code, answer.text) == (409, "taken")
    assert "session=" in answer.headers["Set-Cookie"]
    assert calls == ["after_request", "handler", "after_request", "teardown None", "context None"]
    assert site.get(method="POST", data={"name": "Ada"}).text == "done"
    assert site.stored() == ["Ada", "Taken"]


@pytest.mark.parametrize(
    ("note", "status", "stored"), [("Note", 303, ["Note", "Taken"]), ("Note", 409, ["Taken"]), ("", 303, ["Taken"])]
)
def test_what_an_error_handler_writes_is_committed_with_a_success(
    committing: Site, note: str, status: int, stored: Any
) -> None:
    @committing.app.errorhandler(IntegrityError)
    def write(error: IntegrityError) -> Any:
        if note:
            committing.add(note)
        return "noted", status

    assert committing.ask(lambda: str(committing.add("Taken"))).status_code == status
    assert committing.stored() == stored


@pytest.mark.parametrize(("status", "called"), [(200, ["handler"]), (409, [])])
def test_call_that_an_error_handler_gives_follows_its_success(committing: Site, status: int, called: Any) -> None:
    calls: list[str] = []

    @committing.app.errorhandler(IntegrityError)
    def handle(error: IntegrityError) -> Any:
        after_commit(lambda: calls.append("handler"))
        return "handled", status

    def view() -> str:
        after_commit(lambda: calls.append("view"))
        committing.add("Taken")
        return "done"

    assert committing.ask(view).status_code == status
    assert calls == called


# -- Jobs


def add_here(site: Site) -> None:
    site.add(flask.current_app.name)


def add_in_a_context(site: Site) -> None:
    with site.app.app_context():
        site.add(flask.current_app.name)


@pytest.mark.parametrize("job", [add_here, add_in_a_context])
@pytest.mark.parametrize("transaction", [False, True])
def test_job_has_an_application_context_and_commits(
    file_site: Site, job: Callable[[Site], None], transaction: bool
) -> None:
    site = Site({"SQLALCHEMY_DATABASE_URI": file_site.app.config["SQLALCHEMY_DATABASE_URI"]}, transaction=transaction)
    site.create()

    def stored() -> list[str]:
        with site.app.app_context():
            found = site.names()
            site.db.session.execute(delete(site.Guest))
            site.db.session.commit()
        return found

    ways: list[Callable[[], Any]] = [
        lambda: site.middleware.run(job, site),
        lambda: in_context(site, lambda: site.db.middleware.run(job, site)),
        lambda: site.ask(lambda: str(site.db.middleware.run(job, site))),
        lambda: in_context(site, lambda: (site.db.middleware.background(job, site), site.db.session.commit())),
    ]
    for way in ways:
        way()
        site.middleware.dispose()
        assert stored() == ["guests"]
    assert not flask.has_app_context()


def in_context(site: Site, call: Callable[[], object]) -> None:
    with site.app.app_context():
        call()


def test_job_in_a_context_shares_its_g(site: Site) -> None:
    with site.app.app_context():
        g.mark = "kept"
        assert site.db.middleware.run(lambda: g.mark) == "kept"


def test_error_handler_whose_own_commit_fails_is_answered_by_the_handler_of_500(committing: Site) -> None:
    errors: list[Any] = []

    @committing.app.errorhandler(IntegrityError)
    def write_again(error: IntegrityError) -> Any:
        committing.add("Taken")
        return "noted", 200

    committing.app.register_error_handler(500, lambda error: ("sorry", 500))
    committing.app.teardown_request(errors.append)
    answer = committing.ask(lambda: str(committing.add("Taken")))
    assert (answer.status_code, answer.text, type(errors[0])) == (500, "sorry", IntegrityError)


def test_commit_that_no_handler_wants_is_flask_s_500(committing: Site) -> None:
    assert committing.ask(lambda: str(committing.add("Taken"))).status_code == 500
    committing.app.testing = True
    with pytest.raises(IntegrityError):
        committing.get()
    assert committing.stored() == ["Taken"]


def test_commit_runs_under_flask_s_contexts(sqlite_url: str) -> None:
    config = {"SQLALCHEMY_TRACK_MODIFICATIONS": True, "SQLALCHEMY_RECORD_QUERIES": True}
    site = Site({"SQLALCHEMY_DATABASE_URI": sqlite_url, **config}, transaction=True).create()
    seen: list[Any] = []

    @event.listens_for(site.db.session, "before_flush")
    def note(*arguments: Any) -> None:
        seen.append((request.path, g.mark))

    def view() -> str:
        g.mark = "kept"
        site.add("Ada")
        return "done"

    def changed(sender: Flask, changes: Any) -> None:
        seen.append([(type(each).__name__, operation) for each, operation in changes])

    site.app.teardown_request(lambda error: seen.append(len(get_recorded_queries())))
    with models_committed.connected_to(changed, site.app):
        assert site.ask(view).text == "done"
    assert seen == [("/", "kept"), [("Guest", "insert")], 1]
    assert not flask.has_request_context()
    assert not flask.has_app_context()


def test_what_flask_saves_of_its_session_is_committed(committing: Site) -> None:
    class InTheDatabase(SecureCookieSessionInterface):
        def save_session(self, app: Flask, session: Any, response: Response) -> None:
            committing.add(session["name"])

    def view() -> str:
        flask.session["name"] = request.args["name"]
        return "done"

    committing.app.session_interface = InTheDatabase()
    committing.app.register_error_handler(IntegrityError, lambda error: ("taken", 409))
    committing.view(view)
    assert committing.get("/?name=Ada").status_code == 200
    # What it adds is a part of the request, and goes the way of it.
    assert committing.get("/?name=Taken").status_code == 409
    assert committing.stored() == ["Ada", "Taken"]


def test_teardown_gets_the_error_of_the_view(sqlite_url: str) -> None:
    site, errors = Site({"SQLALCHEMY_DATABASE_URI": sqlite_url}, transaction=True).create(), []

    def view() -> str:
        site.add("Ada")
        raise ZeroDivisionError

    site.app.teardown_request(errors.append)
    assert site.ask(view).status_code == 500
    site.app.testing = True
    with pytest.raises(ZeroDivisionError):
        site.get()
    site.app.should_ignore_error = lambda error: True  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        site.get()
    assert [type(error) for error in errors] == [ZeroDivisionError, ZeroDivisionError, type(None)]
    assert site.stored() == []


@pytest.mark.parametrize("options", [{}, {"transaction": True}, {"transaction": {"attempts": 2}}])
@pytest.mark.parametrize("in_context", [False, True])
def test_stream_with_context_ends_its_contexts(sqlite_url: str, options: Any, in_context: bool) -> None:
    site = Site({"SQLALCHEMY_DATABASE_URI": sqlite_url}, **options).create("Ada")
    ended: list[str] = []

    def view() -> Response:
        def body() -> Iterator[str]:
            yield request.path
            yield from site.names()
            site.add("Bea")
            if not options:
                site.db.session.commit()

        return Response(flask.stream_with_context(body()))

    site.view(view)
    site.app.teardown_request(lambda error: ended.append("request"))
    with site.app.app_context() if in_context else nullcontext():
        assert site.get().text == "/Ada"
        # Newer versions of Flask itself push and pop the contexts of such a response twice.
        assert set(ended) == {"request"}
        assert (flask.has_request_context(), flask.has_app_context()) == (False, in_context)
    assert site.stored() == ["Ada", "Bea"]
    assert site.middleware.engine.pool.checkedout() == 0


def test_repeated_request_has_contexts_of_its_own(sqlite_url: str) -> None:
    class ConflictError(Exception):
        pass

    options = {"attempts": 3, "retry_on": ConflictError, **NO_WAIT}
    site = Site({"SQLALCHEMY_DATABASE_URI": sqlite_url}, transaction=options).create()
    seen: list[Any] = []

    def view() -> str:
        seen.append((request.form["name"], g.get("mark")))
        g.mark = True
        site.add(request.form["name"])
        if len(seen) < 5:
            sqlasession_middleware.repeat(ConflictError())
        return "done"

    site.view(view)
    site.app.teardown_request(lambda error: seen.append("teardown"))
    assert site.get(method="POST", data={"name": "Ada"}).text == "done"
    assert seen == [("Ada", None), "teardown"] * 3
    assert site.stored() == ["Ada"]


def test_context_of_the_request_outlives_it_for_a_test_client(committing: Site) -> None:
    committing.view(lambda: str(committing.add("Ada")))
    with committing.app.test_client() as client:
        client.get("/", buffered=True)
        assert request.path == "/"
        assert committing.names() == ["Ada", "Taken"]
    assert not flask.has_app_context()


def test_application_that_passes_its_request_on_to_itself_keeps_its_contexts(committing: Site) -> None:
    def inner() -> str:
        committing.add("Ada")
        return request.path

    def view() -> str:
        inner_environ = request.environ
        inner_environ["PATH_INFO"] = "/inner"
        body: Any = committing.app.wsgi_app(inner_environ, start_response)
        answer = b"".join(body).decode()
        body.close()
        return f"{answer} in {request.endpoint}"

    committing.app.add_url_rule("/inner", view_func=inner)
    assert committing.ask(view).text == "/inner in view"
    assert committing.stored() == ["Ada", "Taken"]
    assert not flask.has_request_context()


def test_request_that_is_dispatched_by_hand_is_served(committing: Site) -> None:
    committing.view(lambda: " ".join(committing.names()))
    with committing.app.test_request_context("/"):
        assert committing.app.full_dispatch_request().get_data(as_text=True) == "Taken"
        assert committing.app.handle_exception(ZeroDivisionError()).status_code == 500
    assert not flask.has_app_context()


@pytest.mark.parametrize("given", [None, lambda environ, error: Response("mine", 418)])
def test_own_commit_failed_wins(sqlite_url: str, given: Any) -> None:
    site = Site({"SQLALCHEMY_DATABASE_URI": sqlite_url}, transaction={"commit_failed": given}).create("Taken")
    site.app.register_error_handler(IntegrityError, lambda error: ("taken", 409))
    if given is None:
        with pytest.raises(IntegrityError):
            site.ask(lambda: str(site.add("Taken")))
    else:
        assert site.ask(lambda: str(site.add("Taken"))).status_code == 418


def test_commit_veto_is_that_of_the_transaction(sqlite_url: str) -> None:
    site = Site({"SQLALCHEMY_DATABASE_URI": sqlite_url}, transaction={"commit_veto": None}).create("Taken")

    @site.app.errorhandler(IntegrityError)
    def note(error: IntegrityError) -> Any:
        site.add("Note")
        return "noted", 409

    assert site.ask(lambda: (str(site.add("Taken")), 404)).status_code == 409
    assert site.stored() == ["Note", "Taken"]


def test_commit_that_fails_where_flask_did_not_serve_has_no_error_handler(sqlite_url: str) -> None:
    def shortcut(environ: Any, start: Any) -> list[bytes]:
        site.add("Taken")
        start("200 OK", [])
        return [b"done"]

    site = Site({"SQLALCHEMY_DATABASE_URI": sqlite_url}).create("Taken")
    app = Flask("shortcut")
    app.config.update({"SQLALCHEMY_DATABASE_URI": sqlite_url, "SQLASESSION_TRANSACTION": True})
    app.wsgi_app = shortcut  # type: ignore[method-assign,assignment]  # as middleware does
    site.db.init_app(app)
    with pytest.raises(IntegrityError):
        app.test_client().get("/", buffered=True)


# -- Engines


def test_engines_are_the_library_s(sqlite_url: str) -> None:
    site = Site({"SQLALCHEMY_DATABASE_URI": sqlite_url, "SQLALCHEMY_BINDS": {"a": "postgresql+psycopg://u:secret@h/d"}})
    with site.app.app_context():
        assert type(site.db.engine.pool) is ObservedPool
        assert site.db.engines["a"].dialect.create_connect_args(site.db.engines["a"].url)
        assert dict(site.db.middleware.engines) == {"default": site.db.engine, "a": site.db.engines["a"]}
    site.middleware.dispose()
    assert "secret" not in repr(site.middleware)


def test_memory_is_one_connection_as_in_flask_sqlalchemy(site: Site) -> None:
    assert type(site.middleware.engine.pool) is StaticPool


def test_texts_of_engine_options_are_converted(sqlite_url: str) -> None:
    options = {"pool_size": "3", "echo": "false", "pool_timeout": 5, "isolation_level": "SERIALIZABLE"}
    site = Site({"SQLALCHEMY_DATABASE_URI": sqlite_url, "SQLALCHEMY_ENGINE_OPTIONS": options})
    assert site.middleware.engine.pool.size() == 3


# SQLite lets nobody else write then.
@pytest.mark.parametrize("name", [name for name in DATABASES if name != "sqlite"])
@pytest.mark.parametrize("keys", [("__all__",), (None,), ([None],)])
def test_tables_are_created_when_another_worker_is_faster(keys: tuple[Any, ...], name: str) -> None:
    """pallets-eco/flask-sqlalchemy#656, skyportal/skyportal#1802."""
    site = Site({"SQLALCHEMY_DATABASE_URI": DATABASES_SEEN.url(name, "")}).create()
    faster: list[object] = []

    class Raced(site.db.Model):  # type: ignore[name-defined]
        id: Mapped[int] = mapped_column(primary_key=True)

    @event.listens_for(site.db.metadata, "before_create")
    def create_first(metadata: Any, connection: Any, **options: Any) -> None:
        """It has looked by now, and found that the table does not exist."""
        if not faster:
            faster.append(connection)
            other = create_engine(connection.engine.url)
            Raced.__table__.create(other)
            other.dispose()

    with site.app.app_context():
        site.db.create_all(*keys)
        site.db.session.add_all([Raced(), site.Guest(name="Ada")])
        site.db.session.commit()
        assert len(faster) == 1
        site.db.drop_all()
    site.middleware.dispose()


@pytest.mark.parametrize("broken", ["engine", "connection"])
def test_error_is_passed_on_when_tables_cannot_be_created(broken: str, sqlite_url: str) -> None:
    site = Site({"SQLALCHEMY_DATABASE_URI": sqlite_url})
    statement = "CREATE TABLE" if broken == "engine" else "CREATE TABLE guest (id INTEGER)"

    @event.listens_for(site.db.metadata, "before_create")
    def fail(metadata: Any, connection: Any, **options: Any) -> None:
        connection.execute(text("CREATE TABLE guest (id INTEGER)"))
        connection.execute(text(statement))

    with site.app.app_context():
        if broken == "connection":
            site.db.engines[None] = site.db.engine.connect()
        with pytest.raises(OperationalError, match=r"incomplete input|already exists"):
            site.db.create_all()
        if broken == "connection":
            site.db.engines[None].close()


@pytest.mark.parametrize("key", ["a", "default"])
def test_database_with_bind_keys_only(key: str) -> None:
    site = Site({"SQLALCHEMY_DATABASE_URI": None, "SQLALCHEMY_BINDS": {key: "sqlite://", "b": "sqlite://"}})

    class Visit(site.db.Model):  # type: ignore[name-defined]
        __bind_key__ = key
        id: Mapped[int] = mapped_column(primary_key=True)

    with site.app.app_context():
        site.db.create_all(key)
        site.db.session.add(Visit())
        site.db.session.commit()
        assert site.db.session.get_bind(Visit) is site.db.engines[key]
        with pytest.raises(UnboundExecutionError):
            site.names()
        with pytest.raises(UnboundExecutionError):
            site.db.session.execute(text("SELECT 1"))


def test_ping_after_applies_to_the_engines() -> None:
    config = {"SQLALCHEMY_DATABASE_URI": "postgresql+psycopg://h/d", "SQLASESSION_PING_AFTER": "0"}
    assert Site(config).middleware.engine.pool._pre_ping is True


def test_engine_of_a_subclass_is_used(sqlite_url: str) -> None:
    class Own(SQLAlchemy):
        def _make_engine(self, bind_key: Any, options: dict[str, Any], app: Flask) -> Engine:
            return create_engine(options["url"], poolclass=NullPool)

    app = Flask("own")
    app.config["SQLALCHEMY_DATABASE_URI"] = sqlite_url
    db = Own(app)
    with app.app_context():
        assert type(db.engine.pool) is NullPool
        assert db.session.scalar(text("SELECT 1")) == 1


def test_replicas_are_read_by_requests_that_only_read(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnPath(Flask):
        pass

    urls = [f"sqlite:///{tmp_path}/{name}.db" for name in ("primary", "given")]
    replicas = ["sqlite:///replica.db", {"url": "sqlite:///other.db"}, create_engine(urls[1])]
    config = {"SQLALCHEMY_DATABASE_URI": urls[0], "SQLASESSION_READ_YOUR_WRITES": 0}

    class Base(DeclarativeBase):
        pass

    app = Flask("replicated", instance_path=str(tmp_path))
    app.config.update(config)
    db: Any = SQLAlchemy(model_class=Base, replicas=replicas)

    class Guest(db.Model):  # type: ignore[misc]
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

    db.init_app(app)
    with app.app_context():
        db.create_all()
        for engine in list(db.middleware.engines.values())[1:]:
            target = engine if engine is replicas[2] else create_engine(engine.url)
            Base.metadata.create_all(target)
            with target.begin() as connection:
                connection.execute(insert(Guest).values(name="replica"))
            target.dispose()
        assert [each.url.database for each in db.middleware.engines.values()] == [
            f"{tmp_path}/{name}.db" for name in ("primary", "replica", "other", "given")
        ]
    app.add_url_rule("/", view_func=lambda: " ".join(db.session.scalars(select(Guest.name))), methods=["GET", "POST"])
    client = app.test_client()
    assert client.get("/", buffered=True).text == "replica"
    assert client.post("/", buffered=True).text == ""


def test_urls_of_replicas_may_be_one_text(tmp_path) -> None:
    urls = f"sqlite:///{tmp_path}/one.db, sqlite:///{tmp_path}/two.db"
    site = Site({"SQLALCHEMY_DATABASE_URI": f"sqlite:///{tmp_path}/primary.db", "SQLASESSION_REPLICAS": urls})
    assert list(site.middleware.engines) == ["default", "replicas[0]", "replicas[1]"]


# -- Session options


def test_scopefunc_makes_sessions_of_its_own(file_site: Site) -> None:
    site = Site(
        {"SQLALCHEMY_DATABASE_URI": file_site.app.config["SQLALCHEMY_DATABASE_URI"]},
        session_options={"scopefunc": threading.get_ident},
    )
    site.Guest = file_site.Guest
    with site.app.app_context():
        session = site.db.session()
        assert session is site.db.session() is not sqlasession_middleware.session()
        site.db.create_all()
        site.db.drop_all()
    with site.app.app_context():
        assert site.db.session() is not session
    with pytest.raises(RuntimeError):
        site.db.engines  # noqa: B018


def test_session_class_and_query_class_are_used() -> None:
    class Own(TheirSession):
        def get_bind(self, *arguments: Any, **options: Any) -> Any:
            asked.append(self)
            return super().get_bind(*arguments, **options)

    class Query(flask_sqlalchemy.query.Query):  # type: ignore[name-defined]
        pass

    asked: list[Any] = []
    site = Site(session_options={"class_": Own, "autoflush": False}, query_class=Query).create("Ada")
    with site.app.app_context():
        assert (isinstance(site.db.session(), Own), site.db.session().autoflush) == (True, False)
        assert type(site.db.session.query(site.Guest)) is type(site.Guest.query) is Query
        assert site.Guest.query.one().name == "Ada"
        # What a Session class of the application's own asks of db.
        assert site.db.session()._db.metadata is site.db.metadata
    assert asked


# -- Settings


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        ({"SQLASESSION_TRANSACTION": True}, {}, {"attempts": 1}),
        ({"SQLASESSION_TRANSACTION": "true"}, {}, {"attempts": 1}),
        ({"SQLASESSION_TRANSACTION": {"attempts": "3"}}, {}, {"attempts": 3}),
        ({"SQLASESSION_TRANSACTION": {"attempts": 3}}, {"transaction": {"attempts": 2}}, {"attempts": 3}),
        ({}, {"transaction": {"attempts": 2}}, {"attempts": 2}),
        ({}, {"transaction": {}}, {"attempts": 1}),
        ({"SQLASESSION_TRANSACTION": False}, {"transaction": {"attempts": 2}}, {}),
    ],
)
def test_configuration_overrides_the_constructor(config: Any, options: Any, expected: Any) -> None:
    site = Site(config, **options).create()
    site.view(lambda: str(site.names()))
    wrapped: list[Any] = []
    initialize = sqlasession_middleware.transaction.TransactionMiddleware.__call__

    def note(self: Any, *arguments: Any) -> Any:
        wrapped.append(self)
        return initialize(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlasession_middleware.transaction.TransactionMiddleware, "__call__", note)
        assert site.get().status_code == 200
    assert [each.attempts for each in wrapped] == list(expected.values())


def test_options_reach_the_middleware() -> None:
    config = {
        "SQLASESSION_DEADLINE": "2.5",
        "SQLASESSION_STREAMS": "text/csv, text/plain",
        "SQLASESSION_UNAVAILABLE": {"page": None, "retry_after": "3"},
        "SQLASESSION_REPORT_LEAKS": "false",
        "SQLASESSION_PING_AFTER": 5,
        "SQLASESSION_LAZY_BEGIN": False,
        "SQLASESSION_REPLICA_RETRY": 3,
    }
    site = Site(config)
    assert site.middleware.streams == {"text/csv", "text/plain"}
    assert site.middleware._source.ping_after == 5
    assert site.ask(lambda: str(sqlasession_middleware.remaining() < 2.5)).text == "True"


def test_each_option_of_the_middleware_is_one_of_the_class_and_a_key() -> None:
    # Flask-SQLAlchemy has parameters and keys of its own for these.
    theirs = ("app", "bind", "binds", "engine_options", "session_options", "metadata")
    options = {
        name: each.default
        for name, each in inspect.signature(SQLASessionMiddleware).parameters.items()
        if name not in theirs
    }
    ours = inspect.signature(SQLAlchemy).parameters
    assert {name: each.default for name, each in ours.items() if name not in ("app", "theirs")} == options
    assert sorted(KEYS.values()) == sorted(options)
    page = Path(__file__).parents[1] / "docs/from_flask_sqlalchemy.rst"
    assert [key for key in KEYS if f"``{key}``" not in page.read_text()] == []


WRONG = [
    (
        {"SQLASESSION_TRANSCATION": True},
        {},
        (
            "'SQLASESSION_TRANSCATION' in the Flask configuration is not a setting of this middleware;"
            " did you mean 'SQLASESSION_TRANSACTION'"
        ),
    ),
    (
        {"SQLASESSION_METADATA": 1},
        {},
        "'SQLASESSION_METADATA' in the Flask configuration is not a setting of this middleware",
    ),
    (
        {"SQLASESSION_DEADLINE": 0},
        {},
        "'SQLASESSION_DEADLINE' in the Flask configuration must be a number of seconds above 0",
    ),
    (
        {"SQLASESSION_LAZY_BEGIN": "maybe"},
        {},
        "'SQLASESSION_LAZY_BEGIN' in the Flask configuration must be true or false",
    ),
    (
        {"SQLASESSION_TRANSACTION": {"attempts": "x"}},
        {},
        "'SQLASESSION_TRANSACTION.attempts' in the Flask configuration must be a whole number",
    ),
    (
        {"SQLASESSION_TRANSACTION": {"atempts": 1}},
        {},
        "'SQLASESSION_TRANSACTION.atempts' in the Flask configuration is not an option; did you mean 'attempts'",
    ),
    ({}, {"transaction": "true"}, "transaction must be true, false or a dict of options"),
    ({}, {"transaction": {"attempts": 0}}, r"transaction['attempts'] must be a whole number from 1"),
    ({}, {"transaction": {"commit_veto": 1}}, "transaction['commit_veto'] must be callable"),
    (
        {"SQLALCHEMY_DATABASE_URI": "no-url:secret"},
        {},
        "'SQLALCHEMY_DATABASE_URI', or a URL of 'SQLALCHEMY_BINDS', must be a database URL",
    ),
    (
        {"SQLALCHEMY_DATABASE_URI": "postgres://u:secret@h/d"},
        {},
        "'SQLALCHEMY_DATABASE_URI' in the Flask configuration names the database 'postgres'",
    ),
    (
        {"SQLALCHEMY_ENGINE_OPTIONS": {"pool_siz": 3}},
        {},
        "'SQLALCHEMY_ENGINE_OPTIONS.pool_siz' in the Flask configuration is not an option",
    ),
    (
        {"SQLALCHEMY_ENGINE_OPTIONS": {"pool_size": "x"}},
        {},
        "'SQLALCHEMY_ENGINE_OPTIONS.pool_size' in the Flask configuration must be a whole number",
    ),
    (
        {"SQLALCHEMY_BINDS": {"a": "oracl://u:secret@h/d"}},
        {},
        "'SQLALCHEMY_BINDS.a' in the Flask configuration names the database 'oracl'",
    ),
    (
        {},
        {"transaction": True, "session_options": {"scopefunc": threading.get_ident}},
        "session_options['scopefunc'] cannot be used with 'transaction'",
    ),
    ({"SQLASESSION_REPLICAS": [3]}, {}, "replicas[0]['url'] must be a URL string"),
]


@pytest.mark.parametrize(
    ("config", "options", "message"), WRONG, ids=lambda value: value if isinstance(value, str) else ""
)
def test_wrong_setting_is_an_error_that_names_it(config: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Site(config, **options)
    assert str(caught.value).startswith(message)
    assert "secret" not in str(caught.value)


def test_application_whose_settings_are_wrong_has_contexts_all_the_same() -> None:
    app = Flask("wrong")
    app.config["SQLALCHEMY_DATABASE_URI"] = "postgres://h/d"
    with pytest.raises(ConfigurationError):
        SQLAlchemy(app)
    with app.app_context():
        pass


# -- Public reports about sessions, rebuilt


def test_failed_flush_of_one_request_is_over_in_the_next(file_site: Site) -> None:
    """pallets-eco/flask-admin#2109 and jfinkels/flask-restless#370: 500 until the server restarts."""
    file_site.create("Taken")

    def view() -> str:
        try:
            file_site.add("Taken")
            file_site.db.session.flush()
        except IntegrityError:
            return "failed"
        return "?"

    file_site.app.add_url_rule("/names", view_func=lambda: " ".join(file_site.names()))
    assert file_site.ask(view).text == "failed"
    assert file_site.get("/names").text == "Taken"


def test_context_inside_of_a_view_does_not_detach_its_objects(site: Site) -> None:
    """getredash/redash#1792 and pallets-eco/flask-sqlalchemy#944: the inner teardown removed the session."""
    site.create("Ada")

    def view() -> str:
        guest = site.db.session.scalars(select(site.Guest)).one()
        with site.app.app_context():
            site.names()
        site.db.session.expire(guest)
        return guest.name

    assert site.ask(view).text == "Ada"


def test_threads_of_a_small_pool_give_their_connections_back(file_site: Site) -> None:
    """miguelgrinberg/Flask-SocketIO#1500: event handlers exhausted the pool."""
    url = file_site.app.config["SQLALCHEMY_DATABASE_URI"]
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 30}
    site = Site({"SQLALCHEMY_DATABASE_URI": url, "SQLALCHEMY_ENGINE_OPTIONS": options}).create()

    def handle() -> None:
        with site.app.test_request_context():
            site.names()

    for _ in range(5):
        threads = [threading.Thread(target=handle) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert site.middleware.engine.pool.checkedout() == 0


def test_objects_of_a_stream_stay_attached(site: Site) -> None:
    """openculinary/backend#65: "Working outside of application context" in a streamed body."""
    site.create("Ada")

    def view() -> Response:
        guests = site.db.session.scalars(select(site.Guest)).all()
        site.db.session.commit()
        return Response(guest.name for guest in guests)

    assert site.ask(view).text == "Ada"


def test_request_of_a_test_sees_what_the_test_has_not_committed(site: Site) -> None:
    """jarus/flask-testing#32, where the test's objects must not be detached by a request."""
    site.view(lambda: " ".join(site.names()))
    with site.app.app_context():
        guest = site.Guest(name="Ada")
        site.db.session.add(guest)
        assert site.get().text == "Ada"
        assert guest in site.db.session
