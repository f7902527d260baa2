"""A request as the inspector keeps it: plain data, which JSON can hold.

A record leads to objects of the request: compiled statements, values, errors with their frames. What is kept of it does
not. Times are seconds since the begin of the request.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import parse_qsl

from .._recording.masking import SQL_SHOWN, hidden_in_sql, mask_parameters, mask_source, mask_sql, shown_error
from .._recording.repeats import find_repeats
from .._recording.stacks import application_frames, format_stack

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from .._recording.record import Record, Statement
    from .._recording.stacks import Stack

__all__ = ["SUMMARY", "Engines", "Kept", "Original", "keep", "query_names", "size_of", "summary"]

#: What the list shows of a request.
SUMMARY: Final = (
    *("id", "process", "at", "method", "path", "tenant", "query"),
    *("status", "raised", "is_running", "seconds", "database"),
    *("waited", "fetched", "committing", "held", "queries", "trips", "warnings", "attempts", "outcome"),
)
#: How large the values may be that are kept so that the statement can be explained.
_VALUES_AT_MOST: Final = 64 * 1024
#: The classes of values that are kept so.
_SIMPLE: Final = (str, bytes, int, float, bool, type(None))


class Original(NamedTuple):
    """A statement as the driver got it. It has the values that are not shown.

    :param secrets: those of them, as texts.
    """

    sql: str
    parameters: Any
    engine: str
    is_read: bool
    secrets: frozenset[str]


class Kept(NamedTuple):
    """A request.

    :param data: for pages and JSON.
    :param originals: by the number of the statement; a statement that is not there cannot be explained.
    """

    data: dict[str, Any]
    originals: Mapping[int, Original]


class Engines(NamedTuple):
    """What is known of engines by their names.

    :param find: those of a name. There may be several.
    :param without_secrets: takes the passwords of all applications out of a text.
    """

    find: Callable[[str], list[Engine]]
    without_secrets: Callable[[str], str]

    def hides(self, name: str) -> bool:
        """Whether the values of an engine's statements are not to be shown. Those of one that is not known are not."""
        found = self.find(name)
        return not found or any(engine.hide_parameters for engine in found)

    def once(self) -> Engines:
        """The same, which looks at each name and text once: a request repeats most of them."""
        return Engines(lru_cache(None)(self.find), lru_cache(None)(self.without_secrets))


def keep(record: Record, number: str, engines: Engines, told: Mapping[str, Any]) -> Kept:
    """What is kept of a record. The request may still run.

    :param number: the ID of the request.
    :param told: further data.
    """
    begin, engines = record.begin, engines.once()
    statements = [each for each in list(record.statements) if hasattr(each, "begin")]  # One may begin just now.
    shown, originals = [], {}
    for index, statement in enumerate(statements):
        data, original = _keep_statement(statement, begin, engines)
        shown.append(data)
        if original is not None:
            originals[index] = original
    repeats = find_repeats(statements)
    numbers = {id(each): index for index, each in enumerate(statements)}
    data = {
        "id": number,
        "process": os.getpid(),
        "at": record.at,
        "method": record.method,
        "path": _as_sent(record.path),
        "tenant": record.tenant,
        "status": record.status,
        "seconds": (record.end or perf_counter()) - begin,
        "database": record.seconds,
        "waited": record.waited,
        "fetched": record.fetched,
        "committing": record.committing,
        "held": record.held,
        "queries": record.count,
        "trips": record.trips,
        "warnings": len(repeats),
        "attempts": record.last_attempt,
        "outcome": record.outcome,
        "statements": shown,
        "repeats": [
            {
                "statements": [numbers[id(each)] for each in repeat.statements],
                "relationship": repeat.statement.relationship,
                "remedy": repeat.remedy,
                "stack": engines.without_secrets(_stack(repeat.statement.stack)),
            }
            for repeat in repeats
        ],
        "waits": [
            {
                "kind": each.kind,
                "engine": each.engine,
                "attempt": each.attempt,
                "begin": each.begin - begin,
                "end": each.end - begin,
            }
            for each in list(record.waits)
        ],
        "holds": [
            {
                "engine": each.engine,
                "connection": each.connection,
                "attempt": each.attempt,
                "begin": each.begin - begin,
                "end": each.end - begin if each.end else None,
            }
            for each in list(record.holds)
        ],
        "ends": [
            {
                "kind": each.kind,
                "engine": each.engine,
                "attempt": each.attempt,
                "begin": each.begin - begin,
                "end": each.end - begin,
                "error": None if each.error is None else engines.without_secrets(_named(each.error)),
                "is_outcome_unknown": each.is_outcome_unknown,
            }
            for each in list(record.ends)
        ],
        "objects": {f"{kind.__module__}.{kind.__qualname__}": count for kind, count in list(record.objects.items())},
        **told,
    }
    data["status"] = engines.without_secrets(str(data["status"]))
    return Kept(data, originals)


def _as_sent(path: str) -> str:
    """A path as a browser shows it. WSGI has each of its bytes as a character."""
    return path.encode("latin-1", "replace").decode("utf-8", "replace")


def query_names(query: str) -> list[str]:
    """The names in the query of a URL, without what has no value: that may be one itself."""
    return list(dict.fromkeys(name[:100] for name, value in parse_qsl(query, max_num_fields=None) if value))[:20]


def size_of(kept: Kept) -> int:
    """About how many bytes a request takes."""
    size = 2000 + len(kept.data["path"])
    for each in kept.data["statements"]:
        size += 1500 + len(each["sql"]) + len(each["error"] or "")
        size += sum(len(value) for row in each["parameters"] for pair in row for value in pair)
    for original in kept.originals.values():
        size += 500 + len(original.sql) + _size_of(original.parameters) + sum(map(len, original.secrets))
    return size + 300 * sum(len(kept.data[name]) for name in ("waits", "holds", "ends", "objects"))


def _keep_statement(statement: Statement, begin: float, engines: Engines) -> tuple[dict[str, Any], Original | None]:
    name = statement.engine
    masked = mask_parameters(statement, engines.hides(name))
    hold = statement.hold
    error = statement.error
    sql = engines.without_secrets(mask_sql(statement))
    hidden = hidden_in_sql(statement)
    original, reason = _original(statement, masked.secrets | hidden)
    data = {
        "engine": name,
        "connection": None if hold is None else hold.connection,
        "attempt": statement.attempt,
        "begin": statement.begin - begin,
        "seconds": statement.seconds,
        "fetched": statement.fetched,
        "is_running": not statement.end,
        "sql": sql,
        "fingerprint": engines.without_secrets(statement.fingerprint[:SQL_SHOWN]) if sql == statement.sql else sql,
        "is_read": statement.is_read,
        "rows": statement.rows,
        "relationship": statement.relationship,
        "sets": masked.total if statement.is_many else 1,
        "parameters": [[(key, engines.without_secrets(value)) for key, value in row] for row in masked.sets],
        "has_secrets": masked.has_secrets,
        "error": None if error is None else engines.without_secrets(shown_error(error, masked, hidden)),
        "stack": engines.without_secrets(_stack(statement.stack)),
        "explain": reason,
    }
    return data, original


def _original(statement: Statement, secrets: frozenset[str]) -> tuple[Original | None, str]:
    """What can be explained, and else why it cannot."""
    values = statement.parameters
    if statement.is_many and isinstance(values, list | tuple) and values and not isinstance(values[0], _SIMPLE):
        values = values[0]
    if len(statement.sql) > SQL_SHOWN:
        return None, "It is too long to be kept as it was sent."
    if _size_of(values) > _VALUES_AT_MOST or sum(map(len, secrets)) > _VALUES_AT_MOST:
        return None, "Its values are too large to be kept, or not of Python's own classes."
    copied = dict(values) if isinstance(values, Mapping) else tuple(values or ())
    return Original(statement.sql, copied, statement.engine, statement.is_read, secrets), ""


def _size_of(values: Any) -> int:
    """How large values are; very much if they lead to further objects."""
    size = 0
    for value in values.values() if isinstance(values, Mapping) else values or ():
        if type(value) in (str, bytes):
            size += len(value)
        elif type(value) not in _SIMPLE and type(value).__module__ not in ("datetime", "decimal", "uuid"):
            return _VALUES_AT_MOST + 1
        size += 50
    return size


def _named(error: BaseException) -> str:
    """The kind of an error: its text shows values."""
    return type(getattr(error, "orig", None) or error).__name__


@lru_cache(1000)
def _stack(stack: Stack) -> str:
    lines = format_stack(application_frames(stack)).splitlines()
    return "\n".join(line if line.startswith("  File ") else mask_source(line) for line in lines)


def summary(data: Mapping[str, Any]) -> dict[str, Any]:
    """What the list shows of a request."""
    return {name: data[name] for name in SUMMARY}
