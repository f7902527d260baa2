"""The record of one request: what it sent to databases, and what it waited for.

The listeners of :mod:`.listeners` fill it while the request runs. Everything is kept as it comes, since grouping and
formatting are for who looks. All times are of :func:`time.perf_counter`, in seconds.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.engine.interfaces import Compiled

    from .._scope.protocols import ManagedTransaction
    from .stacks import Stack

__all__ = ["FLUSH", "RECORD", "End", "Hold", "Outcome", "Record", "Statement", "Wait"]

#: The environ key that leads to the record of a request.
RECORD: Final = "sqlasession.record"

#: What :attr:`Statement.relationship` is where a flush loads what the database has set.
FLUSH: Final = "(flush)"

_READ: Final = re.compile(r"\s*\(*\s*(SELECT|WITH)\b", re.IGNORECASE)
_LITERALS: Final = re.compile(r"'(?:[^']|'')*'|\b\d+(?:\.\d+)?\b")

#: After so many statements of a request they are counted only.
STATEMENTS_AT_MOST: Final = 500

Outcome = Literal[
    "no transaction", "committed", "rolled back", "vetoed", "doomed", "outcome unknown", "only read", "failed"
]


class Statement:
    """One statement that was sent."""

    __slots__ = (
        "attempt",
        "begin",
        "compiled",
        "end",
        "engine",
        "error",
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
    #: the connection that it was sent on, while it was out of its pool
    hold: Hold | None
    #: "Author.books", if the ORM has sent it to load that of one object; "Author", if it was to load attributes of one
    #: that are deferred or expired; :data:`FLUSH`, if a flush has sent it for one of its rows
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
        """How long the driver took."""
        return max(self.end - self.begin, 0.0)


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
    """A COMMIT or ROLLBACK of a connection, or the first phase of a COMMIT in two."""

    kind: Literal["commit", "rollback", "prepare"]
    engine: str
    attempt: int
    begin: float
    end: float
    error: BaseException | None


class Record:
    """What one request, or one block of a test, has done.

    :param environ: the request's; nothing of it is kept but the method, the path and the attempts' number.
    """

    def __init__(self, environ: dict[str, Any] | None = None) -> None:
        self.method: str = "" if environ is None else environ.get("REQUEST_METHOD", "")
        self.path: str = "" if environ is None else environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
        #: when it began, in seconds since the epoch
        self.at = time.time()
        self.begin = time.perf_counter()
        #: 0 while the request runs
        self.end = 0.0
        #: the response's, once it is known
        self.status = ""
        self.statements: list[Statement] = []
        #: how many there were; the list has no more than :attr:`most`
        self.count = 0
        self.most = STATEMENTS_AT_MOST
        #: seconds of all statements
        self.seconds = 0.0
        self.waits: list[Wait] = []
        self.holds: list[Hold] = []
        self.ends: list[End] = []
        #: how many objects of each class were loaded
        self.objects: Counter[type] = Counter()
        #: those of TransactionMiddlewares, one for each attempt that has sent something
        self.transactions: list[ManagedTransaction] = []

    def add(self, statement: Statement) -> None:
        """Note a statement that begins."""
        self.count += 1
        if self.count <= self.most:
            self.statements.append(statement)

    def finish(self, status: str) -> None:
        """Note the end of the request."""
        self.end = time.perf_counter()
        self.status = status

    @property
    def waited(self) -> float:
        """Seconds that the request has waited for pools."""
        return sum(each.end - each.begin for each in self.waits if each.kind == "pool")

    @property
    def held(self) -> float:
        """Seconds that the request has held connections, of all of them together."""
        until = self.end or time.perf_counter()
        return sum((each.end or until) - each.begin for each in self.holds)

    @property
    def committing(self) -> float:
        """Seconds of all COMMITs."""
        return sum(each.end - each.begin for each in self.ends if each.kind != "rollback")

    @property
    def attempts(self) -> int:
        """How many attempts have done something."""
        return max((each.attempt for each in self._events()), default=1)

    def _events(self) -> Iterator[Any]:
        yield from self.statements
        yield from self.waits
        yield from self.holds
        yield from self.ends

    @property
    def outcome(self) -> Outcome:
        """How the transaction of the last attempt has ended."""
        last = self.transactions[-1] if self.transactions else None
        if any(each.kind != "rollback" and each.error is not None for each in self.ends[-1:]):
            return "outcome unknown" if getattr(last, "is_outcome_unknown", False) else "failed"
        if last is not None:
            if last.doomed:
                return "doomed"
            if getattr(last, "vetoed", False):
                return "vetoed"
        attempt = self.attempts
        kinds = {each.kind for each in self.ends if each.attempt == attempt and each.error is None}
        if "commit" in kinds:
            return "committed"
        if "rollback" in kinds:
            return "rolled back"
        return "only read" if self.count else "no transaction"
