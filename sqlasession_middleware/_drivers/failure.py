"""What an error of a database means for the request: the values of the tables of error codes."""

from __future__ import annotations

from enum import Enum

__all__ = ["Failure"]


class Failure(Enum):
    """What happened to the transaction."""

    # The public module: pickles name it, and the documentation.
    __module__ = "sqlasession_middleware.failures"

    #: The database has given it up for a reason that may not recur: a serialization failure, a deadlock, a lock
    #: timeout, stale data. It needs a ROLLBACK before the next attempt: some databases undo only the statement.
    TRANSIENT = "transient"
    #: The connection was lost. A repetition on a new connection may succeed; else the database is out of reach.
    LOST = "lost"
    #: No database can do it at the moment: connection refused, server starting up, too many connections, pool
    #: exhausted, host unknown, or a write on a read-only server. Nothing was committed.
    UNAVAILABLE = "unavailable"
    #: COMMIT was sent and it is not known whether it took effect, or it did in part. Never to be repeated.
    UNKNOWN = "unknown"
