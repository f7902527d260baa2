"""The section ``[server:main]``: how many requests a server handles at once, and waitress, which serves them."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import click

from .ini import Ini, read_section
from .messages import fail, refuse

__all__ = ["SERVER", "Workers", "read_workers", "serve_with_waitress"]

#: The name of the section.
SERVER = "server:main"

#: The default of waitress. Most ini files do not set it.
WAITRESS_THREADS = 4

# Servers have different names for these.
_PROCESSES = ("workers", "processes")
_THREADS = ("threads", "worker_connections", "threadpool_workers", "numthreads")


class Workers(NamedTuple):
    """The processes of a server, and the threads of each."""

    processes: int
    threads: int


def read_workers(ini: Ini) -> Workers:
    """The processes and threads of the server that the ini file configures."""
    section = read_section(ini, SERVER)
    threads = WAITRESS_THREADS if "waitress" in section.get("use", "") else 1
    return Workers(_read_number(section, _PROCESSES, 1), _read_number(section, _THREADS, threads))


def serve_with_waitress(
    app: Any, settings: Mapping[str, str], host: str | None, port: int | None, threads: int | None
) -> None:
    """Serve an application until Ctrl-C.

    :param settings: the section; host, port and threads come from it unless they are given.
    """
    try:
        from waitress.server import create_server  # Imported here because the other commands do not need it.
    except ImportError:
        fail("waitress is not installed: pip install waitress")
    address = _choose_address(settings, host, port)
    threads = threads or _read_number(settings, ("threads",), WAITRESS_THREADS)
    try:
        server = create_server(app, **address, threads=threads)
    except (OSError, ValueError) as error:
        where = address.get("listen") or f"{address['host']}:{address['port']}"
        problem = f"waitress cannot listen on {where}: {error}"
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            problem += ". Another program listens there: stop it, or choose another port with --port."
        fail(problem)
    _run(server)  # pragma: no cover


def _choose_address(settings: Mapping[str, str], host: str | None, port: int | None) -> dict[str, Any]:
    # Pyramid's ini files have "listen". waitress accepts it only without "host" and "port".
    if host is None and port is None and "listen" in settings:
        return {"listen": settings["listen"]}
    written = settings.get("port", "8080").strip()
    # The socket would take the rest of a division by 65536.
    if port is None and not (written.isdecimal() and int(written) < 65536):
        refuse(f"port of [server:main] must be a whole number from 0 to 65535, got {written!r}.")
    return {"host": host or settings.get("host", "127.0.0.1"), "port": int(written) if port is None else port}


def _run(server: Any) -> None:  # pragma: no cover  # in a process of its own
    # Only a server with several sockets has "effective_listen": "listen" may have several addresses, and so may a name.
    for host, port in getattr(server, "effective_listen", None) or [(server.effective_host, server.effective_port)]:
        click.echo(f"serving on http://{f'[{host}]' if ':' in host else host}:{port}/")
    server.run()


def _read_number(section: Mapping[str, str], names: Iterable[str], default: int) -> int:
    """The value of the first of several keys that the section has."""
    for name in names:
        value = section.get(name, "").strip()
        if value and not (value.isdecimal() and int(value) > 0):
            refuse(f"{name} of [server:main] must be a whole number from 1, got {value!r}.")
        if value:
            return int(value)
    return default
