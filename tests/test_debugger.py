"""Werkzeug's interactive debugger around the middleware: its console is inside the failed request's application."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session
from werkzeug.debug import DebuggedApplication
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client, EnvironBuilder
from werkzeug.wrappers import Request, Response

from sqlasession_middleware import SQLASessionMiddleware, application, local, session


class BrokenError(Exception):
    """What the application under the debugger raises."""


class Body:
    """A body that fails in its ``close()``."""

    def __iter__(self) -> Iterator[bytes]:
        return iter([b"all"])

    def close(self) -> None:
        raise BrokenError("close()")


def prepare() -> None:
    local.user = "Ada"
    session.execute(text("INSERT INTO guests VALUES ('Nobody')"))


def fail_in_the_call(environ: Any, start_response: Any) -> Any:
    prepare()
    raise BrokenError("the call")


def fail_in_a_later_step(environ: Any, start_response: Any) -> Any:
    prepare()
    start_response("200 OK", [("Content-Type", "text/plain")])
    yield b"first"
    local.user += "!"
    yield b"second"
    raise BrokenError("a step")


@Request.application
def fail_in_a_step_of_werkzeugs(request: Request) -> Response:
    prepare()
    return Response((b"" if number else 1 // number for number in (2, 1, 0)), mimetype="text/plain")


def fail_in_close(environ: Any, start_response: Any) -> Any:
    prepare()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return Body()


FAILURES = [fail_in_the_call, fail_in_a_later_step, fail_in_a_step_of_werkzeugs, fail_in_close]


class Console:
    """The console under the innermost frame of the debugger's page, driven as its JavaScript does."""

    def __init__(self, debugger: DebuggedApplication, path: str = "/") -> None:
        self.client = Client(debugger, Response)
        page = self.client.get(path).get_data(as_text=True)
        self.secret = re.findall(r'SECRET = "(\w+)"', page)[0]
        self.frames = re.findall(r'id="frame-(\d+)"', page)

    def run(self, command: str, frame: int = -1) -> str:
        """What the command prints."""
        query = {"__debugger__": "yes", "cmd": command, "frm": self.frames[frame], "s": self.secret}
        response = self.client.get("/", query_string=query)
        assert response.status_code == 200
        printed = unescape(re.sub("<[^>]+>", "", response.get_data(as_text=True)))
        assert printed.startswith(f">>> {command}\n")
        return printed.removeprefix(f">>> {command}\n").strip()


@pytest.fixture
def wrap(tmp_path) -> Iterator[Callable[..., SQLASessionMiddleware]]:
    """Wraps an application on a SQLite file, with a table that has one row."""
    made: list[SQLASessionMiddleware] = []

    def wrap(app: Any, name: str = "test") -> SQLASessionMiddleware:
        made.append(SQLASessionMiddleware(app, f"sqlite:///{tmp_path}/{name}.db"))
        with made[-1].context():
            session.execute(text("CREATE TABLE guests (name VARCHAR)"))
            session.execute(text("INSERT INTO guests VALUES (:name)"), {"name": name})
            session.commit()
        return made[-1]

    yield wrap
    for app in made:
        app.dispose()


def debug(app: Any) -> DebuggedApplication:
    return DebuggedApplication(app, evalex=True, pin_security=False)


def assert_over(app: SQLASessionMiddleware) -> None:
    assert app.engine.pool.checkedout() == 0
    assert list(local) == []
    assert not application


@pytest.mark.parametrize("fail", FAILURES)
def test_console_is_inside_of_the_application_when_it_failed(fail, wrap) -> None:
    app = wrap(fail)
    console = Console(debug(app))
    assert_over(app)
    user = "'Ada!'" if fail is fail_in_a_later_step else "'Ada'"
    # The frame is not always one of this module, so what it needs is imported.
    for _ in range(2):
        for command, printed in [
            ("from sqlalchemy import text", ""),
            ("from sqlasession_middleware import application, local, session", ""),
            ("session.execute(text('SELECT 1')).scalar()", "1"),
            ("session.scalars(text('SELECT name FROM guests')).all()", "['test']"),
            (f"id(application._get_current_object()) == {id(app)}", "True"),
            ("local.user", user),
        ]:
            assert console.run(command) == printed
            assert_over(app)


@pytest.mark.parametrize("frame", [0, -1], ids=["outermost frame", "innermost frame"])
def test_console_is_inside_of_the_application_when_any_frame_is_asked(frame: int, wrap) -> None:
    app = wrap(fail_in_the_call)
    console = Console(debug(app))
    console.run("from sqlasession_middleware import local", frame)
    assert console.run("local.user", frame) == "'Ada'"
    assert_over(app)


@pytest.mark.parametrize("fail", FAILURES)
def test_console_is_inside_of_the_application_when_commands_run_in_other_threads(fail, wrap) -> None:
    app = wrap(fail)
    console = Console(debug(app))

    def run(command: str) -> str:
        printed = console.run(command)
        assert_over(app)
        return printed

    console.run("from sqlalchemy import text; from sqlasession_middleware import application, local, session")
    for command, printed in [
        ("session.scalar(text('SELECT count(*) FROM guests'))", "1"),
        (f"id(application._get_current_object()) == {id(app)}", "True"),
        ("local.user[:3]", "'Ada'"),
    ] * 2:
        # A thread of its own, as in a threaded server: it has seen neither the request nor the command before.
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(run, command).result() == printed
        assert_over(app)


def test_commands_share_nothing_when_they_run_at_once(wrap) -> None:
    app = wrap(fail_in_the_call)
    contexts: list[Any] = []
    environ = EnvironBuilder().get_environ()
    environ["werkzeug.debug.preserve_context"] = contexts.append
    with pytest.raises(BrokenError):
        app(environ, lambda *arguments: None)
    (context,) = contexts
    together = Barrier(2, timeout=30)

    def run(number: int) -> Session:
        with context:
            opened = session()
            local.number = number
            together.wait()
            assert opened.scalar(text("SELECT name FROM guests")) == "test"
            assert (local.number, local.user, session()) == (number, "Ada", opened)
            together.wait()
        assert list(local) == []
        return opened

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(run, (1, 2))
    assert one is not two
    assert_over(app)


def test_each_command_has_a_session_of_its_own_when_it_writes(wrap) -> None:
    """What a command commits stays; what it does not is rolled back, and holds no lock until the next one."""
    app = wrap(fail_in_the_call)
    console = Console(debug(app))
    insert = "session.execute(text(\"INSERT INTO guests VALUES ('{}')\")) and {}"
    assert console.run(insert.format("Bob", "session.commit()")) == ""
    assert console.run(insert.format("Eve", "None")) == ""
    assert_over(app)
    assert console.run("session.scalars(text('SELECT name FROM guests')).all()") == "['test', 'Bob']"


def test_connection_is_given_back_when_a_command_fails(wrap) -> None:
    app = wrap(fail_in_the_call)
    console = Console(debug(app))
    assert "ZeroDivisionError" in console.run("session.execute(text('SELECT 1')) and 1 / 0")
    assert_over(app)
    assert "no such table" in console.run("session.execute(text('SELECT * FROM nowhere'))")
    assert_over(app)
    assert console.run("session.execute(text('SELECT 1')).scalar()") == "1"


def test_each_console_is_inside_of_its_own_application_when_two_failed(wrap) -> None:
    apps = {f"/{name}": wrap(fail_in_the_call, name) for name in ("one", "two")}
    debugger = debug(DispatcherMiddleware(wrap(fail_in_the_call, "root"), apps))
    consoles = {mount: Console(debugger, mount) for mount in apps}
    for _ in range(2):
        for mount, app in apps.items():
            name = consoles[mount].run("session.scalar(text('SELECT name FROM guests'))")
            assert name == repr(mount.strip("/"))
            assert_over(app)


def test_console_is_inside_of_the_inner_application_when_two_are_stacked(wrap) -> None:
    """The page opens at the frame that raised, and that one is the inner application's."""
    inner = wrap(fail_in_the_call, "inner")
    outer = wrap(inner, "outer")
    console = Console(debug(outer))
    assert console.run("session.scalar(text('SELECT name FROM guests'))") == "'inner'"
    assert console.run("local.user") == "'Ada'"
    assert_over(inner)
    assert_over(outer)


def test_debugger_is_told_nothing_when_the_request_succeeds(wrap) -> None:
    app = wrap(Response("fine"))
    debugger = debug(app)
    assert Client(debugger, Response).get("/").get_data() == b"fine"
    assert debugger.frames == {}
    assert debugger.frame_contexts == {}
    assert_over(app)
