"""How the console of Werkzeug's debugger gets back into the scope of the request that failed."""

from __future__ import annotations

import threading
from typing import Any

from .._scope.protocols import Application
from .._scope.scope import Scope, current

__all__ = ["preserve"]


def preserve(scope: Scope, error: BaseException) -> None:
    """Hand a context for the failed request to Werkzeug's debugger, if one is around the application."""
    environ = scope.environ
    if environ is None or "werkzeug.debug.preserve_context" not in environ or not isinstance(error, Exception):
        return
    # Only the first scope that the error passes, the innermost: that is where the debugger's console opens.
    if environ.get("sqlasession.preserved") is not error:
        environ["sqlasession.preserved"] = error
        environ["werkzeug.debug.preserve_context"](PreservedContext(scope.owner, dict(scope)))


class PreservedContext(threading.local):
    """A failed request's scope, opened anew for each command in the console of Werkzeug's debugger.

    The debugger keeps it for as long as its page may be used, and enters it in the thread of each command. So no
    session or connection may live in it between two commands.

    :param owner: the application.
    :param values: of the Local.
    """

    # Python calls this again in each thread, with the arguments of the first call; by then a scope would have ended.
    def __init__(self, owner: Application, values: dict[str, Any]) -> None:
        self._owner = owner
        self._values = values

    def __enter__(self) -> None:
        self._context = self._owner.context()
        self._context.__enter__()
        current.get().update(self._values)

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)
