"""Behind PgBouncer in transaction mode: the project's own tests of transactions, and what docs/pgbouncer.rst says."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4
from wsgiref.types import StartResponse, WSGIEnvironment

import pytest
from sqlalchemy import URL, Engine, NullPool, String, create_engine, make_url, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware.unavailable import breaker_state

from ..conftest import DATABASES_SEEN
from ..creators import ROUNDS
from ..test_schema import race
from .own_servers import OwnPostgreSQL, OwnServer, running
from .pgbouncer import PgBouncer, bouncing
from .servers import PATIENCE, ROOT
from .test_deadlines import stopped

DRIVERS = ["psycopg", "psycopg2"]
#: What psycopg is told for a PgBouncer before 1.21. psycopg2 prepares nothing.
UNPREPARED: dict[str, dict[str, Any]] = {"psycopg": {"connect_args": {"prepare_threshold": None}}, "psycopg2": {}}
#: Each transaction gets another connection to the server than the one before, so that what it leaves on its own is
#: missed by the next one of the same client, and met by that of another.
TURNS: dict[str, Any] = {"server_round_robin": 1, "min_pool_size": 3, "default_pool_size": 3}


@pytest.fixture
def postgresql() -> URL:
    """The database behind the bouncer."""
    return make_url(DATABASES_SEEN.url("postgresql", ""))


@pytest.fixture(scope="module")
def own_postgresql() -> Iterator[OwnServer]:
    with running(OwnPostgreSQL) as server:
        yield server


def url_of(bouncer: PgBouncer, driver: str) -> URL:
    return bouncer.url.set(drivername=f"postgresql+{driver}")


def have_connections(bouncer: PgBouncer) -> None:
    """Have it open all that it may, or as many as take turns: by itself it would take some seconds."""
    engine = create_engine(bouncer.url, poolclass=NullPool)
    with ExitStack() as stack:
        for _ in range(TURNS["default_pool_size"]):
            stack.enter_context(engine.connect()).execute(select(1))


# The project's own tests


@dataclass(frozen=True)
class Run:
    """One run of pytest behind a bouncer.

    :param chosen: by their names, as ``pytest -k`` takes it.
    :param deselected: tests that cannot work there, each with its reason.
    :param settings: of the bouncer.
    """

    name: str
    driver: str
    files: tuple[str, ...]
    chosen: str = "postgresql"
    deselected: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=lambda: TURNS)


FILES = (
    *("tests/test_transaction.py", "tests/test_transaction_table.py", "tests/test_streams.py"),
    *("tests/test_unavailable.py", "tests/test_drivers.py"),
)
LOST_ANSWER = "answer_to_the_commit_is_lost"
#: Of the table of a transaction a success and a failure: other statuses come to the same before a connection is asked.
CHOSEN = f"postgresql and not {LOST_ANSWER} and not 3xx and not 5xx"

RUNS = [
    Run("psycopg", "psycopg", (*FILES, "tests/integration/test_contention.py"), CHOSEN),
    Run(
        "psycopg2",
        "psycopg2",
        FILES,
        CHOSEN,
        {
            "tests/test_transaction.py::test_nothing_is_repeated_when_the_driver_was_told_to_commit_each_statement"
            "[postgresql-options1]": "psycopg2 does not take autocommit as an argument of connect(), bouncer or not",
        },
    ),
    # Commits, then begins anew, and kills the connection that it committed on: it has to be the same again, which it
    # is where the bouncer hands out the one that was used last.
    Run("lost answers", "psycopg", ("tests/test_transaction_table.py",), f"postgresql and {LOST_ANSWER}", settings={}),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_tests_of_transactions_pass(postgresql: URL, run: Run) -> None:
    # The contention is to wait for no disk, and says so as the connection begins: here it does.
    with bouncing(postgresql, ignore_startup_parameters="extra_float_digits,options", **run.settings) as bouncer:
        have_connections(bouncer)
        url = url_of(bouncer, run.driver).render_as_string(hide_password=False)
        # It is a run of its own, and no process of this one.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"),
                *("-p", "tests.integration.unprepared", "-k", run.chosen),
                *(f"--deselect={name}" for name in run.deselected),
                *run.files,
            ],
            cwd=ROOT,
            env={**environment, "TEST_POSTGRESQL_URL": url},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        output = f"{done.stdout}\n{bouncer.said}"
    assert done.returncode == 0, output
    assert "postgresql: tested" in done.stdout, output
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, output
    assert int(passed[1]) > 0, output


# Through the middleware

CLIENTS = 8
REQUESTS = 15


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "bounced"
    id: Mapped[int] = mapped_column(primary_key=True)
    token: Mapped[str] = mapped_column(String(80))
    #: of the connection to the server
    backend: Mapped[int]


@pytest.fixture
def direct(postgresql: URL) -> Iterator[Engine]:
    """The database, past the bouncer."""
    engine = create_engine(postgresql, poolclass=NullPool)
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    yield engine
    Base.metadata.drop_all(engine)


def store(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    backend = session.scalar(text("SELECT pg_backend_pid()"))
    session.add(Row(token=environ["QUERY_STRING"], backend=backend))
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"stored"]


def load(app: SQLASessionMiddleware) -> tuple[list[str], list[DBAPIError]]:
    """The tokens that were answered with a success, and the errors that the others met."""
    stored: list[str] = []
    errors: list[DBAPIError] = []

    def ask(client: int) -> None:
        browser = Client(app)
        for number in range(REQUESTS):
            token = f"{client}-{number}-{uuid4().hex}"
            try:
                response = browser.post("/", query_string=token, buffered=True)
            except DBAPIError as error:
                errors.append(error)
            else:
                assert (response.status_code, response.data) == (200, b"stored")
                stored.append(token)

    with ThreadPoolExecutor(CLIENTS) as threads:
        for done in [threads.submit(ask, client) for client in range(CLIENTS)]:
            done.result()
    return stored, errors


@pytest.mark.parametrize("driver", DRIVERS)
def test_each_success_is_stored_once_when_clients_share_fewer_connections(
    postgresql: URL, direct: Engine, driver: str
) -> None:
    options = {"pool_size": CLIENTS, "max_overflow": 0, **UNPREPARED[driver]}
    with ExitStack() as stack:
        bouncer = stack.enter_context(bouncing(postgresql, **{**TURNS, "min_pool_size": 2, "default_pool_size": 2}))
        app = SQLASessionMiddleware(store, url_of(bouncer, driver), engine_options=options, transaction=True)
        stack.callback(app.dispose)
        stored, errors = load(app)
        assert (len(stored), errors) == (CLIENTS * REQUESTS, [])
        # Else the test has shown nothing.
        assert app.engine.pool.checkedin() > 2  # type: ignore[attr-defined]
    with direct.connect() as connection:
        rows = connection.execute(select(Row.token, Row.backend)).all()
    assert sorted(row.token for row in rows) == sorted(stored)
    assert len({row.backend for row in rows}) == 2


def test_prepared_statements_are_missed_when_psycopg_is_not_told(postgresql: URL, direct: Engine) -> None:
    """What is said to be stored is, all the same."""
    settings = {**TURNS, "min_pool_size": 2, "default_pool_size": 2}
    with ExitStack() as stack:
        bouncer = stack.enter_context(bouncing(postgresql, **settings))
        if bouncer.version >= (1, 21):
            pytest.skip("this PgBouncer follows prepared statements from connection to connection")
        app = SQLASessionMiddleware(store, bouncer.url, transaction=True)
        stack.callback(app.dispose)
        stored, errors = load(app)
    # duplicate_prepared_statement, invalid_sql_statement_name, and protocol_violation: the parameters of another one
    assert {error.orig.sqlstate for error in errors} <= {"42P05", "26000", "08P01"}  # type: ignore[union-attr]
    assert errors
    with direct.connect() as connection:
        assert sorted(connection.scalars(select(Row.token))) == sorted(stored)


@pytest.mark.parametrize("driver", DRIVERS)
def test_isolation_level_is_the_transactions_own(postgresql: URL, driver: str) -> None:
    """Drivers send it with BEGIN, so that no other client of the same connection has it as well."""
    ask = text("SELECT current_setting('transaction_isolation'), pg_backend_pid()")
    with ExitStack() as stack:
        bouncer = stack.enter_context(bouncing(postgresql, default_pool_size=1))
        seen = set()
        for level in ("SERIALIZABLE", None, "REPEATABLE READ", None):
            options = {"isolation_level": level} if level else {}
            engine = create_engine(url_of(bouncer, driver), poolclass=NullPool, **options, **UNPREPARED[driver])
            with engine.connect() as connection:
                found, backend = connection.execute(ask).one()
                seen.add(backend)
            assert found == (level or "read committed").lower()
        assert len(seen) == 1


@pytest.mark.parametrize("driver", DRIVERS)
def test_streams_hold_no_connection_of_the_bouncers(postgresql: URL, driver: str) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        kind = "text/event-stream" if environ["PATH_INFO"] == "/stream" else "text/plain"
        start_response("200 OK", [("Content-Type", kind)])
        return (b"data: %d\n\n" % session.scalar(select(number)) for number in range(3))

    with ExitStack() as stack:
        # One connection for all, and whoever does not get it at once is told so.
        bouncer = stack.enter_context(bouncing(postgresql, default_pool_size=1, query_wait_timeout=1))
        wrapped = SQLASessionMiddleware(app, url_of(bouncer, driver), engine_options=UNPREPARED[driver])
        stack.callback(wrapped.dispose)
        streams = [stack.enter_context(closing(Client(wrapped).get("/stream"))) for _ in range(4)]
        chunks = [response.iter_encoded() for response in streams]
        for number in range(3):
            for each in chunks:
                assert next(iter(each)) == b"data: %d\n\n" % number
            assert status_of(wrapped) == 200


def answer_one(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    session.scalar(select(1))
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"1"]


def status_of(app: SQLASessionMiddleware) -> int:
    return Client(app).get("/", buffered=True).status_code


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "sqlasession_middleware")


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("pooled", [True, False], ids=["pool", "no pool"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_answer_is_503_when_the_bouncer_has_no_connection_to_give(postgresql: URL, driver: str, pooled: bool) -> None:
    options = {**UNPREPARED[driver], **({} if pooled else {"poolclass": NullPool})}
    with ExitStack() as stack:
        settings = {"default_pool_size": 1, "query_wait_timeout": 1, "max_client_conn": 2}
        bouncer = stack.enter_context(bouncing(postgresql, **settings))
        url = url_of(bouncer, driver)
        app = SQLASessionMiddleware(answer_one, url, engine_options=options, transaction=True, unavailable=True)
        stack.callback(app.dispose)
        assert status_of(app) == 200
        other = create_engine(url, poolclass=NullPool, **UNPREPARED[driver])
        with other.connect() as connection:
            connection.execute(select(1))
            assert status_of(app) == 503  # query_wait_timeout
        assert status_of(app) == 200
        app.dispose()
        with other.connect(), other.connect():
            assert status_of(app) == 503  # max_client_conn
        assert status_of(app) == 200


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("driver", DRIVERS)
def test_answer_is_503_while_the_server_behind_the_bouncer_is_away(own_postgresql: OwnServer, driver: str) -> None:
    with ExitStack() as stack:
        bouncer = stack.enter_context(bouncing(own_postgresql.url, server_login_retry=1, query_wait_timeout=1))
        url = url_of(bouncer, driver)
        options = UNPREPARED[driver]
        app = SQLASessionMiddleware(answer_one, url, engine_options=options, transaction=True, unavailable=True)
        stack.callback(app.dispose)
        assert status_of(app) == 200
        own_postgresql.stop(own_postgresql.crash)
        try:
            assert [status_of(app) for _ in range(3)] == [503] * 3
        finally:
            own_postgresql.start()
        deadline = time.monotonic() + PATIENCE
        while (status := status_of(app)) == 503:  # until server_login_retry is over
            assert time.monotonic() < deadline, bouncer.said
            time.sleep(0.05)
        assert status == 200


class Asked:
    """An application behind a bouncer, with deadlines and breakers."""

    def __init__(self, url: URL, driver: str, **options: Any) -> None:
        self.statement = "SELECT 1"
        self.app = SQLASessionMiddleware(
            self.answer,
            url,
            engine_options=UNPREPARED[driver],
            deadline=0.7,
            unavailable={"breaker_failures": 2, "breaker_seconds": 0.5},
            **options,
        )

    def answer(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        session.execute(text(self.statement))
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"done"]

    def ask(self) -> tuple[int, bool]:
        """The status, and whether somebody has waited."""
        begun = time.monotonic()
        status = status_of(self.app)
        took = time.monotonic() - begun
        assert took < 0.7 + 0.5, took
        return status, took > 0.5

    def ask_until(self, done: Any) -> None:
        end = time.monotonic() + PATIENCE
        while not done(self.ask()[0]):
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.mark.parametrize("driver", DRIVERS)
def test_breaker_opens_for_a_silent_server_behind_a_bouncer_that_answers(
    own_postgresql: OwnServer, driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The bouncer lets everybody in, and takes requests to cancel."""
    with bouncing(own_postgresql.url) as bouncer:
        asked = Asked(url_of(bouncer, driver), driver)
        assert asked.ask() == (200, False)
        asked.statement = "SELECT pg_sleep(1)"
        for _ in range(3):  # A slow query is no silence.
            assert asked.ask() == (503, True)
        assert breaker_state(asked.app.engine) == "closed"
        asked.statement = "SELECT 1"
        asked.ask_until(lambda status: status == 200)
        with stopped(own_postgresql):
            asked.ask_until(lambda status: breaker_state(asked.app.engine) != "closed")
            answers = []
            end = time.monotonic() + 3
            while time.monotonic() < end:
                answers.append(asked.ask())
                time.sleep(0.02)
            assert {status for status, _ in answers} == {503}
            # Whoever tries waits, once in each period.
            assert sum(waits for _, waits in answers) <= 4
        asked.ask_until(lambda status: status == 200)
        asked.app.dispose()
    said = [each.getMessage() for each in caplog.records]
    assert sum("told so at once" in each for each in said) == 1
    assert sum("is reachable again" in each for each in said) == 1


@pytest.mark.parametrize("driver", DRIVERS)
def test_silent_replica_behind_a_bouncer_that_answers_is_passed_over(
    postgresql: URL, own_postgresql: OwnServer, driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    with bouncing(own_postgresql.url) as bouncer:
        asked = Asked(
            postgresql.set(drivername=f"postgresql+{driver}"),
            driver,
            replicas=[url_of(bouncer, driver)],
            replica_retry=0.5,
        )
        replica = asked.app.engines["replicas[0]"]
        assert asked.ask() == (200, False)
        with stopped(own_postgresql):
            assert asked.ask() == (503, True)  # This one finds out.
            end = time.monotonic() + 2
            while time.monotonic() < end:
                assert asked.ask()[0] == 200
                assert breaker_state(replica) != "closed"
                time.sleep(0.02)
        asked.ask_until(lambda status: breaker_state(replica) == "closed")
        asked.app.dispose()
    assert sum("is reachable again" in each.getMessage() for each in caplog.records) == 1


@pytest.mark.parametrize("driver", DRIVERS)
def test_two_phases_may_be_of_two_connections(own_postgresql: OwnServer, driver: str) -> None:
    """PREPARE ends the transaction for the bouncer as well; COMMIT PREPARED works on any connection."""
    engine = create_engine(own_postgresql.url, poolclass=NullPool)
    Base.metadata.create_all(engine)
    with ExitStack() as stack:
        stack.callback(Base.metadata.drop_all, engine)
        bouncer = stack.enter_context(bouncing(own_postgresql.url, **TURNS))
        app = SQLASessionMiddleware(
            store,
            url_of(bouncer, driver),
            engine_options=UNPREPARED[driver],
            session_options={"twophase": True},
            transaction=True,
        )
        stack.callback(app.dispose)
        stored, errors = load(app)
        assert errors == []
        with engine.connect() as connection:
            assert sorted(connection.scalars(select(Row.token))) == sorted(stored)
            assert connection.scalar(text("SELECT count(*) FROM pg_prepared_xacts")) == 0


@pytest.mark.parametrize("driver", DRIVERS)
def test_options_are_refused_or_ignored(postgresql: URL, driver: str) -> None:
    """They reach the server in no case."""
    options = {"poolclass": NullPool, "connect_args": {"options": "-c statement_timeout=4321"}}
    with bouncing(postgresql) as bouncer:
        engine = create_engine(url_of(bouncer, driver), **options)
        with pytest.raises(DBAPIError, match="unsupported startup parameter"):
            engine.connect()
    with bouncing(postgresql, ignore_startup_parameters="options") as bouncer:
        engine = create_engine(url_of(bouncer, driver), **options)
        with engine.connect() as connection:
            assert connection.scalar(text("SHOW statement_timeout")) != "4321ms"


@pytest.mark.parametrize("driver", DRIVERS)
def test_processes_create_and_drop_at_the_same_moment(postgresql: URL, driver: str) -> None:
    """The lock is the transaction's. There are fewer connections than processes, and who waits needs no second one."""
    with bouncing(postgresql, **TURNS) as bouncer:
        url = url_of(bouncer, driver).render_as_string(hide_password=False)
        found = race("processes", "postgresql", url, {**UNPREPARED[driver]})
    assert (found["failed"], found["said"]) == ([], [])
    assert found["init_database"] == found["init_database"][:1] * ROUNDS
