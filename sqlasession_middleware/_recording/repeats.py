"""Finds the statements that a request repeats for one object after another: N+1."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Final, NamedTuple

from .record import EAGER, Statement
from .stacks import application_frames, format_stack

__all__ = ["Repeat", "find_repeats"]

#: How often a statement has to come from the same place.
LEAST: Final = 3

#: How many characters of a statement are shown.
SHOWN: Final = 1000


class Repeat(NamedTuple):
    """A SELECT that was sent several times from the same place, with other values each time or the same.

    :param statements: all of them.
    """

    statements: list[Statement]

    @property
    def statement(self) -> Statement:
        """The first one."""
        return self.statements[0]

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return _remedy(self.statement)

    def __str__(self) -> str:
        first = self.statement
        called = format_stack(application_frames(first.stack)[:5])
        return f"{len(self.statements)} times: {' '.join(first.fingerprint.split())[:SHOWN]}\n{called}    {self.remedy}"


def find_repeats(statements: Iterable[Statement], allow: Iterable[str] = (), least: int = LEAST) -> list[Repeat]:
    """Group the SELECTs that come from the same place, on the same connection and in the same attempt.

    Those by which the ORM loads a relationship of many objects are left out: it asks for 500 of them at once.

    A unit of a stream has a connection for itself, so what each unit of it does once is no repetition.

    :param allow: what may be repeated: relationships such as ``"Author.books"``, or parts of statements.
    :param least: how often a statement has to come.
    """
    groups: dict[Hashable, list[Statement]] = {}
    for each in statements:
        if (
            each.is_read
            and each.relationship != EAGER
            and not any(name in (each.relationship, "") or name in each.sql for name in allow)
        ):
            place = application_frames(each.stack)
            groups.setdefault((each.fingerprint, place, each.engine, each.attempt, each.hold), []).append(each)
    return [Repeat(group) for group in groups.values() if len(group) >= least]


def _remedy(statement: Statement) -> str:
    loaded = statement.relationship
    if not loaded:
        return "Ask for all of them at once, with IN, before the loop."
    if "." not in loaded:
        return (
            f"Deferred or expired attributes of {loaded} are loaded one object at a time: undefer() them in the query,"
            " or read them before the commit that expires them."
        )
    return f"Load it with the query of the objects before: .options(selectinload({loaded}))."
