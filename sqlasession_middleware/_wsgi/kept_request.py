"""Keeps the environ and the body of a request, so that the request can be repeated."""

from __future__ import annotations

import io
from tempfile import SpooledTemporaryFile
from typing import IO, TYPE_CHECKING, Any, cast

from .continued_input import ContinuedInput

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

__all__ = ["BODY_REPLAYABLE", "KeptRequest"]

#: The environ key that tells whether the body can be read again, by another attempt.
BODY_REPLAYABLE = "sqlasession.body_replayable"

_CHUNK = 64 * 1024


class KeptRequest:
    """A copy of a request's environ, and a body that can be read again from its start.

    :param memory: the size in bytes up to which the body is kept in memory; a longer one is kept in a temporary file.
    :param maximum: the size in bytes up to which the body is kept. The application reads a longer one from the server.
    """

    def __init__(self, environ: WSGIEnvironment, memory: int, maximum: int) -> None:
        self._environ = environ
        self._memory = memory
        self._input: KeptInput | None = None
        length = _declared_length(environ)
        #: whether the body can be read again
        self.is_repeatable = True
        if environ.get("wsgi.input_terminated"):
            # The end of the stream is the end of the body, even if Content-Length differs.
            self.is_repeatable = (length or 0) <= maximum and self._keep(maximum + 1, is_limit=True)
        elif length is None or "HTTP_TRANSFER_ENCODING" in environ:
            self.is_repeatable = False  # Its end is not known: reading might block forever.
        elif length > 0:
            self.is_repeatable = length <= maximum and self._keep(length, is_limit=False)
        environ[BODY_REPLAYABLE] = self.is_repeatable
        self._copy = dict(environ)

    def restore(self) -> None:
        """Undo the application's changes to the environ, in place, and go back to the start of the body."""
        self._environ.clear()
        self._environ.update(self._copy)
        if self._input is not None:
            self._input.seek(0)

    def _keep(self, count: int, *, is_limit: bool) -> bool:
        """Read up to ``count`` bytes. The application can read these bytes in any case.

        :param is_limit: whether a body of ``count`` bytes is too long; otherwise, it is complete.
        :returns: whether the body is complete.
        """
        kept = KeptBody(max_size=self._memory or -1)  # 0 would be "no limit".
        reader = KeptInput(cast(Any, kept))
        environ = self._environ
        stream = environ["wsgi.input"]
        read, error = _copy(stream, kept, count)
        kept.seek(0)
        is_complete = read < count if is_limit else read == count
        if is_complete and error is None:
            if read:
                environ["wsgi.input"] = self._input = reader
                if not environ.get("CONTENT_LENGTH"):
                    environ["CONTENT_LENGTH"] = str(read)  # Some frameworks read nothing without it.
            return True
        environ["wsgi.input"] = ContinuedInput(reader, stream, error)
        environ.pop("webob.is_body_seekable", None)
        return False


class KeptBody(SpooledTemporaryFile[bytes]):
    """The bytes that were read. It is closed when it is deleted, because nothing can read it after that.

    The garbage collector deletes it before the file that it has opened, because the file is younger.
    """

    def __del__(self) -> None:
        self.close()


class KeptInput(io.BufferedReader):
    """A request body that the application cannot close, because it is read again."""

    def close(self) -> None:
        """Leave the body open."""


def _declared_length(environ: WSGIEnvironment) -> int | None:
    """The Content-Length in bytes: 0 if there is none, None if it is not a valid number."""
    text = environ.get("CONTENT_LENGTH") or "0"
    return int(text) if len(text) < 20 and text.isascii() and text.isdecimal() else None


def _copy(stream: Any, kept: IO[bytes], count: int) -> tuple[int, Exception | None]:
    """Copy up to ``count`` bytes.

    :returns: the number of bytes, and the error that ended the stream, if any. The application has to see it.
    """
    read = 0
    while read < count:
        try:
            chunk = stream.read(min(count - read, _CHUNK))
        except Exception as error:
            return read, error
        if not chunk:
            break
        kept.write(chunk)
        read += len(chunk)
    return read, None
