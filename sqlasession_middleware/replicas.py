"""Replicas: which of them a session reads from, and what is known of each.

A replica that is out of reach is passed over, and tried again later by one request at a time. How far a standby of
PostgreSQL has replayed the primary's log is asked only for a client that has written, and not again once it is known
to have got far enough.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine, event
from sqlalchemy.orm import Session

from .drivers import make_read_only, replayed_position
from .engines import EngineSource, read_source
from .errors import ConfigurationError
from .failures import Failure, classify
from .marks import Mark, Marker
from .watch import explain_refusal, forgotten, read_only

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["Replica", "Replicas", "read_replicas"]

logger = logging.getLogger(__name__)

_OUT_OF_REACH = (Failure.UNAVAILABLE, Failure.LOST)

#: How long a replica may take to accept a connection before it is passed over, in seconds, where the URL does not say.
CONNECT_TIMEOUT = 3
_HAVE_CONNECT_TIMEOUT = ("psycopg", "psycopg2", "pymysql", "mysqldb", "mariadbconnector")


def read_replicas(replicas: Any, primary: EngineSource, engine_options: Mapping[str, Any] | None) -> list[EngineSource]:
    """The sources of the replicas' engines, which have the primary's options where they have none of their own.

    :param primary: and ``engine_options``, its options.
    :raises ConfigurationError: if one of them is wrong.
    """
    if isinstance(replicas, str | Mapping) or not isinstance(replicas, Collection):
        raise ConfigurationError("replicas", f"must be a list of databases, got {type(replicas).__name__}.")
    inherited = dict(engine_options or {})
    level = str(inherited.get("isolation_level")).replace("_", " ").upper()
    if level == "SERIALIZABLE" and primary.url.get_backend_name() != "sqlite":
        # A hot standby refuses it (PostgreSQL's "Hot Standby", Caveats), and MySQL would lock what is read.
        inherited["isolation_level"] = "REPEATABLE READ"
    sources = []
    for number, given in enumerate(replicas):
        if isinstance(given, Engine) and primary.given and given is primary.engine:
            problem = "is the Engine of 'bind' itself: give a URL, or another Engine."
            raise ConfigurationError(f"replicas[{number}]", problem)
        sources.append(read_source(f"replicas[{number}]", given, inherited))
    return sources


class Replica:
    """One replica, and what is known of it."""

    def __init__(self, source: EngineSource) -> None:
        self.source = source
        #: its engine, if that was made already
        self.made: Engine | None = None
        #: until when it is passed over, by time.monotonic()
        self.passed_over_until = 0.0
        # How far it has replayed, and since which connection: a standby that was restarted may have fallen behind.
        self._replayed = 0
        #: how many connections were made
        self.connects = 0

    @property
    def engine(self) -> Engine:
        """Its engine, made at first use."""
        if self.made is None:
            engine = self.source.engine
            read_only.add(engine)
            event.listen(engine, "connect", self._note_connect)
            event.listen(engine, "handle_error", explain_refusal)
            if not self.source.given:
                event.listen(engine, "connect", self._make_read_only)
                event.listen(engine, "do_connect", _limit_connecting)
            self.made = engine
        return self.made

    def has(self, mark: Mark, marker: Marker) -> bool:
        """Whether it surely has what a client wrote.

        :raises Exception: SQLAlchemy's or the driver's, if it is out of reach.
        """
        if mark.position is not None and self.engine.dialect.name == "postgresql":
            replayed = self._replayed if self._replayed >= mark.position else self._ask()
            if replayed is not None:  # It is a standby; after its promotion it would tell nothing.
                if replayed < mark.position:
                    return False
                if mark.is_exact:
                    return True
        return not marker.is_recent(mark)

    def _ask(self) -> int | None:
        with self.engine.connect() as connection:
            connects = self.connects
            replayed = replayed_position(connection)
        if replayed is not None and connects == self.connects:
            self._replayed = replayed
        return replayed

    def _note_connect(self, driver_connection: Any, record: Any) -> None:
        self.connects += 1
        self._replayed = 0

    def _make_read_only(self, driver_connection: Any, record: Any) -> None:
        make_read_only(driver_connection, self.engine.dialect.name)

    def __repr__(self) -> str:
        return repr(self.source)


class Replicas:
    """The replicas of one application.

    :param retry: seconds after which a replica that was out of reach is tried again.
    """

    def __init__(self, sources: Sequence[EngineSource], marker: Marker, retry: float) -> None:
        self._replicas = [Replica(source) for source in sources]
        self._retry = retry
        self.marker = marker

    def has(self, bind: Connection | Engine) -> bool:
        """Whether a connection or engine is one of theirs. What is a replica here may be a primary elsewhere."""
        engine = bind.engine
        return any(replica.made is engine for replica in self._replicas)

    @property
    def engines(self) -> list[Engine]:
        """Their engines."""
        return [replica.engine for replica in self._replicas]

    @property
    def sources(self) -> list[EngineSource]:
        """What their engines are made from."""
        return [replica.source for replica in self._replicas]

    def connect(self, opened: Session, mark: Mark | None, preferred: Replica | None) -> Replica | None:
        """Connect a Session to a replica, which the client's own writes have reached.

        :param preferred: where the request has read before.
        :returns: None if the primary has to serve.
        """
        for replica in self._candidates(preferred):
            with forgotten() as forget:
                try:
                    if mark is not None and not replica.has(mark, self.marker):
                        continue
                    connects = replica.connects
                    opened.connection(bind_arguments={"bind": replica.engine})
                    if mark is not None and connects != replica.connects and not replica.has(mark, self.marker):
                        continue  # It has been restarted since, and is behind what it had.
                except Exception as error:  # The driver's own as well, where it was asked by itself.
                    if classify(error, connected=False) not in _OUT_OF_REACH:
                        raise
                    forget()
                    self._pass_over(replica, getattr(error, "orig", None) or error)
                    continue
            if replica.passed_over_until:
                replica.passed_over_until = 0.0
                logger.warning("The replica %r is back", replica)
            return replica
        return None

    def _candidates(self, preferred: Replica | None) -> Iterator[Replica]:
        """Those that are to be tried, in a random order, but for the preferred one."""
        order = random.sample(self._replicas, len(self._replicas))
        if preferred is not None:
            order.sort(key=lambda replica: replica is not preferred)
        for replica in order:
            if not replica.passed_over_until:
                yield replica
            elif replica.passed_over_until <= (now := time.monotonic()):
                # Others need not wait with this one for a server that may not answer.
                replica.passed_over_until = now + self._retry
                yield replica

    def _pass_over(self, replica: Replica, error: BaseException) -> None:
        known = replica.passed_over_until
        replica.passed_over_until = time.monotonic() + self._retry
        if not known:
            said = replica.source.without_secrets(str(error))
            logger.warning(
                "The replica %r is out of reach, and is tried again after %s s: %s", replica, self._retry, said
            )


def _limit_connecting(dialect: Any, record: Any, arguments: list[Any], options: dict[str, Any]) -> None:
    if dialect.driver in _HAVE_CONNECT_TIMEOUT:
        options.setdefault("connect_timeout", CONNECT_TIMEOUT)
