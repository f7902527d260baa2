"""Replicas (G15): which engine each statement of a request goes to, and what a client that wrote is told.

The replicas are files of their own here, with one row each that says which they are. tests/integration/test_replicas.py
has real ones.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import NullPool, String, create_engine, event, insert, select, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from werkzeug.test import Client, EnvironBuilder

from sqlasession_middleware import SQLASessionMiddleware, application, on_primary, release, session
from sqlasession_middleware._database.cookie import LastWrite
from sqlasession_middleware.errors import ConfigurationError, ScopeError

from .drivers import rows_on
from .wsgi import Environ, StartResponse, assert_given_back, consume, environ, start_response


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "row"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(20))


def read() -> str:
    """Where a plain SELECT is answered."""
    return session.scalars(select(Row.name).order_by(Row.id)).first()


def write() -> None:
    session.execute(insert(Row).values(name="new"))


STEPS = {
    "read": read,
    "write": write,
    "commit": lambda: session.commit(),
    "rollback": lambda: session.rollback(),
    "remove": lambda: session.remove(),
    "release": lambda: release(),
    "on_primary": on_primary,
}


class App:
    """Does what it is told, step by step, and answers with what each read has found.

    A step called "head" is where the response begins.
    """

    def __init__(self, steps: str) -> None:
        self.steps = steps.split()

    def __call__(self, environ, start_response):
        found = []
        before, _, after = " ".join(self.steps).partition("head")
        for step in before.split():
            found.append(STEPS[step]())
        start_response("200 OK", [("Content-Type", "text/plain")])
        for step in after.split():
            found.append(STEPS[step]())
        return [" ".join(each for each in found if isinstance(each, str)).encode()]


@pytest.fixture
def make(tmp_path) -> Iterator[object]:
    """Makes an application with a primary and two replicas."""
    made = []

    def make(steps="read", names=("one", "two"), **options) -> SQLASessionMiddleware:
        for name in ("primary", *names):
            if not os.path.exists(f"{tmp_path}/{name}.db"):
                engine = create_engine(f"sqlite:///{tmp_path}/{name}.db")
                Base.metadata.create_all(engine)
                with engine.begin() as connection:
                    connection.execute(insert(Row).values(name=name))
                engine.dispose()
        app = steps if callable(steps) else App(steps)
        urls = [f"sqlite:///{tmp_path}/{name}.db" for name in names]
        made.append(
            SQLASessionMiddleware(
                app, f"sqlite:///{tmp_path}/primary.db", replicas=urls, metadata=Base.metadata, **options
            )
        )
        return made[-1]

    yield make
    for app in made:
        for engine in app.engines.values():
            assert_given_back(engine)
        app.dispose()


def ask(app, method="GET", cookie=None, **more) -> tuple[str, str | None]:
    """What a request is answered, and the cookie that it gives."""
    headers = {} if cookie is None else {"Cookie": cookie}
    response = Client(app, use_cookies=False).open(method=method, headers=headers, buffered=True, **more)
    given = response.headers.get("Set-Cookie")
    return response.text, given


@pytest.mark.parametrize("method", ["GET", "OPTIONS", "TRACE"])
def test_safe_methods_read_from_a_replica(make, method):
    assert ask(make("read read"), method)[0] in ("one one", "two two")


def test_head_reads_from_a_replica(make):
    app = make(
        lambda environ, start_response: [start_response("200 OK", [("X-Read", read())]) and b""], names=["one", "two"]
    )
    assert Client(app).head("/", buffered=True).headers["X-Read"] in ("one", "two")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "PURGE"])
def test_other_methods_start_on_the_primary(make, method):
    assert ask(make("read"), method)[0] == "primary"


def test_reads_spread_over_the_replicas(make):
    app = make()
    spread = Counter(ask(app)[0] for _ in range(200))
    assert spread.keys() == {"one", "two"}
    assert min(spread.values()) > 50


#: The steps of one GET, and where its reads are answered: "r" on one replica throughout, "p" on the primary.
MOVES = {
    "read read": "rr",
    "read commit read": "rr",
    "read rollback read": "rr",
    "read remove read": "rr",
    "read release read": "rr",
    "read write read": "rp",
    "write read": "p",
    "write rollback read": "p",
    "write commit read": "p",
    "write commit remove read": "p",
    "read write rollback remove read": "rp",
    "on_primary read": "p",
    "read on_primary read": "rp",
    "read on_primary remove read": "rp",
}


@pytest.mark.parametrize("steps", MOVES)
def test_moves(make, steps):
    found = ask(make(steps))[0].split()
    expected = MOVES[steps]
    assert ["p" if each == "primary" else "r" for each in found] == list(expected)
    assert len(set(found) - {"primary"}) <= 1


def after(action) -> object:
    """An application that reads, does something and reads again."""

    def app(environ, start_response):
        before = read()
        action()
        start_response("200 OK", [])
        return [f"{before} {read()}".encode()]

    return app


def flush():
    session.add(Row(name="x"))
    session.flush()


MOVING = {
    "flush": flush,
    "autoflush": lambda: (session.add(Row(name="x")), session.scalars(select(Row)).all()),
    "DML by text": lambda: session.execute(text("DELETE FROM row WHERE id > 100")),
    "DDL": lambda: session.execute(text("CREATE TABLE more (id int)")),
    "FOR UPDATE": lambda: session.execute(select(Row).with_for_update()),
    "explicit bind": lambda: session.execute(text("SELECT 1"), bind_arguments={"bind": session().bind}),
    "explicit bind key": lambda: session.execute(text("SELECT 1"), bind_arguments={"bind_key": "default"}),
    "connection": lambda: session.connection(),
    "savepoint": lambda: session.begin_nested(),
    "merge of what changed": lambda: (session.merge(Row(id=1, name="changed")), session.flush()),
}

STAYING = {
    "text": lambda: session.execute(text("SELECT * FROM row")),
    "get": lambda: session.get(Row, 1),
    "refresh": lambda: session.refresh(session.get(Row, 1)),
    "expired attribute": lambda: (row := session.get(Row, 1), session.expire(row), row.name),
    "empty flush": lambda: session.flush(),
    "explicit replica": lambda: session.execute(
        text("SELECT 1"), bind_arguments={"bind": application.engines["replicas[0]"]}
    ),
    "explicit replica with options": lambda: session.execute(
        text("SELECT 1"), bind_arguments={"bind": application.engines["replicas[0]"].execution_options(foo=1)}
    ),
    "connection of a replica with options": lambda: session.connection(
        {"bind": application.engines["replicas[0]"].execution_options(foo=1)}
    ),
}


@pytest.mark.parametrize("name", MOVING)
def test_what_moves_to_the_primary(make, name):
    before, behind = ask(make(after(MOVING[name])))[0].split()
    assert before in ("one", "two")
    assert behind in ("primary", "changed")


@pytest.mark.parametrize("name", STAYING)
def test_what_stays_on_the_replica(make, name):
    before, behind = ask(make(after(STAYING[name]), names=["one"]))[0].split()
    assert before == behind == "one"


#: The steps of one request, and whether its client is told that it has written.
TOLD = {
    ("POST", "write commit head"): True,
    ("GET", "write commit head"): True,
    ("GET", "write commit read commit head"): True,
    ("POST", "write head commit"): True,
    ("GET", "read commit head"): False,
    # Who was asked to change something is taken at his word, where a transaction was open.
    ("POST", "read commit head"): True,
    ("POST", "read head"): True,
    ("POST", "read rollback head"): False,
    ("GET", "read head"): False,
    ("GET", "on_primary read commit head"): False,
    ("POST", "head"): False,
    ("POST", "write rollback head"): False,
    ("POST", "write remove head"): False,
}


@pytest.mark.parametrize(("method", "steps"), TOLD)
def test_client_is_told_what_it_wrote(make, method, steps):
    assert bool(ask(make(steps), method)[1]) is TOLD[method, steps]


@pytest.mark.parametrize(("method", "steps"), [("POST", "write"), ("GET", "write")])
def test_client_is_told_with_the_middlewares_commit(make, method, steps):
    assert ask(make(steps, transaction=True), method)[1]


def test_client_is_not_told_of_what_was_rolled_back(make):
    def app(environ, start_response):
        write()
        start_response("400 Bad Request", [])
        return [b""]

    assert ask(make(app, transaction=True), "POST")[1] is None


def test_savepoint_is_no_commit(make):
    """The mark is of the commit itself: a replica that has only what was before it is too old."""
    told = []

    def app(environ, start_response):
        with session.begin_nested():
            write()
        told.append(session()._may_have_written)
        start_response("200 OK", [])
        return [b""]

    assert ask(make(app, transaction=True), "POST")[1]
    assert told == [True]


def test_writer_reads_its_write(make):
    app = make("read")
    writer = make("write commit")
    client = Client(app)
    assert ask(app)[0] in ("one", "two")
    _, cookie = ask(writer, "POST")
    assert "; HttpOnly; SameSite=Lax" in cookie
    assert "Secure" not in cookie
    assert ask(app, cookie=cookie.partition(";")[0])[0] == "primary"
    assert client.get("/", buffered=True).text in ("one", "two")


def test_cookie_is_secure_where_the_request_was(make):
    assert ask(make("write commit"), "POST", base_url="https://localhost/")[1].endswith("; Secure")


def test_later_it_reads_from_replicas_again(make):
    app = make("read", read_your_writes=3)
    marker = app.routing.replicas.cookie
    name, value = marker.header(LastWrite(0.0, None), {})
    assert name == "Set-Cookie"
    assert ask(app, cookie=value.partition(";")[0])[0] in ("one", "two")
    assert "Max-Age=4;" in value


COOKIES = [
    "{name}=", "{name}", "{name}=x", "{name}=1", "{name}=-1", "{name}=1.2.3", "{name}=1.", "{name}=.1", "{name}=0x10",
    "{name}=99999999999999999999999999", "{name}=1.99999999999999999999",
    "{name}=9999999999999999.18446744073709551616", '{name}="1.1"', "{name}=\xff\xfe", "{name}=\u0661", "; {name}=1; ;",
    "{name}=1; {name}=2.7; {name}=x", "a={name}; b=1", "{name}=1 ; DROP TABLE row", "x{name}=9999999999999",
    "{name}=1'--", "{name}=" + "9" * 400, "{name}=" + "9" * 5000, "{name}=1." + "9" * 5000, "{name}=nan",
    "{name}=1e400", "{name}=nan; {name}=x; {name}=1",
]  # fmt: skip


@pytest.mark.parametrize("cookie", COOKIES)
def test_cookie_that_was_forged_or_garbled(make, cookie):
    app = make("read")
    value = cookie.format(name=app.routing.replicas.cookie.name)
    made = EnvironBuilder().get_environ()
    made["HTTP_COOKIE"] = value
    heads = []
    body = consume(app(made, lambda *head: heads.append(head)))
    assert heads[0][0] == "200 OK"
    assert body in (b"one", b"two")


def test_last_of_several_cookies_counts(make):
    app = make("read")
    _, cookie = ask(make("write commit"), "POST")
    old = f"{app.routing.replicas.cookie.name}=1"
    mark = cookie.partition(";")[0]
    for cookies in (f"{old}; {mark}", f"{mark}; {old}", f"a=b;{mark};c=d"):
        assert ask(app, cookie=cookies)[0] == "primary"


def mark_of(app, cookie: str) -> LastWrite:
    """What a cookie tells the application."""
    return app.routing.replicas.cookie.read({"HTTP_COOKIE": cookie.partition(";")[0]})


def given_by(app, written: LastWrite | None, cookie: str) -> list[str]:
    """The cookies of a response."""
    marker = app.routing.replicas.cookie
    given = marker.give(written, {"HTTP_COOKIE": cookie}, [])
    return [value for name, value in given if value.startswith(marker.name)]


def cookie_of(app, mark: LastWrite) -> str:
    return app.routing.replicas.cookie.header(mark, {})[1].partition(";")[0]


NOW = 10**10
#: What the client knows before, what the request has written, and what the client knows then.
KNOWN = {
    "nothing": (None, LastWrite(NOW, 5), LastWrite(NOW, 5)),
    "an earlier position": (LastWrite(NOW - 60, 4), LastWrite(NOW, 5), LastWrite(NOW, 5)),
    "a position, now a time": (LastWrite(NOW - 60, 4), LastWrite(NOW, None), LastWrite(NOW, 4, is_exact=False)),
    "a position and a time, now a time": (
        LastWrite(NOW - 1, 4, is_exact=False), LastWrite(NOW, None), LastWrite(NOW, 4, is_exact=False),
    ),
    "a position and a time, now a position": (
        LastWrite(NOW - 1, 4, is_exact=False), LastWrite(NOW, 5), LastWrite(NOW, 5),
    ),
    "a time, now a position that is not the last": (
        LastWrite(NOW - 1, 4), LastWrite(NOW, 5, is_exact=False), LastWrite(NOW, 5, is_exact=False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_cookie_keeps_the_position_of_an_earlier_write(make, name):
    app = make()
    before, written, after = KNOWN[name]
    (cookie,) = given_by(app, written, "" if before is None else cookie_of(app, before))
    assert mark_of(app, cookie) == after


@pytest.mark.parametrize("inner", [LastWrite(NOW, 7), LastWrite(NOW - 9, 7, is_exact=False), LastWrite(NOW, 3)])
def test_response_has_one_cookie_when_an_inner_application_gave_it(make, inner):
    app = make()
    others = [("Set-Cookie", "theme=dark"), ("X-More", "1")]
    headers = [others[0], app.routing.replicas.cookie.header(inner, {}), others[1]]
    given = app.routing.replicas.cookie.give(LastWrite(NOW, 5), {}, headers)
    assert given[:2] == others
    assert len(given) == 3
    assert mark_of(app, given[2][1]) == LastWrite(
        inner.time if not inner.is_exact else NOW, max(inner.position, 5), inner.is_exact
    )


def test_nested_applications_on_one_database_give_one_cookie(make):
    inner = make("write commit")

    def app(environ, start_response):
        write()
        session.commit()
        return inner(environ, start_response)

    response = Client(make(app), use_cookies=False).post("/", buffered=True)
    assert len(response.headers.getlist("Set-Cookie")) == 1


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("options", [{}, {"foo": 1}])
@pytest.mark.parametrize("binds", [{}, {"audit": "sqlite://"}])
def test_connection_by_its_engine_is_one_that_writes(make, method, options, binds):
    def app(environ, start_response):
        read()
        engine = application.engine.execution_options(**options) if options else application.engine
        connection = session.connection(bind_arguments={"bind": engine})
        connection.execute(insert(Row).values(name="new"))
        found = read()
        session.commit()
        start_response("200 OK", [])
        return [found.encode()]

    found, cookie = ask(make(app, binds=binds), method)
    assert found == "primary"
    assert cookie is not None


def test_commit_of_unknown_outcome_is_told(make):
    """The client is asked to look whether its write took place: it has to look on the primary."""

    def app(environ, start_response):
        write()
        start_response("200 OK", [])
        return [b"stored"]

    wrapped = make(app, transaction=True)

    def lose(connection):
        do_commit(connection)
        raise type("OperationalError", (Exception,), {"__module__": "psycopg", "sqlstate": "08007"})("lost")

    do_commit = wrapped.engine.dialect.do_commit
    wrapped.engine.dialect.do_commit = lose
    response = Client(wrapped, use_cookies=False).post("/", buffered=True)
    wrapped.engine.dialect.do_commit = do_commit
    assert response.status_code == 500
    assert "Set-Cookie" in response.headers


@pytest.mark.parametrize("driver", rows_on("postgresql", "mariadb"))
def test_engine_that_is_a_replica_elsewhere_is_written_to(driver):
    engine = create_engine(driver.url())
    Base.metadata.create_all(engine)

    def write_and_flush(environ, start_response):
        session.add(Row(name="new"))
        session.flush()
        start_response("200 OK", [])
        return [b"stored"]

    reader = SQLASessionMiddleware(App("read"), engine.url, replicas=[engine])
    writer = SQLASessionMiddleware(write_and_flush, engine, replicas=[engine.url], transaction=True)
    try:
        ask(reader)
        assert ask(writer, "POST")[0] == "stored"
        with engine.connect() as connection:
            assert list(connection.scalars(select(Row.name))) == ["new"]
    finally:
        Base.metadata.drop_all(engine)
        engine.dispose()
        for app in (reader, writer):
            app.dispose()


def test_refusal_of_a_replica_is_no_outage(make):
    """Nobody has to try again later: it is the application that has to call on_primary()."""

    def app(environ, start_response):
        with application.engines["replicas[0]"].begin() as connection:
            connection.execute(insert(Row).values(name="x"))

    with pytest.raises(DBAPIError, match="readonly") as raised:
        ask(make(app, unavailable=True, transaction={"attempts": 2}))
    assert "call on_primary() before it" in raised.value.__notes__[0]


@pytest.mark.parametrize("driver", rows_on("postgresql", "mariadb"))
def test_replicas_do_not_inherit_what_they_cannot_have(driver):
    """A hot standby refuses SERIALIZABLE; a creator, or a pool, is the primary's own."""
    options = {"isolation_level": "SERIALIZABLE", "creator": lambda: 1 / 0, "max_overflow": 3}
    url = driver.url()
    own = {"url": url, "isolation_level": "SERIALIZABLE"}
    app = SQLASessionMiddleware(App("read"), url, replicas=[url, own], engine_options=options)
    levels = []
    for name in ("replicas[0]", "replicas[1]"):
        with app.engines[name].connect() as connection:
            levels.append(connection.get_isolation_level())
        assert app.engines[name].pool._max_overflow == 3
    assert levels == ["REPEATABLE READ", "SERIALIZABLE"]
    app.dispose()


def test_replicas_inherit_each_of_the_drivers_arguments(tmp_path):
    url = f"sqlite:///{tmp_path}/a.db"
    app = SQLASessionMiddleware(
        App("read"), url,
        engine_options={"pool_size": 3, "connect_args": {"timeout": 1, "cached_statements": 5}},
        replicas=[{"url": url, "connect_args": {"timeout": 2}}, {"url": url, "poolclass": NullPool}],
    )  # fmt: skip
    assert isinstance(app.engines["replicas[1]"].pool, NullPool)
    seen = []
    engine = app.engines["replicas[0]"]
    event.listen(engine, "do_connect", lambda dialect, record, arguments, options: seen.append(dict(options)))
    engine.connect().close()
    assert [(options["timeout"], options["cached_statements"]) for options in seen] == [(2, 5)]
    app.dispose()


def test_cookie_is_the_databases(make, tmp_path):
    """Applications on one database share it, and others do not overwrite it."""
    app, same = make(), make()
    other = SQLASessionMiddleware(App("read"), f"sqlite:///{tmp_path}/other.db", replicas=["sqlite://"])
    names = [each.routing.replicas.cookie.name for each in (app, same, other)]
    assert names[0] == names[1] != names[2]


def test_outside_of_requests_all_is_on_the_primary(make):
    app = make()
    with app.context():
        assert read() == "primary"
        on_primary()
    with app.context(), app.new_session() as opened:
        assert opened.scalars(select(Row.name)).first() == "primary"


def test_session_of_no_scope_is_on_the_primary(make):
    def app(environ, start_response):
        start_response("200 OK", [])
        with middleware.new_session() as opened:
            opened.execute(insert(Row).values(name="other"))
            found = opened.scalars(select(Row.name)).first()
        return [f"{found} {read()}".encode()]

    middleware = make(app, names=["one"])
    assert ask(middleware)[0] == "primary one"


def test_commit_in_a_context_of_the_request_is_the_clients(make):
    def app(environ, start_response):
        with middleware.context():
            write()
            session.commit()
        start_response("200 OK", [])
        return [b""]

    middleware = make(app)
    assert ask(middleware, "POST")[1]


def test_sessions_work_in_another_place_is_the_requests(make):
    """In the context of another scope, and in a thread that knows of none."""

    def app(environ, start_response):
        opened = session()

        def work() -> None:
            opened.execute(insert(Row).values(name="new"))
            opened.commit()

        if environ["PATH_INFO"] == "/thread":
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        else:
            with middleware.context():
                work()
        found = read()
        start_response("200 OK", [])
        return [found.encode()]

    middleware = make(app, engine_options={"connect_args": {"check_same_thread": False}})
    for path in ("/thread", "/context"):
        found, cookie = ask(middleware, path=path)
        assert found == "primary"
        assert cookie


def test_session_of_another_application_tells_in_its_own_name(make, tmp_path):
    """One that is made in this request, before and after its own: the cookie is that of the primary written to."""

    def app(environ, start_response):
        with other.new_session() as opened:
            opened.scalars(select(Row.name)).all()
            write()
            session.commit()
        start_response("200 OK", [])
        return [b""]

    middleware = make(app)
    other = SQLASessionMiddleware(App(""), f"sqlite:///{tmp_path}/one.db", replicas=[f"sqlite:///{tmp_path}/two.db"])
    names = [each.routing.replicas.cookie.name for each in (middleware, other)]
    assert names[0] != names[1]
    for method in ("GET", "POST"):
        assert ask(middleware, method)[1].startswith(f"{names[0]}=")
    other.dispose()


def test_commit_of_another_bind_alone_is_not_told(make, monkeypatch):
    """The replicas are the default engine's: none of them is too old for it."""

    def audit() -> None:
        arguments = {"bind": application.engines["audit"]}
        session.execute(text("CREATE TABLE entry (id int)"), bind_arguments=arguments)

    monkeypatch.setitem(STEPS, "audit", audit)
    assert ask(make("audit commit head", binds={"audit": "sqlite://"}), "POST")[1] is None


def test_write_after_a_move_is_told(make):
    assert ask(make("on_primary read write commit head"))[1]


def test_on_primary_outside_of_a_scope():
    with pytest.raises(ScopeError):
        on_primary()


def test_on_primary_without_replicas(sqlite_url):
    app = SQLASessionMiddleware(App("on_primary"), sqlite_url)
    assert ask(app) == ("", None)


def break_replica(app, number=0) -> list[bool]:
    """Have new connections to a replica refused, as long as the list is not empty."""
    return break_engine(app.engines[f"replicas[{number}]"])


def break_engine(engine) -> list[bool]:
    """Have new connections of an engine refused, as long as the list is not empty."""
    broken = [True]

    def refuse(dialect, record, arguments, options):
        if broken:
            raise OperationalError("connect", {}, type("OperationalError", (Exception,), {"__module__": "psycopg"})(
                "connection to server at localhost failed: Connection refused. Is the server running?"
            ))  # fmt: skip

    event.listen(engine, "do_connect", refuse)
    engine.dispose()
    return broken


def test_engine_that_the_primary_is_made_of_is_no_replica(sqlite_url):
    """Whatever is made of a replica's engine is not written to."""
    engine = create_engine(sqlite_url)
    with pytest.raises(ConfigurationError, match="is the Engine of 'bind' itself"):
        SQLASessionMiddleware(App("read"), engine.execution_options(foo=1), replicas=[engine])
    engine.dispose()


def test_replica_out_of_reach_is_passed_over_and_tried_again_later(make, caplog):
    app = make("read", replica_retry=1000, unavailable=True)
    broken = break_replica(app)
    assert {ask(app)[0] for _ in range(20)} == {"two"}
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        f"The replica {app.engines['replicas[0]'].url} is out of reach"
    ]
    broken.clear()
    assert {ask(app)[0] for _ in range(20)} == {"two"}  # It is not time yet.
    app.routing.replicas.members[0].passed_over_until = 0.001
    assert {ask(app)[0] for _ in range(40)} == {"one", "two"}
    assert "is reachable again" in caplog.text


def test_primary_serves_if_no_replica_is_left(make):
    app = make("read read", unavailable=True, transaction={"attempts": 2}, replica_retry=1000)
    break_replica(app, 0)
    break_replica(app, 1)
    assert ask(app)[0] == "primary primary"
    assert ask(app)[0] == "primary primary"


def test_thread_that_was_handed_the_session_reads_where_the_request_does(make):
    def app(environ, start_response):
        opened, found = session(), []
        thread = threading.Thread(target=lambda: found.append(opened.scalars(select(Row.name)).first()))
        thread.start()
        thread.join()
        start_response("200 OK", [])
        return [f"{found[0]} {read()}".encode()]

    options = {"replica_retry": 1000, "engine_options": {"connect_args": {"check_same_thread": False}}}
    middleware = make(app, **options)
    assert ask(middleware)[0] in ("one one", "two two")
    break_replica(middleware, 0)
    break_replica(middleware, 1)
    assert ask(middleware)[0] == "primary primary"


@pytest.mark.parametrize("driver", rows_on("postgresql"))
def test_replica_that_does_not_answer_when_it_is_asked_how_far_it_is(driver):
    """Its connection was lost in the pool, and nobody has looked: the driver itself says so."""
    url = driver.url()
    app = SQLASessionMiddleware(
        lambda environ, start: [start("200 OK", []), b"%d" % session.scalar(text("SELECT 1"))][1:], url,
        replicas=[url], engine_options={"pool_pre_ping": False},
    )  # fmt: skip
    with app.engines["replicas[0]"].connect() as connection:
        number = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
    with app.engine.connect() as connection:
        connection.execute(text("SELECT pg_terminate_backend(:number, 5000)"), {"number": number})
    assert ask(app, cookie=f"{app.routing.replicas.cookie.name}=1.1")[0] == "1"
    assert app.routing.replicas.members[0].passed_over_until
    app.dispose()


def test_replica_that_was_passed_over_is_no_failure_of_the_request(make):
    """An unrelated error page stays what it is: the database was within reach."""

    def app(environ, start_response):
        read()
        start_response("500 Internal Server Error", [])
        return [b"a mistake"]

    app = make(app, unavailable=True, replica_retry=1000)
    break_replica(app, 0)
    break_replica(app, 1)
    assert ask(app)[0] == "a mistake"


def test_other_errors_of_a_replica_are_not_hidden(make):
    app = make("read", names=["one"])

    def refuse(dialect, record, arguments, options):
        raise OperationalError("connect", {}, type("OperationalError", (Exception,), {"__module__": "psycopg"})(
            "connection to server at localhost failed: FATAL:  password authentication failed"
        ))  # fmt: skip

    event.listen(app.engines["replicas[0]"], "do_connect", refuse)
    with pytest.raises(DBAPIError, match="password authentication failed"):
        ask(app)


def test_replicas_refuse_to_write(make):
    """What nobody could see to write does not happen there."""

    def app(environ, start_response):
        engine = middleware.engines["replicas[0]"]
        with pytest.raises(DBAPIError, match="readonly"), engine.begin() as connection:
            connection.execute(insert(Row).values(name="x"))
        start_response("200 OK", [])
        return [b"refused"]

    middleware = make(app)
    assert ask(middleware)[0] == "refused"


@pytest.mark.parametrize("driver", rows_on("postgresql", "mariadb"))
def test_replicas_of_servers_refuse_to_write(driver):
    url = driver.url()
    app = SQLASessionMiddleware(App("read"), url, replicas=[url])
    replica = app.engines["replicas[0]"]
    for _ in range(2):  # In each transaction of a connection.
        with pytest.raises(DBAPIError, match=r"(?i)read.only") as raised, replica.begin() as connection:
            connection.execute(text("CREATE TABLE not_on_a_replica (id int)"))
        assert "call on_primary() before it" in raised.value.__notes__[0]
    with pytest.raises(DBAPIError) as raised, replica.connect() as connection:
        connection.execute(text("SELECT 1 FROM no_such_table"))
    assert not hasattr(raised.value, "__notes__")
    app.dispose()


def test_explicit_bind_outside_of_a_request(make):
    app = make(binds={"audit": "sqlite://"})
    with app.context():
        arguments = {"bind": app.engine}
        assert session.execute(text("SELECT name FROM row"), bind_arguments=arguments).scalar_one() == "primary"


def test_writes_of_a_get_are_repeated_although_two_connections_are_held(make):
    """The replica's has nothing to commit, so nothing can be committed in part."""
    tries = []

    def app(environ, start_response):
        tries.append(read())
        write()
        if len(tries) == 1:
            raise LookupError
        start_response("200 OK", [])
        return [b"done"]

    app = make(app, transaction={"attempts": 2, "retry_on": LookupError})
    assert ask(app)[0] == "done"
    assert tries[1] == "primary"
    with app.engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM row WHERE name = 'new'")).scalar_one() == 1


def test_commit_that_fails_is_repeated_although_two_connections_are_held(make):
    tries = []

    def fail(opened: Session) -> None:
        raise LookupError

    def app(environ, start_response):
        tries.append(read())
        write()
        if len(tries) < 3:
            event.listen(session(), "before_commit", fail)
        start_response("200 OK", [])
        return [b"done"]

    assert ask(make(app, transaction={"attempts": 3, "retry_on": LookupError}))[0] == "done"
    assert len(tries) == 3


def test_session_of_a_class_of_the_applications_own(make):
    class Mine(Session):
        pass

    def app(environ, start_response):
        assert isinstance(session(), Mine)
        start_response("200 OK", [])
        return [read().encode()]

    assert ask(make(app, session_options={"class_": Mine}))[0] in ("one", "two")


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_names_of_a_session_are_its_classs_and_sqlalchemys(database_url, method):
    """A mixin of ours would hide what the application's own class has by the same name."""

    class Mine(Session):
        pass

    def app(environ, start_response):
        assert [name for name in dir(session()) if not name.startswith("_")] == names
        start_response("200 OK", [])
        return []

    names = [name for name in dir(Mine()) if not name.startswith("_")]
    more = {"replicas": [database_url], "binds": {"other": "sqlite://"}}
    for options in ({}, more):
        wrapped = SQLASessionMiddleware(app, database_url, session_options={"class_": Mine}, **options)
        assert Client(wrapped).open(method=method, buffered=True).status_code == 200


def test_requests_that_use_no_session_make_no_engine(tmp_path):
    app = SQLASessionMiddleware(App("head"), f"sqlite:///{tmp_path}/a.db", replicas=[f"sqlite:///{tmp_path}/b.db"])
    assert ask(app) == ("", None)
    assert os.listdir(tmp_path) == []


def test_threads_each_have_their_own(make):
    app = make("read write read rollback")
    found: list[str] = []
    barrier = threading.Barrier(8)

    def run() -> None:
        barrier.wait(10)
        found.append(ask(app)[0].split()[0])

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 8
    assert set(found) <= {"one", "two"}


def test_given_engines_are_taken_as_they_are(tmp_path):
    given = create_engine(f"sqlite:///{tmp_path}/given.db")
    Base.metadata.create_all(given)
    app = SQLASessionMiddleware(App("read"), "sqlite://", replicas=[given])
    assert app.engines["replicas[0]"] is given
    assert consume(app(environ(), start_response)) == b""
    with given.begin() as connection:
        connection.execute(insert(Row).values(name="still writable"))
    app.dispose()
    given.dispose()


def test_replicas_have_the_primarys_options(tmp_path):
    app = SQLASessionMiddleware(
        App("read"), f"sqlite:///{tmp_path}/a.db", engine_options={"pool_size": 3, "max_overflow": 0},
        replicas=[f"sqlite:///{tmp_path}/b.db", {"url": f"sqlite:///{tmp_path}/c.db", "pool_size": 7}],
    )  # fmt: skip
    assert [engine.pool.size() for engine in app.engines.values()] == [3, 3, 7]


MISTAKES = {
    "text": ({"replicas": "sqlite://"}, r"replicas must be a list of databases, got str\."),
    "dict": ({"replicas": {"one": "sqlite://"}}, r"replicas must be a list of databases, got dict\."),
    "number": ({"replicas": 7}, r"replicas must be a list of databases, got int\."),
    "URL": ({"replicas": ["sqlite://", "nothing"]}, r"replicas\[1\] must be a database URL"),
    "option": ({"replicas": [{"url": "sqlite://", "pol": 1}]}, r"replicas\[0\]\['pol'\] is not an option"),
    "seconds": ({"replicas": ["sqlite://"], "read_your_writes": -1}, r"read_your_writes must be a number of seconds"),
    "retry": ({"replicas": ["sqlite://"], "replica_retry": "7"}, r"replica_retry must be a number of seconds"),
    "seconds without replicas": ({"read_your_writes": "5"}, r"read_your_writes must be a number of seconds"),
    "retry without replicas": ({"replica_retry": True}, r"replica_retry must be a number of seconds"),
    "twophase": (
        {"replicas": ["sqlite://"], "session_options": {"twophase": True}}, "cannot be used with replicas",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name):
    options, problem = MISTAKES[name]
    with pytest.raises(ConfigurationError, match=problem):
        SQLASessionMiddleware(App("read"), "sqlite://", **options)


INI = {"sqlalchemy.url": "sqlite:///a.db", "__file__": "shop.ini"}
ONE, TWO = "postgresql+psycopg://u:secret@one/shop", "postgresql+psycopg://u:secret@two/shop?application_name=a,b"


def test_options_of_no_replicas():
    settings = {**INI, "sqlalchemy.replicas": "", "sqlalchemy.replicas.pool_size": "3"}
    with pytest.raises(ConfigurationError, match=r"'sqlalchemy.replicas' in shop.ini is missing"):
        SQLASessionMiddleware.from_config(App("read"), settings)


@pytest.mark.parametrize("between", [" ", "\n", ", ", ",\n    ", ",", "\n\n"])
def test_ini(tmp_path, between):
    settings = {
        **INI, "here": str(tmp_path), "read_your_writes": "2.5", "replica_retry": "7",
        "sqlalchemy.replicas": f"{ONE}{between}{TWO}{between}sqlite:///c.db", "sqlalchemy.replicas.pool_size": "9",
    }  # fmt: skip
    app = SQLASessionMiddleware.from_config(App("read"), settings)
    default, *replicas = app.engines.values()
    assert default.url.database == f"{tmp_path}/a.db"
    assert [each.url.host for each in replicas] == ["one", "two", None]
    assert replicas[1].url.query == {"application_name": "a,b"}
    assert replicas[2].url.database == f"{tmp_path}/c.db"
    assert [each.pool.size() for each in replicas] == [9, 9, 9]
    assert app.routing.replicas.cookie.seconds == 2.5


INI_MISTAKES = {
    "sqlalchemy.replicas": ("nothing", "'sqlalchemy.replicas' in shop.ini must be a database URL"),
    "sqlalchemy.replicas.url": (ONE, "'sqlalchemy.replicas.url' in shop.ini is not a setting: list the URLs in"),
    "sqlalchemy.replicas.pol_size": ("7", "'sqlalchemy.replicas.pol_size' in shop.ini is not an option"),
    "sqlalchemy.replicas.pool_size": ("x", "'sqlalchemy.replicas.pool_size' in shop.ini must be a whole number"),
    "sqlalchemy.replica": (ONE, "'sqlalchemy.replica' in shop.ini is not a setting of this middleware; did you mean"),
    "read_your_writes": ("often", "'read_your_writes' in shop.ini must be a number of seconds"),
}  # fmt: skip


@pytest.mark.parametrize("key", INI_MISTAKES)
def test_mistake_in_an_ini(key):
    value, problem = INI_MISTAKES[key]
    with pytest.raises(ConfigurationError) as caught:
        SQLASessionMiddleware.from_config(App("read"), {**INI, "sqlalchemy.replicas": "sqlite://", key: value})
    assert str(caught.value).startswith(problem)
    assert "secret" not in str(caught.value)


def test_options_for_replicas_that_are_not_there():
    with pytest.raises(ConfigurationError, match=r"'sqlalchemy.replicas' in shop.ini is missing"):
        SQLASessionMiddleware.from_config(App("read"), {**INI, "sqlalchemy.replicas.pool_size": "3"})


def test_error_page_is_started_with_its_error(sqlite_url: str) -> None:
    def app(environ: Environ, start: StartResponse) -> list[bytes]:
        try:
            raise LookupError
        except LookupError:
            start("500 Internal Server Error", [("Content-Type", "text/plain")], sys.exc_info())
        return [b"sorry"]

    started: list[Any] = []
    wrapped = SQLASessionMiddleware(app, sqlite_url, replicas=[sqlite_url])
    assert consume(wrapped(environ(), lambda *arguments: started.append(arguments) or (lambda data: None))) == b"sorry"
    assert [type(arguments[2][1]) for arguments in started] == [LookupError]
