"""Validates and normalizes the arguments of the constructor."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from sqlalchemy import MetaData
from sqlalchemy.orm import Session

from ..errors import ConfigurationError, nearest, shown
from .checks import check_types, copy_options
from .options import ENGINE_OPTIONS, GROUPS, SESSION_OPTIONS, STACKED

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

__all__ = ["explain_unknown", "make_with_options", "read_metadata", "read_session_options", "read_streams", "wrap"]

Made = TypeVar("Made")
Parameters = ParamSpec("Parameters")

#: The options of each parameter that is a dict of options.
_PLACES = {"engine_options": ENGINE_OPTIONS, "session_options": SESSION_OPTIONS, **STACKED, **GROUPS}


def explain_unknown(constructor: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """Have a constructor of the middleware say where an option belongs that is not its own.

    Python's own TypeError would only say that it is unexpected.
    """
    known = inspect.signature(constructor).parameters

    @wraps(constructor)
    def construct(*arguments: Parameters.args, **options: Parameters.kwargs) -> None:
        for name in options:
            if name not in known:
                raise ConfigurationError(name, _place_of(name, known))
        constructor(*arguments, **options)

    return construct


def _place_of(name: str, known: Collection[str]) -> str:
    for parameter, options in _PLACES.items():
        if name in options:
            return f"is one of {parameter!r}: pass {parameter}={{{name!r}: …}}."
    return f"is not an option of SQLASessionMiddleware{nearest(name, known)}"


def read_metadata(metadata: Any) -> tuple[MetaData, ...]:
    """Return one MetaData or several as a tuple.

    :raises ConfigurationError: if one of them is not a MetaData, or if there are none.
    """
    collections = tuple(metadata) if isinstance(metadata, list | tuple) and metadata else (metadata,)
    for each in collections:
        if not isinstance(each, MetaData):
            raise ConfigurationError(
                "metadata",
                f"must be a MetaData, such as a declarative Base.metadata, or several, got {type(each).__name__}.",
            )
    return collections


def read_streams(content_types: Any) -> frozenset[str]:
    """Return content types in lower case, as they are compared with those of responses.

    :raises ConfigurationError: if they are not a collection of content types without parameters.
    """
    if isinstance(content_types, str) or not isinstance(content_types, Collection):
        raise ConfigurationError("streams", f"must be a list of content types, got {shown(content_types)}.")
    for each in content_types:
        if not isinstance(each, str) or each.count("/") != 1 or ";" in each:
            raise ConfigurationError("streams", f"must hold content types such as 'text/csv', got {shown(each)}.")
    return frozenset(each.strip().lower() for each in content_types)


def read_session_options(options: Mapping[str, Any] | None) -> tuple[type[Session], dict[str, Any]]:
    """Return the Session class, and a copy of its other options.

    :raises ConfigurationError: if an option is unknown or wrong.
    """
    if options is None:
        return Session, {}
    if not isinstance(options, Mapping):
        raise ConfigurationError("session_options", f"must be a dict, got {type(options).__name__}.")
    check_types("session_options", options, SESSION_OPTIONS)
    copied = {name: copy_options(value) for name, value in options.items()}
    session_class = copied.pop("class_", Session)
    if not (isinstance(session_class, type) and issubclass(session_class, Session)):
        raise ConfigurationError(
            "session_options", f"must be a subclass of Session, got {shown(session_class)}.", "class_"
        )
    _check_names(session_class, copied)
    if session_class is Session:
        _check_values(copied)
    return session_class, copied


def wrap(parameter: str, middleware: Callable[..., WSGIApplication], app: WSGIApplication, options: Any) -> Any:
    """Wrap ``app`` in an inner middleware, if its options ask for it.

    :param parameter: the parameter that the options were given as.
    :param options: True, a dict of the middleware's options, or False to return ``app`` as it is.
    :raises ConfigurationError: if an option is unknown or wrong.
    """
    if not isinstance(options, bool | Mapping):
        raise ConfigurationError(parameter, f"must be true, false or a dict of options, got {type(options).__name__}.")
    if options is False:
        return app
    return make_with_options(parameter, partial(middleware, app), {} if options is True else options)


def make_with_options(parameter: str, make: Callable[..., Made], options: Mapping[str, Any] | None) -> Made:
    """Make something of a dict of options.

    :param parameter: the parameter that the options were given as.
    :param make: takes the options by their names, and checks their values.
    :raises ConfigurationError: if an option is unknown or wrong.
    """
    if options is not None and not isinstance(options, Mapping):
        raise ConfigurationError(parameter, f"must be a dict of options, got {shown(options)}.")
    known = inspect.signature(make).parameters
    for name in options or ():
        if name not in known:
            raise ConfigurationError(parameter, f"is not an option{nearest(str(name), known)}", name)
    try:
        return make(**(options or {}))
    except ConfigurationError as error:
        raise ConfigurationError(parameter, error.problem, error.parameter) from error.__cause__


def _check_names(session_class: type[Session], options: Mapping[Any, Any]) -> None:
    parameters = inspect.signature(session_class).parameters
    accepts_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    for name in options:
        if not isinstance(name, str):
            raise ConfigurationError("session_options", f"must have names as keys, got {shown(name)}.")
        if name in ("bind", "binds"):
            raise ConfigurationError("session_options", "is set by the middleware: pass it as 'bind'.", name)
        if name not in parameters and not accepts_any:
            raise ConfigurationError(
                "session_options", f"is not an option of {session_class.__name__}{nearest(name, parameters)}", name
            )


def _check_values(options: Mapping[str, Any]) -> None:
    # SQLAlchemy's own Session opens nothing when it is made. A subclass may do anything, so it is not made here.
    try:
        Session(**options)
    except Exception as error:
        said = "got a URL." if "://" in str(error) else error
        raise ConfigurationError("session_options", f"are not accepted by Session: {said}") from None
