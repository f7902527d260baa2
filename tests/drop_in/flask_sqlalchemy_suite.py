"""Runs Flask-SQLAlchemy's own tests with this library's class in place of theirs.

.. code-block:: console

    $ python tests/drop_in/flask_sqlalchemy_suite.py dist/*.whl

The sdist with the tests is downloaded into a temporary folder, and the wheel, or the checkout, is installed into a
virtual environment there. Nothing of it is kept. In that environment this module is a plugin of pytest: a test of
:data:`DIFFERENT` has to fail, and any other one to pass.

It imports nothing of this folder, because it is run without the project's own tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FLASK_SQLALCHEMY = "Flask-SQLAlchemy==3.1.1"
#: With newer versions of SQLAlchemy a part of their tests fails without this library as well.
REQUIREMENTS = [FLASK_SQLALCHEMY, "SQLAlchemy < 2.1", "pytest >= 8"]
#: How many have to pass at least.
PASSING = 440

ENGINES = "Engines are engines"
#: The tests that fail, with the entry of the guide that gives the reason; None for those that fail with theirs as well.
DIFFERENT: dict[str, str | None] = {
    "test_engine.py::test_sqlite_memory_defaults": ENGINES,
    "test_engine.py::test_mysql_defaults": ENGINES,
    # SQLAlchemy 2.0.44 and later: "ORM Annotated Dataclasses do not support a pre-existing '__table__'".
    "test_model_bind.py::test_explicit_table[db2]": None,
    "test_model_bind.py::test_explicit_table[db4]": None,
}


class Suite:
    """The plugin's hooks."""

    def __init__(self) -> None:
        self.passed = 0

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        import pytest

        unused = set(DIFFERENT)
        for item in items:
            name = item.nodeid.removeprefix("tests/")
            for listed in (name, name.partition("[")[0]):
                if listed in DIFFERENT:
                    unused.discard(listed)
                    item.add_marker(pytest.mark.xfail(reason=DIFFERENT[listed] or "fails bare", strict=True))
        if unused:
            raise pytest.UsageError(f"these tests are listed and do not exist: {sorted(unused)}")

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.passed += report.when == "call" and report.passed and not hasattr(report, "wasxfail")

    def pytest_sessionfinish(self, session: Any) -> None:
        if self.passed < PASSING:
            print(f"\n{self.passed} tests passed, and there have to be {PASSING}.")
            session.exitstatus = 1


def pytest_configure(config: Any) -> None:
    """Put the class in place before the tests import it."""
    import flask_sqlalchemy

    from sqlasession_middleware.flask_sqlalchemy import SQLAlchemy

    flask_sqlalchemy.SQLAlchemy = SQLAlchemy
    config.pluginmanager.register(Suite())


def main(package: str) -> int:
    """Download, install and run.

    :param package: the wheel or the checkout to test.
    :returns: the exit status of pytest.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        python = folder / "venv" / "bin" / "python"
        pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", package, *REQUIREMENTS], check=True)
        sdist = ["download", "--no-deps", "--no-binary", ":all:", "--dest", folder, FLASK_SQLALCHEMY]
        subprocess.run([*pip, *sdist], check=True)
        [archive] = folder.glob("*.tar.gz")
        subprocess.run(["tar", "--extract", "--file", archive, "--directory", folder], check=True)
        [theirs] = (path.parent for path in folder.glob("*/tests"))
        paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        command = [python, "-m", "pytest", "-q", "-p", Path(__file__).stem, "-p", "no:cacheprovider", "tests"]
        return subprocess.run(command, cwd=theirs, env={**os.environ, "PYTHONPATH": paths}).returncode


if __name__ == "__main__":
    sys.exit(main(os.path.abspath(sys.argv[1])))
