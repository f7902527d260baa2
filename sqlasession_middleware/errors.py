"""The exceptions that this library defines.

Their messages name what was found and what to do about it, and never contain a password.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from functools import partial

__all__ = [
    "BreakerOpenError",
    "ConfigurationError",
    "DeadlineError",
    "IsolationError",
    "ScopeError",
    "TransactionAborted",
    "UnknownTenantError",
    "nearest",
    "of_application",
    "shown",
    "without_address",
]


class ScopeError(RuntimeError):
    """``session`` was used where no application is bound, or after the end of its request."""


class IsolationError(RuntimeError):
    """A session in an ``isolated()`` block cannot be kept apart from the others."""


class TransactionAborted(RuntimeError):  # noqa: N818  # the field's term
    """A transaction cannot be committed, because the database has aborted it after an error that was caught.

    PostgreSQL performs a ROLLBACK for a COMMIT of such a transaction and reports no error, so that a request would
    succeed without storing anything.
    """


class UnknownTenantError(LookupError):
    """There is no tenant of a name."""


class BreakerOpenError(ConnectionError):
    """A database was out of reach several times in a row, and is not waited for at the moment.

    :param database: its URL, without the password.
    :param seconds: until it is tried again.
    """

    def __init__(self, database: str, seconds: float) -> None:
        super().__init__(database, seconds)
        self.database = database
        self.seconds = seconds

    def __str__(self) -> str:
        return f"the database {self.database} is out of reach, and is tried again in {self.seconds:.1f} s"


class DeadlineError(RuntimeError):
    """The deadline of a request or context has passed while it was waiting for a database, or before it began to.

    It is no :exc:`TimeoutError`, because SQLAlchemy takes those for asyncio's, and drops the connection.

    :param seconds: the deadline, counted from the begin of the request, of the context, or of a stream's unit.
    :param what: what was ended, or was not begun.
    :param is_outcome_unknown: whether it was a COMMIT, of which nobody knows whether it took place.
    """

    #: whether the database has said nothing at all; False if it was busy, or was not asked
    is_silent = False

    def __init__(self, seconds: float, what: str, is_outcome_unknown: bool = False) -> None:
        super().__init__(seconds, what)
        self.seconds = seconds
        self.what = what
        self.is_outcome_unknown = is_outcome_unknown

    def __str__(self) -> str:
        return f"the deadline of {self.seconds:g} s has passed: {self.what}"


class ConfigurationError(ValueError):
    """A setting of the middleware is wrong.

    :param parameter: the parameter of the constructor, such as ``"engine_options"``.
    :param problem: the rest of the sentence, such as ``"must be a whole number, got 'ten'."``
    :param key: the key, such as ``"pool_size"``, if the parameter is a dict.
    """

    def __init__(self, parameter: str, problem: str, key: str | None = None) -> None:
        super().__init__(parameter, problem, key)
        self.parameter = parameter
        self.problem = problem
        self.key = key

    def __str__(self) -> str:
        name = self.parameter if self.key is None else f"{self.parameter}[{self.key!r}]"
        return f"{name} {self.problem}"

    def renamed(self, names: Mapping[str, str], place: str) -> ConfigurationError:
        """Return this error with the name that the setting has in an ini file.

        :param names: maps each parameter to its ini key. The error's ``key`` is appended to the ini key, with a dot
            unless the ini key ends in one.
        :param place: where the settings were found, such as ``" in shop.ini"``, or an empty string.
        """
        name = names.get(self.parameter, self.parameter)
        if self.key is not None:
            name += self.key if name.endswith(".") else f".{self.key}"
        elif name.endswith("."):
            name += "*"  # The error is about all keys with this prefix.
        return ConfigurationError(f"{name!r}{place}", self.problem)


def shown(value: object) -> str:
    """Return ``value`` as an error shows it. What contains a URL is not shown, because that may hold a password."""
    text = repr(value)
    # An Engine or an application has a URL in its repr() as well, but without the password.
    return "a URL" if isinstance(value, Collection) and "://" in text else text


def without_address(value: object) -> str:
    """Return ``repr(value)`` without addresses in memory, which differ each time and tell nobody anything."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def named(call: object) -> str:
    """Return how the log names a function. The arguments of a partial are not shown: one may be a password."""
    while isinstance(call, partial):
        call = call.func
    return getattr(call, "__qualname__", None) or type(call).__qualname__


def of_application(application: object) -> str:
    """Return how a record of the log goes on that names a request: ``" of 'shop'"``, or nothing without a name."""
    name = getattr(application, "name", None)
    return "" if name is None else f" of {name!r}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a message: ``"; did you mean 'pool_size'?"``, or ``"."`` if no known name is similar."""
    matches = get_close_matches(name, known, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else "."
