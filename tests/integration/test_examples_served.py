"""The examples on their servers, started by the commands that they show."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import gunicorn
import pytest
import requests

from ..ports import free_port
from .servers import PATIENCE, ROOT, end_group
from .test_preload import BAD_NEWS

EXAMPLES = ROOT / "examples"
SCRIPTS = sysconfig.get_path("scripts")

#: Each example's commands: they end, but for the last one, which serves.
COMMANDS = {
    "frameworks/flask_app.py": ["flask --app flask_app run --port 8000"],
    "frameworks/pyramid_app.py": ["waitress-serve --listen 127.0.0.1:8000 pyramid_app:app"],
    "frameworks/falcon_app.py": ["waitress-serve --listen 127.0.0.1:8000 falcon_app:app"],
    "frameworks/bottle_app.py": ["bottle --bind 127.0.0.1:8000 bottle_app:app"],
    "frameworks/django_app.py": ["python django_app.py runserver 8000"],
    "frameworks/webob_app.py": ["waitress-serve --listen 127.0.0.1:8000 webob_app:app"],
    "migrations/development.ini": [
        "alembic -c development.ini upgrade head",
        "sqlasession serve development.ini",
    ],
    "opentelemetry_app.py": ["waitress-serve --listen 127.0.0.1:8000 opentelemetry_app:app"],
}
EVENTS = [
    "waitress-serve --listen 127.0.0.1:8000 --threads 50 app:app",
    "gunicorn --bind 127.0.0.1:8000 --worker-class gthread --threads 50 app:app",
]
WEBSOCKETS = [
    "flask --app app run --port 8000",
    "gunicorn --bind 127.0.0.1:8000 --worker-class gthread --threads 50 app:app",
]
CLIENT = 'python client.py Hello "How are you?"'
DEPLOYED = {"gunicorn.conf.py": "gunicorn", "uwsgi.ini": "uwsgi uwsgi.ini"}


class Served:
    """An example in a folder of the test's own, on a free port instead of its own.

    :param example: the file that shows the commands.
    """

    def __init__(self, example: str, commands: list[str], folder: Path) -> None:
        shown = [line.strip("# ") for line in (EXAMPLES / example).read_text("utf-8").splitlines()]
        assert [command for command in commands if command in shown] == commands
        copied = shutil.copytree(
            EXAMPLES, folder / "examples", ignore=shutil.ignore_patterns("*.db", "__pycache__", ".*")
        )
        self.folder = (Path(copied) / example).parent
        self.port = free_port()
        for path in self.folder.glob("*.*"):
            path.write_text(self._on_free_port(path.read_text("utf-8")), "utf-8")
        self.command = self._on_free_port(" && ".join([*commands[:-1], f"exec {commands[-1]}"]))
        self.log = folder / "log"
        self.process: subprocess.Popen[bytes]

    def _on_free_port(self, text: str) -> str:
        return re.sub(r"\b8000\b", str(self.port), text)

    @property
    def environ(self) -> dict[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if name != "DATABASE_URL"},
            "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            # Its control socket has one place for all the user's servers.
            "GUNICORN_CMD_ARGS": "--no-control-socket" if gunicorn.version_info >= (25, 1) else "",
            # As in an environment that is activated.
            "UWSGI_HOME": sys.prefix,
        }

    def start(self) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                ["sh", "-c", self.command],
                cwd=self.folder,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                self.ask()
            except HTTPError:
                return
            except (URLError, ConnectionError):
                pass
            else:
                return
            time.sleep(0.02)
        raise RuntimeError(f"{shlex.quote(self.command)} does not answer")

    def ask(self, **form: str) -> str:
        """What ``/`` answers, to a POST where a form is given."""
        body = urlencode(form).encode() if form else None
        with urlopen(f"http://127.0.0.1:{self.port}/", body, timeout=PATIENCE) as answer:
            text: str = answer.read().decode()
            return text

    def run(self, command: str) -> str:
        """What a command says that ends by itself."""
        done = subprocess.run(
            ["sh", "-c", command], cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def stop(self) -> None:
        """End it and all of its processes."""
        end_group(self.process)


@contextmanager
def served(example: str, commands: list[str], folder: Path) -> Iterator[Served]:
    server = Served(example, commands, folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        print(server.log.read_text(errors="replace"))


@pytest.mark.parametrize("example", COMMANDS)
def test_example_answers_when_it_is_started_as_it_says(example: str, tmp_path: Path) -> None:
    with served(example, COMMANDS[example], tmp_path) as server:
        if example == "opentelemetry_app.py":
            assert "Visit number 2" in server.ask()  # start() was the first.
        else:
            server.ask(name="tea")
            assert "tea" in server.ask()
    assert not re.search("Traceback|Error", server.log.read_text(errors="replace"))


@pytest.mark.parametrize("command", EVENTS, ids=["waitress", "gunicorn"])
def test_event_arrives_when_another_reader_writes(command: str, tmp_path: Path) -> None:
    with (
        served("events/app.py", [command], tmp_path) as server,
        closing(HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)) as client,
    ):
        client.request("GET", "/events")
        with client.getresponse() as answer:
            assert answer.readline() == b": waiting\n"
            assert server.ask(text="Hello") == ""
            lines = []
            while len(lines) < 2:
                line = answer.readline()
                assert line
                lines += [line] if line.startswith((b"id", b"data")) else []
            assert lines == [b"id: 1\n", b'data: "Hello"\n']
        assert "<h1>Messages</h1>" in server.ask()
    assert "Traceback" not in server.log.read_text(errors="replace")


@pytest.mark.parametrize("command", WEBSOCKETS, ids=["flask", "gunicorn"])
def test_messages_are_stored_when_they_come_by_websocket(command: str, tmp_path: Path) -> None:
    assert CLIENT in (EXAMPLES / "websockets/client.py").read_text("utf-8")
    with served("websockets/app.py", [command], tmp_path) as server:
        for count in (0, 2):
            said = [f"Message {count + more} is stored. There were {count} when you came." for more in (1, 2)]
            assert server.run(CLIENT).splitlines() == said
        assert server.ask().splitlines() == ["Hello", "How are you?"] * 2
    assert not re.search("Traceback|ERROR|WARNING sql", server.log.read_text(errors="replace"))


GUNICORN = "gunicorn --bind 127.0.0.1:8000 --threads 4 app:app"


def exchange(server: Served, method: str, path: str, **sent: Any) -> tuple[int, Any]:
    """Send a request, and return the status and the JSON of the answer."""
    answer = requests.request(method, f"http://127.0.0.1:{server.port}{path}", timeout=PATIENCE, **sent)
    return answer.status_code, answer.json()


def test_documents_are_uploaded_counted_and_listed_by_the_json_api(tmp_path: Path) -> None:
    with served("json_api/app.py", [GUNICORN], tmp_path) as server:
        files = {"file": ("tea.txt", b"tea and milk")}
        first = {"id": 1, "name": "tea.txt", "words": None}
        assert exchange(server, "POST", "/documents", files=files) == (202, first)
        deadline = time.monotonic() + PATIENCE
        while exchange(server, "GET", "/documents/1") == (200, first) and time.monotonic() < deadline:
            time.sleep(0.02)  # The job is done in its own time.
        assert exchange(server, "GET", "/documents/1") == (200, {**first, "words": 3})
        taken = exchange(server, "POST", "/documents", files=files)
        assert taken == (409, {"error": "There is a document of that name."})
        long = exchange(server, "POST", "/documents", files={"file": ("long.txt", b"x" * 60_000)})
        assert long[0] == 413
        assert "capacity limit" in long[1]["error"]
        assert exchange(server, "POST", "/documents")[0] == 400
        nameless = exchange(server, "POST", "/documents", files={"file": ("../..", b"x")})
        assert nameless == (400, {"error": "The file has no name."})
        for path in ("/documents/2", "/documents/99999999999999999999", "/documents?page=2", "/documents?page=x", "/"):
            status, answer = exchange(server, "GET", path)
            assert (status, list(answer)) == (404, ["error"])
        assert exchange(server, "GET", "/documents") == (200, {"documents": [{**first, "words": 3}], "next_page": None})
    assert not re.search("Traceback|Error", server.log.read_text(errors="replace"))


def test_both_databases_are_written_or_neither(tmp_path: Path) -> None:
    with served("two_databases/app.py", [GUNICORN], tmp_path) as server:
        for sent, status in (
            ({"product": "tea", "pieces": 2}, 200),
            ({"product": "tea", "pieces": 9}, 409),
            ({"product": "milk", "pieces": 1}, 409),
            ({"product": "tea", "pieces": -1}, 409),
            ({"product": "tea"}, 400),
            ({"product": "tea", "pieces": 10**30}, 400),
            ({"product": "tea\0", "pieces": 1}, 400),
            ({"product": "\ud800", "pieces": 1}, 400),
            ([], 400),
        ):
            answer = requests.post(f"http://127.0.0.1:{server.port}/sales", json=sent, timeout=PATIENCE)
            assert answer.status_code == status
        for body in ('{"product": "tea", "pieces": 1e400}', '{"product": "tea", "pieces": NaN}', "tea"):
            answer = requests.post(f"http://127.0.0.1:{server.port}/sales", data=body, timeout=PATIENCE)
            assert answer.status_code == 400
        assert exchange(server, "GET", "/sales") == (200, {"stock": {"tea": 8}, "sold": {"tea": 2}})
        assert (server.folder / "audit.db").exists()
    assert not re.search("Traceback|Error", server.log.read_text(errors="replace"))


def test_pipeline_finds_accounts_before_the_application_is_called(tmp_path: Path) -> None:
    commands = ["sqlasession create site.ini", "gunicorn --bind 127.0.0.1:8000 --threads 4 --paste site.ini"]
    with served("pipeline/site.ini", commands, tmp_path) as server, requests.Session() as browser:
        url, ada = f"http://127.0.0.1:{server.port}/", ("ada", "secret")
        assert browser.get(url, timeout=PATIENCE).status_code == 401
        assert browser.get(url, auth=ada, timeout=PATIENCE).text == "ada, visit 1\n"
        assert browser.post(url, {"text": "Hello"}, auth=ada, timeout=PATIENCE).text == "ada, visit 2\nHello\n"
        assert browser.get(url, auth=("ada", "guessed"), timeout=PATIENCE).status_code == 401
        assert browser.post(url, {"text": ""}, auth=("bea", "x"), timeout=PATIENCE).status_code == 400
        for sent in ({"data": {"text": "a\0b"}}, {"files": {"text": ("a", b"b")}}, {"json": {"text": "a"}}):
            assert browser.post(url, auth=ada, timeout=PATIENCE, **sent).status_code == 400
        for login in ("", "a" * 41, "a\0"):
            assert browser.get(url, auth=(login, "x"), timeout=PATIENCE).status_code == 401
        assert browser.get(url, auth=ada, timeout=PATIENCE).text == "ada, visit 3\nHello\n"
    assert not re.search("Traceback|Error", server.log.read_text(errors="replace"))


@pytest.mark.parametrize("example", DEPLOYED)
def test_guestbook_is_served_by_two_processes_when_deployed(example: str, tmp_path: Path) -> None:
    with served(f"deployment/{example}", [DEPLOYED[example]], tmp_path) as server:
        assert "Ada was here" in server.ask(name="Ada", message="Ada was here")
        assert "Ada was here" in server.ask()
    log = server.log.read_text(errors="replace")
    assert len(re.findall("Booting worker|spawned uWSGI worker", log)) == 2
    assert BAD_NEWS.findall(log) == []
