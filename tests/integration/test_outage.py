"""Database servers of the tests' own, which are stopped and started again under load (G12), and two-phase commits."""

from __future__ import annotations

import logging
import signal
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import Any, get_args
from uuid import uuid4
from wsgiref.types import StartResponse, WSGIEnvironment

import pytest
from sqlalchemy import URL, Engine, NullPool, String, UniqueConstraint, create_engine, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware.health import HealthMiddleware

from ..drivers import Row as DriverRow
from ..drivers import rows_on
from .own_servers import PASSWORD, OwnMariaDB, OwnPostgreSQL, OwnServer, running
from .proxy import Cut, Proxy, Sender, When
from .servers import PATIENCE

CLIENTS = 4


@pytest.fixture(scope="module")
def own_postgresql() -> Iterator[OwnServer]:
    with running(OwnPostgreSQL) as server:
        yield server


@pytest.fixture(scope="module")
def own_mariadb() -> Iterator[OwnServer]:
    with running(OwnMariaDB) as server:
        yield server


@pytest.fixture(params=["postgresql", "mariadb"])
def own_server(request: pytest.FixtureRequest) -> OwnServer:
    server: OwnServer = request.getfixturevalue(f"own_{request.param}")
    return server


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "outage"
    id: Mapped[int] = mapped_column(primary_key=True)
    token: Mapped[str] = mapped_column(String(80))


@contextmanager
def tables(*engines: Engine) -> Iterator[None]:
    for engine in engines:
        Base.metadata.create_all(engine)
    try:
        yield
    finally:
        for engine in engines:
            Base.metadata.drop_all(engine)


def store(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Stores one row. ``/commit`` does what an application without a transaction does."""
    session.add(Row(token=environ["QUERY_STRING"]))
    if environ["PATH_INFO"] == "/commit":
        session.commit()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"stored"]


@dataclass
class Answer:
    """What a client got.

    :param asked: and answered: by the clock that :func:`time.monotonic` reads.
    :param kind: "stored", "unavailable" (with a Retry-After), "unknown", or what else it was.
    """

    asked: float
    answered: float
    token: str
    kind: str


class Load:
    """Clients that ask one request after the other, until they are told to stop."""

    def __init__(self, app: SQLASessionMiddleware, path: str) -> None:
        self.app = app
        self.path = path
        self.answers: list[Answer] = []
        self.pages: set[bytes] = set()
        self.errors = StringIO()
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(CLIENTS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(PATIENCE)
        assert not any(thread.is_alive() for thread in self._threads)

    def _run(self, client: int) -> None:
        browser = Client(self.app)
        number = 0
        while not self._ending.is_set():
            number += 1
            token = f"{client}-{number}-{uuid4().hex}"
            asked = time.monotonic()
            try:
                response = browser.post(
                    self.path, query_string=token, buffered=True, errors_stream=self.errors, headers={"Accept": "*/*"}
                )
            except DBAPIError as error:
                # An application that commits by itself makes what it likes of the error; nobody knows the outcome.
                names = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
                kind = "unknown" if "do_commit" in names and self.path == "/commit" else repr(error)
            except Exception as error:
                kind = repr(error)
            else:
                self.pages.add(response.data)
                kind = {
                    (200, None): "stored",
                    (503, "7"): "unavailable",
                    (500, None): "unknown" if b"not known" in response.data else "error",
                }.get((response.status_code, response.headers.get("Retry-After")), response.status)
            self.answers.append(Answer(asked, time.monotonic(), token, kind))
            if kind == "unavailable":
                self._ending.wait(0.02)  # Retry-After, in small: else the clients keep the database from coming back.

    def since(self, moment: float, until: float = float("inf")) -> list[Answer]:
        """The answers to what was asked and answered in between."""
        return [answer for answer in tuple(self.answers) if answer.asked > moment and answer.answered < until]

    def wait_for(self, kind: str, moment: float) -> None:
        """Return when each client has had several of these answers since then."""
        deadline = time.monotonic() + PATIENCE
        clients: list[str] = []
        while not all(clients.count(str(number)) >= 5 for number in range(CLIENTS)):
            assert time.monotonic() < deadline, f"no {kind!r}: {self.since(moment)[-5:]}"
            time.sleep(0.01)
            clients = [answer.token.partition("-")[0] for answer in self.since(moment) if answer.kind == kind]


@pytest.mark.parametrize("path", ["/transaction", "/commit"])
@pytest.mark.parametrize("how", ["shutdown", "crash"])
def test_clients_are_told_to_come_back_when_the_database_is_away(
    own_server: OwnServer, how: str, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    app = SQLASessionMiddleware(
        store,
        own_server.url,
        engine_options={"pool_size": 2, "max_overflow": 1, "pool_timeout": PATIENCE},
        transaction={"attempts": 3, "backoff_base": 0.01} if path == "/transaction" else False,
        # Without a breaker: everybody is to find the server as soon as it is up.
        unavailable={"retry_after": 7, "breaker_failures": 0},
    )
    direct = create_engine(own_server.url, poolclass=NullPool)
    with ExitStack() as stack:
        stack.enter_context(tables(direct))
        stack.callback(app.dispose)
        with Load(app, path) as load:
            load.wait_for("stored", 0)
            own_server.stop(getattr(own_server, how))
            down = time.monotonic()
            load.wait_for("unavailable", down)
            starting = time.monotonic()
            own_server.start()
            up = time.monotonic()
            load.wait_for("stored", up)
        assert {answer.kind for answer in load.since(down, starting)} == {"unavailable"}
        assert {answer.kind for answer in load.since(up)} == {"stored"}
        assert {answer.kind for answer in load.answers} <= {"stored", "unavailable", "unknown"}
        with Session(direct) as asking:
            stored = asking.scalars(select(Row.token)).all()
        kinds = {answer.token: answer.kind for answer in load.answers}
        assert len(stored) == len(set(stored))
        assert {kinds[token] for token in stored} <= {"stored", "unknown"}
        assert {token for token, kind in kinds.items() if kind == "stored"} <= set(stored)
        assert app.engine.pool.checkedout() == 0
    written = "".join([caplog.text, load.errors.getvalue(), *(page.decode() for page in load.pages)])
    assert written
    assert PASSWORD not in written


# Two-phase


class LeftBase(DeclarativeBase):
    pass


class RightBase(DeclarativeBase):
    pass


class Left(LeftBase):
    __tablename__ = "left_of_two"
    id: Mapped[int] = mapped_column(primary_key=True)
    token: Mapped[str] = mapped_column(String(80))


class Right(RightBase):
    __tablename__ = "right_of_two"
    # PostgreSQL looks at it when the transaction is prepared; MariaDB, which cannot wait, at once.
    __table_args__ = (
        UniqueConstraint("once", deferrable=True, initially="DEFERRED").ddl_if(dialect="postgresql"),
        UniqueConstraint("once", name="at_once").ddl_if(dialect="mariadb"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    token: Mapped[str] = mapped_column(String(80))
    once: Mapped[str | None] = mapped_column(String(80))


class Two:
    """An application whose one session spans two databases.

    :param proxies: one before each of them.
    """

    def __init__(self, left: URL, right: URL, proxies: list[Proxy]) -> None:
        self.proxies = proxies
        urls = {Left: left, Right: right}
        self.direct = {model: create_engine(url, poolclass=NullPool) for model, url in urls.items()}
        engines = {
            model: create_engine(
                url.set(host=proxy.host, port=proxy.port),
                pool_size=1,
                max_overflow=0,
                pool_timeout=1,
                pool_pre_ping=True,
                # PyMySQL would read this machine's certificates for each connection.
                connect_args={"ssl_disabled": True} if url.get_driver_name() == "pymysql" else {},
            )
            for (model, url), proxy in zip(urls.items(), proxies, strict=True)
        }

        class Spanning(Session):
            def get_bind(self, mapper: Any = None, **more: Any) -> Engine:
                return engines[Left if mapper is None else mapper.class_]

        self.engines = tuple(engines.values())
        self.calls = 0
        self.app = SQLASessionMiddleware(
            self.store,
            engines[Left],
            session_options={"class_": Spanning, "twophase": True},
            transaction={"attempts": 3, "backoff_base": 0.001},
            unavailable=True,
        )
        for model, engine in self.direct.items():
            model.metadata.create_all(engine)

    def store(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        self.calls += 1
        token = environ["QUERY_STRING"]
        how = environ["PATH_INFO"].strip("/")
        session.add(Left(token=token))
        session.add(Right(token=token, once="taken" if how == "constraint" else None))
        session.flush()
        if how == "error":
            raise RuntimeError("on purpose")
        start_response("409 Conflict" if how == "veto" else "200 OK", [("Content-Type", "text/plain")])
        return [b"done"]

    def ask(self, how: str, token: str) -> str:
        self.calls = 0
        try:
            response = Client(self.app).post(f"/{how}", query_string=token, buffered=True)
        except Exception as error:
            return type(error).__name__
        return f"{response.status_code} unknown" if b"not known" in response.data else str(response.status_code)

    def rows(self, token: str) -> tuple[int, int]:
        """How many there are left and right."""
        for proxy in self.proxies:
            proxy.wait_until_severed()
        found = []
        for model, engine in self.direct.items():
            with Session(engine) as asking:
                found.append(asking.scalars(select(func.count()).select_from(model).where(model.token == token)).one())
        return found[0], found[1]

    def in_doubt(self) -> list[int]:
        """How many transactions are prepared, left and right, and neither committed nor rolled back."""
        return [len(prepared(engine)) for engine in self.direct.values()]

    def close(self) -> None:
        for engine in self.engines:
            engine.dispose()
        self.settle()
        for model, engine in self.direct.items():
            model.metadata.drop_all(engine)

    def settle(self) -> None:
        """Roll back what is in doubt."""
        for engine in self.direct.values():
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                for name in prepared(engine):
                    undo = "ROLLBACK PREPARED" if engine.dialect.name == "postgresql" else "XA ROLLBACK"
                    connection.execute(text(f"{undo} '{name}'"))


def prepared(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            query = "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"
            return list(connection.scalars(text(query)))
        return [row.data.decode() for row in connection.execute(text("XA RECOVER"))]


#: Left and right. In the last two each is the first and the second to be prepared and committed, and has the other one
#: beside it: where a connection is cut, two of a kind would show the same once more.
PAIRS = ("postgresql-postgresql", "postgresql-mariadb", "mariadb-postgresql")
of_two_kinds = pytest.mark.parametrize("two", PAIRS[1:], indirect=True)


@pytest.fixture(params=PAIRS)
def two(request: pytest.FixtureRequest) -> Iterator[Two]:
    left, right = (request.getfixturevalue(f"own_{name}") for name in request.param.split("-"))
    url = right.url.set(database="second") if left is right else right.url
    with ExitStack() as stack:
        proxies = [
            stack.enter_context(Proxy(each.get_backend_name(), "127.0.0.1", each.port)) for each in (left.url, url)
        ]
        yield stack.enter_context(closing(Two(left.url, url, proxies)))


@pytest.mark.parametrize(
    ("how", "answer", "rows"),
    [
        pytest.param("success", "200", (1, 1), id="success"),
        pytest.param("veto", "409", (0, 0), id="veto"),
        pytest.param("error", "RuntimeError", (0, 0), id="error"),
        pytest.param(
            # SQLAlchemy's own ROLLBACK PREPARED may hide the first; 2.0 has a third word for it.
            "constraint",
            "IntegrityError ProgrammingError IllegalStateChangeError",
            (0, 0),
            id="constraint of one database",
        ),
    ],
)
def test_both_databases_or_none_commit(two: Two, how: str, answer: str, rows: tuple[int, int]) -> None:
    with Session(two.direct[Right]) as preparing, preparing.begin():
        preparing.add(Right(token="", once="taken"))
    token = uuid4().hex
    # SQLAlchemy also rolls back what could not be prepared, and the last error wins.
    assert two.ask(how, token) in answer.split()
    assert two.rows(token) == rows
    assert two.in_doubt() == [0, 0]
    assert [engine.pool.checkedout() for engine in two.engines] == [0, 0]


def cut_at_commit(two: Two, side: int, sender: Sender, when: When) -> tuple[str, str]:
    """Ask with a cut at the last message that belongs to the second phase, and return the token and the answer."""
    proxy = two.proxies[side]
    warm = uuid4().hex
    proxy.watch()
    assert (two.ask("success", warm), two.rows(warm)) == ("200", (1, 1))
    last = max(message.commit for message in proxy.messages if message.sender == sender)
    proxy.watch(Cut(sender, last, when, commit=True))
    token = uuid4().hex
    answer = two.ask("success", token)
    assert proxy.hits == 1
    return token, answer


@of_two_kinds
@pytest.mark.parametrize("when", get_args(When))
@pytest.mark.parametrize("sender", get_args(Sender))
@pytest.mark.parametrize("side", [0, 1], ids=["left", "right"])
def test_request_is_not_repeated_when_one_of_two_databases_may_have_committed(
    two: Two, side: int, sender: Sender, when: When
) -> None:
    """The other one may be before or after it."""
    token, answer = cut_at_commit(two, side, sender, when)
    rows = two.rows(token)
    assert two.calls == 1
    assert answer == "500 unknown" or (answer, rows) == ("200", (1, 1))
    assert [engine.pool.checkedout() for engine in two.engines] == [0, 0]


@of_two_kinds
@pytest.mark.parametrize("when", get_args(When))
@pytest.mark.parametrize("sender", get_args(Sender))
@pytest.mark.parametrize("side", [0, 1], ids=["left", "right"])
def test_what_is_prepared_stays_so_when_one_of_two_databases_may_have_committed(
    two: Two, side: int, sender: Sender, when: When
) -> None:
    """Whoever administers the databases can still commit the rest: rolled back, half of the change would be lost."""
    token, _ = cut_at_commit(two, side, sender, when)
    rows = two.rows(token)
    assert [stored + doubtful for stored, doubtful in zip(rows, two.in_doubt(), strict=True)] == [1, 1]


# To break it after a message is to break it before the next one, the other side's or the same side's.
@of_two_kinds
@pytest.mark.parametrize("when", ["before", "during"])
@pytest.mark.parametrize("sender", get_args(Sender))
@pytest.mark.parametrize("side", [0, 1], ids=["left", "right"])
def test_both_databases_or_none_commit_when_the_connection_to_one_breaks(
    two: Two, side: int, sender: Sender, when: When
) -> None:
    """At each message up to the second phase in turn."""
    proxy = two.proxies[side]
    proxy.watch()
    assert two.ask("success", uuid4().hex) == "200"
    proxy.watch()
    assert two.ask("success", uuid4().hex) == "200"
    messages = list(proxy.messages)
    second_phase = next(index for index, message in enumerate(messages) if message.commit)
    # Where the answer to PREPARE ends, it is prepared; before that it is as after the question.
    for message in messages[: second_phase if when == "before" else second_phase - 1]:
        if message.sender == sender:
            assert two.ask("success", uuid4().hex) == "200"
            proxy.watch(Cut(sender, message.number, when))
            token = uuid4().hex
            # A repetition helps, but where one of the databases still has to be connected to.
            answer = two.ask("success", token)
            assert proxy.hits == 1
            # SQLAlchemy 2.0 hides a PREPARE that failed behind an error of its own state.
            allowed = [("200", (1, 1)), ("503", (0, 0)), ("IllegalStateChangeError", (0, 0))]
            assert (answer, two.rows(token)) in allowed, message
            assert [engine.pool.checkedout() for engine in two.engines] == [0, 0]
            # One whose PREPARE has lost its answer is left behind.
            two.settle()


# Connections that are idle while the server is away (G17)


def reads(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    session.execute(text("SELECT 1"))
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"done"]


@pytest.mark.parametrize("how", ["shutdown", "crash"])
@pytest.mark.parametrize("row", rows_on("postgresql", "mariadb"))
def test_no_request_fails_when_the_server_was_restarted_while_all_connections_were_idle(
    row: DriverRow, how: str, request: pytest.FixtureRequest
) -> None:
    server: OwnServer = request.getfixturevalue(f"own_{row.server}")
    row.url()  # Its driver may not be installed.
    app = SQLASessionMiddleware(reads, server.url.set(drivername=row.dialect))
    pool: Any = app.engine.pool
    with ExitStack() as stack:
        for _ in range(pool.size()):
            stack.enter_context(app.engine.connect())
    assert pool.checkedin() == pool.size() == 5
    server.stop(getattr(server, how))
    server.start()
    assert [Client(app).get("/", buffered=True).data for _ in range(2 * pool.size())] == [b"done"] * 2 * pool.size()
    app.dispose()


def test_health_check_is_in_time_while_the_server_is_stopped(own_server: OwnServer) -> None:
    """A stopped process has a port that accepts connections, and says nothing."""
    assert own_server.process is not None
    app = SQLASessionMiddleware(store, own_server.url)
    browser = Client(HealthMiddleware(app, timeout=1.0))
    # The pool has a connection, which does not help.
    app.engine.connect().close()
    assert browser.get("/readyz").text == "ready\ndefault: ok\n"
    own_server.process.send_signal(signal.SIGSTOP)
    try:
        for expected in (1.0, 0.0):
            began = time.monotonic()
            assert browser.get("/readyz").text == "not ready\ndefault: too slow\n"
            assert time.monotonic() - began < expected + 0.5
            assert browser.get("/healthz").text == "alive\n"
    finally:
        own_server.process.send_signal(signal.SIGCONT)
    end = time.monotonic() + PATIENCE
    while browser.get("/readyz").status_code != 200:
        assert time.monotonic() < end
        time.sleep(0.05)
    app.dispose()
