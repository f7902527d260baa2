"""Instructions of a request, in this checkout and in another one: what a change costs, on a machine that is busy.

.. code-block:: console

    $ git worktree add ../before HEAD~5
    $ python benchmarks/instructions.py --before ../before

valgrind counts each kind of request in processes of its own. The processes differ in the layout of their names and
classes, because CPython's cache of methods alone makes a request some thousands of instructions longer or shorter. The
figures are medians over the layouts. Both checkouts run the same requests, on a SQLite file.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqlasession_middleware import SQLASessionMiddleware, session

HERE = Path(__file__).resolve().parent
FEW, MANY = 300, 800


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"answer"]


def read(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    session.execute(select(Item.id, Item.name).where(Item.id == 1)).all()
    return answer(environ, start_response)


def write(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    session.execute(insert(Item).values(name="new"))
    return answer(environ, start_response)


def stream(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    session.execute(select(Item.id, Item.name).where(Item.id == 1)).all()
    for _ in range(10):
        yield b"chunk"


REPLICAS = "SELECT, replicas"
#: The application and the middleware's options.
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "session not touched": (answer, {}),
    "SELECT": (read, {}),
    "stream": (stream, {}),
    "not touched, transaction": (answer, {"transaction": True}),
    "SELECT, transaction": (read, {"transaction": True}),
    "INSERT, transaction": (write, {"transaction": True}),
    "INSERT, attempts": (write, {"transaction": {"attempts": 3}}),
    "stream, transaction": (stream, {"transaction": True}),
    "SELECT, unavailable": (read, {"unavailable": True}),
    "SELECT, binds": (read, {"binds": {"other": "sqlite://"}}),
    REPLICAS: (read, {}),
}

#: In the child: classes and names lie elsewhere in each layout, the requests are the same.
SERVE = """
import gc, runpy, sys
layout, script = int(sys.argv[1]), sys.argv[2]
kept = [type(f"Kept{number}", (), {f"name{number}": number}) for number in range(layout * 37)]
sys.argv = [script, "--serve", *sys.argv[3:]]
runpy.run_path(script, run_name="__main__")
"""


def serve(kind: str, requests: int) -> None:
    application, options = KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/items.db"
        if kind == REPLICAS:
            options = {"replicas": [url]}
        app = SQLASessionMiddleware(application, url, metadata=Base.metadata, **options)
        app.init_database()
        gc.disable()  # What is collected, and when, depends on everything that was made before.
        for _ in range(requests):
            body: Any = app({"REQUEST_METHOD": "GET", "PATH_INFO": "/"}, lambda status, headers, exc_info=None: None)
            for _ in body:
                pass
            body.close()


def count(checkout: Path, kind: str, layout: int) -> float:
    """Instructions of one request, without those of the process around it."""
    totals = []
    for requests in (FEW, MANY):
        valgrind = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
        command = [*valgrind, sys.executable, "-c", SERVE, str(layout), __file__, kind, str(requests)]
        environ = {**os.environ, "PYTHONHASHSEED": str(layout), "PYTHONPATH": str(checkout)}
        said = subprocess.run(command, check=True, capture_output=True, text=True, env=environ).stderr
        found = re.search(r"I +refs: +([\d,]+)", said)
        assert found is not None, said
        totals.append(int(found[1].replace(",", "")))
    return (totals[1] - totals[0]) / (MANY - FEW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout, to compare with")
    parser.add_argument("--layouts", type=int, default=5)
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="only this kind of request")
    parser.add_argument("--serve", nargs=2, metavar=("KIND", "REQUESTS"), help="serve requests, and no more")
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve[0], int(arguments.serve[1]))
        return
    layouts = range(1, arguments.layouts + 1)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for kind in arguments.kind or KINDS:
            now = list(pool.map(lambda layout: count(HERE.parent, kind, layout), layouts))  # noqa: B023  # used at once
            row = f"{kind:28}{statistics.median(now):12.0f}"
            if arguments.before is not None:
                before = list(
                    pool.map(lambda layout: count(arguments.before.resolve(), kind, layout), layouts)  # noqa: B023
                )
                more = statistics.median(new - old for new, old in zip(now, before, strict=True))
                row += f"{more:+12.0f}{more / statistics.median(before):+9.2%}"
            print(row, flush=True)


if __name__ == "__main__":
    main()
