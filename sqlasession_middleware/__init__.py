"""One SQLAlchemy session per request for any WSGI application, gone when the response closes."""

from typing import cast

from ._database.schema import metadata
from ._scope.deadline import remaining
from ._scope.local import application as _application
from ._scope.local import local, local_manager
from ._sessions.registry import has_scope, session
from ._sessions.release import release
from ._sessions.routed_scope import on_primary
from .middleware import SQLASessionMiddleware
from .transaction import after_commit, doom, repeat

__all__ = [
    "SQLASessionMiddleware",
    "after_commit",
    "application",
    "doom",
    "has_scope",
    "local",
    "local_manager",
    "metadata",
    "on_primary",
    "release",
    "remaining",
    "repeat",
    "session",
]

#: The version. setup.cfg reads it from here, so that it is known where nothing is installed, too.
__version__ = "0.1.0"

#: The middleware that owns the current scope: a proxy that is typed as what it leads to.
application = cast("SQLASessionMiddleware", _application)
