"""Sessions in an ``isolated()`` block are kept apart, as they are by connections of their own."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import combinations, combinations_with_replacement
from typing import Any

import pytest
from flask import Flask, Response
from sqlalchemy import (
    Column,
    Integer,
    MetaData,
    String,
    Table,
    insert,
    select,
    text,
)
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError
from sqlalchemy.orm import Session
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware.errors import IsolationError, TransactionAborted
from sqlasession_middleware.testing import isolated

from .conftest import DATABASES, DATABASES_SEEN

metadata = MetaData()
NOTES = Table(
    "isolated_note", metadata, Column("id", Integer, primary_key=True), Column("name", String(20), unique=True)
)


def add(name: str) -> None:
    session.execute(insert(NOTES).values(name=name))


def names() -> list[str]:
    return list(session.scalars(select(NOTES.c.name).order_by(NOTES.c.name)))


def notes(environ: Any, start_response: Any) -> Any:
    """Reads, and adds what the query names; /commit commits."""
    if environ["QUERY_STRING"]:
        add(environ["QUERY_STRING"])
    body = " ".join(names()).encode()
    if environ["PATH_INFO"] == "/commit":
        session.commit()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return (chunk for chunk in [body])


@pytest.fixture(scope="module", params=DATABASES)
def with_table(request, tmp_path_factory) -> Iterator[SQLASessionMiddleware]:
    url = DATABASES_SEEN.url(request.param, f"sqlite:///{tmp_path_factory.mktemp('isolated')}/test.db")
    app = SQLASessionMiddleware(notes, url, metadata=metadata)
    app.drop_database()
    app.init_database()
    yield app
    app.drop_database()
    app.dispose()


@pytest.fixture
def app(with_table) -> Iterator[SQLASessionMiddleware]:
    yield with_table
    assert with_table.engine.pool.checkedout() == 0
    with with_table.context():
        assert names() == []


def stored(app: SQLASessionMiddleware) -> list[str]:
    with app.context():
        return names()


# -- what stays open around a request


@contextmanager
def unclosed_response(app: SQLASessionMiddleware) -> Iterator[None]:
    response = Client(app).get("/")
    yield
    response.close()


@contextmanager
def half_read_response(app: SQLASessionMiddleware) -> Iterator[None]:
    response = Client(app).get("/")
    next(iter(response.response))
    yield
    response.close()


@contextmanager
def context(app: SQLASessionMiddleware) -> Iterator[None]:
    with app.context():
        names()
        yield


@contextmanager
def begun_context(app: SQLASessionMiddleware) -> Iterator[None]:
    with app.context(), session.begin():
        names()
        yield


@contextmanager
def own_session(app: SQLASessionMiddleware) -> Iterator[None]:
    with app.new_session() as own:
        own.execute(select(NOTES.c.id))
        yield


@contextmanager
def dropped_response(app: SQLASessionMiddleware) -> Iterator[None]:
    kept = [Client(app).get("/")]
    yield
    with pytest.warns(ResourceWarning):
        kept.clear()


AROUND = {each.__name__: each for each in (
    unclosed_response, half_read_response, context, begun_context, own_session, dropped_response,
)}  # fmt: skip


@pytest.mark.parametrize("around", AROUND)
def test_commit_stays_when_what_was_open_around_it_ends(app, around):
    with isolated(app):
        with AROUND[around](app):
            assert Client(app).get("/commit?Ada", buffered=True).text == "Ada"
        assert stored(app) == ["Ada"]
    assert stored(app) == []


@pytest.mark.parametrize("around", AROUND)
def test_commit_stays_when_what_was_open_ends_before_it(app, around):
    with isolated(app), app.new_session() as own:
        with AROUND[around](app):
            own.execute(insert(NOTES).values(name="Ada"))
        own.commit()
        assert stored(app) == ["Ada"]
    assert stored(app) == []


@pytest.mark.filterwarnings("ignore:A response or context:ResourceWarning")
def test_commit_stays_when_flasks_client_closes_the_response_before_it_later(app):
    """The name is bound to the next response, once that has committed."""
    flask = Flask(__name__)

    @flask.route("/<name>", methods=["GET", "POST"])
    def note(name: str) -> Any:
        found = names()
        if name != "-":
            add(name)
        session.commit()
        return Response((each for each in [*found, name, str(len(names()))]), mimetype="text/plain")

    flask.wsgi_app = SQLASessionMiddleware(flask.wsgi_app, app.engine)  # type: ignore[method-assign, assignment]
    with isolated(flask.wsgi_app), flask.test_client() as client:
        response = client.get("/-")
        for name in ("Ada", "Bea"):
            response = client.post(f"/{name}")
        response.close()
        assert client.get("/-", buffered=True).text == "AdaBea-2"
        del response
    gc.collect()


@pytest.mark.parametrize("transaction", [True, {"attempts": 3}])
def test_commit_of_the_middleware_stays_when_a_response_was_open(app, transaction):
    committing = SQLASessionMiddleware(notes, app.engine, transaction=transaction)
    with isolated(committing):
        open_response = Client(committing).get("/")
        assert Client(committing).get("/?Ada", buffered=True).text == "Ada"
        open_response.close()
        assert stored(committing) == ["Ada"]


def test_reader_that_goes_on_to_write_gets_a_savepoint_of_its_own(app):
    with isolated(app):
        with app.context():
            assert names() == []
            assert Client(app).get("/commit?Ada", buffered=True).text == "Ada"
            add("lost")
            assert names() == ["Ada", "lost"]
            session.rollback()
            add("Bea")
            session.commit()
            add("lost")
        assert stored(app) == ["Ada", "Bea"]


def test_failed_statement_of_a_reader_undoes_nothing(app):
    """PostgreSQL refuses everything after it, up to the savepoint."""
    with isolated(app):
        with app.context():
            assert Client(app).get("/commit?Ada", buffered=True).text == "Ada"
            for _ in range(2):
                with pytest.raises((OperationalError, ProgrammingError)):
                    session.execute(text("no SQL"))
                # The session has not rolled back, and another one begins.
                assert Client(app).get("/", buffered=True).text == "Ada"
        assert stored(app) == ["Ada"]


def test_failed_insert_does_not_count_as_a_change(app):
    with isolated(app):
        Client(app).get("/commit?Ada", buffered=True)
        with app.context():
            with pytest.raises(IntegrityError):
                add("Ada")
            assert Client(app).get("/", buffered=True).text == "Ada"
        assert stored(app) == ["Ada"]


def test_commit_of_an_aborted_transaction_is_refused_after_another_session_has_begun(app):
    gives_up = app.engine.dialect.name == "postgresql"
    with isolated(app):
        with app.context():
            names()
            with pytest.raises((OperationalError, ProgrammingError)):
                session.execute(text("no SQL"))
            Client(app).get("/", buffered=True)
            with pytest.raises(TransactionAborted) if gives_up else nullcontext():
                session.commit()
        assert stored(app) == []


def test_rows_locked_by_a_reader_are_no_change(app):
    with isolated(app):
        with app.context():
            session.execute(select(NOTES).with_for_update())
            assert Client(app).get("/commit?Ada", buffered=True).text == "Ada"
        assert stored(app) == ["Ada"]


def test_session_that_was_dropped_is_rolled_back(app):
    """As the pool does with its connection."""
    with isolated(app):
        own = app.new_session()
        own.execute(insert(NOTES).values(name="lost"))
        del own
        gc.collect()
        assert stored(app) == []


@pytest.mark.parametrize(("end", "kept"), [("commit", ["Ada", "Bea"]), ("rollback", ["Bea"])])
def test_connection_of_a_session_can_be_ended_by_hand(app, end, kept):
    with isolated(app):
        with app.context():
            connection = session.connection()
            connection.execute(insert(NOTES).values(name="Ada"))
            getattr(connection, end)()
            connection.execute(insert(NOTES).values(name="lost"))
            connection.rollback()
            connection.execute(insert(NOTES).values(name="Bea"))
            connection.commit()
            connection.execute(insert(NOTES).values(name="lost"))
        assert stored(app) == kept
        with app.context():
            connection = session.connection()
            session.rollback()
            getattr(connection, end)()  # There is nothing to end.
        assert stored(app) == kept


def test_execution_options_are_those_of_the_session_that_has_set_them(app):
    def options() -> dict[str, Any]:
        return dict(session.connection().get_execution_options())

    with isolated(app):
        with app.context():
            before = options()
        with app.context():
            session.connection(execution_options={"schema_translate_map": {None: "nowhere"}})
            with app.context():
                assert options() == before
            assert options()["schema_translate_map"][None] == "nowhere"
            with pytest.raises((OperationalError, ProgrammingError)):
                names()
            session.rollback()
            assert options() == before
            session.connection().execution_options(mine=1)
            with app.context():
                assert options() == before
            assert options() == {**before, "mine": 1}
        assert stored(app) == []


# -- changes that are not committed

#: Who has changes that are not committed, and what the error calls it.
HOLDERS: dict[str, tuple[Callable[[SQLASessionMiddleware], Any], str]] = {
    "response": (lambda app: Client(app).get("/notes?lost").close, "the request GET '/notes' of <SQLA"),
    "context": (lambda app: entered(app, ["lost"]), "a context of <SQLA"),
    "session by hand": (lambda app: entered(app, ["lost"], by_hand=True), "a session of <SQLA"),
    "savepoint": (lambda app: entered(app, [], nested=True), "a context of <SQLA"),
    "rows by executemany": (lambda app: entered(app, ["lost", "lost too"]), "a context of <SQLA"),
}


def entered(app: SQLASessionMiddleware, new: list[str], by_hand: bool = False, nested: bool = False) -> Any:
    stack = ExitStack()
    used = stack.enter_context(app.new_session() if by_hand else app.context())
    if nested:
        stack.enter_context(used.begin_nested())
        used.execute(select(NOTES))
    if new:
        used.execute(insert(NOTES), [{"name": name} for name in new])
    return stack.close


@pytest.mark.parametrize("holder", HOLDERS)
def test_error_names_who_has_uncommitted_changes_when_another_session_begins(app, holder):
    make, name = HOLDERS[holder]
    with isolated(app):
        end = make(app)
        for _ in range(2):
            with pytest.raises(IsolationError, match="because ") as caught:
                Client(app).get("/other")
            assert f"because {name}" in str(caught.value)
            assert str(caught.value).startswith("the request GET '/other' of <SQLA")
        end()
        assert stored(app) == []


def test_what_was_refused_begins_when_the_changes_are_committed(app):
    with isolated(app):
        with app.context():
            add("Ada")
            with app.new_session() as other:
                with pytest.raises(IsolationError):
                    other.scalars(select(NOTES.c.name))
                session.commit()
                assert other.scalars(select(NOTES.c.name)).all() == ["Ada"]
        assert stored(app) == ["Ada"]


def test_inner_block_is_refused_when_the_outer_one_has_uncommitted_changes(app):
    with isolated(app):
        with app.context(), isolated(app):
            add("lost")
        with app.context():
            add("lost")
            with isolated(app), pytest.raises(IsolationError, match=r"an isolated\(\) block cannot .* a context of"):
                stored(app)
            assert names() == ["lost"]
        assert stored(app) == []


@pytest.mark.parametrize("end", ["commit", "close"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_session_that_outlives_its_block_has_no_changes_any_more(app, blocks, end):
    with ExitStack() as stack:
        for _ in range(blocks - 1):
            stack.enter_context(isolated(app))
        with isolated(app):
            own = app.new_session()
            own.execute(insert(NOTES).values(name="lost"))
            nested = own.begin_nested()
            own.execute(insert(NOTES).values(name="lost too"))
        assert stored(app) == []
        if end == "commit":
            nested.close()
            with pytest.raises(IsolationError, match=r"a session of .* cannot commit: its changes were rolled back"):
                own.commit()
        own.close()
        assert stored(app) == []


# -- in whatever order


class Oracle:
    """What sessions with a connection each would see and store, with READ COMMITTED."""

    def __init__(self) -> None:
        self.committed: set[str] = set()
        self.pending: dict[str, set[str]] = {"a": set(), "b": set()}

    def may_begin(self, name: str) -> bool:
        return not self.pending["b" if name == "a" else "a"]


STEPS = {
    "commits": ("read", "write", "commit", "close"),
    "rolls back": ("write", "rollback", "read", "close"),
    "is closed": ("read", "write", "close"),
    "reads": ("read", "read", "close"),
    "writes twice": ("write", "commit", "write", "commit"),
}


def orders(first: int, second: int) -> Iterator[list[str]]:
    for places in combinations(range(first + second), first):
        yield ["a" if place in places else "b" for place in range(first + second)]


@pytest.mark.parametrize(("steps_of_a", "steps_of_b"), [*combinations_with_replacement(STEPS, 2)])
def test_two_sessions_are_kept_apart_in_whatever_order_they_end(app, steps_of_a, steps_of_b):
    plans = {"a": STEPS[steps_of_a], "b": STEPS[steps_of_b]}
    with isolated(app):
        for order in orders(len(plans["a"]), len(plans["b"])):
            with isolated(app):
                run(app, order, {name: iter(plan) for name, plan in plans.items()})


def run(app: SQLASessionMiddleware, order: list[str], plans: dict[str, Iterator[str]]) -> None:
    oracle = Oracle()
    sessions = {name: app.new_session() for name in plans}
    done: list[str] = []
    for name in order:
        step = next(plans[name])
        done.append(f"{name} {step}")
        own = sessions[name]
        expected = nullcontext() if step in ("commit", "rollback", "close") or oracle.may_begin(name) else None
        with expected or pytest.raises(IsolationError):
            take(own, step, name, oracle, done)
    for own in sessions.values():
        own.close()
    assert set(stored(app)) == oracle.committed, done


def take(own: Session, step: str, name: str, oracle: Oracle, done: list[str]) -> None:
    pending = oracle.pending[name]
    if step == "read":
        assert set(own.scalars(select(NOTES.c.name))) == oracle.committed | pending, done
    elif step == "write":
        row = f"{name}{len(oracle.committed)}"
        own.execute(insert(NOTES).values(name=row))
        pending.add(row)
    else:
        getattr(own, step)()
        if step == "commit":
            oracle.committed |= pending
        pending.clear()
