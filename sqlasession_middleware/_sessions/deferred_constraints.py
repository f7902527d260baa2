"""Checks deferred constraints when a test releases a savepoint in place of a COMMIT."""

from __future__ import annotations

from collections import Counter
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, IntegrityError

from .._drivers.postgresql import PostgreSQL
from .._drivers.registry import driver_of
from .._drivers.sqlite import SQLite

__all__ = ["DeferredConstraints"]

_POSTGRESQL_DEFERRABLE = (
    "SELECT n.nspname, c.conname, c.condeferred FROM pg_catalog.pg_constraint c"
    " JOIN pg_catalog.pg_namespace n ON n.oid = c.connamespace WHERE c.condeferrable"
)
_SQLITE_DEFERRED = "SELECT count(*) FROM sqlite_master WHERE sql LIKE '%INITIALLY%DEFERRED%'"


class DeferredConstraints:
    """The deferred constraints of one connection's database.

    MySQL and MariaDB have no deferred constraints.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        #: earlier violations, which do not fail a COMMIT in SQLite
        self._known: Counter[Any] = Counter()
        # SQLite cannot change this setting in a transaction.
        self._is_sqlite = isinstance(driver_of(connection).server, SQLite) and bool(
            self._ask("PRAGMA foreign_keys")[0][0]
        )
        if self._is_sqlite:
            try:
                self._known = self._violations()
            except DBAPIError:
                self._is_sqlite = False  # A foreign key refers to columns that are not unique: using it is an error.

    def check(self) -> None:
        """Check the constraints as a COMMIT would, and reset their modes to those of a new transaction.

        :raises IntegrityError: if a constraint is violated.
        """
        if self._is_sqlite:
            self._check_sqlite()
        elif isinstance(driver_of(self._connection).server, PostgreSQL):
            self._check_postgresql()

    def reset(self) -> None:
        """Reset SQLite's mode to that of a new transaction. On PostgreSQL, the end of the savepoint resets it."""
        if self._is_sqlite and self._ask("PRAGMA defer_foreign_keys")[0][0]:
            self._execute("PRAGMA defer_foreign_keys = OFF")

    def _check_postgresql(self) -> None:
        deferrable = self._ask(_POSTGRESQL_DEFERRABLE)
        if not deferrable:
            return
        self._execute("SET CONSTRAINTS ALL IMMEDIATE")
        deferred = [f"{_quoted(schema)}.{_quoted(name)}" for schema, name, is_deferred in deferrable if is_deferred]
        if deferred:
            self._execute(f"SET CONSTRAINTS {', '.join(deferred)} DEFERRED")

    def _check_sqlite(self) -> None:
        if not (self._ask("PRAGMA defer_foreign_keys")[0][0] or self._ask(_SQLITE_DEFERRED)[0][0]):
            return
        if self._violations() - self._known:
            # The error that the driver raises at a COMMIT.
            original = self._connection.dialect.loaded_dbapi.IntegrityError("FOREIGN KEY constraint failed")
            raise IntegrityError(None, None, original) from original
        self.reset()

    def _violations(self) -> Counter[Any]:
        return Counter(tuple(row) for row in self._ask("PRAGMA foreign_key_check"))

    def _ask(self, statement: str) -> Any:
        return self._execute(statement).all()

    def _execute(self, statement: str) -> Any:
        # Names may contain percent signs, which drivers would interpret as parameters.
        return self._connection.exec_driver_sql(statement, execution_options={"no_parameters": True})


def _quoted(name: str) -> str:
    # The dialect's own quoting may double percent signs, which is correct only in statements with parameters.
    return '"' + name.replace('"', '""') + '"'
