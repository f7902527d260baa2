"""Exactly once on a Galera cluster behind a balancer, while one of three nodes dies and comes back (G9, G11, G12)."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from traceback import walk_tb
from typing import Any, ClassVar
from uuid import uuid4
from wsgiref.types import StartResponse, WSGIEnvironment

import pytest
from sqlalchemy import URL, NullPool, String, create_engine, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware.failures import Failure, classify

from .galera import Cluster, running_cluster
from .servers import PATIENCE

CLIENTS = 16
COUNTERS = 4
ATTEMPTS = 10
RETRY_AFTER = 7
#: How many answers each client has to get in each phase.
ENOUGH = 8


class Base(DeclarativeBase):
    pass


class Number(Base):
    """What is counted: few, so that the nodes get in each other's way."""

    __tablename__ = "galera"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    n: Mapped[int]


class Entry(Base):
    """Which request has counted, and in which of its attempts: one that counts twice is here twice.

    The key is the attempt's own. A unique token would only hide a second one behind an error, and the steps of an
    automatic key change with the number of nodes.
    """

    __tablename__ = "galera_entry"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    token: Mapped[str] = mapped_column(String(80))
    attempt: Mapped[int]


# FOR UPDATE, because nobody checks what a plain SELECT has read: increments would be lost, as on a single server at
# this level of isolation. The lock is known to its own node only, but a change that another node has made of the row
# rolls the lock's owner back.
LOCK = text(f"SELECT n, @@wsrep_node_name FROM {Number.__tablename__} WHERE id = :id FOR UPDATE")
WRITE = text(f"UPDATE {Number.__tablename__} SET n = :n WHERE id = :id")


def count(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """One increment of one number, and a note of it."""
    token, attempt = environ["QUERY_STRING"], environ["sqlasession.attempt"]
    ident = int(environ["PATH_INFO"].strip("/"))
    n, node = session.execute(LOCK, {"id": ident}).one()
    session.execute(insert(Entry), {"id": uuid4().hex, "token": token, "attempt": attempt})
    session.execute(WRITE, {"id": ident, "n": n + 1})
    start_response("200 OK", [("X-Attempt", str(attempt)), ("X-Node", node)])
    return [b"counted"]


@dataclass
class Answer:
    """What a client got.

    :param asked: and answered: by the clock that :func:`time.monotonic` reads.
    :param kind: "counted", "unavailable" (with a Retry-After), "unknown", "conflict" (again in the last attempt), or
        what else it was.
    :param attempt: and node: of what was counted.
    """

    client: int
    asked: float
    answered: float
    token: str
    kind: str
    attempt: int = 0
    node: str = ""


class Load:
    """Clients that ask one request after the other, until they are told to stop."""

    def __init__(self, app: SQLASessionMiddleware) -> None:
        self.app = app
        self.answers: list[Answer] = []
        self.errors: list[BaseException] = []
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(CLIENTS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ending.set()
        # For all of them: none waits longer than its read timeout for an answer of the database.
        deadline = time.monotonic() + 2 * PATIENCE
        for thread in self._threads:
            thread.join(max(0, deadline - time.monotonic()))
        assert not any(thread.is_alive() for thread in self._threads), "a request has got no answer"
        assert self.errors == []

    def _run(self, client: int) -> None:
        try:
            browser = Client(self.app)
            number = client
            while not self._ending.is_set():
                answer = self._ask(browser, client, number % COUNTERS)
                self.answers.append(answer)
                number += 1
                if answer.kind == "unavailable":
                    self._ending.wait(0.05)  # Retry-After, in small.
        except BaseException as error:
            self.errors.append(error)
            raise

    def _ask(self, browser: Client, client: int, ident: int) -> Answer:
        answer = Answer(client, time.monotonic(), 0, uuid4().hex, "")
        try:
            response = browser.post(f"/{ident}", query_string=answer.token, buffered=True)
        except DBAPIError as error:
            # The last attempt's, of which a server would make a 500.
            answer.kind = "conflict" if classify(error) is Failure.TRANSIENT else repr(error)
        except Exception as error:
            answer.kind = repr(error)
        else:
            answer.kind = {
                (200, None): "counted",
                (503, str(RETRY_AFTER)): "unavailable",
                (500, None): "unknown" if b"not known" in response.data else "error",
            }.get((response.status_code, response.headers.get("Retry-After")), response.status)
            if answer.kind == "counted":
                answer.attempt, answer.node = int(response.headers["X-Attempt"]), response.headers["X-Node"]
        answer.answered = time.monotonic()
        return answer

    def since(self, moment: float, until: float = float("inf")) -> list[Answer]:
        """The answers to what was asked and answered in between."""
        return [answer for answer in tuple(self.answers) if answer.asked > moment and answer.answered < until]

    def wait_until_counted(self, moment: float, node: str = "") -> None:
        """Return when each client has had enough requests counted since then.

        :param node: which has to have counted as many as all of them have to have.
        """
        deadline = time.monotonic() + 2 * PATIENCE
        while True:
            counted = [answer for answer in self.since(moment) if answer.kind == "counted"]
            clients = Counter(answer.client for answer in counted)
            nodes = Counter(answer.node for answer in counted)
            if all(clients[number] >= ENOUGH for number in range(CLIENTS)) and (not node or nodes[node] >= CLIENTS):
                return
            assert time.monotonic() < deadline, f"{clients} {nodes} {self.since(moment)[-5:]}"
            time.sleep(0.02)


class Causes(logging.Filter):
    """Why requests were repeated or answered with an error: how often which error met a statement or a COMMIT."""

    #: what the library logs, by its beginning
    CONSEQUENCES: ClassVar = {
        "Attempt %d of %d": "repeated",
        "The database is out of reach": "unavailable",
        "It is not known": "unknown",
        "A transaction could not be rolled back": "not rolled back either",
    }

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        consequence = next((word for start, word in self.CONSEQUENCES.items() if record.msg.startswith(start)), None)
        if consequence is not None and record.exc_info:
            error: Any = record.exc_info[1]
            number = getattr(error, "orig", error).args[0]
            with self._lock:
                self.seen[f"{number} in {'COMMIT' if is_commit(error) else 'a statement'}: {consequence}"] += 1
        return False


def is_commit(error: BaseException) -> bool:
    return any(frame.f_code.co_name == "do_commit" for frame, _ in walk_tb(error.__traceback__))


@pytest.fixture
def causes() -> Iterator[Causes]:
    """Instead of the log: to format each attempt's traceback takes longer than the attempt."""
    causes = Causes()
    loggers = [logging.getLogger(f"sqlasession_middleware.{name}") for name in ("transaction", "unavailable")]
    for logger in loggers:
        logger.addFilter(causes)
    yield causes
    for logger in loggers:
        logger.removeFilter(causes)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as cluster:
        yield cluster


@dataclass
class Stored:
    """What one node has."""

    total: int
    #: (token, attempt)
    entries: list[tuple[str, int]]


def read(url: URL) -> Stored:
    """All that was committed anywhere in the cluster before, in one snapshot."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text("SET SESSION wsrep_sync_wait = 1"))
        totals = connection.scalars(select(Number.n)).all()
        entries = connection.execute(select(Entry.token, Entry.attempt).order_by(Entry.id))
        assert len(totals) == COUNTERS
        return Stored(sum(totals), [(row.token, row.attempt) for row in entries])


def wait_until_quiet(cluster: Cluster) -> None:
    """Return when no node works for a client any more: one that has lost its client may still be committing."""
    deadline = time.monotonic() + PATIENCE
    user = cluster.url.username
    query = f"SELECT COUNT(*) FROM information_schema.PROCESSLIST WHERE USER = '{user}'"
    while any(node.ask(query) != "0" for node in cluster.nodes):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_increments_are_counted_once_when_a_node_of_a_cluster_dies_and_comes_back(
    cluster: Cluster, causes: Causes, capsys: pytest.CaptureFixture[str]
) -> None:
    app = SQLASessionMiddleware(
        count,
        cluster.url,
        engine_options={
            "pool_size": CLIENTS,
            "max_overflow": 0,
            "pool_timeout": PATIENCE,
            # A node that comes back is given nothing but new connections.
            "pool_recycle": 2,
            # Without a read timeout, one who waits for a node that was cut off waits for ever. It is longer than the
            # cluster needs to give a node up. (And PyMySQL would read this machine's certificates each time.)
            "connect_args": {"connect_timeout": 5, "read_timeout": 10, "write_timeout": 10, "ssl_disabled": True},
        },
        transaction={"attempts": ATTEMPTS, "backoff_base": 0.02, "backoff_cap": 0.5},
        unavailable={"retry_after": RETRY_AFTER},
    )
    Base.metadata.create_all(app.engine)
    with app.engine.begin() as connection:
        connection.execute(insert(Number), [{"id": ident, "n": 0} for ident in range(COUNTERS)])
    node = cluster.nodes[1]
    begun = time.monotonic()
    with ExitStack() as stack:
        stack.callback(app.dispose)
        with Load(app) as load:
            load.wait_until_counted(begun)
            cluster.kill(node)
            killed = time.monotonic()
            load.wait_until_counted(killed)
            rejoining = time.monotonic()
            cluster.rejoin(node)
            joined = time.monotonic()
            load.wait_until_counted(joined, node.name)
        checked_out = app.engine.pool.checkedout()
    wait_until_quiet(cluster)
    stored = [read(node.url) for node in cluster.nodes]
    kinds = Counter(answer.kind for answer in load.answers)
    counted = {answer.token: answer for answer in load.answers if answer.kind == "counted"}
    attempts = Counter(answer.attempt for answer in counted.values())
    statistics = {
        name: sum(int(node.status(name)) for node in cluster.nodes)
        for name in ("local_cert_failures", "local_bf_aborts", "local_replays")
    }
    figures = {
        "seconds with three nodes, two, three": [
            round(end - start, 1)
            for start, end in [(begun, killed), (killed, rejoining), (rejoining, joined), (joined, time.monotonic())]
        ],
        "slowest answer": round(max(answer.answered - answer.asked for answer in load.answers), 1),
        "answers": dict(kinds),
        "nodes": dict(Counter(answer.node for answer in counted.values())),
        "attempts": sorted(attempts.items()),
        "causes": dict(causes.seen.most_common()),
        "of the nodes": statistics,
    }
    with capsys.disabled():
        print("\nGalera:", *(f"    {name}: {figure}" for name, figure in figures.items()), sep="\n")

    # Whatever the first node has, all have.
    assert stored[1:] == stored[:-1]
    total, entries = stored[0].total, stored[0].entries
    tokens = [token for token, _ in entries]
    # What is counted is noted, and noted once.
    assert total == len(tokens) == len(set(tokens))
    known = {answer.token: answer.kind for answer in load.answers}
    assert Counter(known[token] for token in tokens).keys() <= {"counted", "unknown"}
    # A success is there, as its last attempt has left it.
    assert counted.keys() <= set(tokens)
    assert all(attempt == counted[token].attempt for token, attempt in entries if token in counted)
    # Anything else would be an error that the library has misunderstood.
    assert kinds.keys() <= {"counted", "unavailable", "unknown", "conflict"}
    assert checked_out == 0
    # While it was away the others have worked.
    assert {answer.node for answer in load.since(killed, rejoining) if answer.node} == {
        other.name for other in cluster.nodes if other is not node
    }
    # Else the test has shown nothing.
    assert max(attempts) > 1
    assert statistics["local_cert_failures"] + statistics["local_bf_aborts"] > 0
    assert causes.seen["1213 in COMMIT: repeated"] > 0
    assert kinds["counted"] > len(load.answers) / 2


def test_outcome_is_unknown_when_a_node_is_cut_off_in_commit(cluster: Cluster) -> None:
    """The others may have got the transaction, and commit it then: a node that has lost them says 1180, and no more."""
    node = cluster.nodes[2]
    isolation = ExitStack()
    attempts = []

    def store(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        attempts.append(environ["sqlasession.attempt"])
        session.execute(insert(Entry), {"id": uuid4().hex, "token": "cut off", "attempt": attempts[-1]})
        isolation.enter_context(node.isolated())
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"stored"]

    app = SQLASessionMiddleware(
        store, node.url, transaction={"attempts": ATTEMPTS}, unavailable={"retry_after": RETRY_AFTER}
    )
    Base.metadata.create_all(app.engine)
    with ExitStack() as stack:
        stack.callback(app.dispose)
        with isolation:
            response = Client(app).post("/", buffered=True)
        assert (response.status_code, attempts) == (500, [1])
        assert b"not known" in response.data
        assert app.engine.pool.checkedout() == 0


def test_balancer_leaves_out_a_node_when_it_is_cut_off(cluster: Cluster) -> None:
    """It accepts connections and logins, but refuses to work (1047): the health check has to know."""
    node = cluster.nodes[2]
    with node.isolated():
        cluster.wait_until_balanced(cluster.nodes[:2])
    cluster.wait_until_balanced(cluster.nodes)
