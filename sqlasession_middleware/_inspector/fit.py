"""Makes a request that takes more memory than all may take smaller."""

from __future__ import annotations

from typing import Final

from .kept import Kept, size_of

__all__ = ["fitting"]

#: How many characters of a statement are left.
_SQL: Final = 200
_REASON: Final = "The request takes more memory than is admitted, so that its values are not kept."


def fitting(kept: Kept, most: int) -> Kept:
    """A request without values if it is too large, and without the rest of long statements if it is so still.

    :param most: how many bytes it may take, about.
    """
    if size_of(kept) <= most:
        return kept
    statements = [{**each, "parameters": [], "explain": _REASON} for each in kept.data["statements"]]
    smaller = Kept({**kept.data, "statements": statements}, {})
    if size_of(smaller) > most:
        for each in statements:
            each.update({name: each[name][:_SQL] for name in ("sql", "fingerprint")})
    return smaller
