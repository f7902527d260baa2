"""Bodies that are files: those made by ``wsgi.file_wrapper`` (PEP 3333), and those that frameworks make.

The server can use sendfile() if it gets the object of its wrapper back. A wrapper may also be around anything with a
``read()``, and that may be the application's code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from io import BufferedRandom, BufferedReader, BytesIO, FileIO
from types import BuiltinMethodType, GeneratorType
from typing import TYPE_CHECKING, Any, cast

from werkzeug.wsgi import FileWrapper

from .._dependencies import FILE_ATTRIBUTES, FILE_VARIABLES

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["call_with_file_wrapper", "is_file", "is_whole_file"]

#: What ``open()`` returns in binary mode, and files in memory.
_PYTHON_FILES = (BufferedReader, BufferedRandom, FileIO, BytesIO)


def call_with_file_wrapper(
    app: WSGIApplication, environ: WSGIEnvironment, start_response: StartResponse
) -> tuple[Iterable[bytes], bool]:
    """Call ``app``.

    :returns: its body, and whether it is for the server alone: its ``wsgi.file_wrapper`` made it, and the file is read
        by the server or by Python, and not by the application's code.
    """
    wrapper = environ.get("wsgi.file_wrapper")
    if wrapper is None or isinstance(wrapper, type):
        body = app(environ, start_response)
        return body, wrapper is not None and isinstance(body, wrapper) and not _calls_application(body)
    # uWSGI's wrapper is a function that stores the file and returns it unchanged, so its calls have to be recorded.
    recorder = _Recorder(wrapper)
    environ["wsgi.file_wrapper"] = recorder
    try:
        body = app(environ, start_response)
    finally:
        environ["wsgi.file_wrapper"] = wrapper
    return body, any(body is each for each in recorder.wrapped)


def is_file(environ: WSGIEnvironment, body: object) -> bool:
    """Return the same of ``body`` during :func:`call_with_file_wrapper`."""
    wrapper = environ.get("wsgi.file_wrapper")
    if isinstance(wrapper, _Recorder):
        return any(body is each for each in wrapper.wrapped)
    return isinstance(wrapper, type) and isinstance(body, wrapper) and not _calls_application(body)


def _calls_application(body: object) -> bool:
    """Whether the steps of a server's wrapper call a ``read()`` of the application."""
    file = _file_in(body)
    if file is None:  # A server's that is not known. These are the names of wsgiref, and of most others.
        file = getattr(body, "filelike", None) or getattr(body, "file", None)
    return file is not None and _is_read_by_application(file)


def is_whole_file(body: object) -> bool:
    """Whether a body is a file that Python itself reads, as frameworks send one where the server does not.

    No code of the application runs in its steps: ranges of a file, Werkzeug's ``wrap_file()``, WebOb's ``FileIter``.
    """
    kind = type(body)
    if kind in _PYTHON_FILES:
        return _is_read_by_python(body)
    if kind is not GeneratorType and (kind.__module__, kind.__qualname__) not in FILE_ATTRIBUTES:
        return False
    file = _file_in(body)
    return file is not None and _is_read_by_python(file)


def _file_in(body: object) -> object | None:
    """The file that a body of a known class sends, or None."""
    file: object | None = None
    for _ in range(3):  # A range of the server's wrapper of a file.
        kind = type(body)
        if kind is GeneratorType:
            frame = cast("GeneratorType[Any, Any, Any]", body).gi_frame
            if frame is None:
                return file
            name = FILE_VARIABLES.get((frame.f_globals.get("__name__", ""), frame.f_code.co_qualname))
            inner = None if name is None else frame.f_locals.get(name)
        else:
            name = FILE_ATTRIBUTES.get((kind.__module__, kind.__qualname__))
            inner = None if name is None else getattr(body, name, None)
        if inner is None:
            return file
        file = body = inner
    return file


def _is_read_by_python(file: object) -> bool:
    """Whether the ``read()`` of a file is Python's own: it may be a proxy, such as Django's or that of tempfile."""
    if type(file).__module__ == "tempfile":
        return True
    try:
        read = getattr(file, "read", None)
        if not isinstance(read, BuiltinMethodType):
            return False
        # A buffer calls the readinto() of what is below it.
        return isinstance(getattr(read.__self__, "raw", read.__self__), FileIO | BytesIO)
    except Exception:
        return False


def _is_read_by_application(file: object) -> bool:
    """Whether the server has to call a ``read()`` of the application: there is no descriptor that it could send."""
    if not hasattr(file, "read") or _is_read_by_python(file):
        return False
    try:
        return type(file.fileno()) is not int  # type: ignore[attr-defined]
    except Exception:
        return True


class _Recorder:
    """Calls a ``wsgi.file_wrapper`` and records the bodies that it returns.

    A file that the application reads is wrapped here: what the server has not stored, it iterates.
    """

    def __init__(self, wrapper: Callable[..., Any]) -> None:
        self._wrapper = wrapper
        self.wrapped: list[Any] = []

    def __call__(self, file: Any, *block_size: int) -> Any:
        if _is_read_by_application(file):
            return FileWrapper(file, *block_size)
        body = self._wrapper(file, *block_size)
        self.wrapped.append(body)
        return body
