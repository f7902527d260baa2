"""The examples of jobs, in the workers of Celery and RQ, which fork."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from sqlalchemy import func, insert, select

from sqlasession_middleware import session

from ..ports import free_port
from ..test_examples import imported
from .own_servers import program
from .servers import PATIENCE, ROOT, end_group

JOBS = ROOT / "examples" / "jobs"
SCRIPTS = Path(sysconfig.get_path("scripts"))
ORDERS = 6

#: The commands that the example shows, with what makes them quick, and what hands over a job.
QUEUES = {
    "celery": (
        [str(SCRIPTS / "celery"), "--app", "warm", "worker", "--concurrency", "2", "--without-gossip"],
        "import celery_app; celery_app.confirm_order.delay({})",
    ),
    "rq": (
        [str(SCRIPTS / "rq"), "worker", "--quiet", "--url", "{redis}"],
        "import redis, rq; rq.Queue(connection=redis.Redis.from_url('{redis}')).enqueue('warm.confirm_order', {})",
    ),
}
#: A parent that has connected already shares nothing with its children.
WARM = """
from sqlalchemy import text
from sqlasession_middleware import session
from shop_jobs import *
try:
    from celery_app import app
except ImportError:
    pass
database.run(lambda: session.execute(text("SELECT 1")))
"""


@contextmanager
def redis(folder: Path) -> Iterator[str]:
    port = free_port()
    command = [program("redis-server"), "--port", str(port), "--save", "", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        end = time.monotonic() + PATIENCE
        with Redis(port=port) as client:
            while True:
                try:
                    client.ping()
                    break
                except RedisConnectionError:
                    assert process.poll() is None
                    assert time.monotonic() < end
                    time.sleep(0.02)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        end_group(process)


@pytest.mark.parametrize("queue", QUEUES)
def test_each_job_is_done_once_by_a_worker_that_forks(
    queue: str, server_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", server_url)
    (tmp_path / "warm.py").write_text(WARM)
    with ExitStack() as stack:
        jobs = stack.enter_context(imported(JOBS, "shop_jobs"))
        jobs.database.init_database()
        stack.callback(jobs.database.dispose)
        stack.callback(jobs.database.drop_database)
        orders = [{"id": number} for number in range(1, ORDERS + 1)]
        jobs.database.run(lambda: session.execute(insert(jobs.Order), orders))
        url = stack.enter_context(redis(tmp_path))
        environ = {
            **os.environ,
            "REDIS_URL": url,
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, JOBS, tmp_path))),
        }
        command, enqueue = QUEUES[queue]
        enqueue = "; ".join(enqueue.replace("{redis}", url).replace("{}", str(order["id"])) for order in orders)
        subprocess.run([sys.executable, "-c", enqueue], env=environ, check=True, timeout=PATIENCE)
        log = stack.enter_context((tmp_path / "log").open("wb"))
        worker = subprocess.Popen(
            [part.replace("{redis}", url) for part in command],
            cwd=tmp_path,
            env=environ,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        stack.callback(end_group, worker)

        def done() -> int:
            count: int = session.scalar(select(func.count()).where(jobs.Order.confirmations == 1))
            return count

        end = time.monotonic() + PATIENCE
        while jobs.database.run(done) < ORDERS:
            assert worker.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.05)


def test_commands_are_those_of_the_example() -> None:
    shown = (JOBS / "shop_jobs.py").read_text("utf-8")
    assert "    celery --app celery_app worker\n" in shown
    assert "    rq worker\n" in shown
