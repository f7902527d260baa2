"""The tenants whose applications are kept: made at first use, and forgotten when they are idle, or too many."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from .._database.forks import fork_safe_lock
from .application import TenantApplication, now

__all__ = ["TenantTable"]


class TenantTable:
    """The applications of tenants, by their names.

    :param make: makes one.
    :param idle: after how many seconds without a request it is forgotten.
    :param most: how many may have connections of their own.
    """

    def __init__(self, make: Callable[[str, TenantTable], TenantApplication], idle: float, most: int) -> None:
        self._make = make
        self._idle = idle
        self._most = most
        self._lock = fork_safe_lock()
        self.applications: dict[str, TenantApplication] = {}
        #: those that have created an engine of their own
        self._opened: dict[str, TenantApplication] = {}
        #: when to look for idle ones, by :data:`~.application.now`
        self.next_sweep = now() + idle / 2

    def find(self, name: str) -> TenantApplication:
        """The application of a tenant, made now if there is none. The name has been checked."""
        application = self.applications.get(name)
        if application is None:
            with self._lock:
                application = self.applications.get(name)
                if application is None:
                    self._make_room()
                    application = self._make(name, self)
                    for source in application.named_sources().values():
                        source.on_creation(partial(self._note_engine, application))
                    self.applications[name] = application
                    if application.open_engines():
                        self._opened[name] = application
        return application

    def _note_engine(self, application: TenantApplication, engine: Any) -> None:
        if self.applications.get(application.tenant) is application:
            self._opened[application.tenant] = application

    def keep(self, application: TenantApplication) -> None:
        """Keep an application that was forgotten and is used, unless another one has its name by now, or nobody."""
        if not application.is_known:
            return
        with self._lock:
            kept = self.applications.setdefault(application.tenant, application)
            if kept is application and application.open_engines():
                self._opened[application.tenant] = application

    def sweep(self, known: Collection[str]) -> None:
        """Forget the idle ones, those of no known name, and the longest idle ones if there are too many.

        :param known: the names of all tenants.
        """
        with self._lock:
            at = now()
            self.next_sweep = at + self._idle / 2
            for name, application in list(self.applications.items()):
                if name not in known:
                    self._remove(application)
                elif at - application.last_used >= self._idle:
                    self._forget(application)
            self._make_room(0)

    def relieve(self) -> None:
        """Forget the longest idle ones if there are too many: those that were in use, or had no connection before."""
        # Not waited for: the garbage collector may end a scope at any time, also where another lock is held.
        if len(self._opened) > self._most and self._lock.acquire(blocking=False):
            try:
                self._make_room(0)
            finally:
                self._lock.release()

    def _remove(self, application: TenantApplication) -> None:
        """Have nobody find an application. Who uses it goes on, and the last one closes its connections."""
        application.is_known = False
        if not self._forget(application):
            self.applications.pop(application.tenant, None)
            self._opened.pop(application.tenant, None)

    def _make_room(self, wanted: int = 1) -> None:
        excess = len(self._opened) + wanted - self._most
        if excess > 0:
            for application in sorted(self._opened.values(), key=lambda each: each.last_used):
                excess -= self._forget(application)
                if excess <= 0:
                    break

    def _forget(self, application: TenantApplication) -> bool:
        """Forget an application and close its connections, unless it is in use."""
        name = application.tenant
        if application.is_in_use() or self.applications.get(name) is not application:
            return False
        # A scope that begins notes itself first, and looks here then. So one of the two sees the other.
        del self.applications[name]
        if application.is_in_use():  # pragma: no cover  # between two lines
            self.applications[name] = application
            return False
        self._opened.pop(name, None)
        application.close_idle()
        return True

    def close(self) -> None:
        """Close the idle connections of all of them."""
        with self._lock:
            for application in list(self.applications.values()):
                application.close_idle()
