"""A record of everything that the process does in a block: for tests.

An engine is recorded from its first connection or statement in a block on. Connections that were there before, such as
that of ``isolated()``, have no holds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine, event

from .._database.forks import fork_safe_lock
from .listeners import record_engine, recorded_name
from .objects import record_objects
from .present import add_block, remove_block
from .record import Record
from .statements import note_execution

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.engine import ExecutionContext

__all__ = ["recorded"]

_listening = fork_safe_lock()


@contextmanager
def recorded() -> Iterator[Record]:
    """Record everything that the process does in a block, whichever request or thread it is in."""
    record = Record()
    record.most = sys.maxsize
    record_objects()
    with _listening:
        if add_block(record):
            for name, listener in _LISTENERS.items():
                event.listen(Engine, name, listener)
    try:
        yield record
    finally:
        with _listening:
            if remove_block(record):
                for name, listener in _LISTENERS.items():
                    event.remove(Engine, name, listener)


def _record_used(connection: Connection, *arguments: Any) -> None:
    engine = connection.engine
    if recorded_name(engine) is None:
        record_engine(engine, _name_of(engine))


def _end(
    connection: Connection, cursor: Any, statement: str, parameters: Any, context: ExecutionContext, executemany: bool
) -> None:
    # The first text that is sent on a connection that was there before has a context of the usual class.
    note_execution(context)


def _name_of(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=True)


_LISTENERS: dict[str, Any] = {
    "engine_connect": _record_used,
    "before_execute": _record_used,
    "before_cursor_execute": _record_used,
    "after_cursor_execute": _end,
}
