"""Free ports for the tests' servers."""

from __future__ import annotations

import os
import random
import re
import socket
from contextlib import suppress

# Below the ports that the system gives to clients (Linux: ip_local_port_range, from 32768): one of those may be taken
# by any outgoing connection before the test's server listens on it.
FIRST, LAST = 16_384, 32_767
#: The number of ports that each process of pytest-xdist has, so that no two processes use the same port.
SHARE = 1024


def _share() -> range:
    worker = re.search(r"\d+$", os.environ.get("PYTEST_XDIST_WORKER", ""))
    number = 1 + int(worker[0]) if worker else 0
    start = FIRST + number * SHARE % (LAST + 1 - FIRST)
    return range(start, start + SHARE)


_ports = _share()
#: Another run on this machine probably starts elsewhere.
_next = random.randrange(SHARE)


def free_port() -> int:
    """A port of this machine that no server listens on. No port is reused before all others."""
    global _next
    for _ in _ports:
        port = _ports[_next]
        _next = (_next + 1) % SHARE
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"no port from {_ports[0]} to {_ports[-1]} is free")
