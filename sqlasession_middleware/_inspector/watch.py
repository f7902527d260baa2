"""Follows each request from its begin to its end, and keeps what it did.

A request has ended when its response is closed, and so are the scopes around that it runs in: an inspector inside of a
SQLASessionMiddleware sees the commit as well. Those that still run are kept apart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4
from weakref import ref

from .._database.forks import after_fork, fork_safe_lock
from .._recording.record import RECORD, Record
from .._scope.scope import ENDED, Scope, running_scope
from .._wsgi.bodies import iterate
from .._wsgi.file_wrapper import call_with_file_wrapper
from .kept import Engines, Kept, keep, query_names, summary

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["Keeper", "Watch"]

logger = logging.getLogger("sqlasession_middleware.inspector")


class Keeper(Protocol):
    """What requests are kept in."""

    def add(self, kept: Kept) -> None: ...
    def summaries(self) -> list[dict[str, Any]]: ...
    def find(self, number: str) -> Kept | None: ...


class Watch:
    """The requests of one application.

    :param keeper: where those go that have ended.
    :param engines: looks up engines.
    """

    def __init__(self, keeper: Keeper, engines: Engines) -> None:
        self._keeper = keeper
        self._engines = engines
        self._running: dict[str, _Running] = {}
        self._lock = fork_safe_lock()
        self_reference = ref(self)

        @after_fork
        def forget() -> None:  # pragma: no cover  # in a child
            watch = self_reference()
            if watch is not None:  # They run in the parent.
                watch._running.clear()

    def call(self, app: WSGIApplication, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Call an application, and keep what it does."""
        running = self._begin(environ)

        def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
            running.status = status
            return start_response(status, headers) if exc_info is None else start_response(status, headers, exc_info)

        try:
            body, is_file = call_with_file_wrapper(app, environ, start)
        except BaseException as error:
            running.raised = type(error).__qualname__
            self._close(running)
            raise
        # A list is handed on as it is: servers look at its length.
        if is_file or type(body) in (list, tuple):
            self._close(running)
            return body
        return _Body(body, running, self._close)

    def _begin(self, environ: WSGIEnvironment) -> _Running:
        around = running_scope()
        outer = None if around is None else around.environ  # None outside of a request.
        if outer is not None:
            # A further attempt begins with the environ that the first one began with.
            for each in list(self._running.values()):
                if each.scope is not None and each.scope() is around:
                    environ[RECORD] = each.record
                    each.is_closed = False
                    return each
        record = environ.get(RECORD) or (outer or {}).get(RECORD) or Record(environ)
        environ[RECORD] = record
        if outer is not None:
            outer[RECORD] = record  # It may have been called with a copy.
        query = query_names(environ.get("QUERY_STRING", ""))
        running = _Running(record, None if outer is None else around, query)
        with self._lock:
            self._running[running.number] = running
        return running

    def _close(self, running: _Running) -> None:
        running.close()
        self.sweep()

    def sweep(self) -> None:
        """Keep what has ended."""
        with self._lock:
            over = [each for each in self._running.values() if each.is_over]
            for each in over:
                del self._running[each.number]
        for each in over:
            with _logging_failures():
                each.finish()
                self._keeper.add(each.keep(self._engines))

    def summaries(self) -> list[dict[str, Any]]:
        """All requests as the list shows them, the last one first, and those before that still run."""
        self.sweep()
        running = []
        for each in reversed(list(self._running.values())):
            with _logging_failures():
                running.append(summary(each.keep(self._engines).data))
        return running + self._keeper.summaries()

    def find(self, number: str) -> Kept | None:
        """The request with an ID, if it runs or is still there."""
        self.sweep()
        running = self._running.get(number)
        if running is None:
            return self._keeper.find(number)
        with _logging_failures():
            return running.keep(self._engines)
        return None


@contextmanager
def _logging_failures() -> Iterator[None]:
    """Log what cannot be kept: whoever has asked the application has no use for this error."""
    try:
        yield
    except Exception:
        logger.exception("A request cannot be kept")


class _Running:
    """A request that may not have ended.

    :param around: the scope that it runs in, if there is one.
    :param query: the names in its query.
    """

    def __init__(self, record: Record, around: Scope | None, query: list[str]) -> None:
        self.number = uuid4().hex[:12]
        self.record = record
        self.scope = None if around is None else ref(around)
        self.status = ""
        self.raised: str | None = None
        self.is_closed = False
        self._query = query
        self._closed_at = 0.0

    def close(self) -> None:
        """Note that the response is closed."""
        self._closed_at = perf_counter()
        self.is_closed = True

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen."""
        around = None if self.scope is None else self.scope()
        return self.is_closed and (around is None or around.state is ENDED)

    def finish(self) -> None:
        """Note the end in the record: of the response, or of what came after it."""
        record = self.record
        record.finish(self.status)
        later = [each.end for each in record.ends] + [each.end for each in record.holds]
        record.end = max([self._closed_at, *later])

    def keep(self, engines: Engines) -> Kept:
        """What is kept of it, or what there is so far."""
        told = {
            "query": self._query,
            "raised": self.raised,
            "status": self.status,
            "is_running": not self.is_over,
        }
        return keep(self.record, self.number, engines, told)


class _Body:
    """The body of a response. The request ends with it, also if nobody closes it."""

    def __init__(self, body: Iterable[bytes], running: _Running, close: Callable[[_Running], None]) -> None:
        self._body = body
        self._running = running
        self._close = close

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from iterate(self._body)
        except GeneratorExit:
            raise
        except BaseException as error:
            self._running.raised = type(error).__qualname__
            raise

    def close(self) -> None:
        try:
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
        finally:
            self._close(self._running)

    def __del__(self) -> None:
        # The garbage collector may call this anywhere: what has ended is kept later.
        if not self._running.is_closed:
            self._running.close()
