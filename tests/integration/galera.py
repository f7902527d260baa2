"""Three MariaDB servers that form a Galera cluster, behind HAProxy, started for the tests."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pymysql
from sqlalchemy import URL, NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError

from ..ports import free_port
from .own_servers import OwnMariaDB, program
from .servers import PATIENCE

NODES = 3
#: HAProxy's database user. It has no password and no privileges, because it needs none.
CHECKER = "checker"

# Until the other nodes give up a dead node ("suspect_timeout", five seconds by default), their COMMITs do not end. With
# a much shorter timeout, a node that a busy machine does not run is considered dead.
GROUP = {
    "evs.keepalive_period": "PT0.5S",
    "evs.inactive_check_period": "PT0.25S",
    "evs.suspect_timeout": "PT2S",
    "evs.inactive_timeout": "PT6S",
    "evs.install_timeout": "PT6S",
    "gcache.size": "32M",
}


class Node(OwnMariaDB):
    """One server of the cluster.

    The first node creates the cluster. The others start with an empty folder and receive a copy of another node's, by
    rsync. A node that rejoins receives the changes that it has missed.

    :param cluster: the nodes that were started before.
    """

    def __init__(self, folder: Path, cluster: list[Node]) -> None:
        self.name = f"node{len(cluster)}"
        self.cluster = cluster
        #: the position where it stopped, which tells the others what it has missed
        self.position: str | None = None
        #: ports for the cluster's own messages, for missed changes, for copies
        self.group_port, self.missed_port, self.copy_port = free_port(), free_port(), free_port()
        self.provider = program("libgalera_smm.so", "/usr/lib/galera", "/usr/lib64/galera-4", "/usr/lib64/galera")
        program("rsync")  # Without this check, only a log would show that it is missing.
        self.process = None
        try:
            super().__init__(folder)
        except BaseException:
            self.close()
            raise

    def initialize(self) -> None:
        self.port = free_port()
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
            "tmpdir": self.folder,  # In a shared folder, a server that starts removes the files of others.
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
            "innodb_log_file_size": "8M",  # It is copied as well.
            # Sufficient if only the process is killed, not the machine.
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
        """Return when the node is up to date and takes part in the cluster."""
        super().start()
        self.wait_until_synced()

    def wait_until_synced(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            with suppress(DBAPIError):  # A node that is not ready refuses SQLAlchemy's first statement.
                if self.status("local_state_comment") == "Synced":
                    return
            assert time.monotonic() < deadline, self.log.read_text(errors="replace")
            time.sleep(0.02)

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Disconnect the node from the others, but not from its clients. It catches up at the end of the block."""
        options = {"host": "127.0.0.1", "port": self.port, "user": self.administrator}
        with closing(pymysql.connect(**options, autocommit=True)) as connection, closing(connection.cursor()) as cursor:
            cursor.execute("SET GLOBAL wsrep_provider_options = 'gmcast.isolate=1'")
            try:
                yield
            finally:
                cursor.execute("SET GLOBAL wsrep_provider_options = 'gmcast.isolate=0'")
                self.wait_until_synced()

    def recover(self) -> None:
        """Find out where it stopped, as the systemd unit and mysqld_safe do: otherwise, all data would be copied."""
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
                os.killpg(self.process.pid, signal.SIGKILL)  # Includes the scripts that send and receive copies.
        super().close()

    def ask(self, query: str) -> str:
        """The last column of the only row of a query."""
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
        self.port = free_port()
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
        # The check reads "wsrep_local_state", which is 4 if the node is Synced. A node that is cut off, that receives
        # missed changes or that sends a copy also accepts connections and logins, so "check" and "option mysql-check"
        # consider it healthy. The usual script behind HTTP (clustercheck) would require another program.
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
            # A pool's connections live long: a node that has rejoined gets new connections until it has its share.
            "    balance leastconn",
            "    option tcp-check",
            "    tcp-check connect",
            "    tcp-check expect binary 0000000a",  # The greeting: packet 0, version 10 of the protocol.
            f"    tcp-check send-binary {_packet(1, login)}",
            "    tcp-check expect binary 00000200",  # OK, packet 2.
            # Ends with COM_QUIT: otherwise, HAProxy would wait after a wrong answer as it does for a late one.
            f"    tcp-check send-binary {_packet(0, query)}{_packet(0, COM_QUIT)}",
            f"    tcp-check expect binary {synced.hex()}",
            # Otherwise, clients of a node that was cut off would continue to wait for it.
            "    default-server inter 250ms fall 3 rise 2 on-marked-down shutdown-sessions",
            *(f"    server {node.name} 127.0.0.1:{node.port} check" for node in nodes),
        ]
        return "\n".join(lines) + "\n"

    def close(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)


class Cluster:
    """Nodes and balancer, all of them running.

    :param stack: closes them at its end.
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
        """The balancer's URL: leads to any node."""
        return self.nodes[0].url.set(port=self.balancer.port)

    def wait_until_balanced(self, nodes: list[Node]) -> None:
        """Return when the balancer uses exactly these nodes."""
        expected = {node.name for node in nodes}
        deadline = time.monotonic() + PATIENCE
        while (found := {self._connect() for _ in range(2 * NODES)}) != expected:
            log = self.balancer.log.read_text(errors="replace")
            assert self.balancer.process.poll() is None, log
            assert time.monotonic() < deadline, f"expected {expected}, found {found}: {log}"
            time.sleep(0.02)

    def _connect(self) -> str:
        """The name of the node that the balancer has chosen, or the error."""
        try:
            with create_engine(self.url, poolclass=NullPool).connect() as connection:
                return str(connection.scalar(text("SELECT @@wsrep_node_name")))
        except DBAPIError as error:
            return repr(error.orig)

    def kill(self, node: Node) -> None:
        node.stop(node.crash)

    def rejoin(self, node: Node) -> None:
        """Return when the node is up to date and takes part in the cluster."""
        node.recover()
        node.start()


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(stack)
