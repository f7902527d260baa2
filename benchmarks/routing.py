"""What binds and replicas cost a request that does not use them, and what the read-your-writes cookie costs.

Run with ``python benchmarks/routing.py`` on an otherwise idle machine. As in per_request.py all contenders do the same
work, interleaved in one process; each figure is the median over the rounds of the difference within a round.

But not of one process: where the names and classes of a process lie decides which of them fight for a place in Python's
cache of methods (4096 of them), and in one process this alone makes the same request 20 000 instructions longer, or
shorter, than in the next: some microseconds, and more than what is measured here. So there are many processes one after
the other, and their median; the quartiles are shown as well. And a turn is longer than in per_request.py: Python
specialises its instructions for the classes that it meets, and each contender has its own.

The cookie is that of a database without a write-ahead log to ask: asking PostgreSQL takes a round trip, which is
measured by itself where a server answers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

from per_request import Base, Item, Table, Work, difference, get_object, make_engine, measure, select_row, using
from sqlalchemy import Engine, create_engine, select, text, update

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware.drivers import written_position

POSTGRESQL = os.environ.get("TEST_POSTGRESQL_URL", "postgresql+psycopg://postgres@127.0.0.1:5432/test")


def serve(app: Any, method: str, cookie: str | None = None) -> list[tuple[str, str]]:
    """One request, as a server runs it; the response's headers."""
    environ = {"REQUEST_METHOD": method, "PATH_INFO": "/"}
    if cookie is not None:
        environ["HTTP_COOKIE"] = cookie
    heads: list[list[tuple[str, str]]] = []
    result = app(environ, lambda status, headers, exc_info=None: heads.append(headers))
    for _ in result:
        pass
    result.close()
    return heads[0]


def core_row(current: Any) -> object:
    return current.execute(CORE).one()


CORE = select(Item.__table__).where(Item.__table__.c.id == 1)
UPDATE = update(Item.__table__).where(Item.__table__.c.id == 1).values(name="new")


def writing(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    session.execute(UPDATE)
    session.commit()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"done"]


def head_first(work: Work) -> Callable[..., Iterable[bytes]]:
    """An application that asks the database when the head has left, and with it the chance to give a cookie."""

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        work(session)
        return [b"done"]

    return app


#: label -> the application, the calls of a turn, and by how many microseconds replicas may make it longer
UNUSED: dict[str, tuple[Callable[..., Iterable[bytes]], int, int]] = {
    "no session": (using(session, None), 20000, 1),
    "SELECT": (head_first(select_row), 1000, 1),
    "Core": (head_first(core_row), 1000, 1),
    "ORM get": (head_first(get_object), 1000, 1),
    # What a POST leaves open may be a write, so the client is told of it.
    "SELECT, with the cookie": (using(session, select_row), 1000, 1 + 3),
}


def unused_figures(rounds: int) -> dict[str, dict[str, float]]:
    """Of one process: of each kind of request what it takes, and how much longer it takes with binds, with replicas."""
    engine = make_engine()
    figures = {}
    for label, (app, calls, _) in UNUSED.items():
        contenders = {
            "neither": SQLASessionMiddleware(app, engine),
            "binds": SQLASessionMiddleware(app, engine, binds={"audit": "sqlite://"}),
            "replicas": SQLASessionMiddleware(app, engine, replicas=["sqlite://"]),
        }
        # A method that is not safe: the request is the primary's.
        measured = measure(
            {name: lambda app=app: serve(app, "POST") for name, app in contenders.items()}, calls, rounds
        )
        figures[label] = {name: difference(measured, name, "neither") for name in ("binds", "replicas")}
        figures[label]["neither"] = statistics.median(measured["neither"])
    return figures


def unused_rows(table: Table, processes: int) -> None:
    command = [sys.executable, __file__, "--one-process"]
    of_each = [json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) for _ in range(processes)]
    for label, (_, _, bar_of_replicas) in UNUSED.items():
        neither = statistics.median(each[label]["neither"] for each in of_each)
        table.row(f"{label}: neither", f"{neither:.2f} us")
        for name, bar in (("binds", 1), ("replicas", bar_of_replicas)):
            low, more, high = statistics.quantiles((each[label][name] for each in of_each), n=4)
            against = f"{more:+.2f} ({low:+.1f} to {high:+.1f}) us"
            table.row(f"{label}: {name}", f"{neither + more:.2f} us", against, f"+{bar} us", more <= bar)


def cookie_rows(table: Table, engine: Engine, rounds: int) -> None:
    """Given by a request that writes, and taken by one that reads: from the primary in all cases."""
    writer = SQLASessionMiddleware(writing, engine, replicas=["sqlite://"])
    silent = SQLASessionMiddleware(writing, engine, replicas=["sqlite://"])
    silent.routing.replicas.marker.header = lambda mark, environ: ("Set-Cookie", "")  # type: ignore[union-attr]
    figures = measure({"cookie": lambda: serve(writer, "POST"), "none": lambda: serve(silent, "POST")}, 40, rounds)
    given = difference(figures, "cookie", "none")
    table.row("cookie given", f"{statistics.median(figures['cookie']):.2f} us", f"{given:+.2f} us")
    mark = dict(serve(writer, "POST"))["Set-Cookie"].partition(";")[0]
    marker = writer.routing.replicas.marker  # type: ignore[union-attr]
    figures = measure(
        {
            "cookie": lambda: marker.is_recent(marker.read({"HTTP_COOKIE": f"theme=dark; {mark}; lang=en"})),
            "none": lambda: marker.read({"HTTP_COOKIE": "theme=dark; session=0123456789; lang=en"}),
        },
        2000,
        rounds,
    )
    taken = difference(figures, "cookie", "none")
    table.row("cookie taken", f"{statistics.median(figures['cookie']):.2f} us", f"{taken:+.2f} us")
    table.row("cookie, both", f"{given + taken:.2f} us", "", "3 us", given + taken <= 3)


def position_row(table: Table, rounds: int) -> None:
    engine = create_engine(POSTGRESQL)
    try:
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
            connection.commit()
            figures = measure({"asked": lambda: written_position(connection)}, 20, rounds)
        table.row("PostgreSQL asked for its position", f"{statistics.median(figures['asked']):.2f} us")
    except Exception as error:
        print(f"PostgreSQL is not reachable: {error}")
    finally:
        engine.dispose()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=201)
    parser.add_argument("--processes", type=int, default=51)
    parser.add_argument("--one-process", action="store_true", help="print the figures of one process, as JSON")
    arguments = parser.parse_args()
    if arguments.one_process:
        print(json.dumps(unused_figures(rounds=7)))
        return 0
    engine = make_engine()
    Base.metadata.create_all(engine)
    table = Table()
    unused_rows(table, arguments.processes)
    cookie_rows(table, engine, arguments.rounds)
    position_row(table, arguments.rounds)
    print(f"\n{table.missed} of the bars missed" if table.missed else "\nall bars held")
    return min(table.missed, 1)


if __name__ == "__main__":
    sys.exit(main())
