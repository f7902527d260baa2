"""What a client that has written carries to its next request, so that it reads what it wrote.

A cookie holds when that was and, from PostgreSQL, how far the write-ahead log went. It says only which replicas are
too old for this client: whoever forges it reads from the primary, or data as old as anybody else's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
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
    """

    time: float
    position: int | None


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
        # A client may have several by one name: the last write counts.
        marks = map(self._read_value, cookies.split(self._begin)[1:])
        return max((mark for mark in marks if mark), key=lambda mark: (mark.position or 0, mark.time), default=None)

    def _read_value(self, value: str) -> Mark | None:
        """:param value: of the cookie, and whatever follows it."""
        milliseconds, _, position = value.partition(";")[0].partition(".")
        try:
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

    def header(self, mark: Mark | None, environ: Mapping[str, Any] | None) -> tuple[str, str]:
        """The header that hands a mark to the client; without one, that of a write now, its position unknown."""
        if mark is None or mark.position is None:
            cookie = f"{self.name}={int((time.time() if mark is None else mark.time) * 1000)}{self._for_seconds}"
        else:
            cookie = f"{self.name}={int(mark.time * 1000)}.{mark.position}{self._for_position}"
        is_secure = environ is not None and environ.get("wsgi.url_scheme") == "https"
        return ("Set-Cookie", f"{cookie}; Secure" if is_secure else cookie)
