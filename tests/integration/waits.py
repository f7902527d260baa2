"""The kinds of requests whose waits are counted, for the tests and for ``benchmarks/waits.py``.

An application answers one kind of request: it works with a session, and commits it if the middleware does not. The
tables are made by :func:`create`, with the three rows that the requests read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from io import BytesIO
from itertools import count
from typing import Any, NamedTuple
from uuid import uuid4

from sqlalchemy import Engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from werkzeug.test import create_environ

from sqlasession_middleware import SQLASessionMiddleware, session

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

#: The requests after which a pool has its connection, SQLAlchemy its caches, and psycopg its prepared statements: it
#: prepares one when it meets it for the sixth time.
WARM = 8


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = f"waits_{uuid4().hex[:12]}"
    id: Mapped[int] = mapped_column(primary_key=True)
    n: Mapped[int]


NUMBERS = count(10)


def read(current: Any) -> None:
    assert current.execute(select(Item).where(Item.id == 1)).scalar_one().id == 1


def read_thrice(current: Any) -> None:
    for number in (1, 2, 3):
        assert current.execute(select(Item.id).where(Item.id == number)).scalar_one() == number


def insert(current: Any) -> None:
    current.add(Item(n=next(NUMBERS)))


def update(current: Any) -> None:
    current.execute(select(Item).where(Item.id == 2)).scalar_one().n = next(NUMBERS)


class Kind(NamedTuple):
    """A kind of request.

    :param work: what it does with its session.
    :param writes: whether it has something to commit.
    """

    method: str
    work: Callable[[Any], object]
    writes: bool = False


KINDS = {
    "untouched": Kind("GET", lambda current: None),
    "GET, one SELECT": Kind("GET", read),
    "GET, three SELECTs": Kind("GET", read_thrice),
    "POST, one SELECT": Kind("POST", read),
    "INSERT, commit": Kind("POST", insert, writes=True),
    "SELECT, UPDATE, commit": Kind("POST", update, writes=True),
}

#: The most waits of a request in the middleware, by the driver and in the order of KINDS.
MOST = {
    "psycopg": (0, 1, 3, 1, 2, 3),
    "psycopg2": (0, 3, 5, 3, 3, 4),
    "pymysql": (0, 2, 4, 2, 2, 3),
    "MySQLdb": (0, 2, 4, 2, 2, 3),
    "mariadb": (0, 2, 4, 2, 2, 3),
}

#: The options that a request costs the same with.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "transaction": {"transaction": True},
    "attempts": {"transaction": {"attempts": 3}, "unavailable": True},
    "deadline": {"deadline": 60},
}


def create(engine: Engine) -> None:
    """Make the table and its rows."""
    Base.metadata.create_all(engine)
    with Session(engine) as own:
        own.add_all(Item(n=number) for number in (1, 2, 3))
        own.commit()


def drop(engine: Engine) -> None:
    Base.metadata.drop_all(engine)


ENVIRONS = {method: create_environ("/", method=method) for method in ("GET", "POST")}


def answer(start_response: Callable[..., Any]) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "4")])
    return [b"done"]


def by_hand(kind: Kind, engine: Engine) -> Application:
    """The application with a session by hand."""

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        with Session(engine) as own:
            kind.work(own)
            if kind.writes:
                own.commit()
        return answer(start_response)

    return app


def ours(kind: Kind, bind: Any, **options: Any) -> SQLASessionMiddleware:
    """The application in the middleware."""
    commits = kind.writes and "transaction" not in options

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        kind.work(session)
        if commits:
            session.commit()
        return answer(start_response)

    return SQLASessionMiddleware(app, bind, **options)


def serve(app: Application, method: str) -> None:
    """Run one request as a server does, to the end of ``close()``."""
    statuses: list[str] = []

    def start_response(status: str, headers: object, exc_info: object = None) -> Callable[[bytes], None]:
        statuses.append(status)
        return lambda data: None

    result = app({**ENVIRONS[method], "wsgi.input": BytesIO()}, start_response)
    try:
        for _ in result:
            pass
    finally:
        close = getattr(result, "close", None)
        if close is not None:
            close()
    assert statuses[-1:] == ["200 OK"], statuses
