"""Call stacks, taken quickly and formatted when somebody looks."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Iterable
from types import CodeType, FrameType
from typing import Final

import sqlalchemy

__all__ = ["Stack", "application_frames", "format_stack", "take_stack"]

#: The calls, the innermost first: the code, and the index of its instruction.
Stack = tuple[tuple[CodeType, int], ...]

#: How many calls of others than SQLAlchemy and this library are kept. Each takes a tenth of a microsecond.
_FRAMES_AT_MOST: Final = 15

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

#: Whether a file is one of SQLAlchemy or of this library.
_is_library: dict[str, bool] = {}


def take_stack(frame: FrameType | None) -> Stack:
    """The calls that lead to a frame, without those of SQLAlchemy and of this library."""
    calls: list[tuple[CodeType, int]] = []
    known = _is_library
    while frame is not None and len(calls) < _FRAMES_AT_MOST:
        code = frame.f_code
        name = code.co_filename
        skipped = known.get(name)
        if skipped is None:
            skipped = known[name] = name.startswith(_LIBRARY_FOLDERS)
        if not skipped:
            calls.append((code, frame.f_lasti))  # Its line takes longer to find.
        frame = frame.f_back
    return tuple(calls)


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
