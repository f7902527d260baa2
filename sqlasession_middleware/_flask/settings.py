"""The keys ``SQLASESSION_*`` of a Flask configuration: each is an option of the middleware.

A configuration may come from a Python file or from environment variables. So a value may also be a text, which is read
as in an ini file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._settings.ini import split_urls
from .._settings.kinds import BOOLEAN, Kind, parse_setting
from .._settings.options import ENGINE_OPTIONS, GROUPS, OTHER_SETTINGS, STACKED
from ..errors import ConfigurationError, nearest

__all__ = ["IN_CONFIGURATION", "KEYS", "parse_engine_options", "read_options"]

PREFIX = "SQLASESSION_"

#: how an error ends the name of a key
IN_CONFIGURATION = " in the Flask configuration"

_KINDS = {name: kind for name, kind in OTHER_SETTINGS.items() if name != "metadata"}

#: The options of the middleware by their keys. What Flask-SQLAlchemy has a setting for is not among them.
KEYS: Mapping[str, str] = {PREFIX + name.upper(): name for name in (*_KINDS, *STACKED, *GROUPS, "replicas")}


def read_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the middleware that a Flask configuration has.

    :raises ConfigurationError: if a key that begins with ``SQLASESSION_`` is unknown, or if a text is not of its kind.
    """
    options = {}
    for key, value in config.items():
        if not key.startswith(PREFIX):
            continue
        if key not in KEYS:
            raise ConfigurationError(
                f"{key!r}{IN_CONFIGURATION}", f"is not a setting of this middleware{nearest(key, KEYS)}"
            )
        options[KEYS[key]] = _parse(key, KEYS[key], value)
    return options


def parse_engine_options(setting: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return engine options whose texts are converted, as SQLAlchemy's ``engine_from_config()`` converts them.

    :param setting: the name of the options, for errors.
    """
    return _parse_all(setting, options, ENGINE_OPTIONS)


def _parse(key: str, name: str, value: Any) -> Any:
    groups = {**STACKED, **GROUPS}
    if name in groups and isinstance(value, Mapping):
        return _parse_all(key, value, groups[name])
    if not isinstance(value, str) or name in GROUPS:
        return value
    if name == "replicas":
        return split_urls(value)
    return parse_setting(f"{key!r}{IN_CONFIGURATION}", value, _KINDS.get(name, BOOLEAN))


def _parse_all(key: str, options: Mapping[str, Any], kinds: Mapping[str, Kind]) -> dict[str, Any]:
    parsed = {}
    for name, value in options.items():
        kind = kinds.get(name)
        # A kind without types takes texts, or checks them by itself.
        if isinstance(value, str) and kind is not None and kind.types:
            value = parse_setting(f"'{key}.{name}'{IN_CONFIGURATION}", value, kind)
        parsed[name] = value
    return parsed
