"""Runs the tests of the packages that this library takes the place of, with the library in their place.

.. code-block:: console

    $ python tests/drop_in/pyramid_suites.py
    $ python tests/drop_in/pyramid_suites.py pyramid_tm

Their sdists are downloaded into a temporary folder, and nothing of them is kept. A test that fails without being listed
here, and one that is listed and passes, is a failure.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Suite:
    """The tests of one package.

    :param requirement: the package and its version, as pip takes it.
    :param plugin: the module in this folder that has the library take the package's place.
    :param folder: of the sdist, where the tests are run.
    :param needs: what they need beside the test dependencies of this library. It is installed into the folder.
    :param prepare: called with the folder.
    :param tests: pytest's arguments: those tests that are about behaviour, and not about the package's own functions.
    :param at_least: how many of them have to be there.
    :param differences: the tests that fail, each with the reason that the guide names.
    :param title: its name, if it is not the package's.
    """

    requirement: str
    tests: Sequence[str]
    at_least: int
    plugin: str = ""
    folder: str = "."
    needs: Sequence[str] = ()
    prepare: Callable[[Path], None] = lambda folder: None
    differences: Mapping[str, str] = field(default_factory=dict)

    title: str = ""

    @property
    def name(self) -> str:
        return self.title or self.requirement.partition("==")[0]


def install_wiki2(folder: Path) -> None:
    """Have PasteDeploy find the tutorial's application, as pip would."""
    metadata = folder / "tutorial.egg-info"
    metadata.mkdir()
    (metadata / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: tutorial\nVersion: 0.0\n")
    (metadata / "entry_points.txt").write_text("[paste.app_factory]\nmain = tutorial:main\n")


def move_wiki2(folder: Path) -> None:
    """Move the tutorial's application by the one line: it takes the place of all that ``includeme()`` does."""
    install_wiki2(folder)
    models = folder / "tutorial" / "models" / "__init__.py"
    before, definition, _ = models.read_text().partition("def includeme(config):\n")
    models.write_text(f'{before}{definition}    config.include("sqlasession_middleware.pyramid")\n')


#: The last step of Pyramid's tutorial "SQLAlchemy + URL dispatch wiki", which is made of the cookiecutter.
WIKI2: dict[str, Any] = {
    "requirement": "pyramid==2.1",
    "tests": ["tests"],
    "at_least": 27,
    "folder": "docs/tutorials/wiki2/src/tests",
    "needs": ["bcrypt", "pyramid_jinja2", "zope.deprecation"],
}

SUITES = (
    Suite("pyramid_tm==2.6", ["tests/test_it.py::TestIntegration"], 17, "pyramid_in_place"),
    Suite("pyramid_retry==2.1.1", ["tests/test_it.py"], 17, "pyramid_in_place"),
    Suite(**WIKI2, prepare=install_wiki2, title="wiki2-bare"),
    Suite(**WIKI2, prepare=move_wiki2, title="wiki2-moved"),
)


def download(requirement: str, folder: Path) -> Path:
    """Return the folder of the package's sources."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary", ":all:", "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], check=True)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    sdist.unlink()
    (sources,) = folder.iterdir()
    return sources


def run(suite: Suite, sources: Path) -> Mapping[str, bool]:
    """Return the names of the tests, and whether each has passed."""
    sources = sources / suite.folder
    suite.prepare(sources)
    if suite.needs:
        needs = ["--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(sources / "needs")]
        subprocess.run([sys.executable, "-m", "pip", "install", *needs, *suite.needs], check=True)
    report = sources / "report.xml"
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "junit_family=xunit1"]
    options += ["-p", suite.plugin] if suite.plugin else []
    # Their warnings are theirs.
    options += ["-W", "ignore", "--override-ini=filterwarnings=", "--rootdir", str(sources), f"--junit-xml={report}"]
    paths = [str(HERE), str(HERE.parent.parent), str(sources), str(sources / "needs")]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", *options, *suite.tests]
    done = subprocess.run(command, cwd=sources, env=environ, stdout=subprocess.PIPE, text=True, check=False)
    if not report.exists():
        raise SystemExit(f"{suite.name}: pytest has failed:\n{done.stdout}")
    passed = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        passed[name] = case.find("failure") is None and case.find("error") is None
    if not all(passed[name] or name in suite.differences for name in passed):
        print(done.stdout)
    return passed


def complaints(suite: Suite, passed: Mapping[str, bool]) -> list[str]:
    """What is not as it is listed."""
    found = [
        f"{name} fails, and is not listed." for name in passed if not passed[name] and name not in suite.differences
    ]
    found += [f"{name} is listed, and passes." for name in suite.differences if passed.get(name, False)]
    found += [f"{name} is listed, and is not there." for name in suite.differences if name not in passed]
    if len(passed) < suite.at_least:
        found.append(f"{len(passed)} tests are there, instead of {suite.at_least} or more.")
    return found


def main(names: Sequence[str]) -> int:
    unexpected = 0
    for suite in SUITES:
        if names and suite.name not in names:
            continue
        with TemporaryDirectory() as folder:
            passed = run(suite, download(suite.requirement, Path(folder)))
        for complaint in complaints(suite, passed):
            unexpected += 1
            print(f"{suite.name}: {complaint}")
        print(f"{suite.name}, {suite.requirement}: {sum(passed.values())} of {len(passed)} tests pass")
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
