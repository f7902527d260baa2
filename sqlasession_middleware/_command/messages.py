"""How a command says that something is wrong, and the words that several commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

import click

from .._database.engines import without_passwords_of_urls
from .._database.secrets import shown_url

if TYPE_CHECKING:
    from ..middleware import SQLASessionMiddleware

__all__ = ["complain", "counted", "describe_error", "fail", "refuse", "run_or_fail", "title_of"]


def complain(problem: str) -> None:
    """Print an error, and go on."""
    click.echo(f"error: {problem}", err=True)


def fail(problem: str) -> NoReturn:
    """Exit with 1: the command could not do what it is for."""
    complain(problem)
    sys.exit(1)


def refuse(problem: str) -> NoReturn:
    """Exit with 2: the ini file or an option cannot be used."""
    # The error of an application may repeat its URL. Only an engine knows its password, and there is none yet.
    complain(without_passwords_of_urls(problem))
    sys.exit(2)


def run_or_fail(action: Callable[[], object], application: SQLASessionMiddleware) -> None:
    """Call ``action``, and exit with 1 if it raises."""
    try:
        action()
    except Exception as error:
        fail(describe_error(error, application))


def describe_error(error: BaseException, application: SQLASessionMiddleware) -> str:
    """The message of a database's error on one line, without the passwords of the application's engines."""
    return application.without_secrets(" ".join(str(getattr(error, "orig", None) or error).split()))


def title_of(application: SQLASessionMiddleware) -> str:
    """What the output calls an application."""
    name = application.name
    return repr(application) if name is None else f"{name!r} on {shown_url(application.engine.url)}"


def counted(number: int, one: str, many: str) -> str:
    """``"1 table"``, ``"2 tables"``."""
    return f"{number} {one if number == 1 else many}"
