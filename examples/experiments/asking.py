"""A client that calls a WSGI application as a server does, and logs what the application asks its database."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from werkzeug.test import create_environ

from .log import Line, log_to

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

__all__ = ["Asked", "grouped"]

#: How much of a response is shown.
LENGTH = 120


class Asked:
    """A request. Its response is open until :meth:`close`.

    :param label: what it is called on the page.
    :param environ: further keys.
    """

    def __init__(self, app: WSGIApplication, label: str, method: str, path: str, **environ: Any) -> None:
        self.label = label
        #: of the response; 500 if the application has raised, as every server makes of it
        self.status = 0
        #: the beginning of the response; or the error, which a server logs and does not send
        self.text = ""
        self.lines: list[Line] = []
        self._body: Iterable[bytes] = ()
        sent = create_environ(path, method=method, headers={"Accept": "text/plain"}, environ_overrides=environ)
        try:
            with log_to(self.lines):
                self._body = app(sent, self._start)
        except Exception as error:
            self._fail(error)
        self._steps = iter(self._body)

    def _start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        self.status = int(status.split()[0])
        retry_after = [value for name, value in headers if name == "Retry-After"]
        self.text = f"Retry-After: {retry_after[0]}. " if retry_after else ""

    def _fail(self, error: Exception) -> None:
        self.status = 500
        self.text = f"{type(error).__name__}: {str(error).splitlines()[0]}"

    def step(self) -> bool:
        """Take one step of the body, as a server does before it sends it. False if there is none left."""
        try:
            with log_to(self.lines):
                chunk = next(self._steps, None)
        except Exception as error:
            self._fail(error)
            return False
        if chunk is not None and len(self.text) < LENGTH:
            shown = " ".join((self.text + chunk[: 2 * LENGTH].decode(errors="replace")).split())
            self.text = shown if len(shown) <= LENGTH else f"{shown[:LENGTH]}…"
        return chunk is not None

    def pause(self, reason: str) -> None:
        """Leave the response open for now."""
        self.lines.append(Line("pause", reason))

    def close(self) -> None:
        """Close the response, as a server does when the client has all of it, or is gone."""
        close = getattr(self._body, "close", None)
        if close is not None:
            with log_to(self.lines):
                close()


def grouped(requests: Iterable[Asked]) -> Iterator[tuple[int, Asked]]:
    """Each request that differs from those before it, and how often it came."""
    groups: dict[tuple[Any, ...], list[Asked]] = {}
    for each in requests:
        groups.setdefault((each.label, each.status, each.text, tuple(each.lines)), []).append(each)
    for group in groups.values():
        yield len(group), group[0]
