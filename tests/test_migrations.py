"""What the guides for those who come from elsewhere say is different, asked of both.

Each case is one application, built once on the peer and once on ours. docs/from_*.rst name the cases; what is the same
on both sides is asserted in the pages themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flask
import flask_sqlalchemy
import pytest
import transaction
import zope.sqlalchemy
from docutils import nodes
from pyramid.config import Configurator
from pyramid.httpexceptions import HTTPBadRequest, HTTPFound
from pyramid.request import Request
from pyramid.response import Response
from pyramid_retry import mark_error_retryable
from repoze.tm import TM
from sqlalchemy import Engine, ForeignKey, create_engine, event, insert, select, text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, scoped_session, sessionmaker
from transaction.interfaces import TransientError
from webtest import TestApp as Browser  # Pytest would take it for a class of tests.

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware.flask_sqlalchemy import SQLAlchemy
from tests.wsgi import Environ, StartResponse, consume, environ, start_response

from .rst import read_page, sections

FLASK, PYRAMID, REPOZE = "from_flask_sqlalchemy", "from_pyramid_tm", "from_repoze_tm2"

App = Callable[[Environ, StartResponse], Iterable[bytes]]


class Base(DeclarativeBase):
    pass


class Guest(Base):
    __tablename__ = "guest"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    host_id: Mapped[int | None] = mapped_column(ForeignKey("guest.id"))


BEA_COMES = insert(Guest.__table__).values(name="Bea")


class MarkedError(Exception):
    """One that both are told to repeat."""


mark_error_retryable(MarkedError)


def make_commit_fail(current: Any) -> None:
    """Leave a broken foreign key that SQLite looks at in COMMIT and not before."""
    current.add(Guest(name="Eve"))
    current.flush()
    current.execute(text("PRAGMA defer_foreign_keys = ON"))  # For the transaction that is open now.
    current.add(Guest(name="Orphan", host_id=999))


def add_taken(current: Any, *, flush: bool) -> None:
    """Add a row with a key that is taken. The database refuses it in the flush, which is in the commit otherwise."""
    current.add(Guest(id=1, name="Second"))
    if flush:
        current.flush()


class Side:
    """One of the two, on an SQLite file."""

    def __init__(self, who: str, folder: Path) -> None:
        self.is_ours = who == "ours"
        self.folder = folder
        self.engine = self.make_engine()
        Base.metadata.create_all(self.engine)
        self.scoped = scoped_session(sessionmaker(self.engine))
        if not self.is_ours:
            zope.sqlalchemy.register(self.scoped)
        self.flasks: list[flask.Flask] = []
        #: what the application of repoze.tm2 uses
        self.session = session if self.is_ours else self.scoped

    def make_engine(self) -> Engine:
        engine = create_engine(f"sqlite:///{self.folder}/guests.db", connect_args={"timeout": 0})

        @event.listens_for(engine, "connect")
        def check_foreign_keys(connection: Any, record: object) -> None:
            connection.execute("PRAGMA foreign_keys = ON")

        return engine

    def take_a_key(self) -> None:
        with self.engine.begin() as connection:
            connection.execute(insert(Guest.__table__).values(id=1, name="First"))

    def names(self) -> list[str]:
        with self.engine.connect() as connection:
            return list(connection.scalars(select(Guest.name).order_by(Guest.id)))

    @contextmanager
    def rival(self) -> Iterator[Any]:
        """A connection of somebody else's."""
        engine = self.make_engine()
        try:
            with engine.connect() as connection:
                yield connection
        finally:
            engine.dispose()

    def is_locked(self) -> bool:
        with self.rival() as connection:
            try:
                connection.execute(BEA_COMES)
            except OperationalError:
                return True
            return False

    def close(self) -> None:
        transaction.abort()
        self.scoped.remove()
        self.engine.dispose()
        for app in self.flasks:
            with app.app_context():
                for engine in self.db.engines.values():
                    engine.dispose()

    # The application, in each of the peers and in ours.

    def repoze(self, app: App, **ours: Any) -> App:
        if self.is_ours:
            return SQLASessionMiddleware(app, self.engine, transaction=ours or True)
        return TM(app)

    def pyramid(
        self,
        view: Callable[[Any], Any],
        configure: Callable[[Any], None] = lambda config: None,
        *,
        veto: str | None = None,
        attempts: int = 1,
    ) -> Browser:
        factory = sessionmaker(self.engine)

        def open_session(request: Any) -> Any:
            opened = factory()
            zope.sqlalchemy.register(opened, transaction_manager=request.tm)
            return opened

        with Configurator() as config:
            config.add_settings({"tm.manager_hook": "pyramid_tm.explicit_manager", "retry.attempts": attempts})
            config.add_settings({"tm.commit_veto": veto} if veto else {})
            if self.is_ours:
                config.add_settings({"dbengine": self.engine, "transaction.backoff_base": 0})
                config.include("sqlasession_middleware.pyramid")
            else:
                config.include("pyramid_tm")
                config.include("pyramid_retry")
                config.add_request_method(open_session, "dbsession", reify=True)
            config.add_route("any", "/*path")
            config.add_view(view, route_name="any")
            configure(config)
        return Browser(config.make_wsgi_app())

    def flask(self, view: Callable[[], Any], url: str = "", **ours: Any) -> flask.Flask:
        app = flask.Flask("guests")
        app.testing = True  # What a view raises goes on.
        self.flasks.append(app)
        app.get("/")(view)
        app.config["SQLALCHEMY_DATABASE_URI"] = url or self.engine.url
        app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"connect_args": {"timeout": 0}}
        app.config.update({f"SQLASESSION_{name.upper()}": value for name, value in ours.items()})
        self.db.init_app(app)
        return app

    @property
    def db(self) -> Any:
        return DB_BY_SIDE[self.is_ours]

    @property
    def of_flask(self) -> Any:
        return self.db.session


DB_BY_SIDE: dict[bool, Any] = {
    False: flask_sqlalchemy.SQLAlchemy(metadata=Base.metadata),
    True: SQLAlchemy(metadata=Base.metadata),
}


@dataclass(frozen=True)
class Case:
    """:param term: of the page's list."""

    page: str
    term: str
    run: Callable[[Side], Any]
    theirs: Any
    ours: Any


CASES: list[Case] = []


def case(page: str, term: str, *, theirs: Any, ours: Any) -> Callable[[Callable[[Side], Any]], Callable[[Side], Any]]:
    def add(run: Callable[[Side], Any]) -> Callable[[Side], Any]:
        CASES.append(Case(page, term, run, theirs, ours))
        return run

    return add


def outcome(call: Callable[[], Any]) -> Any:
    """What it returns, or the name of what it raises."""
    try:
        return call()
    except Exception as error:
        return type(error).__name__


# -- Flask-SQLAlchemy


def ask(app: flask.Flask) -> Any:
    return outcome(lambda: app.test_client().get("/", buffered=True).text)


@case(FLASK, "A streamed body has its session", theirs="RuntimeError", ours="no guests")
def reads_in_a_stream(side: Side) -> Any:
    def stream() -> Iterator[str]:
        yield "no "
        yield "guests" if side.of_flask.scalars(select(Guest.name)).all() == [] else "?"

    return ask(side.flask(stream))


@case(FLASK, "A streamed body has its session", theirs="RuntimeError", ours=[])
def reads_when_the_response_is_closed(side: Side) -> Any:
    seen: list[Any] = []

    def read() -> Any:
        return side.of_flask.scalars(select(Guest.name)).all()

    def view() -> flask.Response:
        response = flask.Response(iter(["done"]))
        response.call_on_close(lambda: seen.append(outcome(read)))
        return response

    assert ask(side.flask(view)) == "done"
    return seen[0]


@case(FLASK, "One session per request, not per application context", theirs="False", ours="True")
def enters_another_application_context(side: Side) -> Any:
    def view() -> str:
        outer = side.of_flask()
        with flask.current_app.app_context():
            return str(side.of_flask() is outer)

    return ask(side.flask(view))


@case(FLASK, "An application that calls itself", theirs="True", ours="False")
def asks_itself(side: Side) -> Any:
    def inner() -> str:
        return str(id(side.of_flask()))

    def view() -> str:
        return str(str(id(side.of_flask())) == app.test_client().get("/inner", buffered=True).text)

    app = side.flask(view)
    app.get("/inner")(inner)
    return ask(app)


@case(
    FLASK,
    "db.session.remove() is no rollback where a transaction is in charge",
    theirs=["commit"],
    ours=["Ada", "commit"],
)
def removes_the_session_in_a_view(side: Side) -> list[str]:
    def view() -> str:
        side.of_flask.add(Guest(name="Ada"))
        side.of_flask.flush()
        side.of_flask.remove()
        side.of_flask.add(Guest(name="commit"))
        side.of_flask.commit()
        return "done"

    assert ask(side.flask(view, transaction=True)) == "done"
    return side.names()


def handled(side: Side, view: Callable[[], Any]) -> flask.Flask:
    side.take_a_key()
    app = side.flask(view, transaction=True)
    app.register_error_handler(IntegrityError, lambda error: ("handled", 409))
    return app


@case(FLASK, "No try in a view sees the commit fail", theirs=["caught"] * 2, ours=["handled", "caught"])
def catches_what_the_database_refuses(side: Side) -> list[Any]:
    """Without a flush, and with one. Only the peer's view has to commit."""
    flushes = iter([False, True])

    def view() -> str:
        try:
            add_taken(side.of_flask, flush=next(flushes))
            if not side.is_ours:
                side.of_flask.commit()
        except IntegrityError:
            side.of_flask.rollback()
            return "caught"
        return "done"

    app = handled(side, view)
    return [ask(app), ask(app)]


@case(FLASK, "after_request is called twice where the commit fails", theirs=[409], ours=[200, 409])
def looks_at_responses(side: Side) -> list[int]:
    def view() -> str:
        add_taken(side.of_flask, flush=False)
        if not side.is_ours:
            side.of_flask.commit()
        return "done"

    def look(response: flask.Response) -> flask.Response:
        seen.append(response.status_code)
        return response

    seen: list[int] = []
    app = handled(side, view)
    app.after_request(look)
    assert ask(app) == "handled"
    return seen


@case(FLASK, "Engines are engines", theirs="registered", ours="ConfigurationError")
def makes_its_engine_of_something_else(side: Side) -> Any:
    class Own(type(side.db)):  # type: ignore[misc]  # of each side in turn
        def _make_engine(self, *arguments: Any) -> Any:
            return object()

    app = flask.Flask("own")
    app.config["SQLALCHEMY_DATABASE_URI"] = side.engine.url
    return outcome(lambda: Own(app) and "registered")


@case(
    FLASK,
    "default is no bind key beside SQLALCHEMY_DATABASE_URI",
    theirs="registered",
    ours="ConfigurationError",
)
def has_a_bind_key_default(side: Side) -> Any:
    app = flask.Flask("own")
    app.config.update({"SQLALCHEMY_DATABASE_URI": side.engine.url, "SQLALCHEMY_BINDS": {"default": "sqlite://"}})
    return outcome(lambda: type(side.db)(app) and "registered")


@case(FLASK, "An SQLite file in a folder that does not exist", theirs="OperationalError", ours="ConfigurationError")
def has_no_folder(side: Side) -> Any:
    def view() -> str:
        return str(side.of_flask.scalars(select(Guest.name)).all())

    app = outcome(lambda: side.flask(view, f"sqlite:///{side.folder}/nowhere/guests.db"))
    return app if isinstance(app, str) else ask(app)


# -- pyramid_tm


def status(app: Browser) -> Any:
    return outcome(lambda: app.get("/", expect_errors=True).status_int)


@case(
    PYRAMID,
    "The session goes on after the commit",
    theirs=[["Ada"], ["Ada"], "DetachedInstanceError", "NoTransaction"],
    ours=[["Ada"], ["Ada"], "Ada", ["Ada"]],
)
def calls_back(side: Side) -> list[Any]:
    seen: list[Any] = []

    def view(request: Any) -> Response:
        guest = Guest(name="Ada")

        def finish(request: Any) -> None:
            seen.append(side.names())
            seen.append(outcome(lambda: guest.name))
            seen.append(outcome(lambda: request.dbsession.scalars(select(Guest.name)).all()))

        request.add_response_callback(lambda request, response: seen.append(side.names()))
        request.add_finished_callback(finish)
        request.dbsession.add(guest)
        return Response("done")

    assert status(side.pyramid(view)) == 200
    return seen


@case(PYRAMID, "The session goes on after the commit", theirs=("NoTransaction", ["Ada"]), ours=(200, ["Ada", "Bea"]))
def stores_in_a_callback(side: Side) -> Any:
    def view(request: Any) -> Response:
        request.add_finished_callback(lambda request: request.dbsession.add(Guest(name="Bea")))
        request.dbsession.add(Guest(name="Ada"))
        return Response("done")

    return status(side.pyramid(view)), side.names()


@case(PYRAMID, "A streamed body has its session", theirs="NoTransaction", ours=["Ada", "Bea"])
def goes_on_in_a_stream(side: Side) -> Any:
    def view(request: Any) -> Response:
        def stream() -> Iterator[bytes]:
            yield b"one, "
            request.dbsession.add(Guest(name="Bea"))
            request.dbsession.flush()
            yield b"two"

        request.dbsession.add(Guest(name="Ada"))
        return Response(app_iter=stream())

    found = status(side.pyramid(view))
    return side.names() if found == 200 else found


WAYS = {
    "a redirect that is returned": lambda: HTTPFound("/"),
    "a redirect that is raised": lambda: raise_(HTTPFound("/")),
    "a 400 that is returned": HTTPBadRequest,
    "a 400 that is raised": lambda: raise_(HTTPBadRequest()),
    "an exception view's 200": lambda: raise_(ValueError()),
    "an exception that nobody handles": lambda: raise_(KeyError()),
}
REDIRECTS = {"a redirect that is returned", "a redirect that is raised"}


def raise_(error: Exception) -> Any:
    raise error


def stored_by(side: Side, veto: str | None) -> set[str]:
    """Which of the ways leaves a row."""

    def view(request: Any) -> Any:
        way = request.path_info.strip("/")
        request.dbsession.add(Guest(name=way))
        request.dbsession.flush()
        return WAYS[way]()

    def page(error: Exception, request: Any) -> Response:
        return Response("done")

    app = side.pyramid(view, lambda config: config.add_exception_view(page, context=ValueError), veto=veto)
    for way in WAYS:
        outcome(lambda way=way: app.get(f"/{way}", expect_errors=True))
    return set(side.names())


@pytest.mark.parametrize(
    ("veto", "stored"),
    [
        (None, {"a redirect that is returned", "a 400 that is returned"}),
        ("pyramid_tm.default_commit_veto", {*REDIRECTS, "an exception view's 200"}),
    ],
)
@pytest.mark.parametrize("who", ["theirs", "ours"])
def test_the_same_is_committed_as_with_pyramid_tm(who: str, veto: str | None, stored: set[str], tmp_path: Path) -> None:
    side = Side(who, tmp_path)
    try:
        assert stored_by(side, veto) == stored
    finally:
        side.close()


@case(PYRAMID, "SQL is committed", theirs=[], ours=["Bea"])
def sends_sql(side: Side) -> list[str]:
    def view(request: Any) -> Response:
        request.dbsession.execute(BEA_COMES)
        return Response("done")

    assert status(side.pyramid(view)) == 200
    return side.names()


@case(PYRAMID, "The application may commit", theirs=("AssertionError", []), ours=(200, ["Bea"]))
def commits_by_itself(side: Side) -> tuple[Any, list[str]]:
    def view(request: Any) -> Response:
        request.dbsession.execute(BEA_COMES)
        request.dbsession.commit()
        return Response("done")

    return status(side.pyramid(view)), side.names()


@case(PYRAMID, "More is repeated", theirs=("OperationalError", 1), ours=(200, 2))
def meets_a_busy_database(side: Side) -> tuple[Any, int]:
    attempts = []
    with side.rival() as rival:

        def view(request: Any) -> Response:
            attempts.append(request)
            if len(attempts) == 1:
                rival.execute(BEA_COMES)
            else:
                rival.rollback()
            request.dbsession.add(Guest(name="Ada"))
            request.dbsession.flush()
            return Response("done")

        return status(side.pyramid(view, attempts=3)), len(attempts)


@case(PYRAMID, "No page is made of what is repeated", theirs=["409", "409"], ours=["409"])
def fails_in_each_commit(side: Side) -> list[str]:
    """A data manager that asks for repetition in its vote, as ZODB does of a conflict."""
    pages: list[str] = []

    class ConflictManager:
        transaction_manager = None
        abort = tpc_begin = commit = tpc_finish = tpc_abort = lambda self, transaction: None

        def sortKey(self) -> str:  # noqa: N802  # the interface's name
            return "conflict"

        def tpc_vote(self, current: Any) -> None:
            raise TransientError

    def view(request: Any) -> Response:
        request.tm.get().join(ConflictManager())
        return Response("done")

    def page(error: Exception, request: Any) -> Response:
        pages.append("409")
        return Response(status=409)

    app = side.pyramid(view, lambda config: config.add_exception_view(page, context=TransientError), attempts=2)
    assert status(app) == 409
    return pages


@case(PYRAMID, "A subrequest is part of its request", theirs=["inner"], ours=[])
def invokes_a_subrequest(side: Side) -> list[str]:
    def view(request: Any) -> Response:
        if request.path_info == "/":
            request.invoke_subrequest(Request.blank("/inner"), use_tweens=True)
            request.tm.doom()
        else:
            request.dbsession.add(Guest(name="inner"))
        return Response("done")

    assert status(side.pyramid(view)) == 200
    return side.names()


@case(PYRAMID, "A view may end the transaction", theirs=("NoTransaction", ["Ada"]), ours=(200, ["Ada"]))
def commits_by_the_manager(side: Side) -> Any:
    def view(request: Any) -> Response:
        request.dbsession.add(Guest(name="Ada"))
        request.tm.commit()
        return Response("done")

    return status(side.pyramid(view)), side.names()


@case(PYRAMID, "The user is not asked for", theirs=["Ada"], ours=[""])
def is_told_the_user(side: Side) -> list[Any]:
    seen: list[Any] = []

    def view(request: Any) -> Response:
        seen.append(request.tm.get().user)
        return Response("done")

    assert status(side.pyramid(view, lambda config: config.testing_securitypolicy(userid="Ada"))) == 200
    return seen


@case(
    PYRAMID,
    "Each attempt finds the environ that the first one found",
    theirs=[None, "left there"],
    ours=[None, None],
)
def leaves_something_in_environ(side: Side) -> list[Any]:
    seen: list[Any] = []

    def view(request: Any) -> Response:
        seen.append(request.environ.get("test.left"))
        request.environ["test.left"] = "left there"
        if len(seen) == 1:
            raise MarkedError
        return Response("done")

    assert status(side.pyramid(view, attempts=3)) == 200
    return seen


# -- repoze.tm2


def answer(start: StartResponse, status: str = "200 OK") -> list[bytes]:
    start(status, [("Content-Type", "text/plain")])
    return [b"done"]


def call(app: App) -> bytes:
    return consume(app(environ(), start_response))


@case(
    REPOZE,
    "The commit comes before the end of the response, not after it",
    theirs=([b"done"], "IntegrityError"),
    ours=([], "IntegrityError"),
)
def sends_before_it_commits(side: Side) -> tuple[list[bytes], str]:
    sent: list[bytes] = []

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        make_commit_fail(side.session)
        return answer(start)

    def serve() -> None:
        for chunk in side.repoze(app)(environ(), start_response):
            sent.append(chunk)

    return sent, outcome(serve)


def statuses(app: App) -> list[str]:
    found: list[str] = []
    consume(app(environ(), lambda status, headers, exc_info=None: found.append(status)))
    return found


def handling(app: App) -> App:
    """Makes a page of what the database refuses."""

    def handler(environ: Environ, start: StartResponse) -> Iterable[bytes]:
        try:
            return [consume(app(environ, start))]
        except IntegrityError:
            return answer(start, "409 Conflict")

    return handler


@case(
    REPOZE,
    "The commit comes before the end of the response, not after it",
    theirs=["200 OK", "409 Conflict"],
    ours=["409 Conflict"],
)
def is_handled_outside(side: Side) -> list[str]:
    """With repoze.tm2 the success was sent by then: a server refuses the second status."""
    side.take_a_key()

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        add_taken(side.session, flush=False)
        return answer(start)

    return statuses(handling(side.repoze(app)))


@case(
    REPOZE,
    "The commit comes before the end of the response, not after it",
    theirs=["409 Conflict"],
    ours=["409 Conflict"],
)
def is_handled_inside_after_a_flush(side: Side) -> list[str]:
    side.take_a_key()

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        add_taken(side.session, flush=True)
        return answer(start)

    return statuses(side.repoze(handling(app)))


@case(REPOZE, "The application is called at once", theirs=[], ours=["called"])
def has_been_called(side: Side) -> list[str]:
    seen: list[str] = []

    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        seen.append("called")
        return answer(start)

    body = side.repoze(app)(environ(), start_response)
    found = list(seen)
    consume(body)
    return found


@case(REPOZE, "The body is closed", theirs=[], ours=["closed"])
def closes_the_body(side: Side) -> list[str]:
    seen: list[str] = []

    class Body(list[bytes]):
        def close(self) -> None:
            seen.append("closed")

    def app(environ: Environ, start: StartResponse) -> Body:
        return Body(answer(start))

    assert call(side.repoze(app)) == b"done"
    return seen


@case(REPOZE, "Whatever ends a request rolls it back", theirs=True, ours=False)
def is_left_in_a_stream(side: Side) -> bool:
    def app(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        answer(start)
        side.session.add(Guest(name="Ada"))
        side.session.flush()
        yield b"one"
        yield b"two"

    body: Any = side.repoze(app)(environ(), start_response)
    assert next(iter(body)) == b"one"
    body.close()
    return side.is_locked()


@case(REPOZE, "Whatever ends a request rolls it back", theirs=True, ours=False)
def exits(side: Side) -> bool:
    def app(environ: Environ, start: StartResponse) -> Any:
        side.session.add(Guest(name="Ada"))
        side.session.flush()
        raise SystemExit

    with pytest.raises(SystemExit):
        call(side.repoze(app))
    return side.is_locked()


@case(REPOZE, "A session belongs to the request, not to the thread", theirs=["Bea"], ours=["Bea", "Ada"])
def calls_another_one(side: Side) -> list[str]:
    def inner(environ: Environ, start: StartResponse) -> list[bytes]:
        side.session.add(Guest(name="Bea"))
        return answer(start)

    def outer(environ: Environ, start: StartResponse) -> list[bytes]:
        side.session.add(Guest(name="Ada"))
        call(side.repoze(inner))
        return answer(start)

    call(side.repoze(outer))
    return side.names()


@case(REPOZE, "A session belongs to the request, not to the thread", theirs=["Bea"], ours=["Bea", "Ada"])
def streams_take_turns(side: Side) -> list[str]:
    def app(environ: Environ, start: StartResponse) -> Iterator[bytes]:
        answer(start)
        side.session.add(Guest(name=environ["test.name"]))
        yield b"one"
        yield b"two"

    repoze = side.repoze(app)
    first: Any = repoze(environ(**{"test.name": "Ada"}), start_response)
    steps = iter(first)
    assert next(steps) == b"one"
    assert consume(repoze(environ(**{"test.name": "Bea"}), start_response)) == b"onetwo"
    assert list(steps) == [b"two"]
    first.close()
    return side.names()


@case(REPOZE, "SQL is committed, and the application may commit", theirs=[], ours=["Bea"])
def sends_sql_too(side: Side) -> list[str]:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        side.session.execute(BEA_COMES)
        return answer(start)

    assert call(side.repoze(app)) == b"done"
    return side.names()


@case(REPOZE, "SQL is committed, and the application may commit", theirs="AssertionError", ours=b"done")
def commits_too(side: Side) -> Any:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        side.session.add(Guest(name="Ada"))
        side.session.commit()
        return answer(start)

    return outcome(lambda: call(side.repoze(app)))


def fails(side: Side, **ours: Any) -> list[str]:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        side.session.add(Guest(name="Ada"))
        return answer(start, "500 Internal Server Error")

    call(side.repoze(app, **ours))
    return side.names()


@case(REPOZE, "There is a default veto", theirs=["Ada"], ours=[])
def fails_by_default(side: Side) -> list[str]:
    return fails(side)


@case(REPOZE, "There is a default veto", theirs=["Ada"], ours=["Ada"])
def fails_without_a_veto(side: Side) -> list[str]:
    return fails(side, commit_veto=None)


# -- all of them


@pytest.mark.parametrize("who", ["theirs", "ours"])
@pytest.mark.parametrize("each", CASES, ids=lambda each: each.run.__name__)
def test_does_what_the_guide_says_of_it(each: Case, who: str, tmp_path: Path) -> None:
    side = Side(who, tmp_path)
    try:
        assert each.run(side) == getattr(each, who)
    finally:
        side.close()


@pytest.mark.parametrize("page", [FLASK, PYRAMID, REPOZE])
def test_every_difference_of_a_guide_is_a_case(page: str) -> None:
    terms = [term.astext() for term in sections(read_page(page))["What behaves differently"].findall(nodes.term)]
    assert sorted(terms) == sorted({each.term for each in CASES if each.page == page})
