"""G17, by random sequences: two sessions with ``lazy_begin`` see, step by step, what two of SQLAlchemy's own see.

Each step is taken on both sides. The sides have tables of their own, so that nobody waits for the other side.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from sqlalchemy import (
    Column,
    Integer,
    MetaData,
    NullPool,
    String,
    Table,
    create_engine,
    delete,
    event,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session

from sqlasession_middleware import SQLASessionMiddleware

from .drivers import rows_of

SIDES = ("ours", "theirs")
TABLES = {
    side: Table(
        f"sequence_{side}",
        MetaData(),
        Column("id", Integer, primary_key=True, autoincrement=False),
        Column("name", String(10)),
    )
    for side in SIDES
}
IDS = st.integers(1, 3)
WHO = st.integers(0, 1)
#: Two sessions in one thread cannot wait for each other: who would wait gets an error.
OPTIONS = {"connect_args": {"options": "-c lock_timeout=5"}}


def seen_by(call: Any) -> object:
    """The result of a step, or what the error is known by."""
    try:
        return call()
    except DBAPIError as error:
        return type(error.orig).__name__
    except SQLAlchemyError as error:
        return type(error).__name__


class Sequences(RuleBasedStateMachine):
    """Two sessions on each side."""

    url: Any
    app: SQLASessionMiddleware
    plain: Any
    #: the connections of both sides, as the driver has them
    opened: list[Any]

    @initialize()
    def begin(self) -> None:
        engines = {"ours": self.app.engine, "theirs": self.plain}
        for side in SIDES:
            with engines[side].begin() as connection:
                connection.execute(delete(TABLES[side]))
        self.sessions = {side: [Session(engines[side]) for _ in range(2)] for side in SIDES}
        self.savepoints: dict[str, list[list[Any]]] = {side: [[], []] for side in SIDES}

    def teardown(self) -> None:
        for side in SIDES:
            for session in getattr(self, "sessions", {}).get(side, ()):
                with suppress(SQLAlchemyError):
                    session.close()
        engines = (self.app.engine, self.plain)
        if any(engine.pool.checkedout() for engine in engines):
            # SQLAlchemy's close() fails after an error in a savepoint, and leaves the transaction open.
            for driver_connection in self.opened:
                driver_connection.close()
            self.opened.clear()
            for engine in engines:
                engine.dispose()

    def both(self, step: Any) -> None:
        """Take a step on both sides, and compare."""
        results = {side: seen_by(lambda: step(side)) for side in SIDES}  # noqa: B023  # called at once
        assert results["ours"] == results["theirs"]

    @rule(who=WHO)
    def read_all(self, who: int) -> None:
        def step(side: str) -> object:
            rows = self.sessions[side][who].execute(select(TABLES[side]).order_by(TABLES[side].c.id))
            return [tuple(row) for row in rows]

        self.both(step)

    @rule(who=WHO, number=IDS)
    def read_one(self, who: int, number: int) -> None:
        self.both(lambda side: self.sessions[side][who].scalar(select(TABLES[side].c.name).filter_by(id=number)))

    @rule(who=WHO, number=IDS)
    def lock_one(self, who: int, number: int) -> None:
        statement = {
            side: select(TABLES[side].c.name).filter_by(id=number).with_for_update(nowait=True) for side in SIDES
        }
        self.both(lambda side: self.sessions[side][who].scalar(statement[side]))

    @rule(who=WHO, number=IDS, name=st.sampled_from("abc"))
    def insert_one(self, who: int, number: int, name: str) -> None:
        self.both(
            lambda side: self.sessions[side][who].execute(insert(TABLES[side]).values(id=number, name=name)).rowcount
        )

    @rule(who=WHO, number=IDS, name=st.sampled_from("abc"))
    def update_one(self, who: int, number: int, name: str) -> None:
        def step(side: str) -> object:
            return (
                self.sessions[side][who].execute(update(TABLES[side]).filter_by(id=number).values(name=name)).rowcount
            )

        self.both(step)

    @rule(who=WHO)
    def read_by_text(self, who: int) -> None:
        self.both(lambda side: self.sessions[side][who].scalar(text(f"SELECT count(*) FROM sequence_{side}")))

    @rule(who=WHO)
    def call_function(self, who: int) -> None:
        self.both(lambda side: self.sessions[side][who].scalar(select(func.md5("x"))))

    @rule(who=WHO, number=IDS)
    def use_raw_cursor(self, who: int, number: int) -> None:
        def step(side: str) -> object:
            cursor = self.sessions[side][who].connection().connection.cursor()
            try:
                cursor.execute(f"INSERT INTO sequence_{side} VALUES ({number}, 'raw')")
                return cursor.rowcount
            except Exception as error:
                return type(error).__name__

        self.both(step)

    @rule(who=WHO)
    def make_error(self, who: int) -> None:
        self.both(lambda side: self.sessions[side][who].execute(select(1 / (func.length("") + 0))).all())

    @rule(who=WHO)
    def open_savepoint(self, who: int) -> None:
        def step(side: str) -> None:
            self.savepoints[side][who].append(self.sessions[side][who].begin_nested())

        self.both(step)

    @rule(who=WHO, keep=st.booleans())
    def close_savepoint(self, who: int, keep: bool) -> None:
        def step(side: str) -> object:
            if not self.savepoints[side][who]:
                return None
            savepoint = self.savepoints[side][who].pop()
            return savepoint.commit() if keep else savepoint.rollback()

        self.both(step)

    @rule(who=WHO, end=st.sampled_from(["commit", "rollback", "close"]))
    def end_transaction(self, who: int, end: str) -> None:
        def step(side: str) -> object:
            self.savepoints[side][who].clear()
            return getattr(self.sessions[side][who], end)()

        self.both(step)


def test_sequence_of_steps_sees_the_same() -> None:
    url = rows_of("psycopg")[0].values[0].url()
    admin = create_engine(url, poolclass=NullPool)
    for side in SIDES:
        TABLES[side].create(admin, checkfirst=True)
    Sequences.app = SQLASessionMiddleware(lambda environ, start: [], url, engine_options=OPTIONS)
    Sequences.plain = create_engine(url, **OPTIONS)
    Sequences.opened = []
    for engine in (Sequences.app.engine, Sequences.plain):
        event.listen(engine, "connect", lambda driver_connection, record: Sequences.opened.append(driver_connection))
    try:
        more = settings(max_examples=60, stateful_step_count=30, suppress_health_check=list(HealthCheck))
        run_state_machine_as_test(Sequences, settings=more)
    finally:
        Sequences.app.dispose()
        Sequences.plain.dispose()
        for side in SIDES:
            TABLES[side].drop(admin)
