"""A Pyramid application in the cookiecutter's form, bare and moved by the one line: answers, commands, an outage.

It is one of ours, so that no test here needs the network; ``tests/drop_in`` does the same with Pyramid's own tutorial.
"""

from __future__ import annotations

import ast
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gunicorn
import pytest
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.engine import make_url

from ..databases import DATABASES_SEEN
from ..ports import free_port
from .own_servers import OwnPostgreSQL, running
from .servers import PATIENCE, ROOT, end_group

SITE = Path(__file__).parent / "pyramid_site"
#: Ways of adding a guest: see ``views.add``.
HOWS = "plain flush redirect raise-redirect bad missing error doom occupied stream savepoint plain plain flush"
ENVIRON = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(SITE), str(ROOT)]),
    "PYTHONWARNINGS": "ignore",
    "PYTHONUNBUFFERED": "1",
}


def write_ini(folder: Path, url: str, moved: bool, more: str = "") -> Path:
    ini = folder / ("moved.ini" if moved else "bare.ini")
    ini.write_text(
        f"[app:main]\nuse = call:guests:main\nsqlalchemy.url = {url.replace('%', '%%')}\nretry.attempts = 3\n"
        f"moved = {moved}\n{more}\n"
        "[pshell]\nsetup = guests.pshell.setup\n\n"
        f"[alembic]\nscript_location = {SITE}/guests/alembic\npath_separator = os\n"
    )
    return ini


def run(*command: str, typed: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command], input=typed, env=ENVIRON, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pyramid(command: str, *arguments: str, typed: str = "") -> str:
    return run(f"pyramid.scripts.{command}", *arguments, typed=typed)


def prequest(ini: str, path: str) -> Any:
    return json.loads(ast.literal_eval(pyramid("prequest", ini, path)))  # It prints bytes.


@pytest.fixture(params=[False, True], ids=["bare", "moved"])
def sqlite_ini(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_ini(tmp_path, f"sqlite:///{tmp_path}/guests.db", request.param)


def test_the_commands_of_the_cookiecutter_work(sqlite_ini: Path) -> None:
    ini = str(sqlite_ini)
    run("alembic", "-c", ini, "upgrade", "head")
    run("guests.scripts.initialize_db", ini)
    assert prequest(ini, "/names") == {"names": ["initial"]}
    shell = "print(dbsession.query(models.Guest).count())\ndbsession.add(models.Guest(name='typed'))\ntm.commit()\n"
    assert "1" in pyramid("pshell", ini, typed=shell)
    assert prequest(ini, "/add/plain?name=asked")["guests"] == 3
    pyramid("pshell", ini, typed="dbsession.add(models.Guest(name='left'))\n")
    assert prequest(ini, "/names") == {"names": ["asked", "initial", "typed"]}
    assert "pyramid_tm.tm_tween_factory" in pyramid("ptweens", ini)


def test_the_commands_of_the_library_find_the_middleware(tmp_path: Path) -> None:
    ini = write_ini(tmp_path, f"sqlite:///{tmp_path}/guests.db", True)
    command = [sys.executable, "-c", "from sqlasession_middleware.cli import main; main()", "wait", str(ini)]
    done = subprocess.run(command, env=ENVIRON, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, ""), done


@contextmanager
def served(ini: Path) -> Iterator[int]:
    """gunicorn with threads, on a port that is returned."""
    port = free_port()
    control = ["--no-control-socket"] if gunicorn.version_info >= (25, 1) else []
    command = [sys.executable, "-m", "gunicorn", "--paste", str(ini), "--bind", f"127.0.0.1:{port}"]
    command += ["--worker-class", "gthread", "--threads", "4", "--graceful-timeout", "1", *control]
    with (ini.parent / f"{ini.stem}.log").open("wb") as log:
        process = subprocess.Popen(command, env=ENVIRON, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + PATIENCE
            while True:
                assert process.poll() is None, (ini.parent / f"{ini.stem}.log").read_text()
                try:
                    ask(port, "/nothing")
                    break
                except OSError:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            yield port
        finally:
            end_group(process)


def ask(port: int, path: str, method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def mixed() -> Iterator[str]:
    """200 paths: each way of adding, names that are taken, and reading."""
    for number in range(100):
        yield f"/add/{HOWS.split()[number % len(HOWS.split())]}?name=guest-{number // 2 if number % 5 == 0 else number}"
        yield "/names"


@contextmanager
def table(url: str) -> Iterator[None]:
    """The application's table, empty."""
    engine = create_engine(url, poolclass=NullPool)
    drop = text("DROP TABLE IF EXISTS site_guest")
    create = text("CREATE TABLE site_guest (id SERIAL PRIMARY KEY, name VARCHAR(80) NOT NULL UNIQUE)")
    with engine.begin() as connection:
        connection.execute(drop)
        connection.execute(create)
    try:
        yield
    finally:
        with engine.begin() as connection:
            connection.execute(drop)


def test_mixed_requests_are_answered_the_same(tmp_path: Path) -> None:
    """Also what is in the database afterwards; and no connection is left in a transaction."""
    url = DATABASES_SEEN.url("postgresql", "")
    assert make_url(url).get_backend_name() == "postgresql"
    answers: list[list[Any]] = []
    for moved in (False, True):
        with table(url), served(write_ini(tmp_path, url, moved, "deadline = 30")) as port:
            answers.append([ask(port, path) for path in mixed()])
            assert "idle in transaction" not in json.loads(ask(port, "/backends")[1])["states"]
    bare, moved_answers = answers
    assert len(bare) == 200
    assert {status for status, _ in bare} == {200, 302, 400, 404, 409, 500}
    assert moved_answers == bare


def test_an_outage_is_answered_with_503(tmp_path: Path) -> None:
    """The database stops for 3 s under load: with the one line and two options no request fails by a 500.

    The application has an exception view for every error, which makes a 500 of it.
    """
    with running(OwnPostgreSQL) as server:
        url = server.url.render_as_string(hide_password=False)
        with table(url), served(write_ini(tmp_path, url, True, "unavailable = true\ndeadline = 5")) as port:
            seen: list[tuple[float, int]] = []
            failed: list[bytes] = []
            stopping = threading.Event()

            def load(number: int) -> None:
                count = 0
                while not stopping.is_set():
                    count += 1
                    path = "/names" if count % 2 else f"/add/plain?name={number}-{count}"
                    status, body = ask(port, path)
                    seen.append((time.monotonic(), status))
                    if status == 500:
                        failed.append(body)

            def wait_for(status: int) -> None:
                """Wait until a request that begins now has a status."""
                since, deadline = time.monotonic(), time.monotonic() + PATIENCE
                while not any(when > since and found == status for when, found in list(seen)):
                    assert time.monotonic() < deadline, seen[-10:]
                    time.sleep(0.01)

            clients = [threading.Thread(target=load, args=(number,)) for number in range(4)]
            for client in clients:
                client.start()
            try:
                wait_for(200)
                server.stop(server.shutdown)
                down = time.monotonic()
                wait_for(503)
                time.sleep(max(0.0, down + 3 - time.monotonic()))  # It is what an outage is.
                server.start()
                wait_for(200)
            finally:
                stopping.set()
                for client in clients:
                    client.join()
        # A COMMIT that the server cuts short is no failure to be repeated: nobody knows whether it took place.
        assert [body for body in failed if b"It is not known whether your change was saved" not in body] == []
        assert {status for _, status in seen} - {500} == {200, 503}
