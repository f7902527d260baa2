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

#: of the milliseconds since 1970, which have 13 now
MOST_DIGITS = 16
#: of a position, which has 64 bits
MOST_DIGITS_OF_POSITION = 20


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
        before, found, value = cookies.partition(self._begin)
        if not found:
            return None
        if self._begin not in value and (not before or before.endswith(("; ", ";"))):
            return self._read_value(value.partition(";")[0])
        # A client may have several by one name, and others that have this one in their name or value.
        cookies = [cookie.strip() for cookie in cookies.split(";")]
        values = [cookie[len(self._begin) :] for cookie in cookies if cookie.startswith(self._begin)]
        return _together(map(self._read_value, values))

    def _read_value(self, value: str) -> Mark | None:
        if value.isdecimal() and len(value) <= MOST_DIGITS:
            seconds = int(value) / 1000
            # As is_recent(): what is older is on every replica, and nobody has to ask them.
            return Mark(seconds, None) if abs(time.time() - seconds) < self.seconds else None
        milliseconds, point, position = value.partition("." if "." in value else "+")
        if not (milliseconds.isdecimal() and position.isdecimal()):
            return None
        if len(milliseconds) > MOST_DIGITS or len(position) > MOST_DIGITS_OF_POSITION:
            return None
        return Mark(int(milliseconds) / 1000, int(position), point == ".")

    def is_recent(self, mark: Mark) -> bool:
        """Whether a replica may not have the write, by the time that has passed; whoever's clock is ahead."""
        return abs(time.time() - mark.time) < self.seconds

    def give(
        self, written: Mark | None, environ: Mapping[str, Any] | None, headers: list[tuple[str, str]]
    ) -> list[tuple[str, str]]:
        """``headers``, with one that hands a mark to the client.

        :param written: None for a write now, or later, of which no position is known.
        """
        others: list[Mark | None] = []
        if environ is not None and (written is None or written.position is None or not written.is_exact):
            known = self.read(environ)
            if known is not None:  # The client has one cookie: the position of an earlier write stays in it.
                others.append(known)
        for _, value in headers:
            if value.startswith(self._begin):  # An application inside of this one has given it.
                others.append(self._read_value(value.partition(";")[0].removeprefix(self._begin)))
                headers = [header for header in headers if header[1] is not value]
        if others:
            written = _together((written or Mark(time.time(), None), *others))
        return [*headers, self.header(written, environ)]

    def header(self, mark: Mark | None, environ: Mapping[str, Any] | None) -> tuple[str, str]:
        """The header that hands a mark to the client; without one, that of a write now, its position unknown."""
        if mark is None or mark.position is None:
            cookie = f"{self._begin}{int((time.time() if mark is None else mark.time) * 1000)}{self._for_seconds}"
        else:
            point = "." if mark.is_exact else "+"
            cookie = f"{self._begin}{int(mark.time * 1000)}{point}{mark.position}{self._for_position}"
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
