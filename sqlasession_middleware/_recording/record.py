"""The record of one request: what it sent to databases, and what it waited for.

The listeners of :mod:`.listeners` fill it while the request runs. Everything is kept as it comes, since grouping and
formatting are for who looks. All times are of :func:`time.perf_counter`, in seconds.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import Compiled

    from .._scope.protocols import ManagedTransaction
    from .stacks import Stack

__all__ = ["EAGER", "FLUSH", "RECORD", "TENANT", "End", "Hold", "Outcome", "Record", "Statement", "Wait"]

#: The environ key that leads to the record of a request.
RECORD: Final = "sqlasession.record"

#: The environ key with the name of the tenant whose request it is.
TENANT: Final = "sqlasession.tenant"

#: What :attr:`Statement.relationship` is where a flush loads what the database has set.
FLUSH: Final = "(flush)"

#: The same where the ORM loads a relationship of many objects at once. It does so in batches.
EAGER: Final = "(eager)"

_READ: Final = re.compile(r"\s*\(*\s*(SELECT|WITH)\b", re.IGNORECASE)
_LITERALS: Final = re.compile(r"'(?:[^']|'')*'|\b\d+(?:\.\d+)?\b")

#: After so many statements of a request they are counted only, and likewise what else there is in lists.
AT_MOST: Final = 500

Outcome = Literal["no transaction", "only read", "committed", "rolled back", "vetoed", "doomed", "outcome unknown"]


class Statement:
    """One statement that was sent."""

    __slots__ = (
        "attempt",
        "begin",
        "compiled",
        "end",
        "engine",
        "error",
        "fetched",
        "hold",
        "is_many",
        "parameters",
        "relationship",
        "rows",
        "sql",
        "stack",
    )

    #: the number of the attempt, from 1
    attempt: int
    begin: float
    #: when the driver returned, or raised; 0 while it runs
    end: float
    #: the name of its engine
    engine: str
    #: the text that the driver got
    sql: str
    #: what SQLAlchemy made the statement of; None for a text of the driver's
    compiled: Compiled | None
    parameters: Any
    is_many: bool
    #: how many rows it has found or changed, as the driver tells; -1 if it does not
    rows: int
    #: what the driver has raised
    error: BaseException | None
    #: seconds that the driver took to fetch its rows, so far: see :mod:`.fetching`
    fetched: float
    #: the connection that it was sent on, while it was out of its pool
    hold: Hold | None
    #: "Author.books", if the ORM has sent it to load that of one object; "Author", if it was to load attributes of one
    #: that are deferred or expired; :data:`FLUSH`, if a flush has sent it for one of its rows; :data:`EAGER`, if it was
    #: to load a relationship of many objects
    relationship: str | None
    stack: Stack

    @property
    def fingerprint(self) -> str:
        """The same for statements that differ in their values only, or in how many values there are."""
        return _LITERALS.sub("?", self.sql) if self.compiled is None else self.compiled.string

    @property
    def is_read(self) -> bool:
        """Whether the application has asked for rows: not a flush, which may do so for each of its own."""
        return self.relationship != FLUSH and _READ.match(self.sql) is not None

    @property
    def seconds(self) -> float:
        """How long the driver took to execute it, without :attr:`fetched`."""
        return max(self.end - self.begin, 0.0)

    @property
    def total(self) -> float:
        """How long the driver took with all of it, in seconds."""
        return self.seconds + self.fetched


class Hold:
    """A connection from its checkout to its return."""

    __slots__ = ("attempt", "begin", "connection", "end", "engine")

    def __init__(self, engine: str, connection: int, attempt: int, begin: float) -> None:
        self.engine = engine
        #: the number of the connection in its pool, from 1
        self.connection = connection
        self.attempt = attempt
        self.begin = begin
        #: 0 while it is out
        self.end = 0.0


class Wait(NamedTuple):
    """A wait for a connection: for the pool to have one free, or for the server to accept one."""

    kind: Literal["pool", "connect"]
    engine: str
    attempt: int
    begin: float
    end: float


class End(NamedTuple):
    """A COMMIT or ROLLBACK of a connection. Those of two phases are statements.

    :param is_sent: False if the driver knew that there was nothing to end.
    """

    kind: Literal["commit", "rollback"]
    engine: str
    attempt: int
    begin: float
    end: float
    error: BaseException | None
    is_outcome_unknown: bool
    is_sent: bool


class Record:
    """What one request, or one block of a test, has done.

    :param environ: the request's; nothing of it is kept but the method, the path, the tenant and the attempts' number.
    """

    def __init__(self, environ: dict[str, Any] | None = None) -> None:
        self.method: str = "" if environ is None else environ.get("REQUEST_METHOD", "")
        self.path: str = "" if environ is None else environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
        #: whose request it is, behind a TenantsMiddleware
        self.tenant: str | None = None if environ is None else environ.get(TENANT)
        #: when it began, in seconds since the epoch
        self.at = time.time()
        self.begin = time.perf_counter()
        #: 0 while the request runs
        self.end = 0.0
        #: the response's, once it is known
        self.status = ""
        self.statements: list[Statement] = []
        #: how many there were; no list has more than :attr:`most`
        self.count = 0
        self.most = AT_MOST
        #: seconds of all statements, until they were executed
        self.seconds = 0.0
        #: seconds of fetching their rows
        self.fetched = 0.0
        #: how often it has waited for a server to answer, without those by which a connection is made: a statement that
        #: is sent together with its BEGIN is one. SQLite has no server.
        self.trips = 0
        #: seconds of all waits for pools
        self.waited = 0.0
        #: seconds of all COMMITs
        self.committing = 0.0
        self.waits: list[Wait] = []
        self.holds: list[Hold] = []
        self.ends: list[End] = []
        self._held = 0.0
        self._open: list[Hold] = []
        #: how many objects of each class were loaded
        self.objects: dict[type, int] = {}
        #: the number of the last attempt that has done something
        self.last_attempt = 1
        #: those of TransactionMiddlewares, one for each attempt that has sent something
        self.transactions: list[ManagedTransaction] = []

    def add(self, statement: Statement) -> None:
        """Note a statement that begins."""
        self.count += 1
        if self.count <= self.most:
            self.statements.append(statement)

    def add_wait(self, wait: Wait) -> None:
        """Note a wait for a connection."""
        if wait.kind == "pool":
            self.waited += wait.end - wait.begin
        if len(self.waits) < self.most:
            self.waits.append(wait)

    def begin_hold(self, hold: Hold) -> None:
        """Note that a connection has left its pool."""
        self._open.append(hold)
        if len(self.holds) < self.most:
            self.holds.append(hold)

    def end_hold(self, hold: Hold) -> None:
        """Note that it is back there."""
        self._held += hold.end - hold.begin
        self._open.remove(hold)

    def add_end(self, end: End) -> None:
        """Note a COMMIT or ROLLBACK. The last one is always there, since it is the outcome."""
        if end.kind == "commit":
            self.committing += end.end - end.begin
        if len(self.ends) >= self.most:
            del self.ends[-1]
        self.ends.append(end)

    def finish(self, status: str) -> None:
        """Note the end of the request."""
        self.end = time.perf_counter()
        self.status = status

    @property
    def held(self) -> float:
        """Seconds that the request has held connections, of all of them together."""
        until = self.end or time.perf_counter()
        return self._held + sum(until - each.begin for each in self._open)

    @property
    def outcome(self) -> Outcome:
        """How the transaction of the last attempt has ended."""
        last = self.transactions[-1] if self.transactions else None
        if any(each.is_outcome_unknown for each in self.ends):
            return "outcome unknown"
        if last is not None:
            if last.doomed:
                return "doomed"
            if getattr(last, "vetoed", False):
                return "vetoed"
        kinds = {each.kind for each in self.ends if each.attempt == self.last_attempt and each.error is None}
        if "commit" in kinds:
            return "committed"
        if any(not each.is_read for each in self.statements if each.attempt == self.last_attempt):
            return "rolled back"
        return "only read" if self.count else "no transaction"
