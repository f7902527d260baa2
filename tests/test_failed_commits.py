"""``commit_failed``: the application renders what the database refuses only in the commit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import bottle
import falcon
import pytest
from django.conf import settings
from flask import Flask, jsonify, request
from pyramid.config import Configurator
from pyramid.httpexceptions import HTTPConflict
from pyramid.response import Response as PyramidResponse
from sqlalchemy import ForeignKey, Integer, String, create_engine, event, func, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from werkzeug.test import create_environ
from werkzeug.wrappers import Response

from sqlasession_middleware import SQLASessionMiddleware, doom, repeat, session
from sqlasession_middleware.errors import TransactionAborted
from sqlasession_middleware.testing import isolated
from sqlasession_middleware.transaction import TransactionMiddleware
from sqlasession_middleware.unavailable import UnavailableMiddleware

from .conftest import DATABASES_SEEN
from .framework_apps import of_django
from .ports import free_port
from .test_transaction import NO_WAIT, Deadlock
from .test_unavailable import kill
from .wsgi import Environ, StartResponse, assert_given_back, consume

pytestmark = pytest.mark.usefixtures("disposes")

PLAIN = [("Content-Type", "text/plain")]
#: The environ key that hands the error to a framework's first hook.
ERROR = "shop.commit_error"


class Base(DeclarativeBase):
    pass


class Guest(Base):
    __tablename__ = "failed_commit_guest"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(40), unique=True)


class Child(Base):
    __tablename__ = "failed_commit_child"
    id: Mapped[int] = mapped_column(primary_key=True)
    parent: Mapped[int] = mapped_column(
        Integer, ForeignKey("failed_commit_guest.id", deferrable=True, initially="DEFERRED")
    )


def sign() -> str:
    """Add a guest whose name is taken: only the flush of the commit finds it."""
    session.add(Guest(name="Ada"))
    return "signed"


def taken() -> str:
    """A text for the client, with a query."""
    return f"taken, as {session.scalar(select(func.count()).select_from(Guest))} is"


@pytest.fixture
def make(database_url: str) -> Iterator[Callable[..., SQLASessionMiddleware]]:
    """Makes an application on a database where Ada has signed."""
    yield from made_on(database_url)


@pytest.fixture
def make_sqlite(sqlite_url: str) -> Iterator[Callable[..., SQLASessionMiddleware]]:
    yield from made_on(sqlite_url)


def made_on(url: str) -> Iterator[Callable[..., SQLASessionMiddleware]]:
    made: list[SQLASessionMiddleware] = []

    def make(app: Any, commit_failed: Any, transaction: Any = None, **options: Any) -> SQLASessionMiddleware:
        transaction = {"commit_failed": commit_failed, **(transaction or {})}
        engine = create_engine(url)
        if engine.dialect.name == "sqlite":
            event.listen(engine, "connect", lambda connection, record: connection.execute("PRAGMA foreign_keys = ON"))
        tables = [Guest.__table__] if engine.dialect.name == "mariadb" else [Guest.__table__, Child.__table__]
        wrapped = SQLASessionMiddleware(app, engine, transaction=transaction, **options)
        Base.metadata.drop_all(engine, tables)
        Base.metadata.create_all(engine, tables)
        with wrapped.context():
            session.add(Guest(name="Ada"))
            session.commit()
        made.append(wrapped)
        return wrapped

    yield make
    for each in made:
        Base.metadata.drop_all(each.engine)
        each.engine.dispose()


def names(app: SQLASessionMiddleware) -> list[str]:
    with app.engine.connect() as connection:
        return list(connection.scalars(select(Guest.name).order_by(Guest.id)))


def call(app: SQLASessionMiddleware, **more: Any) -> tuple[int, str]:
    """The status and the body that a server is given."""
    heads: list[str] = []
    sent = {**create_environ(), "HTTP_ACCEPT": "text/plain", **more}
    body = consume(app(sent, lambda status, headers, exc_info=None: heads.append(status) or heads.append))
    assert_given_back(app.engine)
    (head,) = heads
    return int(head[:3]), body.decode()


# -- how each framework renders it


def bare() -> tuple[Any, Any]:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        start("201 Created", PLAIN)
        return [sign().encode()]

    return app, lambda environ, error: Response(taken(), 409) if isinstance(error, IntegrityError) else None


def of_flask() -> tuple[Any, Any]:
    app = Flask("shop")

    @app.before_request
    def raise_failed_commit() -> None:
        if ERROR in request.environ:
            raise request.environ[ERROR]

    @app.teardown_appcontext
    def remove(error: BaseException | None) -> None:
        session.remove()

    app.add_url_rule("/", view_func=lambda: (sign(), 201))
    app.register_error_handler(IntegrityError, lambda error: (taken(), 409))
    return app, hand_on(app)


def of_pyramid() -> tuple[Any, Any]:
    config = Configurator()
    config.add_route("sign", "/")
    config.add_view(lambda request: PyramidResponse(sign(), status=201), route_name="sign")
    config.add_exception_view(lambda error, request: PyramidResponse(taken(), status=409), context=IntegrityError)
    app = config.make_wsgi_app()

    def render(environ: Environ, error: Exception) -> Any:
        with app.request_context(environ) as request:
            return request.invoke_exception_view(reraise=True)

    return app, render


class Sign:
    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        response.status, response.text = falcon.HTTP_201, sign()


class RaisesFailedCommit:
    def process_request(self, request: falcon.Request, response: falcon.Response) -> None:
        if ERROR in request.env:
            raise request.env[ERROR]


def of_falcon() -> tuple[Any, Any]:
    def conflict(request: Any, response: Any, error: Exception, parameters: Any) -> None:
        response.status, response.text = falcon.HTTP_409, taken()

    app = falcon.App(middleware=[RaisesFailedCommit()])
    app.add_route("/", Sign())
    app.add_error_handler(IntegrityError, conflict)
    return app, hand_on(app)


def of_bottle() -> tuple[Any, Any]:
    """Bottle's error handlers go by the status, so the hook has to choose one."""
    app = bottle.Bottle()

    @app.hook("before_request")
    def raise_failed_commit() -> None:
        error = bottle.request.environ.get(ERROR)
        if error is not None:
            raise bottle.HTTPError(409, exception=error)

    @app.error(409)
    def conflict(error: Any) -> str:
        return taken()

    @app.get("/")
    def view() -> Any:
        return bottle.HTTPResponse(sign(), 201)

    return app, hand_on(app)


def signs_in_django(request: Any) -> Any:
    from django.http import HttpResponse

    return HttpResponse(sign(), status=201)


def renders_in_django(get_response: Any) -> Any:
    """A middleware of Django: the first one of all."""
    from django.http import HttpResponse

    def middleware(request: Any) -> Any:
        error = request.META.get(ERROR)
        return get_response(request) if error is None else HttpResponse(taken(), status=409)

    return middleware


urlpatterns: list[Any] = []


def in_django() -> tuple[Any, Any]:
    from django.urls import path

    of_django(False)
    settings.ROOT_URLCONF = __name__
    urlpatterns[:] = [path("", signs_in_django)]
    settings.MIDDLEWARE = [f"{__name__}.renders_in_django"]
    try:
        app = type(of_django(False))()
        settings.ROOT_URLCONF = __name__
    finally:
        settings.MIDDLEWARE = []
    return app, hand_on(app)


def hand_on(app: Any) -> Any:
    """Call the application again, for its first hook to raise the error."""

    def render(environ: Environ, error: Exception) -> Any:
        environ[ERROR] = error
        return app

    return render


@pytest.mark.parametrize("framework", [bare, of_flask, of_pyramid, of_falcon, of_bottle, in_django])
@pytest.mark.parametrize("transaction", [{}, {"attempts": 3, **NO_WAIT}], ids=["", "attempts"])
def test_framework_renders_what_only_the_commit_finds(make: Any, framework: Any, transaction: Any) -> None:
    app, commit_failed = framework()
    wrapped = make(app, commit_failed, transaction, unavailable=True)
    for _ in range(2):  # The next request finds a clean session.
        assert call(wrapped) == (409, "taken, as 1 is")
    assert names(wrapped) == ["Ada"]


# -- which errors it is asked about


def orphan() -> None:
    session.execute(Child.__table__.insert().values(parent=99))


def caught() -> None:
    session.execute(text("SELECT 1"))
    with suppress(DBAPIError):
        session.execute(text("SELECT nothing FROM nowhere"))


def listener_raises(error: Exception) -> Callable[[], None]:
    def refuse(opened: Any) -> None:
        raise error

    def use() -> None:
        session.execute(text("SELECT 1"))
        event.listen(session(), "before_commit", refuse)

    return use


#: What the view does, the error of the commit, and the databases that have it.
ERRORS: dict[str, tuple[Callable[[], object], type[Exception], tuple[str, ...]]] = {
    "a unique constraint": (sign, IntegrityError, ("sqlite", "postgresql", "mariadb")),
    "a deferred constraint": (orphan, IntegrityError, ("sqlite", "postgresql")),
    "an aborted transaction": (caught, TransactionAborted, ("postgresql",)),
    "a listener": (listener_raises(LookupError("shop")), LookupError, ("sqlite",)),
    "a listener's transient error": (listener_raises(Deadlock("shop")), Deadlock, ("sqlite",)),
}
CASES = [(name, database) for name, (_, _, databases) in ERRORS.items() for database in databases]


def whole(start: StartResponse) -> Iterable[bytes]:
    start("200 OK", PLAIN)
    return [b"done"]


def iterated(start: StartResponse) -> Iterable[bytes]:
    start("200 OK", [("Content-Length", "4"), *PLAIN])
    yield b"done"


def written(start: StartResponse) -> Iterable[bytes]:
    start("200 OK", PLAIN)(b"done")
    return []


def empty(start: StartResponse) -> Iterable[bytes]:
    start("204 No Content", [])
    return []


def streamed(start: StartResponse) -> Iterable[bytes]:
    start("200 OK", [("Content-Type", "text/event-stream")])
    yield b"data: 1\n\n"
    yield b"data: 2\n\n"


@pytest.mark.parametrize("body", [whole, iterated, written, empty, streamed])
@pytest.mark.parametrize(("name", "database"), CASES)
def test_it_is_asked_about(name: str, database: str, body: Any, sqlite_url: str) -> None:
    work, kind, _ = ERRORS[name]
    asked: list[Exception] = []

    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        work()
        return body(start)

    def ask(environ: Environ, error: Exception) -> Any:
        asked.append(error)
        assert not session().new
        return Response(taken(), 409)

    for make in made_on(DATABASES_SEEN.url(database, sqlite_url)):
        wrapped = make(app, ask)
        assert call(wrapped) == (409, "taken, as 1 is")
        assert [type(error) for error in asked] == [kind]
        assert names(wrapped) == ["Ada"]


def fail(environ: Environ, error: Exception) -> Any:
    pytest.fail("it was asked")


def fails_by_itself(environ: Environ, start: StartResponse) -> Iterable[bytes]:
    sign()
    session.flush()
    return []


def fails_late(environ: Environ, start: StartResponse) -> Iterable[bytes]:
    start("200 OK", PLAIN)
    yield b"a"
    yield b"b"
    sign()


def fails_after_write(environ: Environ, start: StartResponse) -> Iterable[bytes]:
    write = start("200 OK", PLAIN)
    write(b"a")
    write(b"b")
    sign()
    return []


def commits_by_itself(environ: Environ, start: StartResponse) -> Iterable[bytes]:
    sign()
    session.commit()
    return []


def is_vetoed(environ: Environ, start: StartResponse) -> Iterable[bytes]:
    sign()
    start("200 OK", PLAIN)
    raise IntegrityError("INSERT", {}, Exception())


@pytest.mark.parametrize("app", [fails_by_itself, fails_late, fails_after_write, commits_by_itself, is_vetoed])
def test_it_is_not_asked_where_the_application_failed_or_something_was_released(make: Any, app: Any) -> None:
    with pytest.raises(IntegrityError):
        consume(make(app, fail)(create_environ(), lambda *head: lambda data: None))


def test_it_is_not_asked_about_a_rollback(make: Any) -> None:
    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        sign()
        doom()
        return whole(start)

    assert call(make(app, fail)) == (200, "done")


# -- what goes first


def deadlocks(environ: Environ, start: StartResponse) -> Iterable[bytes]:
    listener_raises(Deadlock())()
    return whole(start)


TRANSIENT: dict[str, tuple[dict[str, Any], Any, int, list[int]]] = {
    "once": ({}, False, 409, [1]),
    "once, unavailable": ({}, True, 409, [1]),
    "once, a 503 if transient": ({}, {"transient": True}, 503, []),
    "attempts": ({"attempts": 3, **NO_WAIT}, False, 409, [3]),
    "attempts, unavailable": ({"attempts": 3, **NO_WAIT}, True, 503, []),
    "attempts, none of it": ({"attempts": 3, **NO_WAIT}, {"transient": False}, 409, [3]),
}


@pytest.mark.parametrize("by_hand", [False, True], ids=["options", "by hand"])
@pytest.mark.parametrize("name", TRANSIENT)
def test_repetitions_and_the_503_go_first(make_sqlite: Any, name: str, by_hand: bool) -> None:
    transaction, unavailable, status, expected = TRANSIENT[name]
    asked: list[int] = []

    def ask(environ: Environ, error: Exception) -> Any:
        assert type(error) is Deadlock
        asked.append(environ["sqlasession.attempt"])
        return Response("busy", 409)

    if by_hand and unavailable:
        inner = TransactionMiddleware(deadlocks, commit_failed=ask, **transaction)
        given = unavailable if isinstance(unavailable, dict) else {"transient": "attempts" in transaction}

        def between(environ: Environ, start: StartResponse) -> Iterable[bytes]:
            return inner(environ, start)

        wrapped = SQLASessionMiddleware(UnavailableMiddleware(between, **given), "sqlite://")
    else:
        wrapped = make_sqlite(deadlocks, ask, transaction, unavailable=unavailable)
    assert call(wrapped)[0] == status
    assert asked == expected


def test_database_that_the_flush_of_the_commit_cannot_reach_is_a_503() -> None:
    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        sign()
        return whole(start)

    url = f"postgresql+psycopg://shop@127.0.0.1:{free_port()}/shop"
    wrapped = SQLASessionMiddleware(app, url, transaction={"commit_failed": fail}, unavailable=True)
    assert call(wrapped)[0] == 503
    wrapped = SQLASessionMiddleware(app, url, transaction={"commit_failed": lambda *error: Response("away", 500)})
    assert call(wrapped) == (500, "away")


def test_outcome_that_is_unknown_goes_first(server_url: str) -> None:
    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        session.connection().execute(
            text("SELECT 1")
        )  # It may have written: what is done with a connection is not seen.
        event.listen(session(), "before_commit", lambda opened: kill(server_url))
        return whole(start)

    wrapped = SQLASessionMiddleware(app, server_url, transaction={"commit_failed": fail}, lazy_begin=False)
    status, body = call(wrapped)
    assert status == 500
    assert "not known whether your change was saved" in body
    wrapped.dispose()


def test_request_that_the_database_can_never_take_is_asked_about(
    server_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is no 503: a statement in the commit loses its connection in each attempt, and the database answers others."""

    def end_itself(opened: Any) -> None:
        if opened.get_bind().dialect.name == "postgresql":
            opened.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
        else:
            opened.execute(text(f"KILL {opened.scalar(text('SELECT CONNECTION_ID()'))}"))
            opened.execute(text("SELECT 1"))

    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        session.execute(text("SELECT 1"))
        event.listen(session(), "before_commit", end_itself)
        return whole(start)

    wrapped = SQLASessionMiddleware(
        app,
        server_url,
        transaction={"commit_failed": lambda environ, error: Response("too long", 500), "attempts": 2, **NO_WAIT},
        unavailable=True,
    )
    assert call(wrapped) == (500, "too long")
    assert "has lost its connection in each attempt" in caplog.text
    wrapped.dispose()


# -- what it may do


def signs(environ: Environ, start: StartResponse) -> Iterable[bytes]:
    sign()
    return whole(start)


def test_error_goes_on_when_there_is_no_answer(make: Any) -> None:
    with pytest.raises(IntegrityError):
        call(make(signs, lambda environ, error: None))


def raises_again(environ: Environ, error: Exception) -> Any:
    raise error


def raises_its_own(environ: Environ, error: Exception) -> Any:
    raise LookupError("of the handler")


def raises_in_the_response(environ: Environ, error: Exception) -> Any:
    def respond(environ: Environ, start: StartResponse) -> Any:
        raise LookupError("of the response")

    return respond


def is_no_application(environ: Environ, error: Exception) -> Any:
    return "taken", 409


@pytest.mark.parametrize(
    ("ask", "kind"),
    [
        (raises_again, IntegrityError),
        (raises_its_own, LookupError),
        (raises_in_the_response, LookupError),
        (is_no_application, TypeError),
    ],
)
def test_what_it_raises_takes_the_place_of_the_error(make_sqlite: Any, ask: Any, kind: Any) -> None:
    wrapped = make_sqlite(signs, ask)
    with pytest.raises(kind) as caught:
        call(wrapped)
    assert isinstance(caught.value if kind is IntegrityError else caught.value.__context__, IntegrityError)
    assert_given_back(wrapped.engine)
    assert names(wrapped) == ["Ada"]


def test_what_it_writes_is_not_committed(make: Any) -> None:
    def ask(environ: Environ, error: Exception) -> Any:
        session.add(Guest(name="Bea"))
        session.flush()
        doom()
        repeat(error)
        session.remove()  # As a framework's teardown does.
        return Response(taken(), 409)

    wrapped = make(signs, ask, {"attempts": 3, **NO_WAIT})
    assert call(wrapped)[0] == 409
    assert names(wrapped) == ["Ada"]


def test_response_may_be_streamed_with_the_session(make: Any) -> None:
    def ask(environ: Environ, error: Exception) -> Any:
        return Response((taken() for _ in range(2)), 409)

    assert call(make(signs, ask)) == (409, "taken, as 1 is" * 2)


def test_body_of_the_failed_response_is_closed_before(make_sqlite: Any) -> None:
    order: list[str] = []

    class Body(list[bytes]):
        def close(self) -> None:
            order.append("closed")

    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        sign()
        start("200 OK", PLAIN)
        return Body([b"done"])

    def ask(environ: Environ, error: Exception) -> Any:
        order.append("asked")
        return Response("taken", 409)

    assert call(make_sqlite(app, ask)) == (409, "taken")
    assert order == ["closed", "asked"]


def test_database_that_goes_away_meanwhile_is_a_503(server_url: str) -> None:
    """The error's page queries, and the connection is lost."""

    def ask(environ: Environ, error: Exception) -> Any:
        kill(server_url)
        try:
            return Response(taken(), 409)
        except OperationalError:
            return Response("broken", 500)

    for make in made_on(server_url):
        wrapped = make(signs, ask, unavailable=True)
        assert call(wrapped)[0] == 503


def is_taken(environ: Environ, error: Exception) -> Any:
    """By its dotted name."""
    return Response("taken", 409)


def test_dotted_name_may_stand_in_an_ini(sqlite_url: str) -> None:
    config = {"sqlalchemy.url": sqlite_url, "transaction.commit_failed": f"{__name__}:is_taken"}
    wrapped = SQLASessionMiddleware.from_config(signs, config)
    Base.metadata.create_all(wrapped.engine)
    assert call(wrapped) == (200, "done")
    assert call(wrapped) == (409, "taken")
    wrapped.dispose()


@pytest.mark.parametrize("name", ["a unique constraint", "a deferred constraint"])
def test_tests_see_the_same_in_isolation(name: str) -> None:
    def app(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        ERRORS[name][0]()
        return whole(start)

    for make in made_on(DATABASES_SEEN.url("postgresql", "")):
        wrapped = make(app, lambda environ, error: Response(taken(), 409))
        with isolated(wrapped):
            body = wrapped(create_environ(), lambda *head: lambda data: None)
            assert consume(body) == b"taken, as 1 is"


# -- what reporters of other libraries did


def test_exception_view_is_json_as_in_pyramid_tm_62(make: Any) -> None:
    config = Configurator()
    config.add_route("sign", "/")
    config.add_view(lambda request: sign(), route_name="sign", renderer="string")
    config.add_exception_view(
        lambda error, request: request.response.__setattr__("status_int", 400) or {"message": "taken"},
        context=IntegrityError,
        renderer="json",
    )
    app = config.make_wsgi_app()

    def render(environ: Environ, error: Exception) -> Any:
        with app.request_context(environ) as request:
            return request.invoke_exception_view(reraise=True)

    assert call(make(app, render)) == (400, '{"message": "taken"}')


def test_listener_raises_a_response_as_in_pyramid_tm_63(make: Any) -> None:
    config = Configurator()
    config.add_route("sign", "/")
    config.add_view(
        lambda request: listener_raises(HTTPConflict("full"))() or PyramidResponse("done"), route_name="sign"
    )
    app = config.make_wsgi_app()

    def render(environ: Environ, error: Exception) -> Any:
        with app.request_context(environ) as request:
            return request.invoke_exception_view(reraise=True)

    status, body = call(make(app, render))
    assert status == 409
    assert "full" in body


def flask_with(view: Any) -> Flask:
    app = Flask("shop")

    @app.before_request
    def raise_failed_commit() -> None:
        if ERROR in request.environ:
            raise request.environ[ERROR]

    app.add_url_rule("/", view_func=view)
    return app


@pytest.mark.parametrize("registered", [Exception, 500, SQLAlchemyError, None])
def test_flask_handles_as_in_flask_3502(make: Any, registered: Any) -> None:
    app = flask_with(sign)
    if registered is not None:
        app.register_error_handler(registered, lambda error: (jsonify(error=True, code=500), 500))
    status, body = call(make(app, hand_on(app), unavailable=True))
    assert status == 500
    assert ('"error":true' in body.replace(" ", "")) is (registered is not None)


def test_flask_raises_when_it_propagates(make: Any) -> None:
    app = flask_with(sign)
    app.testing = True
    with pytest.raises(IntegrityError):
        call(make(app, hand_on(app)))


def test_handler_rolls_back_and_returns_nothing_as_in_flask_sqlalchemy_1271(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    app = flask_with(sign)
    app.register_error_handler(SQLAlchemyError, lambda error: session.rollback())
    wrapped = make(app, hand_on(app))
    assert call(wrapped)[0] == 500
    assert "did not return a valid response" in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert names(wrapped) == ["Ada"]


def test_blueprint_handles_its_own(make: Any) -> None:
    from flask import Blueprint

    app = flask_with(sign)
    blueprint = Blueprint("book", "book", url_prefix="/book")
    blueprint.add_url_rule("/", view_func=sign)
    blueprint.register_error_handler(IntegrityError, lambda error: ("of the book", 409))
    app.register_blueprint(blueprint)
    seen: list[int] = []
    app.after_request(lambda response: seen.append(response.status_code) or response)
    assert call(make(app, hand_on(app)), PATH_INFO="/book/") == (409, "of the book")
    assert seen == [200, 409]
