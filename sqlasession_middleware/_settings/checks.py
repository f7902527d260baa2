"""Checks of arguments: each returns or raises a :exc:`ConfigurationError` that names the parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigurationError, shown
from .kinds import DOTTED, Kind, parse_setting

__all__ = [
    "check_application",
    "check_boolean",
    "check_bytes",
    "check_count",
    "check_deadline",
    "check_name_or_none",
    "check_path",
    "check_path_or_none",
    "check_seconds",
    "check_seconds_above_0",
    "check_seconds_or_none",
    "check_text_or_none",
    "check_types",
    "copy_options",
    "resolve_option",
]


def check_application(app: Any) -> None:
    """Check the first argument of each middleware.

    :raises ConfigurationError: if ``app`` cannot be called.
    """
    if not callable(app):
        raise ConfigurationError("app", f"must be a WSGI application, a callable, got {type(app).__name__}.")


def check_boolean(parameter: str, value: Any) -> None:
    """:raises ConfigurationError: if ``value`` is neither True nor False."""
    if not isinstance(value, bool):
        raise ConfigurationError(parameter, f"must be true or false, got {shown(value)}.")


def check_bytes(parameter: str, number: Any) -> None:
    """:raises ConfigurationError: if ``number`` is not a whole number from 0."""
    if type(number) is not int or number < 0:
        raise ConfigurationError(parameter, f"must be a whole number of bytes from 0, got {shown(number)}.")


def check_count(parameter: str, number: Any) -> None:
    """:raises ConfigurationError: if ``number`` is not a whole number from 1."""
    if type(number) is not int or number < 1:
        raise ConfigurationError(parameter, f"must be a whole number from 1, got {shown(number)}.")


def check_name_or_none(parameter: str, name: Any) -> None:
    """:raises ConfigurationError: if ``name`` is neither None nor a text that a log can show."""
    if name is not None and not (isinstance(name, str) and name.strip() and name.isprintable() and "://" not in name):
        raise ConfigurationError(parameter, f"must be a printable text, or none, got {shown(name)}.")


def check_path_or_none(parameter: str, path: Any) -> None:
    """:raises ConfigurationError: if ``path`` is neither None nor a path."""
    if path is not None and not (isinstance(path, str) and path.startswith("/") and "://" not in path):
        raise ConfigurationError(parameter, f"must be a path that begins with '/', or none, got {shown(path)}.")


def check_path(parameter: str, path: Any) -> None:
    """:raises ConfigurationError: if ``path`` is not a path below that of the site."""
    if not (isinstance(path, str) and path.startswith("/") and path.strip("/") and "://" not in path):
        raise ConfigurationError(parameter, f"must be a path that begins with '/' and has a name, got {shown(path)}.")


def check_seconds_above_0(parameter: str, seconds: Any) -> None:
    """:raises ConfigurationError: if ``seconds`` is not a finite number above 0."""
    if not _is_time(seconds) or seconds == 0:
        raise ConfigurationError(parameter, f"must be a number of seconds above 0, got {shown(seconds)}.")


def check_seconds(parameter: str, seconds: Any) -> None:
    """:raises ConfigurationError: if ``seconds`` is not a finite number from 0."""
    if not _is_time(seconds):
        raise ConfigurationError(parameter, f"must be a number of seconds from 0, got {shown(seconds)}.")


def check_seconds_or_none(parameter: str, seconds: Any) -> None:
    """:raises ConfigurationError: if ``seconds`` is neither None nor a finite number from 0."""
    if seconds is not None and not _is_time(seconds):
        raise ConfigurationError(parameter, f"must be a number of seconds from 0, or none, got {shown(seconds)}.")


def check_text_or_none(parameter: str, value: Any) -> None:
    """:raises ConfigurationError: if ``value`` is neither None nor a text."""
    if value is not None and not isinstance(value, str):
        raise ConfigurationError(parameter, f"must be a text, or none, got {shown(value)}.")


def check_deadline(seconds: Any) -> None:
    """:raises ConfigurationError: if ``seconds`` is neither None nor a finite number above 0."""
    if seconds is not None and not (_is_time(seconds) and seconds > 0):
        raise ConfigurationError("deadline", f"must be a number of seconds above 0, or none, got {shown(seconds)}.")


def _is_time(seconds: Any) -> bool:
    return type(seconds) in (int, float) and 0 <= seconds < float("inf")


def check_types(parameter: str, options: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    """Check the types of options. SQLAlchemy would fail later, or without the name of the option.

    :param kinds: the table of the options. An option that is not in it is not checked.
    :raises ConfigurationError: for the first option with a wrong type.
    """
    for name, value in options.items():
        kind = kinds.get(name)
        if kind is None or not kind.types or value is None:
            continue
        # To Python True is an int, but pool_size=True is a mistake.
        is_wrong = not isinstance(value, kind.types) or (isinstance(value, bool) and bool not in kind.types)
        if is_wrong or (kind.least is not None and value < kind.least):
            # In place of a dict there may be a driver's connection string with a password: only its type is shown.
            found = type(value).__name__ if dict in kind.types else shown(value)
            raise ConfigurationError(parameter, f"must be {kind.name}, got {found}.", name)


def resolve_option(parameter: str, value: Any) -> Any:
    """Import an option that may be given by its dotted name.

    :param value: a callable, its dotted name, or None.
    :raises ConfigurationError: if the name cannot be imported, or the value cannot be called.
    """
    if isinstance(value, str):
        value = parse_setting(parameter, value, DOTTED)
    if value is not None and not callable(value):
        raise ConfigurationError(parameter, f"must be callable, or {DOTTED.name}, got {shown(value)}.")
    return value


def copy_options(value: Any) -> Any:
    """Copy dicts, lists, tuples and sets at every depth, but not the values in them.

    Two applications that were given one dict of options must not change each other's. A value such as an SSL context
    or a creator cannot be copied, and is shared.
    """
    if type(value) is dict:
        return {key: copy_options(inner) for key, inner in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(copy_options(inner) for inner in value)
    return value
