"""The text of comments that tell what has sent a statement, in the form of sqlcommenter.

``SELECT 1 /*application='shop',route='/orders/%3Cid%3E'*/``: pairs in the order of their keys, URL-encoded, and after
the statement. See https://google.github.io/sqlcommenter/spec/.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import quote

__all__ = ["add_comment", "make_comment", "without_comment"]

#: What is left of a text once it is encoded: nothing that ends a comment or a string, or that a driver or SQLAlchemy
#: takes for a placeholder, but for ``%``.
_ENCODED: Final = r"[\w.~%/-]"
_COMMENT: Final = re.compile(rf" /\*{_ENCODED}+='{_ENCODED}*'(?:,{_ENCODED}+='{_ENCODED}*')*\*/", re.ASCII)
_FIRST_WORD: Final = re.compile(r"\s*(?:INSERT|REPLACE)\b", re.IGNORECASE)


def make_comment(pairs: Mapping[str, str]) -> str:
    """The comment for some pairs, with a space before it; "" if there are none."""
    if not pairs:
        return ""
    told = ",".join(f"{_encode(key)}='{_encode(pairs[key])}'" for key in sorted(pairs))
    return f" /*{told}*/"


def _encode(value: str) -> str:
    return quote(value, safe="/", errors="replace")  # "/" cannot follow "*", which is encoded.


def add_comment(statement: str, comment: str, after_first_word: bool = False) -> str:
    """Add a comment to a statement, unless it has one, or something that looks like one.

    :param comment: of :func:`make_comment`, with ``%`` doubled where the driver takes it for a placeholder.
    :param after_first_word: put it after the INSERT or REPLACE that the statement begins with.
    """
    if "/*" in statement or "--" in statement:
        return statement
    if after_first_word and (word := _FIRST_WORD.match(statement)) is not None:
        return f"{word[0]}{comment}{statement[word.end() :]}"
    bare = statement.rstrip()
    return f"{bare[:-1]}{comment};" if bare.endswith(";") else f"{bare}{comment}"


def without_comment(statement: str) -> str:
    """The statement without such a comment at its end.

    Other comments stay: in front of a text that only looks like one there may be a string that would not end.
    """
    if not statement.endswith("'*/"):
        return statement
    begin = statement.rfind(" /*")
    return statement[:begin] if begin >= 0 and _COMMENT.fullmatch(statement, begin) else statement
