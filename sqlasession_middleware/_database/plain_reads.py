"""Which statements of PostgreSQL only read, by their text.

A statement leaves nothing if it is a SELECT that changes nothing, locks no row, and calls no unknown function. Its
transaction may end at any time.

A plain read may even run in a transaction of its own, without a difference that anybody can see. At READ COMMITTED each
statement sees what is committed when it begins. So a SELECT that leaves nothing does the same there, unless it asks for
something that stands still until the end of the transaction (``now()``).

What happens in a view, a trigger or an operator is not seen here. If it writes, PostgreSQL refuses that in a read-only
transaction.
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import TextualSelect

from .comment_text import without_comment

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import ExecutionContext

__all__ = ["Reading", "is_plain_read", "judge", "remember_as_writing"]


class Reading(IntEnum):
    """What a statement does, as far as its text shows. Each one includes those before it."""

    #: it may leave something
    DOUBTFUL = 0
    #: it only reads
    LEAVES_NOTHING = 1
    #: it does so whatever the transaction
    PLAIN = 2


#: What separates words but has none: placeholders, strings, comments. A quoted name becomes a quote.
_PLACEHOLDER: Final = re.compile(r"%(?:%|\([^)]*\)s)")
_QUOTED: Final = re.compile(r"""'(?P<string>[^']*)'|"(?P<name>[^"]*)"|--[^\n\r]*|/\*(?:[^*/]|\*(?!/)|/(?!\*))*\*/""")

#: Words, and numbers, whose dot is none between names. To PostgreSQL ("Lexical Structure") any character outside of
#: ASCII is a part of a word, also a space.
_SPACE: Final = r"[ \t\n\r\f\v]*"
_NAME: Final = r"[A-Za-z_\x80-\U0010ffff][A-Za-z0-9_\x80-\U0010ffff]*"
_WORD: Final = re.compile(rf"""[0-9]+\.?|(?P<dot>\.?){_SPACE}(?P<word>{_NAME}|")(?P<call>(?:{_SPACE}\()?)""")

#: What only a statement that is not taken apart here has: strings with escapes, dollar quotes, comments in comments,
#: a second statement.
_TOO_HARD: Final = re.compile(r"\\|\$|/\*|\*/|;")

#: Words of what is no read, or locks, or has names with escapes.
_DOUBTFUL: Final = frozenset("delete insert into merge update for lock uescape".split())  # noqa: SIM905  # as below
#: Words that ask for the time at which the transaction began, and functions that do.
_TIMES: Final = frozenset("current_date current_time current_timestamp localtime localtimestamp now age".split())  # noqa: SIM905

#: Functions that tell of the connection. Behind a pooler each transaction may have another one.
_CONNECTION_FUNCTIONS: Final = """
    current_database current_schema inet_client_addr inet_client_port inet_server_addr inet_server_port pg_backend_pid
    pg_is_in_recovery version
"""
_OF_CONNECTION: Final = frozenset(_CONNECTION_FUNCTIONS.split())

#: Strings that are the time at which the transaction began, once they are cast ("Special Date/Time Inputs"): in lower
#: case. Most strings are told by less than the pattern.
_MOMENT: Final = re.compile(r"(?<![a-z])(?:now|today|tomorrow|yesterday)(?![a-z])")
_LONGEST_MOMENT: Final = 200

#: Words that may stand before a parenthesis: keywords, types with a length, and functions that PostgreSQL declares
#: IMMUTABLE or STABLE and that do not depend on the transaction ("Function Volatility Categories"). Any other word
#: may be a function that does.
_KEYWORDS: Final = """
    all and any array as between case distinct else except exists from group having ilike in intersect lateral like
    limit not offset on or order row select some then to union using values when where with
"""
_TYPES: Final = "bit char character decimal float interval numeric time timestamp varchar"
_FUNCTIONS: Final = """
    abs array_agg array_length avg bool_and bool_or btrim cardinality cast ceil ceiling char_length coalesce concat
    concat_ws count cume_dist date_part date_trunc dense_rank every exp extract first_value floor generate_series
    greatest json_agg json_array_length json_build_array json_build_object json_object_agg jsonb_agg
    jsonb_array_length jsonb_build_array jsonb_build_object jsonb_object_agg lag last_value lead least left length ln
    log lower lpad ltrim max md5 min mod nth_value ntile nullif octet_length percent_rank position power rank repeat
    regexp_replace replace reverse right round row_number row_to_json rpad rtrim sign split_part sqrt starts_with stddev
    string_agg strpos substr substring sum to_char to_json to_jsonb to_timestamp to_tsquery to_tsvector trim trunc
    ts_rank unnest upper variance websearch_to_tsquery
"""
_MAY_BE_CALLED: Final = frozenset(f"{_KEYWORDS} {_TYPES} {_FUNCTIONS}".split())

#: Keywords that may be names of functions as well. SQLAlchemy has a space after a keyword, and none after a function.
_KEYWORDS_WITH_SPACE: Final = frozenset(["by", "filter", "join", "over"])

#: What was found out of statements, by their text. The texts are those of the engines' statement caches, but SQLAlchemy
#: also makes one for each length of an IN.
_known: dict[str, Reading] = {}
_KNOWN_AT_MOST: Final = 2000
#: A longer text is doubtful. To take it apart, and to remember it, costs more than a wait.
_LONGEST: Final = 10_000


def is_plain_read(statement: str, parameters: Any, context: ExecutionContext) -> bool:
    """Whether a statement is a SELECT of SQLAlchemy's own making that needs no transaction around it.

    :param statement: as it is sent to the database.
    :param parameters: the values of its placeholders.
    """
    compiled: Any = context.compiled
    if compiled is None or judge(statement) is not Reading.PLAIN:
        return False
    clause = compiled.statement
    if not getattr(clause, "is_select", False) or isinstance(clause, TextualSelect):
        return False
    return not (parameters and _may_be_moment(parameters))


def judge(statement: object) -> Reading:
    """Judge a statement as it is sent to the database. One that is an object of the driver is doubtful."""
    if not isinstance(statement, str):
        return Reading.DOUBTFUL
    known = _known.get(statement)
    if known is not None:
        return known
    if len(statement) > _LONGEST:
        return Reading.DOUBTFUL
    # It is known by its text without the comment, which may be another one each time.
    bare = without_comment(statement)
    known = _known.get(bare)
    return _remember(bare, _judge(bare)) if known is None else known


def remember_as_writing(statement: str) -> None:
    """Remember that a statement has tried to write, although it looked like a plain read."""
    _remember(without_comment(statement), Reading.DOUBTFUL)


def _remember(statement: str, reading: Reading) -> Reading:
    if len(_known) >= _KNOWN_AT_MOST:
        _known.clear()
    _known[statement] = reading
    return reading


def _judge(statement: str) -> Reading:
    bare = _QUOTED.sub(_unquoted, _PLACEHOLDER.sub("?", statement))
    if _TOO_HARD.search(bare):
        return Reading.DOUBTFUL
    words = [(match["word"], match["dot"], match["call"]) for match in _WORD.finditer(bare) if match["word"]]
    if not words or words[0][0].lower() not in ("select", "with"):
        return Reading.DOUBTFUL
    return min(map(_judge_word, words))


def _unquoted(match: re.Match[str]) -> str:
    if "\\" in match[0]:
        return "\\"  # It may end elsewhere.
    if match["name"] is not None:
        return ' " '
    string = match["string"]
    if string is None:
        return " "
    return " current_timestamp " if _may_be_moment(string) else " '' "


def _may_be_moment(value: Any) -> bool:
    if isinstance(value, str):
        if len(value) > _LONGEST_MOMENT:
            return True
        value = value.lower()
        return ("now" in value or "day" in value or "tomorrow" in value) and _MOMENT.search(value) is not None
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return False
    return any(map(_may_be_moment, value))


def _judge_word(found: tuple[str, str, str]) -> Reading:
    word, dot, call = found
    word = word.lower() if word.isascii() else word  # The Kelvin sign would become a "k".
    if not dot and (word in _TIMES or (call and word in _OF_CONNECTION)):
        return Reading.LEAVES_NOTHING
    if call:
        is_known = not dot and (word in _MAY_BE_CALLED or (call != "(" and word in _KEYWORDS_WITH_SPACE))
    else:
        is_known = dot != "" or word not in _DOUBTFUL
    return Reading.PLAIN if is_known else Reading.DOUBTFUL
