"""Measure the cost of unused binds and replicas, and the cost of the read-your-writes cookie.

Run ``python benchmarks/routing.py`` on an otherwise idle machine. As in per_request.py, all contenders do the same
work, interleaved in one process; each figure is the median over the rounds of the difference within a round.

One process is not enough. The addresses of names and classes in a process determine which of them compete for an entry
in Python's method cache (4096 entries). This alone can make the same request 20 000 instructions longer or shorter in
one process than in the next: some microseconds, and more than the effect that is measured here. So the benchmark runs
many processes one after the other and shows the median and the quartiles.

A turn is longer than in per_request.py, because Python specializes its instructions for the classes that it meets, and
each contender has its own. The figure of a turn is the median of its requests and not their mean, which is affected by
garbage and by the rest of the machine more than by the measured effect. If the contenders share their classes, as with
the cookie, a turn is one request.

On a busy machine, ``--instructions`` counts the instructions of each contender with valgrind, in separate processes,
each with its names and classes at different addresses. The time shown is then the ratio of a contender's additional
instructions, multiplied by the time of the first contender on this machine.

The cookie is that of a database without a write-ahead log. Asking PostgreSQL takes a round trip, which is measured
separately if a server responds.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter_ns
from typing import Any, NamedTuple

from per_request import Item, Table, Work, difference, get_object, make_engine, measure, select_row, using
from sqlalchemy import create_engine, select, text

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware._database.cookie import LastWrite
from sqlasession_middleware._drivers.registry import driver_of

POSTGRESQL = os.environ.get("TEST_POSTGRESQL_URL", "postgresql+psycopg://postgres@127.0.0.1:5432/test")


def serve(app: Any, method: str, cookie: str | None = None) -> list[tuple[str, str]]:
    """Run one request as a server does, and return the headers of the response."""
    environ = {"REQUEST_METHOD": method, "PATH_INFO": "/"}
    if cookie is not None:
        environ["HTTP_COOKIE"] = cookie
    heads: list[list[tuple[str, str]]] = []
    result = app(environ, lambda status, headers, exc_info=None: heads.append(headers))
    for _ in result:
        pass
    result.close()
    return heads[0]


def median_of_turn(call: Callable[[], object], calls: int) -> float:
    """Return the median microseconds of a request."""
    turn = []
    for _ in range(calls):
        begin = perf_counter_ns()
        call()
        turn.append(perf_counter_ns() - begin)
    return statistics.median(turn) / 1000


def core_row(current: Any) -> object:
    return current.execute(CORE).one()


CORE = select(Item.__table__).where(Item.__table__.c.id == 1)


def head_first(work: Work) -> Callable[..., Iterable[bytes]]:
    """An application that queries the database after the head was sent, when it is too late to set a cookie."""

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        work(session)
        return [b"done"]

    return app


class Row(NamedTuple):
    """A kind of request, and its contenders.

    :param calls: the number of calls in a turn.
    :param rounds: the number of rounds.
    :param bars: the number of microseconds that each contender may take longer than the first one.
    """

    calls: int
    rounds: int
    contenders: dict[str, Callable[[], object]]
    bars: dict[str, float]


def unused(app: Any, calls: int = 500) -> Row:
    """Binds and replicas that are configured but not used: the method is not safe, and the tables have no bind key."""
    engine = make_engine()
    apps = {
        "neither": SQLASessionMiddleware(app, engine),
        "binds": SQLASessionMiddleware(app, engine, binds={"audit": "sqlite://"}),
        "replicas": SQLASessionMiddleware(app, engine, replicas=["sqlite://"]),
    }
    contenders = {name: lambda each=each: serve(each, "POST") for name, each in apps.items()}
    return Row(calls, 15, contenders, {"binds": 1, "replicas": 1})


def given() -> Row:
    """Setting the cookie: a POST with an open transaction may have written. Without it, the head was sent before."""
    replicas: dict[str, Any] = {"replicas": ["sqlite://"]}
    engine = make_engine()
    late = SQLASessionMiddleware(head_first(select_row), engine, **replicas)
    early = SQLASessionMiddleware(using(session, select_row), engine, **replicas)
    return Row(1, 5000, {"no cookie": lambda: serve(late, "POST"), "given": lambda: serve(early, "POST")}, {"given": 3})


def taken() -> Row:
    """Reading the cookie: it is too old to matter, so both contenders read from a replica."""
    app = SQLASessionMiddleware(using(session, select_row), make_engine(), replicas=[make_engine()])
    marker = app.routing.replicas.cookie  # type: ignore[union-attr]
    cookie = marker.header(LastWrite(time.time() - 3600, None), {})[1].partition(";")[0]
    cookies = {"other cookies": "theme=dark; session=0123456789; lang=en", "taken": f"theme=dark; {cookie}; lang=en"}
    contenders = {name: lambda each=each: serve(app, "GET", each) for name, each in cookies.items()}
    return Row(1, 5000, contenders, {"taken": 3})


ROWS: dict[str, Callable[[], Row]] = {
    "no session": lambda: unused(using(session, None), 10000),
    "SELECT": lambda: unused(head_first(select_row)),
    "Core": lambda: unused(head_first(core_row)),
    "ORM get": lambda: unused(head_first(get_object)),
    "cookie": given,
    "cookie, read": taken,
}


def figures_of_one() -> dict[str, dict[str, float]]:
    """The figures of one process: the time of the first contender for each kind of request, and the differences."""
    figures = {}
    for label, make in ROWS.items():
        row = make()
        measured = measure(row.contenders, row.calls, row.rounds, median_of_turn)
        first, *others = row.contenders
        figures[label] = {name: difference(measured, name, first) for name in others}
        figures[label][first] = statistics.median(measured[first])
    return figures


def print_rows(table: Table, processes: int) -> None:
    command = [sys.executable, __file__, "--one-process"]
    of_each = [json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) for _ in range(processes)]
    for label, make in ROWS.items():
        row = make()
        first = next(iter(row.contenders))
        base = statistics.median(each[label][first] for each in of_each)
        table.row(f"{label}: {first}", f"{base:.2f} us")
        for name, bar in row.bars.items():
            low, more, high = statistics.quantiles((each[label][name] for each in of_each), n=4)
            against = f"{more:+.2f} ({low:+.1f} to {high:+.1f}) us"
            table.row(f"{label}: {name}", f"{base + more:.2f} us", against, f"+{bar} us", more <= bar)


#: Classes get their entries in the method cache in order: some additional classes move all others to other entries.
SERVE = """
import runpy, sys
layout, calls, script, label, name = sys.argv[1:]
sys.argv = [script, "--serve", label, name, calls]
for number in range(37 * int(layout)):
    getattr(type("Place", (), {}), "taken", None)
runpy.run_path(script, run_name="__main__")
"""


def serve_alone(label: str, name: str, calls: int) -> None:
    call = ROWS[label]().contenders[name]
    gc.disable()  # What it collects, and when, depends on all objects created before.
    for _ in range(calls):
        call()


def instructions(label: str, name: str, layout: int) -> float:
    """Return the instructions of a request, without those of the rest of the process."""
    few, many = 300, 800
    counted = []
    for calls in (few, many):
        valgrind = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
        command = [*valgrind, sys.executable, "-c", SERVE, str(layout), str(calls), __file__, label, name]
        environ = {**os.environ, "PYTHONHASHSEED": str(layout), "PYTHONPATH": os.path.dirname(__file__)}
        said = subprocess.run(command, check=True, capture_output=True, text=True, env=environ).stderr
        counted.append(int(re.search(r"I +refs: +([\d,]+)", said)[1].replace(",", "")))  # type: ignore[index]
    return (counted[1] - counted[0]) / (many - few)


def print_instructions(table: Table, layouts: int) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for label, make in ROWS.items():
            row = make()
            first, *others = row.contenders
            median_of_turn(row.contenders[first], 500)
            base = median_of_turn(row.contenders[first], 500)
            of_each = {
                name: list(pool.map(partial(instructions, label, name), range(1, layouts + 1)))
                for name in row.contenders
            }
            counted = statistics.median(of_each[first])
            table.row(f"{label}: {first}", f"{counted:.0f}", f"{base:.2f} us")
            for name in others:
                more = statistics.median(a - b for a, b in zip(of_each[name], of_each[first], strict=True))
                taken = more / counted * base
                bar = row.bars[name]
                table.row(f"{label}: {name}", f"{more:+.0f}", f"{taken:+.2f} us", f"+{bar} us", taken <= bar)


def position_row(table: Table, rounds: int) -> None:
    engine = create_engine(POSTGRESQL)
    try:
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
            connection.commit()
            figures = measure({"asked": lambda: driver_of(connection).written_position(connection)}, 20, rounds)
        table.row("PostgreSQL asked for its position", f"{statistics.median(figures['asked']):.2f} us")
    except Exception as error:
        print(f"PostgreSQL is not reachable: {error}")
    finally:
        engine.dispose()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=25)
    parser.add_argument("--one-process", action="store_true", help="print the figures of one process, as JSON")
    parser.add_argument("--instructions", type=int, metavar="LAYOUTS", help="count instructions, in so many layouts")
    parser.add_argument("--serve", nargs=3, metavar=("ROW", "CONTENDER", "CALLS"), help="serve requests, and no more")
    arguments = parser.parse_args()
    if arguments.serve:
        label, name, calls = arguments.serve
        serve_alone(label, name, int(calls))
        return 0
    if arguments.one_process:
        print(json.dumps(figures_of_one()))
        return 0
    table = Table()
    if arguments.instructions:
        print_instructions(table, arguments.instructions)
    else:
        print_rows(table, arguments.processes)
        position_row(table, rounds=101)
    print(f"\n{table.missed} of the bars missed" if table.missed else "\nall bars held")
    return min(table.missed, 1)


if __name__ == "__main__":
    sys.exit(main())
