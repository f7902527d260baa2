"""A replica that all tenants share, as one of them uses it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._database.replicas import Replica
from .binds import TenantSource

if TYPE_CHECKING:
    from .._database.cookie import LastWrite, ReadYourWritesCookie

__all__ = ["TenantReplica"]


class TenantReplica(Replica):
    """A shared replica with options of one tenant. Whether it is away, and what it has replayed, is found out once.

    :param shared: the replica.
    :param source: its engine, with the options of the tenant.
    """

    def __init__(self, shared: Replica, source: TenantSource) -> None:
        # Not the constructor of the class: it has no state of its own.
        self.source = source
        self.breaker = shared.breaker
        self._shared = shared

    def prepare(self) -> None:
        self._shared.prepare()

    @property
    def connects(self) -> int:
        return self._shared.connects

    def prove(self) -> None:
        self._shared.prove()

    def has(self, last_write: LastWrite, cookie: ReadYourWritesCookie) -> bool:
        return self._shared.has(last_write, cookie)
