"""Which tests stay together when pytest-xdist runs them in several processes: ``pytest -n 4``.

A plugin, loaded by the ``conftest.py`` at the root.
"""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

#: Slow files that are split: the part of a test's name that identifies its group. A group shares its servers.
DIVIDED = {
    "tests/integration/test_contention.py": re.compile(r"::\w+"),
    "tests/integration/test_event_streams.py": re.compile(r"::\w+"),
    "tests/integration/test_pgbouncer.py": re.compile(r"::test_the_tests_of_transactions_pass.*"),
    "tests/integration/test_servers.py": re.compile(r"\[[a-z0-9]+(-sync|-gthread|-gevent)?"),
    "tests/integration/test_truth.py": re.compile(r"\[\w+-[a-z0-9]+(-gthread)?"),
    "tests/test_transaction_table.py": re.compile(r"\[\w+"),
}
#: Slow tests, which start early so that the run does not end waiting for them.
EARLY = ("tests/integration/", "tests/test_transaction_table.py")


def together(nodeid: str) -> str:
    """Return the name of a test's group. One process runs the tests of a group, in order.

    A group is a file or a part of one: its tests share servers, and a page of the documentation is run from top to
    bottom.
    """
    file = nodeid.partition("::")[0]
    found = file in DIVIDED and DIVIDED[file].search(nodeid)
    return f"{file} {found[0]}" if found else file


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        # Coverage is measured in the processes that run the tests, not in servers that these start: some are killed.
        os.environ.pop("COVERAGE_PROCESS_CONFIG", None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not item.nodeid.startswith(EARLY))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return together(nodeid)

    # Start early groups first, not the largest.
    config.option.loadscopereorder = False
    return Together(config, log)
