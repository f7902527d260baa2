"""G23: a failure that the application has caught and recovered from decides nothing about the rest of the request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from io import StringIO
from types import ModuleType
from typing import Any

import bottle
import django.urls
import falcon
import pytest
from django.conf import settings
from django.http import HttpResponse
from flask import Flask, abort
from pyramid.config import Configurator
from pyramid.response import Response
from sqlalchemy import Column, Integer, MetaData, String, Table, event, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session
from werkzeug.test import create_environ

from sqlasession_middleware import SQLASessionMiddleware, application, session

from .framework_apps import FRAMEWORKS
from .ports import free_port
from .wsgi import Environ, StartResponse, consume

tables = MetaData()
ITEMS = Table("recovery_item", tables, Column("id", Integer, primary_key=True), Column("name", String(40)))
NOWHERE = "postgresql+psycopg://shop@127.0.0.1:{}/shop"
ATTEMPTS = {"attempts": 3, "backoff_base": 0}
PLAIN = [("Content-Type", "text/plain")]
#: The row that another connection has a lock on; PostgreSQL's sequence does not come to its number.
TAKEN = 1000


class ShopError(Exception):
    """What a view, or a listener, raises in place of the database's error."""


def work() -> None:
    session.execute(insert(ITEMS).values(name="work"))


@contextmanager
def locked() -> Iterator[None]:
    """Another connection has a lock on the first row."""
    engine = application.engine
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        connection.execute(update(ITEMS).where(ITEMS.c.id == TAKEN).values(name="theirs"))
        yield


def fail_to_lock() -> None:
    """Meet a lock that is not available: 55P03, 1205, SQLITE_BUSY."""
    with locked():
        if session().get_bind().dialect.name == "sqlite":
            session.execute(text("PRAGMA busy_timeout = 0"))
            session.execute(update(ITEMS).where(ITEMS.c.id == TAKEN).values(name="ours"))
        else:
            session.execute(select(ITEMS).where(ITEMS.c.id == TAKEN).with_for_update(nowait=True))


# -- what the application does about the failure

CAUGHT = (DBAPIError, ShopError)


def caught_in_a_savepoint(fail: Callable[[], None], then: Callable[[], None]) -> None:
    with suppress(*CAUGHT), session.begin_nested():
        fail()
    then()


def rolled_back(fail: Callable[[], None], then: Callable[[], None]) -> None:
    with suppress(*CAUGHT):
        fail()
    session.rollback()
    then()


def in_another_session(fail: Callable[[], None], then: Callable[[], None]) -> None:
    with suppress(*CAUGHT):
        fail()
    session.rollback()
    session.remove()
    then()


RECOVERIES = [caught_in_a_savepoint, rolled_back, in_another_session]


# -- how the request ends


def answers_502(start: StartResponse) -> list[bytes]:
    start("502 Bad Gateway", PLAIN)
    return [b"the application's own"]


def makes_a_mistake(start: StartResponse) -> list[bytes]:
    raise TypeError("the application's own")


def makes_a_mistake_in_a_stream(start: StartResponse) -> Iterator[bytes]:
    start("200 OK", PLAIN)
    raise TypeError("the application's own")
    yield b""


def in_flask(do: Callable[[], None]) -> Any:
    """A view that makes a mistake, of which Flask makes a 500."""
    flask = Flask("recovery")

    @flask.get("/")
    def view() -> str:
        do()
        raise TypeError("the application's own")

    return flask


def makes(url: str) -> Iterator[Callable[..., SQLASessionMiddleware]]:
    """Gives what makes applications on a database, with one row."""
    with ExitStack() as stack:

        def make(app: Any, **options: Any) -> SQLASessionMiddleware:
            wrapped = SQLASessionMiddleware(app, url, metadata=tables, **options)
            wrapped.drop_database()
            wrapped.init_database()
            with wrapped.engine.begin() as connection:
                connection.execute(insert(ITEMS).values(id=TAKEN, name="first"))
            stack.callback(wrapped.dispose)
            stack.callback(wrapped.drop_database)
            return wrapped

        yield make


@pytest.fixture
def make(database_url: str) -> Iterator[Callable[..., SQLASessionMiddleware]]:
    """Makes applications on one database after the other."""
    yield from makes(database_url)


@pytest.fixture
def make_sqlite(sqlite_url: str) -> Iterator[Callable[..., SQLASessionMiddleware]]:
    """Makes applications on SQLite, for what does not depend on the database."""
    yield from makes(sqlite_url)


def status_of(app: Any) -> str:
    heads: list[str] = []

    def start(status: str, headers: Any, exc_info: Any = None) -> Any:
        heads.append(status)
        return heads.append

    consume(app(create_environ(errors_stream=StringIO()), start))
    return heads[-1]


def call(app: SQLASessionMiddleware) -> str:
    """The status, or the exception that a server gets."""
    try:
        return status_of(app)
    except TypeError as error:
        return f"TypeError: {error}"
    finally:
        assert app.engine.pool.checkedout() == 0


ENDS: dict[str, tuple[Any, str]] = {
    "502": (answers_502, "502 Bad Gateway"),
    "mistake": (makes_a_mistake, "TypeError: the application's own"),
    "mistake in a stream": (makes_a_mistake_in_a_stream, "TypeError: the application's own"),
    "Flask": (in_flask, "500 INTERNAL SERVER ERROR"),
}


def request_that(do: Callable[[], None], end: Any) -> Any:
    """An application that does something and then ends as told."""
    if end is in_flask:
        return in_flask(do)

    def app(environ: Environ, start: StartResponse) -> Any:
        do()
        return end(start)

    return app


@pytest.mark.parametrize("recovery", RECOVERIES)
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("unavailable", [False, True], ids=["", "unavailable"])
def test_nothing_is_repeated_when_the_application_has_dealt_with_the_failure(
    make: Any, recovery: Any, end: str, unavailable: bool
) -> None:
    charged: list[int] = []

    def do() -> None:
        charged.append(1)
        recovery(fail_to_lock, work)

    ending, expected = ENDS[end]
    app = make(request_that(do, ending), transaction=ATTEMPTS, unavailable=unavailable)
    assert call(app) == expected
    assert len(charged) == 1


@pytest.mark.parametrize("recovery", RECOVERIES)
@pytest.mark.parametrize("end", ["502", "Flask"])
def test_request_is_repeated_when_nothing_was_done_since_the_failure(make: Any, recovery: Any, end: str) -> None:
    """As where a framework has rolled back and makes its error page: nobody has gone on."""
    called: list[int] = []

    def do() -> None:
        called.append(1)
        recovery(fail_to_lock, session)  # A session that is opened and not used.

    ending, expected = ENDS[end]
    app = make(request_that(do, ending), transaction=ATTEMPTS)
    assert call(app) == expected
    assert len(called) == 3


def test_request_is_repeated_when_it_fails_once_more_after_it_has_recovered(make: Any) -> None:
    called: list[int] = []

    def do() -> None:
        called.append(1)
        caught_in_a_savepoint(fail_to_lock, work)
        with suppress(DBAPIError):
            fail_to_lock()

    assert call(make(request_that(do, answers_502), transaction=ATTEMPTS)) == "502 Bad Gateway"
    assert len(called) == 3


def lose_a_bind() -> None:
    """Nobody listens on the port of this bind."""
    session.execute(text("SELECT 1"), bind_arguments={"bind_key": "away"})


def lose_a_bind_in_a_session_of_its_own() -> None:
    with Session(application.engines["away"]) as other:
        other.execute(text("SELECT 1"))


def exhaust_the_pool() -> None:
    with ExitStack() as stack, suppress(PoolTimeoutError):
        for _ in range(3):
            stack.enter_context(application.engine.connect())


@pytest.mark.parametrize("fail", [lose_a_bind, lose_a_bind_in_a_session_of_its_own, exhaust_the_pool])
@pytest.mark.parametrize("recovery", [*RECOVERIES, "goes on"])
@pytest.mark.parametrize("end", ["mistake", "mistake in a stream", "Flask"])
@pytest.mark.parametrize("transaction", [False, True], ids=["", "transaction"])
def test_mistake_is_no_503_when_the_application_has_dealt_with_an_outage(
    make_sqlite: Any, fail: Any, recovery: Any, end: str, transaction: bool
) -> None:
    def do() -> None:
        if recovery == "goes on":  # With the default engine, whose transaction is not concerned.
            with suppress(OperationalError):
                fail()
            work()
        else:
            recovery(fail, work)

    ending, expected = ENDS[end]
    away = f"postgresql+psycopg://shop@127.0.0.1:{free_port()}/shop"
    options = {"pool_size": 2, "max_overflow": 0, "pool_timeout": 0.01}
    app = make_sqlite(
        request_that(do, ending),
        binds={"away": away},
        engine_options=options,
        unavailable=True,
        transaction=transaction,
    )
    assert call(app) == expected


@pytest.mark.parametrize("recovery", [rolled_back, in_another_session])
def test_answer_is_503_when_nothing_was_done_since_the_outage(make_sqlite: Any, recovery: Any) -> None:
    app = request_that(lambda: recovery(lose_a_bind, lambda: None), in_flask)
    app = make_sqlite(app, binds={"away": NOWHERE.format(free_port())}, unavailable=True)
    assert call(app) == "503 Service Unavailable"


# -- pages that a framework makes of a failure, by code that queries


def query() -> None:
    session.rollback()
    session.scalar(select(ITEMS.c.name))


def query_in_a_new_session() -> None:
    session.rollback()
    session.remove()
    session.scalar(select(ITEMS.c.name))


def violate_a_constraint() -> None:
    session.rollback()
    with suppress(IntegrityError):
        session.execute(insert(ITEMS).values(id=TAKEN))
    session.rollback()


#: What a view does: it answers with the status that it returns.
View = Callable[[], int]


def flask_with(view: View) -> Flask:
    flask = Flask("recovery")
    flask.add_url_rule("/", view_func=lambda: ("the application's own", view()))
    return flask


def flask_errorhandler(error: Any) -> Callable[[View, Callable[[], None]], Any]:
    def make(view: View, handle: Callable[[], None]) -> Any:
        flask = flask_with(view)

        @flask.errorhandler(error)
        def handler(error: Exception) -> tuple[str, int]:
            handle()
            return "sorry", 500

        return flask

    return make


def flask_after_request(view: View, handle: Callable[[], None]) -> Any:
    flask = flask_with(view)

    @flask.after_request
    def after(response: Any) -> Any:
        handle()
        return response

    return flask


def flask_teardown_request(view: View, handle: Callable[[], None]) -> Any:
    flask = flask_with(view)
    flask.teardown_request(lambda error: handle())
    return flask


def flask_teardown_after_errorhandler(view: View, handle: Callable[[], None]) -> Any:
    """Flask has caught and handled the error before."""
    flask = flask_errorhandler(DBAPIError)(view, lambda: None)
    flask.teardown_request(lambda error: handle())
    return flask


def flask_in_a_middleware(view: View, handle: Callable[[], None]) -> Any:
    """The application's own middleware is around the framework."""
    flask = flask_errorhandler(500)(view, handle)
    return lambda environ, start: flask(environ, start)


def flask_with_an_error_of_its_own(view: View, handle: Callable[[], None]) -> Any:
    def raising() -> int:
        try:
            return view()
        except DBAPIError as error:
            raise ShopError from error

    return flask_errorhandler(ShopError)(raising, handle)


def flask_abort(view: View, handle: Callable[[], None]) -> Any:
    def aborting() -> int:
        try:
            return view()
        except DBAPIError:
            abort(500)

    return flask_errorhandler(500)(aborting, handle)


def flask_with_replaced_errors(view: View, handle: Callable[[], None]) -> Any:
    """A listener puts an error of its own in the place of SQLAlchemy's."""

    def replace(context: Any) -> None:
        if context.connection is None or "SELECT" in (context.statement or "") or "UPDATE" in context.statement:
            raise ShopError from context.original_exception

    def replacing() -> int:
        for engine in application.engines.values():
            event.listen(engine, "handle_error", replace)
        try:
            return view()
        finally:
            for engine in application.engines.values():
                event.remove(engine, "handle_error", replace)

    return flask_errorhandler(ShopError)(replacing, handle)


def pyramid_exception_view(view: View, handle: Callable[[], None]) -> Any:
    def respond(status: int) -> Response:
        return Response("the application's own", status=status)

    def handler(error: Exception, request: Any) -> Response:
        handle()
        return respond(500)

    with Configurator() as config:
        config.add_route("view", "/")
        config.add_view(lambda request: respond(view()), route_name="view")
        config.add_exception_view(handler, context=Exception)
        return config.make_wsgi_app()


def falcon_app(view: View, middleware: Any = None) -> falcon.App:
    class Resource:
        def on_get(self, request: Any, response: falcon.Response) -> None:
            response.status = view()

    app = falcon.App(middleware=middleware)
    app.add_route("/", Resource())
    return app


def falcon_error_handler(view: View, handle: Callable[[], None]) -> Any:
    def handler(request: Any, response: falcon.Response, error: Exception, parameters: Any) -> None:
        handle()
        response.status = 500

    app = falcon_app(view)
    app.add_error_handler(Exception, handler)
    return app


def falcon_process_response(view: View, handle: Callable[[], None]) -> Any:
    class Middleware:
        def process_response(self, request: Any, response: Any, resource: Any, succeeded: bool) -> None:
            handle()

    return falcon_app(view, Middleware())


def bottle_error_handler(view: View, handle: Callable[[], None]) -> Any:
    app = bottle.Bottle()

    @app.get("/")
    def respond() -> Any:
        return bottle.HTTPResponse("the application's own", view())

    @app.error(500)
    def handler(error: Any) -> str:
        handle()
        return "sorry"

    return app


def bottle_stream(view: View, handle: Callable[[], None]) -> Any:
    app = bottle_error_handler(view, handle)

    @app.get("/")
    def respond() -> Iterator[Any]:
        yield bottle.HTTPResponse("the application's own", view())

    return app


def django_handler500(view: View, handle: Callable[[], None]) -> Any:
    def handler(request: Any) -> HttpResponse:
        handle()
        return HttpResponse("sorry", status=500)

    app = FRAMEWORKS["django"](False)  # Configures Django.
    urls: Any = ModuleType("recovery_urls")
    urls.urlpatterns = [django.urls.path("", lambda request: HttpResponse("the application's own", status=view()))]
    urls.handler500 = handler
    settings.ROOT_URLCONF = urls
    return app


HANDLERS = {
    "Flask errorhandler(500)": flask_errorhandler(500),
    "Flask errorhandler(DBAPIError)": flask_errorhandler(DBAPIError),
    "Flask after_request": flask_after_request,
    "Flask teardown_request": flask_teardown_request,
    "Flask teardown_request after errorhandler": flask_teardown_after_errorhandler,
    "Flask in a middleware": flask_in_a_middleware,
    "Pyramid exception view": pyramid_exception_view,
    "Falcon error handler": falcon_error_handler,
    "Falcon process_response": falcon_process_response,
    "Bottle error handler": bottle_error_handler,
    "Bottle stream": bottle_stream,
    "Django handler500": django_handler500,
}
#: In these, only the error that is being handled leads to the database's. A new session is not seen while it is.
TRANSLATING = {
    "Flask error of its own": flask_with_an_error_of_its_own,
    "Flask abort(500)": flask_abort,
    "Flask replaced error": flask_with_replaced_errors,
}
QUERIES = [query, query_in_a_new_session, violate_a_constraint]
PAGES = [
    *((name, handle) for name in HANDLERS for handle in QUERIES),
    *((name, handle) for name in TRANSLATING for handle in (query, violate_a_constraint)),
]
HANDLERS |= TRANSLATING


@pytest.mark.parametrize(("handler", "handle"), PAGES)
def test_request_is_repeated_when_a_framework_queries_for_the_page_of_a_failure(
    make: Any, handler: str, handle: Callable[[], None]
) -> None:
    called: list[int] = []

    def view() -> int:
        called.append(1)
        fail_to_lock()
        return 200

    assert call(make(HANDLERS[handler](view, handle), transaction=ATTEMPTS))[:3] == "500"
    assert len(called) == 3


@pytest.mark.parametrize(("handler", "handle"), PAGES)
@pytest.mark.parametrize("transaction", [False, True], ids=["", "transaction"])
def test_answer_is_503_when_a_framework_queries_for_the_page_of_an_outage(
    make_sqlite: Any, handler: str, handle: Callable[[], None], transaction: bool
) -> None:
    def view() -> int:
        lose_a_bind()
        return 200

    app = HANDLERS[handler](view, handle)
    binds = {"away": NOWHERE.format(free_port())}
    assert call(make_sqlite(app, binds=binds, unavailable=True, transaction=transaction))[:3] == "503"


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("recovery", RECOVERIES)
@pytest.mark.parametrize("mistake", [False, True], ids=["502", "mistake"])
def test_nothing_is_repeated_when_a_view_has_dealt_with_the_failure(
    make: Any, handler: str, recovery: Any, mistake: bool
) -> None:
    charged: list[int] = []

    def view() -> int:
        charged.append(1)
        recovery(fail_to_lock, work)
        if mistake:
            raise TypeError("the application's own")
        return 502

    app = make(HANDLERS[handler](view, query), transaction=ATTEMPTS, unavailable=True)
    assert call(app)[:3] == ("500" if mistake else "502")
    assert len(charged) == 1


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("around", ["Flask errorhandler(500)", "Bottle error handler"])
@pytest.mark.parametrize("renew", [False, True], ids=["", "in a new session"])
def test_nothing_is_repeated_when_a_view_has_dealt_with_the_page_of_another_application(
    make_sqlite: Any, handler: str, around: str, renew: bool
) -> None:
    """The framework has caught the failure of the inner application, and the view of the outer one goes on."""
    charged: list[int] = []

    def inner_view() -> int:
        fail_to_lock()
        return 200

    inner = HANDLERS[handler](inner_view, query)

    def view() -> int:
        charged.append(1)
        assert status_of(inner)[:3] == "500"
        if renew:
            session.rollback()
            session.remove()
        work()
        return 502

    assert call(make_sqlite(HANDLERS[around](view, query), transaction=ATTEMPTS))[:3] == "502"
    assert len(charged) == 1


@pytest.mark.parametrize("recovery", RECOVERIES)
@pytest.mark.parametrize("caught", [False, True], ids=["", "caught"])
def test_failure_is_over_when_a_statement_has_violated_a_constraint_since(
    make: Any, recovery: Any, caught: bool
) -> None:
    charged: list[int] = []

    def violate() -> None:
        with suppress(IntegrityError) if caught else nullcontext(), session.begin_nested():
            session.execute(insert(ITEMS).values(id=TAKEN))

    def view() -> int:
        charged.append(1)
        recovery(fail_to_lock, violate)
        return 502

    assert call(make(flask_with(view), transaction=ATTEMPTS))[:3] == ("502" if caught else "500")
    assert len(charged) == 1


def test_failure_is_not_over_when_the_transaction_refuses_statements_since(make: Any, database_url: str) -> None:
    called: list[int] = []

    def view() -> int:
        called.append(1)
        for each in (fail_to_lock, work):
            with suppress(DBAPIError):
                each()
        return 502

    assert call(make(flask_with(view), transaction=ATTEMPTS))[:3] == "502"
    # Only PostgreSQL refuses: the others have undone the statement that failed, and go on.
    assert len(called) == (3 if database_url.startswith("postgresql") else 1)
