"""Reads an ini section: a flat mapping of strings becomes the keyword arguments of the middleware.

Two tables, :data:`ENGINE_KEYS` and :data:`OTHER_KEYS`, map each key to the function that reads it. The second one is
made of the tables of options, so that a new option needs no code here. No engine is made, unless a function is named
that makes it, and no database is contacted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any, NamedTuple

from sqlalchemy import Engine
from sqlalchemy.engine import make_url

from .._drivers.sqlite import sqlite_file
from ..errors import ConfigurationError, nearest, shown
from .kinds import BOOLEAN, DOTTED, LITERAL, TEXT, Kind, parse_setting
from .options import ENGINE_OPTIONS, GROUPS, OTHER_SETTINGS, SESSION_OPTIONS, STACKED, TENANTS_OPTIONS

__all__ = [
    "PLACE_KEYS",
    "TENANTS_PREFIX",
    "ini_names",
    "ini_place",
    "read_options",
    "read_settings",
    "split_tenants",
    "split_urls",
]

#: PasteDeploy adds these to the keys of every section. They tell where the file is and set nothing.
PLACE_KEYS = ("here", "__file__")
SESSION_PREFIX = "session."
CONNECT_ARGUMENTS = "connect_args."
TENANTS_PREFIX = "tenants."
SET_LOCAL_PREFIX = f"{TENANTS_PREFIX}set_local."

# A URL contains no white space. It may contain a comma, but not one that is followed by another URL's scheme.
_BETWEEN_URLS = re.compile(r",?\s+|,(?=[a-z][a-z0-9+_]*://)")


class _Section:
    """An ini section, and the arguments that were read from it so far."""

    def __init__(self, config: Mapping[str, Any], prefix: str) -> None:
        self.prefix = prefix
        self.place = ini_place(config)
        self.folder = config.get("here")
        self.arguments: dict[str, Any] = {"engine_options": {}, "session_options": {}}
        self.replica_options: dict[str, Any] = {}
        self.switched_off: set[str] = set()


class _Entry(NamedTuple):
    """A key of a section, and its value.

    :param setting: the key and the file, as an error names them.
    :param name: the part of the key that ``*`` stands for in the table; without ``*`` the whole key.
    """

    setting: str
    name: str
    value: Any


#: What others call the URL: Flask-SQLAlchemy, hosting services, TurboGears.
_OTHERS_NAMES = dict.fromkeys(
    ("sqlalchemy_database_uri", "sqlalchemy_url", "database_url", "database_uri", "db.url", "dburi", "dsn", "uri"),
    "url",
)

_Reader = Callable[[_Section, _Entry], None]


def _read_url(section: _Section, entry: _Entry) -> None:
    if "bind" in section.arguments:
        raise ConfigurationError(entry.setting, f"and '{section.prefix}engine' are both set: remove one of them.")
    section.arguments["bind"] = _from_folder(entry.value, section.folder)


def _read_engine(section: _Section, entry: _Entry) -> None:
    if "bind" in section.arguments:
        raise ConfigurationError(entry.setting, f"and '{section.prefix}url' are both set: remove one of them.")
    section.arguments["bind"] = _find_engine(entry.setting, entry.value)


def _read_replica_urls(section: _Section, entry: _Entry) -> None:
    urls = split_urls(entry.value) if isinstance(entry.value, str) else entry.value
    section.arguments["replicas"] = [_from_folder(url, section.folder) for url in urls]


def _read_replica_option(section: _Section, entry: _Entry) -> None:
    if entry.name == "url":
        raise ConfigurationError(entry.setting, f"is not a setting: list the URLs in '{section.prefix}replicas'.")
    _read_engine_option_into(section.replica_options, entry.name, entry)


def _read_bind(section: _Section, entry: _Entry) -> None:
    name, dot, option = _split_bind(entry.name)
    if not (name and dot and option):
        raise ConfigurationError(
            entry.setting, f"must be {section.prefix}binds.NAME.url or binds.NAME.OPTION, with an engine option."
        )
    bind = section.arguments.setdefault("binds", {}).setdefault(name, {})
    prefix = f"{section.prefix}binds.{name}."
    if option == "url":
        if "url" in bind:
            raise ConfigurationError(entry.setting, f"and '{prefix}engine' are both set: remove one of them.")
        bind["url"] = _from_folder(entry.value, section.folder)
    elif option == "engine":
        if "url" in bind:
            raise ConfigurationError(entry.setting, f"and '{prefix}url' are both set: remove one of them.")
        bind["url"] = _find_engine(entry.setting, entry.value)
    else:
        _read_engine_option_into(bind, option, entry)


def _read_engine_option(section: _Section, entry: _Entry) -> None:
    _read_engine_option_into(section.arguments["engine_options"], entry.name, entry)


def _read_switch(section: _Section, entry: _Entry) -> None:
    # The options of the middleware may precede or follow its switch.
    section.arguments.setdefault(entry.name, {})
    if not parse_setting(entry.setting, entry.value, BOOLEAN):
        section.switched_off.add(entry.name)


def _read_option(parameter: str, name: str, kind: Kind, section: _Section, entry: _Entry) -> None:
    """Read an option of the dict that is the argument ``parameter``."""
    section.arguments.setdefault(parameter, {})[name] = parse_setting(entry.setting, entry.value, kind)


def _read_argument(parameter: str, kind: Kind, section: _Section, entry: _Entry) -> None:
    section.arguments[parameter] = parse_setting(entry.setting, entry.value, kind)


#: The keys behind the engine's prefix and their readers. ``*`` stands for any text. The first key that fits is taken.
ENGINE_KEYS: Mapping[str, _Reader] = {
    "url": _read_url,
    "engine": _read_engine,
    "replicas": _read_replica_urls,
    "replicas.*": _read_replica_option,
    "binds.*": _read_bind,
    "*": _read_engine_option,
}

#: All other keys and their readers.
OTHER_KEYS: Mapping[str, _Reader] = {
    **{
        f"{SESSION_PREFIX}{name}": partial(_read_option, "session_options", name, kind)
        for name, kind in SESSION_OPTIONS.items()
    },
    **dict.fromkeys(STACKED, _read_switch),
    **{
        f"{parameter}.{name}": partial(_read_option, parameter, name, kind)
        for parameter, options in {**STACKED, **GROUPS}.items()
        for name, kind in options.items()
    },
    **{name: partial(_read_argument, name, kind) for name, kind in OTHER_SETTINGS.items()},
}


def read_settings(config: Mapping[str, Any], prefix: str, *, may_be_objects: bool = False) -> dict[str, Any]:
    """Convert an ini section to keyword arguments of the middleware.

    :param config: the keys and values of the section. With PasteDeploy's ``here`` the relative path of a SQLite file is
        taken from that folder; with its ``__file__`` errors name the file.
    :param prefix: the prefix of the engine's keys, ``"sqlalchemy."``.
    :param may_be_objects: whether a value may be what Python would give to the constructor, instead of a string.
    :raises ConfigurationError: if a key is missing or unknown, or a value is not of its kind.
    """
    section = _Section(config, prefix)
    readers = {**{prefix + key: read for key, read in ENGINE_KEYS.items()}, **OTHER_KEYS}
    for key, value in config.items():
        if key in PLACE_KEYS:
            continue
        setting = f"{key!r}{section.place}"
        if not (may_be_objects or isinstance(value, str)):
            raise ConfigurationError(setting, f"must be a string, as in an ini file, got {type(value).__name__}.")
        read, name = _find_reader(key, readers)
        if read is None:
            raise ConfigurationError(setting, f"is not a setting of this middleware{_meant(key, prefix, readers)}")
        read(section, _Entry(setting, name, value))
    section.arguments.update(dict.fromkeys(section.switched_off, False))
    _check_url(section)
    _apply_replica_options(section)
    return section.arguments


def split_urls(text: str) -> list[str]:
    """Return the URLs of a text, which are separated by white space or commas."""
    return [url for url in _BETWEEN_URLS.split(text.strip()) if url]


def _find_reader(key: str, readers: Mapping[str, _Reader]) -> tuple[_Reader | None, str]:
    """The reader of a key, and the part of the key that ``*`` stands for."""
    for known, read in readers.items():
        if known.endswith("*"):
            if key.startswith(known[:-1]):
                return read, key[len(known) - 1 :]
        elif key == known:
            return read, key
    return None, key


def _known_keys(prefix: str, readers: Mapping[str, _Reader]) -> list[str]:
    return [*(key for key in readers if not key.endswith("*")), *(prefix + name for name in ENGINE_OPTIONS)]


def _meant(key: str, prefix: str, readers: Mapping[str, _Reader]) -> str:
    """The end of a message about an unknown key: the known one that is meant."""
    known = _known_keys(prefix, readers)
    name = _OTHERS_NAMES.get(key.lower(), key)
    # Most often, the prefix of a key is missing.
    without_prefix = [each for each in known if each.partition(".")[2] == name]
    return f"; did you mean {without_prefix[0]!r}?" if without_prefix else nearest(key, known)


def _check_url(section: _Section) -> None:
    if "bind" not in section.arguments:
        _refuse_misspelt(section, ("url", "engine"), 0.6)
        raise ConfigurationError(
            f"{section.prefix + 'url'!r}{section.place}",
            "is missing: set it to a database URL, 'sqlite:///%(here)s/shop.db'.",
        )
    _refuse_misspelt(section, ("replicas", "binds"), 0.8)


def _refuse_misspelt(section: _Section, known: Sequence[str], cutoff: float) -> None:
    """Refuse an option of the engine that is none, but nearly another key: create_engine() would not say which.

    :param known: the keys, without the prefix.
    :param cutoff: how near is near, as for :func:`difflib.get_close_matches`.
    """
    for name in section.arguments["engine_options"]:
        first, dot, rest = name.partition(".")
        first = _OTHERS_NAMES.get(name.lower(), first.lower())
        if name not in ENGINE_OPTIONS and (meant := get_close_matches(first, known, 1, cutoff)):
            problem = f"is not a setting of this middleware; did you mean {section.prefix + meant[0] + dot + rest!r}?"
            raise ConfigurationError(f"{section.prefix + name!r}{section.place}", problem)


def _apply_replica_options(section: _Section) -> None:
    if not section.replica_options:
        return
    urls = section.arguments.get("replicas")
    if not urls:
        raise ConfigurationError(
            f"{section.prefix + 'replicas'!r}{section.place}", "is missing, although options for replicas are set."
        )
    section.arguments["replicas"] = [{**section.replica_options, "url": url} for url in urls]


def _split_bind(key: str) -> tuple[str, str, str]:
    """Split ``audit.pool_size`` at the last dot, but ``audit.connect_args.timeout`` before ``connect_args``."""
    name, dot, option = key.partition(f".{CONNECT_ARGUMENTS}")
    return (name, dot, CONNECT_ARGUMENTS + option) if dot else key.rpartition(".")


def _read_engine_option_into(options: dict[str, Any], name: str, entry: _Entry) -> None:
    if name.startswith(CONNECT_ARGUMENTS):
        arguments = options.setdefault("connect_args", {})
        arguments[name.removeprefix(CONNECT_ARGUMENTS)] = parse_setting(entry.setting, entry.value, LITERAL)
    else:
        # An option that is not in the table may be one of the dialect. create_engine() refuses it if it is not.
        options[name] = parse_setting(entry.setting, entry.value, ENGINE_OPTIONS.get(name, TEXT))


def _find_engine(setting: str, text: str) -> Engine:
    """Import an Engine, or import and call a function that returns one.

    :raises ConfigurationError: if it is neither, or if the function fails.
    """
    found = parse_setting(setting, text, DOTTED)
    if not isinstance(found, Engine) and callable(found):
        try:
            found = found()
        except Exception as error:
            # The error itself may show a password.
            problem = f"could not be had: {text.strip()}() has raised {type(error).__name__}."
            raise ConfigurationError(setting, problem) from error
    if not isinstance(found, Engine):
        problem = f"must be the dotted name of an Engine, or of a function that returns one, got {shown(found)}."
        raise ConfigurationError(setting, problem)
    return found


def _from_folder(text: Any, folder: str | None) -> Any:
    """Take the relative path of a SQLite URL from ``folder``, the ini's, instead of the current one."""
    if not isinstance(text, str):
        return text
    text = text.strip()
    try:
        url = make_url(text)
    except Exception:
        return text  # The check of the engine's URL tells what is wrong with it.
    path = sqlite_file(url)
    if folder is None or path is None or os.path.isabs(path):
        return text  # The check finds more in it than in the URL.
    return url.set(database=os.path.join(folder, path))


def read_options(
    settings: Mapping[str, str], kinds: Mapping[str, Kind], place: str, prefix: str = ""
) -> dict[str, Any]:
    """Convert the section of a filter whose keys are all in one table.

    :param kinds: the table.
    :param place: the result of :func:`ini_place`.
    :param prefix: what the keys have had before them.
    :raises ConfigurationError: if a key is unknown, or a value is not of its kind.
    """
    options = {}
    for key, value in settings.items():
        setting = f"{prefix + key!r}{place}"
        if key not in kinds:
            raise ConfigurationError(setting, f"is not a setting of this middleware{nearest(key, kinds)}")
        options[key] = parse_setting(setting, value, kinds[key])
    return options


def split_tenants(config: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The arguments of a TenantsMiddleware that a section sets by keys of its own, and the other keys.

    :raises ConfigurationError: if a key is missing or unknown, or a value is not of its kind.
    """
    place = ini_place(config)
    own = {key: value for key, value in config.items() if key.startswith(TENANTS_PREFIX)}
    rest = {key: value for key, value in config.items() if key not in own}
    local = {key.removeprefix(SET_LOCAL_PREFIX): own.pop(key) for key in list(own) if key.startswith(SET_LOCAL_PREFIX)}
    directory = {name: own.pop(f"{TENANTS_PREFIX}known_{name}", None) for name in ("url", "query")}
    arguments = read_options(
        {key.removeprefix(TENANTS_PREFIX): value for key, value in own.items()}, TENANTS_OPTIONS, place, TENANTS_PREFIX
    )
    if local:
        arguments["set_local"] = local
    if any(directory.values()):
        arguments["known"] = {"bind": _from_folder(directory["url"], config.get("here")), "query": directory["query"]}
    elif any(":" in name for name in arguments.get("known", ())):
        setting = f"{TENANTS_PREFIX + 'known'!r}{place}"
        arguments["known"] = parse_setting(setting, own[f"{TENANTS_PREFIX}known"], DOTTED)
    for name in ("tenant", "known"):
        if name not in arguments:
            raise ConfigurationError(f"{TENANTS_PREFIX + name!r}{place}", "is missing: see the reference of ini keys.")
    return arguments, rest


def ini_place(config: Mapping[str, str]) -> str:
    """``" in shop.ini"``, or an empty string if the settings do not come from a file."""
    return f" in {config['__file__']}" if "__file__" in config else ""


def ini_names(prefix: str, arguments: Mapping[str, Any]) -> dict[str, str]:
    """Map the constructor's parameters to the ini's keys, for :meth:`ConfigurationError.renamed`.

    :param arguments: the result of :func:`read_settings`.
    """
    names = {"bind": f"{prefix}url", "engine_options": prefix, "session_options": SESSION_PREFIX}
    names.update({name: f"{name}." for name in (*STACKED, *GROUPS)}, binds=f"{prefix}binds")
    names.update({f"binds[{name!r}]": f"{prefix}binds.{name}." for name in arguments.get("binds", ())})
    names.update({f"replicas[{number}]": f"{prefix}replicas" for number in range(len(arguments.get("replicas", ())))})
    return names
