"""A pytest plugin: fixtures for :mod:`sqlasession_middleware.testing`, and its ini options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .middleware import SQLASessionMiddleware

# Every pytest run in the environment loads this module. The fixtures import what they need when they are used.

LEAKS = "sqlasession_leaks"
N_PLUS_ONE = "sqlasession_n_plus_one"
ALLOWED = "sqlasession_n_plus_one_allow"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the ini options."""
    parser.addini(LEAKS, "fail tests that leave a connection checked out of its pool", type="bool", default=False)
    parser.addini(N_PLUS_ONE, "fail tests that send one SELECT after another (N+1)", type="bool", default=False)
    parser.addini(ALLOWED, "what may be repeated: relationships, or parts of statements", type="linelist", default=[])


@pytest.fixture
def sqlasession_app() -> SQLASessionMiddleware:
    """The application under test. Override this fixture in a ``conftest.py``."""
    raise pytest.UsageError("define a fixture 'sqlasession_app' that returns the SQLASessionMiddleware to test.")


@pytest.fixture
def isolated_app(sqlasession_app: Any) -> Iterator[SQLASessionMiddleware]:
    """The application of ``sqlasession_app``, in an :func:`~sqlasession_middleware.testing.isolated` block."""
    from .testing import isolated

    with isolated(sqlasession_app):
        yield sqlasession_app


@pytest.fixture
def assert_queries() -> Any:
    """The function :func:`sqlasession_middleware.testing.assert_queries`."""
    from .testing import assert_queries

    return assert_queries


@pytest.fixture
def no_n_plus_one() -> Any:
    """The function :func:`sqlasession_middleware.testing.no_n_plus_one`."""
    from .testing import no_n_plus_one

    return no_n_plus_one


@pytest.fixture(autouse=True)
def _sqlasession_n_plus_one(request: pytest.FixtureRequest) -> Iterator[None]:
    if not request.config.getini(N_PLUS_ONE):
        yield
        return
    from .testing import no_n_plus_one

    with no_n_plus_one(allow=request.config.getini(ALLOWED)):
        yield


@pytest.fixture(autouse=True)
def _sqlasession_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    if not request.config.getini(LEAKS):
        yield
        return
    from .testing import no_leaks

    with no_leaks():
        yield
