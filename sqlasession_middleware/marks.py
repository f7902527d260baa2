"""What a client that has written carries to its next request, so that it reads what it wrote.

A cookie holds when that was and, from PostgreSQL, how far the write-ahead log went. It says only which replicas are
too old for this client: whoever forges it reads from the primary, or data as old as anybody else's.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from sqlalchemy import URL

__all__ = ["Mark", "Marker"]

#: For how long a client keeps a position: until then it reads from replicas that have reached it, however late.
KEEP_POSITION = 24 * 60 * 60


class Mark(NamedTuple):
    """A write that a client knows of.

    :param time: when it was, in seconds since 1970.
    :param position: of PostgreSQL's write-ahead log, in bytes; None where only the time is known.
    :param is_exact: whether the position is that of the last write: the one at ``time`` may have been later.
    """

    time: float
    position: int | None
    is_exact: bool = True


class Marker:
    """The cookie of one database.

    :param url: of the primary. Applications on the same database share the cookie, and others have their own, wherever
        they are mounted.
    :param seconds: for how long a replica may be behind, where its position is not known.
    """

    def __init__(self, url: URL, seconds: float) -> None:
        self.seconds = seconds
        place = repr((url.get_backend_name(), url.host, url.port, url.database, url.query.get("host")))
        self.name = f"sqlasession_{sha256(place.encode()).hexdigest()[:8]}"
        self._begin = f"{self.name}="
        attributes = "Path=/; HttpOnly; SameSite=Lax"
        self._for_seconds = f"; Max-Age={int(seconds) + 1}; {attributes}"
        self._for_position = f"; Max-Age={int(max(seconds, KEEP_POSITION)) + 1}; {attributes}"

    def read(self, environ: Mapping[str, Any]) -> Mark | None:
        """The mark that a request carries, if it carries one that can be read and may matter."""
        cookies = environ.get("HTTP_COOKIE")
        if not cookies:
            return None
        _, found, value = cookies.partition(self._begin)
        if not found:
            return None
        if self._begin not in value:
            return self._read_value(value)
        # A client may have several by one name.
        return _together(map(self._read_value, cookies.split(self._begin)[1:]))

    def _read_value(self, value: str) -> Mark | None:
        """:param value: of the cookie, and whatever follows it."""
        milliseconds, _, position = value.partition(";")[0].partition(".")
        try:
            if not position and "+" in milliseconds:
                milliseconds, _, position = milliseconds.partition("+")
                return Mark(int(milliseconds) / 1000, int(position), is_exact=False)
            seconds = int(milliseconds) / 1000
            if position:
                return Mark(seconds, int(position))
        except (ValueError, OverflowError):  # Garbled, or forged.
            return None
        # As is_recent(): what is older is on every replica, and nobody has to ask them.
        return Mark(seconds, None) if abs(time.time() - seconds) < self.seconds else None

    def is_recent(self, mark: Mark) -> bool:
        """Whether a replica may not have the write, by the time that has passed; whoever's clock is ahead."""
        return abs(time.time() - mark.time) < self.seconds

    def give(
        self, written: Mark | None, environ: Mapping[str, Any] | None, headers: list[tuple[str, str]]
    ) -> list[tuple[str, str]]:
        """``headers``, with one that hands a mark to the client.

        :param written: None for a write now, or later, of which no position is known.
        """
        mark = written or Mark(time.time(), None)
        if environ is not None and (mark.position is None or not mark.is_exact):
            # The client has one cookie: the position of an earlier write stays in it.
            mark = _together((mark, self.read(environ))) or mark
        others = [header for header in headers if not header[1].startswith(self._begin)]
        if len(others) < len(headers):  # An application inside of this one has given it.
            given = [value.removeprefix(self._begin) for _, value in headers if value.startswith(self._begin)]
            mark = _together((mark, *map(self._read_value, given))) or mark
        return [*others, self.header(mark, environ)]

    def header(self, mark: Mark, environ: Mapping[str, Any] | None) -> tuple[str, str]:
        """The header that hands a mark to the client."""
        cookie = f"{self._begin}{int(mark.time * 1000)}"
        if mark.position is None:
            cookie += self._for_seconds
        else:
            cookie += f"{'.' if mark.is_exact else '+'}{mark.position}{self._for_position}"
        is_secure = environ is not None and environ.get("wsgi.url_scheme") == "https"
        return ("Set-Cookie", f"{cookie}; Secure" if is_secure else cookie)


def _together(marks: Iterable[Mark | None]) -> Mark | None:
    """What somebody knows who knows of several writes."""
    known = [mark for mark in marks if mark is not None]
    if not known:
        return None
    positions = [mark.position for mark in known if mark.position is not None]
    vague = [mark.time for mark in known if mark.position is None or not mark.is_exact]
    return Mark(max(vague or [mark.time for mark in known]), max(positions, default=None), not vague)
