"""Count how often each kind of request waits for its database, and measure what the waits take.

Run ``python benchmarks/waits.py`` with PostgreSQL and MariaDB as for the tests, after ``pip install -r
benchmarks/requirements.txt``. A driver or a library that is missing or does not work is reported and left out.

A proxy between the application and the database counts the waits: ``tests/integration/far_proxy.py``. It uses no clock,
so the figures are whole numbers, also on a busy machine. Each contender serves requests from a warm pool: a session by
hand with and without a ping, the middleware, and other libraries with their defaults. Bars: those of the tests.

``--time`` measures instead, on an otherwise idle machine, how long a request takes in bare WSGI: with the database on
loopback, and with one whose answers arrive 0.5 ms later, through a proxy in a process of its own. The contenders take
turns in one process. Each figure is the median over the rounds; ratios are computed within a round. A COMMIT includes
the server's write to the disk, unless ``synchronous_commit`` is off there. Bars with psycopg, as multiples of a session
by hand without a ping: one SELECT takes at most 0.95 on loopback and 0.5 from afar, INSERT and commit 1.0 and 0.75.
"""

from __future__ import annotations

import argparse
import selectors
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

from per_request import Table, measure, ratio
from sqlalchemy import URL, Engine, create_engine, make_url, select
from sqlalchemy.orm import Session, sessionmaker
from transactions import versions

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.databases import GIVEN
from tests.drivers import ROWS
from tests.integration.far_proxy import FarProxy, Link, Relay
from tests.integration.waits import (
    KINDS,
    MOST,
    OPTIONS,
    WARM,
    Application,
    Item,
    Kind,
    by_hand,
    create,
    drop,
    ours,
    serve,
)

DRIVERS = {row.module: row for row in ROWS if row.server != "sqlite"}
BY_HAND = "by hand"
OURS = {"plain": "ours", "transaction": "ours, transaction=True", "attempts": "ours, attempts=3, unavailable=True"}
#: Seconds that the answers of the far database are late.
FAR = 0.0005
#: The most that a request may take with psycopg, as a multiple of the session by hand: on loopback, from afar.
BARS = {"GET, one SELECT": (0.95, 0.5), "INSERT, commit": (1.0, 0.75)}

#: Makes an application that answers a kind of request, and what closes the connections of its engine.
Contender = Callable[[Kind, URL], tuple[Application, Callable[[], None]]]


# -- the contenders


def session_by_hand(kind: Kind, url: URL, **engine_options: Any) -> tuple[Application, Callable[[], None]]:
    engine = create_engine(url, **engine_options)
    return by_hand(kind, engine), engine.dispose


def middleware(kind: Kind, url: URL, **options: Any) -> tuple[Application, Callable[[], None]]:
    app = ours(kind, url, **options)
    return app, app.dispose


def flask_sqlalchemy(kind: Kind, url: URL, **engine_options: Any) -> tuple[Application, Callable[[], None]]:
    from flask import Flask
    from flask_sqlalchemy import SQLAlchemy

    db = SQLAlchemy(engine_options=engine_options)
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    db.init_app(app)

    @app.route("/", methods=["GET", "POST"])
    def view() -> str:
        kind.work(db.session)
        if kind.writes:
            db.session.commit()
        return "done"

    with app.app_context():
        return app, db.engine.dispose


def repoze_tm2(kind: Kind, url: URL) -> tuple[Application, Callable[[], None]]:
    from repoze.tm import TM
    from sqlalchemy.orm import scoped_session
    from zope.sqlalchemy import register

    engine = create_engine(url)
    current = scoped_session(sessionmaker(engine))
    register(current)

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        kind.work(current)
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "4")])
        return [b"done"]

    return TM(app), engine.dispose


def pyramid_tm(kind: Kind, url: URL) -> tuple[Application, Callable[[], None]]:
    """The setup of pyramid-cookiecutter-starter: a session on the request, and an explicit manager."""
    from pyramid.config import Configurator
    from pyramid.response import Response
    from zope.sqlalchemy import register

    engine = create_engine(url)
    factory = sessionmaker(engine)

    def open_session(request: Any) -> Session:
        opened = factory()
        register(opened, transaction_manager=request.tm)
        return opened

    def view(request: Any) -> Response:
        kind.work(request.dbsession)
        return Response(b"done", content_type="text/plain")

    with Configurator(settings={"tm.manager_hook": "pyramid_tm.explicit_manager"}) as config:
        config.include("pyramid_tm")
        config.add_request_method(open_session, "dbsession", reify=True)
        config.add_route("any", "/*path")
        config.add_view(view, route_name="any")
    return config.make_wsgi_app(), engine.dispose


def falcon_sqla(kind: Kind, url: URL) -> tuple[Application, Callable[[], None]]:
    from falcon import App
    from falcon_sqla import Manager

    class Resource:
        def on_get(self, req: Any, resp: Any) -> None:
            kind.work(req.context.session)
            resp.data = b"done"

        on_post = on_get

    engine = create_engine(url)
    app = App(middleware=[Manager(engine).middleware])
    app.add_route("/", Resource())
    return app, engine.dispose


BARE: dict[str, Contender] = {
    BY_HAND: session_by_hand,
    "by hand, ping": partial(session_by_hand, pool_pre_ping=True),
    **{label: partial(middleware, **OPTIONS[name]) for name, label in OURS.items()},
}
OTHERS: dict[str, Contender] = {
    "Flask-SQLAlchemy": flask_sqlalchemy,
    "Flask-SQLAlchemy, ping": partial(flask_sqlalchemy, pool_pre_ping=True),
    "pyramid_tm + zope.sqlalchemy": pyramid_tm,
    "repoze.tm2 + zope.sqlalchemy": repoze_tm2,
    "falcon-sqla": falcon_sqla,
}

# -- the databases


@contextmanager
def prepared(driver: str) -> Iterator[tuple[URL, Engine]]:
    """The URL of a driver's database, with the tables in it, and an engine."""
    row = DRIVERS[driver]
    url = make_url(GIVEN[row.server]).set(drivername=row.dialect)
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    create(engine)
    try:
        yield url, engine
    finally:
        drop(engine)
        engine.dispose()


def missing(driver: str) -> str | None:
    """Why a driver cannot be measured, if it cannot."""
    if find_spec(DRIVERS[driver].module) is None:
        return "it is not installed"
    try:
        with prepared(driver):
            return None
    except Exception as error:
        return str(error).splitlines()[0]


def stored(engine: Engine) -> list[tuple[int, int]]:
    with Session(engine) as own:
        return [(ident, n) for ident, n in own.execute(select(Item.id, Item.n).order_by(Item.id))]


# -- counting


def count(proxy: FarProxy, url: URL, engine: Engine, contender: Contender, kind: Kind) -> int:
    """Return the waits of a request.

    :raises RuntimeError: if it does not store what it has to, or if two requests do not wait equally often.
    """
    app, dispose = contender(kind, url)
    counts = set()
    try:
        for _ in range(WARM):
            serve(app, kind.method)
        before = stored(engine)
        for _ in range(3):
            with proxy.watch() as waits:
                serve(app, kind.method)
            counts.add(len(waits))
    finally:
        dispose()
    if (stored(engine) != before) is not kind.writes:
        raise RuntimeError("it stored nothing" if kind.writes else "it stored something")
    if len(counts) > 1:
        raise RuntimeError(f"it waits {sorted(counts)} times")
    return counts.pop()


def count_all(driver: str) -> int:
    """Print the table of a driver, and return how many bars were missed."""
    missed = 0
    widths = [len(name) + 2 for name in KINDS]
    head = "".join(f"{name:>{width}}" for name, width in zip(KINDS, widths, strict=True))
    print(f"\n{driver:36}{head}")
    with prepared(driver) as (url, engine), FarProxy(str(url.host), int(url.port or 0)) as proxy:
        far = url.set(host=proxy.host, port=proxy.port)
        for label, contender in (BARE | OTHERS).items():
            try:
                counts = [count(proxy, far, engine, contender, kind) for kind in KINDS.values()]
            except Exception as error:
                if label in BARE:
                    raise
                print(f"{label:36}  left out: {type(error).__name__}: {error}")
                continue
            figures = [str(each) for each in counts]
            if label in OURS.values():
                for index, (each, most) in enumerate(zip(counts, MOST[driver], strict=True)):
                    if each > most:
                        figures[index] += f" (bar {most})"
                        missed += 1
            print(f"{label:36}{''.join(f'{each:>{width}}' for each, width in zip(figures, widths, strict=True))}")
    return missed


# -- measuring


class LateRelay(Relay):
    """Delivers each answer some seconds after it has come, and does not sleep meanwhile: sleep() oversleeps."""

    def __init__(self, host: str, port: int, seconds: float) -> None:
        super().__init__(host, port)
        self.seconds = seconds

    def now(self) -> float:
        return perf_counter()

    def time_of(self, link: Link) -> float:
        return self.now() + self.seconds

    def may_pass(self, time: float) -> bool:
        return time <= self.now()

    def patience(self) -> float | None:
        return 0 if self.holds() else None


def relay(host: str, port: int, seconds: float) -> None:
    """Serve until the standard input ends, as it does with the process that has started this one. Prints the port."""
    late = LateRelay(host, port, seconds)
    late.selector.register(sys.stdin, selectors.EVENT_READ, sys.exit)
    print(late.port, flush=True)
    while True:
        late.turn()


@contextmanager
def far_away(url: URL) -> Iterator[URL]:
    """The URL of the same database, far away."""
    command = [sys.executable, __file__, "--relay", str(url.host), str(url.port), str(FAR)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield url.set(host="127.0.0.1", port=int(process.stdout.readline()))
        finally:
            process.stdin.close()


def median_of_turn(call: Callable[[], object], calls: int) -> float:
    """Return the median microseconds of a request."""
    turn = []
    for _ in range(calls):
        begin = perf_counter()
        call()
        turn.append((perf_counter() - begin) * 1e6)
    return statistics.median(turn)


def measure_kind(kind: Kind, url: URL, rounds: int, calls: int) -> dict[str, list[float]]:
    """Return the microseconds per request of each contender in bare WSGI, one figure per round."""
    with ExitStack() as stack:
        contenders: dict[str, Callable[[], object]] = {}
        for label, make in BARE.items():
            app, dispose = make(kind, url)
            stack.callback(dispose)
            contenders[label] = partial(serve, app, kind.method)
        return measure(contenders, calls, rounds, median_of_turn)


def print_times(table: Table, driver: str, rounds: int, calls: int) -> None:
    with prepared(driver) as (url, _), far_away(url) as far:
        places = ("loopback", url), (f"{FAR * 1000} ms", far)
        for index, (place, each) in enumerate(places):
            for name, bars in BARS.items():
                figures = measure_kind(KINDS[name], each, rounds, calls)
                for label in figures:
                    times = ratio(figures, label, BY_HAND)
                    bar = bars[index] if driver == "psycopg" and label == OURS["plain"] else None
                    table.row(
                        f"{driver}, {place}, {name}" if label == BY_HAND else f"    {label}",
                        f"{statistics.median(figures[label]):.0f} us",
                        "" if label == BY_HAND else f"x {times:.3f}",
                        "" if bar is None else f"x {bar}",
                        bar is None or times <= bar,
                    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--driver", choices=DRIVERS, action="append", help="only this one; may be repeated")
    parser.add_argument("--time", action="store_true", help="measure how long requests take")
    parser.add_argument("--rounds", type=int, default=200, help="of the measurement")
    parser.add_argument("--calls", type=int, default=10, help="requests in a contender's turn")
    parser.add_argument("--relay", nargs=3, metavar=("HOST", "PORT", "SECONDS"), help="be the proxy, and no more")
    arguments = parser.parse_args()
    if arguments.relay:
        host, port, seconds = arguments.relay
        relay(host, int(port), float(seconds))
    print(", ".join(versions()))
    drivers = arguments.driver or (["psycopg"] if arguments.time else list(DRIVERS))
    reasons = {driver: missing(driver) for driver in drivers}
    for driver, reason in reasons.items():
        if reason is not None:
            print(f"left out: {driver}: {reason}")
    present = [driver for driver in drivers if reasons[driver] is None]
    if arguments.time:
        table = Table()
        for driver in present:
            print_times(table, driver, arguments.rounds, arguments.calls)
        missed = table.missed
    else:
        missed = sum(count_all(driver) for driver in present)
    print(f"\n{missed} of the bars missed" if missed else "\nall bars held")
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
