"""The errors that this library raises by itself.

Each says what was found and what to do next, and none ever holds a password.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches

__all__ = ["ConfigurationError", "ScopeError", "TransactionAborted", "nearest", "shown"]


class ScopeError(RuntimeError):
    """`session` was used where no application is bound, or after its request was over."""


class TransactionAborted(RuntimeError):  # noqa: N818  # the field's term
    """The transaction cannot be committed: the database gave it up after an error, and the application went on.

    PostgreSQL would answer the COMMIT with a ROLLBACK and no error, so a success would have stored nothing.
    """


class ConfigurationError(ValueError):
    """A setting of the middleware is wrong.

    :param parameter: the constructor's parameter, ``"engine_options"``.
    :param problem: the rest of the sentence, ``"must be a whole number, got 'ten'."``
    :param key: the key inside of the parameter where it is a dict, ``"pool_size"``.
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
        """The same error in the words of an ini file.

        :param names: parameter -> the ini's key; one that ends in ``.`` is a prefix of the parameter's keys, which
            after any other follow with a dot.
        :param place: where the settings were found, ``" in shop.ini"``, or an empty string.
        """
        name = names.get(self.parameter, self.parameter)
        if self.key is not None:
            name += self.key if name.endswith(".") else f".{self.key}"
        elif name.endswith("."):
            name += "*"  # All of them together.
        return ConfigurationError(f"{name!r}{place}", self.problem)


def shown(value: object) -> str:
    """What was found, as an error shows it: a URL in a wrong place may have a password in it, and is not repeated."""
    text = repr(value)
    # What only has a URL, as an Engine or an application, hides the password by itself.
    return "a URL" if isinstance(value, Collection) and "://" in text else text


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'pool_size'?"`` for a misspelt name, or a full stop where nothing is near."""
    matches = get_close_matches(name, known, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else "."
