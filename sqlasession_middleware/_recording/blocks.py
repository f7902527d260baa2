"""A record of everything that the process does in a block: for tests.

Each connection tells its engine when it is made, and from then on the engine is recorded. What is sent on connections
that were there before the block is noted as well, such as that of ``isolated()``, but only the statements.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from sqlalchemy import Engine, event

from .._database.forks import fork_safe_lock
from .listeners import record_engine, recorded_name
from .objects import record_objects
from .present import add_block, remove_block
from .record import Record
from .statements import StatementListeners

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.engine import ExceptionContext

__all__ = ["recorded"]

#: Those of engines that are not recorded, as they have made no connection since the block began.
_statements: WeakKeyDictionary[Engine, StatementListeners] = WeakKeyDictionary()
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


def _record_used(connection: Connection) -> None:
    engine = connection.engine
    if recorded_name(engine) is None:
        record_engine(engine, _name_of(engine))
        _statements.pop(engine, None)


def _begin(connection: Connection, *arguments: Any) -> None:
    engine = connection.engine
    if recorded_name(engine) is None:
        if engine not in _statements:
            _statements[engine] = StatementListeners(engine, _name_of(engine))
        _statements[engine].begin_statement(connection, *arguments)


def _end(connection: Connection, *arguments: Any) -> None:
    if connection.engine in _statements:
        _statements[connection.engine].end_statement(connection, *arguments)


def _fail(context: ExceptionContext) -> None:
    if context.engine is not None and context.engine in _statements:
        _statements[context.engine].fail_statement(context)


def _name_of(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=True)


_LISTENERS: dict[str, Any] = {
    "engine_connect": _record_used,
    "before_cursor_execute": _begin,
    "after_cursor_execute": _end,
    "handle_error": _fail,
}
