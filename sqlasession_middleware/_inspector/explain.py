"""Asks a database how it runs a statement of a request.

It is asked on a connection of its own, outside of the pool, which refuses to write where the server has such a thing,
and is rolled back and closed. A statement that may write is never run.
"""

from __future__ import annotations

import re
from contextlib import closing, suppress
from contextvars import Context
from typing import TYPE_CHECKING, Final, NamedTuple

import sqlparse
from sqlalchemy.pool import StaticPool

from .._database.pings import SharedConnection, own_connection
from .._drivers.registry import driver_of
from .._recording.masking import MASK, Masked, shown_error, without_values

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from .kept import Engines, Original

__all__ = ["Plan", "explain", "may_run"]

#: How many seconds a server may take.
SECONDS: Final = 5
#: How many rows of a plan are shown.
ROWS: Final = 500

_EXPLAINED: Final = re.compile(r"[\s(]*(SELECT|WITH|VALUES|TABLE|INSERT|UPDATE|DELETE|REPLACE|MERGE)\b", re.IGNORECASE)
_READS: Final = ("SELECT", "WITH", "VALUES", "TABLE")
#: What a read has that locks rows, or writes into a file.
_WRITES: Final = re.compile(
    r"\bINTO\b|\bFOR\s+(NO\s+KEY\s+)?(UPDATE|SHARE|KEY\s+SHARE)\b|\bLOCK\s+IN\b|/\*M?!", re.IGNORECASE
)
#: Comments before a statement, but not those that MySQL executes.
_COMMENTS: Final = re.compile(r"^(?:[\s(]|--[^\n]*(?:\n|$)|#[^\n]*(?:\n|$)|/\*(?!!|M!).*?\*/)+", re.DOTALL)
_QUOTED: Final = re.compile(r"'(?:[^']|'')*'")


class Plan(NamedTuple):
    """What a database answers.

    :param problem: why there is no plan; empty if there is one.
    """

    columns: list[str]
    rows: list[list[str]]
    problem: str = ""


def may_run(sql: str) -> bool:
    """Whether a statement only reads, as far as its text says: the server has to run it for an ANALYZE."""
    found = _EXPLAINED.match(_COMMENTS.sub("", sql))
    return found is not None and found[1].upper() in _READS and _WRITES.search(sql) is None


def explain(original: Original, engines: Engines, analyze: bool) -> Plan:
    """Ask for the plan of a statement.

    :param analyze: whether the server runs the statement and tells what that took. Only reads are run.
    """
    found = engines.find(original.engine)
    if len(found) != 1:
        return Plan([], [], f"There are {len(found)} engines of the name {original.engine!r}.")
    if _EXPLAINED.match(_COMMENTS.sub("", original.sql)) is None or _are_several(original.sql):
        return Plan([], [], "Only SELECT, INSERT, UPDATE, DELETE and their like have a plan, one at a time.")
    is_read = may_run(original.sql)
    if analyze and not is_read:
        return Plan([], [], "It is not run, because it may write or lock something.")
    (engine,) = found
    try:
        if isinstance(engine.pool, StaticPool):  # A further connection may be to another database, in memory.
            raise SharedConnection
        # In a context of its own: nothing of what the connection does belongs to this request.
        plan: Plan = Context().run(_ask, engine, original, is_read, analyze)
    except SharedConnection:
        return Plan([], [], "This engine has one connection only, which the application uses.")
    except Exception as error:
        # It may quote a part of the statement, and values.
        text = shown_error(error, Masked([], 0, frozenset()), original.secrets).partition("\n")[0]
        return Plan([], [], engines.without_secrets(text))
    return _masked(plan, original, engines)


def _ask(engine: Engine, original: Original, is_read: bool, analyze: bool) -> Plan:
    driver = driver_of(engine)
    # The server ends what takes too long before the driver gives it up.
    with own_connection(engine, 2 * SECONDS) as connection:
        try:
            with closing(connection.cursor()) as cursor:
                prefix = driver.server.begin_explaining(cursor, is_read, analyze, SECONDS)
                if prefix is None:
                    what = "EXPLAIN ANALYZE" if analyze else "EXPLAIN"
                    return Plan([], [], f"There is no {what} for {engine.dialect.name}.")
                cursor.execute(prefix + original.sql, original.parameters)
                columns = [str(each[0]) for each in cursor.description or ()]
                rows = [["" if cell is None else str(cell) for cell in row] for row in cursor.fetchmany(ROWS)]
                return Plan(columns, rows)
        finally:
            with suppress(Exception):  # It may be lost. Whatever it has is undone when it is closed.
                connection.rollback()


def _masked(plan: Plan, original: Original, engines: Engines) -> Plan:
    """A plan without values: PostgreSQL tells those of conditions."""

    def clean(text: str) -> str:
        if original.secrets:
            text = without_values(_QUOTED.sub(f"'{MASK}'", text), original.secrets)
        return engines.without_secrets(text)

    return Plan(plan.columns, [[clean(cell) for cell in row] for row in plan.rows], plan.problem)


def _are_several(sql: str) -> bool:
    return ";" in sql and len(sqlparse.split(sql)) != 1
