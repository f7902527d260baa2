"""PgBouncer in transaction mode, in front of the tests' PostgreSQL: each transaction borrows a pooled connection."""

from __future__ import annotations

import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, NullPool, create_engine

from .own_servers import OwnServer, program


class PgBouncer(OwnServer):
    """A PgBouncer, which sends its clients' transactions to the database of the URL ``backend``.

    :param settings: settings that differ from PgBouncer's defaults.
    """

    drivername = "postgresql+psycopg"
    account = "postgres"
    shutdown = signal.SIGTERM  # At once. At SIGINT it would wait for its clients.
    crash = signal.SIGKILL

    def __init__(self, folder: Path, backend: URL, settings: dict[str, object]) -> None:
        self.backend = backend
        self.settings = settings
        super().__init__(folder)

    def initialize(self) -> None:
        self.pgbouncer = program("pgbouncer", "/usr/sbin", "/usr/local/sbin")
        with create_engine(self.backend, poolclass=NullPool).connect() as connection:
            # The driver knows the parts that the URL omits.
            driver_connection: Any = connection.connection.dbapi_connection
            info = driver_connection.info
            user, password, host, port, database = info.user, info.password, info.host, info.port, info.dbname
        users = self.folder / "users"
        users.write_text(" ".join('"' + value.replace('"', '""') + '"' for value in (user, password)))
        self.client = URL.create(self.drivername, user, host="127.0.0.1", port=self.port, database=database)
        settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": self.port,
            "unix_socket_dir": "",
            # It knows the users, and trusts the name that a client gives.
            "auth_type": "trust",
            "auth_file": users,
            "pool_mode": "transaction",
            **self.settings,
        }
        self.ini = self.folder / "pgbouncer.ini"
        self.ini.write_text(
            f"[databases]\n{database} = host={host} port={port}\n"
            "[pgbouncer]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items())
        )
        self.start()

    def command(self) -> list[str]:
        return [self.pgbouncer, str(self.ini)]

    @property
    def url(self) -> URL:
        return self.client

    @property
    def administration(self) -> URL:
        """The URL of the database, because SQLAlchemy cannot use PgBouncer's own, ``pgbouncer``."""
        return self.client

    @property
    def said(self) -> str:
        """The log without routine messages about clients and servers."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(line for line in lines if " LOG C-" not in line and " LOG S-" not in line)

    @property
    def version(self) -> tuple[int, ...]:
        done = subprocess.run([self.pgbouncer, "--version"], stdout=subprocess.PIPE, text=True, check=True)
        return tuple(map(int, re.findall(r"\d+", done.stdout)[:2]))


@contextmanager
def bouncing(backend: URL, **settings: object) -> Iterator[PgBouncer]:
    # Not in pytest's folder, which is closed to other users.
    with (
        tempfile.TemporaryDirectory(prefix="own-server-") as folder,
        closing(PgBouncer(Path(folder), backend, settings)) as bouncer,
    ):
        yield bouncer
