"""Database servers that the tests start, stop and restart, each in a folder and on a port of its own."""

from __future__ import annotations

import glob
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import pytest
from sqlalchemy import URL, NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError

from ..databases import DATABASES_SEEN
from ..ports import free_port
from .servers import PATIENCE

#: A random password, so that it does not occur anywhere by accident.
PASSWORD = f"secret-{uuid4().hex}"


class OwnServer:
    """A database server in a folder and on a port of its own.

    If the tests run as root, the server runs as the system user of its package, because it refuses to run as root.
    Otherwise, it runs as the tests' user.
    """

    drivername: ClassVar[str]
    #: the users of the database and of the operating system
    administrator: ClassVar[str]
    account: ClassVar[str]
    #: the signals to stop it, and to end it as if the machine had lost power
    shutdown: ClassVar[signal.Signals]
    crash: ClassVar[signal.Signals]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.log = folder / "log"
        self.user: dict[str, Any] = {}
        if os.geteuid() == 0:
            account = pwd.getpwnam(self.account)
            self.user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
            os.chown(folder, account.pw_uid, account.pw_gid)
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        try:
            self.initialize()
        except BaseException:
            self.close()  # It may be running already, and the caller has no reference to it yet.
            raise

    def initialize(self) -> None:
        """Make the data folder."""
        raise NotImplementedError

    def command(self) -> list[str]:
        """The command that starts the server."""
        raise NotImplementedError

    @property
    def url(self) -> URL:
        """The database of the tests."""
        return URL.create(self.drivername, "outage", PASSWORD, "127.0.0.1", self.port, "outage")

    def call(self, *command: str) -> None:
        done = subprocess.run(
            command,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **self.user,
        )
        assert done.returncode == 0, done.stdout

    def start(self) -> None:
        """Start the server. Returns when it answers."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C must reach only the tests, which stop the server.
                **self.user,
            )
        deadline = time.monotonic() + PATIENCE
        engine = create_engine(self.administration, poolclass=NullPool)
        while True:
            try:
                with engine.connect():
                    DATABASES_SEEN.ran.add(self.administration.get_backend_name())
                    return
            except DBAPIError:
                assert self.process.poll() is None, self.log.read_text(errors="replace")
                assert time.monotonic() < deadline, self.log.read_text(errors="replace")
                time.sleep(0.02)

    @property
    def administration(self) -> URL:
        return self.url.set(username=self.administrator, database=self.administrator)

    def stop(self, how: signal.Signals) -> None:
        """Stop the server. Returns when it has ended."""
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(PATIENCE)
            self.process = None

    def close(self) -> None:
        self.stop(self.crash)

    def administer(self, *statements: str) -> None:
        engine = create_engine(self.administration, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            for statement in statements:
                connection.execute(text(statement))


def program(name: str, *folders: str) -> str:
    """The path of a program that need not be on the PATH; the newest, if there are several."""
    found = shutil.which(name) or next(
        (path for folder in folders for path in sorted(glob.glob(f"{folder}/{name}"), reverse=True)), None
    )
    if found is None:
        if os.environ.get("CI"):
            pytest.fail(f"there is no {name}, and CI is set")
        pytest.skip(f"there is no {name}")
    return found


class OwnPostgreSQL(OwnServer):
    drivername = "postgresql+psycopg"
    administrator = account = "postgres"
    shutdown = signal.SIGINT  # "Fast"; PostgreSQL's "Shutting Down the Server".
    crash = signal.SIGQUIT  # "Immediate": recovers at the next start.

    def initialize(self) -> None:
        initdb = program("initdb", "/usr/lib/postgresql/*/bin")
        passwords = self.folder / "password"
        passwords.write_text(PASSWORD)
        passwords.chmod(0o644)
        self.postgres = program("postgres", os.path.dirname(initdb), "/usr/lib/postgresql/*/bin")
        options = ["--no-sync", "--auth=scram-sha-256", f"--pwfile={passwords}", "--no-locale", "--encoding=UTF8"]
        self.call(initdb, f"--pgdata={self.data}", "--username=postgres", *options)
        self.start()
        self.administer(
            f"CREATE ROLE outage LOGIN PASSWORD '{PASSWORD}'",
            *(f"CREATE DATABASE {name} OWNER outage" for name in ("outage", "second")),
        )

    def command(self) -> list[str]:
        settings = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "fsync": "off",
            "max_prepared_transactions": 10,
        }
        return [self.postgres, "-D", str(self.data), *(f"--{name}={value}" for name, value in settings.items())]


class OwnMariaDB(OwnServer):
    drivername = "mariadb+pymysql"
    administrator = "root"
    account = "mysql"
    shutdown = signal.SIGTERM
    crash = signal.SIGKILL

    def initialize(self) -> None:
        self.mariadbd = program("mariadbd", "/usr/sbin", "/usr/local/sbin", "/usr/libexec")
        self.call(
            program("mariadb-install-db", "/usr/bin"),
            "--no-defaults",
            f"--datadir={self.data}",
            f"--tmpdir={self.folder}",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
        )
        self.start()
        self.administer(
            "CREATE DATABASE outage",
            f"CREATE USER outage@'127.0.0.1' IDENTIFIED BY '{PASSWORD}'",
            "GRANT ALL ON *.* TO outage@'127.0.0.1'",
        )

    @property
    def administration(self) -> URL:
        return URL.create(self.drivername, "root", host="127.0.0.1", port=self.port)

    def command(self) -> list[str]:
        return [
            *(self.mariadbd, "--no-defaults", f"--datadir={self.data}", f"--port={self.port}"),
            *("--bind-address=127.0.0.1", f"--socket={self.folder}/socket", f"--pid-file={self.folder}/pid"),
            *("--skip-name-resolve", f"--tmpdir={self.folder}"),
        ]


@contextmanager
def running(kind: type[OwnServer]) -> Iterator[OwnServer]:
    # Not in pytest's folder, which is closed to other users.
    folder = Path(tempfile.mkdtemp(prefix="own-server-"))
    try:
        with closing(kind(folder)) as server:
            yield server
    finally:
        shutil.rmtree(folder)
