"""BEGIN, a statement and COMMIT, sent to PostgreSQL by psycopg before the first answer comes.

psycopg's pipeline mode ("Pipeline mode support") sends several statements and waits once. It does not do so with the
BEGIN that it sends by itself, so that a transaction is begun here as psycopg would begin it, and left to it as if it
had: https://www.psycopg.org/psycopg3/docs/advanced/pipeline.html. It also sends each statement as soon as it has it,
and each of them wakes the server. Here all go in one message.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from functools import partial
from typing import Any, Final, NamedTuple

from psycopg import Cursor, Error, IsolationLevel, ProgrammingError
from psycopg import Pipeline as PsycopgPipeline
from psycopg.errors import FeatureNotSupported, InvalidTextRepresentation, ReadOnlySqlTransaction
from psycopg.generators import send
from psycopg.pq import PipelineStatus, TransactionStatus

from .._dependencies import AUTOCOMMIT, PIPELINE

__all__ = ["Begin", "Outcome", "Pipeline"]

_IDLE: Final = TransactionStatus.IDLE
_IN_TRANSACTION: Final = TransactionStatus.INTRANS
_NO_PIPELINE: Final = PipelineStatus.OFF

#: How many statements psycopg keeps, such as those of an executemany(), before it begins to send them and to read
#: their results.
_SENT_AT_ONCE: Final = 100


class Begin(NamedTuple):
    """How the next transaction of a connection begins.

    :param text: the statement.
    :param read_only: the same for a transaction that cannot write.
    :param is_read_committed: whether the statement itself says READ COMMITTED. If not, the server's default applies.
    """

    text: str
    read_only: str
    is_read_committed: bool


class Outcome(Enum):
    """What became of a SELECT in a read-only transaction of its own."""

    DONE = "it was executed"
    WRITES = "it has tried to write, and nothing has happened"
    REFUSED = "it may do more than read tables, or it fails, and nothing has happened"
    OUTDATED = "its plan was outdated, and nothing has happened"


def _begins() -> dict[tuple[Any, Any], Begin]:
    levels = {None: "BEGIN", IsolationLevel.READ_COMMITTED: "BEGIN ISOLATION LEVEL READ COMMITTED"}
    modes = {None: "", True: " READ ONLY", False: " READ WRITE"}
    return {
        (level, mode): Begin(text + words, text + modes[True], level is not None)
        for level, text in levels.items()
        for mode, words in modes.items()
    }


_BEGINS: Final = _begins()

#: An error after a SELECT that read anything else than tables of this database without row-level security: a view, a
#: policy or a foreign server may do more than read, which a rollback undoes. A transaction keeps a lock on each
#: relation that it has used ("pg_locks"), and this question uses pg_locks itself. The server's log shows its text.
_REFUSE_OTHER_THAN_TABLES: Final = """
    SELECT CAST(CASE WHEN EXISTS (
        SELECT FROM pg_catalog.pg_locks AS held JOIN pg_catalog.pg_class AS used ON used.oid = held.relation
        WHERE held.pid = pg_catalog.pg_backend_pid() AND used.oid <> CAST('pg_catalog.pg_locks' AS regclass)
            AND (used.relkind IN ('v', 'f') OR used.relrowsecurity)
    ) THEN 'lazy_begin: this SELECT uses more than tables, and is repeated in a usual transaction' END AS integer)
"""


class Pipeline:
    """Begins transactions in pipeline mode."""

    def counting(self, note: Callable[[int], None]) -> CountingPipeline:
        """The same, with its waits counted."""
        return CountingPipeline(note)

    @staticmethod
    def is_supported() -> bool:
        """Whether libpq has the pipeline mode, as version 14 and later do."""
        return PsycopgPipeline.is_supported()

    @staticmethod
    def is_idle(cursor: Any) -> bool:
        """Whether no transaction is open. What the application itself has sent counts as well."""
        return bool(cursor.connection.pgconn.transaction_status == _IDLE)

    @staticmethod
    def begin_of(cursor: Any) -> Begin | None:
        """How psycopg would begin a transaction before the next statement of a cursor.

        None if it would not, or otherwise than at READ COMMITTED, or if the cursor is not of the usual kind: those of
        the server cannot be used in a pipeline.
        """
        connection = cursor.connection
        if (
            type(cursor) is not Cursor
            or connection.autocommit
            or connection.deferrable is not None
            or connection.pgconn.pipeline_status != _NO_PIPELINE
        ):
            return None
        return _BEGINS.get((connection.isolation_level, connection.read_only))

    def read(
        self, begin: Begin, cursor: Any, execute: Callable[[], object], is_known: bool, first: tuple[str, ...] = ()
    ) -> Outcome:
        """Execute a SELECT in a transaction of its own, which cannot write.

        :param execute: executes it with ``cursor``.
        :param first: what the transaction begins with.
        :param is_known: whether the same was done before, so that it is known to use nothing but tables.
        """
        connection = cursor.connection
        steps = (execute, "COMMIT") if is_known else (execute, _REFUSE_OTHER_THAN_TABLES, "COMMIT")
        try:
            setattr(connection, AUTOCOMMIT, True)  # Here, as a signal may raise an exception at any time.
            _send(connection, begin.read_only, *first, *steps)
        except ReadOnlySqlTransaction:
            if connection.read_only:
                raise
            connection.rollback()
            return Outcome.WRITES
        except FeatureNotSupported:
            # "cached plan must not change result type": psycopg prepares a SELECT that comes often, and a migration has
            # changed its columns. ROLLBACK has psycopg forget what it has prepared.
            connection.rollback()
            return Outcome.OUTDATED
        except (InvalidTextRepresentation, ProgrammingError):
            # The question's own error, also where pg_locks may not be read. If it is the SELECT's, it comes once more.
            if is_known:
                raise
            connection.rollback()
            return Outcome.REFUSED
        except BaseException:
            if connection.pgconn.transaction_status == _IN_TRANSACTION:
                connection.rollback()  # It was not even sent, and what comes next may write.
            raise
        finally:
            setattr(connection, AUTOCOMMIT, False)
        return Outcome.DONE

    def begin(
        self,
        begin: Begin,
        cursor: Any,
        execute: Callable[[], object],
        ask_level: bool = False,
        first: tuple[str, ...] = (),
    ) -> str | None:
        """Begin a transaction with its first statement.

        :param execute: executes it with ``cursor``.
        :param ask_level: ask for the isolation level as well.
        :param first: what the transaction begins with.
        :returns: the isolation level in lower case, if it was asked for.
        """
        connection = cursor.connection
        control = Cursor(connection) if ask_level else None
        try:
            setattr(connection, AUTOCOMMIT, True)
            if control is None:
                _send(connection, begin.text, *first, execute)
                return None
            ask = partial(control.execute, "SHOW transaction_isolation", prepare=False)
            _send(connection, begin.text, ask, *first, execute)
        finally:
            setattr(connection, AUTOCOMMIT, False)
        row: Any = control.fetchone()
        return str(row[0])

    def begin_alone(self, begin: Begin, connection: Any, first: tuple[str, ...] = ()) -> None:
        """Begin a transaction before whatever comes next, unless one is open.

        :param connection: psycopg's. If it is lost, what comes next will tell.
        :param first: what the transaction begins with.
        """
        if connection.pgconn.transaction_status != _IDLE or connection.autocommit:
            return
        try:
            setattr(connection, AUTOCOMMIT, True)
            with suppress(Error):
                for statement in (begin.text, *first):
                    Cursor(connection).execute(statement, prepare=False)
        finally:
            setattr(connection, AUTOCOMMIT, False)


class CountingPipeline(Pipeline):
    """Tells by how much its waits differ from those of BEGIN and then the statement.

    :param note: is called with the difference.
    """

    def __init__(self, note: Callable[[int], None]) -> None:
        self._note = note

    def read(
        self, begin: Begin, cursor: Any, execute: Callable[[], object], is_known: bool, first: tuple[str, ...] = ()
    ) -> Outcome:
        outcome = None
        try:
            outcome = super().read(begin, cursor, execute, is_known, first)
            return outcome
        finally:
            # In vain it has waited for the read and for ROLLBACK, and the statement is still to be sent.
            self._note(-1 if outcome in (None, Outcome.DONE) else 2)

    def begin(
        self,
        begin: Begin,
        cursor: Any,
        execute: Callable[[], object],
        ask_level: bool = False,
        first: tuple[str, ...] = (),
    ) -> str | None:
        self._note(-1)
        return super().begin(begin, cursor, execute, ask_level, first)

    def begin_alone(self, begin: Begin, connection: Any, first: tuple[str, ...] = ()) -> None:
        if connection.pgconn.transaction_status == _IDLE and not connection.autocommit:
            self._note(1 + len(first))
        super().begin_alone(begin, connection, first)


class _Batch(PsycopgPipeline):
    """psycopg's Pipeline, which here sends nothing before all of it is there.

    Its last message is a Sync. psycopg's own has a Flush after that, which comes to PostgreSQL after its ReadyForQuery:
    that ends the wait for a command, and the clock of ``idle_in_transaction_session_timeout`` with it.
    """

    _is_complete = False

    def add(self, command: str) -> None:
        """Add a command of whose result only an error is of interest, as psycopg adds its own COMMIT."""
        self.pgconn.send_query_params(command.encode(), None)  # to the buffer of libpq
        self.result_queue.append(None)

    def exchange(self) -> None:
        """Send what was added, and wait for all results.

        :raises Exception: the first error.
        """
        self._is_complete = True
        self.sync()

    def _communicate_gen(self) -> Any:
        """What psycopg does when a cursor has added a statement, and in the end."""
        commands = self.command_queue
        if len(self.result_queue) > _SENT_AT_ONCE and not self._is_complete:
            return super()._communicate_gen()  # It raises the first error, and leaves what follows to be read.
        while commands:
            commands.popleft()()
        return send(self.pgconn) if self._is_complete else ()


def _send(connection: Any, *steps: str | Callable[[], object]) -> None:
    """Take steps in a pipeline, and wait once for all of them.

    :param steps: statements without a result, and what executes others.
    :raises BaseException: the first error. The others follow from it, and are not logged, as psycopg does with them.
        What interrupts the wait, as a signal or gevent can, comes before all errors of the database.
    """
    pgconn = connection.pgconn
    batch = _Batch(connection)
    first: BaseException | None = None
    try:
        setattr(connection, PIPELINE, batch)
        pgconn.enter_pipeline_mode()
        try:
            for step in steps:
                if isinstance(step, str):
                    batch.add(step)
                else:
                    step()
        except Exception as error:
            first = error
        try:
            batch.exchange()
        except Exception as error:
            if first is None or not isinstance(error, Error):
                first = error
    finally:
        setattr(connection, PIPELINE, None)
        try:
            pgconn.exit_pipeline_mode()
        except Error:
            connection.close()  # The server has gone in the middle. SQLAlchemy sees that by the closed connection.
    if first is not None:
        try:
            raise first
        finally:
            del first  # Else its traceback and this frame refer to each other.
