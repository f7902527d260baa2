"""Runs the examples of the documentation's pages as a reader would: writes files, runs commands, compares outputs.

Each page has a folder of its own as its working directory.

A block with a ``:caption:``, also of YAML or a Dockerfile, is a file of that name, in the folder that is
current at that point.

A ``console`` block has a command after each ``$``, which has to exit with 0. Lines below a command are the expected
output; ``...`` stands for anything, as in doctests. The text after ``>>>`` is the input. The effects of ``cd`` and
``export`` last until the end of the page, and so does a server, unless the page starts another one.

The port 8080 is replaced by a free port everywhere.
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
#: bash: changes to environment and folder persist.
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
    """The folder of a page, and the state of its shell."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="page-")).resolve()
        self.folder = self.root / "begin"
        self.folder.mkdir()
        self.server: subprocess.Popen[str] | None = None
        self.port = str(free_port())
        # A reader does not have pytest's own settings, and on a terminal curl does not show its progress.
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

        :returns: a description of the problem; None if there is none.
        """
        said = "".join(re.findall(r"^>>> (.*\n)", shown, re.MULTILINE))
        # Input through a pipe is not echoed.
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
    """Stop the page's server and remove its folder: Sybil's teardown."""
    page = namespace.get("_page")
    if page is not None:
        page.stop()
        shutil.rmtree(page.root)


def evaluate_python(example: Example) -> None:
    """Write a file if the block has a caption; otherwise run the block."""
    if not write_file(example):
        run_python(example)


def write_file(example: Example) -> bool:
    """Write a file, if the block has a caption."""
    name = example.region.lexemes["options"].get("caption")
    if name:
        page_of(example).write(name, example.parsed)
    return bool(name)


def evaluate_file(example: Example) -> None:
    """Write a file, if the block has a caption. The block is not run."""
    write_file(example)


def evaluate_ini(example: Example) -> None:
    """Write a file, if the block has a caption. Otherwise load it: ``app`` is its application, and ``applications`` are
    the middleware of its sections with ``egg:sqlasession_middleware``."""
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
