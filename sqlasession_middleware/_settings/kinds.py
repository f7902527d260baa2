"""The kinds of values that options take, and how the text of an ini file is converted to one."""

from __future__ import annotations

from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any, NamedTuple

from sqlalchemy.util import asbool

from ..errors import ConfigurationError, shown

__all__ = [
    "BOOLEAN",
    "BOOLEAN_OR_DOTTED",
    "BYTES",
    "DEADLINE",
    "DOTTED",
    "DOTTED_NAMES",
    "DOTTED_OR_NONE",
    "ECHO",
    "LITERAL",
    "MAPPING",
    "MAX_OVERFLOW",
    "OBJECT",
    "POOL_SIZE",
    "SECONDS",
    "SECONDS_OR_NONE",
    "TEXT",
    "URL_PATH",
    "URL_PATH_OR_NONE",
    "WHOLE",
    "WORDS",
    "Kind",
    "parse_setting",
]


class Kind(NamedTuple):
    """A kind of value.

    :param name: completes the sentence "must be …" of an error.
    :param types: the types that a Python value may have. Empty: the value is not checked here.
    :param parse: converts the text of an ini file, or raises. None: only Python code can give such a value.
    :param least: the smallest number that is allowed.
    """

    name: str
    types: tuple[type, ...]
    parse: Callable[[str], Any] | None
    least: int | None = None


_LITERALS = {"true": True, "false": False, "none": None}


def _parse_number(text: str) -> float:
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def _parse_number_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else _parse_number(text)


def _parse_deadline(text: str) -> Any:
    return resolve_name(text) if text[:1].isalpha() and text.lower() != "none" else _parse_number_or_none(text)


def _parse_boolean_or_dotted(text: str) -> Any:
    return resolve_name(text) if "." in text or ":" in text else asbool(text)


def _parse_literal(text: str) -> Any:
    """Guess the type of a driver's argument, whose names and types are not known here."""
    if text.lower() in _LITERALS:
        return _LITERALS[text.lower()]
    try:
        return _parse_number(text)
    except ValueError:
        return text


def _parse_boolean_or_debug(text: str) -> bool | str:
    return text if text == "debug" else bool(asbool(text))


def _parse_words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _parse_text_or_none(text: str) -> str | None:
    return None if text.lower() == "none" else text


def _import_unless_none(text: str) -> Any:
    return None if text.lower() == "none" else resolve_name(text)


def _import_all(text: str) -> list[Any]:
    return [resolve_name(name) for name in _parse_words(text)]


BOOLEAN = Kind("true or false", (bool,), asbool)
BOOLEAN_OR_DOTTED = Kind(
    "true, false, or the dotted name of a callable, 'package.module:name'", (), _parse_boolean_or_dotted
)
ECHO = Kind("true, false or 'debug'", (bool, str), _parse_boolean_or_debug)
WHOLE = Kind("a whole number", (int,), int)
BYTES = Kind("a whole number of bytes", (int,), int)
POOL_SIZE = Kind("a whole number from 0", (int,), int, least=0)
MAX_OVERFLOW = Kind("a whole number from -1", (int,), int, least=-1)
SECONDS = Kind("a number of seconds", (int, float), _parse_number)
SECONDS_OR_NONE = Kind("a number of seconds from 0, or none", (int, float), _parse_number_or_none)
DEADLINE = Kind(
    "a number of seconds above 0, none, or the dotted name of a callable, 'package.module:name'", (), _parse_deadline
)
TEXT = Kind("a text", (), str)
LITERAL = Kind("a number, true, false, none or a text", (), _parse_literal)
WORDS = Kind("names separated by commas", (), _parse_words)
DOTTED = Kind("the dotted name of an importable object, 'package.module:name'", (), resolve_name)
DOTTED_OR_NONE = Kind(f"none, or {DOTTED.name}", (), _import_unless_none)
DOTTED_NAMES = Kind("dotted names of importable objects, 'package.module:name', separated by commas", (), _import_all)
URL_PATH = Kind("a path that begins with '/'", (), str)
URL_PATH_OR_NONE = Kind("a path that begins with '/', or none", (), _parse_text_or_none)
MAPPING = Kind("a dict", (dict,), None)
OBJECT = Kind("an object", (), None)

_IMPORTED = (BOOLEAN_OR_DOTTED, DEADLINE, DOTTED, DOTTED_OR_NONE, DOTTED_NAMES)


def parse_setting(setting: str, text: Any, kind: Kind) -> Any:
    """Convert the text of one setting.

    :param setting: the name of the setting, for the error.
    :param text: anything but a text is Python's, and returned as it is.
    :raises ConfigurationError: if the text is not of the kind.
    """
    if not isinstance(text, str):
        return text
    if kind.parse is None:
        raise ConfigurationError(setting, f"must be {kind.name}, which an ini file cannot contain: set it in Python.")
    try:
        return kind.parse(text.strip())
    except Exception as error:
        # The error of an import may repeat the text, which is only safe to show if it is not a URL.
        if kind in _IMPORTED and "://" not in text:
            why = f"{type(error).__name__}: {error}"
            raise ConfigurationError(setting, f"must be {kind.name}, got {text!r} ({why}).") from error
        raise ConfigurationError(setting, f"must be {kind.name}, got {shown(text)}.") from None
