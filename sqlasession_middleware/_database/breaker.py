"""Breakers: who needs a database that is out of reach is told so at once, and one request at a time tries it again.

A breaker opens after several failures in a row to reach its engine. From then on nobody waits for that engine, for so
many seconds. Then one request is let through; its success closes the breaker, and its failure begins another period.
A replica has one that opens at the first failure, and is passed over while it is open.

What counts is that the server cannot be reached: a connection that was not made, and a statement that was cut at its
deadline because the server did not even answer the request to cancel it. A full pool, a slow query and a connection
that is lost do not count: what comes of a lost connection shows when the next one is made.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Literal
from weakref import WeakKeyDictionary, WeakSet, ref

from sqlalchemy import URL, Engine, event
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import Pool

from .._dependencies import outdate_pool, root_engine
from .._drivers.registry import UNKNOWN, driver_of, driver_that_made
from ..errors import BreakerOpenError, DeadlineError
from ..failures import Failure, classify
from .forks import after_fork, fork_safe_lock
from .observers import engines_of, note_failure
from .read_only import is_read_only
from .replaced_errors import causes_of
from .secrets import shown_url, without_secrets

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect
    from sqlalchemy.pool import PoolProxiedConnection

__all__ = [
    "Breaker",
    "ask_server",
    "breaker_of",
    "breaker_state",
    "forget_connections",
    "guard",
    "note_silence",
    "place_of_server",
    "register",
    "unguarded_pool",
]

logger = logging.getLogger("sqlasession_middleware.unavailable")

State = Literal["closed", "open", "half open"]

#: A clock that nobody sets, but for tests.
now = time.monotonic

#: Seconds after which another request may try, although the one that tries has not ended: without a deadline, a driver
#: may wait for ever.
LONGEST_TRY: Final = 30.0

#: The attribute of an error that leads to the breaker that has counted it.
_COUNTED: Final = "sqlasession_breaker"

_lock = fork_safe_lock()
_breakers: WeakSet[Breaker] = WeakSet()
#: By engine, weakly: a breaker may lead to its engine.
_by_engine: WeakKeyDictionary[Engine, ref[Breaker]] = WeakKeyDictionary()


class Breaker:
    """Whether an engine is worth waiting for.

    :param failures: how many in a row open it.
    :param seconds: how long it stays open.
    :param on_open: called with the cause when it opens, and not again until it was closed.
    :param on_close: called when it closes.
    """

    #: whose breaker it is
    engines: WeakSet[Engine]
    #: whether it is that of a server, and not of one database there
    is_of_server = False

    def __init__(
        self, failures: int, seconds: float, on_open: Callable[[BaseException], None], on_close: Callable[[], None]
    ) -> None:
        self._threshold = failures
        self._seconds = seconds
        self._on_open = on_open
        self._on_close = on_close
        self._begin()
        _breakers.add(self)

    def _begin(self) -> None:
        #: until when nobody is let through, by :data:`now`; 0 if it is closed
        self.open_until = 0.0
        self._failures = 0
        self._is_trying = False
        self._told: WeakSet[Any] = WeakSet()

    @property
    def state(self) -> State:
        """What to say of it. It is half open while one request tries, and when the next one will."""
        if not self.open_until:
            return "closed"
        return "half open" if self._is_trying or self.open_until <= now() else "open"

    def begin_try(self) -> bool:
        """Whether the caller may try an engine whose breaker is open. Then it has to call :meth:`end_try`."""
        with _lock:
            at = now()
            if at < self.open_until:
                return False
            # The others go on without it: the server may not answer.
            self.open_until = at + max(self._seconds, LONGEST_TRY)
            self._is_trying = True
            return True

    def end_try(self) -> None:
        """End a try. Unless the breaker was closed, the next one comes later."""
        with _lock:
            self._is_trying = False
            if self.open_until:
                self.open_until = now() + self._seconds

    def fail(self, error: BaseException) -> None:
        """Count a failure."""
        with contextlib.suppress(Exception):  # An error may be of any class.
            setattr(error, _COUNTED, self)
        with _lock:
            self._failures += 1
            if self.open_until or self._failures < self._threshold:
                return
            self.open_until = now() + self._seconds
        self._on_open(error)

    def close(self) -> None:
        """Close it: the engine can be reached."""
        with _lock:
            was_open = self.open_until
            self._begin()
        if was_open:
            self._on_close()

    def note_answer(self) -> None:
        """Note that the server answers. An open breaker is closed by a try only: this may have been sent long ago."""
        if self._failures or self._told:
            with _lock:
                if not self.open_until:
                    self._begin()

    def tells(self, who: object) -> bool:
        """Whether somebody has yet to tell of this outage in full. True once."""
        with _lock:
            is_first = who not in self._told
            self._told.add(who)
        return is_first

    def refusal(self, name: str) -> BreakerOpenError:
        """The error of who is not let through."""
        error = BreakerOpenError(name, max(self.open_until - now(), 0.0))
        setattr(error, _COUNTED, self)
        return error


class _GuardedPool(Pool):
    """Hands out connections unless the breaker is open. A base of the class that a guarded pool gets."""

    breaker: Breaker
    database: str
    dialect: Dialect

    def connect(self) -> Any:
        breaker = self.breaker
        if breaker.open_until:
            return self._try(breaker)
        try:
            return super().connect()
        except Exception as error:
            if self._counts(error):
                breaker.fail(error)
            raise

    def _try(self, breaker: Breaker) -> Any:
        if not breaker.begin_try():
            error = breaker.refusal(self.database)
            note_failure(Failure.UNAVAILABLE, error)
            raise error
        try:
            connection = super().connect()
            ask_server(connection, self.dialect)
            breaker.close()
            return connection
        except Exception as error:
            if self._counts(error):
                breaker.fail(error)
            elif driver_that_made(error) is not UNKNOWN:
                breaker.close()  # A refused login, for example: that is the server's answer.
            raise
        finally:
            breaker.end_try()

    def _counts(self, error: BaseException) -> bool:
        if self.breaker.is_of_server and driver_of(self.dialect).is_at_its_own_limit(error):
            return False  # The server has answered, and the other databases there have room.
        return shows_outage(error)


def ask_server(connection: PoolProxiedConnection, dialect: Dialect) -> None:
    """Have the server itself answer who tries it: what is in front of it may accept connections in its place.

    :param connection: a new one, which is lost if nothing answers.
    """
    try:
        driver_of(dialect).ping(dialect, connection.dbapi_connection)
    except BaseException:
        connection.invalidate()
        connection.close()
        raise


def guard(owner: Any, failures: int, seconds: float) -> None:
    """Have a breaker for each engine of an application that has none. Replicas have one of their own.

    :param owner: may have ``breakers``, by their servers, which several applications share.
    """
    shared: dict[str, Breaker] | None = getattr(owner, "breakers", None)
    for engine in (root_engine(engine) for engine in engines_of(owner) if not is_read_only(engine)):
        if _registered(engine) is None:
            with _lock:
                if _registered(engine) is None:  # pragma: no branch  # another thread may have been faster
                    _guard(engine, failures, seconds, shared)


def _guard(engine: Engine, failures: int, seconds: float, shared: dict[str, Breaker] | None) -> None:
    url, name = engine.url, shown_url(engine.url)
    if shared is None or not driver_of(engine).server.is_networked:
        breaker = _make_breaker(name, url, failures, seconds)
    else:
        # One server has the databases of many tenants, and it is the server that is out of reach.
        name = _name_of_server(url)
        place = place_of_server(url)
        if place not in shared:
            shared[place] = _make_breaker(name, url, failures, seconds)
            shared[place].is_of_server = True
        breaker = shared[place]
    breaker.engines.add(engine)
    register(engine, breaker)

    def note_answer(driver_connection: Any, record: object) -> None:
        if driver_connection is not None:
            breaker.note_answer()

    # A new connection is no answer of the server, if there is a pooler in front of it.
    event.listen(engine, "checkin", note_answer)
    _guard_pool(engine.pool, breaker, name, engine.dialect)


def _name_of_server(url: URL) -> str:
    return shown_url(URL.create(url.drivername, host=url.host, port=url.port))


def place_of_server(url: URL) -> str:
    """What the URLs of all databases of one server have in common, without anything secret."""
    hosts = sorted(each for each in url.normalized_query.items() if each[0] in ("host", "port"))
    return f"{_name_of_server(url)}?{hosts}"


def _make_breaker(name: str, url: URL, failures: int, seconds: float) -> Breaker:
    engines: WeakSet[Engine] = WeakSet()

    def say_open(error: BaseException) -> None:
        for engine in list(engines):
            forget_connections(engine, error)
        said = without_secrets(" ".join(str(error).split()), url, {})
        logger.warning(
            "The database %s is out of reach: whoever needs it is told so at once for %g s, then one request tries it"
            " again: %s",
            name,
            seconds,
            said,
        )

    def say_closed() -> None:
        logger.warning("The database %s is reachable again", name)

    breaker = Breaker(failures, seconds, say_open, say_closed)
    breaker.engines = engines
    return breaker


def _guard_pool(pool: Pool, breaker: Breaker, name: str, dialect: Dialect) -> None:
    """Have a pool, and those that ``dispose()`` puts in its place, heed a breaker."""
    kind = type(pool)
    # A class, because a pool that is made anew has nothing else of this one. Its name is part of the logger's.
    names = {"breaker": breaker, "database": name, "dialect": dialect, "__module__": kind.__module__}
    pool.__class__ = type(kind.__name__, (_GuardedPool, kind), names)


def unguarded_pool(engine: Engine) -> Pool:
    """Another pool of the same kind, for a connection that is no request's: it neither tries nor waits its turn."""
    before = engine.pool
    pool = type(before).recreate(before)  # Without what times the waits for it: see wrap_connect().
    if isinstance(pool, _GuardedPool):
        _, pool.__class__ = type(pool).__bases__
    return pool


def forget_connections(engine: Engine | None, error: BaseException) -> None:
    """Have the connections replaced that were made before an outage, each when it is checked out next.

    They may lead nowhere without anything to see at their sockets. And who tries the server has to connect to it.
    """
    if engine is not None and shows_outage(error):
        outdate_pool(engine.pool)


def register(engine: Engine, breaker: Breaker) -> None:
    """Have an engine's breaker found by :func:`breaker_state` and :func:`note_silence`, unless it has one."""
    if _registered(engine) is None:
        _by_engine[root_engine(engine)] = ref(breaker)


def _registered(engine: Engine | None) -> Breaker | None:
    found = None if engine is None else _by_engine.get(root_engine(engine))
    return None if found is None else found()


def shows_outage(error: BaseException) -> bool:
    """Whether an error of who wanted a connection means that the server cannot be reached."""
    if isinstance(error, DeadlineError):
        return error.is_silent
    if isinstance(error, PoolTimeoutError | BreakerOpenError):
        return False
    return classify(error, connected=False) is Failure.UNAVAILABLE


def note_silence(engine: Engine | None, error: DeadlineError) -> None:
    """Count a statement that was cut because the server did not answer."""
    breaker = _registered(engine)
    if breaker is not None:
        breaker.fail(error)


def breaker_of(error: BaseException, engine: Engine | None) -> Breaker | None:
    """The breaker that has counted an error, or else the engine's."""
    for each in causes_of(error):
        found = getattr(each, _COUNTED, None)
        if isinstance(found, Breaker):
            return found
    return _registered(engine)


def breaker_state(engine: Engine) -> State | None:
    """The state of an engine's breaker; None if it has none.

    It is ``"half open"`` while one request tries the database, and when the next one is going to.
    """
    breaker = _registered(engine)
    return None if breaker is None else breaker.state


@after_fork
def _begin_anew() -> None:  # pragma: no cover  # in a script that forks
    """A child finds out by itself: nobody there may be trying."""
    for breaker in list(_breakers):
        breaker._begin()
