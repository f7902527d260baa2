"""Statements of a request that are the same but for their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = ["Group", "grouped"]


class Group(NamedTuple):
    """Statements with one fingerprint.

    :param numbers: of the statements, from 0.
    :param same: how many of them repeat one with the same values.
    :param seconds: of all of them.
    """

    sql: str
    numbers: list[int]
    same: int
    seconds: float


def grouped(statements: Sequence[dict[str, Any]]) -> list[Group]:
    """The groups of two or more, those first that took longest."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for number, each in enumerate(statements):
        numbers.setdefault((each["engine"], each["fingerprint"]), []).append(number)
    groups = []
    for (_, sql), found in numbers.items():
        if len(found) > 1:
            values = {repr(statements[number]["parameters"]) for number in found}
            # What is hidden cannot be told apart.
            is_shown = not any(statements[number]["has_secrets"] for number in found)
            seconds = sum(statements[number]["seconds"] for number in found)
            groups.append(Group(sql, found, len(found) - len(values) if is_shown else 0, seconds))
    return sorted(groups, key=lambda group: group.seconds, reverse=True)
