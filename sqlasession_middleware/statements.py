"""Which statements only read."""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import TextClause

__all__ = ["is_read"]

_READS = re.compile(r"\s*(select|show|explain|describe|desc|values|table)\b", re.IGNORECASE)
_LOCKS = re.compile(r"\bfor\s+(update|share|no\s+key|key\s+share)\b|\block\s+in\s+share\b|\binto\b", re.IGNORECASE)


def is_read(statement: Any) -> bool:
    """Whether a statement, as :meth:`Session.get_bind` is given it, surely leaves nothing behind, not even a lock.

    A function that a SELECT calls may write all the same: that cannot be seen from here.
    """
    statement = getattr(statement, "element", statement)  # of Select.from_statement()
    if isinstance(statement, TextClause):
        text = str(statement)
        return _READS.match(text) is not None and _LOCKS.search(text) is None
    return bool(getattr(statement, "is_select", False)) and getattr(statement, "_for_update_arg", None) is None
