"""Connections that were forgotten on the way to their server, which nobody has said to be closed (G17)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any
from wsgiref.types import StartResponse, WSGIEnvironment

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from werkzeug.test import Client

from sqlasession_middleware import SQLASessionMiddleware, session
from sqlasession_middleware._database import liveness

from ..drivers import Row, rows_of
from .proxy import Proxy

PORTS = {"postgresql": 5432, "mariadb": 3306}


def ask(app: SQLASessionMiddleware) -> None:
    assert Client(app).get(buffered=True).data == b"done"


@pytest.fixture
def proxy(row: Row) -> Iterator[Proxy]:
    url = row.url()
    with Proxy(row.server, str(url.host), url.port or PORTS[row.server]) as running:
        yield running


def reads(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    session.execute(text("SELECT 1"))
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"done"]


# Not with MariaDB Connector/Python: it keeps Python's lock while it reads rows, which this process forwards.
@pytest.mark.parametrize("row", rows_of("psycopg", "psycopg2", "pymysql", "MySQLdb"))
@pytest.mark.parametrize(
    ("idle", "more", "fails"),
    [
        pytest.param(59, {}, True, id="after a moment"),
        pytest.param(61, {}, False, id="after a minute"),
        pytest.param(61, {"ping_after": 300}, True, id="after a minute that the application allows"),
        pytest.param(1e9, {"ping_after": None}, True, id="after any time"),
        pytest.param(0, {"ping_after": 0}, False, id="when each use is pinged"),
        # It is met as any connection that was lost in a request.
        pytest.param(59, {"transaction": {"attempts": 2}}, False, id="when the request is repeated"),
    ],
)
def test_connection_that_was_forgotten_on_the_way_is_found_out(
    idle: float, more: dict[str, Any], fails: bool, row: Row, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has said that it is closed: the socket has nothing to read."""
    now = [1000.0]
    monkeypatch.setattr(liveness, "_seconds", lambda: now[0])
    # The proxy cannot read TLS, which PyMySQL asks for.
    options = {"connect_args": {"ssl_disabled": True} if row.module == "pymysql" else {}}
    app = SQLASessionMiddleware(reads, row.url().set(host=proxy.host, port=proxy.port), engine_options=options, **more)
    ask(app)
    proxy.forget()
    now[0] += idle
    if fails:
        with pytest.raises(DBAPIError):
            ask(app)
    for _ in range(3):
        ask(app)
    app.dispose()
