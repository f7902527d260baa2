"""Measure how long an ordinary request waits while many event streams are open, with a small pool.

The middleware is compared with Flask-SQLAlchemy. Run ``python benchmarks/streams.py`` after ``pip install -r
benchmarks/requirements.txt``. Use ``--url postgresql+psycopg://postgres@127.0.0.1/test`` for a database other than an
SQLite file.

All contenders wrap the same Flask application. Each stream has a thread, as in a threaded server, and queries for each
event; a round is one event of every stream. An ordinary request, which queries once, is timed while all streams wait
for their next event, and while all of them produce it. Threads meet at barriers; nothing sleeps. "No streams" is the
same request to a second instance with its own pool, alternating with the first one.

Bars: with the middleware, every stream survives all rounds, no connection is held while the streams wait, no ordinary
request fails, and a request takes at most 1.1 times as long while the streams wait as without streams. For the other
contender, the results are only shown.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from time import perf_counter_ns
from typing import Any

from flask import Flask, Response, stream_with_context
from per_request import Application, Base, Item, Table
from sqlalchemy import Engine, create_engine, select
from werkzeug.test import create_environ

from sqlasession_middleware import SQLASessionMiddleware, session

MOST_TIMES = 1.1
POOL_SIZE = 5
ENOUGH_FAILURES = 3  # Each failure takes the whole timeout.
STATEMENT = select(Item.name).where(Item.id == 1)


def site(current: Any) -> Flask:
    app = Flask(__name__)

    @app.get("/")
    def ordinary() -> str:
        return str(current.scalar(STATEMENT))

    @app.get("/events")
    def events() -> Response:
        def make() -> Iterator[str]:
            for number in count():
                yield f"id: {number}\ndata: {current.scalar(STATEMENT)}\n\n"

        return Response(stream_with_context(make()), mimetype="text/event-stream")

    return app


# -- the contenders


def ours(url: str, options: dict[str, Any], **more: Any) -> tuple[Application, Engine]:
    app = SQLASessionMiddleware(site(session), url, engine_options=options, **more)
    return app, app.engine


def flask_sqlalchemy(url: str, options: dict[str, Any]) -> tuple[Application, Engine]:
    from flask_sqlalchemy import SQLAlchemy

    db = SQLAlchemy(metadata=Base.metadata, engine_options=options)
    app = site(db.session)
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    db.init_app(app)
    with app.app_context():
        return app, db.engine


Factory = Callable[..., tuple[Application, Engine]]
CONTENDERS: dict[str, Factory] = {
    "Flask-SQLAlchemy": flask_sqlalchemy,
    "ours": ours,
    "ours + transaction": lambda url, options: ours(url, options, transaction=True),
}

# -- requests and streams


def request(app: Application, path: str) -> tuple[str, Any]:
    """Return the status and the body, not yet iterated."""
    statuses = []

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], None]:
        statuses.append(status)
        return lambda data: None

    body = app(create_environ(path), start_response)
    return (statuses or ["no status"])[-1], body


def is_served(app: Application) -> bool:
    status, body = request(app, "/")
    try:
        return status == "200 OK" and b"".join(body) == b"one"
    finally:
        body.close()


class Stream(threading.Thread):
    """An event stream, and the server thread that iterates over it.

    :param meeting: the barrier at which all streams and the main thread begin and end a round.
    """

    def __init__(self, app: Application, meeting: threading.Barrier) -> None:
        super().__init__(daemon=True)
        self.app = app
        self.meeting = meeting
        self.stopped = False
        #: the error that ended the stream
        self.error: BaseException | None = None

    def run(self) -> None:
        body: Any = None
        steps: Iterator[bytes] = iter(())
        while True:
            self.meeting.wait()
            if self.stopped:
                break
            if self.error is None:
                try:
                    if body is None:
                        _, body = request(self.app, "/events")
                        steps = iter(body)
                    if not next(steps, b"").endswith(b"data: one\n\n"):
                        raise RuntimeError("this was no event")
                except BaseException as error:
                    self.error = error
            self.meeting.wait()
        if body is not None:
            body.close()


class Latencies:
    """The durations of ordinary requests in microseconds, and the number of served requests."""

    def __init__(self) -> None:
        self.served: list[float] = []
        self.failed = 0

    def time(self, app: Application) -> None:
        if self.failed >= ENOUGH_FAILURES:
            return
        begin = perf_counter_ns()
        served = is_served(app)
        if served:
            self.served.append((perf_counter_ns() - begin) / 1000)
        else:
            self.failed += 1

    @property
    def median(self) -> float:
        return statistics.median(self.served) if self.served else float("inf")

    def __str__(self) -> str:
        return f"{self.median:.0f} us" if self.served else "none served"


def measure(
    label: str, make: Callable[[], tuple[Application, Engine]], options: argparse.Namespace, table: Table
) -> None:
    app, engine = make()
    idle, idle_engine = make()
    meeting = threading.Barrier(options.streams + 1)
    alone, waiting, amid = Latencies(), Latencies(), Latencies()
    for _ in range(50):
        Latencies().time(app)
        Latencies().time(idle)
    streams = [Stream(app, meeting) for _ in range(options.streams)]
    held = 0
    for stream in streams:
        stream.start()
    for turn in range(options.rounds + 1):
        meeting.wait()
        if turn:  # The first turn opens the streams.
            amid.time(app)
        meeting.wait()
        held = max(held, engine.pool.checkedout())  # type: ignore[attr-defined]  # It is a QueuePool.
        for _ in range(options.requests // 2):
            alone.time(idle)
            waiting.time(app)
            waiting.time(app)
            alone.time(idle)
    alive = sum(stream.error is None for stream in streams)
    for stream in streams:
        stream.stopped = True
    meeting.wait()
    for stream in streams:
        stream.join()
    engine.dispose()
    idle_engine.dispose()
    is_ours = label.startswith("ours")

    def row(what: str, figure: str, against: str = "", bar: str = "", held: bool = True) -> None:
        table.row(f"{label}: {what}", figure, against, bar if is_ours else "", held or not is_ours)

    row("streams alive", f"{alive} of {len(streams)}", "", str(len(streams)), alive == len(streams))
    row("connections held", str(held), "", "0", held == 0)
    for what, latencies in (("no streams", alone), ("streams wait", waiting), ("streams busy", amid)):
        failed = f"{latencies.failed} failed" if latencies.failed < ENOUGH_FAILURES else "all failed"
        row(f"request, {what}", str(latencies), failed, "0 failed", latencies.failed == 0)
    if waiting.served:
        times = statistics.median(a / b for a, b in zip(waiting.served, alone.served, strict=False))
        row("wait / no streams", f"x {times:.3f}", "", f"x {MOST_TIMES}", times <= MOST_TIMES)
    for error in {f"{type(each.error).__name__}: {str(each.error)[:90]}" for each in streams if each.error}:
        print(f"    a stream broke off with {error}")


def versions() -> Iterator[str]:
    yield f"Python {platform.python_version()}"
    for package in ("SQLAlchemy", "Flask", "Flask-SQLAlchemy"):
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            yield f"no {package}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=41, help="events of each stream")
    parser.add_argument("--requests", type=int, default=20, help="ordinary requests between two events")
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds to wait for a connection of the pool")
    parser.add_argument("--url", help="a database in which a table 'item' may be made anew (default: an SQLite file)")
    arguments = parser.parse_args()
    print(", ".join(versions()))
    pool = f"a pool of {POOL_SIZE} + 0, timeout {arguments.timeout} s"
    print(f"{arguments.streams} streams, {arguments.rounds} rounds, {pool}\n")
    logging.disable(logging.CRITICAL)  # Hide the tracebacks of requests that get no connection.
    table = Table()
    with tempfile.TemporaryDirectory() as folder:
        url = arguments.url or f"sqlite:///{os.path.join(folder, 'streams.db')}"
        setup = create_engine(url)
        Base.metadata.drop_all(setup)
        Base.metadata.create_all(setup)
        with setup.begin() as connection:
            connection.execute(Item.__table__.insert().values(id=1, name="one"))
        setup.dispose()
        for label, make in CONTENDERS.items():
            options = {"pool_size": POOL_SIZE, "max_overflow": 0, "pool_timeout": arguments.timeout}
            try:
                measure(label, partial(make, url, options), arguments, table)
            except ImportError as error:
                print(f"left out: {label}: {error}")
        Base.metadata.drop_all(setup)
        setup.dispose()
    print(f"\n{table.missed} of the bars missed" if table.missed else "\nall bars held")
    return min(table.missed, 1)


if __name__ == "__main__":
    sys.exit(main())
