"""The drivers that the library knows: one row for each, for tests that run with all of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import pytest
from sqlalchemy import URL, make_url
from sqlalchemy.dialects import registry

from tests.conftest import DATABASES_SEEN


def fake(module: str, *arguments: Any, **attributes: Any) -> Exception:
    """An error that looks like one of the driver with the given module."""
    base = type("DatabaseError", (Exception,), {"__module__": module.partition(".")[0]})
    return type("OperationalError", (base,), {"__module__": module, **attributes})(*arguments)


class Row(NamedTuple):
    """A driver.

    :param module: the name it is imported by.
    :param dialect: its name in a URL.
    :param server: the name of the database that it is tested on, in ``conftest``.
    :param error: makes an error like one of the driver's, with a given code.
    """

    module: str
    dialect: str
    server: str
    error: Callable[[Any], Exception]

    def __str__(self) -> str:
        return self.module

    def url(self, sqlite_url: str = "") -> URL:
        """The URL of its server. If TEST_ALL_DRIVERS is set, a driver that is not installed fails the test."""
        try:
            import_module(self.module)
        except ImportError:
            if os.environ.get("TEST_ALL_DRIVERS"):
                pytest.fail(f"{self.module} is not installed and TEST_ALL_DRIVERS is set")
            pytest.skip(f"{self.module} is not installed: it is compiled, pip install .[drivers]")
        return make_url(DATABASES_SEEN.url(self.server, sqlite_url)).set(drivername=self.dialect)


ROWS = (
    Row("psycopg", "postgresql+psycopg", "postgresql", lambda code: fake("psycopg.errors", "words", sqlstate=code)),
    Row("psycopg2", "postgresql+psycopg2", "postgresql", lambda code: fake("psycopg2.errors", "words", pgcode=code)),
    Row("pymysql", "mariadb+pymysql", "mariadb", lambda code: fake("pymysql.err", code, "words")),
    Row("MySQLdb", "mariadb+mysqldb", "mariadb", lambda code: fake("MySQLdb", code, "words")),
    Row("mariadb", "mariadb+mariadbconnector", "mariadb", lambda code: fake("mariadb", "words", errno=code)),
    Row("sqlite3", "sqlite+pysqlite", "sqlite", lambda code: fake("sqlite3", "words", sqlite_errorcode=code)),
)


def under_another_name(url: URL | str, driver: str | None = None) -> URL:
    """A URL of the same database with a dialect that is derived from the usual one, like CockroachDB's.

    :param driver: the dialect's name for its driver; None for the usual name.
    """
    url = make_url(url)
    base = url.get_dialect()
    name, driver = f"kindred_{base.name}", driver or base.driver
    attributes = {"name": name, "driver": driver, "supports_statement_cache": True}
    kind = type("KindredDialect", (base,), attributes)
    registry.impls[name] = registry.impls[f"{name}.{driver}"] = lambda: kind
    return url.set(drivername=f"{name}+{driver}")


def rows_on(*servers: str) -> list[Any]:
    """The rows of some servers, as parameters of a test."""
    return [pytest.param(row, id=row.module) for row in ROWS if row.server in servers]


def rows_of(*modules: str) -> list[Any]:
    """The rows of some drivers, as parameters of a test."""
    return [pytest.param(row, id=row.module) for row in ROWS if row.module in modules]
