"""A SQLite file with a pool of two connections, and a switch that puts the file out of reach."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from threading import Lock
from typing import Any

from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, delete, event, func, select
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.orm import Session

from .log import listen
from .models import Base, Concert, Order

__all__ = ["POOL_SIZE", "Database"]

POOL_SIZE = 2
CONCERTS = 10


class Database:
    """The database of one shop. Both shops have the same engine with the same options.

    :param path: its file. What is in it is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._moved = path.with_suffix(".away.db")
        # mode=rw: SQLite would create a file that is not there.
        url = URL.create("sqlite", database=path.as_uri(), query={"mode": "rw", "uri": "true"})
        self.engine = create_engine(url, pool_size=POOL_SIZE, max_overflow=0, pool_timeout=1)
        # For what the experiments themselves look up. It takes no connection of the pool, and is not logged.
        self._own = create_engine(url, poolclass=NullPool)
        for engine in (self.engine, self._own):
            begin_transactions(engine)
        listen(self.engine)
        event.listen(self.engine, "handle_error", tell_of_outage)
        self._exists = False
        self._creating = Lock()

    @property
    def is_away(self) -> bool:
        return self._moved.exists()

    def take_away(self) -> None:
        """Put the file out of reach, and close the idle connections, as a server does that stops."""
        self.engine.dispose()
        self.path.rename(self._moved)

    def bring_back(self) -> None:
        if self.is_away:
            self._moved.rename(self.path)

    def fill(self) -> None:
        """Store what the experiments begin with: ten concerts, each with two orders and one ticket left."""
        self.create()
        self.bring_back()
        self._store()

    def _store(self) -> None:
        with Session(self._own) as session:
            session.execute(delete(Order))
            session.execute(delete(Concert))
            for number in range(1, CONCERTS + 1):
                orders = [Order(buyer=buyer) for buyer in ("Ada", "Grace")]
                session.add(Concert(id=number, name=f"Concert {number}", tickets=1, orders=orders))
            session.commit()

    def create(self) -> None:
        """Create the file with its tables, once."""
        if not self._exists:
            with self._creating:
                if not self._exists:
                    self._create()
                    self._store()
                    self._exists = True

    def _create(self) -> None:
        for path in self.path.parent.glob(f"{self.path.stem}.*"):
            path.unlink()
        self.path.touch()
        with self._own.connect() as connection:
            # A stream that a visitor has left open keeps nobody from writing.
            driver_connection: Any = connection.connection
            driver_connection.execute("PRAGMA journal_mode = WAL")
        Base.metadata.create_all(self._own)

    def count_orders(self) -> int:
        """How many orders there are beyond those of :meth:`fill`."""
        with Session(self._own) as session:
            return session.scalars(select(func.count(Order.id))).one() - 2 * CONCERTS

    def held(self) -> int:
        """How many connections of the pool are in use now."""
        return self.engine.pool.checkedout()  # type: ignore[attr-defined, no-any-return]  # QueuePool has it.

    def dispose(self) -> None:
        self.engine.dispose()


def tell_of_outage(context: ExceptionContext) -> None:
    """Tell SQLAlchemy that the database is out of reach if the file is, as a driver of a server does.

    To a driver of SQLite, a file that cannot be opened is no outage: waiting does not mend a disk. This one comes back.
    """
    if getattr(context.original_exception, "sqlite_errorcode", None) == sqlite3.SQLITE_CANTOPEN:
        context.is_disconnect = True


def begin_transactions(engine: Engine) -> None:
    """Have a transaction begin before its first SELECT: Python's sqlite3 would wait for the first INSERT.

    As SQLAlchemy's documentation of SQLite shows it. Without it two buyers could read at once, and both would buy.
    """

    @event.listens_for(engine, "connect")
    def leave_begin_to_us(driver_connection: Any, record: Any) -> None:
        driver_connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")
