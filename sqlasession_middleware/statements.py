"""Which statements only read."""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import TextClause, TextualSelect
from sqlalchemy.orm import FromStatement
from sqlalchemy.sql import ColumnElement, visitors
from sqlalchemy.sql.functions import FunctionElement

__all__ = ["is_read", "is_read_throughout"]

_READS = re.compile(r"\s*(select|with|show|explain|describe|desc|values|table)\b", re.IGNORECASE)
_LOCKS = re.compile(r"\bfor\s+(update|share|no\s+key|key\s+share)\b|\block\s+in\s+share\b|\binto\b", re.IGNORECASE)
#: PostgreSQL's data-modifying WITH, EXPLAIN ANALYZE, and a second statement in the same text.
_WRITES = re.compile(r"\b(insert|update|delete|merge|replace|truncate)\b|;\s*\S", re.IGNORECASE)
_BEGINS_TO_WRITE = re.compile(r"\s*(insert|update|delete|merge|replace|truncate)\b", re.IGNORECASE)
_MAY_WRAP = re.compile(r"\s*(with|explain|describe|desc)\b|[^;]*;\s*\S", re.IGNORECASE)

# What writes, or locks, when a SELECT calls it. PostgreSQL: "Sequence Manipulation Functions", "Advisory Lock
# Functions", pg_notify() of "NOTIFY", "Transaction ID and Snapshot Information Functions", "Configuration Settings
# Functions", "Server-Side Functions" of large objects. MySQL and MariaDB: "Locking Functions", and the sequences' of
# MariaDB.
_FUNCTIONS = re.compile(
    r"(nextval|setval|next_value|lastval|pg_notify|pg_(try_)?advisory_\w+|txid_current|pg_current_xact_id|set_config"
    r"|lo_\w+|get_lock|release_lock|release_all_locks)",
    re.IGNORECASE,
)
_CALLS = re.compile(rf"\b({_FUNCTIONS.pattern}\s*\(|next\s+value\s+for\b)", re.IGNORECASE)

_WRAPPERS = (FromStatement, TextualSelect)


def is_read(statement: Any) -> bool:
    """Whether a statement, as :meth:`Session.get_bind` is given it, leaves nothing behind, not even a lock.

    It goes by the statement itself, and not by what is nested in it or by the functions that it calls.
    """
    statement = _unwrapped(statement)
    if isinstance(statement, TextClause):
        return _is_read(str(statement))
    return bool(getattr(statement, "is_select", False)) and getattr(statement, "_for_update_arg", None) is None


def is_read_throughout(statement: Any) -> bool:
    """The same with all that is nested in it (DML in a CTE, ``FOR UPDATE`` in a subquery), and the functions that are
    known to write.

    Any other function that a SELECT calls may write all the same: that cannot be seen from here.
    """
    if not is_read(statement):
        return False
    statement = _unwrapped(statement)
    if isinstance(statement, TextClause):
        return _CALLS.search(str(statement)) is None
    # A text before or after the statement, which is no element of it.
    for words, _ in (*getattr(statement, "_prefixes", ()), *getattr(statement, "_suffixes", ())):
        if _leaves_something(words):
            return False
    return not any(map(_leaves_something, visitors.iterate(statement)))


def _unwrapped(statement: Any) -> Any:
    """The statement, or the text, of ``Select.from_statement()`` and ``text().columns()``."""
    while isinstance(statement, _WRAPPERS):
        statement = statement.element
    return statement


def _is_read(text: str) -> bool:
    if _READS.match(text) is None or _LOCKS.search(text) is not None:
        return False
    # The words of these are looked for only where they can be statements: a column may be named like one of them.
    return _MAY_WRAP.match(text) is None or _WRITES.search(text) is None


def _leaves_something(element: Any) -> bool:
    kind = element.__visit_name__
    if kind in _HARMLESS:
        return False
    if element.is_dml or getattr(element, "_for_update_arg", None) is not None:
        return True
    if isinstance(element, FunctionElement):
        return _FUNCTIONS.fullmatch(getattr(element, "name", "")) is not None
    if isinstance(element, TextClause) or (
        isinstance(element, ColumnElement) and getattr(element, "is_literal", False)
    ):
        text = str(element)
        return any(found.search(text) for found in (_CALLS, _LOCKS)) or _BEGINS_TO_WRITE.match(text) is not None
    return False


#: What most statements consist of.
_HARMLESS = frozenset(("binary", "bindparam", "clauselist", "table", "alias", "join", "unary", "label", "grouping"))
