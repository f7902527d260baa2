"""A PostgreSQL primary and two hot standbys that follow it. Tests can stop, pause and promote them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import NullPool, create_engine, text

from .own_servers import PASSWORD, OwnPostgreSQL, running
from .servers import PATIENCE


class Node(OwnPostgreSQL):
    """One server of the three."""

    def command(self) -> list[str]:
        settings = {
            "wal_keep_size": "256MB",  # Keeps the changes that a stopped standby misses.
            "wal_retrieve_retry_interval": "100ms",  # The default is five seconds.
        }
        return [*super().command(), *(f"--{name}={value}" for name, value in settings.items())]

    def ask(self, query: str, **values: Any) -> Any:
        """Execute a query as the administrator, and return its only value."""
        engine = create_engine(self.administration, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            return connection.scalar(text(query), values)

    def wait_until(self, query: str, **values: Any) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self.ask(query, **values):
            assert time.monotonic() < deadline, f"not true: {query} {values}\n{self.log.read_text(errors='replace')}"
            time.sleep(0.01)

    def lsn(self) -> str:
        """The end of a primary's write-ahead log: all commits are before it."""
        found: str = self.ask("SELECT CAST(pg_current_wal_lsn() AS text)")
        return found


class Standby(Node):
    """A copy of the primary, which follows it until it is promoted."""

    def __init__(self, folder: Path, primary: Node) -> None:
        self.primary = primary
        super().__init__(folder)

    def initialize(self) -> None:
        self.postgres = self.primary.postgres
        # In the server's folder: Debian's program on the PATH chooses a version by the system's clusters.
        copy = os.path.join(os.path.dirname(os.path.realpath(self.postgres)), "pg_basebackup")
        primary = f"host=127.0.0.1 port={self.primary.port} user={self.administrator} password={PASSWORD}"
        options = ["--write-recovery-conf", "--checkpoint=fast", "--no-sync", "--no-manifest"]
        self.call(copy, f"--pgdata={self.data}", f"--dbname={primary}", *options)
        self.start()

    def wait_for(self, lsn: str) -> None:
        """Return when it has replayed the log up to ``lsn``."""
        self.wait_until("SELECT pg_last_wal_replay_lsn() >= CAST(:lsn AS pg_lsn)", lsn=lsn)

    def pause_replay(self) -> None:
        """Stop replaying; incoming log is kept. Returns when the replay is paused."""
        self.ask("SELECT pg_wal_replay_pause()")
        self.wait_until("SELECT pg_get_wal_replay_pause_state() = 'paused'")

    def resume_replay(self) -> None:
        self.ask("SELECT pg_wal_replay_resume()")

    def promote(self) -> None:
        """Make it a primary. The other standby still follows the old one."""
        assert self.ask("SELECT pg_promote(true, :seconds)", seconds=int(PATIENCE))
        self.wait_until("SELECT NOT pg_is_in_recovery()")


@dataclass
class Cluster:
    """The three servers. Each has a ``url``, a ``stop(how)`` and a ``start()``."""

    primary: Node
    standbys: list[Standby]


@contextmanager
def replicated() -> Iterator[Cluster]:
    """Start a primary and two standbys. The standbys may be a moment behind: use ``wait_for(lsn)``."""
    with ExitStack() as stack:
        primary = stack.enter_context(running(Node))
        assert isinstance(primary, Node)
        standbys = []
        for number in range(2):
            folder = primary.folder / f"standby-{number}"
            folder.mkdir()
            standbys.append(stack.enter_context(closing(Standby(folder, primary))))
        yield Cluster(primary, standbys)
