"""The type of :meth:`.models.Queries.select`, for type checkers only: the module is not imported at runtime.

``select(Guest)`` is a ``Select[tuple[Guest]]`` in SQLAlchemy 2.0, and a ``Select[Guest]`` in 2.1. A type checker cannot
test the version of a library, but it resolves an overload by the type of a statement.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, overload

from sqlalchemy import Select, literal, select

Entity = TypeVar("Entity")


class Selects20(Protocol):
    """``Guest.select`` with SQLAlchemy 2.0."""

    def __get__(self, instance: object, owner: type[Entity]) -> Callable[[], Select[tuple[Entity]]]: ...


# The ignored errors occur with SQLAlchemy 2.0 only: its Select takes a tuple.
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
