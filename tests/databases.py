"""The databases to test on, one on each server for each test process, and a summary of those that were tested.

A plugin, loaded by the ``conftest.py`` at the root.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlalchemy import URL, NullPool, create_engine, make_url, text

# PyMySQL loads the system's certificates for each connection, which is slow: it takes twenty times as long as the rest.
# An empty file avoids that, also in servers that the tests start.
os.environ.setdefault("SSL_CERT_FILE", os.devnull)

#: The URLs of the servers to test on; a URL in the environment takes precedence.
GIVEN = {
    "postgresql": os.environ.get("TEST_POSTGRESQL_URL", "postgresql+psycopg://postgres@127.0.0.1:5432/test"),
    "mariadb": os.environ.get("TEST_MARIADB_URL", "mariadb+pymysql://root@127.0.0.1:3306/test"),
}
#: The name of this test process, such as "gw0", and the id of its run, because several runs may share a server. Both
#: are empty without pytest-xdist.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", "")[:8]


def own(url: str) -> str:
    """The database of this process: the given one, or with several processes a database of its own, "test_gw0_…"."""
    if not WORKER:
        return url
    named = make_url(url)
    return named.set(database=f"{named.database}_{WORKER}_{RUN}").render_as_string(hide_password=False)


SERVERS = {name: own(url) for name, url in GIVEN.items()}
DATABASES = ("sqlite", *SERVERS)


@dataclass
class Databases:
    """Which databases answer. Each process asks once."""

    ran: set[str] = field(default_factory=set)
    missing: dict[str, str] = field(default_factory=dict)
    answered: set[str] = field(default_factory=set)

    def url(self, name: str, sqlite_url: str) -> str:
        if name == "sqlite":
            self.ran.add(name)
            return sqlite_url
        if name not in self.missing and name not in self.answered:
            try:
                self._ask(name)
                self.answered.add(name)
            except Exception as error:
                self.missing[name] = str(error).splitlines()[0]
        if name in self.missing:
            if os.environ.get("CI"):
                pytest.fail(f"{name} is not reachable and CI is set: {self.missing[name]}")
            pytest.skip(f"{name} is not reachable")
        self.ran.add(name)
        return SERVERS[name]

    def _ask(self, name: str) -> None:
        if WORKER:
            administer(name, f"CREATE DATABASE {quoted(name)}")
        else:
            administer(name, "SELECT 1")

    def drop(self) -> None:
        """Drop this process's databases."""
        if WORKER:
            for name in self.answered:
                administer(name, drop(name))

    def update(self, other: dict[str, Any]) -> None:
        """Add the results of another process."""
        self.ran.update(other["ran"])
        self.missing.update(other["missing"])


def administer(name: str, *statements: str) -> None:
    """Execute statements in the given database, not in the one of this process."""
    engine = create_engine(GIVEN[name], poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in statements:
            connection.execute(text(statement))


def quoted(name: str) -> str:
    url: URL = make_url(SERVERS[name])
    return url.get_dialect()().identifier_preparer.quote_identifier(str(url.database))


def drop(name: str) -> str:
    return f"DROP DATABASE IF EXISTS {quoted(name)}{' WITH (FORCE)' if name == 'postgresql' else ''}"


DATABASES_SEEN = Databases()


def pytest_sessionfinish(session: pytest.Session) -> None:
    DATABASES_SEEN.drop()
    if WORKER:
        seen = {"ran": sorted(DATABASES_SEEN.ran), "missing": DATABASES_SEEN.missing}
        session.config.workeroutput["databases"] = seen  # type: ignore[attr-defined]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    """Add the results of a process of pytest-xdist that has ended; a crashed one reports nothing."""
    DATABASES_SEEN.update(getattr(node, "workeroutput", {}).get("databases", {"ran": (), "missing": {}}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("databases")
    for name in DATABASES:
        if name in DATABASES_SEEN.missing:
            terminalreporter.line(f"{name}: NOT tested, not reachable: {DATABASES_SEEN.missing[name]}")
        else:
            terminalreporter.line(f"{name}: {'tested' if name in DATABASES_SEEN.ran else 'not used by these tests'}")
