"""Three MariaDB servers that are one Galera cluster, and HAProxy in front of them, all of the tests' own."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pymysql
from sqlalchemy import URL, NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError

from .own_servers import OwnMariaDB, program
from .servers import PATIENCE

NODES = 3
#: HAProxy's own: it has no password and no privilege, and needs none.
CHECKER = "checker"

# While a node that has died is not given up ("suspect_timeout", five seconds by default), no COMMIT ends on the others.
# With much less, a node that a busy machine does not let run is taken for dead.
GROUP = {
    "evs.keepalive_period": "PT0.5S",
    "evs.inactive_check_period": "PT0.25S",
    "evs.suspect_timeout": "PT2S",
    "evs.inactive_timeout": "PT6S",
    "evs.install_timeout": "PT6S",
    "gcache.size": "32M",
}


def lasting_port() -> int:
    """A free port that stays free while nobody listens there, and hundreds of connections are made and closed.

    The system gives none to a client that is below the range for clients (Linux: ip_local_port_range).
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Node(OwnMariaDB):
    """One server of the cluster.

    The first one makes the cluster. The others begin with an empty folder and are sent a copy of another's, by rsync; a
    node that comes back is sent what it has missed.

    :param cluster: all nodes, this one not yet.
    """

    def __init__(self, folder: Path, cluster: list[Node]) -> None:
        self.name = f"node{len(cluster)}"
        self.cluster = cluster
        #: where it stopped, for the others to know what it has missed
        self.position: str | None = None
        #: for the cluster's own messages, for what was missed, for a copy
        self.group_port, self.missed_port, self.copy_port = lasting_port(), lasting_port(), lasting_port()
        self.provider = program("libgalera_smm.so", "/usr/lib/galera", "/usr/lib64/galera-4", "/usr/lib64/galera")
        program("rsync")  # Else it would be missed only in a log.
        self.process = None
        try:
            super().__init__(folder)
        except BaseException:
            self.close()
            raise

    def initialize(self) -> None:
        self.port = lasting_port()
        if self.cluster:
            self.mariadbd = self.cluster[0].mariadbd
            self.data.mkdir()
            if self.user:
                os.chown(self.data, self.user["user"], self.user["group"])
            self.start()
        else:
            super().initialize()
            self.administer(f"CREATE USER {CHECKER}@'127.0.0.1'")

    def command(self) -> list[str]:
        others = [f"127.0.0.1:{node.group_port}" for node in self.cluster if node is not self]
        provider_options = {
            **GROUP,
            "gmcast.listen_addr": f"tcp://127.0.0.1:{self.group_port}",
            "ist.recv_addr": f"127.0.0.1:{self.missed_port}",
        }
        settings = {
            "tmpdir": self.folder,  # A server that starts removes what others have in the folder of all.
            "wsrep_on": "ON",
            "wsrep_provider": self.provider,
            "wsrep_provider_options": ";".join(f"{name}={value}" for name, value in provider_options.items()),
            "wsrep_cluster_address": f"gcomm://{','.join(others)}",
            "wsrep_node_name": self.name,
            "wsrep_node_address": "127.0.0.1",
            "wsrep_sst_method": "rsync",
            "wsrep_sst_receive_address": f"127.0.0.1:{self.copy_port}",
            "binlog_format": "ROW",
            "innodb_autoinc_lock_mode": 2,
            "innodb_log_file_size": "8M",  # It is a part of what is copied.
            # Enough where it is the process that is killed, and not the machine.
            "innodb_flush_log_at_trx_commit": 2,
            "innodb_lock_wait_timeout": 5,
        }
        return [
            *super().command(),
            *(f"--{name}={value}" for name, value in settings.items()),
            *([] if others else ["--wsrep-new-cluster"]),
            *([f"--wsrep_start_position={self.position}"] if self.position else []),
        ]

    def start(self) -> None:
        """Return when it has all that the others have, and takes part."""
        super().start()
        self.wait_until_synced()

    def wait_until_synced(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            with suppress(DBAPIError):  # One that is not ready refuses what SQLAlchemy asks first.
                if self.status("local_state_comment") == "Synced":
                    return
            assert time.monotonic() < deadline, self.log.read_text(errors="replace")
            time.sleep(0.02)

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Out of the others' reach, but not of its clients'. In the end it has caught up with the others again."""
        options = {"host": "127.0.0.1", "port": self.port, "user": self.administrator}
        with closing(pymysql.connect(**options, autocommit=True)) as connection, closing(connection.cursor()) as cursor:
            cursor.execute("SET GLOBAL wsrep_provider_options = 'gmcast.isolate=1'")
            try:
                yield
            finally:
                cursor.execute("SET GLOBAL wsrep_provider_options = 'gmcast.isolate=0'")
                self.wait_until_synced()

    def recover(self) -> None:
        """Find out where it stopped, as the unit of systemd and mysqld_safe do: without it, all would be copied."""
        self.position = None
        done = subprocess.run(
            [*self.command(), "--wsrep-recover"],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            **self.user,
        )
        found = re.search(r"WSREP: Recovered position: (\S+:\d+)", done.stderr)
        assert found, done.stderr
        self.position = found[1]

    def close(self) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # With the scripts that send and receive copies.
        super().close()

    def ask(self, query: str) -> str:
        """The last column of a query's one row."""
        engine = create_engine(self.administration, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            return str(connection.execute(text(query)).one()[-1])

    def status(self, name: str) -> str:
        return self.ask(f"SHOW STATUS LIKE 'wsrep_{name}'")


# "Connection Phase" and "Text Protocol" of MariaDB's client/server protocol.
CLIENT_PROTOCOL_41, CLIENT_SECURE_CONNECTION = 0x200, 0x8000
COM_QUIT, COM_QUERY = b"\x01", b"\x03"


def _packet(number: int, payload: bytes) -> str:
    """One of the protocol's packets, in hexadecimal."""
    return (len(payload).to_bytes(3, "little") + bytes([number]) + payload).hex()


class Balancer:
    """HAProxy, on a port of its own."""

    def __init__(self, haproxy: str, folder: Path, nodes: list[Node]) -> None:
        self.port = lasting_port()
        self.log = folder / "log"
        self.configuration = folder / "haproxy.cfg"
        self.configuration.write_text(self.configure(nodes))
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [haproxy, "-db", "-f", str(self.configuration)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def configure(self, nodes: list[Node]) -> str:
        # The check asks what matters: "wsrep_local_state", 4 where the node is Synced. A node that is cut off, is sent
        # what it has missed or sends a copy of all accepts connections and logins as well, and so passes for healthy
        # with "check" and "option mysql-check". The usual script behind HTTP (clustercheck) would be one more program.
        login = (CLIENT_PROTOCOL_41 | CLIENT_SECURE_CONNECTION).to_bytes(4, "little") + (1 << 24).to_bytes(4, "little")
        login += b"\x21" + bytes(23) + CHECKER.encode() + b"\0" + b"\0"  # UTF-8, no password.
        query = COM_QUERY + b"SHOW STATUS LIKE 'wsrep_local_state'"
        synced = b"\x11wsrep_local_state\x014"
        lines = [
            "defaults",
            "    mode tcp",
            "    timeout connect 2s",
            "    timeout check 1s",
            # Longer than any request takes here.
            "    timeout client 60s",
            "    timeout server 60s",
            # A connection that a node refuses is tried at another one.
            "    retries 3",
            "    option redispatch 1",
            "listen galera",
            f"    bind 127.0.0.1:{self.port}",
            # Connections of a pool live long: one that came back gets the new ones until it has its share.
            "    balance leastconn",
            "    option tcp-check",
            "    tcp-check connect",
            "    tcp-check expect binary 0000000a",  # The greeting: packet 0, version 10 of the protocol.
            f"    tcp-check send-binary {_packet(1, login)}",
            "    tcp-check expect binary 00000200",  # OK, packet 2.
            # With the end of the connection behind it: else a wrong answer would be waited for as a late one is.
            f"    tcp-check send-binary {_packet(0, query)}{_packet(0, COM_QUIT)}",
            f"    tcp-check expect binary {synced.hex()}",
            # Else whoever is connected to a node that was cut off would go on waiting for it.
            "    default-server inter 250ms fall 3 rise 2 on-marked-down shutdown-sessions",
            *(f"    server {node.name} 127.0.0.1:{node.port} check" for node in nodes),
        ]
        return "\n".join(lines) + "\n"

    def close(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)


class Cluster:
    """Nodes and balancer, all of them running.

    :param stack: closes all of it.
    """

    def __init__(self, stack: ExitStack) -> None:
        haproxy = program("haproxy", "/usr/sbin", "/usr/local/sbin")
        self.nodes: list[Node] = []
        for _ in range(NODES):
            self.nodes.append(stack.enter_context(closing(Node(self._folder(stack), self.nodes))))
        self.balancer = stack.enter_context(closing(Balancer(haproxy, self._folder(stack), self.nodes)))
        self.wait_until_balanced(self.nodes)

    @staticmethod
    def _folder(stack: ExitStack) -> Path:
        # Not in pytest's folder, which is closed to other users.
        folder = Path(tempfile.mkdtemp(prefix="galera-"))
        stack.callback(shutil.rmtree, folder)
        return folder

    @property
    def url(self) -> URL:
        """Whichever node the balancer chooses."""
        return self.nodes[0].url.set(port=self.balancer.port)

    def wait_until_balanced(self, nodes: list[Node]) -> None:
        """Return when the balancer hands out all of these nodes, and no other."""
        expected = {node.name for node in nodes}
        deadline = time.monotonic() + PATIENCE
        while (found := {self._connect() for _ in range(2 * NODES)}) != expected:
            log = self.balancer.log.read_text(errors="replace")
            assert self.balancer.process.poll() is None, log
            assert time.monotonic() < deadline, f"expected {expected}, found {found}: {log}"
            time.sleep(0.02)

    def _connect(self) -> str:
        """The name of the node that the balancer has chosen, or what happened instead."""
        try:
            with create_engine(self.url, poolclass=NullPool).connect() as connection:
                return str(connection.scalar(text("SELECT @@wsrep_node_name")))
        except DBAPIError as error:
            return repr(error.orig)

    def kill(self, node: Node) -> None:
        node.stop(node.crash)

    def rejoin(self, node: Node) -> None:
        """Return when it has all that the others have, and takes part."""
        node.recover()
        node.start()


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(stack)
