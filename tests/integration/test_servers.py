"""Requests through real servers: the scope is each request's own, and nothing is left of it."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from uuid import uuid4

import pytest
from sqlalchemy import Column, Integer, MetaData, NullPool, String, Table, create_engine

from ..conftest import DATABASES, DATABASES_SEEN
from .served import POOL_SIZE
from .servers import KINDS, Reader, Server, readers, split

FILE = bytes(range(256)) * 8192


@pytest.fixture(scope="module", params=DATABASES)
def database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """Settings for the servers: a table for each of the two applications, and on SQLite a database for each."""
    folder = tmp_path_factory.mktemp(request.param)
    run = uuid4().hex[:12]
    tables = {name: f"served_{run}_{name}" for name in "ab"}
    urls = {name: DATABASES_SEEN.url(request.param, f"sqlite:///{folder}/{name}.db") for name in "ab"}
    file = folder / "file.bin"
    file.write_bytes(FILE)
    engines = {name: create_engine(url, poolclass=NullPool) for name, url in urls.items()}
    metadata = {name: MetaData() for name in "ab"}
    for name, engine in engines.items():
        table = Table(
            tables[name],
            metadata[name],
            Column("id", Integer, primary_key=True),
            Column("owner", String(10)),
        )
        metadata[name].create_all(engine)
        with engine.begin() as connection:
            connection.execute(table.insert(), {"id": 1, "owner": name})
    yield {"database": request.param, "token": run, "urls": urls, "tables": tables, "file": str(file)}
    for name, engine in engines.items():
        metadata[name].drop_all(engine)


@pytest.fixture(scope="module", params=KINDS)
def running(
    request: pytest.FixtureRequest, database: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    log = tmp_path_factory.mktemp(request.param) / "log"
    server = Server(KINDS[request.param], str(database["database"]), log, database)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    """A server that is shared by the tests of this module; its log of this test is shown where the test fails."""
    before = running.log.stat().st_size
    yield running
    print(running.log.read_bytes()[before:].decode(errors="replace"))


def together(calls: Iterable[Callable[[], object]]) -> None:
    """Call all at once, in a thread each."""
    calls = list(calls)
    with ThreadPoolExecutor(len(calls)) as pool:
        for done in [pool.submit(call) for call in calls]:
            done.result()


def visit(server: Server, name: str, visitor: str) -> None:
    """Ask for this and that on one connection (as long as the server keeps it), and check that the answers are ours."""
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as client:
        for number in range(4):
            for route in ("list", "local", "length", "write", "file"):
                ident = f"{visitor}-{number}-{route}"
                client.request("GET", f"/{name}/{route}?ident={ident}")
                response = client.getresponse()
                assert (response.status, response.read()) == (200, expected_body(name, route, ident))
                if server.kind.hangs_up:
                    client.close()


def expected_body(name: str, route: str, ident: str) -> bytes:
    lines = [f"{name} {ident} {step}\n".encode() for step in range(5)]
    return {
        "list": lines[0],
        "length": lines[0],
        "local": b"".join([*lines, b"[0, 1, 2, 3, 4]"]),
        "write": b"".join(lines[:3]),
        "file": FILE,
    }[route]


# Method, route, and a body to send: each is asked for with the middleware and without.
REQUESTS = [
    ("GET", "list", b""),
    ("GET", "list-long", b""),
    ("GET", "list-empty", b""),
    ("GET", "length", b""),
    ("GET", "sized", b""),
    ("GET", "local", b""),
    ("GET", "late", b""),
    ("GET", "write", b""),
    ("GET", "file", b""),
    ("GET", "empty", b""),
    ("GET", "error", b""),
    ("GET", "error-late", b""),
    ("GET", "error-page", b""),
    ("GET", "error-first", b""),
    ("GET", "error-mid", b""),
    ("GET", "error-close", b""),
    ("HEAD", "list", b""),
    ("HEAD", "length", b""),
    ("HEAD", "local", b""),
    ("HEAD", "file", b""),
    ("HEAD", "error", b""),
    ("POST", "echo", b"sent " * 1000),
]


# No part of the protocol depends on the database.
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
@pytest.mark.parametrize(("method", "route", "sent"), REQUESTS, ids=[" ".join(case[:2]) for case in REQUESTS])
def test_answer_is_the_same_when_the_middleware_is_there(server: Server, method: str, route: str, sent: bytes) -> None:
    bare = server.raw(method, f"/bare/{route}?ident=same", sent)
    found = server.raw(method, f"/a/{route}?ident=same", sent)
    assert found == bare
    server.wait_until_idle()


def test_answers_are_their_own_when_many_clients_ask(server: Server) -> None:
    together(partial(visit, server, "ab"[number % 2], f"visitor-{number}") for number in range(8))
    server.wait_until_idle()


def test_streams_hold_one_session_each_when_their_readers_wait(server: Server) -> None:
    count = server.kind.streams or 1
    with readers(server, count) as waiting:
        if server.kind.streams:
            half = count // 2
            server.wait_for(checked_out={"a": half, "b": half}, open=count)
            # Others are served in the meantime, on what is left of the pools.
            visit(server, "a", "meanwhile")
            visit(server, "b", "meanwhile")
            server.wait_for(checked_out={"a": half, "b": half}, open=count)
        together(reader.read_rest for reader in waiting)
    server.wait_until_idle()


@pytest.mark.parametrize("leave", [Reader.close, Reader.reset], ids=["closing", "resetting"])
def test_nothing_is_left_when_clients_leave_in_mid_stream(server: Server, leave: Callable[[Reader], None]) -> None:
    with readers(server, server.kind.streams or 1) as leaving:
        for reader in leaving:
            leave(reader)
    server.wait_until_idle()
    with readers(server, 1) as staying:
        staying[0].read_rest()
    server.wait_until_idle()


@pytest.mark.parametrize("route", ["error", "error-first", "error-mid", "error-close"])
def test_pool_is_whole_when_more_requests_fail_than_it_has_connections(server: Server, route: str) -> None:
    together(
        partial(server.raw, "GET", f"/{name}/{route}?ident={name}-{number}")
        for name in "ab"
        for number in range(POOL_SIZE + 1)
    )
    server.wait_until_idle()
    together(partial(visit, server, name, f"{name}-after") for name in "ab")
    server.wait_until_idle()


def test_file_reaches_the_server_unwrapped_when_the_server_has_a_wrapper(server: Server) -> None:
    ident = uuid4().hex
    assert server.get(f"/a/file?ident={ident}") == FILE
    found = server.wait_until_idle()
    assert found["unwrapped"].get(ident) is (True if server.kind.file_wrapper else None)
    if server.kind.name == "uwsgi":
        # The one server whose log tells.
        server.wait_for_log(rf"/a/file\?ident={ident} .* via sendfile\(\)")


@pytest.mark.parametrize("then", ["end", "error", "error-mid"])
@pytest.mark.parametrize("database", ["postgresql", "mariadb"], indirect=True)
def test_slot_is_free_when_the_database_ends_the_connection(
    server: Server, then: str, request: pytest.FixtureRequest
) -> None:
    on_postgresql = request.node.callspec.params["database"] == "postgresql"
    for number in range(2):
        answer = server.raw("GET", f"/a/killed?ident=killed-{number}&then={then}")
        if then == "end":
            assert split(answer)[1] == b"killed"
        # Where a query has failed before, the Session knows that its connection is dead, and closing it succeeds. But
        # psycopg's connection may still seem to be open after its "connection socket closed".
        server.wait_until_idle(failures=(1,) if then == "end" else (0, 1) if on_postgresql else (0,))
    visit(server, "a", "after")
    server.wait_until_idle()


@pytest.mark.parametrize("running", ["gunicorn-gevent"], indirect=True)
@pytest.mark.parametrize("database", ["postgresql", "mariadb"], indirect=True)
def test_slot_is_free_when_a_greenlet_times_out_in_the_driver(server: Server) -> None:
    together(partial(server.raw, "GET", f"/a/timeout?ident=timeout-{number}") for number in range(POOL_SIZE + 1))
    server.wait_until_idle()
    visit(server, "a", "after")
    server.wait_until_idle()
