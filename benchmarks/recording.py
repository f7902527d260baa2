"""Measure what it costs to record what requests do.

Run ``python benchmarks/recording.py`` on an otherwise idle machine. Applications without a recorder, with the recorder
(for the log of slow requests) and with ``Server-Timing`` as well take turns in one process. Each has an engine of its
own on SQLite in memory, so only Python is measured. Figures are medians over the rounds of differences within a round.

Bars: the recorder costs at most 15 microseconds a statement and 30 a request, ``Server-Timing`` at most 3 in addition.
That nothing is added where neither is asked for is counted: such an engine has no further listener.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

from per_request import Application, Table, difference, make_engine, measure, select_row, serve, using

from sqlasession_middleware import SQLASessionMiddleware, session

QUIET = {"seconds": 3600.0, "queries": 10**9}
OPTIONS: dict[str, dict[str, Any]] = {
    "off": {},
    "recorder": {"slow_requests": QUIET},
    "with Server-Timing": {"slow_requests": QUIET, "server_timing": True},
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


def main(rounds: int, calls: int, depth: int) -> int:
    table = Table()
    contenders = {}
    for name, options in OPTIONS.items():
        for count in (1, MANY):
            app = nested(using(session, times(count)), depth)
            wrapped = SQLASessionMiddleware(app, make_engine(), **options)
            contenders[f"{name}, {count}"] = lambda wrapped=wrapped: serve(wrapped)
    figures = measure(contenders, calls, rounds)
    one, many = (difference(figures, f"recorder, {count}", f"off, {count}") for count in (1, MANY))
    statement = (many - one) / (MANY - 1)
    timing = statistics.median(
        difference(figures, f"with Server-Timing, {count}", f"recorder, {count}") for count in (1, MANY)
    )
    table.row("a request with one SELECT, not recorded", f"{statistics.median(figures['off, 1']):.1f} us")
    for label, figure, bar in (
        ("recorder, a statement", statement, 15),
        ("recorder, the rest of a request", one - statement, 30),
        ("Server-Timing, a response", timing, 3),
    ):
        table.row(label, f"{figure:+.2f} us", bar=f"+{bar} us", held=figure <= bar)
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
