"""A site under gunicorn whose database goes silent: its other pages do not notice, and it recovers by itself (G20)."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from wsgiref.types import StartResponse, WSGIEnvironment

import pytest
from sqlalchemy import make_url, text
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware.unavailable import breaker_state

from ..drivers import Row, rows_of
from ..ports import free_port
from .faulty_ways import Gate
from .servers import PATIENCE, ROOT, end_group
from .silent_app import BREAKER_SECONDS, DEADLINE, PLAIN

THREADS = 8
#: Seconds in which a page without a database is answered, on a busy machine.
USUAL = 0.5


class Site:
    """The served application, whose database is behind a gate."""

    def __init__(self, port: int, gate: Gate, log: Path) -> None:
        self.port, self.gate, self.log = port, gate, log

    def ask(self, path: str) -> tuple[int, float]:
        """The status, and how long it took."""
        begun = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            return response.status, time.monotonic() - begun
        finally:
            connection.close()

    def wait_for(self, path: str, status: int, process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                if self.ask(path)[0] == status:
                    return
            except OSError:
                pass
            assert process.poll() is None, self.log.read_text(errors="replace")
            assert time.monotonic() < end, self.log.read_text(errors="replace")
            time.sleep(0.02)


@pytest.fixture(params=rows_of("psycopg", "pymysql"))
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    row: Row = request.param
    url = make_url(row.url())
    log, port = tmp_path / "log", free_port()
    with Gate(str(url.host), url.port or (5432 if row.server == "postgresql" else 3306)) as gate:
        through = url.set(host="127.0.0.1", port=gate.port).render_as_string(hide_password=False)
        environ = {**os.environ, "SERVED": json.dumps({"url": through}), "PYTHONPATH": str(ROOT)}
        command = [
            *(sys.executable, "-m", "gunicorn", "tests.integration.silent_app:app", "--bind", f"127.0.0.1:{port}"),
            *("--workers", "1", "--worker-class", "gthread", "--threads", str(THREADS), "--graceful-timeout", "1"),
            *("--no-control-socket",) * (_gunicorn_version() >= (25, 1)),
        ]
        with log.open("ab") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environ, stdout=output, stderr=output, start_new_session=True
            )
        try:
            found = Site(port, gate, log)
            found.wait_for("/database", 200, process)
            yield found
        finally:
            end_group(process)


def _gunicorn_version() -> tuple[int, ...]:
    import gunicorn

    version: tuple[int, ...] = gunicorn.version_info
    return version


def repeat(what: Callable[[], tuple[int, float]], until: float) -> list[tuple[int, float]]:
    found = []
    while time.monotonic() < until:
        found.append(what())
    return found


def test_silent_database_costs_the_other_pages_nothing(site: Site) -> None:
    with ThreadPoolExecutor(THREADS + 1) as clients:
        list(clients.map(lambda _: site.ask("/database"), range(THREADS)))  # The pool has connections.
        site.gate.shut()
        begun = time.monotonic()
        # The first requests wait until their deadline, and take all threads for as long.
        first = list(clients.map(lambda _: site.ask("/database"), range(THREADS)))
        while site.ask("/state")[0] != 503:
            assert site.ask("/database")[0] == 503
            assert time.monotonic() < begun + PATIENCE
        opened = time.monotonic()
        until = opened + 3 * BREAKER_SECONDS
        asking = [clients.submit(repeat, lambda: site.ask("/database"), until) for _ in range(THREADS - 1)]
        pages = repeat(lambda: site.ask("/page"), until)
        answers = [each for one in asking for each in one.result()]
    assert {status for status, _ in first} == {503}
    assert {status for status, _ in answers} == {503}
    # Who tries waits, once in each period; nobody else does.
    assert sum(took > USUAL for _, took in answers) <= 1 + (time.monotonic() - opened) / BREAKER_SECONDS
    assert {status for status, _ in pages} == {200}
    assert max(took for _, took in pages) < USUAL
    site.gate.open()
    again = time.monotonic()
    while site.ask("/database")[0] != 200:
        # One who tries may have begun just before.
        assert time.monotonic() < again + BREAKER_SECONDS + DEADLINE + USUAL
        time.sleep(0.02)
    log = site.log.read_text(errors="replace")
    assert log.count("told so at once") == 1
    assert log.count("is reachable again") == 1
    assert log.count("Traceback") <= 2


def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    session.execute(text("SELECT 1"))
    start_response("200 OK", PLAIN)
    return [b"done"]


# Connecting may take half of the time, so that there is some left for the primary.
@pytest.mark.parametrize(("is_warm", "first"), [(True, 503), (False, 200)], ids=["connected", "connecting"])
@pytest.mark.parametrize("row", rows_of("psycopg", "pymysql"))
def test_silent_replica_is_passed_over(row: Row, is_warm: bool, first: int) -> None:
    url = make_url(row.url())
    with Gate(str(url.host), url.port or (5432 if row.server == "postgresql" else 3306)) as gate:
        app = SQLASessionMiddleware(
            answer,
            url,
            replicas=[url.set(host="127.0.0.1", port=gate.port)],
            replica_retry=BREAKER_SECONDS,
            deadline=DEADLINE,
            unavailable=True,
        )
        client, replica = Client(app), app.engines["replicas[0]"]

        def ask() -> tuple[int, float]:
            begun = time.monotonic()
            return client.get("/", buffered=True).status_code, time.monotonic() - begun

        try:
            if is_warm:
                assert ask()[0] == 200
                assert replica.pool.checkedin() == 1
            gate.shut()
            # One request finds out.
            status, took = ask()
            assert (status, breaker_state(replica)) == (first, "open")
            assert took < DEADLINE + USUAL
            # The others read from the primary, and do not wait.
            for _ in range(5):
                status, took = ask()
                assert status == 200
                assert took < USUAL
            gate.open()
            end = time.monotonic() + PATIENCE
            while breaker_state(replica) != "closed":
                assert ask()[0] == 200
                assert time.monotonic() < end
        finally:
            app.dispose()
