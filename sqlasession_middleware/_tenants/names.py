"""Which tenants there are.

A name may come from anybody, and becomes part of a URL, a file's name, a schema. So it has to have the form of one, and
to be one of those that are known, before anything is made of it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from time import monotonic
from typing import Any, Final

from sqlalchemy import text

from .._database.engines import EngineSource, read_source
from .._database.forks import fork_safe_lock
from .._settings.checks import resolve_option
from ..errors import ConfigurationError, shown

__all__ = ["LONGEST", "PLACE", "KnownNames", "is_name"]

logger = logging.getLogger("sqlasession_middleware.tenants")

#: What stands for the name of the tenant.
PLACE: Final = "{tenant}"

#: What PostgreSQL keeps of an identifier, in bytes (NAMEDATALEN), and DNS of a label.
LONGEST: Final = 63

#: In lower case only: to MySQL, DNS and some file systems "Acme" is "acme", and to PostgreSQL it is not.
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]*")

#: Schemas and databases that PostgreSQL, MySQL and MariaDB have themselves. Those of PostgreSQL that begin with "pg_"
#: are its own, too ("The System Catalog Schema").
_TAKEN: Final = frozenset(
    ("public", "information_schema", "postgres", "template0", "template1", "mysql", "performance_schema", "sys")
)

#: After how many seconds a directory that could not be asked is asked again.
_RETRY: Final = 5.0

#: A clock that nobody sets, but for tests.
now = monotonic


def is_name(name: object, longest: int = LONGEST) -> bool:
    """Whether a text has the form of a tenant's name: lower-case letters, digits, ``-`` and ``_``, of ASCII."""
    return isinstance(name, str) and len(name) <= longest and _NAME.fullmatch(name) is not None


def _longest_name(identifiers: Iterable[str]) -> int:
    """How long a name may be, so that no server cuts off what is made of it: it would be another tenant's then."""
    return min((LONGEST - len(each.replace(PLACE, "").encode()) for each in identifiers), default=LONGEST)


def _is_taken(identifiers: Iterable[str], name: str) -> bool:
    """Whether what is made of a name belongs to the server, or to all: customers may choose their names."""
    made = [each.replace(PLACE, name) for each in identifiers]
    return any(each in _TAKEN or each.startswith("pg_") for each in made)


class KnownNames:
    """The names of all tenants.

    :param known: the names; or a callable that returns them, or its dotted name; or a dict with a ``query`` that
        selects them, and the ``bind`` to ask.
    :param seconds: for how long an answer holds.
    :param identifiers: what is made of a name on servers, with ``{tenant}``.
    :raises ConfigurationError: if ``known`` is something else, or has a name that is none.
    """

    def __init__(self, known: Any, seconds: float, identifiers: Collection[str] = ()) -> None:
        self._seconds = seconds
        self._identifiers = identifiers
        self._longest = longest = _longest_name(identifiers)
        self._asking = fork_safe_lock()
        #: the database that has the names, if one has them
        self.directory: EngineSource | None = None
        #: until when the names hold, by :data:`now`
        self.until = 0.0
        #: the names of the last answer; None if nobody has asked
        self.last: frozenset[str] | None = None
        #: how often it has failed to ask, and the last error
        self._failures = 0
        self._failure: Exception | None = None
        self._ask: Callable[[], Iterable[Any]] | None = None
        if isinstance(known, Mapping):
            self._read_query(known)
        elif isinstance(known, Collection) and not isinstance(known, str | bytes):
            for name in known:
                if not is_name(name, longest):
                    problem = f"must be names of up to {longest} of a to z, 0 to 9, '-' and '_', got {shown(name)}."
                    raise ConfigurationError("known", problem)
                if _is_taken(identifiers, name):
                    problem = (
                        f"must have no name that makes a schema or database of the server's own, got {shown(name)}."
                    )
                    raise ConfigurationError("known", problem)
            self.last = frozenset(known)
            self.until = float("inf")
        else:
            self._ask = resolve_option("known", known)
            if self._ask is None:
                raise ConfigurationError("known", "must be the names of the tenants, or what tells them, got None.")

    def _read_query(self, known: Mapping[Any, Any]) -> None:
        if known.keys() != {"bind", "query"} or not isinstance(known["query"], str):
            raise ConfigurationError("known", "must have 'bind', a database, and 'query', a SELECT of the names.")
        directory = self.directory = read_source("known", known["bind"])
        statement = text(known["query"])

        def ask() -> Iterable[Any]:
            with directory.engine.connect() as connection:
                return connection.scalars(statement).all()

        self._ask = ask

    def __contains__(self, name: object) -> bool:
        return is_name(name, self._longest) and name in self.get()

    def are_known(self) -> bool:
        """Whether the names were found before, so that requests can do without the directory."""
        return self.last is not None

    def get(self) -> frozenset[str]:
        """The names, as far as they are known. Where nobody knows them yet, it waits for the answer.

        :raises Exception: if they cannot be asked for, and were not known before.
        """
        names = self.last
        if names is not None and now() < self.until:
            return names
        if names is not None:
            # One asks, and the others go on with what they have.
            if self._asking.acquire(blocking=False):
                try:
                    return self._ask_again(names)
                finally:
                    self._asking.release()
            return names
        failures = self._failures
        with self._asking:
            if self.last is not None:
                return self.last
            if self._failure is not None and self._failures != failures:
                # Each would wait for a silent directory after the other.
                raise self._failure.with_traceback(None)
            try:
                return self.ask()
            except Exception as error:
                self._failures, self._failure = self._failures + 1, error
                raise

    def ask(self) -> frozenset[str]:
        """Ask for the names now.

        :raises Exception: if they cannot be asked for.
        """
        if self._ask is None:
            return self.last or frozenset()
        answer = self._ask()
        if isinstance(answer, str | bytes):  # Its letters would be names.
            raise ConfigurationError("known", f"must return names, got {type(answer).__name__}.")
        found = set(answer)
        names = frozenset(
            name for name in found if is_name(name, self._longest) and not _is_taken(self._identifiers, name)
        )
        if len(names) < len(found):
            logger.warning("%d names of tenants are ignored: they have another form than a-z, 0-9, - and _, are too"
                           " long, or are a server's", len(found) - len(names))  # fmt: skip
        self.last, self.until = names, now() + self._seconds
        return names

    def _ask_again(self, names: frozenset[str]) -> frozenset[str]:
        try:
            return self.ask()
        except Exception:
            self.until = now() + min(_RETRY, self._seconds)
            logger.exception("The names of the tenants cannot be asked for: those that were known go on")
            return names

    def dispose(self) -> None:
        """Close the connections to the directory."""
        if self.directory is not None:
            self.directory.dispose()
