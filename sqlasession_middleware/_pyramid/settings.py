"""Reads the settings of a Pyramid application, which hold everything: only the keys of this library count.

Those of pyramid_tm and pyramid_retry are translated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple, cast

from pyramid.settings import asbool
from pyramid.util import DottedNameResolver
from sqlalchemy import Engine

from .._settings.ini import read_settings
from .._settings.kinds import WHOLE, parse_setting
from .._settings.options import OTHER_SETTINGS, SESSION_OPTIONS, STACKED
from ..errors import ConfigurationError, nearest, shown
from . import names

__all__ = ["PREFIX", "Options", "read_options"]

PREFIX = "sqlalchemy."
SESSION_PREFIX = "session."
#: What the tests of an application that is made by Pyramid's cookiecutter pass to ``main()``.
ENGINE_OF_TESTS = "dbengine"
#: In an ini file it is ``name``, which may be one of the application's own settings here.
OWN_PREFIX = "sqlasession_middleware."
NAME = f"{OWN_PREFIX}name"
_OTHERS = OTHER_SETTINGS.keys() - {"name"}
#: pyramid_retry's.
ATTEMPTS = 3

#: What ini files name, and need not be installed.
_KNOWN = {
    f"pyramid_tm{separator}{each.__name__}": each
    for each in (names.default_commit_veto, names.explicit_manager)
    for separator in ".:"
}
_TM_SETTINGS = ("tm.activate_hook", "tm.annotate_user", "tm.attempts", "tm.commit_veto", "tm.manager_hook")


class Options(NamedTuple):
    """What the settings say.

    :param arguments: of the :class:`~sqlasession_middleware.SQLASessionMiddleware`, without ``transaction``.
    :param transaction: the options of its transaction; None if the application commits by itself.
    :param veto: called with the request and the response; true rolls back.
    :param activate: called with the request; false leaves it without a transaction.
    :param make_manager: called with the request; returns what is ``request.tm``.
    :param attempts_of: called with the request; returns how many attempts it may have, or None.
    :param annotates_user: whether the manager's transaction is told the user.
    """

    arguments: dict[str, Any]
    transaction: dict[str, Any] | None
    veto: Callable[[Any, Any], object] | None
    activate: Callable[[Any], object] | None
    make_manager: Callable[[Any], Any] | None
    attempts_of: Callable[[Any], int | None] | None
    annotates_user: bool


def read_options(settings: Mapping[str, Any], name: str | None = None) -> Options:
    """Read the settings of a Pyramid application.

    :param name: what it is called if its settings do not say.
    :raises ConfigurationError: if a setting of this library is missing or wrong, or two of them contradict each other.
    """
    _refuse_misspelt(settings)
    own = {key: value for key, value in settings.items() if _is_own(key)}
    engine = settings.get(ENGINE_OF_TESTS)
    if isinstance(engine, Engine):
        own = {key: value for key, value in own.items() if not key.startswith(PREFIX)}
        own[f"{PREFIX}url"] = engine
    arguments = read_settings(own, PREFIX, may_be_objects=True)
    arguments["name"] = settings.get(NAME, name)
    transaction = arguments.pop("transaction", {})
    veto = None
    if transaction is not False:
        _add_attempts(transaction, settings)
        veto = _read_veto(transaction, settings)
        _refuse_both("activate", "tm.activate_hook", transaction, settings)
    return Options(
        arguments,
        None if transaction is False else transaction,
        veto,
        _resolve("tm.activate_hook", settings),
        _resolve("tm.manager_hook", settings),
        _resolve("retry.activate_hook", settings),
        asbool(settings.get("tm.annotate_user", False)),
    )


def _is_own(key: str) -> bool:
    if key.startswith((PREFIX, *(f"{name}." for name in STACKED))) or key in STACKED or key in _OTHERS:
        return True
    return key.startswith(SESSION_PREFIX) and key.removeprefix(SESSION_PREFIX) in SESSION_OPTIONS


def _refuse_misspelt(settings: Mapping[str, Any]) -> None:
    """Refuse keys that are nearly one of ours. ``session.`` is also the prefix of pyramid_beaker, for example."""
    for key in settings:
        if key.startswith(OWN_PREFIX) and key != NAME:
            rest = key.removeprefix(OWN_PREFIX)
            end = f"; did you mean {rest!r}?" if _is_own(rest) else nearest(key, [NAME])
            raise ConfigurationError(repr(key), f"is not a setting of this middleware{end}")
    for prefix, known in ((SESSION_PREFIX, [*SESSION_OPTIONS]), ("tm.", [key[3:] for key in _TM_SETTINGS])):
        for key in settings:
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and name not in known and (meant := get_close_matches(name, known, 1, 0.75)):
                problem = f"is not a setting of this middleware; did you mean {prefix + meant[0]!r}?"
                raise ConfigurationError(repr(key), problem)


def _add_attempts(transaction: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Set ``attempts``. pyramid_retry does so if its setting is empty, too."""
    for key in ("retry.attempts", "tm.attempts"):
        given = settings.get(key)
        if given:
            _refuse_both("attempts", key, transaction, settings)
            attempts = parse_setting(repr(key), given, WHOLE)
            if type(attempts) is not int or attempts < 1:
                raise ConfigurationError(repr(key), f"must be a whole number from 1, got {shown(attempts)}.")
            transaction["attempts"] = attempts
            return
    transaction.setdefault("attempts", ATTEMPTS)


def _read_veto(transaction: dict[str, Any], settings: Mapping[str, Any]) -> Callable[[Any, Any], object] | None:
    """Return what decides about a request and its response.

    What is given as ``transaction.commit_veto`` is asked about the rest of the response as well, by the middleware.
    """
    for key in ("tm.commit_veto", "pyramid_tm.commit_veto"):
        if settings.get(key):
            _refuse_both("commit_veto", key, transaction, settings)
            transaction["commit_veto"] = None
            return cast("Callable[[Any, Any], object]", _resolve(key, settings))
    veto: Any = transaction.setdefault("commit_veto", None)
    if veto is None:
        return None
    return lambda request, response: veto(request.environ, response.status, response.headerlist)


def _refuse_both(option: str, key: str, transaction: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    if settings.get(key) and option in transaction:
        raise ConfigurationError(repr(key), f"says the same as 'transaction.{option}': keep one of the two.")


def _resolve(key: str, settings: Mapping[str, Any]) -> Any:
    """The callable that a setting names; None if it is empty."""
    value = settings.get(key)
    if not value:
        return None
    try:
        found = _KNOWN.get(value) or DottedNameResolver(None).maybe_resolve(value)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise ConfigurationError(repr(key), f"must be a callable or its dotted name, got {value!r} ({why}).") from error
    if not callable(found):
        raise ConfigurationError(repr(key), f"must be a callable or its dotted name, got {shown(found)}.")
    return found
