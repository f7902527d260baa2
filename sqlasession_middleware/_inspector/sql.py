"""SQL as HTML: laid out by sqlparse, coloured by classes of Pygments."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

import sqlparse
from markupsafe import Markup, escape
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import SqlLexer

__all__ = ["first_words", "highlighted"]

#: A longer statement is shown as it is: laying out takes long.
_LAID_OUT: Final = 5_000

# With the names of classes alone: the colours are in the style file.
_formatter: Final = HtmlFormatter(nowrap=True)
_lexer: Final = SqlLexer()
_LIST: Final = re.compile(r"^\s*SELECT\s+(.*?)\s+FROM\s", re.IGNORECASE | re.DOTALL)


@lru_cache(500)
def highlighted(sql: str) -> Markup:
    """A statement, laid out and coloured."""
    if len(sql) > _LAID_OUT:
        return escape(sql)
    try:
        sql = sqlparse.format(sql, reindent=True, wrap_after=100)
    except Exception:  # Of a text that it cannot read; newer versions refuse what is nested deeply.
        pass
    return Markup(highlight(sql, _lexer, _formatter).rstrip("\n"))


def first_words(sql: str) -> str:
    """A statement in one short line: what is selected is seldom what tells it from others."""
    sql = " ".join(sql.split())
    found = _LIST.match(sql)
    if found is not None and len(found[1]) > 30:
        sql = f"{sql[: found.start(1)]}…{sql[found.end(1) :]}"
    return sql if len(sql) <= 160 else f"{sql[:160]}…"
