"""One SQLAlchemy session per request for any WSGI application, gone when the response closes."""

from .context import application, local, local_manager
from .middleware import SQLASessionMiddleware
from .routing import on_primary
from .schema import metadata
from .sessions import session
from .streams import release
from .transaction import doom

__all__ = [
    "SQLASessionMiddleware",
    "application",
    "doom",
    "local",
    "local_manager",
    "metadata",
    "on_primary",
    "release",
    "session",
]
