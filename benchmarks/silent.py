"""A site whose database goes silent: what becomes of its pages, with this library and with plain Flask-SQLAlchemy.

Run ``python benchmarks/silent.py`` with PostgreSQL as for the tests, after ``pip install -r
benchmarks/requirements.txt``. gunicorn serves a Flask application with eight threads, behind a gate that loses all
packets for some seconds. Clients ask for a page with one query and for a page without a database all the while.
"""

from __future__ import annotations

import argparse
import http.client
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sqlalchemy import make_url, text

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

THREADS = 8
#: Clients of each page: more than threads, as a site has.
CLIENTS = {"/database": 12, "/page": 1}
DEADLINE, BREAKER_SECONDS = 2.0, 5.0
#: Seconds after which a client gives up.
PATIENCE = 60.0


def make(name: str) -> Any:
    """The application, for gunicorn."""
    from flask import Flask

    flask = Flask(name)
    flask.add_url_rule("/page", "page", lambda: "done")
    url = os.environ["SILENT_URL"]
    if name == "ours":
        from sqlasession_middleware import SQLASessionMiddleware, session

        flask.add_url_rule("/database", "database", lambda: str(session.scalar(text("SELECT 1"))))
        unavailable = {"breaker_seconds": BREAKER_SECONDS}
        return SQLASessionMiddleware(flask, url, deadline=DEADLINE, unavailable=unavailable)
    from flask_sqlalchemy import SQLAlchemy

    flask.config["SQLALCHEMY_DATABASE_URI"] = url
    db = SQLAlchemy(flask)
    flask.add_url_rule("/database", "database", lambda: str(db.session.scalar(text("SELECT 1"))))
    return flask


def ask(port: int, path: str) -> tuple[str, float]:
    """The status, and how long it took; "none" if no answer came."""
    begun = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET", path)
        status = str(connection.getresponse().status)
    except OSError:
        status = "none"
    finally:
        connection.close()
    return status, time.monotonic() - begun


def ask_until(port: int, path: str, end: float) -> list[tuple[str, float]]:
    found = []
    while time.monotonic() < end:
        found.append(ask(port, path))
        time.sleep(0.02)
    return found


def measure(name: str, seconds: float) -> None:
    """Print what the clients of one application got."""
    from tests.databases import GIVEN
    from tests.integration.faulty_ways import Gate
    from tests.integration.servers import end_group
    from tests.ports import free_port

    url, port = make_url(GIVEN["postgresql"]), free_port()
    with Gate(str(url.host), url.port or 5432) as gate, ThreadPoolExecutor(sum(CLIENTS.values())) as clients:
        through = url.set(host="127.0.0.1", port=gate.port).render_as_string(hide_password=False)
        command = [sys.executable, "-m", "gunicorn", f"silent:make({name!r})", "--bind", f"127.0.0.1:{port}"]
        command += ["--workers", "1", "--worker-class", "gthread", "--threads", str(THREADS), "--timeout", "120"]
        environ = {**os.environ, "SILENT_URL": through, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
        process = subprocess.Popen(command, cwd=HERE, env=environ, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            while ask(port, "/database")[0] != "200":
                assert process.poll() is None, "gunicorn has ended"
                time.sleep(0.1)
            list(clients.map(lambda _: ask(port, "/database"), range(THREADS)))  # The pool has connections.
            gate.shut()
            end = time.monotonic() + seconds
            asking = {
                path: [clients.submit(ask_until, port, path, end) for _ in range(number)]
                for path, number in CLIENTS.items()
            }
            time.sleep(seconds)
            gate.open()
            opened = time.monotonic()
            answers = {path: [each for one in found for each in one.result()] for path, found in asking.items()}
            while ask(port, "/database")[0] != "200":
                time.sleep(0.05)
            print(f"{name}: recovered {time.monotonic() - opened:.1f} s after the database had come back")
            for path, found in answers.items():
                times = [took for _, took in found]
                counts = ", ".join(
                    f"{number} x {status}" for status, number in Counter(each for each, _ in found).items()
                )
                print(f"    {path:10} {counts}; median {statistics.median(times):.3f} s, longest {max(times):.1f} s")
        finally:
            end_group(process)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="how long the database is silent")
    for each in ("ours", "Flask-SQLAlchemy"):
        measure(each, parser.parse_args().seconds)
