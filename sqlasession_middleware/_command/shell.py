"""The Python shell of ``sqlasession shell``."""

from __future__ import annotations

import code
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click

from .._sessions.registry import session
from .messages import run_or_fail, title_of

if TYPE_CHECKING:
    from ..middleware import SQLASessionMiddleware

__all__ = ["open_shell"]


def open_shell(application: SQLASessionMiddleware, commit: bool) -> None:
    """Run a shell in a context of the application.

    :param commit: commit the open transaction when the shell ends, instead of rolling it back.
    """
    names = {**_mapped_classes(), "session": session, "application": application, "metadata": application.metadata}
    with application.context():
        _interact(f"{title_of(application)}: {', '.join(sorted(names))}", names)
        if session.registry.has() and session().in_transaction():
            if commit:
                run_or_fail(session.commit, application)
            click.echo("what was not committed is " + ("committed" if commit else "rolled back"))


def _mapped_classes() -> dict[str, Any]:
    """The mapped classes of all modules that were imported, by their names."""
    found = {}
    # isinstance() and getattr() would make lazy modules and objects, such as Django's settings, load themselves.
    for module in list(sys.modules.values()):
        if issubclass(type(module), ModuleType):
            for name, value in list(object.__getattribute__(module, "__dict__").items()):
                if issubclass(type(value), type) and "__mapper__" in vars(value):
                    found[name] = value
    return found


def _interact(banner: str, names: dict[str, Any]) -> None:
    try:
        from IPython import start_ipython
    except ImportError:
        start_ipython = None
    if start_ipython is not None:  # pragma: no cover  # where it is installed
        click.echo(banner)
        start_ipython(argv=["--no-banner", "--no-confirm-exit"], user_ns=names)
        return
    # Not in the "except" block: tracebacks of the shell would begin with the ImportError.
    try:
        code.interact(banner, local=names, exitmsg="")
    except SystemExit as leaving:
        # exit() ends the shell like the end of its input. sys.exit(1) is a failure.
        if leaving.code:
            raise
