"""The command ``sqlasession``.

.. code-block:: console

    $ sqlasession create development.ini
    $ sqlasession serve development.ini --port 8080
    $ sqlasession shell development.ini
    $ sqlasession check production.ini --processes 4 --threads 8
    $ sqlasession drop development.ini

INI is a PasteDeploy file; ``#NAME`` behind it picks an application of it other than ``main``. What it calls is looked
for in the current folder as well. ``--set NAME=VALUE`` gives it what it refers to by ``%(NAME)s``; ``--set NAME`` takes
the value from the environment variable of that name, where nobody reads it in the list of processes.

Each command exits with 0 if it did what it says, with 1 if it did not, and with 2 if the ini or an option cannot be
used. What went wrong is written to the standard error output, behind ``error:``.
"""

from __future__ import annotations

import code
import configparser
import logging.config
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from sqlalchemy import Engine, text

from .capacity import MAX_CONNECTIONS, Capacity, Limit, aligned, ask_limits, servers_of
from .engines import without_passwords_of_urls
from .sessions import session

if TYPE_CHECKING:
    from .middleware import SQLASessionMiddleware

try:
    import click
    from paste.deploy import loadapp
except ImportError as missing:  # pragma: no cover  # in a process of its own
    sys.exit(f"sqlasession needs {missing.name}: pip install 'sqlasession_middleware[cli]'")

__all__ = ["main"]

#: seconds that an engine has to answer
PING_TIMEOUT = 10

#: waitress's own default, which most ini files rely on.
WAITRESS_THREADS = 4


class Ini(NamedTuple):
    """An ini file, and which of its applications is meant.

    :param name: empty for ``main``.
    :param given: what the file refers to by ``%(name)s``.
    """

    path: str
    name: str
    given: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.path}#{self.name}" if self.name else self.path


#: where the context of a command has what ``--set`` has given
GIVEN = f"{__name__}.given"


def _read_given(context: click.Context, parameter: click.Parameter, values: Iterable[str]) -> None:
    given = context.meta[GIVEN] = {}
    for name, separator, value in (each.partition("=") for each in values):
        if not separator and name not in os.environ:
            _refuse(f"--set {name} finds no environment variable of that name: set it, or give {name}=VALUE.")
        given[name] = value if separator else os.environ[name]


def _read_ini(context: click.Context, parameter: click.Parameter, value: str) -> Ini:
    path, _, name = value.partition("#")
    return Ini(path, name, context.meta[GIVEN])


def _of_an_ini(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator of a command that takes an :class:`Ini`."""
    given = click.option(
        "--set",
        metavar="NAME[=VALUE]",
        multiple=True,
        is_eager=True,  # It is read before the ini, wherever it stands.
        expose_value=False,
        callback=_read_given,
        help="What the ini refers to by %(NAME)s; by itself, the value of that environment variable.",
    )
    return click.argument("ini", metavar="INI[#NAME]", callback=_read_ini)(given(command))


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
def check(ini: Ini, processes: int | None, threads: int | None) -> None:
    """Ping every engine, and compare what a deployment can open with what the servers admit.

    Processes and threads are those of the ini's [server:main], unless they are given. Exits with 1 if an engine does
    not answer, or if a server admits too few connections.
    """
    found = _server_settings(ini)
    processes = processes or found["processes"]
    threads = threads or found["threads"]
    _, applications = _load(ini)
    click.echo(f"{ini.path}: {_count(processes, 'process', 'processes')} of {_count(threads, 'thread', 'threads')}")
    needed: dict[str, int] = {}
    limits: dict[str, Limit] = {}
    needed_of: dict[tuple[str, Limit], int] = {}  # of roles, accounts and databases
    pools = set()  # An engine with several names counts once.
    troubles = []
    for number, application in enumerate(applications, 1):
        engines = application.engines
        capacity = application.capacity(processes, threads)
        rows = []
        for each in capacity:
            engine = engines[each.name]
            answer, asked, problem = _ping(engine, application)
            if problem is not None:
                troubles.append(f"{each.name} ({each.server}) does not answer: {problem}")
            total = 0 if engine.pool in pools else each.total
            pools.add(engine.pool)
            servers = servers_of(engine)
            for server in servers:
                needed[server] = needed.get(server, 0) + total
                for limit in asked:
                    if limit.name != MAX_CONNECTIONS:
                        needed_of[server, limit] = needed_of.get((server, limit), 0) + total
                    elif server not in limits or len(servers) == 1:
                        limits[server] = limit
            rows.append((*each.cells(), answer))
        if len(applications) > 1:
            click.echo(f"\napplication {number} of {len(applications)}: {application!r}")
        click.echo("\n".join(aligned([(*Capacity.TITLES, "ping"), *rows])))
    for server, count in needed.items():
        if server in limits:
            troubles += _compare(server, count, limits[server])
    for (server, limit), count in needed_of.items():
        troubles += _compare(server, count, limit)
    for trouble in troubles:
        click.echo(f"error: {trouble}", err=True)
    sys.exit(1 if troubles else 0)


@main.command()
@_of_an_ini
def create(ini: Ini) -> None:
    """Create the tables that are not there yet, of every application with a database."""
    _, applications = _load(ini)
    with_tables = [each for each in applications if _number_of_tables(each)]
    if not with_tables:
        _fail(f"{ini} has no tables to create: set 'metadata = package.module:Base.metadata' in it.")
    for application in with_tables:
        click.echo(f"creating {_tables(application)} of {application!r} …")
        _try(application.init_database, application)
    click.echo("done")


@main.command()
@_of_an_ini
@click.option("--yes", is_flag=True, help="Do not ask.")
def drop(ini: Ini, yes: bool) -> None:
    """Drop all tables, with everything in them, of every application with a database."""
    _, applications = _load(ini)
    if not yes and not all(_confirm(f"Drop {_tables(each)} of {each!r}?") for each in applications):
        _fail("nothing was dropped.")
    for application in applications:
        click.echo(f"dropping {_tables(application)} of {application!r} …")
        _try(application.drop_database, application)
    click.echo("done")


@main.command()
@_of_an_ini
@click.option("--commit", is_flag=True, help="Commit on exit what was not committed; otherwise it is rolled back.")
def shell(ini: Ini, commit: bool) -> None:
    """Open a Python shell in the scope of an application.

    It has the session, the application, its metadata and all mapped classes ready. It is IPython's, where that is
    installed.
    """
    _, applications = _load(ini)
    if len(applications) > 1:
        _refuse(f"{ini} has {len(applications)} applications with a database: pick one by its name, {ini.path}#NAME.")
    (application,) = applications
    names = {**_mapped_classes(), "session": session, "application": application, "metadata": application.metadata}
    with application.context():
        _interact(f"{application!r}: {', '.join(sorted(names))}", names)
        if session.registry.has() and session().in_transaction():
            if commit:
                _try(session.commit, application)
            click.echo("what was not committed is " + ("committed" if commit else "rolled back"))


@main.command()
@_of_an_ini
@click.option("--host", help="The address to listen on; 127.0.0.1 unless [server:main] has another one.")
@click.option(
    "--port", type=click.IntRange(0, 65535), help="8080 unless [server:main] has another one; 0 is a free one."
)
@click.option("--threads", type=click.IntRange(1), help="4 unless [server:main] has another number.")
def serve(ini: Ini, host: str | None, port: int | None, threads: int | None) -> None:
    """Serve an application with waitress, until Ctrl-C."""
    settings = _section(ini, "server:main")
    _log_as_told(ini)
    app, _ = _load(ini)
    try:
        from waitress.server import create_server  # Not before somebody serves: the other commands do without it.
    except ImportError:
        _fail("waitress is not installed: pip install waitress")
    where: dict[str, Any]
    if host is None and port is None and "listen" in settings:
        where = {"listen": settings["listen"]}  # As Pyramid's ini files have it; waitress refuses it beside the two.
    else:
        where = {
            "host": host or settings.get("host", "127.0.0.1"),
            "port": settings.get("port", 8080) if port is None else port,
        }
    try:
        server = create_server(app, **where, threads=threads or _first_number(settings, ("threads",), WAITRESS_THREADS))
    except (OSError, ValueError) as error:
        _fail(f"waitress cannot listen: {error}")
    _serve(server)  # pragma: no cover


def _serve(server: Any) -> None:  # pragma: no cover  # in a process of its own
    # Its "listen" may have several addresses, and a name, too: then the server has several sockets.
    for host, port in getattr(server, "effective_listen", None) or [(server.effective_host, server.effective_port)]:
        click.echo(f"serving on http://{f'[{host}]' if ':' in host else host}:{port}/")
    server.run()


def _confirm(question: str) -> bool:
    try:
        return click.confirm(question)
    except click.Abort:  # Nobody is there to answer, or has typed Ctrl-C.
        click.echo(err=True)
        return False


def _tables(application: SQLASessionMiddleware) -> str:
    return _count(_number_of_tables(application), "table", "tables")


def _number_of_tables(application: SQLASessionMiddleware) -> int:
    return sum(len(each.tables) for each in application.collections)


def _mapped_classes() -> dict[str, Any]:
    """The mapped classes of all modules, by their names."""
    found = {}
    # Lazy modules and objects, Django's settings for example, are not asked what they are: they might wake up.
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
    # Not where the import failed: what is raised in the shell would be shown as a consequence of that.
    try:
        code.interact(banner, local=names, exitmsg="")
    except SystemExit as leaving:
        # exit() ends the shell as the end of its input does; sys.exit(1) gives up.
        if leaving.code:
            raise


def _try(action: Callable[[], object], application: SQLASessionMiddleware) -> None:
    try:
        action()
    except Exception as error:
        _fail(_said(error, application))


def _said(error: BaseException, application: SQLASessionMiddleware) -> str:
    """What an error of a database says, on one line."""
    return application.without_secrets(" ".join(str(getattr(error, "orig", None) or error).split()))


def _load(ini: Ini) -> tuple[Any, list[SQLASessionMiddleware]]:
    from .paste import collected  # Not before somebody loads an application: it would make "--help" slow.

    if not os.path.isfile(ini.path):
        _refuse(f"there is no file {ini.path!r}.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # As gunicorn does: what is not installed can be called all the same.
    with collected() as applications:
        try:
            app = loadapp(f"config:{os.path.abspath(ini.path)}", name=ini.name or None, global_conf=_doubled(ini.given))
        except (Exception, SystemExit) as error:
            _refuse(f"{ini} cannot be loaded: {_said_of_ini(error)}")
    if not applications:
        _refuse(f"no 'use = egg:sqlasession_middleware' is part of {ini}.")
    for application in applications:
        click.get_current_context().call_on_close(application.dispose)
    return app, applications


def _server_settings(ini: Ini) -> Mapping[str, int]:
    """The processes and threads of an ini's [server:main], by the names that servers have for them."""
    section = _section(ini, "server:main")
    waitress = "waitress" in section.get("use", "")
    return {
        "processes": _first_number(section, ("workers", "processes"), 1),
        "threads": _first_number(section, ("threads", "worker_connections", "threadpool_workers", "numthreads"),
                                 WAITRESS_THREADS if waitress else 1),
    }  # fmt: skip


def _section(ini: Ini, name: str) -> Mapping[str, str]:
    parser = configparser.ConfigParser(defaults=_defaults(ini))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    try:
        parser.read(ini.path)
        return dict(parser[name]) if parser.has_section(name) else {}
    except configparser.Error as error:
        _refuse(f"{ini.path} is no ini file: {_said_of_ini(error)}")
    except UnicodeError as error:
        _refuse(f"{ini.path} is no ini file: {error}")


def _defaults(ini: Ini) -> dict[str, str]:
    """As PasteDeploy reads an ini: with two names of its own, and what was given."""
    path = os.path.abspath(ini.path)
    return _doubled({**ini.given, "here": os.path.dirname(path), "__file__": path})


def _doubled(values: Mapping[str, str]) -> dict[str, str]:
    """What is given is meant as it is, and begins no ``%(name)s``."""
    return {name: value.replace("%", "%%") for name, value in values.items()}


def _log_as_told(ini: Ini) -> None:
    """Configure logging by the sections of the ini, if it has them."""
    if _section(ini, "loggers"):
        try:
            logging.config.fileConfig(ini.path, _defaults(ini), disable_existing_loggers=False)
        except Exception as error:
            _refuse(f"the loggers of {ini.path} cannot be configured: {_said_of_ini(error)}")


def _said_of_ini(error: BaseException) -> str:
    """What is wrong with an ini, or with what it names.

    The parser's own words are not used: they repeat values, and passwords with them.
    """
    if not isinstance(error, configparser.Error):
        return f"{type(error).__name__}: {error}"
    if isinstance(error, configparser.InterpolationMissingOptionError):
        return f"{error.option!r} of [{error.section}] needs {error.reference!r}, which is nowhere."
    if isinstance(error, configparser.InterpolationError):
        return f"{error.option!r} of [{error.section}] has a '%' that begins no '%(name)s': write '%%' if it is meant."
    if isinstance(error, configparser.MissingSectionHeaderError):
        return f"line {error.lineno} stands before the first [section]."
    if isinstance(error, configparser.ParsingError):
        number = getattr(error, "lineno", None) or error.errors[0][0]
        return f"line {number} is no 'key = value'."
    return " ".join(str(error).split())


def _first_number(section: Mapping[str, str], names: Iterable[str], default: int) -> int:
    for name in names:
        value = section.get(name, "").strip()
        if value and not (value.isdecimal() and int(value) > 0):
            _refuse(f"{name} of [server:main] must be a whole number from 1, got {value!r}.")
        if value:
            return int(value)
    return default


def _ping(engine: Engine, application: SQLASessionMiddleware) -> tuple[str, list[Limit], str | None]:
    """How long an engine took to answer, what its server admits, and what is wrong with it."""
    found: list[tuple[str, list[Limit], str | None]] = []

    def ask() -> None:
        began = time.perf_counter()
        try:
            with engine.connect() as connection:
                connection.execute(text("SELECT 1"))
                answer = f"{(time.perf_counter() - began) * 1000:.1f} ms"
                found.append((answer, ask_limits(connection), None))
        except Exception as error:
            found.append(("no answer", [], _said(error, application)))

    # Not every driver has a limit that covers a server which accepts a connection and says nothing.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PING_TIMEOUT)
    return found[0] if found else ("no answer", [], f"it has said nothing for {PING_TIMEOUT} seconds")


def _compare(server: str, needed: int, limit: Limit) -> list[str]:
    reserved = f", of which {limit.reserved} are reserved for administrators" if limit.reserved else ""
    said = f"{server}: up to {needed} connections; {limit.name} is {limit.maximum}{reserved}"
    click.echo(said)
    if needed <= limit.free:
        return []
    return [f"{said}. Lower pool_size and max_overflow, or raise the limit."]


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _fail(problem: str) -> NoReturn:
    click.echo(f"error: {problem}", err=True)
    sys.exit(1)


def _refuse(problem: str) -> NoReturn:
    # Before there is an engine nobody knows the passwords: an application's own error may hold its URL.
    click.echo(f"error: {without_passwords_of_urls(problem)}", err=True)
    sys.exit(2)
