"""One SQLAlchemy session per request for any WSGI application, gone when the response closes."""

from .context import application, local, local_manager
from .middleware import SQLASessionMiddleware
from .schema import metadata
from .sessions import session

__all__ = ["SQLASessionMiddleware", "application", "local", "local_manager", "metadata", "session"]
