"""Servers that load the application before they fork: each worker has connections that nobody else has."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import sys
import sysconfig
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import gunicorn
import pytest
from sqlalchemy import NullPool, create_engine, text

from ..conftest import DATABASES_SEEN
from .servers import PATIENCE, ROOT, Kind, Server

#: The application. Its module uses the database as it is imported: when the master forks, its pool has connections.
PRELOADED = """
import json
import os

from sqlalchemy import text

from sqlasession_middleware import SQLASessionMiddleware, session

SETTINGS = json.loads(os.environ["SERVED"])


def inner(environ, start_response):
    # Long enough for other requests to come in between.
    statement = text("SELECT :ident, pg_backend_pid(), pg_sleep(0.002)").bindparams(ident=environ["QUERY_STRING"])
    if environ["PATH_INFO"] == "/session":
        ident, server_pid, _ = session.execute(statement).one()
    else:
        with ENGINE.connect() as connection:
            ident, server_pid, _ = connection.execute(statement).one()
    answer = {"token": SETTINGS["token"], "ident": ident, "worker": os.getpid(), "server pid": server_pid}
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps({**answer, "master": MASTER, "master's server pids": MASTERS}).encode()]


app = SQLASessionMiddleware(inner, SETTINGS["url"])
MASTER = os.getpid()
#: held by the application, which does not ask for it again
ENGINE = app.engine
connections = [app.engine.connect() for _ in range(3)]
MASTERS = [connection.scalar(text("SELECT pg_backend_pid()")) for connection in connections]
for connection in connections:
    connection.close()
"""

CLIENTS = 8
REQUESTS = 50


def gunicorn_command(*options: str) -> list[str]:
    control = ["--no-control-socket"] if gunicorn.version_info >= (25, 1) else []
    return [sys.executable, "-m", "gunicorn", "preloaded:app", "--preload", "--workers", "2", *options, *control]


def uwsgi_command(*options: str) -> list[str]:
    return [
        *(os.path.join(sysconfig.get_path("scripts"), "uwsgi"), "--home", sys.prefix, "--pythonpath", str(ROOT)),
        *("--module", "preloaded:app", "--need-app", "--master", "--processes", "2", "--die-on-term", *options),
    ]


SERVERS = {
    "gunicorn-sync": gunicorn_command(),
    "gunicorn-gthread": gunicorn_command("--worker-class", "gthread", "--threads", "4"),
    # It forks in C, and calls none of the hooks that Python has for that, unless it is told to.
    "uwsgi": uwsgi_command(),
    "uwsgi-threads": uwsgi_command("--threads", "4"),
}

#: What neither log has where nothing is wrong, but for uWSGI's opinion of those who are root, and gunicorn's of workers
#: that are told to end before they have begun.
BAD_NEWS = re.compile(
    r"^(?!.*(?:you are running uWSGI as root|was sent SIGTERM)).*(?:trace|err|exc|warn|critical|die|dead).*$",
    re.IGNORECASE | re.MULTILINE,
)


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """Each server, with two workers."""
    name = request.param
    url = DATABASES_SEEN.url("postgresql", "")
    (tmp_path / "preloaded.py").write_text(PRELOADED)

    def command(port: int) -> list[str]:
        bind = "--http-socket" if name.startswith("uwsgi") else "--bind"
        return [*SERVERS[name], "--pythonpath", str(tmp_path), bind, f"127.0.0.1:{port}"]

    started = Server(Kind(name, command), "postgresql", tmp_path / "log", {"token": uuid4().hex, "url": url})
    try:
        started.start()
        yield started
    finally:
        started.stop()
        print(started.log.read_text(errors="replace"))


def test_workers_share_no_connection_when_the_application_was_loaded_before_the_fork(server: Server) -> None:
    def visit(client: int) -> list[dict[str, Any]]:
        idents = [f"{client}-{number}" for number in range(REQUESTS)]
        paths = itertools.cycle(("/engine", "/session"))
        answers = [json.loads(server.get(f"{next(paths)}?{ident}")) for ident in idents]
        assert [answer["ident"] for answer in answers] == idents
        return answers

    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = [answer for found in clients.map(visit, range(CLIENTS)) for answer in found]
    assert len(answers) == CLIENTS * REQUESTS
    [master] = {answer["master"] for answer in answers}
    [masters] = {tuple(answer["master's server pids"]) for answer in answers}
    workers: dict[int, set[int]] = {}
    for answer in answers:
        workers.setdefault(answer["worker"], set()).add(answer["server pid"])
    assert len(workers) == 2
    assert master not in workers
    own = set.union(*workers.values())
    assert sum(map(len, workers.values())) == len(own)
    assert not own & set(masters)
    if "gunicorn" in server.kind.name:
        # Workers that end do not say goodbye in the master's name.
        server.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + PATIENCE
        while alive(own):
            assert time.monotonic() < deadline, "the old workers do not end"
            time.sleep(0.02)
    assert alive(masters) == set(masters)
    server.stop()
    assert BAD_NEWS.findall(server.log.read_text(errors="replace")) == []


def alive(server_pids: Collection[int]) -> set[int]:
    """Which of these processes of the database's server there are."""
    engine = create_engine(DATABASES_SEEN.url("postgresql", ""), poolclass=NullPool)
    with engine.connect() as connection:
        return set(connection.scalars(text("SELECT pid FROM pg_stat_activity"))) & set(server_pids)
