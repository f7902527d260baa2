"""The records that what happens now belongs to: of the request around it, and of the blocks of tests."""

from __future__ import annotations

from typing import Any

from .._scope.scope import Scope, current
from .record import RECORD, Record

__all__ = ["add_block", "note_trips", "present_records", "remove_block"]

#: Those of blocks, which are of everything that the process does.
_blocks: tuple[Record, ...] = ()


def present_records() -> tuple[tuple[Record, ...], int]:
    """The records, and the number of the request's attempt."""
    scope: Any = current.get(None)
    while isinstance(scope, Scope):
        environ = scope.environ
        if environ is not None:
            record = environ.get(RECORD)
            if record is not None:
                transaction = scope.transaction
                if transaction is not None and (not record.transactions or record.transactions[-1] is not transaction):
                    record.transactions.append(transaction)
                attempt = record.last_attempt = environ.get("sqlasession.attempt", 1)
                return (record, *_blocks) if _blocks else (record,), attempt
            if _blocks:
                return _blocks, environ.get("sqlasession.attempt", 1)
        scope = scope.token.old_value if hasattr(scope, "token") else None
    return _blocks, 1


def note_trips(trips: int) -> None:
    """Note that a server was waited for, beside what is told of statements and their transactions."""
    for record in present_records()[0]:
        record.trips += trips


def add_block(record: Record) -> bool:
    """Have a record get everything.

    :returns: whether it is the only one.
    """
    global _blocks
    _blocks = (*_blocks, record)
    return len(_blocks) == 1


def remove_block(record: Record) -> bool:
    """End that.

    :returns: whether none is left.
    """
    global _blocks
    _blocks = tuple(each for each in _blocks if each is not record)
    return not _blocks
