"""The cookie by which a client reads its own writes.

It stores the time of the client's last write and, from PostgreSQL, the position in the write-ahead log. Its only use is
to exclude replicas that do not have the write yet. A client that forges it reads from the primary, or from a replica as
any client without the cookie.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from sqlalchemy import URL

__all__ = ["LastWrite", "ReadYourWritesCookie"]

#: The ``Max-Age`` of a position in seconds. Until then the client reads only from replicas that have replayed it.
POSITION_MAX_AGE = 24 * 60 * 60

#: the limit for the milliseconds since 1970, which have 13 digits at present
MAX_DIGITS = 16
#: the limit for a position, which has 64 bits
MAX_POSITION_DIGITS = 20


class LastWrite(NamedTuple):
    """The last write of a client.

    :param time: the time of the write, in seconds since 1970.
    :param position: a position in PostgreSQL's write-ahead log, in bytes; None if only the time is known.
    :param is_exact: whether ``position`` belongs to the write at ``time``. If not, it belongs to an earlier write, and
        the position of the last one is unknown.
    """

    time: float
    position: int | None
    is_exact: bool = True


class ReadYourWritesCookie:
    """The cookie of one database.

    :param url: the URL of the primary. Its database determines the name of the cookie, so applications share a cookie
        if they share a database.
    :param seconds: the time after which replicas are assumed to have a write whose position is not known.
    """

    def __init__(self, url: URL, seconds: float) -> None:
        self.seconds = seconds
        place = repr((url.get_backend_name(), url.host, url.port, url.database, url.query.get("host")))
        self.name = f"sqlasession_{sha256(place.encode()).hexdigest()[:8]}"
        self._prefix = f"{self.name}="
        attributes = "Path=/; HttpOnly; SameSite=Lax"
        self._time_attributes = f"; Max-Age={int(seconds) + 1}; {attributes}"
        self._position_attributes = f"; Max-Age={int(max(seconds, POSITION_MAX_AGE)) + 1}; {attributes}"

    def read(self, environ: Mapping[str, Any]) -> LastWrite | None:
        """Return the last write from the cookie of a request, or None.

        An invalid cookie is ignored, and so is one without a position if it is older than ``seconds``.
        """
        cookies = environ.get("HTTP_COOKIE")
        if not cookies:
            return None
        before, found, value = cookies.partition(self._prefix)
        if not found:
            return None
        if self._prefix not in value and (not before or before.endswith(("; ", ";"))):
            return self._read_value(value.partition(";")[0])
        # There may be several cookies of this name, and others whose name or value contains it.
        cookies = [cookie.strip() for cookie in cookies.split(";")]
        values = [cookie[len(self._prefix) :] for cookie in cookies if cookie.startswith(self._prefix)]
        return _merged(map(self._read_value, values))

    def _read_value(self, value: str) -> LastWrite | None:
        if value.isdecimal() and len(value) <= MAX_DIGITS:
            seconds = int(value) / 1000
            # As in is_recent(): an older write is on every replica, so that their positions need not be compared.
            return LastWrite(seconds, None) if abs(time.time() - seconds) < self.seconds else None
        milliseconds, point, position = value.partition("." if "." in value else "+")
        if not (milliseconds.isdecimal() and position.isdecimal()):
            return None
        if len(milliseconds) > MAX_DIGITS or len(position) > MAX_POSITION_DIGITS:
            return None
        return LastWrite(int(milliseconds) / 1000, int(position), point == ".")

    def is_recent(self, last_write: LastWrite) -> bool:
        """Return whether a replica may still lack the write, by its age. Another host's clock may be ahead."""
        return abs(time.time() - last_write.time) < self.seconds

    def give(
        self, written: LastWrite | None, environ: Mapping[str, Any] | None, headers: list[tuple[str, str]]
    ) -> list[tuple[str, str]]:
        """Return ``headers`` with a ``Set-Cookie`` for a write.

        :param written: the write; None for a write at the present time, or later, whose position is not known.
        :param environ: the environ of the request, whose own cookie is merged unless ``written`` has an exact position.
        :param headers: the headers of the response. A ``Set-Cookie`` of the same name is merged and replaced.
        """
        others: list[LastWrite | None] = []
        if environ is not None and (written is None or written.position is None or not written.is_exact):
            known = self.read(environ)
            if known is not None:  # The new cookie replaces this one, and has to keep its position.
                others.append(known)
        for _, value in headers:
            if value.startswith(self._prefix):  # It was set by an inner application on the same database.
                others.append(self._read_value(value.partition(";")[0].removeprefix(self._prefix)))
                headers = [header for header in headers if header[1] is not value]
        if others:
            written = _merged((written or LastWrite(time.time(), None), *others))
        return [*headers, self.header(written, environ)]

    def header(self, last_write: LastWrite | None, environ: Mapping[str, Any] | None) -> tuple[str, str]:
        """Return the ``Set-Cookie`` header for a write.

        :param last_write: the write; None for a write at the present time whose position is not known.
        :param environ: the environ of the request; with ``https`` the cookie is ``Secure``.
        """
        if last_write is None or last_write.position is None:
            seconds = time.time() if last_write is None else last_write.time
            cookie = f"{self._prefix}{int(seconds * 1000)}{self._time_attributes}"
        else:
            point = "." if last_write.is_exact else "+"
            cookie = (
                f"{self._prefix}{int(last_write.time * 1000)}{point}{last_write.position}{self._position_attributes}"
            )
        is_secure = environ is not None and environ.get("wsgi.url_scheme") == "https"
        return ("Set-Cookie", f"{cookie}; Secure" if is_secure else cookie)


def _merged(writes: Iterable[LastWrite | None]) -> LastWrite | None:
    """Return one write with the highest position and the latest time.

    If some writes have no exact position, the time is the latest of these, and the position is not exact.
    """
    known = [each for each in writes if each is not None]
    if not known:
        return None
    positions = [each.position for each in known if each.position is not None]
    vague = [each.time for each in known if each.position is None or not each.is_exact]
    return LastWrite(max(vague or [each.time for each in known]), max(positions, default=None), not vague)
