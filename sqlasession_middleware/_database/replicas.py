"""Replicas: which of them a session reads from, and the state of each.

A replica that is out of reach is passed over, and tried again later by one request at a time. A standby of PostgreSQL
is asked how far it has replayed the primary's log only for a client that has written, and not again once it has reached
the position.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine, event
from sqlalchemy.orm import Session

from .._dependencies import call_first, origins_of
from .._drivers.registry import driver_by_dialect, driver_of, server_of_url
from .._scope.deadline import begin_unit, half_of_deadline, remaining
from .._scope.scope import Scope, current
from ..errors import ConfigurationError
from ..failures import Failure, classify
from .breaker import Breaker, ask_server, forget_connections, register
from .cookie import LastWrite, ReadYourWritesCookie
from .engines import EngineSource, read_source
from .read_only import explain_refusal, note_read_only
from .reads import READS
from .replaced_errors import driver_error_of

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["Replica", "Replicas", "read_replicas", "replica_name"]

logger = logging.getLogger("sqlasession_middleware.replicas")

_OUT_OF_REACH = (Failure.UNAVAILABLE, Failure.LOST)

#: Seconds in which a replica has to accept a connection, unless the application has said it. Then it is passed over.
CONNECT_TIMEOUT = 3


def replica_name(number: int) -> str:
    """The name of a replica in ``app.engines``, and in errors."""
    return f"replicas[{number}]"


def read_replicas(
    replicas: Any, primary: EngineSource, engine_options: Mapping[str, Any] | None, retry: float
) -> list[Replica]:
    """The replicas of an application. They inherit the options of the primary, unless they have their own.

    :param replicas: one of them may be a :class:`Replica`, where the library itself has made it before.
    :param primary: the source of the primary's engine.
    :param engine_options: the options of the primary.
    :param retry: seconds after which a replica that was out of reach is tried again.
    :raises ConfigurationError: if a replica is wrong.
    """
    if isinstance(replicas, str | Mapping) or not isinstance(replicas, Collection):
        raise ConfigurationError("replicas", f"must be a list of databases, got {type(replicas).__name__}.")
    inherited = dict(engine_options or {})
    level = str(inherited.get("isolation_level")).replace("_", " ").upper()
    if level == "SERIALIZABLE" and not server_of_url(primary.url).serializable_on_replicas:
        # A hot standby refuses it (PostgreSQL's "Hot Standby", Caveats), and MySQL would lock the rows that are read.
        inherited["isolation_level"] = "REPEATABLE READ"
    found = []
    for number, given in enumerate(replicas):
        if isinstance(given, Replica):
            found.append(given)
            continue
        if isinstance(given, Engine) and primary.given and given in origins_of(primary.engine):
            problem = "is the Engine of 'bind' itself: give a URL, or another Engine."
            raise ConfigurationError(replica_name(number), problem)
        source = read_source(replica_name(number), given, inherited)
        source.connect_timeout = CONNECT_TIMEOUT
        found.append(Replica(source, retry))
    return found


class Replica:
    """One replica and its state.

    :param retry: seconds after which it is tried again when it was out of reach.
    """

    def __init__(self, source: EngineSource, retry: float) -> None:
        self.source = source
        self._retry = retry
        #: open while it is passed over
        self.breaker = Breaker(1, retry, self._note_outage, self._note_end_of_outage)
        self._is_prepared = False
        # The position that it has replayed. A new connection resets it: a restarted standby may have fallen behind.
        self._replayed = 0
        self._connects = 0

    def prepare(self) -> None:
        """Create its engine and listen to it, once."""
        if not self._is_prepared:
            engine = self.source.engine
            note_read_only(engine)
            event.listen(engine, "connect", self._note_connect)
            event.listen(engine, "handle_error", explain_refusal)
            call_first(engine, explain_refusal)
            if not self.source.given:
                event.listen(engine, "connect", self._make_read_only)
            register(engine, self.breaker)
            self._is_prepared = True

    @property
    def engine(self) -> Engine:
        """Its engine, created at first use."""
        self.prepare()
        return self.source.engine

    @property
    def connects(self) -> int:
        """The number of connections that were made."""
        return self._connects

    def is_engine(self, engine: Engine) -> bool:
        """Whether ``engine`` is this replica's, or was made of it by ``execution_options()``. Does not create one."""
        own = self.source.created
        return own is not None and own in origins_of(engine)

    @property
    def passed_over_until(self) -> float:
        """The end of the time for which it is passed over, by time.monotonic(); 0 if it is not."""
        return self.breaker.open_until

    @passed_over_until.setter
    def passed_over_until(self, moment: float) -> None:
        self.breaker.open_until = moment

    def _note_outage(self, error: BaseException) -> None:
        forget_connections(self.source.created, error)
        said = self.source.without_secrets(str(error))
        logger.warning("The replica %r is out of reach, and is tried again after %s s: %s", self, self._retry, said)

    def _note_end_of_outage(self) -> None:
        logger.warning("The replica %r is reachable again", self)

    def prove(self) -> None:
        """Have it answer a question.

        :raises Exception: an error of SQLAlchemy or of the driver, if it does not.
        """
        with half_of_deadline():  # The primary may answer.
            connection = self.engine.raw_connection()
            ask_server(connection, self.engine.dialect)
            connection.close()

    def has(self, last_write: LastWrite, cookie: ReadYourWritesCookie) -> bool:
        """Whether it has what a client wrote. False if that is not certain.

        :raises Exception: an error of SQLAlchemy or of the driver, if it is out of reach.
        """
        if last_write.position is not None and driver_by_dialect[type(self.engine.dialect)].server.has_positions:
            replayed = self._replayed if self._replayed >= last_write.position else self._ask()
            if replayed is not None:  # A standby that was promoted has no such position.
                if replayed < last_write.position:
                    return False
                if last_write.is_exact:
                    return True
        return not cookie.is_recent(last_write)

    def _ask(self) -> int | None:
        with self.engine.connect() as connection:
            connects = self.connects
            replayed = driver_of(connection).replayed_position(connection)
        if replayed is not None and connects == self.connects:
            self._replayed = replayed
        return replayed

    def _note_connect(self, driver_connection: Any, record: Any) -> None:
        self._connects += 1
        self._replayed = 0

    def _make_read_only(self, driver_connection: Any, record: Any) -> None:
        driver_of(self.engine).make_read_only(driver_connection)

    def __repr__(self) -> str:
        return repr(self.source)


class Replicas:
    """The replicas of one application.

    :param members: each of them.
    :param cookie: tells what a client has written.
    """

    def __init__(self, members: Sequence[Replica], cookie: ReadYourWritesCookie) -> None:
        self.members = members
        self.cookie = cookie

    def has(self, bind: Connection | Engine) -> bool:
        """Whether a connection or engine is one of theirs. A replica here may be the primary of another application."""
        engine = bind.engine
        return any(replica.is_engine(engine) for replica in self.members)

    @property
    def engines(self) -> list[Engine]:
        """Their engines."""
        return [replica.engine for replica in self.members]

    @property
    def sources(self) -> list[EngineSource]:
        """The sources of their engines."""
        return [replica.source for replica in self.members]

    def connect(self, session: Session, last_write: LastWrite | None, preferred: Replica | None) -> Replica | None:
        """Connect a Session to a replica that has the client's own writes.

        :param preferred: the replica from which the request has read before.
        :returns: None if only the primary can be used.
        """
        begin_unit()
        if remaining() == 0:
            return None  # Nobody sends anything any more, which says nothing of the replicas.
        for replica in self._candidates(preferred):
            breaker = replica.breaker
            if not breaker.open_until:
                if self._try_to_connect(session, replica, last_write):
                    return replica
            elif breaker.begin_try():
                try:
                    if self._try_to_connect(session, replica, last_write, is_open=True):
                        breaker.close()
                        return replica
                finally:
                    breaker.end_try()
        return None

    def _try_to_connect(
        self, session: Session, replica: Replica, last_write: LastWrite | None, is_open: bool = False
    ) -> bool:
        """Connect a Session to one replica, unless that is out of reach or behind the client's last write.

        :param is_open: whether the replica's breaker is open, so that it is to prove that it is back.
        """
        scope = current.get(None)
        known_failure = scope.failure if isinstance(scope, Scope) else None
        try:
            if is_open:
                replica.prove()
            if last_write is not None and not replica.has(last_write, self.cookie):
                return False
            connects = replica.connects
            session.connection(bind_arguments={"bind": replica.engine, READS: True})
            # A standby that has been restarted since may be behind what it had.
            return last_write is None or connects == replica.connects or replica.has(last_write, self.cookie)
        except Exception as error:  # The driver's own errors as well: Replica.has() asks the driver directly.
            failure = classify(error, connected=False) or classify(driver_error_of(error), connected=False)
            if failure not in _OUT_OF_REACH:
                raise
            if isinstance(scope, Scope):
                scope.failure = known_failure  # The request goes on with another server.
            replica.breaker.fail(driver_error_of(error))
            return False

    def _candidates(self, preferred: Replica | None) -> list[Replica]:
        """The replicas: the preferred one, then the others in random order."""
        order = random.sample(self.members, len(self.members))
        if preferred is not None:
            order.sort(key=lambda replica: replica is not preferred)
        return order
