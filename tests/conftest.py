"""Fixtures: a database to test on, and isolation between tests."""

from __future__ import annotations

import functools
import gc
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

import pytest
from hypothesis import HealthCheck, settings
from sqlalchemy import Engine, create_engine

from sqlasession_middleware import SQLASessionMiddleware
from sqlasession_middleware._database import watchdog
from sqlasession_middleware._scope.scope import NOTHING, current

from .databases import DATABASES, DATABASES_SEEN, SERVERS

__all__ = ["DATABASES", "DATABASES_SEEN", "SERVERS"]

# Hypothesis has no time limits, because a busy machine is slow.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(autouse=True, scope="session")
def measured_threads() -> None:
    """Where coverage is measured, start the thread of deadlines by a module whose threads are measured."""
    if sys.gettrace() is not None:
        watchdog._start_thread = lambda call: threading.Thread(target=call, daemon=True).start()


@pytest.fixture
def disposes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Dispose of the engines of all applications that a test makes: Python tells of connections that are not closed."""
    made: WeakSet[SQLASessionMiddleware] = WeakSet()
    initialize = SQLASessionMiddleware.__init__

    def note(self: SQLASessionMiddleware, *arguments: Any, **options: Any) -> None:
        initialize(self, *arguments, **options)
        made.add(self)

    monkeypatch.setattr(SQLASessionMiddleware, "__init__", functools.wraps(initialize)(note))
    yield
    for app in list(made):
        for source in app._sources():
            if source.given:
                source.engine.dispose()
        app.dispose()
    if sys.version_info >= (3, 13):
        # Since then sqlite3 tells of a connection that is collected open, such as that of a creator or an Engine of the
        # test's own. It would tell in whichever test comes later.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()


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
    """The URL of each database in turn. The tests share it: each cleans up its tables."""
    return DATABASES_SEEN.url(request.param, sqlite_url)


@pytest.fixture(params=tuple(SERVERS))
def server_url(request, sqlite_url) -> str:
    """The URL of each database server in turn, for tests that SQLite does not support."""
    return DATABASES_SEEN.url(request.param, sqlite_url)


@pytest.fixture(autouse=True)
def clean_local() -> Iterator[None]:
    """Every test begins with an empty Local, and has to leave it empty."""
    current.set(NOTHING)
    yield
    left = dict(current.get(NOTHING))
    current.set(NOTHING)
    assert not left, f"left on the Local: {left}"
