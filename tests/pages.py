"""Runs what the documentation's pages show, as their reader would: files are written, commands typed, outputs compared.

Each page has a folder of its own, in which it begins.

A block with a ``:caption:`` is a file of that name, in the folder in which the page's commands are by then.

A ``console`` block has a command behind each ``$``, which has to exit with 0. If there are lines below it, they are
what it has to say; ``...`` stands for anything, as in doctests. Behind ``>>>`` is what it is told. What ``cd`` and
``export`` do lasts until the end of the page, and so does a server, unless the next one is started before.

The port 8080 is a free one in all of that.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, OutputChecker
from doctest import Example as Expected
from pathlib import Path
from typing import Any

from paste.deploy import loadapp
from sybil import Example
from sybil.evaluators.python import PythonEvaluator

from sqlasession_middleware.paste import collected

from .ports import free_port

SHOWN_PORT = "8080"
#: Commands that run until they are stopped.
SERVERS = ("sqlasession serve", "gunicorn", "waitress-serve")
FLAGS = ELLIPSIS | NORMALIZE_WHITESPACE
#: bash: what a command changes of its surroundings is there for the next one.
IN_THE_SAME_SHELL = """
[ ! -e "$STATE" ] || . "$STATE"
cd "$PWD"
{command}
status=$?
export -p >"$STATE"
pwd >"$STATE.folder"
exit $status
"""

run_python = PythonEvaluator()


class Page:
    """The folder of a page, and the shell that is open in it."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="page-")).resolve()
        self.folder = self.root / "begin"
        self.folder.mkdir()
        self.server: subprocess.Popen[str] | None = None
        self.port = str(free_port())
        # This pytest's own settings are not the reader's, and curl's progress is not shown on a terminal.
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        self.environment.update(
            PATH=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]),
            PYTHONUNBUFFERED="1",
            STATE=str(self.root / "state"),
            CURL_HOME=str(self.root),
        )
        (self.root / ".curlrc").write_text("silent\nshow-error\n")

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace(SHOWN_PORT, self.port), encoding="utf-8")
        return path

    def type(self, command: str, shown: str) -> str | None:
        """Run a command.

        :returns: what is wrong with what came of it.
        """
        said = "".join(re.findall(r"^>>> (.*\n)", shown, re.MULTILINE))
        # What is typed is not echoed by a pipe.
        expected = Expected(command, re.sub(r"^>>> .*\n", ">>> ", shown, flags=re.MULTILINE))
        is_server = command.startswith(SERVERS)
        if is_server:
            self.stop()
        process = subprocess.Popen(
            ["bash", "-c", IN_THE_SAME_SHELL.replace("{command}", command)],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        if is_server:
            self.server = process
            came = ""
            assert process.stdout is not None
            while not OutputChecker().check_output(expected.want, came, FLAGS):
                line = process.stdout.readline()
                if not line:
                    break
                came += line
            else:
                return None
        else:
            came, _ = process.communicate(said)
            if process.returncode:
                return f"$ {command}\nexited with {process.returncode}, and said:\n{came}"
            self.folder = Path(Path(self.environment["STATE"] + ".folder").read_text().rstrip("\n"))
            if not expected.want.strip() or OutputChecker().check_output(expected.want, came, FLAGS):
                return None
        return f"$ {command}\n{OutputChecker().output_difference(expected, came, FLAGS)}"

    def stop(self) -> None:
        """Stop the server."""
        if self.server is not None:
            os.killpg(self.server.pid, signal.SIGTERM)
            self.server.communicate()
            self.server = None


def page_of(example: Example) -> Page:
    page = example.namespace.get("_page")
    if page is None:
        page = example.namespace["_page"] = Page()
    return page


def close_page(namespace: dict[str, Any]) -> None:
    """Sybil's teardown."""
    page = namespace.get("_page")
    if page is not None:
        page.stop()
        shutil.rmtree(page.root)


def evaluate_python(example: Example) -> None:
    """Write a file, or run it."""
    if not write_file(example):
        run_python(example)


def write_file(example: Example) -> bool:
    """Write a file, if the block has a name."""
    name = example.region.lexemes["options"].get("caption")
    if name:
        page_of(example).write(name, example.parsed)
    return bool(name)


def evaluate_file(example: Example) -> None:
    """Write a file, if the block has a name; it is not to be run."""
    write_file(example)


def evaluate_ini(example: Example) -> None:
    """Write a file, if the block has a name. Otherwise load it: ``app`` is its application, and ``applications`` are
    the middleware that ``egg:sqlasession_middleware`` stands for in it."""
    if write_file(example):
        return
    path = page_of(example).write("shop.ini", example.parsed)
    with collected() as applications:
        example.namespace["app"] = loadapp(f"config:{path}")
    example.namespace["applications"] = applications
    assert applications, "no 'use = egg:sqlasession_middleware' is part of it"


def evaluate_console(example: Example) -> str | None:
    page = page_of(example)
    for entry in re.split(r"^\$ ", str(example.parsed), flags=re.MULTILINE)[1:]:
        command, _, shown = entry.replace(SHOWN_PORT, page.port).partition("\n")
        problem = page.type(command, shown)
        if problem:
            return problem
    return None
