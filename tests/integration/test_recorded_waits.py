"""A request's record has as many round trips as the proxy of test_waits.py counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import bindparam, create_engine, func, insert, select, text, update

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware._recording.record import RECORD, Record

from ..drivers import Row
from .far_proxy import FarProxy, can_watch
from .test_waits import DRIVERS, disposed, far
from .waits import KINDS, OPTIONS, WARM, Item, Kind, answer, create, drop, read, serve

pytestmark = pytest.mark.skipif(not can_watch(), reason="this system does not tell what a thread waits for")


@pytest.fixture(params=DRIVERS, scope="module")
def row(request: pytest.FixtureRequest) -> Row:
    found: Row = request.param
    return found


@pytest.fixture(scope="module")
def proxy(row: Row) -> Iterator[FarProxy]:
    url = row.url()
    with disposed(create_engine(url)) as direct, FarProxy(url.host, url.port) as proxy:
        create(direct)
        yield proxy
        drop(direct)


def stream(size: int) -> Callable[[Any], None]:
    def work(current: Any) -> None:
        for _ in current.execute(select(Item.id), execution_options={"yield_per": size}).scalars():
            pass

    return work


def roll_back(current: Any) -> None:
    current.execute(insert(Item).values(n=1))
    current.rollback()
    read(current)


def update_many(current: Any) -> None:
    statement = update(Item.__table__).where(Item.__table__.c.id == bindparam("number")).values(n=bindparam("new"))
    current.connection().execute(statement, [{"number": number, "new": number} for number in (1, 2, 3)])


def insert_many(current: Any) -> None:
    current.execute(insert(Item), [{"n": number} for number in (1, 2, 3)])


def impure(current: Any) -> None:
    current.execute(select(func.now()))
    read(current)


WORK: dict[str, Callable[[Any], object]] = {
    **{name: kind.work for name, kind in KINDS.items()},
    "rolled back": roll_back,
    "text": lambda current: current.execute(text("SELECT 1")),
    "now": impure,
    "savepoint": lambda current: current.begin_nested().commit(),
    "connection taken": lambda current: (read(current), current.connection(), read(current)),
    "read and committed": lambda current: (read(current), current.commit()),
    "UPDATE of many": update_many,
    "INSERT of many": insert_many,
    "rows by twos": stream(2),
    "rows by hundreds": stream(100),
}


@pytest.mark.parametrize("options", [name for name in OPTIONS if name != "attempts"])
@pytest.mark.parametrize("name", WORK)
def test_record_has_the_waits_that_are_counted(name: str, options: str, row: Row, proxy: FarProxy) -> None:
    method = "GET" if name.startswith("GET") else "POST"
    kind = Kind(method, WORK[name])
    records: list[Record] = []

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        records.append(environ[RECORD])
        kind.work(session)
        return answer(start_response)

    wrapped = SQLASessionMiddleware(app, far(row, proxy), server_timing=True, **OPTIONS[options])
    with disposed(wrapped):
        for _ in range(WARM):
            serve(wrapped, method)
        with proxy.watch() as waits:
            serve(wrapped, method)
    assert records[-1].trips == len(waits), f"{waits}\n" + "\n".join(each.sql for each in records[-1].statements)
