"""The type of ``Guest.select``, for type checkers alone: no program loads this module.

What ``select(Guest)`` returns is a ``Select[tuple[Guest]]`` in SQLAlchemy 2.0, and a ``Select[Guest]`` in 2.1. A type
checker cannot be asked for the version of a library, but it finds what fits the type of a statement.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, overload

from sqlalchemy import Select, literal, select

Entity = TypeVar("Entity")


class Selects20(Protocol):
    """``Guest.select`` with SQLAlchemy 2.0."""

    def __get__(self, instance: object, owner: type[Entity]) -> Callable[[], Select[tuple[Entity]]]: ...


# What 2.0 has to be told to ignore is right in 2.1.
class Selects21(Protocol):
    """``Guest.select`` with SQLAlchemy 2.1."""

    def __get__(self, instance: object, owner: type[Entity]) -> Callable[[], Select[Entity]]: ...  # type: ignore[type-var, unused-ignore]


@overload
def _fitting(statement: Select[tuple[int]]) -> Selects20: ...
@overload
def _fitting(statement: Select[int]) -> Selects21: ...  # type: ignore[type-var, unused-ignore]
def _fitting(statement: Any) -> Any:
    return statement


_statement = select(literal(1))
selects_of_this_version = _fitting(_statement)
