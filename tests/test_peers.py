"""What four peers promise in their tests, asked of ours (G9, G10, G11).

``CASES`` is the one table. docs/peers.rst shows the same behaviours beside the names of the peers' tests, and says
where ours differs: there the case holds what ours does.
"""

from __future__ import annotations

import io
import logging
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any, NoReturn

import pytest
from sqlalchemy import (
    Connection,
    ForeignKey,
    NullPool,
    String,
    create_engine,
    delete,
    event,
    func,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.exc import IntegrityError, OperationalError, PendingRollbackError, ProgrammingError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.orm.exc import DetachedInstanceError, StaleDataError

from sqlasession_middleware import SQLASessionMiddleware, application, session
from sqlasession_middleware.errors import ConfigurationError, ScopeError, TransactionAborted
from sqlasession_middleware.transaction import TransactionMiddleware, doom
from tests.conftest import DATABASES
from tests.rst import read_page, rows, sections
from tests.wsgi import Environ, StartResponse, environ, select_one

#: The number of the attempt, in environ.
ATTEMPT = "sqlasession.attempt"
OK, ERROR = "200 OK", "500 Internal Server Error"

App = Callable[[Environ, StartResponse], Iterable[bytes]]
Step = Callable[[Environ], object]


class Base(DeclarativeBase):
    pass


class Guest(Base):
    __tablename__ = "peers_guest"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50))
    host_id: Mapped[int | None] = mapped_column(ForeignKey("peers_guest.id"))
    guests: Mapped[list[Guest]] = relationship()


BEA_COMES = insert(Guest).values(name="Bea")


class MarkedError(Exception):
    """One that ``retry_on`` names."""


class PlainError(Exception):
    """One that it does not."""


# What an application does in a request, a step at a time.


def view(*steps: Step, status: str = OK, headers: Iterable[tuple[str, str]] = ()) -> App:
    """An application that takes the steps and then answers, all at once."""

    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        for step in steps:
            step(environ)
        start_response(status, [("Content-Type", "text/plain"), *headers])
        return [b"all of it"]

    return app


def stream(*steps: Step, last: Step = lambda environ: None) -> App:
    """An application that answers with a chunk after each step, and takes the last one in the body's close()."""

    class Body:
        def __init__(self, environ: Environ) -> None:
            self.environ = environ

        def __iter__(self) -> Iterator[bytes]:
            for step in steps:
                step(self.environ)
                yield b"chunk"

        def close(self) -> None:
            last(self.environ)

    def app(environ: Environ, start_response: StartResponse) -> Body:
        start_response(OK, [("Content-Type", "text/plain")])
        return Body(environ)

    return app


def add(name: str = "Ada") -> Step:
    return lambda environ: session.add(Guest(name=name))


def insert_guest(environ: Environ) -> None:
    session.execute(insert(Guest).values(name="Ada"))


def note(key: str) -> Step:
    return lambda environ: environ["test.seen"].append(environ.get(key))


def fail(error: BaseException, *attempts: int) -> Step:
    """Raise, in these attempts or in each."""

    def step(environ: Environ) -> None:
        if not attempts or environ[ATTEMPT] in attempts:
            raise error

    return step


def doomed(environ: Environ) -> None:
    doom()


def commit(environ: Environ) -> None:
    session.commit()


def flush(environ: Environ) -> None:
    session.flush()


def swallow(step: Step, *errors: type[Exception]) -> Step:
    def swallowing(environ: Environ) -> None:
        with pytest.raises(errors):
            step(environ)

    return swallowing


def write_bad_sql(environ: Environ) -> None:
    session.execute(text("SELECT nothing FROM nowhere"))


def make_commit_fail(environ: Environ) -> None:
    """Leave a broken foreign key that SQLite looks at in COMMIT and not before."""
    session.execute(insert(Guest).values(name="Eve"))
    session.execute(text("PRAGMA defer_foreign_keys = ON"))  # For the transaction that is open now.
    session.execute(insert(Guest).values(name="Orphan", host_id=999))


def make_commit_fail_once(environ: Environ) -> None:
    if environ["PATH_INFO"] == "/before":
        make_commit_fail(environ)


def break_connection(environ: Environ) -> None:
    session.connection().connection.dbapi_connection.close()


def hold_until(attempt: int, statement: Any = BEA_COMES) -> Step:
    """Have a rival's transaction hold its locks until this attempt: on SQLite, the one for all writing."""

    def step(environ: Environ) -> None:
        rival: Connection = environ["test.rival"]
        if environ[ATTEMPT] == 1:
            rival.execute(statement)
        elif environ[ATTEMPT] == attempt:
            rival.commit()

    return step


def in_the_first_attempt(step: Step) -> Step:
    return lambda environ: step(environ) if environ[ATTEMPT] == 1 else None


def rival_deletes(environ: Environ) -> None:
    environ["test.rival"].execute(delete(Guest))
    environ["test.rival"].commit()


def rival_gives_up(environ: Environ) -> None:
    environ["test.rival"].rollback()


def listen(name: str) -> Step:
    """Note an event of the session."""
    return lambda environ: event.listen(session(), name, lambda *_: environ["test.seen"].append(name))


def listen_no_more(environ: Environ) -> None:
    def noted(*arguments: Any) -> None:
        environ["test.seen"].append("called")

    event.listen(session(), "after_commit", noted)
    event.remove(session(), "after_commit", noted)


def note_checked_out(environ: Environ) -> None:
    environ["test.seen"].append(application.engine.pool.checkedout())


def note_count(environ: Environ) -> None:
    environ["test.seen"].append(session.scalar(select(func.count()).select_from(Guest)))


def note_count_elsewhere(environ: Environ) -> None:
    """What a connection that is not the session's sees."""
    with application.engine.connect() as connection:
        environ["test.seen"].append(connection.scalar(select(func.count()).select_from(Guest)))


def read_body(environ: Environ) -> None:
    environ["test.seen"].append(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))


def leave_something(environ: Environ) -> None:
    environ["test.left"] = True


def keep_guest(environ: Environ) -> None:
    environ["test.kept"].append(session.scalars(select(Guest)).one())


def note_kept_guest(environ: Environ) -> None:
    (guest,) = environ["test.kept"]
    environ["test.seen"].append(inspect(guest).expired)
    with pytest.raises(DetachedInstanceError):
        print(guest.name)


def rename_or_add(environ: Environ) -> None:
    """Change the guest that is there, or the one that a rival's deletion makes necessary."""
    guest = session.scalars(select(Guest)).one_or_none()
    if guest is None:
        session.add(Guest(name="Eve"))
    else:
        in_the_first_attempt(rival_deletes)(environ)
        guest.name = "Bea"


def lock_row_or_fail(environ: Environ) -> None:
    session.scalars(select(Guest).with_for_update(nowait=True)).one().name += " and Eve"


def lock_row_serializable(environ: Environ) -> None:
    """Read, let a rival change what was read, and want to lock it: SQLSTATE 40001."""
    session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
    guest = session.scalars(select(Guest)).one()
    if environ[ATTEMPT] == 1:
        environ["test.rival"].execute(update(Guest).values(name="Bea"))
        environ["test.rival"].commit()
    session.refresh(guest, with_for_update=True)
    guest.name += " and Eve"


def savepoints(environ: Environ) -> None:
    session.add(Guest(name="Ada"))
    session.flush()
    outer = session.begin_nested()
    session.add(Guest(name="Bea"))
    session.flush()
    inner = session.begin_nested()
    session.add(Guest(name="Eve"))
    session.flush()
    note_count(environ)
    inner.rollback()
    note_count(environ)
    outer.rollback()
    note_count(environ)


def savepoint_and_attribute(environ: Environ) -> None:
    guest = Guest(name="Ada")
    session.add(guest)
    session.flush()
    with session.begin_nested() as savepoint:
        guest.name = "Eve"
        session.flush()
        savepoint.rollback()
    environ["test.seen"].append(guest.name)


def savepoint_first(environ: Environ) -> None:
    """Release a savepoint that nothing was written before."""
    with session.begin_nested():
        session.add(Guest(name="Eve"))


def savepoint_committed(environ: Environ) -> None:
    session.add(Guest(name="Ada"))
    savepoint = session.begin_nested()
    session.add(Guest(name="Bea"))
    savepoint.commit()


def delete_after_savepoint(environ: Environ) -> None:
    guest = session.scalars(select(Guest).where(Guest.name == "Bea")).one()
    session.begin_nested()
    session.delete(guest)
    session.flush()


def commit_and_go_on(environ: Environ) -> None:
    guest = Guest(name="Ada")
    session.add(guest)
    session.commit()
    guest.name = "Bea"
    session.flush()
    environ["test.seen"].append(guest in session)


def relate(environ: Environ) -> None:
    session.add(Guest(name="Ada"))
    host = session.scalars(select(Guest)).one()
    host.guests.append(Guest(name="Bea"))
    session.flush()
    environ["test.seen"].append([guest.host_id == host.id for guest in host.guests])


def populate(environ: Environ) -> None:
    note_count(environ)
    session.add_all([Guest(name="Ada"), Guest(name="Bea")])
    session.flush()
    note_count(environ)
    environ["test.seen"].append(session.connection().scalars(select(Guest.name).order_by(Guest.name)).all())


def use_in_thread(environ: Environ) -> None:
    """Touch the session in a thread of its own, without a scope and then in one."""
    app = application._get_current_object()

    def run() -> None:
        with pytest.raises(ScopeError, match="No application is bound here"):
            session.add(Guest(name="Eve"))
        with app.context():
            session.add(Guest(name="Eve"))
            note_count(environ)

    thread = threading.Thread(target=Context().run, args=(run,))
    thread.start()
    thread.join()


def error_page(app: App, status: str = ERROR) -> App:
    """What frameworks have: the application's errors become pages."""

    def framework(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        try:
            return app(environ, start_response)
        except Exception:
            start_response(status, [("Content-Type", "text/plain")], sys.exc_info())
            return [b"sorry"]

    return framework


def start_again(environ: Environ, start_response: StartResponse) -> list[bytes]:
    """Begin a success and find out that it is none."""
    session.add(Guest(name="Ada"))
    start_response(OK, [("Content-Type", "text/plain")])
    try:
        raise PlainError
    except PlainError:
        start_response(ERROR, [("Content-Type", "text/plain")], sys.exc_info())
    return [b"sorry"]


def fail_after(app: App) -> App:
    """Something between the server and an application that has succeeded."""

    def failing(environ: Environ, start_response: StartResponse) -> NoReturn:
        list(app(environ, start_response))
        raise PlainError

    return failing


def before(step: Step) -> Callable[[App], App]:
    """Something outside of the middleware that does more than to call it, first."""

    def outer(app: App) -> App:
        def early(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
            step(environ)
            return app(environ, start_response)

        return early

    return outer


def after(step: Step) -> Callable[[App], App]:
    """The same, when the response is over."""

    def outer(app: App) -> App:
        def late(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
            result = app(environ, start_response)
            body = list(result)
            result.close()
            step(environ)
            return body

        return late

    return outer


# Options, some of them by their dotted names.


def veto_all(environ: Environ, status: str, headers: list[tuple[str, str]]) -> bool:
    return True


def veto_none(environ: Environ, status: str, headers: list[tuple[str, str]]) -> None:
    return None


def veto_by_types(environ: Environ, status: str, headers: list[tuple[str, str]]) -> bool:
    assert (type(environ), type(status), type(headers)) == (dict, str, list)
    return not 200 <= int(status.split()[0]) < 400


def veto_fails(environ: Environ, status: str, headers: list[tuple[str, str]]) -> bool:
    raise PlainError


def always(environ: Environ) -> bool:
    return True


def never(environ: Environ) -> bool:
    return False


def activate_fails(environ: Environ) -> bool:
    raise PlainError


def activate_is_killed(environ: Environ) -> bool:
    raise GeneratorExit


MARKED: Mapping[str, Any] = {"attempts": 3, "backoff_base": 0, "retry_on": MarkedError}
THREE: Mapping[str, Any] = {"attempts": 3, "backoff_base": 0}


@dataclass(frozen=True)
class Case:
    """A peer's behaviour, in our words, and what ours makes of the same.

    :param variant: tells cases of one behaviour apart.
    :param app: the application.
    :param options: of TransactionMiddleware.
    :param outer: what stands around SQLASessionMiddleware.
    :param request: what else is in environ; "wsgi.input" as bytes.
    :param session_options: of SQLASessionMiddleware.
    :param there: who is in the database at the beginning.
    :param precedes: whether the same request is made before, to the path "/before", whatever comes out of it.
    :param status: what the client gets. By default a success, or with an error nothing: the server makes a page then.
    :param error: what the server gets instead of a response, or instead of the rest of one.
    :param seen: what the application has noted.
    :param stored: who is in the database at the end.
    :param logged: the errors behind the log's warnings and errors, where that is what matters.
    :param databases: where it is shown.
    """

    peer: str
    behaviour: str
    app: App
    options: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""
    outer: Callable[[App], App] = lambda app: app
    request: Mapping[str, Any] = field(default_factory=dict)
    session_options: Mapping[str, Any] = field(default_factory=dict)
    there: Collection[str] = ()
    precedes: bool = False
    status: str = ""
    error: type[BaseException] | None = None
    seen: Sequence[Any] = ()
    stored: Collection[str] = ()
    logged: Sequence[type[BaseException]] | None = None
    databases: Sequence[str] = ("sqlite",)


TM2, TM, RETRY, ZOPE = "repoze.tm2", "pyramid_tm", "pyramid_retry", "zope.sqlalchemy"
ADA = ("Ada",)


def veto_cases(peer: str) -> list[Case]:
    """The default veto's rules, which two peers share."""

    def case(behaviour: str, committed: bool, status: str, *headers: tuple[str, str]) -> Case:
        variant = " ".join([status.split()[0], *(f"{name}: {value}" for name, value in headers)])
        app = view(add(), status=status, headers=headers)
        return Case(peer, behaviour, app, variant=variant, status=status, stored=ADA if committed else ())

    return [
        *(case("4xx and 5xx are vetoed", False, each) for each in ("400 Bad Request", "411 Length Required")),
        *(case("4xx and 5xx are vetoed", False, each) for each in (ERROR, "503 Service Unavailable")),
        *(case("2xx and 3xx are committed", True, each) for each in (OK, "201 Created")),
        *(case("2xx and 3xx are committed", True, each) for each in ("301 Moved Permanently", "302 Found")),
        case("X-Tm: commit is committed", True, OK, ("X-Tm", "commit")),
        case("X-Tm: commit is committed", True, ERROR, ("x-tm", "Commit")),
        case("Any other X-Tm is vetoed", False, OK, ("X-Tm", "abort")),
        case("Any other X-Tm is vetoed", False, OK, ("X-Tm", "")),
    ]


CASES = [
    # repoze.tm2
    Case(TM2, "A success is committed", view(add()), stored=ADA),
    Case(TM2, "A success is committed", stream(flush, add()), variant="stream", stored=ADA),
    Case(TM2, "environ tells whether a transaction is in charge", view(note(ATTEMPT)), seen=[1]),
    Case(
        TM2,
        "environ tells whether a transaction is in charge",
        view(note(ATTEMPT)),
        {"activate": never},
        variant="none is",
        seen=[None],
    ),
    Case(TM2, "What is doomed is rolled back, and the response goes out", view(add(), doomed)),
    Case(
        TM2,
        "An exception rolls back and goes on to the server",
        view(add(), flush, fail(PlainError())),
        error=PlainError,
    ),
    Case(
        TM2,
        "An exception in what is doomed goes on all the same",
        view(add(), doomed, fail(PlainError())),
        error=PlainError,
    ),
    Case(
        TM2,
        "A veto of one's own decides by environ, status and headers",
        view(add(), status="403 Forbidden"),
        {"commit_veto": veto_by_types},
        status="403 Forbidden",
    ),
    Case(
        TM2,
        "A veto that returns None lets an error page commit",
        view(add(), status="403 Forbidden"),
        {"commit_veto": veto_none},
        status="403 Forbidden",
        stored=ADA,
    ),
    Case(
        TM2,
        "A veto that fails rolls back, and its error goes on",
        view(add(), status="403 Forbidden"),
        {"commit_veto": veto_fails},
        error=PlainError,
    ),
    Case(
        TM2,
        "A callback is called after the commit",
        view(listen("after_commit"), add()),
        seen=["after_commit"],
        stored=ADA,
    ),
    Case(
        TM2,
        "A callback is called after the rollback",
        view(listen("after_rollback"), add(), flush, fail(PlainError())),
        error=PlainError,
        seen=["after_rollback"],
    ),
    Case(TM2, "A callback can be taken back", view(add(), listen_no_more), stored=ADA),
    Case(TM2, "The veto is given by its dotted name", view(add()), {"commit_veto": f"{__name__}:veto_all"}),
    Case(TM2, "Without a veto in the settings everything is committed", view(add(), status=ERROR), status=ERROR),
    *veto_cases(TM2),
    Case(TM2, "X-Tm-Abort is vetoed", view(add(), headers=[("X-Tm-Abort", "true")]), stored=ADA),
    Case(
        TM2,
        "X-Tm: commit counts for more than X-Tm-Abort",
        view(add(), headers=[("X-Tm-Abort", "true"), ("X-Tm", "commit")]),
        stored=ADA,
    ),
    Case(
        TM2,
        "An exception in a later step of a stream rolls back",
        stream(add(), flush, fail(PlainError())),
        status=OK,
        error=PlainError,
    ),
    Case(TM2, "The status of a second start_response() counts, with exc_info", start_again, status=ERROR),
    Case(
        TM2,
        "A kill or an exit, which is no Exception, is not noticed",
        view(add(), flush, fail(SystemExit())),
        error=SystemExit,
    ),
    # pyramid_tm
    *veto_cases(TM),
    Case(
        TM,
        "It stays out of the way where repoze.tm2 is in charge",
        view(add()),
        request={"repoze.tm.active": True},
        stored=ADA,
    ),
    Case(TM, "Met again in the same request it stays out of the way", TransactionMiddleware(view(add())), stored=ADA),
    Case(
        TM,
        "Met again in the same request it stays out of the way",
        fail_after(TransactionMiddleware(view(add()))),
        variant="and commits nothing by itself",
        error=PlainError,
    ),
    Case(
        TM, "A hook activates it, or not", view(add()), {"activate": f"{__name__}:always"}, variant="active", stored=ADA
    ),
    Case(TM, "A hook activates it, or not", view(add()), {"activate": f"{__name__}:never"}, variant="not active"),
    Case(
        TM,
        "A hook activates it, or not",
        view(add(), commit, add("Bea")),
        {"activate": never},
        variant="the application commits by itself",
        stored=ADA,
    ),
    Case(
        TM,
        "An exception rolls back and goes on",
        view(add(), flush, fail(NotImplementedError())),
        error=NotImplementedError,
    ),
    Case(
        TM,
        "There is one attempt unless more are asked for",
        view(note(ATTEMPT), fail(MarkedError())),
        {"retry_on": MarkedError},
        error=MarkedError,
        seen=[1],
    ),
    Case(TM, "What is doomed is rolled back", view(add(), doomed)),
    Case(TM, "environ tells the application whether it is active", view(note(ATTEMPT)), seen=[1]),
    Case(
        TM,
        "environ tells the application whether it is active",
        view(note(ATTEMPT)),
        {"activate": never},
        variant="not active",
        seen=[None],
    ),
    *(
        Case(
            TM,
            "The mark in environ is gone afterwards",
            view(*steps),
            outer=after(note(ATTEMPT)),
            variant=variant,
            seen=[1],
        )
        for variant, steps in {"commit": (), "rollback": (doomed,)}.items()
    ),
    Case(
        TM,
        "Without a veto a 500 is committed",
        view(add(), status=ERROR),
        {"commit_veto": None},
        status=ERROR,
        stored=ADA,
    ),
    Case(TM, "With the default veto a 500 is rolled back", view(add(), status=ERROR), status=ERROR),
    Case(TM, "A veto by its dotted name", view(add()), {"commit_veto": f"{__name__}:veto_all"}, variant="true"),
    Case(
        TM,
        "A veto by its dotted name",
        view(add()),
        {"commit_veto": f"{__name__}:veto_none"},
        variant="false",
        stored=ADA,
    ),
    Case(TM, "A success is committed", view(add()), stored=ADA),
    Case(
        TM,
        "A dotted name that leads nowhere is refused at the beginning",
        view(),
        {"commit_veto": "an.invalid:name"},
        error=ConfigurationError,
    ),
    Case(
        TM,
        "A transient error is repeated",
        view(note(ATTEMPT), hold_until(2), add(), flush),
        THREE,
        seen=[1, 2],
        stored=["Ada", "Bea"],
        logged=[OperationalError],
    ),
    Case(
        TM,
        "An error that was made a page is repeated, whatever the veto says",
        error_page(view(note(ATTEMPT), hold_until(2), add(), flush)),
        {**THREE, "commit_veto": None},
        seen=[1, 2],
        stored=["Ada", "Bea"],
        logged=[OperationalError],
    ),
    Case(
        TM,
        "An error that was made a page is repeated, whatever the veto says",
        error_page(view(note(ATTEMPT), hold_until(2), add(), flush), OK),
        THREE,
        variant="a page with status 200, of a flush",
        seen=[1, 2],
        stored=["Ada", "Bea"],
        logged=[PendingRollbackError],
    ),
    Case(
        TM,
        "An error that was made a page is repeated, whatever the veto says",
        error_page(view(note(ATTEMPT), hold_until(2), insert_guest), OK),
        THREE,
        variant="a page with status 200, of a statement",
        seen=[1],
        logged=[],
    ),
    Case(
        TM,
        "An error that was made a page is repeated, whatever the veto says",
        error_page(view(note(ATTEMPT), fail(MarkedError()))),
        MARKED,
        variant="not an error of the database",
        status=ERROR,
        seen=[1],
        logged=[],
    ),
    Case(TM, "An error that nobody handles rolls back", view(add(), flush, fail(ValueError())), error=ValueError),
    Case(
        TM, "An error that was made a page rolls back", error_page(view(add(), flush, fail(ValueError()))), status=ERROR
    ),
    Case(
        TM,
        "An error that was made a page rolls back",
        error_page(view(add(), flush, fail(ValueError())), OK),
        variant="a page with status 200",
        stored=ADA,
    ),
    Case(
        TM,
        "An error that was made a page is committed if the veto says so",
        error_page(view(add(), flush, fail(ValueError()))),
        {"commit_veto": veto_none},
        status=ERROR,
        stored=ADA,
    ),
    Case(
        TM,
        "An error that was made a page is committed if the veto says so",
        view(hold_until(2), swallow(insert_guest, OperationalError), rival_gives_up, add(), status=ERROR),
        {"commit_veto": veto_none},
        variant="after a transient failure of the database, too",
        status=ERROR,
        stored=ADA,
    ),
    Case(
        TM, "With an explicit manager work before the transaction fails", view(), outer=before(add()), error=ScopeError
    ),
    Case(TM, "With an explicit manager work after the transaction fails", view(), outer=after(add()), error=ScopeError),
    Case(TM, "With an explicit manager work in the view is committed", view(add()), stored=ADA),
    Case(TM, "An exception view renders a failed commit", error_page(view(make_commit_fail)), error=IntegrityError),
    Case(
        TM,
        "An exception view renders a failed commit",
        view(make_commit_fail),
        outer=error_page,
        variant="a page from outside",
        status=ERROR,
    ),
    Case(
        TM,
        "An exception view renders a failed rollback",
        view(add(), flush, break_connection, status="409 Conflict"),
        status="409 Conflict",
        logged=[ProgrammingError],
    ),
    Case(
        TM,
        "An exception view renders a rollback that failed after an error",
        view(add(), flush, break_connection, fail(RuntimeError())),
        error=RuntimeError,
        logged=[ProgrammingError],
    ),
    Case(TM, "A failed commit is raised", view(make_commit_fail), error=IntegrityError),
    Case(TM, "A failed commit is raised", stream(make_commit_fail), variant="stream", status=OK, error=IntegrityError),
    Case(
        TM,
        "A failed rollback is raised",
        view(add(), flush, break_connection),
        {"commit_veto": veto_all},
        logged=[ProgrammingError],
    ),
    # pyramid_retry
    Case(
        RETRY,
        "An error of the retryable kind is repeated until the last attempt",
        view(note(ATTEMPT), add(), flush, fail(MarkedError(), 1, 2)),
        MARKED,
        seen=[1, 2, 3],
        stored=ADA,
        logged=[MarkedError, MarkedError],
    ),
    Case(
        RETRY,
        "An error's type is marked as retryable",
        view(note(ATTEMPT), fail(MarkedError(), 1)),
        {**THREE, "retry_on": [f"{__name__}:MarkedError"]},
        seen=[1, 2],
    ),
    Case(
        RETRY,
        "An error that is not retryable is raised at once",
        view(note(ATTEMPT), add(), fail(PlainError())),
        MARKED,
        error=PlainError,
        seen=[1],
        logged=[],
    ),
    Case(
        RETRY,
        "A retryable error that was made a page is repeated, and the last page goes out",
        error_page(view(note(ATTEMPT), hold_until(4), add(), flush)),
        THREE,
        status=ERROR,
        seen=[1, 2, 3],
        logged=[OperationalError, OperationalError],
    ),
    Case(
        RETRY,
        "A retryable error in the last attempt is raised",
        view(note(ATTEMPT), add(), flush, fail(MarkedError())),
        MARKED,
        error=MarkedError,
        seen=[1, 2, 3],
    ),
    Case(
        RETRY,
        "An event tells of the error before each repetition",
        view(fail(MarkedError(), 1, 2)),
        MARKED,
        logged=[MarkedError, MarkedError],
    ),
    Case(
        RETRY,
        "An event tells of an error that was made a page",
        error_page(view(hold_until(2), add(), flush)),
        THREE,
        stored=["Ada", "Bea"],
        logged=[OperationalError],
    ),
    Case(
        RETRY,
        "A hook sets the number of attempts",
        view(note(ATTEMPT), fail(MarkedError(), 1, 2)),
        {**MARKED, "activate": lambda environ: 1},
        seen=[1, 2, 3],
    ),
    Case(
        RETRY,
        "A hook that returns None leaves the number of attempts",
        view(note(ATTEMPT), fail(MarkedError())),
        {**MARKED, "activate": lambda environ: None},
        error=MarkedError,
        seen=[None],
    ),
    Case(
        RETRY,
        "A client that leaves while the body is read leaves nothing behind",
        view(note(ATTEMPT)),
        THREE,
        request={"CONTENT_LENGTH": "1", "wsgi.input": b""},
        seen=[1],
    ),
    Case(
        RETRY,
        "A hook that fails leaves nothing behind",
        view(note(ATTEMPT)),
        {**THREE, "activate": activate_fails},
        error=PlainError,
    ),
    Case(
        RETRY,
        "A hook that is killed leaves nothing behind",
        view(note(ATTEMPT)),
        {**THREE, "activate": activate_is_killed},
        error=GeneratorExit,
    ),
    Case(
        RETRY,
        "Where it is not active the only attempt is the last",
        view(note(ATTEMPT), add()),
        {**THREE, "activate": never},
        seen=[None],
    ),
    *(
        Case(
            RETRY,
            "Only errors can be marked as retryable",
            view(),
            {"retry_on": what},
            variant=repr(what),
            error=ConfigurationError,
        )
        for what in ("some string", 7, [int])
    ),
    Case(
        RETRY,
        "Each attempt reads the body from its beginning",
        view(read_body, fail(MarkedError(), 1)),
        MARKED,
        request={"REQUEST_METHOD": "POST", "CONTENT_LENGTH": "8", "wsgi.input": b"name=Ada"},
        seen=[b"name=Ada", b"name=Ada"],
    ),
    Case(
        RETRY,
        "What an attempt leaves in environ is there in the next",
        view(note("test.left"), leave_something, fail(MarkedError(), 1)),
        MARKED,
        seen=[None, None],
    ),
    # zope.sqlalchemy
    Case(
        ZOPE,
        "Other than ORM writes are committed only if the session is marked as changed",
        view(lambda environ: session.execute(text("INSERT INTO peers_guest (name) VALUES ('Ada')"))),
        stored=ADA,
        databases=DATABASES,
    ),
    Case(
        ZOPE,
        "After a commit that failed the next transaction works",
        view(make_commit_fail_once, add()),
        precedes=True,
        stored=ADA,
    ),
    Case(
        ZOPE,
        "After SQL that failed the next transaction works",
        view(add(), flush, swallow(write_bad_sql, ProgrammingError)),
        error=TransactionAborted,
        databases=["postgresql"],
    ),
    Case(
        ZOPE,
        "After SQL that failed the next transaction works",
        view(add(), flush, swallow(write_bad_sql, OperationalError, ProgrammingError)),
        stored=ADA,
        databases=["sqlite", "mariadb"],
    ),
    Case(
        ZOPE,
        "What is flushed is seen by the session and by its connection",
        view(populate),
        seen=[0, 2, ["Ada", "Bea"]],
        stored=["Ada", "Bea"],
        databases=DATABASES,
    ),
    Case(ZOPE, "Related objects are flushed", view(relate), seen=[[True]], stored=["Ada", "Bea"], databases=DATABASES),
    Case(
        ZOPE,
        "A session joins the transaction when it is used, and not before",
        view(note_checked_out, add(), note_checked_out, flush, note_checked_out),
        seen=[0, 0, 1],
        stored=ADA,
    ),
    Case(
        ZOPE,
        "What a savepoint is rolled back to is as it was",
        view(savepoints),
        seen=[3, 2, 1],
        stored=ADA,
        databases=DATABASES,
    ),
    Case(
        ZOPE,
        "An attribute is as it was when its savepoint is rolled back",
        view(savepoint_and_attribute),
        seen=["Ada"],
        stored=ADA,
        databases=DATABASES,
    ),
    Case(ZOPE, "A transaction that only reads can be committed", view(note_count), seen=[0], databases=DATABASES),
    Case(
        ZOPE,
        "What is rolled back is not there, and what is committed is seen by others",
        view(add(), flush, fail(PlainError())),
        variant="rolled back",
        error=PlainError,
        databases=DATABASES,
    ),
    Case(
        ZOPE,
        "What is rolled back is not there, and what is committed is seen by others",
        view(add(), flush, note_count_elsewhere),
        variant="committed",
        seen=[0],
        stored=ADA,
        databases=DATABASES,
    ),
    Case(
        ZOPE,
        "A savepoint that is open does not keep its work from the commit",
        view(delete_after_savepoint),
        there=["Ada", "Bea"],
        stored=ADA,
        databases=DATABASES,
    ),
    Case(
        ZOPE,
        "The application may commit a savepoint",
        view(savepoint_committed),
        stored=["Ada", "Bea"],
        databases=DATABASES,
    ),
    Case(
        ZOPE,
        "The application may commit a savepoint",
        view(savepoint_first, fail(PlainError())),
        variant="and it is rolled back with its transaction",
        error=PlainError,
        databases=DATABASES,
    ),
    Case(
        ZOPE,
        "The application may not commit by itself",
        view(add(), commit, add("Bea"), status=ERROR),
        status=ERROR,
        stored=ADA,
        databases=DATABASES,
    ),
    Case(
        ZOPE,
        "The application may not commit by itself",
        view(note(ATTEMPT), add(), commit, fail(MarkedError())),
        MARKED,
        variant="and then nothing is repeated",
        error=MarkedError,
        seen=[1],
        stored=ADA,
        databases=DATABASES,
    ),
    Case(
        ZOPE,
        "Two-phase transactions are committed and leave nothing prepared",
        view(add(), flush),
        session_options={"twophase": True},
        stored=ADA,
        databases=["mariadb"],
    ),
    Case(
        ZOPE,
        "Two-phase transactions are committed and leave nothing prepared",
        view(add(), flush, status=ERROR),
        variant="rolled back",
        session_options={"twophase": True},
        status=ERROR,
        databases=["mariadb"],
    ),
    Case(
        ZOPE, "A thread has a session of its own", view(use_in_thread, add()), seen=[1], stored=ADA, databases=DATABASES
    ),
    Case(
        ZOPE,
        "Bulk deletes and updates are committed",
        view(lambda environ: session.execute(delete(Guest).where(Guest.name == "Bea"))),
        variant="delete()",
        there=["Ada", "Bea"],
        stored=ADA,
        databases=DATABASES,
    ),
    Case(
        ZOPE,
        "Bulk deletes and updates are committed",
        view(lambda environ: session.query(Guest).update({"name": "Ada"})),
        variant="Query.update()",
        there=["Bea", "Eve"],
        stored=["Ada", "Ada"],
        databases=DATABASES,
    ),
    Case(
        ZOPE,
        "A session that is used after a failed commit raises until the transaction is aborted",
        stream(make_commit_fail, last=lambda environ: [note_count(environ), add("too late")(environ), flush(environ)]),
        status=OK,
        error=IntegrityError,
        seen=[0],
    ),
    Case(
        ZOPE,
        "A session can be kept beyond its transaction",
        view(commit_and_go_on),
        seen=[True],
        stored=["Bea"],
        databases=DATABASES,
    ),
    Case(
        ZOPE,
        "Objects are expired and detached after the commit",
        view(keep_guest),
        outer=after(note_kept_guest),
        there=ADA,
        seen=[True],
        stored=ADA,
    ),
    Case(
        ZOPE,
        "A row that others changed or deleted meanwhile is retryable",
        view(note(ATTEMPT), rename_or_add),
        THREE,
        there=ADA,
        seen=[1, 2],
        stored=["Eve"],
        logged=[StaleDataError],
        databases=DATABASES,
    ),
    Case(
        ZOPE,
        "An error of the driver behind SQLAlchemy's is retryable",
        view(note(ATTEMPT), hold_until(2, update(Guest).values(name="Bea")), lock_row_or_fail),
        THREE,
        variant="a lock",
        there=ADA,
        seen=[1, 2],
        stored=["Bea and Eve"],
        logged=[OperationalError],
        databases=["postgresql", "mariadb"],
    ),
    Case(
        ZOPE,
        "An error of the driver behind SQLAlchemy's is retryable",
        view(note(ATTEMPT), lock_row_serializable),
        THREE,
        variant="a serialization failure",
        there=ADA,
        seen=[1, 2],
        stored=["Bea and Eve"],
        logged=[OperationalError],
        databases=["postgresql"],
    ),
    Case(
        ZOPE,
        "Connections of the engine's own are outside of the transaction",
        view(add(), flush, lambda environ: note_count_elsewhere(environ), doomed),
        seen=[0],
        databases=DATABASES,
    ),
]


def by_id(case: Case, database: str) -> str:
    parts = [f"{case.peer}: {case.behaviour}", case.variant, "" if database == "sqlite" else database]
    return ", ".join(part for part in parts if part)


@dataclass
class Exchange:
    """What a client gets of a server made of function calls, and what the server gets."""

    status: str | None = None
    body: bytes = b""
    error: BaseException | None = None

    def run(self, make_app: Callable[[], App], environ: Environ) -> Exchange:
        try:
            app = make_app()
            result = app(environ, self.start_response)
            try:
                for chunk in result:
                    self.body += chunk
            finally:
                if hasattr(result, "close"):
                    result.close()
        except BaseException as error:
            self.error = error
            if not self.body:
                self.status = None  # A head is sent with the first chunk: there is still time for the server's page.
        return self

    def start_response(self, status: str, headers: Any, exc_info: Any = None) -> Callable[[bytes], None]:
        assert self.status is None or exc_info is not None
        if self.body and exc_info is not None:
            raise exc_info[1]
        self.status = status
        return self.write

    def write(self, data: bytes) -> None:
        self.body += data


@pytest.fixture
def rival(database_url: str) -> Iterator[Connection]:
    """A connection that is nobody's, on empty tables."""
    engine = create_engine(database_url, poolclass=NullPool)
    Base.metadata.create_all(engine)
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        Base.metadata.drop_all(engine)


@pytest.mark.parametrize(
    ("case", "database_url"),
    [pytest.param(case, database, id=by_id(case, database)) for case in CASES for database in case.databases],
    indirect=["database_url"],
)
def test_ours_does_what_the_table_says(
    case: Case, database_url: str, rival: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    sqlite = database_url.startswith("sqlite")
    engine_options = {"connect_args": {"timeout": 0.05}} if sqlite else {}
    engine = create_engine(database_url, **engine_options)
    if sqlite:
        event.listen(engine, "connect", lambda connection, record: connection.execute("PRAGMA foreign_keys = ON"))
    if case.there:
        rival.execute(insert(Guest), [{"name": name} for name in case.there])
        rival.commit()
    seen: list[Any] = []
    begun: set[str] = set()
    event.listen(engine, "begin_twophase", lambda connection, xid: begun.add(xid))

    def wrap() -> App:
        return case.outer(
            SQLASessionMiddleware(
                case.app, engine, session_options=case.session_options, transaction=dict(case.options) or True
            )
        )

    shared = {"test.seen": seen, "test.kept": [], "test.rival": rival}
    request = {**shared, **case.request, "wsgi.input": io.BytesIO(case.request.get("wsgi.input", b""))}
    try:
        if case.precedes:
            Exchange().run(wrap, environ(**{**request, "PATH_INFO": "/before"}))
        with caplog.at_level(logging.WARNING, "sqlasession_middleware"):
            got = Exchange().run(wrap, environ(**request))
        rival.rollback()
        assert type(got.error) is (case.error or type(None)), got.error
        assert got.status == (case.status or (None if case.error else OK))
        assert seen == list(case.seen)
        assert sorted(rival.scalars(select(Guest.name))) == sorted(case.stored)
        rival.rollback()
        if case.logged is not None:
            assert [record.exc_info and record.exc_info[0] for record in caplog.records] == list(case.logged)
        assert not session.registry.has()
        assert engine.pool.checkedout() == 0
        with SQLASessionMiddleware(view(), engine).context():
            assert select_one() == 1
            if engine.name in ("mysql", "mariadb"):
                # It shows those of the whole server.
                left = {row.data.decode() for row in session.execute(text("XA RECOVER"))}
                assert not left & begun
                assert bool(begun) == bool(case.session_options.get("twophase"))
    finally:
        engine.dispose()


def rows_of_the_page() -> dict[tuple[str, str], str]:
    """Peer and behaviour -> what docs/peers.rst says of ours."""
    found: dict[tuple[str, str], str] = {}
    for title, section in sections(read_page("peers")).items():
        for behaviour, _, ours in rows(section):
            found[title.split()[0], " ".join(behaviour.astext().split())] = ours.astext()
    return found


def test_page_has_a_row_for_each_case_and_no_other() -> None:
    """Of what does not apply to ours, and says so, there are no cases."""
    shown = {key for key, ours in rows_of_the_page().items() if not ours.startswith("Not applicable")}
    assert shown == {(case.peer, case.behaviour) for case in CASES}
