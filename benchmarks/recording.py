"""Measure what it costs to record what requests do, and what else tells of it.

Run ``python benchmarks/recording.py`` on an otherwise idle machine. Applications without a recorder, with the recorder
(for the log of slow requests), with ``Server-Timing`` as well, with ``sql_comments``, and with metrics take turns in
one process. Each has an engine of its own on SQLite in memory, so only Python is measured. Figures are medians over the
rounds of differences within a round. "Of a statement" is the same figure as a part of what a statement costs with a
session by hand, which depends less on the machine.

Bars: the recorder costs at most 15 microseconds a statement and 30 a request, ``Server-Timing`` at most 3 in addition.
That nothing is added where neither is asked for is counted: ``tests/test_recording_off.py``.

The recorder times how long rows are fetched. A recorder that does not do so takes a turn as well, to tell its share.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from per_request import Application, Table, by_hand, difference, make_engine, measure, select_row, serve, using

from sqlasession_middleware import SQLASessionMiddleware, metrics, session
from sqlasession_middleware._recording import statements

QUIET = {"seconds": 3600.0, "queries": 10**9}
OPTIONS: dict[str, dict[str, Any]] = {
    "off": {},
    "recorder": {"slow_requests": QUIET},
    "with Server-Timing": {"slow_requests": QUIET, "server_timing": True},
    "without fetching": {"slow_requests": QUIET},
    "comments": {"sql_comments": {"application": "shop"}},
    "metrics": {},
}
MANY = 10


def times(count: int) -> Callable[[Any], None]:
    def work(current: Any) -> None:
        for _ in range(count):
            select_row(current)

    return work


def nested(app: Application, depth: int) -> Application:
    """The application below as many calls as a framework makes: the recorder walks them."""
    for _ in range(depth):

        def app(environ: dict[str, Any], start_response: Callable[..., Any], inner: Application = app) -> Any:
            return inner(environ, start_response)

    return app


def without_fetching(app: Application) -> Callable[[], None]:
    """Serves an application while nothing times how long rows are fetched."""

    def call() -> None:
        timed, statements.time_fetching = statements.time_fetching, lambda *arguments: None
        try:
            serve(app)
        finally:
            statements.time_fetching = timed

    return call


def main(rounds: int, calls: int, depth: int) -> int:
    table = Table()
    contenders: dict[str, Callable[[], object]] = {}
    for count in (1, MANY):
        own = nested(by_hand(make_engine(), times(count)), depth)
        contenders[f"by hand, {count}"] = lambda own=own: serve(own)  # type: ignore[misc]  # of its own turn
        for name, options in OPTIONS.items():
            app = nested(using(session, times(count)), depth)
            wrapped = SQLASessionMiddleware(app, make_engine(), **options)
            if name == "metrics":
                metrics.observe(wrapped, MeterProvider([InMemoryMetricReader()]))
            call: Callable[[], object] = lambda wrapped=wrapped: serve(wrapped)  # type: ignore[misc]  # noqa: E731
            contenders[f"{name}, {count}"] = without_fetching(wrapped) if name == "without fetching" else call
    figures = measure(contenders, calls, rounds)

    def costs(name: str, base: str = "off") -> tuple[float, float]:
        """Of a statement, and of the rest of a request."""
        one, many = (difference(figures, f"{name}, {count}", f"{base}, {count}") for count in (1, MANY))
        statement = (many - one) / (MANY - 1)
        return statement, one - statement

    one, many = (statistics.median(figures[f"by hand, {count}"]) for count in (1, MANY))
    by_itself = (many - one) / (MANY - 1)
    statement, request = costs("recorder")
    timing = statistics.median(
        difference(figures, f"with Server-Timing, {count}", f"recorder, {count}") for count in (1, MANY)
    )
    table.row("by hand, a statement", f"{by_itself:.1f} us")
    table.row("a request with one SELECT, not recorded", f"{statistics.median(figures['off, 1']):.1f} us")

    def row(label: str, figure: float, bar: float | None = None) -> None:
        told = "" if bar is None else f"+{bar:g} us"
        part = f"{figure / by_itself:.0%} of a statement"
        table.row(label, f"{figure:+.2f} us", part, told, bar is None or figure <= bar)

    row("recorder, a statement", statement, 15)
    row("recorder, the rest of a request", request, 30)
    row("Server-Timing, a response", timing, 3)
    row("of the recorder's: timing of fetching", statement - costs("without fetching")[0])
    for name in ("comments", "metrics"):
        statement, request = costs(name)
        row(f"{name}, a statement", statement)
        row(f"{name}, the rest of a request", request)
    return table.missed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--calls", type=int, default=50, help="calls in each turn")
    parser.add_argument("--depth", type=int, default=40, help="calls around the application")
    arguments = parser.parse_args()
    missed = main(arguments.rounds, arguments.calls, arguments.depth)
    if missed:
        print(f"{missed} of the bars missed")
    sys.exit(1 if missed else 0)
