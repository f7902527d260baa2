"""Checks the URLs of databases before anything connects to them. The errors do not show passwords."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from .._drivers.registry import server_of_url
from .._drivers.sqlite import sqlite_file
from ..errors import ConfigurationError
from .secrets import NAMES_OF_SECRETS, has_login, without_secrets

__all__ = ["absolute", "check_folder", "check_secrets", "parse_url"]

#: The query of a URL, if an option's name contains an "@": the query is then the rest of a password that contains "?".
_AT_IN_OPTION: Final = re.compile(r"\?([^=]*&)?[^=&]*@")

#: Names of options with a user name, in ``connect_args`` and in the query of a URL.
_NAMES_OF_USERS: Final = ("user", "username")


def parse_url(bind: object) -> URL:
    """Return the URL of a database, and parse it if it is a string.

    :raises ConfigurationError: if it is not a valid URL, or if a part of a password is outside of the URL's password.
    """
    if not isinstance(bind, str | URL):
        raise ConfigurationError("bind", f"must be a URL string, a URL or an Engine, got {type(bind).__name__}.")
    # A text that cannot be parsed may hold a password anywhere, so neither the text nor the cause is in the error.
    if isinstance(bind, str) and "://" not in bind:
        raise ConfigurationError(
            "bind", f"must be a database URL such as 'sqlite:///shop.db', got {len(bind)} characters without '://'."
        )
    try:
        url = make_url(bind)
    except (ArgumentError, ValueError):
        url = None
    if url is None or _is_cut_in_the_password(url, bind):
        raise ConfigurationError(
            "bind",
            "cannot be parsed as a URL: expected 'dialect+driver://user:password@host:port/database', with a"
            " numeric port, and each of '@/:?#%' in the user or password percent-encoded.",
        )
    # Two URLs in one setting: the second one, with its password, is parsed as the first one's database.
    if "://" in (url.database or "").removeprefix("file://"):
        raise ConfigurationError(
            "bind", "contains a second URL in its database name: give each URL a setting of its own."
        )
    for part, value in _parts_of(url):
        if _has_line_break(value):
            raise ConfigurationError(
                "bind",
                f"has a line break at the beginning or end of its {part}: remove it, with strip() if it was read from"
                " a file.",
            )
    return url


def check_secrets(connect_args: Any) -> None:
    """Refuse a user name or secret that begins or ends with a line break: it may have been read from a file.

    :raises ConfigurationError: if an argument of the driver does so.
    """
    if isinstance(connect_args, Mapping):
        for name, value in connect_args.items():
            if _is_of_login(name) and _has_line_break(value):
                raise ConfigurationError(
                    "engine_options",
                    f"has a line break at the beginning or end of {name!r}: remove it, with strip() if it was read"
                    " from a file.",
                    "connect_args",
                )


def absolute(url: URL) -> URL:
    """Make the path of a SQLite file absolute: the process may change its working directory before the first use."""
    path = sqlite_file(url)
    return url if path is None or os.path.isabs(path) else url.set(database=os.path.join(os.getcwd(), path))


def check_folder(url: URL) -> None:
    """Refuse a SQLite file in a folder that does not exist.

    :raises ConfigurationError: if the folder does not exist.
    """
    path = sqlite_file(url)
    if path is None:
        return
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        text = f"names the SQLite file {path!r}, but there is no folder {folder!r}: create it, or mend the path."
        raise ConfigurationError("bind", without_secrets(text, url, {}))


def _is_cut_in_the_password(url: URL, bind: str | URL) -> bool:
    """Whether a host, database or option contains an "@", the end of a user or password that was not encoded.

    SQLAlchemy's password ends at the first "@", and its host at the first "/" or "?" after it.
    """
    if "@" in (url.host or "") or any("@" in name for name in url.query):
        return True
    # The parsed URL does not contain options without a value.
    if isinstance(bind, str) and _AT_IN_OPTION.search(bind):
        return True
    return "@" in (url.database or "") and (has_login(url) or server_of_url(url).default_port is not None)


def _parts_of(url: URL) -> Iterator[tuple[str, object]]:
    yield from (("user name", url.username), ("password", url.password), ("host", url.host), ("database", url.database))
    for name, values in url.normalized_query.items():
        if _is_of_login(name):
            yield from ((f"option {name!r}", value) for value in values)


def _is_of_login(name: object) -> bool:
    return isinstance(name, str) and (name in _NAMES_OF_USERS or NAMES_OF_SECRETS.search(name) is not None)


def _has_line_break(value: object) -> bool:
    if isinstance(value, bytes):
        return value.strip(b"\r\n") != value
    text = str(value or "")
    return text.strip("\r\n") != text
