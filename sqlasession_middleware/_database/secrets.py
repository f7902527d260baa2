"""Removes passwords from messages about databases."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

from sqlalchemy.engine import URL

__all__ = [
    "NAMES_OF_SECRETS",
    "has_login",
    "shown_url",
    "without_passwords_of_urls",
    "without_rest_of_password",
    "without_secrets",
]

#: Matches the names of options whose values are secrets.
NAMES_OF_SECRETS: Final = re.compile("pass|pwd|secret|token")


def shown_url(url: URL) -> str:
    """Return a URL as errors, logs and reports show it.

    SQLAlchemy hides the password, but not the secrets in a query (``?password=``, ``?sslpassword=``).
    """
    return without_rest_of_password(url).set(query={}).render_as_string()


def without_rest_of_password(url: URL) -> URL:
    """Replace with stars the text before an "@" in the host or database: the rest of a password that was not encoded.

    Only the URL of an Engine that the application passes can have this rest: all other URLs with it are refused.
    """
    if not has_login(url):
        return url
    return url.set(host=_after_at(url.host), database=_after_at(url.database))


def has_login(url: URL) -> bool:
    """Whether a URL has a host, user or password. Otherwise, its database may be a file with an "@" in its name."""
    return bool(url.host or url.username or url.password)


def _after_at(part: str | None) -> str | None:
    return part and re.sub("^.*@", "***@", part, flags=re.DOTALL)


def without_secrets(text: str, url: URL, options: Mapping[str, Any]) -> str:
    """Replace with stars all passwords of a URL and an engine's options, also where they are misplaced in the URL.

    :param options: the options of the engine, with its ``connect_args``.
    """
    secrets = {str(url.password or "")}
    if has_login(url):
        secrets.update(str(part).rpartition("@")[0] for part in (url.host, url.database))
    for name, value in (*url.normalized_query.items(), *(options.get("connect_args") or {}).items()):
        for each in value if isinstance(value, tuple) else (value,):
            pieces = [str(each), *re.split("[:;,@/]", str(each))]
            secrets.update(piece for piece in pieces if len(piece) > 3 or NAMES_OF_SECRETS.search(name))
    for secret in sorted(secrets - {""}, key=len, reverse=True):
        for written in (secret, quote(secret, safe="")):
            text = text.replace(written, "***")
    return without_passwords_of_urls(text)


def without_passwords_of_urls(text: str) -> str:
    """Replace with stars the passwords of URLs, and of ends of URLs, in a text."""
    # In a complete URL, the password may contain ":" and "/". In the end of a URL, it begins at the nearest ":".
    return re.sub(r":[^:@/\s]+@", ":***@", re.sub(r"(://[^:/@\s]*:)\S*@", r"\1***@", text))
