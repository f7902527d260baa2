"""Measure what tenants cost: memory, the first request, later requests, and connections.

Run ``python benchmarks/tenants.py`` on an otherwise idle machine. One application with one database is compared with
``--files`` tenants on SQLite files, and on PostgreSQL (``--postgresql URL``, whose role may create databases) with
``--schemas`` schemas and ``--databases`` databases. Each request reads one row. Times are medians; those of later
requests are of a few tenants that take turns, and the cost in Python is that of a request without a statement.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import traceback
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter_ns
from typing import Any

from sqlalchemy import create_engine, make_url, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware.tenants import TenantsMiddleware

#: of the database and schemas on PostgreSQL
PREFIX = "bench_tenants"


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)


STATEMENT = select(Item.id)


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    if environ["PATH_INFO"] == "/read":
        session.scalars(STATEMENT).all()
    start_response("200 OK", [])
    return [b"x"]


def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> None:
    assert status == "200 OK", status


def ask(application: Any, name: str, path: str = "/read") -> float:
    """One request; returns its microseconds."""
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": path, "HTTP_HOST": f"{name}.example.com"}
    begin = perf_counter_ns()
    body = application(environ, start_response)
    for _ in body:
        pass
    body.close()
    return (perf_counter_ns() - begin) / 1000


def resident() -> float:
    """The memory of this process in MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(title: str, application: Any, names: list[str], rounds: int, count: Callable[[], object]) -> None:
    """Measure in a process of its own: this one would reuse the memory that an earlier measurement has freed."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        status = 1
        try:
            measure_here(title, application, names, rounds, count)
            sys.stdout.flush()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{title}: not measured")


def measure_here(title: str, application: Any, names: list[str], rounds: int, count: Callable[[], object]) -> None:
    gc.collect()
    before = resident()
    first = [ask(application, name) for name in names]
    gc.collect()
    each = (resident() - before) * 1024 / len(names)
    some = names[-min(len(names), 10) :]
    later = [ask(application, some[number % len(some)]) for number in range(rounds)]
    print(
        f"{title:32} first {statistics.median(first):8.0f} µs, later {statistics.median(later):7.1f} µs,"
        f" {each:7.1f} KiB each, {count()} connections"
    )


def tenants(bind: Any, names: list[str], **options: Any) -> TenantsMiddleware:
    return TenantsMiddleware(app, bind, tenant="subdomain", domain="example.com", known=names, **options)


def per_request(rounds: int) -> None:
    """What a request costs in Python alone, interleaved."""
    one = SQLASessionMiddleware(app, "sqlite://")
    many = tenants(lambda name: "sqlite://", ["acme", "globex"])
    differences, alone = [], []
    for _ in range(15):
        times = {
            contender: min(
                statistics.median(ask(contender, "acme", "/") for _ in range(rounds // 10)) for _ in range(3)
            )
            for contender in (one, many)
        }
        differences.append(times[many] - times[one])
        alone.append(times[one])
    print(f"a request without a statement: {statistics.median(alone):.2f} µs, and {statistics.median(differences):.2f}"
          " µs more with tenants")  # fmt: skip
    tracemalloc.start()
    known = [f"t{number}" for number in range(2000)]
    idle = tenants(lambda name: "sqlite://", known)
    before = tracemalloc.get_traced_memory()[0]
    for name in known:
        ask(idle, name, "/")
    print(f"a tenant that has not used its database: {(tracemalloc.get_traced_memory()[0] - before) / 2000:.0f} bytes")
    tracemalloc.stop()


def open_pools(application: TenantsMiddleware) -> int:
    return sum(
        engine.pool.checkedin() for each in application._table.applications.values() for engine in each.open_engines()
    )


def files(number: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        names = [f"t{each}" for each in range(number)]
        for name in names:
            engine = create_engine(f"sqlite:///{folder}/{name}.db")
            Base.metadata.create_all(engine)
            engine.dispose()
        one = SQLASessionMiddleware(app, f"sqlite:///{folder}/t0.db")
        measure("SQLite: one application", one, ["t0"], rounds, lambda: one.engine.pool.checkedin())
        for most in (100, number):
            many = tenants(f"sqlite:///{folder}/{{tenant}}.db", names, most=most)
            measure(f"SQLite: {number} files, most={most}", many, names, rounds, lambda many=many: open_pools(many))
            many.dispose()
        one.dispose()


@contextmanager
def created(url: str, statements: Iterable[str], undo: Iterable[str]) -> Iterator[None]:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in (*undo, *statements):
            connection.execute(text(statement))
    yield
    with engine.connect() as connection:
        for statement in undo:
            connection.execute(text(statement))
    engine.dispose()


def postgresql(url: str, schemas: int, databases: int, rounds: int) -> None:
    names = [f"t{each}" for each in range(max(schemas, databases))]
    made = [f"{PREFIX}_{name}" for name in names]
    with created(
        url,
        [f"CREATE SCHEMA {name} CREATE TABLE item (id serial PRIMARY KEY)" for name in made[:schemas]],
        [f"DROP SCHEMA IF EXISTS {name} CASCADE" for name in made[:schemas]],
    ):
        one = SQLASessionMiddleware(app, url, engine_options={"connect_args": {"options": f"-csearch_path={made[0]}"}})
        measure("PostgreSQL: one application", one, ["t0"], rounds, lambda: one.engine.pool.checkedin())
        one.dispose()
        many = tenants(url, names[:schemas], schema=f"{PREFIX}_{{tenant}}")
        shared: Any = many.shared
        measure(f"PostgreSQL: {schemas} schemas", many, names[:schemas], rounds, lambda: shared.engine.pool.checkedin())
        many.dispose()
    with created(
        url,
        [f"CREATE DATABASE {name}" for name in made[:databases]],
        [f"DROP DATABASE IF EXISTS {name} WITH (FORCE)" for name in made[:databases]],
    ):
        bind = make_url(url).set(database=f"{PREFIX}_{{tenant}}")
        # Another one than those that are measured: its tenants have been made.
        prepared = tenants(bind, names[:databases], most=1, metadata=Base.metadata)
        for name in names[:databases]:
            prepared.init_database(name)
        prepared.dispose()
        for most in (10, databases):
            many = tenants(bind, names[:databases], most=most)
            title = f"PostgreSQL: {databases} databases, most={most}"
            measure(title, many, names[:databases], rounds, lambda many=many: open_pools(many))
            many.dispose()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--schemas", type=int, default=1_000)
    parser.add_argument("--databases", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3_000)
    parser.add_argument("--postgresql", metavar="URL")
    given = parser.parse_args()
    per_request(given.rounds)
    files(given.files, given.rounds)
    if given.postgresql:
        postgresql(given.postgresql, given.schemas, given.databases, given.rounds)
