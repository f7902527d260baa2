"""The last requests of this process."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

from .._database.forks import fork_safe_lock
from .fit import fitting
from .kept import Kept, size_of, summary

__all__ = ["Memory"]


class _Entry(NamedTuple):
    kept: Kept
    size: int


class Memory:
    """Keeps requests until there are too many of them, or they take too much memory.

    :param requests: how many are kept.
    :param most: how many bytes they may take, about.
    """

    def __init__(self, requests: int, most: int) -> None:
        self._entries: deque[_Entry] = deque(maxlen=requests)
        self._most = most
        self._size = 0
        self._lock = fork_safe_lock()

    def add(self, kept: Kept) -> None:
        """Keep a request, and forget the oldest ones."""
        kept = fitting(kept, self._most)
        entry = _Entry(kept, size_of(kept))
        with self._lock:
            if len(self._entries) == self._entries.maxlen:
                self._size -= self._entries.popleft().size
            self._entries.append(entry)
            self._size += entry.size
            while self._size > self._most and len(self._entries) > 1:
                self._size -= self._entries.popleft().size

    def summaries(self) -> list[dict[str, Any]]:
        """All of them as the list shows them, the last one first."""
        return [summary(entry.kept.data) for entry in reversed(self._copy())]

    def find(self, number: str) -> Kept | None:
        """The request with an ID, if it is still there."""
        found: Mapping[str, Kept] = {entry.kept.data["id"]: entry.kept for entry in self._copy()}
        return found.get(number)

    def _copy(self) -> list[_Entry]:
        with self._lock:
            return list(self._entries)
