"""The pools of an application's engines, as they are now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.pool import QueuePool

from .._database.breaker import breaker_state
from .._database.secrets import shown_url
from .._dependencies import max_overflow

__all__ = ["pools_of"]


def pools_of(engines: Mapping[str, Engine]) -> list[dict[str, Any]]:
    """What is known of each pool.

    :param engines: by their names.
    """
    return [_pool_of(name, engine) for name, engine in engines.items()]


def _pool_of(name: str, engine: Engine) -> dict[str, Any]:
    pool = engine.pool
    told: dict[str, Any] = {
        "engine": name,
        "url": shown_url(engine.url),
        "pool": type(pool).__name__,
        "used": None,
        "idle": None,
        "most": None,
        "breaker": breaker_state(engine),
    }
    if isinstance(pool, QueuePool):
        overflow = max_overflow(pool)
        told |= {"used": pool.checkedout(), "idle": pool.checkedin()}
        told["most"] = pool.size() + overflow if overflow >= 0 and pool.size() else None
    return told
