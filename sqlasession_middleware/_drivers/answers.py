"""Reads what objects of drivers tell: errors, connections and their sockets, and the answer to a question.

Questions are sent on the driver's own connection: the application's events and logs are for its own statements.
"""

from __future__ import annotations

from collections.abc import Callable
from socket import AF_INET, AF_INET6
from typing import Any

from .keepalive import duplicate

__all__ = [
    "ask",
    "file_number_of",
    "first_argument",
    "port_of",
    "question_listeners",
    "read_attribute",
    "text_of",
]

#: Called before each question, if somebody counts them.
question_listeners: list[Callable[[], None]] = []


def ask(driver_connection: Any, statement: str) -> Any:
    """The first row of the answer to a query."""
    for listener in question_listeners:
        listener()
    cursor = driver_connection.cursor()
    try:
        cursor.execute(statement)
        return cursor.fetchone()
    finally:
        cursor.close()


def file_number_of(candidate: Any) -> int | None:
    """The descriptor of an object with a ``fileno()``; None of any other, and of one that is closed."""
    try:
        number = candidate.fileno()
    except Exception:
        return None
    return number if isinstance(number, int) and number >= 0 else None


def port_of(number: int | None) -> str:
    """The client's port of a socket; an empty text if it has none."""
    if number is None:
        return ""
    with duplicate(number) as found:
        return str(found.getsockname()[1]) if found.family in (AF_INET, AF_INET6) else ""


def read_attribute(found: object, name: str) -> object:
    """An attribute of an error or a driver connection, of any class; None if it cannot be read."""
    try:
        return getattr(found, name, None)
    except Exception:
        return None


def first_argument(error: object) -> object:
    """The first argument that an error was made with."""
    arguments = read_attribute(error, "args")
    return arguments[0] if type(arguments) is tuple and arguments else None


def text_of(error: object) -> str:
    """The message of an error; empty if it cannot be read."""
    try:
        return str(error)
    except Exception:
        return ""
