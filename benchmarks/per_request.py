"""Measure the cost of the middleware per request.

It is compared with no middleware, a session by hand, and the pattern that it modernizes. Run ``python
benchmarks/per_request.py`` on an otherwise idle machine. All contenders do the same work, interleaved in one process.
Each figure is the median over the rounds; differences and ratios are computed within a round. The database is SQLite in
memory with one connection, so only Python is measured.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import sys
import tracemalloc
from collections.abc import Callable, Iterable
from importlib.metadata import version
from time import perf_counter_ns
from typing import Any

import sqlalchemy
from sqlalchemy import Engine, create_engine, insert, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session
from sqlalchemy.pool import StaticPool
from werkzeug.local import Local, LocalManager
from werkzeug.wsgi import ClosingIterator

from sqlasession_middleware import SQLASessionMiddleware, session

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


STATEMENT = select(Item.id, Item.name).where(Item.id == 1)
CHUNKS = 1000


def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> None:
    pass


def serve(app: Application) -> None:
    """Run one request as a server does."""
    result = app({"REQUEST_METHOD": "GET", "PATH_INFO": "/"}, start_response)
    for _ in result:
        pass
    close = getattr(result, "close", None)
    if close is not None:
        close()


# -- the pattern, written literally except for what no longer exists (LocalManager.get_ident) and for the order of
# the two finishers, which leaked the session

seed_local = Local()
seed_manager = LocalManager([seed_local])
seed_application = seed_local("application")
seed_session = scoped_session(
    lambda: Session(seed_application.database_engine), lambda: id(seed_application._get_current_object())
)


class Seed:
    def __init__(self, app: Application, engine: Engine) -> None:
        self.app = app
        self.database_engine = engine

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        seed_local.application = self
        return ClosingIterator(self.app(environ, start_response), [seed_session.remove, seed_manager.cleanup])


# -- the work, grouped by what opens the session

Work = Callable[[Any], object]


def select_row(current: Any) -> object:
    return current.execute(STATEMENT).one()


def get_object(current: Any) -> object:
    return current.get(Item, 1)


def using(current: Any, work: Work | None) -> Application:
    """An application that uses a session opened and closed by other code."""

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if work is not None:
            work(current)
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"done"]

    return app


def by_hand(engine: Engine, work: Work) -> Application:
    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with Session(engine) as own:
            work(own)
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"done"]

    return app


def streaming(kind: Callable[[], Iterable[bytes]]) -> Application:
    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return kind()

    return app


def chunk_list() -> Iterable[bytes]:
    return LONG_LIST


def chunk_generator() -> Iterable[bytes]:
    for _ in range(CHUNKS):
        yield b"x"


LONG_LIST = [b"x"] * CHUNKS

# -- measuring


def mean_of_turn(call: Callable[[], object], calls: int) -> float:
    """Return the microseconds per call."""
    begin = perf_counter_ns()
    for _ in range(calls):
        call()
    return (perf_counter_ns() - begin) / calls / 1000


def measure(
    contenders: dict[str, Callable[[], object]],
    calls: int,
    rounds: int,
    of_turn: Callable[[Callable[[], object], int], float] = mean_of_turn,
) -> dict[str, list[float]]:
    """Return the microseconds per call of each contender, one figure per round.

    A turn takes some milliseconds, so that other work of the machine affects all contenders alike. With single calls,
    no garbage is collected explicitly: that would take longer than the calls.
    """
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds + 1):
        if calls > 1:
            gc.collect()
        for name in names[number % len(names) :] + names[: number % len(names)]:
            elapsed = of_turn(contenders[name], calls)
            if number:  # The first round is a warm-up.
                figures[name].append(elapsed)
    return figures


def difference(figures: dict[str, list[float]], name: str, base: str) -> float:
    return statistics.median(a - b for a, b in zip(figures[name], figures[base], strict=True))


def ratio(figures: dict[str, list[float]], name: str, base: str) -> float:
    return statistics.median(a / b for a, b in zip(figures[name], figures[base], strict=True))


class Table:
    def __init__(self) -> None:
        self.missed = 0
        print(f"{'':44} {'median':>10} {'against':>24} {'bar':>12}")

    def row(self, label: str, figure: str, against: str = "", bar: str = "", held: bool = True) -> None:
        self.missed += not held
        print(f"{label:44} {figure:>10} {against:>24} {bar:>12}{'' if held else '  MISSED'}")


def make_engine() -> Engine:
    engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(Item).values(id=1, name="one"))
    return engine


def work_rows(table: Table, engine: Engine, rounds: int) -> None:
    cases: list[tuple[str, Work | None, int, str, float]] = [
        ("session not touched", None, 2000, "us", 1.2),
        ("one SELECT", select_row, 80, "x", 1.04),
        ("ORM get", get_object, 80, "x", 1.03),
    ]
    for label, work, calls, unit, bar in cases:
        contenders = {
            "no middleware": using(None, None) if work is None else by_hand(engine, work),
            "seed's pattern": Seed(using(seed_session, work), engine),
            "ours": SQLASessionMiddleware(using(session, work), engine),
        }
        figures = measure({name: lambda app=app: serve(app) for name, app in contenders.items()}, calls, rounds)
        base = "no middleware" if work is None else "session by hand"
        table.row(f"{label}: {base}", f"{statistics.median(figures['no middleware']):.2f} us")
        for name in ("seed's pattern", "ours"):
            more, times = difference(figures, name, "no middleware"), ratio(figures, name, "no middleware")
            ours = name == "ours"
            table.row(
                f"{label}: {name}",
                f"{statistics.median(figures[name]):.2f} us",
                f"+{more:.2f} us, x {times:.3f}",
                (f"+{bar} us" if unit == "us" else f"x {bar}") if ours else "",
                not ours or (more if unit == "us" else times) <= bar,
            )


def chunk_rows(table: Table, engine: Engine, rounds: int) -> None:
    for label, kind, bar in (("list", chunk_list, 0.001), ("generator", chunk_generator, 0.06)):
        full, empty = streaming(kind), streaming(list)
        apps = {
            "none": full,
            "none, empty": empty,
            "seed's pattern": Seed(full, engine),
            "seed's pattern, empty": Seed(empty, engine),
            "ours": SQLASessionMiddleware(full, engine),
            "ours, empty": SQLASessionMiddleware(empty, engine),
        }
        figures = measure({name: lambda app=app: serve(app) for name, app in apps.items()}, 40, rounds)
        for name in ("seed's pattern", "ours"):
            # Subtract the cost of the request without chunks.
            request = difference(figures, f"{name}, empty", "none, empty")
            more = (difference(figures, name, "none") - request) / CHUNKS
            is_ours = name == "ours"
            table.row(
                f"chunk of a {label}: {name}",
                f"{more:+.4f} us",
                bar=f"+{bar} us" if is_ours else "",
                held=not is_ours or more <= bar,
            )


def many_rows(table: Table, rounds: int, count: int) -> None:
    engines = [make_engine() for _ in range(count)]
    turn = {"by hand": 0, "ours": 0}
    hand = [by_hand(engine, select_row) for engine in engines]
    ours = [SQLASessionMiddleware(using(session, select_row), engine) for engine in engines]

    def next_of(name: str, apps: list[Any]) -> Callable[[], object]:
        def call() -> None:
            turn[name] = (turn[name] + 1) % count
            serve(apps[turn[name]])

        return call

    contenders = {"by hand": next_of("by hand", hand), "ours": next_of("ours", ours)}
    figures = measure(contenders, count, max(3, rounds // 40))
    times = ratio(figures, "ours", "by hand")
    table.row(f"{count} applications, one SELECT: by hand", f"{statistics.median(figures['by hand']):.2f} us")
    table.row(
        f"{count} applications, one SELECT: ours",
        f"{statistics.median(figures['ours']):.2f} us",
        f"+{difference(figures, 'ours', 'by hand'):.2f} us, x {times:.3f}",
        "x 1.04",
        times <= 1.04,
    )


def construction_rows(table: Table) -> None:
    app = using(session, None)
    urls = [f"sqlite:///{number}.db" for number in range(5000)]
    SQLASessionMiddleware(app, urls[0])
    gc.collect()
    begin = perf_counter_ns()
    kept = [SQLASessionMiddleware(app, url) for url in urls]
    each = (perf_counter_ns() - begin) / len(urls) / 1000
    table.row("never called: construction", f"{each:.1f} us", "", "60 us", each <= 60)
    tracemalloc.start()
    kept[:] = [SQLASessionMiddleware(app, url) for url in urls]
    size = tracemalloc.get_traced_memory()[0] / len(urls)
    tracemalloc.stop()
    table.row("never called: memory", f"{size:.0f} B", "", "4096 B", size <= 4096)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=201)
    parser.add_argument("--applications", type=int, default=10000)
    arguments = parser.parse_args()
    print(
        f"Python {platform.python_version()}, SQLAlchemy {sqlalchemy.__version__}, "
        f"Werkzeug {version('Werkzeug')}, {arguments.rounds} rounds\n"
    )
    engine = make_engine()
    table = Table()
    work_rows(table, engine, arguments.rounds)
    chunk_rows(table, engine, arguments.rounds)
    construction_rows(table)
    many_rows(table, arguments.rounds, arguments.applications)
    print(f"\n{table.missed} of the bars missed" if table.missed else "\nall bars held")
    return min(table.missed, 1)


if __name__ == "__main__":
    sys.exit(main())
