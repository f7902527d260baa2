"""A site with a page that needs its database, and one that does not. gunicorn serves it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from wsgiref.types import StartResponse, WSGIEnvironment

from sqlalchemy import text

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware.unavailable import breaker_state

DEADLINE = 0.7
BREAKER_SECONDS = 1.5
PLAIN = [("Content-Type", "text/plain"), ("Content-Length", "4")]


def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """``/state`` is 503 while the database is out of reach, without asking it."""
    path, status = environ["PATH_INFO"], "200 OK"
    if path == "/database":
        session.execute(text("SELECT 1"))
    if path == "/state" and breaker_state(app.engine) != "closed":
        status = "503 Service Unavailable"
    start_response(status, PLAIN)
    return [b"done"]


logging.basicConfig(level=logging.WARNING)
app = SQLASessionMiddleware(
    answer,
    json.loads(os.environ.get("SERVED", '{"url": "sqlite://"}'))["url"],
    deadline=DEADLINE,
    unavailable={"breaker_seconds": BREAKER_SECONDS},
)
