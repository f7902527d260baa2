"""Makes a TurboGears application, applies the changes of ``docs/from_turbogears.rst``, and runs its own tests.

.. code-block:: console

    $ python tests/drop_in/turbogears_quickstart.py .

The argument is the wheel or the checkout. All of it is in a temporary folder, with a virtual environment of its own
and nothing is kept. The tests have to pass before the changes and after them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from tempfile import TemporaryDirectory

PAGE = Path(__file__).parents[2] / "docs" / "from_turbogears.rst"
#: With what the application that is made imports, and its tests.
REQUIREMENTS = [
    "tg.devtools==2.5.1",
    "setuptools < 81",
    "wheel",
    "SQLAlchemy",
    "zope.sqlalchemy",
    "repoze.who >= 3.2.0rc1",
]
REQUIREMENTS += ["Beaker", "Kajiki", "WebHelpers2", "Babel", "WebTest", "alembic", "pytest", "tgext.admin", "sprox"]
#: How many tests there have to be at least.
PASSING = 20
DIFF = re.compile(r"\.\. code-block:: diff\n\n((?: {4}.*\n|\n)+)")


def changes() -> str:
    """The diffs of the page. An empty line is one of the context."""
    found = [textwrap.dedent(block).rstrip("\n").split("\n") for block in DIFF.findall(PAGE.read_text())]
    return "".join(f"{line or ' '}\n" for lines in found for line in lines)


def main(package: str) -> int:
    with TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        python = folder / "venv" / "bin" / "python"
        pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", package, *REQUIREMENTS], check=True)
        make = [folder / "venv" / "bin" / "gearbox", "quickstart", "--auth", "--sqlalchemy", "guestbook"]
        subprocess.run(make, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        app = folder / "guestbook"
        subprocess.run([*pip, "install", "--no-deps", "--no-build-isolation", "--editable", app], check=True)
        for how in ("bare", "moved"):
            if how == "moved":
                patch = ["patch", "--strip=1", "--fuzz=0", "--quiet"]
                subprocess.run(patch, cwd=app, input=changes(), text=True, check=True)
            command = [python, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "guestbook/tests"]
            done = subprocess.run(command, cwd=app, stdout=subprocess.PIPE, text=True, env={**os.environ, "CI": ""})
            passed = re.search(r"(\d+) passed", done.stdout)
            if done.returncode or passed is None or int(passed[1]) < PASSING:
                print(done.stdout)
                return 1
            print(f"TurboGears' quickstart, {how}: {passed[1]} tests pass")
    return 0


if __name__ == "__main__":
    sys.exit(main(os.path.abspath(sys.argv[1])))
