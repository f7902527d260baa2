"""Reads ini files, and loads the applications that they describe."""

from __future__ import annotations

import configparser
import logging.config
import os
import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from paste.deploy import loadapp

from ..errors import nearest
from .messages import refuse

if TYPE_CHECKING:
    from ..middleware import SQLASessionMiddleware
    from ..tenants import TenantsMiddleware

__all__ = ["Ini", "configure_logging", "load", "read_section"]


#: PasteDeploy's message.
_NO_SECTION = re.compile(r"No section '(?P<name>.*)' \(prefixed by (?P<kinds>.*)\) found in config ")


class Ini(NamedTuple):
    """An ini file, and the application in it that a command is for.

    :param name: the name of the application; empty for ``main``.
    :param given: the values of ``--set``, which the file refers to by ``%(name)s``.
    """

    path: str
    name: str
    given: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.path}#{self.name}" if self.name else self.path


def load(ini: Ini) -> tuple[Any, list[SQLASessionMiddleware | TenantsMiddleware]]:
    """Load the application, and return it with every middleware with a database that is part of it.

    Exits with 2 if it cannot be loaded, or if no such middleware is part of it.
    """
    from ..paste import collected  # Not needed by "--help".

    if not os.path.isfile(ini.path):
        refuse(f"there is no file {ini.path!r}.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # As gunicorn does, so that an application need not be installed.
    with collected() as applications:
        try:
            app = loadapp(f"config:{os.path.abspath(ini.path)}", name=ini.name or None, global_conf=_escape(ini.given))
        except (Exception, SystemExit) as error:
            refuse(f"{ini} cannot be loaded: {_find_missing_section(ini, error) or _describe_error(error)}")
    if not applications:
        refuse(f"{ini} has no section with 'use = egg:sqlasession_middleware'.")
    return app, applications


def read_section(ini: Ini, name: str) -> Mapping[str, str]:
    """The keys of a section; an empty mapping if there is no such section. Exits with 2 if the file cannot be read."""
    parser = configparser.ConfigParser(defaults=_defaults(ini))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    try:
        parser.read(ini.path)
        return dict(parser[name]) if parser.has_section(name) else {}
    except configparser.Error as error:
        refuse(f"{ini.path} is not a valid ini file: {_describe_error(error)}")
    except UnicodeError as error:
        refuse(f"{ini.path} is not a valid ini file: {error}")


def configure_logging(ini: Ini) -> None:
    """Configure logging by the file, if it has the section ``[loggers]``. Exits with 2 if that fails."""
    if read_section(ini, "loggers"):
        try:
            logging.config.fileConfig(ini.path, _defaults(ini), disable_existing_loggers=False)
        except Exception as error:
            refuse(f"the loggers of {ini.path} cannot be configured: {_describe_error(error)}")


def _defaults(ini: Ini) -> dict[str, str]:
    """The values that PasteDeploy adds to every section."""
    path = os.path.abspath(ini.path)
    return _escape({**ini.given, "here": os.path.dirname(path), "__file__": path})


def _escape(values: Mapping[str, str]) -> dict[str, str]:
    """Double each ``%``, because the parser expands ``%(name)s`` in default values, too."""
    return {name: value.replace("%", "%%") for name, value in values.items()}


def _find_missing_section(ini: Ini, error: BaseException) -> str | None:
    """What PasteDeploy's error says of a section that there is none of, with those that there are."""
    missing = _NO_SECTION.match(str(error)) if isinstance(error, LookupError) else None
    if missing is None:
        return None
    kinds, name = re.findall("[a-z-]+", missing["kinds"].replace(" or ", " ")), missing["name"]
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ini.path)
    known = [known for section in parser.sections() for kind, _, known in [section.partition(":")] if kind in kinds]
    meant = nearest(name, known)
    there = f". There are: {', '.join(sorted(known))}." if meant == "." and known else meant
    return f"it has no section [{kinds[0]}:{name}]{there}"


def _describe_error(error: BaseException) -> str:
    """What is wrong with the file, or with something that it names.

    The messages of the parser are not repeated: they contain values, and so passwords.
    """
    if not isinstance(error, configparser.Error):
        return f"{type(error).__name__}: {error}"
    if isinstance(error, configparser.InterpolationMissingOptionError):
        return f"{error.option!r} of [{error.section}] refers to {error.reference!r}, which is not defined."
    if isinstance(error, configparser.InterpolationError):
        option = f"{error.option!r} of [{error.section}]"
        return f"{option} has a '%' that does not begin a '%(name)s': write '%%' for a percent sign."
    if isinstance(error, configparser.MissingSectionHeaderError):
        return f"line {error.lineno} precedes the first [section]."
    if isinstance(error, configparser.ParsingError):
        number = getattr(error, "lineno", None) or error.errors[0][0]
        return f"line {number} is not of the form 'key = value'."
    return " ".join(str(error).split())
