"""Call stacks, taken quickly and formatted when somebody looks."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Iterable
from types import CodeType, FrameType
from typing import Final

import sqlalchemy
from sqlalchemy import Connection

from .._dependencies import calling_frame

__all__ = ["Stack", "application_frames", "format_stack", "take_stack", "take_statement_stack"]

#: The calls, the innermost first: the code, and the index of its instruction.
Stack = tuple[tuple[CodeType, int], ...]

#: How many calls of others than SQLAlchemy and this library are kept, one of the application counted as two. Each takes
#: a tenth of a microsecond. A framework may have many before the application is called.
_CALLS_AT_MOST: Final = 16

#: The folders of SQLAlchemy and of this library. They are full paths, because an application may be in a folder of the
#: same name.
_LIBRARY_FOLDERS = tuple(
    os.path.join(os.path.dirname(file), "") for file in (str(sqlalchemy.__file__), os.path.dirname(__file__))
)
#: The folders of the standard library and of installed packages, also as they are without links.
_INSTALLED_FOLDERS = tuple(
    {
        os.path.join(resolve(sysconfig.get_path(name)), "")
        for name in ("stdlib", "platstdlib", "purelib", "platlib")
        for resolve in (str, os.path.realpath)
    }
)
_TEST_RUNNER_FOLDERS = ("/_pytest/", "/pluggy/")

#: What a call of a file counts, as far as that is known: 0 for SQLAlchemy and this library, 2 for the application.
_counted: dict[str, int] = {}


#: How far ``Connection.execute()`` is from a function that the listener of ``do_execute`` calls. What is between is
#: SQLAlchemy's own, and Python has to make an object for each call that is looked at.
_DISTANCE: Final = 7
_EXECUTE: Final = Connection.execute.__code__


def take_statement_stack() -> Stack:
    """The calls that lead to a statement."""
    try:
        frame = calling_frame(_DISTANCE)
    except ValueError:  # There are not so many.
        return take_stack(calling_frame(1))
    return take_stack(frame.f_back if frame.f_code is _EXECUTE else calling_frame(1))


def take_stack(frame: FrameType | None) -> Stack:
    """The calls that lead to a frame, without those of SQLAlchemy and of this library."""
    calls: list[tuple[CodeType, int]] = []
    known = _counted
    left = _CALLS_AT_MOST
    while frame is not None and left > 0:
        code = frame.f_code
        name = code.co_filename
        try:
            counts = known[name]
        except KeyError:
            counts = known[name] = _count(name)
        if counts:
            calls.append((code, frame.f_lasti))  # Its line takes longer to find.
            left -= counts
        frame = frame.f_back
    return tuple(calls)


def _count(name: str) -> int:
    return 0 if name.startswith(_LIBRARY_FOLDERS) else 1 if _is_installed(name) else 2


def application_frames(stack: Stack) -> Stack:
    """The calls of code that is not installed: the application's. All of them if there are none."""
    found = tuple(call for call in stack if not _is_installed(call[0].co_filename))
    return found or stack


def _is_installed(name: str) -> bool:
    return name.startswith((*_INSTALLED_FOLDERS, "<")) or _is_test_runner(name)


def _is_test_runner(name: str) -> bool:
    return any(part in name.replace("\\", "/") for part in _TEST_RUNNER_FOLDERS)


def format_stack(stack: Iterable[tuple[CodeType, int]]) -> str:
    """Format calls as Python does, the innermost last, without those of a test runner."""
    frames = [
        traceback.FrameSummary(code.co_filename, _line_of(code, index), code.co_name)
        for code, index in reversed(tuple(stack))
        if not _is_test_runner(code.co_filename)
    ]
    return "".join(traceback.StackSummary.from_list(frames).format())


def _line_of(code: CodeType, index: int) -> int:
    lines = (line for begin, end, line in code.co_lines() if begin <= index < end and line is not None)
    return next(lines, code.co_firstlineno)
