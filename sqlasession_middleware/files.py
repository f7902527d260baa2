"""Bodies that the server sends by its own means, sendfile above all, if it gets them as they are (PEP 3333)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["call_with_file_wrapper", "is_file"]


def call_with_file_wrapper(
    app: WSGIApplication, environ: WSGIEnvironment, start_response: StartResponse
) -> tuple[Iterable[bytes], bool]:
    """Call ``app``.

    :returns: its body, and whether that is what the server's ``wsgi.file_wrapper`` made.
    """
    wrapper = environ.get("wsgi.file_wrapper")
    if wrapper is None or isinstance(wrapper, type):
        body = app(environ, start_response)
        return body, wrapper is not None and isinstance(body, wrapper)
    # uWSGI's is a function that remembers the file and returns it, so only the call tells.
    recorder = _Recorder(wrapper)
    environ["wsgi.file_wrapper"] = recorder
    try:
        body = app(environ, start_response)
    finally:
        environ["wsgi.file_wrapper"] = wrapper
    return body, any(body is made for made in recorder.made)


def is_file(environ: WSGIEnvironment, body: object) -> bool:
    """Whether ``body`` is what the server's ``wsgi.file_wrapper`` made, inside of :func:`call_with_file_wrapper`."""
    wrapper = environ.get("wsgi.file_wrapper")
    if isinstance(wrapper, _Recorder):
        return any(body is made for made in wrapper.made)
    return isinstance(wrapper, type) and isinstance(body, wrapper)


class _Recorder:
    def __init__(self, wrapper: Callable[..., Any]) -> None:
        self._wrapper = wrapper
        self.made: list[Any] = []

    def __call__(self, *arguments: Any) -> Any:
        made = self._wrapper(*arguments)
        self.made.append(made)
        return made
