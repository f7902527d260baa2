"""The reference of errors: each of its messages is provoked, and no message of the package is missing there."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import itertools
import logging
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from wsgiref.simple_server import make_server

import pytest
from click.testing import Result
from docutils import nodes
from flask import Flask
from opentelemetry.sdk.metrics import MeterProvider
from paste.deploy import loadapp
from pyramid.config import Configurator
from pyramid.exceptions import ConfigurationExecutionError
from pyramid.tweens import EXCVIEW
from sqlalchemy import MetaData, NullPool, create_engine, event, select, text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from werkzeug.test import Client

from sqlasession_middleware import (
    SQLASessionMiddleware,
    after_commit,
    application,
    doom,
    local,
    local_manager,
    metrics,
    session,
)
from sqlasession_middleware._database.breaker import breaker_of
from sqlasession_middleware._pyramid.settings import read_options
from sqlasession_middleware._settings import kinds
from sqlasession_middleware.flask_sqlalchemy import SQLAlchemy
from sqlasession_middleware.health import HealthMiddleware
from sqlasession_middleware.inspector import InspectorMiddleware
from sqlasession_middleware.models import SavesItself
from sqlasession_middleware.pyramid import mark_error_retryable
from sqlasession_middleware.request import Request
from sqlasession_middleware.tenants import TenantsMiddleware
from sqlasession_middleware.testing import assert_queries, isolated, no_leaks
from sqlasession_middleware.transaction import TransactionMiddleware

from . import test_cli, test_health, test_inspector, test_tenants
from .conftest import DATABASES_SEEN
from .ports import free_port
from .rst import literals, read_page
from .sources import module_files
from .test_cli import check, command
from .test_engines import REFUSED
from .test_request import Guest
from .test_routing import break_engine, break_replica
from .test_transaction import ITEMS, NO_WAIT, Deadlock, add, answer, tables
from .test_unavailable import call, lets_it_pass
from .wsgi import Environ, StartResponse, consume, environ, select_one, start_response

pytest_plugins = ["pytester"]


class Message(NamedTuple):
    """A message as the page has it, or as somebody gets to see it.

    :param kind: an exception's class, or one of "logged as a warning", "exit code 2", "status 503" and their like.
    """

    kind: str
    text: str

    def covers(self, seen: Message) -> bool:
        """Whether this entry of the page is about what was seen."""
        pattern = ".*".join(map(re.escape, self.text.split("…")))
        return self.kind == seen.kind and re.fullmatch(pattern, seen.text, re.DOTALL) is not None


def read_entries() -> list[Message]:
    """What the page has: the literals of the terms of its definitions, and what stands behind the colon."""
    return [
        Message(kinds[0].astext() if (kinds := list(item.findall(nodes.classifier))) else "ConfigurationError", text)
        for item in read_page("errors").findall(nodes.definition_list_item)
        for text in literals(item.children[0])
    ]


ENTRIES = read_entries()


def best(seen: Message) -> Message | None:
    """The entry that says most of what was seen."""
    return max((entry for entry in ENTRIES if entry.covers(seen)), key=lambda entry: len(entry.text), default=None)


# -- what provokes each of them

#: By the message of the page. What one returns may be the result of a command, or a response.
PROVOKERS: dict[str, Callable[..., Any]] = {}


def provokes(message: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(provoke: Callable[..., Any]) -> Callable[..., Any]:
        PROVOKERS[message] = provoke
        return provoke

    return register


def nothing(environ: Environ, start: StartResponse) -> list[bytes]:
    return answer(start)


ini = test_cli.ini


@pytest.fixture
def make(sqlite_url: str) -> Iterator[Callable[..., SQLASessionMiddleware]]:
    """Makes applications on a SQLite file with a table, unless another URL is given."""
    made: list[SQLASessionMiddleware] = []

    def make(app: Any = nothing, bind: Any = sqlite_url, **options: Any) -> SQLASessionMiddleware:
        made.append(SQLASessionMiddleware(app, bind, **{"metadata": tables, **options}))
        return made[-1]

    yield make
    for each in made:
        each.dispose()


@pytest.fixture
def postgresql_url() -> str:
    return DATABASES_SEEN.url("postgresql", "")


class FailingSession(Session):
    """It cannot be closed, nor rolled back."""

    def close(self) -> None:
        super().close()
        raise ValueError("close")

    def rollback(self) -> None:
        raise ValueError("rollback")


FAILING = {"class_": FailingSession}

ENGINE = create_engine("sqlite://")

#: Arguments of the constructor. Some are from the table of another test, which knows more of what is refused.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "… must be true or false, got …": REFUSED["not true"][0],
    "… must be true, false or 'debug', got …": {"engine_options": {"echo": 5}},
    "… must be a whole number, got …": REFUSED["not whole anywhere"][0],
    "… must be a whole number from 0, got …": REFUSED["not whole"][0],
    "… must be a whole number from -1, got …": REFUSED["overflow of less than nothing"][0],
    "… contains a second URL in its database name: give each URL a setting of its own.": {
        "bind": "sqlite:///a;sqlite:///b"
    },
    "… has a line break at the beginning or end of …: remove it, with strip() if it was read from a file.": {
        "bind": "sqlite:///shop.db\n"
    },
    "… is the Engine of 'bind' itself: give a URL, or another Engine.": {"bind": ENGINE, "replicas": [ENGINE]},
    "… must be one of … for …, got …": REFUSED["no such level"][0],
    "… must be a whole number from 1, got …": {"transaction": {"attempts": 0}},
    "… must be a whole number of bytes from 0, got …": {"transaction": {"replay_body_max": -1}},
    "… must be a whole number of seconds from 0, got …": {"unavailable": {"retry_after": 0.5}},
    "… must be a whole number of failures from 0, got …": {"unavailable": {"breaker_failures": -1}},
    "… must be a number of seconds, got …": REFUSED["not seconds"][0],
    "… must be a number of seconds from 0, got …": {"replicas": ["sqlite://"], "replica_retry": -1},
    "… must be a number of seconds from 0, or none, got …": {"ping_after": -1},
    "… must be a number of seconds above 0, or none, got …": {"deadline": 0},
    "… must be a dict, got …": REFUSED["connect_args"][0],
    "… must have names as keys, got …": REFUSED["engine option's name"][0],
    "… must be callable, or the dotted name of …, got …": {"transaction": {"activate": 5}},
    "… must be exception classes or their dotted names, got …": {"transaction": {"retry_on": [print]}},
    "… must be a WSGI application, a callable, got …": REFUSED["app"][0],
    "… must be true, false or a dict of options, got …": {"transaction": "yes"},
    "… must be a dict of options, got …": {"background": 3},
    "… must be a printable text, or none, got …": {"name": ""},
    "… is one of …: pass …": {"pool_size": 5},
    "… is not an option of SQLASessionMiddleware…": {"atempts": 5},
    "… must be a text, or none, got …": {"sql_comments": {"application": 3}},
    "… must be a MetaData, such as a declarative Base.metadata, or several, got …": REFUSED["metadata"][0],
    "… must be a subclass of Session, got …": REFUSED["session class"][0],
    "… are not accepted by Session: …": REFUSED["session value"][0],
    "… must be a list of content types, got …": {"streams": "text/csv"},
    "… must hold content types such as 'text/csv', got …": {"streams": ["csv"]},
    "… is not an option…": {"transaction": {"atempts": 3}},
    "… is not an option of …": REFUSED["session option"][0],
    "… is not an option of create_engine() for …": REFUSED["engine option"][0],
    "… does not go with the pool, a …: leave it out, or choose another 'poolclass'.": {
        "engine_options": {"poolclass": NullPool, "pool_size": 5}
    },
    "… is an argument of the driver: set it in 'connect_args', or as '…' in an ini.": {
        "engine_options": {"check_same_thread": False}
    },
    "… is missing: set it to the URL of the database.": {"binds": {"audit": {"pool_size": 1}}},
    "… is set by the middleware: pass it as 'bind'.": REFUSED["session bind"][0],
    "… is reserved for tables without a bind key: pass this database as 'bind'.": {"binds": {"default": "sqlite://"}},
    "… must be a dict of databases by their bind keys, got …": {"binds": ["sqlite://"]},
    "… must be a list of databases, got …": {"replicas": "sqlite://"},
    "… cannot be used with replicas: no replica can prepare a transaction.": {
        "replicas": ["sqlite://"],
        "session_options": {"twophase": True},
    },
    "… must be a URL string, a URL or an Engine, got …": REFUSED["no text"][0],
    "… must be a database URL such as 'sqlite:///shop.db', got … characters without '://'.": REFUSED["no scheme"][0],
    "… cannot be parsed as a URL: expected …": REFUSED["@ in the password"][0],
    "… names …, for which SQLAlchemy has no dialect…": REFUSED["old name"][0],
    "… needs the driver of …, which cannot be imported (…): install it.": REFUSED["driver not installed"][0],
    "… names the driver …, which requires asyncio: use a synchronous driver.": REFUSED["asyncio"][0],
    "… names the SQLite file …, but there is no folder …": REFUSED["no folder"][0],
    "… cannot create an engine for …": REFUSED["bad driver argument"][0],
    "… is refused by create_engine() for …": {"engine_options": {"echo": "loud"}},
    "… cannot be applied to an existing Engine: give a URL.": {
        "bind": ENGINE,
        "engine_options": {"pool_size": 1},
    },
}


def make_no_engine() -> None:
    raise ValueError("postgresql://ada:secret@localhost/shop")


#: Settings of an ini, beside a URL. No text is no setting at all.
INI: dict[str, dict[str, Any]] = {
    "… must be …, which an ini file cannot contain: set it in Python.": {"session.info": "{}"},
    "… must be a string, as in an ini file, got …": {"sqlalchemy.pool_size": 5},
    "… must be a whole number of bytes, got …": {"transaction.replay_body_max": "1 MiB"},
    "… must be the dotted name of …, got …": {"sqlalchemy.poolclass": "NoPool"},
    "… must be a number of seconds above 0, none, or the dotted name of a callable, 'package.module:name', got …": {
        "deadline": "soon"
    },
    "… must be true, false, or the dotted name of a callable, 'package.module:name', got …": {
        "server_timing": "no.such:thing"
    },
    "… must be none, or the dotted name of …, got …": {"transaction.activate": "no.such:thing"},
    "… must be dotted names of …, got …": {"metadata": "no.such:metadata"},
    "… is not a setting of this middleware…": {"sesion.autoflush": "true"},
    "… is not a setting: list the URLs in …": {"sqlalchemy.replicas.url": "sqlite://"},
    "… must be …binds.NAME.url or binds.NAME.OPTION, with an engine option.": {"sqlalchemy.binds.audit": "sqlite://"},
    "… is missing: set it to a database URL, …": {"sqlalchemy.url": ""},
    "… and '…url' are both set: remove one of them.": {"sqlalchemy.engine": f"{__name__}:ENGINE"},
    "… must be the dotted name of an Engine, or of a function that returns one, got …": {
        "sqlalchemy.url": "",
        "sqlalchemy.engine": f"{__name__}:ARGUMENTS",
    },
    "… could not be had: …() has raised ….": {"sqlalchemy.binds.audit.engine": f"{__name__}:make_no_engine"},
    "… is missing, although options for replicas are set.": {"sqlalchemy.replicas.pool_size": "1"},
}


def construct(arguments: dict[str, Any]) -> Callable[[], object]:
    return lambda: SQLASessionMiddleware(**{"app": nothing, "bind": "sqlite://", **arguments})


def configure(given: dict[str, Any]) -> Callable[[], object]:
    config = {key: value for key, value in {"sqlalchemy.url": "sqlite://", **given}.items() if value != ""}
    return lambda: SQLASessionMiddleware.from_config(nothing, config)


PROVOKERS.update({message: construct(arguments) for message, arguments in ARGUMENTS.items()})
PROVOKERS.update({message: configure(given) for message, given in INI.items()})


# Pyramid.


@provokes("… must be a callable or its dotted name, got …")
def name_no_veto() -> None:
    read_options({"sqlalchemy.url": "sqlite://", "tm.commit_veto": "no.such.thing"})


@provokes("… says the same as …: keep one of the two.")
def set_both() -> None:
    read_options({"sqlalchemy.url": "sqlite://", "retry.attempts": "3", "transaction.attempts": "3"})


def pyramid_app(settings: dict[str, Any], configure: Callable[[Any], None] = lambda config: None) -> Any:
    config = Configurator(settings={"sqlalchemy.url": "sqlite://", **settings})
    config.include("sqlasession_middleware.pyramid")
    try:
        configure(config)
        return config.make_wsgi_app()
    except ConfigurationExecutionError as error:
        raise error.evalue from None


@provokes("… lists the tweens, so it has to list … as well.")
def leave_out_the_tween() -> None:
    pyramid_app({"pyramid.tweens": [EXCVIEW]})


@provokes("… must return None, or a whole number from 1 to the … of all requests, got …")
def ask_for_too_many() -> None:
    app = pyramid_app({"retry.activate_hook": lambda request: 4})
    consume(app(environ(), start_response))


@provokes("The view predicate … must be True or False, got …")
def ask_for_an_active_view() -> None:
    pyramid_app({}, lambda config: config.add_view(nothing, tm_active="yes"))


@provokes("…sqlasession_middleware.pyramid takes the place of …: remove config.include(…)…")
def include_both() -> None:
    pyramid_app({}, lambda config: config.include("pyramid_tm"))


@provokes("…sqlasession_middleware.pyramid adds request.dbsession: remove the application's own.…")
def add_another_session() -> None:
    def add_another(config: Any) -> None:
        config.add_request_method(lambda request: None, "dbsession")

    pyramid_app({}, lambda config: config.include(add_another))


@provokes("Only exceptions and their classes can be marked as retryable, got …")
def mark_a_text() -> None:
    mark_error_retryable("busy")  # type: ignore[arg-type]  # what is tested


@provokes("… and '…engine' are both set: remove one of them.")
def set_an_engine_first() -> None:
    config = {"sqlalchemy.engine": f"{__name__}:ENGINE", "sqlalchemy.url": "sqlite://"}
    SQLASessionMiddleware.from_config(nothing, config)


@provokes("… and '…engine' are both set: remove one of them.")
def set_an_engine_of_a_bind_first() -> None:
    config = {
        "sqlalchemy.url": "sqlite://",
        "sqlalchemy.binds.audit.engine": f"{__name__}:ENGINE",
        "sqlalchemy.binds.audit.url": "sqlite://",
    }
    SQLASessionMiddleware.from_config(nothing, config)


@provokes("… and '…url' are both set: remove one of them.")
def set_the_url_of_a_bind_first() -> None:
    config = {
        "sqlalchemy.url": "sqlite://",
        "sqlalchemy.binds.audit.url": "sqlite://",
        "sqlalchemy.binds.audit.engine": f"{__name__}:ENGINE",
    }
    SQLASessionMiddleware.from_config(nothing, config)


@provokes("… is missing: without_app() made this for scripts. …")
def call_what_wraps_nothing() -> None:
    consume(SQLASessionMiddleware.without_app("sqlite://")(environ(), start_response))


# Use of the session.


@provokes("after_commit() needs an application with context(), and … has none.")
def wait_for_the_commit_of_an_old_application() -> None:
    class Old:
        database_engine = ENGINE

    local.application = Old()
    try:
        after_commit(print)
    finally:
        local_manager.cleanup()


@provokes("No application is bound here, so 'session' has no scope: …")
def use_session_outside() -> None:
    select_one()


@provokes("Flask's application context is no scope of 'session': …")
def use_session_in_a_context_of_flask() -> None:
    with Flask("shop").app_context():
        select_one()


@provokes("… is not a setting of Flask-SQLAlchemy; did you mean …?")
def misspell_the_url() -> None:
    app = Flask("shop")
    app.config["SQLALCHEMY_DATABASE_URL"] = "sqlite://"
    SQLAlchemy(app)


@provokes("No SQLASessionMiddleware is around the code that uses 'session' in the request …, or its scope is over: …")
def use_session_around_the_middleware() -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        select_one()
        return answer(start)

    Client(app).get("/")


@provokes("the deadline of … s has passed: …")
def wait_too_long(make: Callable[..., SQLASessionMiddleware]) -> None:
    with make().context(deadline=1e-6):
        select_one()


@provokes("No application is bound here: this code runs outside of a request, or its request is over, …")
def use_application_outside() -> None:
    application.engine  # noqa: B018  # it is an error to ask


@provokes("The request is over, so 'session' has no scope: …")
def outlive_the_request(make: Any) -> None:
    kept = []

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        kept.append(copy_context())
        return answer(start)

    consume(make(app)(environ(), start_response))
    kept[0].run(select_one)


@provokes("The request ended while 'session' was being opened.")
def open_at_the_end(make: Any) -> None:
    making, ended = threading.Event(), threading.Event()

    class Slow(Session):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            making.set()
            assert ended.wait(timeout=30)

    with ThreadPoolExecutor(1) as pool:
        with make(session_options={"class_": Slow}).context():
            opening = pool.submit(copy_context().run, session)
            assert making.wait(timeout=30)
        ended.set()
        opening.result()


@provokes("local.application cannot become … while a session of … is open: call session.remove() first.")
def bind_another(make: Any) -> None:
    with make().context():
        session()
        local.application = make()


@provokes("local.application is …, which has no 'database_engine' to open a session on.")
def bind_a_text() -> None:
    local.application = "shop"
    try:
        session()
    finally:
        local_manager.cleanup()


@provokes("No application is bound here any more: 'local.application' was deleted.")
def delete_the_application(make: Any) -> None:
    with make().context():
        del local.application
        session()


@provokes("session.configure(…) would change the sessions of every application: …")
def configure_the_session() -> None:
    session.configure(autoflush=False)


@provokes("This context of … was already entered: call context() for each 'with'.")
def enter_twice(make: Any) -> None:
    context = make().context()
    with context, context:
        pass


@provokes("… has the bind key …, and no bind of the application has that name…")
def name_an_unknown_bind(make: Any) -> None:
    with make(binds={"audit": "sqlite://"}).context():
        session.execute(text("SELECT 1"), bind_arguments={"bind_key": "audti"})


class Itself(SavesItself, DeclarativeBase):
    """Of no registry that another test creates tables of."""


class Template(Itself):
    __tablename__ = "error_template"
    id: Mapped[int] = mapped_column(primary_key=True)


@provokes("merge() would insert the … with the primary key …, because it added itself …")
def merge_what_is_pending(make: Any) -> None:
    with make().context():
        session.merge(Template(id=1))


@provokes("bulk_save_objects() would insert a … that the next flush inserts as well, …")
def save_in_bulk_what_is_pending(make: Any) -> None:
    with make().context():
        session.bulk_save_objects([Template(id=1)])


@provokes("The metadata has no tables, so init_database() creates none: …")
def create_nothing(make: Any) -> None:
    make(metadata=MetaData()).init_database()


@provokes("… cannot be used with 'transaction', which commits the request's session.")
def commit_a_session_of_another_scope(make: Any) -> None:
    app = Flask("guests")
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    SQLAlchemy(app, transaction=True, session_options={"scopefunc": threading.get_ident})


@provokes("… would wait for …, which has a transaction open: …")
def drop_what_is_in_use(make: Any, postgresql_url: str) -> None:
    app = make(nothing, postgresql_url)
    with app.context():
        select_one()
        app.drop_database()


@provokes("There is no … with that key.")
def get_nothing(make: Any) -> None:
    with make().context():
        Request.blank("/").get_or_404(Guest, "no number")


@provokes("There is no such object.")
def find_nothing(make: Any) -> None:
    app = make(metadata=Guest.metadata)
    app.init_database()
    with app.context():
        Request.blank("/").one_or_404(select(Guest))


@provokes("There is no such page.")
def ask_for_no_page(make: Any) -> None:
    with make(metadata=Guest.metadata).context():
        Request.blank("/?page=0").paginate(select(Guest))


@provokes("…() needs a select(), got …")
def ask_for_pages_of_a_class(make: Any) -> None:
    request: Any = Request.blank("/")
    with make(metadata=Guest.metadata).context():
        request.paginate(Guest)


@provokes("paginate_by_key() needs a statement with order_by(): …")
def ask_for_pages_without_an_order(make: Any) -> None:
    with make(metadata=Guest.metadata).context():
        Request.blank("/").paginate_by_key(select(Guest))


@provokes("paginate_by_key() needs sqlakeyset: pip install 'sqlasession_middleware[pages]'")
def ask_for_pages_without_the_extra(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sqlakeyset", None)
    with make(metadata=Guest.metadata).context():
        Request.blank("/").paginate_by_key(select(Guest))


# Transactions.


@provokes("TransactionMiddleware has no session to commit: …")
def stand_alone() -> None:
    TransactionMiddleware(nothing)(environ(), start_response)


@provokes("…() needs a transaction: …")
def doom_nothing(make: Any) -> None:
    with make().context():
        doom()


@provokes("The transaction cannot be committed: the database aborted it after an error …")
def swallow_an_error(make: Any, postgresql_url: str) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        add()
        with contextlib.suppress(IntegrityError):
            session.execute(ITEMS.insert().values(id=session.scalar(select(ITEMS.c.id)), name="again"))
        return answer(start)

    wrapped = make(app, postgresql_url, transaction=True)
    wrapped.drop_database()
    wrapped.init_database()
    try:
        call(wrapped)
    finally:
        wrapped.drop_database()


def writing(environ: Environ, start: StartResponse) -> list[bytes]:
    add()
    return answer(start)


@provokes("It is not known whether your change was saved: …")
@provokes("It is not known whether a transaction was committed: …")
def cut_a_commit_short(make: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, str], bytes]:
    """A worker's timeout, for example, raises wherever the code is at that moment."""

    def do_commit(connection: Any) -> None:
        raise TimeoutError("the worker's")

    wrapped = make(writing, transaction=True)
    wrapped.init_database()
    monkeypatch.setattr(wrapped.engine.dialect, "do_commit", do_commit)
    return call(wrapped)


@provokes("commit_failed must return a WSGI application or None, got …")
def answer_with_a_tuple(make: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        select_one()
        event.listen(session(), "before_commit", lambda opened: 1 / 0)
        return answer(start)

    call(make(app, transaction={"commit_failed": lambda environ, error: ("taken", 409)}))


@provokes("Attempt … of … at … … failed and will be repeated in … s: …")
def fail_once(make: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        if environ["sqlasession.attempt"] == 1:
            raise Deadlock("serialize")
        return answer(start)

    call(make(app, transaction={"attempts": 2, **NO_WAIT}))


@provokes("Attempt … of … of … failed and will be repeated in … s: …")
def fail_once_in_a_job(make: Any) -> None:
    failures = [Deadlock("serialize")]

    def job() -> None:
        if failures:
            raise failures.pop()

    make(transaction=NO_WAIT).run(job, attempts=2)


def fail() -> None:
    raise ValueError("work")


@provokes("A call after the commit failed: …")
def fail_after_the_commit(make: Any) -> None:
    make().run(lambda: after_commit(fail))


@provokes("A call in the background failed: …")
def fail_in_the_background(make: Any) -> None:
    app = make()
    app.background(fail)
    app.dispose()


@provokes("… is observed already: call observe() once for each application.")
def observe_twice(make: Any) -> None:
    app = make()
    metrics.observe(app, MeterProvider())
    metrics.observe(app, MeterProvider())


@provokes("Slow: … …: … after … s; …")
def take_long(make: Any) -> None:
    call(make(slow_requests={"seconds": 0}))


@provokes("With 'traceparent' no text is sent twice, but psycopg prepares those that are sent often: …")
def prepare_what_is_sent_once(make: Any, postgresql_url: str) -> None:
    with make(bind=postgresql_url, sql_comments={"traceparent": True}).context():
        session.execute(text("SELECT 1"))


@provokes("The time of … s for calls in the background is up: …")
def have_no_time_in_the_background(make: Any) -> None:
    app, ended = make(background={"seconds": 0}), threading.Event()
    app.background(ended.wait)
    app.dispose()
    ended.set()


@provokes("The websocket at … has ended, and its session is rolled back with …")
def leave_a_websocket(make: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        session.add(Guest(name="Ada"))
        return []

    consume(make(app, transaction=True)(environ(HTTP_UPGRADE="websocket"), start_response))


@provokes("A transaction could not be rolled back: its session is closed")
@provokes("A session could not be closed")
def fail_to_roll_back(make: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        select_one()
        raise KeyError("application")

    call(make(app, transaction=True, session_options=FAILING))


# A database out of reach, replicas.


@provokes("The database cannot be reached at the moment. Please try again later.")
@provokes("The database is out of reach: … … is answered with 503: …")
def find_no_server(make: Any) -> tuple[str, dict[str, str], bytes]:
    return call(make(lets_it_pass, f"postgresql+psycopg://shop@127.0.0.1:{free_port()}/shop", unavailable=True))


@provokes("The database is too busy at the moment. Please try again later.")
@provokes("The database is too busy: … … is answered with 503: …")
def meet_deadlocks(make: Any) -> tuple[str, dict[str, str], bytes]:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        raise Deadlock("serialize")

    return call(make(app, transaction={"attempts": 2, **NO_WAIT}, unavailable=True))


@provokes("… … has lost its connection in each attempt, and the database answers others: …")
def send_what_kills_the_connection(make: Any, postgresql_url: str) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
        return answer(start)

    call(make(app, postgresql_url, transaction={"attempts": 2, **NO_WAIT}, unavailable=True))


@provokes("The page of 'unavailable' failed at … …: the default page is sent")
def fail_in_the_page(make: Any) -> None:
    def page(environ: Environ, start: StartResponse) -> list[bytes]:
        raise KeyError("page")

    call(make(lets_it_pass, f"postgresql+psycopg://shop@127.0.0.1:{free_port()}/shop", unavailable={"page": page}))


@provokes("the database … is out of reach, and is tried again in … s")
@provokes("The database … is out of reach: whoever needs it is told so at once for … s, …")
@provokes("The database … is reachable again")
def open_and_close_a_breaker(make: Any) -> None:
    app = make(lets_it_pass, unavailable={"breaker_failures": 1, "breaker_seconds": 1000})
    broken = break_engine(app.engine)
    call(app)
    broken.clear()
    try:
        app.engine.connect()
    finally:
        found = breaker_of(LookupError(), app.engine)
        assert found is not None
        found.open_until = 0.001
        call(app)


@provokes("The replica … is out of reach, and is tried again after … s: …")
@provokes("The replica … is reachable again")
def lose_a_replica(make: Any) -> None:
    app = make(lets_it_pass, replicas=["sqlite://"], replica_retry=0, unavailable=True)
    broken = break_replica(app)
    call(app)
    broken.clear()
    call(app)


@provokes("This statement was sent to a replica, because it does not look like a write: …")
def write_to_a_replica(make: Any) -> None:
    with make(replicas=["sqlite://"]).engines["replicas[0]"].begin() as connection:
        connection.execute(text("CREATE TABLE written (id int)"))


# Responses and streams.


class Body:
    """One that cannot be closed."""

    def __init__(self, steps: Iterator[bytes]) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[bytes]:
        return self.steps

    def close(self) -> None:
        raise ValueError("close")


def fails_at_its_end(environ: Environ, start: StartResponse) -> Body:
    select_one()
    start("200 OK", [])
    return Body(iter([b"x"]))


def fails_throughout(environ: Environ, start: StartResponse) -> Body:
    start("200 OK", [])
    return Body(1 / 0 for _ in "x")


@provokes("… of … has ended without returning … of its connections. Checked out here:…")
def keep_a_connection(make: Any) -> None:
    app = make(report_leaks=True)
    with app.context():
        kept = app.engine.connect()
    kept.close()


@provokes("A response or context of … was dropped with its session open: …")
@provokes("A finisher failed for a response of … that was never closed")
def drop_a_response(make: Any) -> None:
    make(fails_at_its_end)(environ(), start_response)


@provokes("A finisher of … failed: …")
def fail_in_a_step_and_after_it(make: Any) -> None:
    consume(make(fails_throughout)(environ(), start_response))


@provokes("The body of a failed response could not be closed")
def fail_and_be_replaced(make: Any) -> None:
    call(make(fails_throughout, transaction=True))


@provokes("A connection of a session that could not be closed could not be invalidated either")
def fail_to_give_back(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unclosed(Session):
        def close(self) -> None:
            raise ValueError("close")

    with make(session_options={"class_": Unclosed}).context():
        connection = session.connection()
        monkeypatch.setattr(connection, "invalidate", lambda: 1 / 0)
    connection.close()


@provokes("The session of a dropped shell scope could not be closed")
def leave_a_shell(make: Any) -> None:
    local.application = make(session_options=FAILING)
    select_one()
    local_manager.cleanup()


@provokes("start_response() was called a second time without exc_info.")
def start_twice(make: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        start("200 OK", [])
        return answer(start)

    call(make(app, transaction=True))


@provokes("The application returned a body, but it has not called start_response().")
def start_never(make: Any) -> None:
    call(make(lambda environ, start: [b"x"], transaction=True))


# Health checks. Some arguments are from the table of another test, which knows more of what is refused.

WRONG_HEALTH: dict[str, str] = {
    "… must be a number of seconds above 0, got …": "no time",
    "… must be a path that begins with '/', or none, got …": "relative",
    "… must be another path than 'live', got … for both.": "same",
    "… is needed, because … leads to no SQLASessionMiddleware: …": "none",
    "… is needed, because … leads to … of them: pass the one to ask.": "several",
    "… must be a SQLASessionMiddleware, got …": "another kind",
}


def check_health_of(case: str) -> Callable[[], object]:
    app, options, _ = test_health.REFUSED[case]
    return lambda: HealthMiddleware(app, **options)


PROVOKERS.update({message: check_health_of(case) for message, case in WRONG_HEALTH.items()})


@provokes("… is the SQLASessionMiddleware around this one, but there is none: …")
def check_health_outside() -> None:
    HealthMiddleware(nothing, application=application)(environ(PATH_INFO="/readyz"), start_response)


@provokes("Only GET and HEAD are allowed.")
def post_to_health() -> Any:
    return call(HealthMiddleware(nothing, ready=None), REQUEST_METHOD="POST", PATH_INFO="/healthz")


def full_and_free(make: Any) -> None:
    app = make(bind="sqlite://", engine_options={"pool_size": 1, "max_overflow": 0})
    health = HealthMiddleware(app, timeout=30.0)
    with app.engine.connect():
        call(health, PATH_INFO="/readyz")
    call(health, PATH_INFO="/readyz")


provokes("The health check finds the engine … …: …")(full_and_free)
provokes("The health check finds the engine … ok again")(full_and_free)


# The inspector. Some arguments are from the table of another test, which knows more of what is refused.

WRONG_INSPECTOR: dict[str, str] = {
    "… must be a path that begins with '/' and has a name, got …": "path",
    "… must be a text of … characters or more, letters, digits, '-', '_', '.' and '~'.": "short token",
    "… must be a list of texts, got …": "one host",
    "… must be names as in 'Host', without a port: 'localhost', '[::1]', got …": "host with a port",
    "… must be addresses or networks, such as '127.0.0.1' or '10.1.0.0/16', got …": "peer",
    "… must be SQLASessionMiddlewares, got …": "applications",
    "… must be the path of a folder, got …": "store",
}


def inspect_with(case: str) -> Callable[[], object]:
    options, _ = test_inspector.WRONG[case]
    return lambda: InspectorMiddleware(nothing, **options)


PROVOKERS.update({message: inspect_with(case) for message, case in WRONG_INSPECTOR.items()})


@provokes("… cannot be used: …")
def store_below_a_file() -> None:
    InspectorMiddleware(nothing, store=f"{__file__}/store")


@provokes("… must be a folder that only the user of this process can read: chmod 700 …")
def store_in_the_open(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    InspectorMiddleware(nothing, store=str(tmp_path))


@provokes("… needs …: pip install 'sqlasession_middleware[inspector]'.")
def inspect_without_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sqlasession_middleware._inspector.pages", raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    InspectorMiddleware(nothing)


@provokes("What requests do to databases is shown at …")
def make_an_inspector() -> None:
    InspectorMiddleware(nothing)


@provokes("A request cannot be kept")
def fail_to_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqlasession_middleware._inspector.watch.keep", lambda *given: 1 / 0)
    call(InspectorMiddleware(nothing))


@provokes("Requests cannot be kept in …: …")
def lose_the_store(tmp_path: Path) -> None:
    app = InspectorMiddleware(nothing, store=str(tmp_path / "store"))
    (tmp_path / "store" / "requests.sqlite3").mkdir()
    call(app)


# Tenants. Most arguments are from the table of another test, which knows more of what is refused.

WRONG_TENANTS: dict[str, str] = {
    "… must have {tenant} in its database or user, or differ by 'schema' or 'set_local'.": "no place",
    "… may have {tenant} in its database and its user, and nowhere else.": "place in the host",
    "… cannot have {tenant} or be a callable together with 'schema' or 'set_local', which share a pool.": "both",
    "… must be on a server of the same kind as 'bind'.": "replica of another server",
    "… cannot be used together with 'schema' or 'set_local', which are set when a transaction begins.": "twophase",
    "… is for PostgreSQL only: give each tenant a schema or a database.": "no PostgreSQL",
    "… must be {tenant} with letters a to z, digits, '-' or '_' around it, got …": "schema with a quote",
    "… must be a dict of settings, got …": "no settings",
    "… must have names of PostgreSQL's settings as keys, got …": "no setting",
    "… must be a text without '%', got …": "percent",
    "… must be 'host', 'subdomain', 'path', 'header:NAME', a callable of environ, or its dotted name, got …": (
        "resolver"
    ),
    "… must have the name of a header after 'header:', got …": "header",
    "… must be set with tenant='subdomain', and only then: such as 'example.com'.": "no domain",
    "… must be set with tenant='host', and only then: the tenant of each host.": "no hosts",
    "… must be a domain such as 'example.com', got …": "domain",
    "… must be the names of the tenants, or what tells them, got None.": "known",
    "… must be names of up to … of a to z, 0 to 9, '-' and '_', got …": "known name",
    "… must have no name that makes a schema or database of the server's own, got …": "known of the server",
    "… must have 'bind', a database, and 'query', a SELECT of the names.": "known dict",
}


@provokes("… must return names, got …")
def return_a_text() -> None:
    tenants(known=lambda: "acme").names()


def tenants(**options: Any) -> TenantsMiddleware:
    given = {"bind": "sqlite:///{tenant}.db", "tenant": "header:X-Tenant", "known": ["acme"], **options}
    return TenantsMiddleware(nothing, given.pop("bind"), **given)


def refuse_tenants(case: str) -> Callable[[], object]:
    return lambda: tenants(**test_tenants.REFUSED[case][0])


PROVOKERS.update({message: refuse_tenants(case) for message, case in WRONG_TENANTS.items()})


@provokes("… is missing: see the reference of ini keys.")
def forget_who_is_known() -> None:
    TenantsMiddleware.from_config(nothing, {"sqlalchemy.url": "sqlite://", "tenants.tenant": "path"})


@provokes("There is no tenant …: 'known' does not have it.")
def enter_nobodys_context() -> None:
    tenants().context("nobody")


@provokes("A tenant's connection cannot be in AUTOCOMMIT, or in a transaction of two phases: …")
def begin_two_phases(postgresql_url: str) -> None:
    app = tenants(bind=postgresql_url, schema="{tenant}")
    try:
        with app.application("acme").engine.connect() as connection:
            connection.begin_twophase()
    finally:
        app.dispose()


@provokes("There is nothing at this address.")
def ask_for_nobody() -> Any:
    return call(tenants(), HTTP_X_TENANT="nobody")


def fail_to_know() -> None:
    answers = iter([["acme", "no name"]])
    app = tenants(known=lambda: next(answers), known_seconds=1e-9)
    call(app, HTTP_X_TENANT="nobody")
    call(app, HTTP_X_TENANT="nobody")
    call(tenants(known=lambda: next(answers)), HTTP_X_TENANT="nobody")


provokes("The names of the tenants cannot be asked for: those that were known go on")(fail_to_know)
provokes("The names of the tenants cannot be asked for: a request is answered with 503")(fail_to_know)
provokes(
    "… names of tenants are ignored: they have another form than a-z, 0-9, - and _, are too long, or are a server's"
)(fail_to_know)


@provokes("error: … has tenants: give --tenant NAME or --all-tenants to a command that takes it.")
def create_nobodys_tables(tmp_path: Any) -> Result:
    return command("create", test_tenants.ini_of_tenants(tmp_path))


@provokes("error: … has … with tenants, where one is needed: pick another application by …#NAME.")
def create_tables_of_no_tenants(ini: Any) -> Result:
    return command("create", ini({"sqlalchemy.url": "sqlite://"}), "--all-tenants")


def check_with_one_that_is_away(tmp_path: Any) -> Result:
    return command("check", test_tenants.ini_of_tenants(tmp_path, known="acme, away"), "--all-tenants")


provokes("error: the tenant …: …")(check_with_one_that_is_away)
provokes("error: … of … have failed: …")(check_with_one_that_is_away)


@provokes("error: --commit needs -c or one tenant: …")
def commit_for_all(ini: Any) -> Result:
    return command("shell", ini({"sqlalchemy.url": "sqlite://"}), "--all-tenants", "--commit")


@provokes("error: -c must be Python: …")
def run_what_is_no_code(ini: Any) -> Result:
    return command("shell", ini({"sqlalchemy.url": "sqlite://"}), "-c", "for")


# The command.


@provokes("error: the inspector is on, at …: take it out of …, or give --development if nobody else uses it.")
def check_with_the_inspector(ini: Any) -> Result:
    return check(ini({"sqlalchemy.url": "sqlite://"}, test_cli.INSPECTED) + "#inspected")


@provokes("sqlasession needs …: pip install 'sqlasession_middleware[cli]'")
def do_without_click() -> subprocess.CompletedProcess[str]:
    script = "import sys; sys.modules['click'] = None; import sqlasession_middleware.cli"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)


#: Which case of the command's own tests provokes it.
CHECKS = {
    "error: there is no file …": "no file",
    "error: … is not a valid ini file: …": "lost value",
    "error: … cannot be loaded: …": "wrong setting",
    "error: … has no section with 'use = egg:sqlasession_middleware'.": "no middleware",
    "error: … of [server:main] must be a whole number from 1, got …": "not a number",
}


@provokes("error: port of [server:main] must be a whole number from 0 to 65535, got …")
def serve_on_no_port(ini: Any) -> Result:
    return command("serve", ini({"sqlalchemy.url": "sqlite://"}, "[server:main]\nport = 80000"))


def refused(case: str) -> Callable[[Any], Result]:
    return lambda ini: check(test_cli.REFUSED[case][0](ini))


PROVOKERS.update({message: refused(case) for message, case in CHECKS.items()})


@provokes("error: … has no section with 'use = egg:sqlasession_middleware#inspector'.")
def show_requests_of_no_inspector(ini: Any) -> Result:
    return command("requests", ini({"sqlalchemy.url": "sqlite://"}))


def inspected(ini: Any, settings: str = "") -> str:
    inspector = "paste.filter_app_factory = sqlasession_middleware.paste:inspector"
    path: str = ini({"sqlalchemy.url": "sqlite://"}, f"[filter-app:seen]\n{inspector}\nnext = main\n{settings}\n")
    return f"{path}#seen"


@provokes("error: the inspector of … keeps requests in the memory of its process: …")
def show_requests_of_another_process(ini: Any) -> Result:
    return command("requests", inspected(ini))


@provokes("error: the address must be the one that the inspector logs, with '?token=…' at its end.")
def show_requests_without_a_token() -> Result:
    return command("requests", "http://127.0.0.1:1/_sqlasession/")


@provokes("error: … does not answer as an inspector does: …")
def show_requests_of_something_else() -> Result:
    def something(environ: Environ, start_response: StartResponse) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"something"]

    with make_server("127.0.0.1", 0, something) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        done = command("requests", f"http://127.0.0.1:{server.server_port}/?token=1")
        thread.join()
    return done


def kept(ini: Any, folder: Any, *requests: str) -> str:
    path = inspected(ini, f"store = {folder}/kept")
    app = loadapp(f"config:{path}")
    for each in requests:
        with contextlib.suppress(OperationalError):  # There is no table.
            Client(app).get(each, buffered=True)
    return path


@provokes("error: … requests have an ID that begins with ….")
def show_one_of_two_requests(ini: Any, tmp_path: Any) -> Result:
    return command("requests", kept(ini, tmp_path, "/", "/"), "")


@provokes("error: there is no request …, or not any more.")
def show_no_request(ini: Any, tmp_path: Any) -> Result:
    return command("requests", kept(ini, tmp_path), "1")


@provokes("error: … has … applications with a database: pick one by its name, …")
def open_a_shell_of_two(ini: Any) -> Result:
    other = "paste.filter_app_factory = sqlasession_middleware.paste:main\nnext = main\nsqlalchemy.url = sqlite://\n"
    return command("shell", ini({"sqlalchemy.url": "sqlite://"}, f"[filter-app:other]\n{other}") + "#other")


@provokes("error: … does not answer: …")
def check_a_port(ini: Any) -> Result:
    return check(ini({"sqlalchemy.url": f"postgresql+psycopg://shop@127.0.0.1:{free_port()}/shop"}))


@provokes("error: … cannot be asked: …")
def wait_with_a_wrong_option(ini: Any) -> Result:
    url = "postgresql+psycopg://shop@127.0.0.1:1/shop"
    return command("wait", ini({"sqlalchemy.url": url, "sqlalchemy.connect_args.nonsense": "1"}))


@provokes("error: …: up to … connections; … is …")
def check_too_many(ini: Any, postgresql_url: str) -> Result:
    return check(ini({"sqlalchemy.url": postgresql_url.replace("%", "%%")}), "--processes", "100000")


@provokes("error: --set … needs an environment variable of that name, and there is none: set it, or give ….")
def set_what_is_nowhere(ini: Any) -> Result:
    return command("create", ini({"sqlalchemy.url": "sqlite://"}), "--set", "NO_SUCH_VARIABLE")


@provokes("error: the loggers of … cannot be configured: …")
def configure_no_loggers(ini: Any) -> Result:
    return command("serve", ini({"sqlalchemy.url": "sqlite://"}, "[loggers]\nkeys = root\n"))


@provokes("error: … has no tables to create: …")
def create_no_tables(ini: Any) -> Result:
    return command("create", ini({"sqlalchemy.url": "sqlite://", "metadata": "tests.paste_apps:no_tables"}))


@provokes("error: The transaction cannot be committed: …")
def commit_what_was_given_up(ini: Any, postgresql_url: str) -> Result:
    said = "from sqlalchemy import text\nsession.execute(text('no SQL'))\n"
    return command("shell", ini({"sqlalchemy.url": postgresql_url.replace("%", "%%")}), "--commit", said=said)


@provokes("error: aborted, no tables were dropped.")
def refuse_to_drop(ini: Any) -> Result:
    return command("drop", ini({"sqlalchemy.url": "sqlite://"}), said="n\n")


@provokes("error: … cannot be loaded: it has no section …")
def name_no_section(ini: Any) -> Result:
    return command("create", f"{ini({'sqlalchemy.url': 'sqlite://'})}#Shop")


@provokes("error: waitress is not installed: pip install waitress")
def serve_without_waitress(ini: Any, monkeypatch: pytest.MonkeyPatch) -> Result:
    monkeypatch.setitem(sys.modules, "waitress.server", None)
    return command("serve", ini({"sqlalchemy.url": "sqlite://"}))


@provokes("error: waitress cannot listen on …: …")
def serve_nowhere(ini: Any) -> Result:
    return command("serve", ini({"sqlalchemy.url": "sqlite://"}), "--host", "256.256.256.256")


# Tests.


@provokes("… cannot use the database yet, because … has changes that are not committed, …")
def begin_while_another_session_has_changes(make: Any) -> None:
    app = make()
    app.init_database()
    with isolated(app), app.context():
        add()
        with app.context():
            select_one()


@provokes("… cannot commit: its changes were rolled back at the end of the isolated() block.")
def commit_after_the_block(make: Any) -> None:
    app = make()
    app.init_database()
    with app.context():
        with isolated(app):
            add()
        session.commit()


@provokes("expected … statements, but … were sent:…")
def miss_a_query() -> None:
    with assert_queries(1):
        pass


@provokes("… connections were checked out and not returned. Checked out here:…")
def leak(sqlite_engine: Any) -> None:
    kept = []
    try:
        with no_leaks():
            kept.append(sqlite_engine.connect())
    finally:
        kept.pop().close()


@provokes("define a fixture 'sqlasession_app' that returns the SQLASessionMiddleware to test.")
def run_pytest_without_an_application(pytester: pytest.Pytester) -> None:
    caught: list[BaseException] = []

    class Catching:
        def pytest_exception_interact(self, call: pytest.CallInfo[object]) -> None:
            caught.append(call.excinfo.value)

    pytester.makepyfile("def test_it(isolated_app): pass")
    pytester.inline_run("-p", "no:cacheprovider", plugins=[Catching()])
    raise caught[0]


# -- what is seen of it


def told(record: logging.LogRecord) -> Message:
    return Message(f"logged as {'an' if record.levelname[0] in 'EI' else 'a'} {record.levelname.lower()}",
                   record.getMessage())  # fmt: skip


def shown(answered: Any) -> list[Message]:
    """What a command has written, or the body of a response."""
    if answered is None:
        return []
    if isinstance(answered, tuple):
        status, _, body = answered
        return [Message(f"status {status[:3]}", line.strip()) for line in body.decode().splitlines()]
    code = answered.exit_code if isinstance(answered, Result) else answered.returncode
    return [Message(f"exit code {code}", line) for line in answered.stderr.splitlines()]


def observe(provoke: Callable[..., Any], request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Any:
    """All that somebody gets to see of what a function provokes."""
    arguments = {name: request.getfixturevalue(name) for name in inspect.signature(provoke).parameters}
    seen: list[Message] = []
    caplog.set_level(logging.DEBUG, "sqlasession_middleware")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            seen += shown(provoke(**arguments))
        except Exception as error:
            seen.append(Message(type(error).__name__, str(error)))
            seen += [Message("note of an error", each) for each in getattr(error, "__notes__", ())]
    seen += [Message(each.category.__name__, str(each.message)) for each in warned]
    return seen + [told(record) for record in caplog.records if record.name.startswith("sqlasession_middleware.")]


def test_each_message_of_the_page_is_provoked_and_no_other() -> None:
    messages = [entry.text for entry in ENTRIES]
    assert sorted(messages) == sorted(set(messages))
    assert set(messages) == set(PROVOKERS)


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry.text for entry in ENTRIES])
def test_message_is_the_one_of_the_page(
    entry: Message, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    seen = observe(PROVOKERS[entry.text], request, caplog)
    assert entry in map(best, seen), seen


# -- what the package has

#: What stands for a value that is not known from the source.
UNKNOWN = "\N{OBJECT REPLACEMENT CHARACTER}"

#: What options have to be: as far as they can be wrong, the page has an entry for each.
KINDS = [each for each in vars(kinds).values() if isinstance(each, kinds.Kind)]


def can_be_wrong(kind: kinds.Kind) -> bool:
    try:
        return bool(kind.types) or (kind.parse is not None and kind.parse("no such thing") is None)
    except Exception:
        return True


KNOWN = {
    "kind.name": [kind.name for kind in KINDS if can_be_wrong(kind)],
    "DOTTED.name": [kinds.DOTTED.name],
}


class Reader(ast.NodeVisitor):
    """Finds the messages that a module can raise, log, warn of or exit with."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.found: list[tuple[int, Message]] = []
        self._assigned: dict[str, list[ast.expr]] = {}
        self._returned: dict[str, list[ast.expr]] = {}

    def visit_Module(self, node: ast.Module) -> None:
        for function in node.body:
            if isinstance(function, ast.FunctionDef):
                returns = [each.value for each in ast.walk(function) if isinstance(each, ast.Return)]
                self._returned[function.name] = [value for value in returns if value is not None]
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer = self._assigned
        self._assigned = {}
        for each in ast.walk(node):
            if isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name):
                self._assigned.setdefault(each.targets[0].id, []).append(each.value)
        self.generic_visit(node)
        self._assigned = outer

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for each in node.body:  # The pages of WebOb have their texts so.
            if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "explanation":
                self._note(each, f"status {getattr(self.module, node.name).code}", each.value)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func)
        called = self._resolve(name)
        if isinstance(called, type) and issubclass(called, BaseException):
            is_setting = called.__name__ == "ConfigurationError"
            for message in node.args[is_setting : is_setting + 1]:
                self._note(node, called.__name__, message, f"{UNKNOWN} " if is_setting else "")
        elif name.startswith("logger."):
            level = "error" if name == "logger.exception" else name.removeprefix("logger.")
            self._note(node, f"logged as {'an' if level[0] in 'ei' else 'a'} {level}", node.args[0])
        elif name.endswith(".add_note"):
            self._note(node, "note of an error", node.args[0])
        elif name == "warnings.warn":
            self._note(node, ast.unparse(node.args[1]), node.args[0])
        elif name in ("fail", "refuse", "complain"):
            self._note(node, f"exit code {1 + (name == 'refuse')}", node.args[0], "error: ")
        elif name == "sys.exit":
            self._note(node, "exit code 1", node.args[0])
        for keyword in node.keywords:
            if keyword.arg == "unbound_message":
                self._note(node, "RuntimeError", keyword.value)
        self.generic_visit(node)

    def _resolve(self, name: str) -> object:
        found: object = self.module
        for part in name.split("."):
            found = getattr(found, part, None)
        return found

    def _note(self, node: ast.expr | ast.stmt, kind: str, message: ast.expr, before: str = "") -> None:
        for each in self._texts(message):
            # What is handed on, as it comes from elsewhere, is nothing to be looked up.
            if re.search(r"\w", each):
                self.found.append((node.lineno, Message(kind, before + each)))

    def _texts(self, node: ast.expr) -> list[str]:
        """What an expression may be, as far as it stands there."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return [re.sub(r"%[.\d]*[a-z]", UNKNOWN, node.value)]
        if isinstance(node, ast.JoinedStr):
            return ["".join(parts) for parts in itertools.product(*map(self._texts, node.values))]
        if isinstance(node, ast.FormattedValue):
            if isinstance(node.value, ast.Call):
                return self._texts(node.value)
            return KNOWN.get(ast.unparse(node.value), [UNKNOWN])
        if isinstance(node, ast.Name) and node.id in self._assigned:
            return [each for value in self._assigned[node.id] for each in self._texts(value)]
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "without_secrets":
            return self._texts(node.args[0])
        if isinstance(node, ast.Call) and (function := ast.unparse(node.func)) in self._returned:
            returned = self._returned.pop(function)  # So that no function is followed into itself.
            texts = [each for value in returned for each in self._texts(value)]
            self._returned[function] = returned
            return texts
        return [UNKNOWN]


@pytest.mark.parametrize("name", module_files())
def test_each_message_of_the_source_is_on_the_page(name: str) -> None:
    module = importlib.import_module(name)
    reader = Reader(module)
    reader.visit(ast.parse(inspect.getsource(module)))
    assert [found for found in reader.found if best(found[1]) is None] == []


def test_the_source_is_read() -> None:
    """Each way in which something is said: a reader that finds nothing would find nothing missing."""
    source = """
def describe(name):
    return describe(name)
    return f"the engine {name}"

def say(name):
    problem = f"is {name}."
    raise ConfigurationError("bind", problem)
    raise ConfigurationError("bind", f"must be {kind.name}")
    raise ScopeError("No scope" " here")
    logger.exception("%s of %.3f", 1, 2)
    logger.warning("Once")
    fail("aborted, no tables were dropped.")
    refuse(f"there is no file {name}.")
    complain(f"{describe(name)} does not answer")
    complain(str(name))
    raise error.renamed(name)
"""
    reader = Reader(importlib.import_module("sqlasession_middleware.errors"))
    reader.visit(ast.parse(source))
    said = [message for _, message in reader.found]
    assert said[:1] == [Message("ConfigurationError", f"{UNKNOWN} is {UNKNOWN}.")]
    assert Message("ConfigurationError", f"{UNKNOWN} must be a whole number") in said
    assert said[-7:] == [
        Message("ScopeError", "No scope here"),
        Message("logged as an error", f"{UNKNOWN} of {UNKNOWN}"),
        Message("logged as a warning", "Once"),
        Message("exit code 1", "error: aborted, no tables were dropped."),
        Message("exit code 2", f"error: there is no file {UNKNOWN}."),
        Message("exit code 1", f"error: {UNKNOWN} does not answer"),
        Message("exit code 1", f"error: the engine {UNKNOWN} does not answer"),
    ]
