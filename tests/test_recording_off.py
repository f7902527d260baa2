"""What is not asked for costs nothing, counted in instructions of Python: not where it could be imported, either."""

from __future__ import annotations

import subprocess
import sys

#: Counts the instructions of a request, before and after another application of the process is recorded, has its
#: statements commented and is measured.
SCRIPT = """
import sys

from opentelemetry.sdk.metrics import MeterProvider
from sqlalchemy import text

from sqlasession_middleware import SQLASessionMiddleware, session


def app(environ, start_response):
    session.execute(text("SELECT 1")).all()
    session.commit()
    start_response("200 OK", [])
    return [b"done"]


def serve(wrapped):
    result = wrapped({"REQUEST_METHOD": "GET", "PATH_INFO": "/"}, lambda status, headers, exc_info=None: None)
    list(result)
    result.close()


def count(wrapped):
    found = 0

    def trace(frame, event, argument):
        nonlocal found
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        found += event == "opcode"
        return trace

    for _ in range(20):  # Python's specialization, and SQLAlchemy's caches.
        serve(wrapped)
    sys.settrace(trace)
    serve(wrapped)
    sys.settrace(None)
    return found


plain = SQLASessionMiddleware(app, "sqlite://")
count(plain)  # Python 3.12 counts no instructions until a frame has asked for them once.
before = count(plain)
is_imported = "sqlasession_middleware._recording.listeners" in sys.modules
recorded = SQLASessionMiddleware(
    app, "sqlite://", server_timing=True, slow_requests={"seconds": 60}, sql_comments={"application": "shop"}
)
from sqlasession_middleware import metrics

metrics.observe(recorded, MeterProvider())
more = count(recorded)
print(is_imported, before > 1000, count(plain) - before, more > before)
"""


def test_request_that_is_not_recorded_takes_not_one_instruction_more() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("False True 0 True\n", "")
