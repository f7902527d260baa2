"""What requests did to databases, for terminals: from an inspector that runs, or from the folder of its ``store``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from http.client import HTTPException
from http.cookiejar import CookieJar
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol
from urllib.parse import parse_qs, quote, urlsplit
from urllib.request import HTTPCookieProcessor, ProxyHandler, build_opener

import click

from .._inspector.store import Store
from .._wsgi.wrapped import applications_in
from ..inspector import InspectorMiddleware
from .messages import fail, refuse

if TYPE_CHECKING:
    from .ini import Ini

__all__ = ["Inspector", "Running", "Stored", "find_stored", "print_request", "print_requests"]

#: How many seconds a running inspector has for an answer.
_PATIENCE: Final = 10.0
_TITLES: Final = ("id", "at", "method", "path", "status", "time", "database", "queries", "trips", "outcome")


class Inspector(Protocol):
    """Where requests are."""

    def summaries(self) -> list[dict[str, Any]]:
        """All of them as lists show them, the last one first."""

    def find(self, number: str) -> dict[str, Any] | None:
        """The one with an ID; None if it is not there any more."""


class Stored(NamedTuple):
    """Those in the folder of an inspector's ``store``."""

    store: Store

    def summaries(self) -> list[dict[str, Any]]:
        return self.store.summaries()

    def find(self, number: str) -> dict[str, Any] | None:
        kept = self.store.find(number)
        return None if kept is None else kept.data


def find_stored(ini: Ini, app: Any) -> Stored:
    """Those of the inspector in an application. Exits with 2 if there is none, or if it keeps them in memory.

    :param ini: where the application comes from.
    """
    inspectors = [each for each in applications_in(app) if isinstance(each, InspectorMiddleware)]
    if not inspectors:
        refuse(f"{ini} has no section with 'use = egg:sqlasession_middleware#inspector'.")
    folder = inspectors[0].store
    if folder is None:
        refuse(
            f"the inspector of {ini} keeps requests in the memory of its process:"
            " give the address that it logs in place of the file, or set 'store' in its section."
        )
    return Stored(Store(folder, 1, 1))  # It forgets some only when it keeps another one.


class Running:
    """Those of an inspector that runs.

    :param address: what it logs, with the token.
    """

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        token = parse_qs(parts.query).get("token", [""])[0]
        if not token or not parts.hostname:
            refuse("the address must be the one that the inspector logs, with '?token=…' at its end.")
        self._root = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._token = token
        # No proxy: an inspector refuses what has passed one.
        self._opener = build_opener(HTTPCookieProcessor(CookieJar()), ProxyHandler({}))

    def summaries(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._ask("requests.json")
        return found

    def find(self, number: str) -> dict[str, Any] | None:
        found: dict[str, Any] = self._ask(f"r/{quote(number, safe='')}.json")
        return found

    def _ask(self, name: str) -> Any:
        try:
            # The token is swapped for a cookie.
            with self._opener.open(f"{self._root}/{name}?token={quote(self._token)}", timeout=_PATIENCE) as response:
                return json.load(response)
        except ValueError:
            fail(f"{self._root} does not answer as an inspector does: is it the address that the inspector has logged?")
        except (OSError, HTTPException) as error:
            fail(f"{self._root} does not answer: {error}")


def print_requests(inspector: Inspector) -> None:
    """Print the list, the last request at the end."""
    rows = [_TITLES, *(tuple(_columns(each)) for each in reversed(inspector.summaries()))]
    if len(rows) == 1:
        click.echo("no requests yet")
        return
    widths = [max(len(row[column]) for row in rows) for column in range(len(_TITLES))]
    for row in rows:
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def print_request(inspector: Inspector, start: str) -> None:
    """Print all that is known of a request. Exits with 1 if there is none.

    :param start: its ID, or as many characters of its begin as no other one has.
    """
    numbers = [each["id"] for each in inspector.summaries() if each["id"].startswith(start)]
    if len(numbers) > 1:
        fail(f"{len(numbers)} requests have an ID that begins with {start!r}.")
    found = inspector.find(numbers[0]) if numbers else None
    if found is None:
        fail(f"there is no request {start!r}, or not any more.")
    for line in _lines(found):
        click.echo(line)


def _columns(each: dict[str, Any]) -> Iterator[str]:
    yield each["id"][:8]
    yield time.strftime("%H:%M:%S", time.localtime(each["at"]))
    yield _printable(each["method"])
    yield _path(each["path"])
    yield _status(each)
    yield _milliseconds(each["seconds"])
    yield _milliseconds(each["database"] + each["fetched"])
    yield str(each["queries"])
    yield str(each["trips"])
    repeats = f", N+1: {each['warnings']}" if each["warnings"] else ""
    yield f"{each['outcome']}{repeats}"


def _lines(found: dict[str, Any]) -> Iterator[str]:
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["at"]))
    yield f"{_printable(found['method'])} {_path(found['path'])}: {_status(found)} at {at}, {found['outcome']}"
    parts = {
        "all": found["seconds"],
        "statements": found["database"],
        "rows": found["fetched"],
        "wait for a connection": found["waited"],
        "commit": found["committing"],
        "connections held": found["held"],
    }
    yield ", ".join(f"{name} {_milliseconds(seconds)}" for name, seconds in parts.items())
    yield f"queries {found['queries']}, round trips {found['trips']}, attempts {found['attempts']}"
    for number, each in enumerate(found["statements"], 1):
        told = f"{number}. {_milliseconds(each['begin'])} + {_milliseconds(each['seconds'] + each['fetched'])}"
        for_what = f" for {each['relationship']}" if each["relationship"] else ""
        yield f"\n{told} on {_printable(each['engine'])}{for_what}: {_printable(each['sql'])}"
        values = ["(" + ", ".join(f"{name}={value}" for name, value in row) + ")" for row in each["parameters"]]
        if any(each["parameters"]):
            yield f"   {_printable(', '.join(values))}"
        if each["error"]:
            yield f"   failed: {_printable(each['error'])}"
        yield from map(_shown_line, each["stack"].splitlines())
    for repeat in found["repeats"]:
        places = ", ".join(str(number + 1) for number in repeat["statements"])
        yield f"\nN+1: statements {places}. {_printable(repeat['remedy'])}"
    for end in found["ends"]:
        failed = f", failed: {_printable(end['error'])}" if end["error"] else ""
        took = _milliseconds(end["end"] - end["begin"])
        yield f"\n{end['kind'].upper()} on {_printable(end['engine'])}: {_milliseconds(end['begin'])} + {took}{failed}"
    if found["objects"]:
        yield f"\nobjects: {', '.join(f'{_printable(name)} {count}' for name, count in found['objects'].items())}"


def _status(each: dict[str, Any]) -> str:
    return _printable(str(each["status"] or each.get("raised") or "no response"))


def _path(path: str) -> str:
    """A path as it was sent."""
    return quote(path)


def _shown_line(line: str) -> str:
    indent = line[: len(line) - len(line.lstrip())]
    return f" {indent}{_printable(line)}"


def _printable(text: str) -> str:
    """A text on one line that a terminal takes for nothing else."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in " ".join(text.split()))


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"
