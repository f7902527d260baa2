"""Where the time of a request went: lanes of a drawing, and a sum.

In the drawing, each connection has a lane for each time that it was held. In the sum, each moment belongs to one thing,
so that the parts add up to the whole: what is waited for comes before what goes on meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, Final, NamedTuple

__all__ = ["WIDTH", "Bar", "Lane", "Part", "draw", "summed"]

#: How wide the drawing is, in its own units.
WIDTH: Final = 1000.0

#: What a moment can belong to, in the order of precedence, and what it is called.
PARTS: Final = {
    "commit": "COMMIT",
    "rollback": "ROLLBACK",
    "statement": "statements",
    "fetch": "fetching rows",
    "connect": "connecting",
    "pool": "waiting for the pool",
    "hold": "connection held, idle",
    "application": "without a connection",
}


class Bar(NamedTuple):
    """A part of a lane.

    :param kind: one of :data:`PARTS`, or "attempt".
    :param x: and ``width``: in units of the drawing.
    :param statement: the number of the statement, if it is one.
    """

    kind: str
    x: float
    width: float
    title: str
    statement: int | None = None


class Lane(NamedTuple):
    """What happened on one connection, or in one attempt."""

    title: str
    bars: list[Bar]


class Part(NamedTuple):
    """A part of the sum.

    :param seconds: how long it was in all.
    """

    kind: str
    name: str
    seconds: float
    bar: Bar


def draw(data: Mapping[str, Any]) -> list[Lane]:
    """The lanes of a request: its attempts, its waits, and its connections."""
    lanes: dict[Any, Lane] = {}
    total = data["seconds"]

    def add(key: Any, lane: str, kind: str, each: Mapping[str, Any], title: str, statement: int | None = None) -> None:
        begin, end = each["begin"], each["end"]
        bar = Bar(kind, _x(begin, total), _x(end - begin, total), f"{title}: {_ms(end - begin)}", statement)
        lanes.setdefault(key, Lane(lane, [])).bars.append(bar)

    if data["attempts"] > 1:
        for attempt in _attempts(data):
            add("attempts", "attempts", "attempt", attempt, f"attempt {attempt['attempt']}")
    for wait in data["waits"]:
        add("waits", "waits", wait["kind"], wait, f"{PARTS[wait['kind']]}, {wait['engine']}")
    for hold in data["holds"]:
        name = f"{hold['engine']}, connection {hold['connection']}"
        add((hold["engine"], hold["connection"]), name, "hold", _ended(hold, total), "held")
    for number, each in enumerate(data["statements"]):
        name = f"{each['engine']}, connection {each['connection'] or '?'}"
        key = each["engine"], each["connection"]
        sent = each["begin"] + each["seconds"]
        add(key, name, "statement", {"begin": each["begin"], "end": sent}, f"{number + 1}. {each['sql'][:100]}", number)
        if each["fetched"]:
            add(key, name, "fetch", {"begin": sent, "end": sent + each["fetched"]}, "fetching rows", number)
    for end in data["ends"]:
        holding = _holding(data["holds"], end)
        key = (end["engine"], holding["connection"]) if holding else (end["engine"], None)
        name = f"{end['engine']}, connection {key[1] or '?'}"
        add(key, name, end["kind"], end, PARTS[end["kind"]])
    return list(lanes.values())


def summed(data: Mapping[str, Any]) -> list[Part]:
    """The parts that the time of a request is made of. Their seconds, and the widths of their bars, add up."""
    total = data["seconds"]
    spans = list(_spans(data))
    edges = sorted({0.0, total, *(min(max(edge, 0.0), total) for _, *span in spans for edge in span)})
    seconds = dict.fromkeys(PARTS, 0.0)
    for begin, end in pairwise(edges):
        here = {kind for kind, first, last in spans if first <= begin and end <= last}
        seconds[next((kind for kind in PARTS if kind in here), "application")] += end - begin
    parts, x = [], 0.0
    for kind, name in PARTS.items():
        if seconds[kind]:
            width = _x(seconds[kind], total)
            parts.append(Part(kind, name, seconds[kind], Bar(kind, x, width, f"{name}: {_ms(seconds[kind])}")))
            x += width
    return parts


def _spans(data: Mapping[str, Any]) -> Iterable[tuple[str, float, float]]:
    for hold in data["holds"]:
        yield "hold", hold["begin"], _ended(hold, data["seconds"])["end"]
    for each in data["statements"]:
        sent = each["begin"] + each["seconds"]
        yield "statement", each["begin"], sent
        yield "fetch", sent, sent + each["fetched"]
    for each in (*data["waits"], *data["ends"]):
        yield each["kind"], each["begin"], each["end"]


def _attempts(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """From what each attempt did first until the next one did something."""
    begins: dict[int, float] = {}
    for each in (*data["holds"], *data["waits"], *data["statements"]):
        begins[each["attempt"]] = min(each["begin"], begins.get(each["attempt"], each["begin"]))
    ordered = sorted(begins.items(), key=lambda item: item[1])
    ends = [begin for _, begin in ordered[1:]] + [data["seconds"]]
    return [
        {"attempt": attempt, "begin": begin, "end": end} for (attempt, begin), end in zip(ordered, ends, strict=True)
    ]


def _ended(hold: Mapping[str, Any], total: float) -> dict[str, Any]:
    return {**hold, "end": total if hold["end"] is None else hold["end"]}


def _holding(holds: Iterable[Mapping[str, Any]], end: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The connection that a COMMIT or ROLLBACK was sent on: the last one of its engine that was out by then."""
    found = None
    for hold in holds:
        is_out = hold["begin"] <= end["begin"] and (hold["end"] is None or end["end"] <= hold["end"] + 0.001)
        if hold["engine"] == end["engine"] and is_out:
            found = hold
    return found


def _x(seconds: float, total: float) -> float:
    return round(seconds / total * WIDTH, 3) if total else 0.0


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms"
