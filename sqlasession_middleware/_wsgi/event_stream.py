"""Streams whose body consists of units, such as ``text/event-stream``, and where each unit ends."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

__all__ = ["EVENT_STREAM", "EventEnds", "unit_ends"]

EVENT_STREAM = "text/event-stream"

# An event ends with a blank line: two ends of lines in a row, each of them CRLF, LF or CR (HTML Standard, "Server-sent
# events", 9.2.5 and 9.2.6).
_BLANK_LINE = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r)")


def unit_ends(headers: list[tuple[str, str]], content_types: Collection[str] = ()) -> Callable[[bytes], bool] | None:
    """A function that is called with each chunk of the body, and returns whether a unit ends in that chunk.

    :param headers: the response's headers.
    :param content_types: further content types, besides ``text/event-stream``; each of their chunks is a unit.
    :returns: the function, or None if the response is not a stream of units.
    """
    for name, value in headers:
        if name.lower() == "content-type":
            value = value.lower()
            if EVENT_STREAM not in value and not content_types:
                return None  # As most responses: this is a part of each request.
            content_type = value.partition(";")[0].strip()
            if content_type == EVENT_STREAM:
                return EventEnds().find
            return (lambda chunk: True) if content_type in content_types else None
    return None


class EventEnds:
    """Finds the ends of events in the chunks of a stream. A chunk may end anywhere, also within a blank line."""

    def __init__(self) -> None:
        self._rest = b""

    def find(self, chunk: bytes) -> bool:
        """Return whether an event ends in ``chunk``, the next one of the stream."""
        text = self._rest + chunk
        end = 0
        for blank_line in _BLANK_LINE.finditer(text):
            end = blank_line.end()
        self._rest = text[max(end, len(text) - 3) :]
        return end > 0
