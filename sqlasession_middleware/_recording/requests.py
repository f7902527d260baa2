"""A record for each request of an application, and what production reads of it: ``Server-Timing``, and a log.

``Server-Timing`` tells the client what the database took, in the head of the response (W3C, "Server Timing"). With a
transaction the head is held until the commit, so that it has the commit in it. The log has a line for each request that
took too long, or sent too much.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from .._scope.scope import ENDED, Scope
from .._settings.checks import check_count, check_seconds
from ..errors import of_application
from .record import RECORD, Record
from .stacks import application_frames, format_stack

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from .record import Statement

__all__ = ["SlowRequests", "logging_slow", "with_record"]

logger = logging.getLogger("sqlasession_middleware.slow_requests")

#: How many statements of a slow request are shown.
WORST = 3


class SlowRequests:
    """What makes a request a slow one: either of the two.

    :param seconds: how long a request may take, from its begin to the end of its response.
    :param queries: how many statements it may send.
    :raises ConfigurationError: if one of them is wrong.
    """

    def __init__(self, seconds: float = 1.0, queries: int = 100) -> None:
        check_seconds("seconds", seconds)
        check_count("queries", queries)
        self.seconds = seconds
        self.queries = queries


def with_record(app: WSGIApplication, timing: bool | Callable[[WSGIEnvironment], object]) -> WSGIApplication:
    """Wrap an application so that each of its requests has a record.

    :param timing: whether its responses have a ``Server-Timing``; or a callable of environ that decides.
    """

    def call(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        record = environ.get(RECORD)
        if record is None:
            record = environ[RECORD] = Record(environ)
        if timing and (timing is True or timing(environ)):
            return app(environ, partial(_start, start_response, record))
        return app(environ, start_response)

    return call


def _start(
    start_response: Any, record: Record, status: str, headers: list[tuple[str, str]], *exc_info: Any, **named: Any
) -> Any:
    # A line of its own: the application may have one.
    return start_response(status, [*headers, ("Server-Timing", server_timing(record))], *exc_info, **named)


def server_timing(record: Record) -> str:
    """The value of a header ``Server-Timing``: milliseconds of what the request has waited for so far."""
    queries = "query" if record.count == 1 else "queries"
    metrics = [f'db;dur={(record.seconds + record.fetched) * 1000:.1f};desc="{record.count} {queries}"']
    if record.waits:
        metrics.append(f"db-wait;dur={record.waited * 1000:.1f}")
    if record.ends and (committing := record.committing):
        metrics.append(f"db-commit;dur={committing * 1000:.1f}")
    if record.last_attempt > 1:
        metrics.append(f'attempt;desc="{record.last_attempt}"')
    return ", ".join(metrics)


class _LoggingScope(Scope):
    """A scope whose request is logged if it is slow."""

    def clear(self) -> None:
        """Forget the scope's values; at the end of the scope, log the request.

        The end of a scope calls this last, after the session was removed.
        """
        super().clear()
        environ = self.environ
        record: Record | None = None if environ is None else environ.get(RECORD)
        if record is not None and self.state is ENDED:
            slow: SlowRequests = self.owner.slow_requests  # type: ignore[attr-defined]  # it has asked for this class
            record.finish(self.status if self.headers is not None else "")
            if record.end - record.begin > slow.seconds or record.count > slow.queries:
                _log(record, self.owner)


@cache
def logging_slow(scope_class: type[Scope]) -> type[Scope]:
    """A subclass of ``scope_class`` that logs slow requests."""
    return type(scope_class.__name__, (_LoggingScope, scope_class), {})


class Slow(NamedTuple):
    """The attributes of a record of the log."""

    method: str
    path: str
    status: str
    seconds: float
    queries: int
    trips: int
    query_seconds: float
    fetch_seconds: float
    wait_seconds: float
    hold_seconds: float
    commit_seconds: float
    attempt: int
    outcome: str


def _log(record: Record, owner: Any) -> None:
    told = Slow(
        record.method,
        record.path,
        record.status,
        record.end - record.begin,
        record.count,
        record.trips,
        record.seconds,
        record.fetched,
        record.waited,
        record.held,
        record.committing,
        record.last_attempt,
        record.outcome,
    )
    worst = sorted(record.statements, key=lambda each: each.total, reverse=True)[:WORST]
    logger.warning(
        "Slow: %s %r%s: %s after %.3f s; %d queries took %.3f s, fetching their rows %.3f s, waits for a connection"
        " %.3f s, commits %.3f s; connections were held for %.3f s; attempt %d, %s%s",
        *(told.method, told.path, of_application(owner), told.status or "no response"),
        *(told.seconds, told.queries, told.query_seconds),
        *(told.fetch_seconds, told.wait_seconds, told.commit_seconds, told.hold_seconds, told.attempt, told.outcome),
        owner.without_secrets("".join(map(_shown, worst))),
        extra={"application": owner, "slow": told},
    )


def _shown(statement: Statement) -> str:
    called = format_stack(application_frames(statement.stack)[:5])
    return f"\n{statement.total:.3f} s on {statement.engine}: {' '.join(statement.sql.split())[:1000]}\n{called}"
