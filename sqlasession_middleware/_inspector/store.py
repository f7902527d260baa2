"""Requests of several processes, in a file of SQLite.

Nothing of it passes an engine that is recorded. A file that is damaged, or was deleted, is made anew: what is in it is
of use for minutes. A request that cannot be stored is dropped, and the application does not notice.
"""

from __future__ import annotations

import logging
import os
import secrets
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager, suppress
from json import JSONDecodeError, dumps, loads
from pathlib import Path
from typing import Any, Final, TypeVar

from ..errors import ConfigurationError, shown
from .fit import fitting
from .kept import Kept, Original, summary

__all__ = ["Store"]

Result = TypeVar("Result")

logger = logging.getLogger("sqlasession_middleware.inspector")

#: How many seconds a process waits for the others.
_PATIENCE: Final = 2.0
# What is long comes last, so that the pages that it is on are not read for the rest.
_TABLE: Final = """
    CREATE TABLE IF NOT EXISTS requests (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        size INTEGER NOT NULL,
        summary TEXT NOT NULL,
        data TEXT NOT NULL,
        originals TEXT NOT NULL
    )
"""
#: Those that are too many, and those that are before the last ones that take as much memory as is admitted.
_FORGET: Final = """
    DELETE FROM requests WHERE number IN (
        SELECT number FROM (
            SELECT number, row_number() OVER newest AS place, sum(size) OVER newest AS total
            FROM requests WINDOW newest AS (ORDER BY number DESC)
        ) WHERE place > ? OR (total > ? AND place > 1)
    )
"""
#: Held while any store has its file open. SQLite keeps the locks of a process, and the shared memory of a WAL, by file:
#: with a connection that is open in a fork, the child would think that it has them ("How To Corrupt An SQLite Database
#: File", 2.6). So connections are short, and a fork waits for their end.
_using: Final = threading.RLock()
if hasattr(os, "register_at_fork"):  # pragma: no branch
    os.register_at_fork(before=_using.acquire, after_in_parent=_using.release, after_in_child=_using.release)

_PLAIN: Final = (str, int, float, bool, type(None))


class Store:
    """Keeps requests until there are too many of them, or they take too much room.

    :param folder: where the file is; it is made, for the user of this process alone.
    :param requests: how many are kept.
    :param most: how many bytes they may take, about.
    :raises ConfigurationError: if the folder cannot be used, or others can read it.
    """

    def __init__(self, folder: Any, requests: int, most: int) -> None:
        self._folder = _prepare(folder)
        self._file = self._folder / "requests.sqlite3"
        self._requests = requests
        self._most = most
        self._has_complained = False

    def token(self) -> str:
        """The token that all processes share: that of the first one."""
        path = self._folder / "token"
        descriptor, own = tempfile.mkstemp(dir=self._folder)  # With the mode 0600.
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(24))
        # Nobody sees a file that is not complete.
        with suppress(FileExistsError):
            os.link(own, path)
        os.unlink(own)
        return path.read_text("ascii")

    def add(self, kept: Kept) -> None:
        """Keep a request, and forget the oldest ones."""
        kept = fitting(kept, self._most)
        storable = {number: each for number, each in kept.originals.items() if _is_storable(kept, number)}
        originals = dumps({number: each[:4] for number, each in storable.items()})
        data = dumps(_explained(kept, storable))
        row = kept.data["id"], dumps(summary(kept.data)), data, originals, len(data) + len(originals)

        def insert(connection: sqlite3.Connection) -> None:
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                columns = "id, summary, data, originals, size"
                connection.execute(f"INSERT INTO requests ({columns}) VALUES (?, ?, ?, ?, ?)", row)
                connection.execute(_FORGET, (self._requests, self._most))

        self._do(insert, None)

    def summaries(self) -> list[dict[str, Any]]:
        """All of them as the list shows them, the last one first."""

        def select(connection: sqlite3.Connection) -> list[dict[str, Any]]:
            rows = connection.execute("SELECT summary FROM requests ORDER BY number DESC")
            return [loads(text) for (text,) in rows]

        return self._do(select, [])

    def find(self, number: str) -> Kept | None:
        """The request with an ID, if it is still there."""

        def select(connection: sqlite3.Connection) -> Kept | None:
            query = "SELECT data, originals FROM requests WHERE id = ?"
            for data, originals in connection.execute(query, (number,)):
                found = {int(key): _read_original(*values) for key, values in loads(originals).items()}
                return Kept(loads(data), found)
            return None

        return self._do(select, None)

    def _do(self, what: Callable[[sqlite3.Connection], Result], otherwise: Result, may_renew: bool = True) -> Result:
        """Do something with the file; once more with a new one, if this one is damaged."""
        with _using:
            try:
                with self._connected() as connection:
                    return what(connection)
            except (sqlite3.Error, OSError, JSONDecodeError) as error:
                if may_renew and isinstance(error, sqlite3.DatabaseError | JSONDecodeError) and not _is_busy(error):
                    for end in ("", "-wal", "-shm"):
                        Path(f"{self._file}{end}").unlink(missing_ok=True)
                    return self._do(what, otherwise, may_renew=False)
                self._complain(error)
                return otherwise

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """A connection to the file that is there now."""
        self._folder.mkdir(0o700, parents=True, exist_ok=True)  # Somebody may have deleted it.
        # SQLite makes its other files with the mode of this one.
        os.close(os.open(self._file, os.O_RDWR | os.O_CREAT, 0o600))
        with closing(sqlite3.connect(self._file, timeout=_PATIENCE, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute(_TABLE)
            yield connection

    def _complain(self, error: Exception) -> None:
        if not self._has_complained:
            self._has_complained = True
            logger.warning("Requests cannot be kept in %s: %s", self._file, error)


def _prepare(folder: Any) -> Path:
    if not isinstance(folder, str | os.PathLike):
        raise ConfigurationError("store", f"must be the path of a folder, got {shown(folder)}.")
    path = Path(os.fsdecode(folder)).absolute()
    try:
        path.mkdir(0o700, parents=True, exist_ok=True)
        found = path.stat()
    except OSError as error:
        raise ConfigurationError("store", f"cannot be used: {error}.") from error
    if found.st_mode & 0o077 or (hasattr(os, "getuid") and found.st_uid != os.getuid()):
        problem = f"must be a folder that only the user of this process can read: chmod 700 {path}"
        raise ConfigurationError("store", problem)
    return path


def _is_busy(error: Exception) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY)


def _is_storable(kept: Kept, number: int) -> bool:
    """Whether a statement may be in the file as it was sent: nothing of it is hidden, and JSON has its values."""
    original = kept.originals[number]
    values = original.parameters
    each = values.values() if isinstance(values, dict) else values
    is_shown = not original.secrets and kept.data["statements"][number]["sql"] == original.sql
    return is_shown and all(type(value) in _PLAIN and not _is_huge(value) for value in each)


def _is_huge(value: Any) -> bool:
    """Whether a value is a number that Python does not write."""
    return type(value) is int and value.bit_length() > 1000


def _explained(kept: Kept, storable: Collection[int]) -> dict[str, Any]:
    """The data, with the reason why a statement cannot be explained that could be in memory."""
    statements = list(kept.data["statements"])
    for number in kept.originals:
        if number not in storable:
            reason = "Requests are kept in a file, without values that are hidden or are not those of JSON."
            statements[number] = {**statements[number], "explain": reason}
    return {**kept.data, "statements": statements}


def _read_original(sql: str, parameters: Any, engine: str, is_read: bool) -> Original:
    values = parameters if isinstance(parameters, dict) else tuple(parameters)
    return Original(sql, values, engine, is_read, frozenset())
