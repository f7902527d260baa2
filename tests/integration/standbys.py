"""A PostgreSQL primary and two hot standbys that follow it, to be stopped, held back and promoted."""

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
            "wal_keep_size": "256MB",  # A standby that was stopped finds what it has missed.
            "wal_retrieve_retry_interval": "100ms",  # It would look for its primary every five seconds.
        }
        return [*super().command(), *(f"--{name}={value}" for name, value in settings.items())]

    def ask(self, query: str, **values: Any) -> Any:
        """The one value that the administrator gets."""
        engine = create_engine(self.administration, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            return connection.scalar(text(query), values)

    def wait_until(self, query: str, **values: Any) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self.ask(query, **values):
            assert time.monotonic() < deadline, f"not true: {query} {values}\n{self.log.read_text(errors='replace')}"
            time.sleep(0.01)

    def lsn(self) -> str:
        """Where the write-ahead log of a primary ends: all that is committed is before it."""
        found: str = self.ask("SELECT CAST(pg_current_wal_lsn() AS text)")
        return found


class Standby(Node):
    """A copy of the primary, which follows it until it is promoted."""

    def __init__(self, folder: Path, primary: Node) -> None:
        self.primary = primary
        super().__init__(folder)

    def initialize(self) -> None:
        self.postgres = self.primary.postgres
        # Beside the server: what Debian has on the PATH picks a version by the system's own clusters.
        copy = os.path.join(os.path.dirname(os.path.realpath(self.postgres)), "pg_basebackup")
        primary = f"host=127.0.0.1 port={self.primary.port} user={self.administrator} password={PASSWORD}"
        options = ["--write-recovery-conf", "--checkpoint=fast", "--no-sync", "--no-manifest"]
        self.call(copy, f"--pgdata={self.data}", f"--dbname={primary}", *options)
        self.start()

    def wait_for(self, lsn: str) -> None:
        """Return when it has replayed the log up to there."""
        self.wait_until("SELECT pg_last_wal_replay_lsn() >= CAST(:lsn AS pg_lsn)", lsn=lsn)

    def pause_replay(self) -> None:
        """Return when nothing is replayed any more; what comes in is kept."""
        self.ask("SELECT pg_wal_replay_pause()")
        self.wait_until("SELECT pg_get_wal_replay_pause_state() = 'paused'")

    def resume_replay(self) -> None:
        self.ask("SELECT pg_wal_replay_resume()")

    def promote(self) -> None:
        """Return when it is a primary. The other standby goes on to follow the old one."""
        assert self.ask("SELECT pg_promote(true, :seconds)", seconds=int(PATIENCE))
        self.wait_until("SELECT NOT pg_is_in_recovery()")


@dataclass
class Cluster:
    """Each of them has a ``url``, a ``stop(how)`` and a ``start()``."""

    primary: Node
    standbys: list[Standby]


@contextmanager
def replicated() -> Iterator[Cluster]:
    """A primary and two standbys, all of which answer. The standbys may be a moment behind: ``wait_for(lsn)``."""
    with ExitStack() as stack:
        primary = stack.enter_context(running(Node))
        assert isinstance(primary, Node)
        standbys = []
        for number in range(2):
            folder = primary.folder / f"standby-{number}"
            folder.mkdir()
            standbys.append(stack.enter_context(closing(Standby(folder, primary))))
        yield Cluster(primary, standbys)
