"""From the strings of an ini section to the middleware's arguments, and the types that options must have.

In: a flat mapping such as PasteDeploy hands to a filter. Out: keyword arguments. No engine is made here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pkgutil import resolve_name
from typing import Any, NamedTuple

from sqlalchemy.engine import URL, make_url
from sqlalchemy.util import asbool

from .errors import ConfigurationError, nearest, shown

__all__ = ["ENGINE_OPTIONS", "SESSION_OPTIONS", "check_types", "copy_options", "ini_names", "read_settings"]


class Kind(NamedTuple):
    """What an option may be.

    :param name: completes "must be …".
    :param types: what it is in Python; empty where anything goes.
    :param parse: makes it from an ini's string, or raises; None where an ini cannot hold it.
    :param least: of a number.
    """

    name: str
    types: tuple[type, ...]
    parse: Callable[[str], Any] | None
    least: int | None = None


def _number(text: str) -> float:
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def _literal(text: str) -> Any:
    """What a driver's argument most likely is."""
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return _number(text)
    except ValueError:
        return text


def _boolean_or_debug(text: str) -> bool | str:
    return text if text == "debug" else bool(asbool(text))


BOOLEAN = Kind("true or false", (bool,), asbool)
ECHO = Kind("true, false or 'debug'", (bool, str), _boolean_or_debug)
WHOLE = Kind("a whole number", (int,), int)
POOL_SIZE = Kind("a whole number from 0", (int,), int, least=0)
MAX_OVERFLOW = Kind("a whole number from -1", (int,), int, least=-1)
SECONDS = Kind("a number of seconds", (int, float), _number)
TEXT = Kind("a text", (), str)
LITERAL = Kind("a number, true, false, none or a text", (), _literal)
WORDS = Kind("names separated by commas", (), lambda text: [word.strip() for word in text.split(",") if word.strip()])
DOTTED = Kind("the dotted name of something that can be imported, 'package.module:name'", (), resolve_name)
DOTTED_OR_NONE = Kind(
    f"none, or {DOTTED.name}", (), lambda text: None if text.lower() == "none" else resolve_name(text)
)
DOTTED_NAMES = Kind(
    "dotted names of what can be imported, 'package.module:name', separated by commas",
    (),
    lambda text: [resolve_name(word) for word in WORDS.parse(text)],  # type: ignore[misc]  # it has a parse
)
MAPPING = Kind("a dict", (dict,), None)
OBJECT = Kind("an object", (), None)

#: The parameters of :func:`sqlalchemy.create_engine`. A dialect may know more.
ENGINE_OPTIONS: Mapping[str, Kind] = {
    "connect_args": MAPPING,
    "creator": DOTTED,
    "echo": ECHO,
    "echo_pool": ECHO,
    "enable_from_linting": BOOLEAN,
    "execution_options": MAPPING,
    "future": BOOLEAN,
    "hide_parameters": BOOLEAN,
    "implicit_returning": BOOLEAN,
    "insertmanyvalues_page_size": WHOLE,
    "isolation_level": TEXT,
    "json_deserializer": DOTTED,
    "json_serializer": DOTTED,
    "label_length": WHOLE,
    "logging_name": TEXT,
    "max_identifier_length": WHOLE,
    "max_overflow": MAX_OVERFLOW,
    "module": DOTTED,
    "paramstyle": TEXT,
    "plugins": WORDS,
    "pool": OBJECT,
    "pool_events": OBJECT,
    "pool_logging_name": TEXT,
    "pool_pre_ping": BOOLEAN,
    "pool_recycle": WHOLE,
    "pool_reset_on_return": TEXT,
    "pool_size": POOL_SIZE,
    "pool_timeout": SECONDS,
    "pool_use_lifo": BOOLEAN,
    "poolclass": DOTTED,
    "query_cache_size": WHOLE,
    "skip_autocommit_rollback": BOOLEAN,
    "use_insertmanyvalues": BOOLEAN,
}

#: The parameters of :class:`sqlalchemy.orm.Session` that an application may set, and ``class_``.
SESSION_OPTIONS: Mapping[str, Kind] = {
    "autobegin": BOOLEAN,
    "autoflush": BOOLEAN,
    "class_": DOTTED,
    "close_resets_only": BOOLEAN,
    "enable_baked_queries": BOOLEAN,
    "execution_options": MAPPING,
    "expire_on_commit": BOOLEAN,
    "info": MAPPING,
    "join_transaction_mode": TEXT,
    "query_cls": DOTTED,
    "twophase": BOOLEAN,
}

#: An ini's keys, apart from those of the two tables: the constructor's parameter and what it must be.
OTHER_SETTINGS: Mapping[str, Kind] = {
    "metadata": DOTTED_NAMES,
    "read_your_writes": SECONDS,
    "replica_retry": SECONDS,
    "report_leaks": BOOLEAN,
    "streams": WORDS,
}

#: The parameters of :class:`~sqlasession_middleware.transaction.TransactionMiddleware`.
TRANSACTION_OPTIONS: Mapping[str, Kind] = {
    "activate": DOTTED_OR_NONE,
    "attempts": WHOLE,
    "backoff_base": SECONDS,
    "backoff_cap": SECONDS,
    "commit_veto": DOTTED_OR_NONE,
    "retry_on": WORDS,
}

#: The parameters of :class:`~sqlasession_middleware.unavailable.UnavailableMiddleware`.
UNAVAILABLE_OPTIONS: Mapping[str, Kind] = {"retry_after": WHOLE}

#: The options that switch a middleware on, and the prefix of its own ones.
STACKED: Mapping[str, Mapping[str, Kind]] = {"transaction": TRANSACTION_OPTIONS, "unavailable": UNAVAILABLE_OPTIONS}

#: What PasteDeploy says of every ini. They say where it is and set nothing.
PLACE_KEYS = ("here", "__file__")
SESSION_PREFIX = "session."
CONNECT_ARGUMENTS = "connect_args."

# URLs hold no white space. A comma may be in one, but not before the next one's scheme.
_BETWEEN_URLS = re.compile(r",?\s+|,(?=[a-z][a-z0-9+_]*://)")


def read_settings(config: Mapping[str, str], prefix: str) -> dict[str, Any]:
    """The constructor's arguments that an ini section stands for.

    :param config: ``sqlalchemy.url``, the engine's and the session's options, ``metadata``; with PasteDeploy's
        ``here`` a relative SQLite path is taken from that folder, with its ``__file__`` errors name the file.
    :param prefix: what the engine's keys begin with, ``"sqlalchemy."``.
    :raises ConfigurationError: if a key is missing, unknown, or not of its type.
    """
    place = ini_place(config)
    known = {f"{prefix}url", f"{prefix}replicas", *(prefix + name for name in ENGINE_OPTIONS), *OTHER_SETTINGS}
    known.update(SESSION_PREFIX + name for name in SESSION_OPTIONS)
    for name, kinds in STACKED.items():
        known.update({name, *(f"{name}.{option}" for option in kinds)})
    arguments: dict[str, Any] = {"engine_options": {}, "session_options": {}}
    replica_options: dict[str, Any] = {}
    switched_off: set[str] = set()
    for key, value in config.items():
        if key in PLACE_KEYS:
            continue
        setting = f"{key!r}{place}"
        if not isinstance(value, str):
            raise ConfigurationError(setting, f"must be a string, as in an ini file, got {type(value).__name__}.")
        if key == f"{prefix}url":
            arguments["bind"] = _from_folder(value, config.get("here"))
        elif key == f"{prefix}replicas":
            urls = _BETWEEN_URLS.split(value.strip())
            arguments["replicas"] = [_from_folder(url, config.get("here")) for url in urls if url]
        elif key.startswith(f"{prefix}replicas."):
            if key == f"{prefix}replicas.url":
                raise ConfigurationError(setting, f"is not a setting: the URLs are those of '{prefix}replicas'.")
            _read_engine_option(replica_options, key[len(prefix) + len("replicas.") :], setting, value)
        elif key.startswith(f"{prefix}binds."):
            name, dot, option = _split_bind(key[len(prefix) + len("binds.") :])
            if not (name and dot and option):
                raise ConfigurationError(
                    setting, f"must be {prefix}binds.NAME.url, or an engine option in place of url."
                )
            bind = arguments.setdefault("binds", {}).setdefault(name, {})
            if option == "url":
                bind["url"] = _from_folder(value, config.get("here"))
            else:
                _read_engine_option(bind, option, setting, value)
        elif key.startswith(prefix):
            _read_engine_option(arguments["engine_options"], key[len(prefix) :], setting, value)
        elif key.startswith(SESSION_PREFIX) and key[len(SESSION_PREFIX) :] in SESSION_OPTIONS:
            option = key[len(SESSION_PREFIX) :]
            arguments["session_options"][option] = _parse(setting, value, SESSION_OPTIONS[option])
        elif key in STACKED:
            if not _parse(setting, value, BOOLEAN):
                switched_off.add(key)
            arguments.setdefault(key, {})
        elif (stacked := key.partition("."))[0] in STACKED and stacked[2] in STACKED[stacked[0]]:
            kind = STACKED[stacked[0]][stacked[2]]
            arguments.setdefault(stacked[0], {})[stacked[2]] = _parse(setting, value, kind)
        elif key in OTHER_SETTINGS:
            arguments[key] = _parse(setting, value, OTHER_SETTINGS[key])
        else:
            raise ConfigurationError(setting, f"is not a setting of this middleware{nearest(key, known)}")
    for name in switched_off:
        arguments[name] = False
    if "bind" not in arguments:
        meant = nearest("url", arguments["engine_options"])
        raise ConfigurationError(
            f"{prefix + 'url'!r}{place}",
            f"is missing: set it to a database URL, 'sqlite:///%(here)s/shop.db'{meant}",
        )
    if replica_options:
        if not arguments.get("replicas"):
            raise ConfigurationError(f"{prefix + 'replicas'!r}{place}", "is missing, but there are options for it.")
        arguments["replicas"] = [{**replica_options, "url": url} for url in arguments["replicas"]]
    return arguments


def _split_bind(rest: str) -> tuple[str, str, str]:
    """``audit.connect_args.timeout`` -> ``audit`` and ``connect_args.timeout``."""
    name, dot, option = rest.partition(f".{CONNECT_ARGUMENTS}")
    return (name, dot, CONNECT_ARGUMENTS + option) if dot else rest.rpartition(".")


def _read_engine_option(options: dict[str, Any], option: str, setting: str, value: str) -> None:
    if option.startswith(CONNECT_ARGUMENTS):
        options.setdefault("connect_args", {})[option[len(CONNECT_ARGUMENTS) :]] = _parse(setting, value, LITERAL)
    else:
        # What the table does not list may be the dialect's own: create_engine() will know.
        options[option] = _parse(setting, value, ENGINE_OPTIONS.get(option, TEXT))


def read_options(settings: Mapping[str, str], kinds: Mapping[str, Kind], place: str) -> dict[str, Any]:
    """The options that an ini section of their own stands for.

    :param kinds: all that there are.
    :param place: :func:`ini_place`.
    :raises ConfigurationError: if a key is unknown, or not of its type.
    """
    options = {}
    for key, value in settings.items():
        if key not in kinds:
            raise ConfigurationError(f"{key!r}{place}", f"is not a setting of this middleware{nearest(key, kinds)}")
        options[key] = _parse(f"{key!r}{place}", value, kinds[key])
    return options


def ini_place(config: Mapping[str, str]) -> str:
    """``" in shop.ini"``, or nothing where the settings come from no file."""
    return f" in {config['__file__']}" if "__file__" in config else ""


def ini_names(prefix: str, arguments: Mapping[str, Any]) -> dict[str, str]:
    """The ini's keys for the constructor's parameters, as :meth:`ConfigurationError.renamed` takes them.

    :param arguments: what :func:`read_settings` has made of the ini.
    """
    names = {"bind": f"{prefix}url", "engine_options": prefix, "session_options": SESSION_PREFIX}
    names.update({name: f"{name}." for name in STACKED}, binds=f"{prefix}binds")
    names.update({f"binds[{name!r}]": f"{prefix}binds.{name}." for name in arguments.get("binds", ())})
    names.update({f"replicas[{number}]": f"{prefix}replicas" for number in range(len(arguments.get("replicas", ())))})
    return names


def _parse(setting: str, text: str, kind: Kind) -> Any:
    if kind.parse is None:
        raise ConfigurationError(setting, f"must be {kind.name}, which an ini cannot hold: set it in Python.")
    try:
        return kind.parse(text.strip())
    except Exception as error:
        if kind in (DOTTED, DOTTED_OR_NONE, DOTTED_NAMES) and "://" not in text:
            why = f"{type(error).__name__}: {error}"
            raise ConfigurationError(setting, f"must be {kind.name}, got {text!r} ({why}).") from error
        raise ConfigurationError(setting, f"must be {kind.name}, got {shown(text)}.") from None


def _from_folder(text: str, folder: str | None) -> str | URL:
    """A URL whose relative SQLite path is taken from the ini's folder instead of the process's."""
    try:
        url = make_url(text.strip())
    except Exception:
        return text  # The engine's own check says what is wrong with it.
    path = url.database
    if folder is None or url.get_backend_name() != "sqlite" or path in (None, "", ":memory:"):
        return url
    if path.startswith("file:") or os.path.isabs(path):
        return url
    return url.set(database=os.path.join(folder, path))


def check_types(parameter: str, options: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    """Refuse options of a wrong type, which SQLAlchemy would find out about much later or not name.

    :raises ConfigurationError: for the first one found.
    """
    for name, value in options.items():
        kind = kinds.get(name)
        if kind is None or not kind.types or value is None:
            continue
        # True is an int to Python, but nobody means a pool of True connections.
        is_wrong = not isinstance(value, kind.types) or (isinstance(value, bool) and bool not in kind.types)
        if is_wrong or (kind.least is not None and value < kind.least):
            # What should have been a dict may be a driver's connection string, with a password in it.
            found = type(value).__name__ if dict in kind.types else shown(value)
            raise ConfigurationError(parameter, f"must be {kind.name}, got {found}.", name)


def check_seconds(parameter: str, seconds: Any) -> None:
    """:raises ConfigurationError: if a time is none."""
    if type(seconds) not in (int, float) or not 0 <= seconds < float("inf"):
        raise ConfigurationError(parameter, f"must be a number of seconds from 0, got {shown(seconds)}.")


def resolve_option(parameter: str, value: Any) -> Any:
    """What an option stands for that is a callable, its dotted name, or None.

    :raises ConfigurationError: if it is anything else, or cannot be imported.
    """
    if isinstance(value, str):
        value = _parse(parameter, value, DOTTED)
    if value is not None and not callable(value):
        raise ConfigurationError(parameter, f"must be callable, or {DOTTED.name}, got {shown(value)}.")
    return value


def copy_options(value: Any) -> Any:
    """Copy dicts, lists and sets at every depth, and share what is in them.

    Two applications built from one dict of options must not change each other's, but an SSL context or a creator
    is neither copyable nor meant to be copied.
    """
    if type(value) is dict:
        return {key: copy_options(inner) for key, inner in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(copy_options(inner) for inner in value)
    return value
