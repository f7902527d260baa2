"""A stream that waits holds no connection.

A stream of events may stay open for hours, and most of that time it waits. What belongs to one event is a unit of
work: at its end the transaction is ended and the connection goes back to the pool, until the next event needs one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

from sqlalchemy.orm import Session, SessionTransactionOrigin

from .bodies import iterate
from .context import Scope
from .drivers import can_tell_writes, has_open_cursor, has_written
from .sessions import close_transaction, current_scope, has_noted_cursor, has_noted_write, open_connections

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["release", "steps", "unit_ends"]

EVENT_STREAM = "text/event-stream"

# An event ends with a blank line: two ends of lines in a row, each of them CRLF, LF or CR (HTML Standard, "Server-sent
# events", 9.2.5 and 9.2.6).
_BLANK_LINE = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r)")


def unit_ends(headers: list[tuple[str, str]], more: Collection[str] = ()) -> Callable[[bytes], bool] | None:
    """For a stream of units, what tells of each chunk whether a unit ends with it; None for any other response.

    :param headers: of the response.
    :param more: content types, beside ``text/event-stream``, each of whose chunks is a unit.
    """
    for name, value in headers:
        if name.lower() == "content-type":
            content_type = value.partition(";")[0].strip().lower()
            if content_type == EVENT_STREAM:
                return EventEnds().find
            return (lambda chunk: True) if content_type in more else None
    return None


class EventEnds:
    """Finds the ends of events in the chunks of a stream, which may be cut anywhere."""

    def __init__(self) -> None:
        self._rest = b""

    def find(self, chunk: bytes) -> bool:
        """Whether an event ends in ``chunk``, the next one of the stream."""
        text = self._rest + chunk
        end = 0
        for blank_line in _BLANK_LINE.finditer(text):
            end = blank_line.end()
        self._rest = text[max(end, len(text) - 3) :]
        return end > 0


def steps(scope: Scope, body: Iterable[bytes]) -> Iterator[bytes]:
    """The steps of a response's body; where it turns out to be a stream, each unit gives back what it took."""
    if scope.headers is None:
        return chain.from_iterable(_decide_late(scope, iterate(body)))
    ends = unit_ends(scope.headers, scope.owner.streams)
    return iter(body) if ends is None else _give_back_after_units(scope, iterate(body), ends)


def _decide_late(scope: Scope, iterator: Iterator[bytes]) -> Iterator[Iterable[bytes]]:
    # An application that is a generator tells the headers in its first step.
    for first in iterator:
        ends = unit_ends(scope.headers or [], scope.owner.streams)
        if ends is None:
            yield (first,)
            yield iterator
        else:
            yield _give_back_after_units(scope, chain((first,), iterator), ends)
        return


def _give_back_after_units(scope: Scope, iterator: Iterator[bytes], ends: Callable[[bytes], bool]) -> Iterator[bytes]:
    for chunk in iterator:
        if ends(chunk):
            end_reading(scope)
        yield chunk


def release() -> bool:
    """End the transaction of the current scope's session, and give its connection back to the pool.

    To be called before something that takes long and needs no database. Loaded objects stay attached; they are
    loaded anew where the session expires them at a commit, which is the default. In a stream of events, once the first
    has left, and where a :class:`~sqlasession_middleware.transaction.TransactionMiddleware` is in charge, what was
    written is committed, as at the end of each event. Anywhere else only a transaction that has only read is ended.

    :returns: whether no connection is held any more. It is held on to by unsaved or uncommitted changes, by row
        locks, by rows still to be fetched from a server-side cursor, and in a block such as ``with session.begin():``.
    :raises ScopeError: outside of a scope.
    """
    scope = current_scope()
    attempt = scope.transaction
    if attempt is not None and attempt.in_units:
        return attempt.end_unit()
    return end_reading(scope)


def end_reading(scope: Scope) -> bool:
    """End the transaction if it has only read.

    :returns: whether no connection is held any more.
    """
    opened = scope.session
    if opened is None:
        return True
    held = held_connections(opened)
    if not held:
        return held is not None
    if opened.new or opened.dirty or opened.deleted:
        return False
    if any(_may_have_written(opened, connection) for connection in held):
        return False
    close_transaction(opened)
    if opened.expire_on_commit:
        opened.expire_all()
    return True


def held_connections(opened: Session) -> list[Connection] | None:
    """The connections that could be given back by ending the transaction; None if it must not be ended now."""
    transaction = opened.get_transaction()
    if transaction is None:
        return []
    held = open_connections(opened)
    if held and (
        transaction.origin is not SessionTransactionOrigin.AUTOBEGIN
        or opened.in_nested_transaction()
        or not opened.is_active
        or has_noted_cursor(opened)
        or any(has_open_cursor(connection) for connection in held)
    ):
        return None
    return held


def _may_have_written(opened: Session, connection: Connection) -> bool:
    if can_tell_writes(connection.dialect.name):
        return has_written(connection)
    return has_noted_write(opened)
