"""The Python shell of ``sqlasession shell``, and the code that it runs in place of one."""

from __future__ import annotations

import code
import sys
import traceback
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

import click

from .._scope.local import application as current_application
from .._sessions.registry import session
from .messages import describe_error, refuse, run_or_fail, title_of

if TYPE_CHECKING:
    from ..middleware import SQLASessionMiddleware
    from ..tenants import TenantsMiddleware

__all__ = ["compile_code", "open_shell", "open_shell_of_tenants", "run_code"]

#: What tracebacks call the file of the code that was given.
_GIVEN = "<-c>"


def open_shell(application: SQLASessionMiddleware, commit: bool) -> None:
    """Run a shell in a context of the application.

    :param commit: commit the open transaction when the shell ends, instead of rolling it back.
    """
    names = _names_of(application)
    with application.context():
        _interact(f"{title_of(application)}: {', '.join(sorted(names))}", names)
        if session.registry.has() and session().in_transaction():
            if commit:
                run_or_fail(session.commit, application)
            click.echo("what was not committed is " + ("committed" if commit else "rolled back"))


def open_shell_of_tenants(tenants: TenantsMiddleware) -> None:
    """Run a shell outside of any context, which opens those of tenants."""
    names = {**_mapped_classes(), "session": session, "application": current_application, "tenants": tenants}
    _interact(f"with tenants.context(name), for one of tenants.names(): {', '.join(sorted(names))}", names)


def compile_code(given: str) -> CodeType:
    """Compile the code of ``-c``. Exits with 2 if it is no Python."""
    try:
        return compile(given, _GIVEN, "exec")
    except (SyntaxError, ValueError) as error:
        refuse(f"-c must be Python: {error}")


def run_code(application: SQLASessionMiddleware, given: CodeType, commit: bool) -> None:
    """Run code in a context of the application.

    :param commit: commit the open transaction at the end, instead of rolling it back.
    :raises LookupError: if it raises. The message names the line, and has no password.
    """
    with application.context():
        try:
            exec(given, _names_of(application))
            if commit and session.registry.has():
                session.commit()
        except Exception as error:
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _GIVEN]
            place = f"line {lines[-1]}: " if lines else ""
            raise LookupError(f"{place}{type(error).__name__}: {describe_error(error, application)}") from error


def _names_of(application: SQLASessionMiddleware) -> dict[str, Any]:
    return {**_mapped_classes(), "session": session, "application": application, "metadata": application.metadata}


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
