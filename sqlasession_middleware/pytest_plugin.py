"""pytest's fixtures of :mod:`sqlasession_middleware.testing`; they do nothing unless a test asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .middleware import SQLASessionMiddleware

# The library is imported by what is used: this module is loaded by every pytest of the environment.

LEAKS = "sqlasession_leaks"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The ini option."""
    parser.addini(LEAKS, "fail tests that leave a connection checked out of its pool", type="bool", default=False)


@pytest.fixture
def sqlasession_app() -> SQLASessionMiddleware:
    """The application under test: a fixture of this name in a ``conftest.py`` gives it."""
    raise pytest.UsageError("define a fixture 'sqlasession_app' that returns the SQLASessionMiddleware to test.")


@pytest.fixture
def isolated_app(sqlasession_app: Any) -> Iterator[SQLASessionMiddleware]:
    """The application of ``sqlasession_app``, isolated: what the test stores is gone after it."""
    from .testing import isolated

    with isolated(sqlasession_app):
        yield sqlasession_app


@pytest.fixture
def assert_queries() -> Any:
    """:func:`sqlasession_middleware.testing.assert_queries`."""
    from .testing import assert_queries

    return assert_queries


@pytest.fixture(autouse=True)
def _sqlasession_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    if not request.config.getini(LEAKS):
        yield
        return
    from .testing import no_leaks

    with no_leaks():
        yield
