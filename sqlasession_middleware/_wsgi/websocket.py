"""Requests that become websockets: the server opens the websocket, or the application does so on the server's socket.

WSGI does not specify websockets. The application may return without calling ``start_response()``, raise
:exc:`StopIteration` (as gunicorn expects), or return a response that is never sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

__all__ = ["asks_for_websocket", "is_websocket", "watch_sockets"]

#: The environ keys of the request's socket: gunicorn's, and that of Werkzeug's development server.
_SOCKETS = ("gunicorn.socket", "werkzeug.socket")

#: The socket's attributes that are used to write to it.
_WRITERS = frozenset(("detach", "dup", "makefile", "send", "sendall", "sendfile", "sendmsg"))


def asks_for_websocket(environ: WSGIEnvironment) -> bool:
    """Whether the client asks for a websocket. A client can ask for one at any URL, even if the URL has none."""
    return "websocket" in environ.get("HTTP_UPGRADE", "").lower()


def watch_sockets(environ: WSGIEnvironment) -> None:
    """Record from now on whether the application takes the request's socket, for :func:`is_websocket`."""
    for key in _SOCKETS:
        if key in environ and not isinstance(environ[key], _WatchedSocket):
            environ[key] = _WatchedSocket(environ[key])


def is_websocket(environ: WSGIEnvironment) -> bool:
    """Whether the request has become a websocket: the server reports it, or the application has taken the socket."""
    if environ.get("wsgi.websocket") is not None:
        return True
    return any(getattr(environ.get(key), "sqlasession_taken", False) for key in _SOCKETS)


class _WatchedSocket:
    """A socket that records whether the application has taken it, to write to it."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self.sqlasession_taken = False

    def __getattr__(self, name: str) -> Any:
        if name in _WRITERS:
            self.sqlasession_taken = True
        return getattr(self._socket, name)
