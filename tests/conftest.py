"""Databases to test on, and a plain word at the end about which of them were."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from sqlalchemy import Engine, create_engine, text

from sqlasession_middleware.context import NOTHING, current

#: Where the tests look for a server; a URL in the environment comes first.
SERVERS = {
    "postgresql": os.environ.get("TEST_POSTGRESQL_URL", "postgresql+psycopg://postgres@127.0.0.1:5432/test"),
    "mariadb": os.environ.get("TEST_MARIADB_URL", "mariadb+pymysql://root@127.0.0.1:3306/test"),
}
DATABASES = ("sqlite", *SERVERS)

# No test is timed: a busy machine is slow, and not wrong.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@dataclass
class Databases:
    """Which databases answer, asked once per run."""

    ran: set[str] = field(default_factory=set)
    missing: dict[str, str] = field(default_factory=dict)
    answered: set[str] = field(default_factory=set)

    def url(self, name: str, sqlite_url: str) -> str:
        if name == "sqlite":
            self.ran.add(name)
            return sqlite_url
        if name not in self.missing and name not in self.answered:
            engine = create_engine(SERVERS[name])
            try:
                with engine.connect() as connection:
                    connection.execute(text("SELECT 1"))
                self.answered.add(name)
            except Exception as error:
                self.missing[name] = str(error).splitlines()[0]
            finally:
                engine.dispose()
        if name in self.missing:
            if os.environ.get("CI"):
                pytest.fail(f"{name} is not reachable and CI is set: {self.missing[name]}")
            pytest.skip(f"{name} is not reachable")
        self.ran.add(name)
        return SERVERS[name]


DATABASES_SEEN = Databases()


@pytest.fixture
def sqlite_url(tmp_path) -> str:
    """A SQLite file of the test's own."""
    return f"sqlite:///{tmp_path}/test.db"


@pytest.fixture
def sqlite_engine(sqlite_url) -> Iterator[Engine]:
    """An engine on a SQLite file of the test's own."""
    engine = create_engine(sqlite_url)
    yield engine
    engine.dispose()


@pytest.fixture(params=DATABASES)
def database_url(request, sqlite_url) -> str:
    """The URL of each database in turn. The database is shared: a test cleans up its tables."""
    return DATABASES_SEEN.url(request.param, sqlite_url)


@pytest.fixture(params=tuple(SERVERS))
def server_url(request, sqlite_url) -> str:
    """The URL of each database server in turn, for what SQLite cannot show."""
    return DATABASES_SEEN.url(request.param, sqlite_url)


@pytest.fixture(autouse=True)
def clean_local() -> Iterator[None]:
    """Every test begins with an empty Local, and leaves one behind."""
    current.set(NOTHING)
    yield
    left = dict(current.get(NOTHING))
    current.set(NOTHING)
    assert not left, f"left on the Local: {left}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("databases")
    for name in DATABASES:
        if name in DATABASES_SEEN.missing:
            terminalreporter.line(f"{name}: NOT tested, not reachable: {DATABASES_SEEN.missing[name]}")
        else:
            terminalreporter.line(f"{name}: {'tested' if name in DATABASES_SEEN.ran else 'not used by these tests'}")
