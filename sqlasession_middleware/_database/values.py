"""Checks values that come from outside against the types of columns, before a database is asked.

Some databases would fail the transaction for the question, and others find a row of another value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal
from operator import index
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, Dialect, Enum, Integer, SmallInteger, String, Uuid
from sqlalchemy.types import TypeDecorator, TypeEngine

from .._drivers.registry import driver_by_dialect

__all__ = ["check_value", "read_value"]

#: The number of bits of an integer, not counting the sign, for servers where it depends on the type.
_BITS: Sequence[tuple[type[Any], int]] = ((SmallInteger, 15), (BigInteger, 63), (Integer, 31))


def read_value(part: Any, declared: TypeEngine[Any], dialect: Dialect) -> Any:
    """Convert a part of a key to the type of its column.

    :raises ValueError: if no row can have it.
    :raises TypeError: if it is of another type than the column.
    """
    kind = declared.dialect_impl(dialect)  # with_variant() may set another type for this database.
    if part is None:
        raise ValueError
    if isinstance(kind, Integer):
        number = int(part) if isinstance(part, str) else index(part)
        bits = driver_by_dialect[type(dialect)].server.integer_bits
        bits = bits or next(bits for integer, bits in _BITS if isinstance(kind, integer))
        if not -(1 << bits) <= number < 1 << bits:
            raise ValueError
        return number
    if isinstance(kind, Uuid):
        known = part if isinstance(part, UUID) else UUID(_read_text(part, dialect))
        return known if kind.as_uuid else str(known)
    if isinstance(kind, Enum):
        if not (kind.enum_class and isinstance(part, kind.enum_class)) and part not in kind.enums:
            raise ValueError
        return part
    return _read_text(part, dialect) if isinstance(kind, String) else part


def _read_text(part: Any, dialect: Dialect) -> str:
    if not isinstance(part, str) or ("\0" in part and not driver_by_dialect[type(dialect)].server.accepts_nul):
        raise ValueError
    part.encode()  # A text with lone surrogates cannot be sent.
    return part


def check_value(value: Any, declared: TypeEngine[Any], dialect: Dialect) -> Any:
    """Convert a value as :func:`read_value` does, and refuse one that is not of the column's type in Python.

    :raises ValueError: if no row can have it.
    :raises TypeError: if it is of another type than the column.
    """
    try:
        kind = None if isinstance(declared, TypeDecorator) else declared.python_type
    except NotImplementedError:
        kind = None
    if kind is None:
        return value  # Only the application, or the database, knows its type.
    if isinstance(value, bool) and kind is not bool:
        raise TypeError  # To Python it is an int.
    value = read_value(value, declared, dialect)
    if not isinstance(value, kind):
        raise TypeError
    if isinstance(value, float | Decimal) and not math.isfinite(value):
        raise ValueError
    return value
