"""Which statements only read."""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import TextClause, TextualSelect
from sqlalchemy.orm import FromStatement
from sqlalchemy.sql import ColumnElement, visitors
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import ForUpdateArg

from .._dependencies import FOR_UPDATE, PREFIXES, SUFFIXES

__all__ = ["changes_rows", "is_read", "is_read_throughout", "leaves_lock"]

_READS = re.compile(r"\s*(select|with|show|explain|describe|desc|values|table)\b", re.IGNORECASE)
_LOCKS = re.compile(r"\bfor\s+(update|share|no\s+key|key\s+share)\b|\block\s+in\s+share\b|\binto\b", re.IGNORECASE)
#: PostgreSQL's data-modifying WITH, EXPLAIN ANALYZE, and a second statement in the same text.
_WRITES = re.compile(r"\b(insert|update|delete|merge|replace|truncate)\b|;\s*\S", re.IGNORECASE)
_ROW_LOCK = re.compile(
    r"\bfor\s+(no\s+key\s+)?(update|share|key\s+share)\b.*|\block\s+in\s+share\s+mode\b.*", re.IGNORECASE | re.DOTALL
)
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
#: A variable of the connection, in MySQL and MariaDB.
_ASSIGNS = re.compile(r"@\w+\s*:=")

_WRAPPERS = (FromStatement, TextualSelect)


def is_read(statement: Any) -> bool:
    """Whether a statement, as :meth:`Session.get_bind` is given it, leaves nothing behind, not even a lock.

    Only the statement itself is examined, not what is nested in it, nor the functions that it calls.
    """
    statement = _unwrapped(statement)
    if isinstance(statement, TextClause):
        return _is_read(str(statement))
    return bool(getattr(statement, "is_select", False)) and getattr(statement, FOR_UPDATE, None) is None


def is_read_throughout(statement: Any) -> bool:
    """The same with all that is nested in it (DML in a CTE, ``FOR UPDATE`` in a subquery), and the functions that are
    known to write.

    Any other function that a SELECT calls may still write; this cannot be detected.
    """
    if not is_read(statement):
        return False
    statement = _unwrapped(statement)
    if isinstance(statement, TextClause):
        return _CALLS.search(str(statement)) is None
    # A text before or after the statement, which is no element of it.
    for words, _ in (*getattr(statement, PREFIXES, ()), *getattr(statement, SUFFIXES, ())):
        if _leaves_something(words):
            return False
    return not any(map(_leaves_something, visitors.iterate(statement)))


def changes_rows(text: str) -> bool:
    """Whether a statement, as it is sent to the database, may leave something that a rollback undoes.

    Locks do not count. A function that a SELECT calls may still change something.
    """
    text = _ROW_LOCK.sub("", text)
    return not _is_read(text) or _CALLS.search(text) is not None


def leaves_lock(text: str) -> bool:
    """Whether a statement, as it is sent to the database, locks rows, calls a function that is known to lock or to
    write, or sets a variable of the connection.
    """
    return any(found.search(text) for found in (_CALLS, _LOCKS, _ASSIGNS))


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
    if element.is_dml or isinstance(element, ForUpdateArg):
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
