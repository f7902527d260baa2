"""Finds open transactions that a DROP TABLE in this thread would wait for forever."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator
from typing import Any

from sqlalchemy import Engine

from .._drivers.registry import driver_of
from .._scope.scope import RUNNING, WAITING, Scope, current, outwards
from .._sessions.connections import open_connections
from .._sessions.isolated_connection import IsolatedConnection
from ..errors import ScopeError

__all__ = ["refuse_to_wait"]


def refuse_to_wait(engines: Collection[Engine], function: str = "drop_database()") -> None:
    """Refuse to drop tables while an open response, a context around the call, or an isolation has a transaction.

    PostgreSQL and MariaDB would wait for the end of the transaction. SQLite raises an error by itself.

    :param engines: the engines to drop tables on.
    :param function: what is about to drop them, for the error.
    :raises ScopeError: if there is a transaction. The error names its owner.
    """
    pools = [
        engine.pool for engine in engines if driver_of(engine).server.is_networked and _has_connections_out(engine)
    ]
    for user in _users(pools) if pools else ():
        raise ScopeError(
            f"{function} would wait for {user}, which has a transaction open: close the response (or read it with"
            " buffered=True), or leave the block, first."
        )


def _has_connections_out(engine: Engine) -> bool:
    checked_out = getattr(engine.pool, "checkedout", None)  # Not every pool counts its connections.
    return checked_out is None or checked_out() > 0


def _users(pools: Collection[Any]) -> Iterator[str]:
    around = set(map(id, outwards(current.get(None))))  # By identity: a scope is a dict.
    # Only the garbage collector knows responses that are still open: a list of them would cost every request.
    for each in gc.get_objects():
        kind = type(each)
        if issubclass(kind, IsolatedConnection):
            if not each.closed and each.engine.pool in pools:
                yield "an isolated() block"
        elif issubclass(kind, Scope):
            session: Any = getattr(each, "session", None)
            # A scope that runs in another thread ends by itself.
            stays = session is not None and (each.state is WAITING or (each.state is RUNNING and id(each) in around))
            if stays and any(connection.engine.pool in pools for connection in open_connections(session)):
                yield _described(each)


def _described(scope: Scope) -> str:
    environ = scope.environ
    if environ is None:
        return f"a context of {scope.owner!r}"
    return f"the response to {environ.get('REQUEST_METHOD')} {environ.get('PATH_INFO')!r} of {scope.owner!r}"
