"""The command ``sqlasession``.

.. code-block:: console

    $ sqlasession wait development.ini --timeout 60
    $ sqlasession create development.ini
    $ sqlasession serve development.ini --port 8080
    $ sqlasession shell development.ini
    $ sqlasession check production.ini --processes 4 --threads 8
    $ sqlasession requests development.ini
    $ sqlasession drop development.ini
    $ sqlasession create production.ini --all-tenants

INI is the path of a PasteDeploy file. ``#NAME`` after the path selects another application of the file than ``main``.
Modules that the file names are also imported from the current folder. ``--set NAME=VALUE`` sets a value that the file
refers to by ``%(NAME)s``; ``--set NAME`` takes the value from the environment variable ``NAME``, so that it is not
visible in the list of processes.

A command exits with 0 if it succeeded, with 1 if it failed, and with 2 if the ini file or an option cannot be used;
``wait`` has failed if the time is over.
Errors are written to the standard error output, and begin with ``error:``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

try:
    import click
    import paste.deploy  # noqa: F401  # the modules of _command import it
except ImportError as missing:  # pragma: no cover  # in a process of its own
    sys.exit(f"sqlasession needs {missing.name}: pip install 'sqlasession_middleware[cli]'")

from ._command.ini import Ini, configure_logging, load, read_section
from ._command.messages import counted, fail, refuse, run_or_fail, title_of
from ._command.report import complain_of_inspectors, print_survey
from ._command.server import SERVER, Workers, read_workers, serve_with_waitress
from ._command.shell import compile_code, open_shell, open_shell_of_tenants, run_code
from ._command.survey import find_inspectors, make_survey
from ._command.tenants import applications_of, check_all, create_all, run_in_all, tenants_of
from ._command.wait import Seconds, end_by_signals, wait_for

if TYPE_CHECKING:
    from ._command.requests import Inspector
    from .middleware import SQLASessionMiddleware
    from .tenants import TenantsMiddleware

__all__ = ["main"]

#: The key of the values of ``--set`` in the context of a command.
GIVEN = f"{__name__}.given"


def _read_given(context: click.Context, parameter: click.Parameter, values: Iterable[str]) -> None:
    """Keep the values of ``--set`` in the context, where :func:`_read_ini` finds them."""
    given = context.meta[GIVEN] = {}
    for name, separator, value in (each.partition("=") for each in values):
        if not separator and name not in os.environ:
            refuse(
                f"--set {name} needs an environment variable of that name, and there is none:"
                f" set it, or give {name}=VALUE."
            )
        given[name] = value if separator else os.environ[name]


def _read_ini(context: click.Context, parameter: click.Parameter, value: str) -> Ini:
    path, _, name = value.partition("#")
    return Ini(path, name, context.meta[GIVEN])


def _of_an_ini(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the argument ``ini``, an :class:`Ini`, and the option ``--set`` that belongs to it."""
    given = click.option(
        "--set",
        metavar="NAME[=VALUE]",
        multiple=True,
        is_eager=True,  # Its callback has to run before that of the argument.
        expose_value=False,
        callback=_read_given,
        help="What the ini refers to by %(NAME)s; by itself, the value of that environment variable.",
    )
    return click.argument("ini", metavar="INI[#NAME]", callback=_read_ini)(given(command))


def _of_a_tenant(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the option ``--tenant``."""
    return click.option("--tenant", metavar="NAME", help="The tenant, where the ini has a TenantsMiddleware.")(command)


def _of_all_tenants(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the option ``--all-tenants``."""
    return click.option("--all-tenants", is_flag=True, help="One tenant after the other.")(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sqlasession_middleware")
def main() -> None:
    """Look after the databases of the WSGI applications that an ini file describes.

    INI is a PasteDeploy file; #NAME picks an application of it other than "main".
    """


@main.command()
@_of_an_ini
@click.option("--processes", type=click.IntRange(1), help="Processes that serve the application.")
@click.option("--threads", type=click.IntRange(1), help="Threads of each process.")
@click.option("--development", is_flag=True, help="The ini is for development: the inspector may be on.")
@_of_a_tenant
@_of_all_tenants
def check(
    ini: Ini,
    processes: int | None,
    threads: int | None,
    development: bool,
    tenant: str | None,
    all_tenants: bool,
) -> None:
    """Ping every engine, and compare what a deployment can open with what the servers admit.

    Processes and threads are those of the ini's [server:main], unless they are given. Exits with 1 if an engine does
    not answer, if a server admits too few connections, or if the inspector is on without --development.
    """
    configured = read_workers(ini)
    workers = Workers(processes or configured.processes, threads or configured.threads)
    app, found = _load(ini)
    inspectors = [] if development else find_inspectors(app)
    if all_tenants:
        complain_of_inspectors(ini.path, inspectors)
        check_all(tenants_of(found, ini))
        sys.exit(1 if inspectors else 0)
    applications = applications_of(found, ini, tenant)
    survey = make_survey(applications, workers, inspectors)
    print_survey(ini.path, survey)
    sys.exit(1 if survey.has_problems else 0)


@main.command()
@_of_an_ini
@_of_a_tenant
@_of_all_tenants
def create(ini: Ini, tenant: str | None, all_tenants: bool) -> None:
    """Create the tables that are not there yet, of every application with a database."""
    _, found = _load(ini)
    if all_tenants:
        create_all(tenants_of(found, ini))
        return
    applications = applications_of(found, ini, tenant)
    with_tables = [each for each in applications if _count_tables(each)]
    if not with_tables:
        fail(f"{ini} has no tables to create: set 'metadata = package.module:Base.metadata' in it.")
    for application in with_tables:
        click.echo(f"creating {_describe_tables(application)} of {title_of(application)} …")
        run_or_fail(application.init_database, application)
    click.echo("done")


@main.command()
@_of_an_ini
@click.option("--yes", is_flag=True, help="Do not ask.")
def drop(ini: Ini, yes: bool) -> None:
    """Drop all tables, with everything in them, of every application with a database."""
    _, found = _load(ini)
    applications = applications_of(found, ini)
    if not yes and not all(_confirm(f"Drop {_describe_tables(each)} of {title_of(each)}?") for each in applications):
        fail("aborted, no tables were dropped.")
    for application in applications:
        click.echo(f"dropping {_describe_tables(application)} of {title_of(application)} …")
        run_or_fail(application.drop_database, application)
    click.echo("done")


@main.command()
@_of_an_ini
@click.option(
    "--timeout",
    type=Seconds(),
    metavar="SECONDS",
    default=60,
    show_default=True,
    help="How long to wait at most; 0 asks each engine once.",
)
def wait(ini: Ini, timeout: float) -> None:
    """Wait until every engine has answered.

    Prints a line when something changes. Exits with 0 when all engines have answered, with 1 if the time is over before
    that, and with 2 if an engine's settings cannot be used.
    """
    with end_by_signals():
        _, found = _load(ini)
        applications = applications_of(found, ini)
        sys.exit(0 if wait_for(applications, timeout) else 1)


@main.command()
@_of_an_ini
@click.option("--commit", is_flag=True, help="Commit on exit what was not committed; otherwise it is rolled back.")
@click.option("-c", "code", metavar="CODE", help="Run this Python code in place of a shell.")
@_of_a_tenant
@_of_all_tenants
def shell(ini: Ini, commit: bool, code: str | None, tenant: str | None, all_tenants: bool) -> None:
    """Open a Python shell in the scope of an application.

    It has the session, the application, its metadata and all mapped classes ready. It is IPython's, where that is
    installed. With --all-tenants, it has the tenants ready, whose contexts are to be opened; code of -c runs once for
    each tenant.
    """
    compiled = None if code is None else compile_code(code)
    if all_tenants and compiled is None and commit:
        refuse("--commit needs -c or one tenant: in a shell with --all-tenants, call session.commit() in each context.")
    _, found = _load(ini)
    if all_tenants:
        tenants = tenants_of(found, ini)
        if compiled is None:
            open_shell_of_tenants(tenants)
        else:
            run_in_all(tenants, compiled, commit)
        return
    applications = applications_of(found, ini, tenant)
    if len(applications) > 1:
        refuse(f"{ini} has {len(applications)} applications with a database: pick one by its name, {ini.path}#NAME.")
    if compiled is None:
        open_shell(applications[0], commit)
        return
    try:
        run_code(applications[0], compiled, commit)
    except LookupError as error:
        fail(str(error))


@main.command()
@_of_an_ini
@click.option("--host", help="The address to listen on; 127.0.0.1 unless [server:main] has another one.")
@click.option(
    "--port", type=click.IntRange(0, 65535), help="8080 unless [server:main] has another one; 0 is a free one."
)
@click.option("--threads", type=click.IntRange(1), help="4 unless [server:main] has another number.")
def serve(ini: Ini, host: str | None, port: int | None, threads: int | None) -> None:
    """Serve an application with waitress, until Ctrl-C."""
    settings = read_section(ini, SERVER)
    configure_logging(ini)
    app, _ = _load(ini)
    serve_with_waitress(app, settings, host, port, threads)


@main.command()
@_of_an_ini
@click.argument("request", metavar="[ID]", required=False)
def requests(ini: Ini, request: str | None) -> None:
    """Show what the last requests did to databases, or all of the one with an ID.

    In place of INI, the address that a running inspector has logged, with its token. Of an ini, the requests are read
    that its inspector keeps in its 'store'.
    """
    from ._command.requests import Running, find_stored, print_request, print_requests

    inspector: Inspector
    if ini.path.startswith(("http://", "https://")):
        inspector = Running(str(ini))
    else:
        app, _ = _load(ini)
        inspector = find_stored(ini, app)
    if request is None:
        print_requests(inspector)
    else:
        print_request(inspector, request)


def _load(ini: Ini) -> tuple[Any, list[SQLASessionMiddleware | TenantsMiddleware]]:
    """Load an application. Its connections are closed at the end of the command."""
    app, found = load(ini)
    for each in found:
        click.get_current_context().call_on_close(each.dispose)
    return app, found


def _confirm(question: str) -> bool:
    try:
        return click.confirm(question)
    except click.Abort:  # Ctrl-C, or the standard input has ended.
        click.echo(err=True)
        return False


def _describe_tables(application: SQLASessionMiddleware) -> str:
    return counted(_count_tables(application), "table", "tables")


def _count_tables(application: SQLASessionMiddleware) -> int:
    return sum(len(each.tables) for each in application.collections)
