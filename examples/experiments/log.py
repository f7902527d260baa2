"""Notes what a database is asked, by the events of SQLAlchemy alone: the same way with the library and without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext

__all__ = ["Line", "listen", "log_to", "note"]


class Line(NamedTuple):
    """One thing that was asked, or that has happened.

    :param kind: ``statement``, ``end``, ``connection``, ``error``, ``attempt`` or ``pause``.
    """

    kind: str
    text: str


_lines: ContextVar[list[Line] | None] = ContextVar("experiments.lines", default=None)


@contextmanager
def log_to(lines: list[Line]) -> Iterator[None]:
    """Note in ``lines`` what the block asks."""
    token = _lines.set(lines)
    try:
        yield
    finally:
        _lines.reset(token)


def note(kind: str, text: str) -> None:
    """Add a line to the log of the request, if it has one."""
    lines = _lines.get()
    if lines is not None:
        lines.append(Line(kind, text))


def listen(engine: Engine) -> None:
    """Note what an engine does."""
    event.listen(engine, "checkout", lambda *arguments: note("connection", "a connection is taken from the pool"))
    event.listen(engine, "checkin", lambda *arguments: note("connection", "the connection is back in the pool"))
    event.listen(engine, "before_cursor_execute", _note_statement)
    event.listen(engine, "commit", lambda connection: note("end", "COMMIT"))
    event.listen(engine, "rollback", lambda connection: note("end", "ROLLBACK"))
    event.listen(engine, "handle_error", _note_error)


def _note_statement(
    connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, is_many: bool
) -> None:
    shown = " ".join(statement.split())
    note("statement", f"{shown}  {parameters!r}" if parameters else shown)


def _note_error(context: ExceptionContext) -> None:
    note("error", str(context.original_exception))
