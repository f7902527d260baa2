"""Exactly once under faults: the connection to the database breaks at every message of a request (G9, G11, G12)."""

from __future__ import annotations

import http.client
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import get_args
from uuid import uuid4
from wsgiref.types import StartResponse, WSGIEnvironment

import pytest
from sqlalchemy import String, create_engine, func, make_url, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from waitress import wasyncore
from waitress.server import create_server
from werkzeug.test import create_environ

from sqlasession_middleware import SQLASessionMiddleware, session

from ..conftest import DATABASES_SEEN, SERVERS
from .proxy import Cut, Message, Proxy, Sender, When
from .servers import PATIENCE

ATTEMPTS = 3
PORTS = {"postgresql": 5432, "mysql": 3306, "mariadb": 3306}


class Base(DeclarativeBase):
    pass


class Row(Base):
    """Nothing here is unique but the key: what is done twice is there twice."""

    __tablename__ = f"faults_{uuid4().hex[:12]}"
    id: Mapped[int] = mapped_column(primary_key=True)
    token: Mapped[str] = mapped_column(String(40))


@dataclass
class Answer:
    """What a client gets.

    :param whole: whether it got all of the body.
    """

    status: int = 0
    retry_after: str | None = None
    body: bytes = b""
    whole: bool = False

    @property
    def kind(self) -> str:
        if self.status == 200:
            return "stored" if self.whole else "truncated"
        if self.status == 503 and self.whole:
            return "unavailable"
        if self.status == 500 and self.whole and b"not known" in self.body and self.retry_after is None:
            return "unknown"
        if self.status == 0 and b"OperationalError" in self.body:
            return "raised"
        return f"error: {self.status} {self.body!r}"


class Store:
    """The application: it stores one row with the token that the request's body is. ``/stream`` is a generator."""

    def __init__(self) -> None:
        #: token -> how often it was called with it
        self.calls: dict[str, int] = {}

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        token = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])).decode()
        self.calls[token] = self.calls.get(token, 0) + 1
        assert environ["sqlasession.attempt"] == self.calls[token]
        session.add(Row(token=token))
        start_response("200 OK", [("Content-Type", "text/plain")])
        if environ["PATH_INFO"] == "/stream":
            return self.stream()
        return [b"stored"]  # It is the commit that flushes.

    def stream(self) -> Iterator[bytes]:
        session.flush()
        yield b"sto"
        yield b"red"


class Served:
    """The application behind the middleware, with a proxy before its database."""

    def __init__(self, url: str, proxy: Proxy) -> None:
        self.proxy = proxy
        self.direct = create_engine(url, isolation_level="AUTOCOMMIT")
        self.store = Store()
        # PyMySQL would read this machine's certificates for each connection, and the proxy cannot read TLS.
        connect_args = {"ssl_disabled": True} if self.direct.driver == "pymysql" else {}
        self.app = SQLASessionMiddleware(
            self.store,
            make_url(url).set(host=proxy.host, port=proxy.port),
            engine_options={"pool_size": 1, "max_overflow": 0, "pool_timeout": 1, "connect_args": connect_args},
            transaction={"attempts": ATTEMPTS, "backoff_base": 0.001},
            unavailable=True,
        )
        Base.metadata.create_all(self.direct)

    def close(self) -> None:
        self.app.dispose()
        Base.metadata.drop_all(self.direct)
        self.direct.dispose()

    def rows(self, token: str) -> int:
        """How many rows a request has stored, asked when the database is done with the connections that were cut."""
        self.proxy.wait_until_severed()
        with self.direct.connect() as connection:
            return connection.scalars(select(func.count()).where(Row.token == token)).one()

    def begin(self, start: str, cut: Cut | None = None) -> None:
        """Have an empty pool, or one with a connection in it, and the proxy watch what comes."""
        self.proxy.watch()
        self.app.dispose()
        self.proxy.wait_until_closed()
        if start == "pooled":
            assert self.ask(uuid4().hex).kind == "stored"
        self.proxy.watch(cut)

    def ask(self, token: str, path: str = "/list") -> Answer:
        """A request from a server that is made of function calls."""
        answer = Answer()

        def start_response(status: str, headers: list[tuple[str, str]], exc_info: object = None) -> None:
            answer.status = int(status[:3])
            answer.retry_after = dict(headers).get("Retry-After")

        result: Iterable[bytes] = ()
        try:
            result = self.app(create_environ(path, method="POST", data=token), start_response)
            for chunk in result:
                answer.body += chunk
            answer.whole = True
        except Exception as error:
            if not answer.status:
                answer.body = repr(error).encode()
        finally:
            if hasattr(result, "close"):
                result.close()
        return answer

    def assert_true(self, answer: Answer, token: str, at_commit: bool) -> None:
        """The answer is what the database holds, and nothing is left of the request.

        :param at_commit: whether the connection may have broken with a COMMIT on its way.
        """
        rows = self.rows(token)
        calls = self.store.calls.get(token, 0)
        found = f"{answer}, {rows} rows, {calls} calls"
        assert calls <= ATTEMPTS, found
        if answer.kind == "stored":
            assert rows == 1, found
            assert answer.body == b"stored", found
        elif answer.kind == "unavailable":
            assert rows == 0, found
            assert answer.retry_after == "10", found
        elif answer.kind == "raised":
            # Each attempt broke at the same statement, and the database answers others: the request is the cause.
            assert (rows, calls, at_commit) == (0, ATTEMPTS, False), found
        else:
            assert answer.kind in ("unknown", "truncated"), found
            assert rows in ((0, 1) if at_commit else (0,)), found
            assert at_commit or answer.kind == "truncated", found
        assert self.app.engine.pool.checkedout() == 0

    def assert_works(self) -> None:
        """The next request is answered as if nothing had happened."""
        self.proxy.watch()
        token = uuid4().hex
        assert self.ask(token).kind == "stored"
        assert (self.rows(token), self.store.calls[token]) == (1, 1)
        assert self.app.engine.pool.checkedout() == 0


@pytest.fixture(scope="module", params=tuple(SERVERS))
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    url = make_url(DATABASES_SEEN.url(request.param, ""))
    backend = url.get_backend_name()
    with (
        Proxy(backend, url.host or "127.0.0.1", url.port or PORTS[backend]) as proxy,
        closing(Served(url.render_as_string(hide_password=False), proxy)) as served,
    ):
        # The engine's first connection asks what the others need not ask any more.
        assert served.ask(uuid4().hex).kind == "stored"
        yield served


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Each fault is logged with its traceback; writing hundreds of them takes longer than the tests."""
    for name in ("sqlasession_middleware", "sqlalchemy.pool"):
        caplog.set_level(logging.CRITICAL, name)


def is_before_commit(messages: list[Message], last: Message) -> bool:
    """Whether ``last`` is the last message before the COMMIT in what a whole request has sent."""
    following = messages[messages.index(last) + 1 :]
    return bool(following) and following[0].sender == "client" and following[0].commit > 0


@pytest.mark.parametrize("when", get_args(When))
@pytest.mark.parametrize("sender", get_args(Sender))
@pytest.mark.parametrize("start", ["fresh", "pooled"])
@pytest.mark.parametrize("path", ["/list", "/stream"])
def test_answer_is_true_when_the_connection_breaks(
    served: Served, path: str, start: str, sender: Sender, when: When
) -> None:
    """At each message of this sender in turn."""
    served.begin(start)
    assert served.ask(uuid4().hex, path).kind == "stored"
    whole = list(served.proxy.messages)
    messages = [message for message in whole if message.sender == sender]
    assert [message.number for message in messages] == list(range(1, len(messages) + 1))
    assert any(message.commit for message in messages)
    for message in messages:
        served.begin(start, Cut(sender, message.number, when))
        token = uuid4().hex
        answer = served.ask(token, path)
        assert served.proxy.hits == 1
        at_commit = message.commit > 0 or (when == "after" and is_before_commit(whole, message))
        served.assert_true(answer, token, at_commit)
        if at_commit:
            assert served.store.calls[token] == 1
        elif path == "/list":
            # A repetition helps, but where there never was a connection.
            assert answer.kind in (("stored", "unavailable") if start == "fresh" else ("stored",)), message
        served.assert_works()


# Who has sent the message, which one of his that belong to COMMIT, and when; whether the transaction took place, and
# what the client gets.
AT_COMMIT = [
    pytest.param("client", 1, "before", 0, "unknown", id="before COMMIT"),
    pytest.param("client", 1, "during", 0, "unknown", id="during COMMIT"),
    pytest.param("client", 1, "after", 1, "unknown", id="after COMMIT"),
    pytest.param("server", 1, "before", 1, "unknown", id="before its answer"),
    pytest.param("server", 1, "during", 1, "unknown", id="during its answer"),
    pytest.param("server", -1, "after", 1, "stored", id="after its answer"),
]


def cut_at_commit(served: Served, sender: Sender, number: int, when: When, reset: bool = False) -> None:
    """Prepare it, with a connection in the pool."""
    served.begin("pooled")
    assert served.ask(uuid4().hex).kind == "stored"
    last = max(message.commit for message in served.proxy.messages if message.sender == sender)
    served.begin("pooled", Cut(sender, last if number < 0 else number, when, commit=True, reset=reset))


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize(("sender", "number", "when", "rows", "kind"), AT_COMMIT)
def test_client_is_told_that_it_is_not_known_when_commit_has_no_answer(
    served: Served, sender: Sender, number: int, when: When, rows: int, kind: str, reset: bool
) -> None:
    cut_at_commit(served, sender, number, when, reset)
    token = uuid4().hex
    answer = served.ask(token)
    assert served.proxy.hits == 1
    assert (answer.kind, served.rows(token), served.store.calls[token]) == (kind, rows, 1)
    served.assert_true(answer, token, at_commit=True)
    served.assert_works()


@pytest.mark.parametrize(("sender", "number", "when", "rows", "kind"), AT_COMMIT)
def test_stream_is_truncated_when_its_commit_has_no_answer(
    served: Served, sender: Sender, number: int, when: When, rows: int, kind: str
) -> None:
    """The client has its head already."""
    cut_at_commit(served, sender, number, when)
    token = uuid4().hex
    answer = served.ask(token, "/stream")
    expected = "truncated" if kind == "unknown" else kind
    assert (answer.kind, served.rows(token), served.store.calls[token]) == (expected, rows, 1)
    served.assert_true(answer, token, at_commit=True)
    served.assert_works()


@pytest.mark.parametrize("when", get_args(When))
@pytest.mark.parametrize("sender", get_args(Sender))
def test_answer_is_true_when_every_connection_breaks(served: Served, sender: Sender, when: When) -> None:
    """The repetitions have no better luck."""
    served.begin("fresh")
    assert served.ask(uuid4().hex).kind == "stored"
    messages = [message for message in served.proxy.messages if message.sender == sender]
    kinds = set()
    for message in messages:
        served.begin("fresh", Cut(sender, message.number, when, every=True))
        token = uuid4().hex
        answer = served.ask(token)
        assert served.proxy.hits > 0
        served.assert_true(answer, token, at_commit=message.commit > 0 or (sender, when) == ("server", "after"))
        kinds.add(answer.kind)
        served.assert_works()
    assert {"unavailable", "unknown"} <= kinds


def test_answer_is_503_when_connections_are_refused(served: Served) -> None:
    served.begin("fresh")
    served.proxy.refuse()
    try:
        token = uuid4().hex
        answer = served.ask(token)
        assert answer.kind == "unavailable"
        served.assert_true(answer, token, at_commit=False)
    finally:
        served.proxy.accept()
    served.assert_works()


def test_request_is_answered_when_the_pool_holds_dead_connections(served: Served) -> None:
    served.begin("pooled")
    served.proxy.sever()
    served.proxy.wait_until_closed()
    served.assert_works()


@pytest.fixture
def waitress(served: Served) -> Iterator[Callable[[str, str], Answer]]:
    """Asks as :meth:`Served.ask` does, over a socket."""
    sockets: dict[int, object] = {}
    server = create_server(served.app, map=sockets, host="127.0.0.1", port=0, threads=1)
    ending = threading.Event()

    def serve() -> None:
        while not ending.is_set():
            wasyncore.loop(timeout=0.01, map=sockets, count=1)

    def ask(token: str, path: str) -> Answer:
        answer = Answer()
        with closing(http.client.HTTPConnection("127.0.0.1", server.effective_port, timeout=PATIENCE)) as client:
            client.request("POST", path, body=token)
            response = client.getresponse()
            answer.status, answer.retry_after = response.status, response.headers["Retry-After"]
            try:
                answer.body = response.read()
                answer.whole = True
            except http.client.IncompleteRead as error:
                answer.body = error.partial
        return answer

    thread = threading.Thread(target=serve)
    thread.start()
    yield ask
    ending.set()
    thread.join(PATIENCE)
    server.task_dispatcher.shutdown()
    wasyncore.close_all(sockets)


@pytest.mark.parametrize("path", ["/list", "/stream"])
@pytest.mark.parametrize(("sender", "number", "when", "rows", "kind"), AT_COMMIT)
def test_client_of_a_server_is_told_the_same(
    served: Served,
    waitress: Callable[[str, str], Answer],
    path: str,
    sender: Sender,
    number: int,
    when: When,
    rows: int,
    kind: str,
) -> None:
    cut_at_commit(served, sender, number, when)
    token = uuid4().hex
    answer = waitress(token, path)
    expected = "truncated" if (path, kind) == ("/stream", "unknown") else kind
    assert (answer.kind, served.rows(token), served.store.calls[token]) == (expected, rows, 1)
    served.assert_true(answer, token, at_commit=True)
    assert waitress(uuid4().hex, path).kind == "stored"
