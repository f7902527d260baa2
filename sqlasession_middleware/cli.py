"""The command ``sqlasession``.

.. code-block:: console

    $ sqlasession check production.ini --processes 4 --threads 8
"""

from __future__ import annotations

import configparser
import os
import sys
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine, text

from .capacity import Capacity, ServerLimit, aligned, ask_limit, server_of
from .engines import without_secrets

if TYPE_CHECKING:
    from .middleware import SQLASessionMiddleware

try:
    import click
    from paste.deploy import loadapp  # type: ignore[import-untyped]
except ImportError as missing:  # pragma: no cover  # in a process of its own
    sys.exit(f"sqlasession needs {missing.name}: pip install 'sqlasession_middleware[cli]'")

__all__ = ["main"]

#: waitress's own default, which most ini files rely on.
WAITRESS_THREADS = 4


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sqlasession_middleware")
def main() -> None:
    """Look after the databases of a WSGI application that an ini file describes."""


@main.command()
@click.argument("ini", metavar="INI[#NAME]")
@click.option("--processes", type=click.IntRange(1), help="Processes that serve the application.")
@click.option("--threads", type=click.IntRange(1), help="Threads of each process.")
def check(ini: str, processes: int | None, threads: int | None) -> None:
    """Ping every engine, and compare what a deployment can open with what the servers admit.

    INI is a PasteDeploy file; #NAME picks an application of it other than "main". Processes and threads are those of
    its [server:main], unless they are given.

    Exits with 0 if all is well, 1 if an engine does not answer or a server admits too few connections, and 2 if the
    ini cannot be used.
    """
    path, _, name = ini.partition("#")
    found = _server_settings(path)
    processes = processes or found["processes"]
    threads = threads or found["threads"]
    applications = _load(path, name)
    click.echo(f"{path}: {_count(processes, 'process', 'processes')} of {_count(threads, 'thread', 'threads')}")
    needed: dict[str, int] = {}
    limits: dict[str, ServerLimit | None] = {}
    troubles = []
    for number, application in enumerate(applications, 1):
        engines = application.engines
        capacity = application.capacity(processes, threads)
        rows = []
        for each in capacity:
            engine = engines[each.name]
            answer, limit, problem = _ping(engine)
            if problem is not None:
                troubles.append(f"{each.name} ({each.server}) does not answer: {problem}")
            server = server_of(engine)
            needed[server] = needed.get(server, 0) + each.total
            limits[server] = limits.get(server) or limit
            rows.append((*each.cells(), answer))
        if len(applications) > 1:
            click.echo(f"\napplication {number} of {len(applications)}: {application!r}")
        click.echo("\n".join(aligned([(*Capacity.TITLES, "ping"), *rows])))
        application.dispose()
    for server, count in needed.items():
        troubles += _compare(server, count, limits[server])
    for trouble in troubles:
        click.echo(f"error: {trouble}", err=True)
    sys.exit(1 if troubles else 0)


def _load(path: str, name: str) -> list[SQLASessionMiddleware]:
    from .paste import collected  # Not before somebody loads an application: it would make "--help" slow.

    if not os.path.isfile(path):
        _refuse(f"there is no file {path!r}.")
    with collected() as applications:
        try:
            loadapp(f"config:{os.path.abspath(path)}", name=name or None)
        except Exception as error:
            _refuse(f"{path}{'#' * bool(name)}{name} cannot be loaded: {type(error).__name__}: {error}")
    if not applications:
        _refuse(f"no 'use = egg:sqlasession_middleware' is part of {path}{'#' * bool(name)}{name}.")
    return applications


def _server_settings(path: str) -> Mapping[str, int]:
    """The processes and threads of an ini's [server:main], by the names that servers have for them."""
    parser = configparser.RawConfigParser(strict=False)
    try:
        parser.read(path)
    except configparser.Error as error:
        _refuse(f"{path} is no ini file: {error}")
    section: Mapping[str, str] = parser["server:main"] if parser.has_section("server:main") else {}
    waitress = "waitress" in section.get("use", "")
    return {
        "processes": _first_number(section, ("workers", "processes"), 1),
        "threads": _first_number(section, ("threads", "worker_connections", "threadpool_workers", "numthreads"),
                                 WAITRESS_THREADS if waitress else 1),
    }  # fmt: skip


def _first_number(section: Mapping[str, str], names: Iterable[str], default: int) -> int:
    for name in names:
        value = section.get(name, "").strip()
        if value.isdecimal() and int(value) > 0:
            return int(value)
    return default


def _ping(engine: Engine) -> tuple[str, ServerLimit | None, str | None]:
    """How long an engine took to answer, what its server admits, and what is wrong with it."""
    began = time.perf_counter()
    try:
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
            answer = f"{(time.perf_counter() - began) * 1000:.1f} ms"
            return answer, ask_limit(connection), None
    except Exception as error:
        problem = " ".join(str(getattr(error, "orig", None) or error).split())
        return "no answer", None, without_secrets(problem, engine.url, {})


def _compare(server: str, needed: int, limit: ServerLimit | None) -> list[str]:
    if limit is None:
        return []
    reserved = f", of which {limit.reserved} are reserved for administrators" if limit.reserved else ""
    said = f"{server}: up to {needed} connections; max_connections is {limit.max_connections}{reserved}"
    click.echo(said)
    if needed <= limit.free:
        return []
    return [f"{said}. Lower pool_size and max_overflow, or raise max_connections."]


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _refuse(problem: str) -> Any:
    click.echo(f"error: {problem}", err=True)
    sys.exit(2)
