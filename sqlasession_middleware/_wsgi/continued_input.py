"""A request body that was partly read before the application was called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

__all__ = ["ContinuedInput"]


class ContinuedInput:
    """A ``wsgi.input`` that returns the bytes that were already read, then those of the server's stream.

    It does not read ahead: the server's stream might block forever on a byte that the application did not ask for.

    :param beginning: the bytes that were already read.
    :param stream: the server's stream.
    :param error: the error that the stream has raised. It is raised again in place of reading the stream.
    """

    def __init__(self, beginning: IO[bytes], stream: Any, error: Exception | None) -> None:
        self._beginning = beginning
        self._stream = stream
        self._error = error

    def read(self, size: int | None = -1) -> bytes:
        """Read ``size`` bytes, or fewer at the end of the body; all if ``size`` is negative or None."""
        if size is None or size < 0:
            return self._beginning.read() + bytes(self._rest().read())
        read = self._beginning.read(size)
        return read + bytes(self._rest().read(size - len(read))) if len(read) < size else read

    def readline(self, size: int | None = -1) -> bytes:
        """Read a line, or the first ``size`` bytes of it."""
        line = self._beginning.readline(-1 if size is None else size)
        if line.endswith(b"\n"):
            return line
        if size is None or size < 0:
            return line + bytes(self._rest().readline())
        return line + bytes(self._rest().readline(size - len(line))) if len(line) < size else line

    def readlines(self, hint: int | None = -1) -> list[bytes]:
        """Read all lines, or only until ``hint`` bytes are reached."""
        lines: list[bytes] = []
        read = 0
        for line in self:
            lines.append(line)
            read += len(line)
            if hint is not None and 0 < hint <= read:
                break
        return lines

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")

    def close(self) -> None:
        """Leave the body open, because it belongs to the server."""

    def _rest(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._stream
