"""``local``, ``local_manager`` and ``application``: the names of the pattern that Werkzeug's documentation published.

Behind them is the variable of :mod:`.scope`. This is the only module that imports :mod:`werkzeug.local`.
"""

from __future__ import annotations

from typing import Any

from werkzeug.local import Local, LocalManager, LocalProxy, release_local

from .._dependencies import current_object
from .protocols import Application
from .scope import current

__all__ = ["application", "local", "local_manager", "release_local"]


class ApplicationProxy(LocalProxy[Application]):
    """The :class:`~sqlasession_middleware.SQLASessionMiddleware` that owns the current scope.

    It is one in a request, and in ``with app.context():``. Elsewhere its attributes raise a :exc:`RuntimeError`.
    """

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        try:
            found = current_object(self)
        except RuntimeError as error:
            if name.startswith("__"):  # help() and inspect ask for such names, and take this as "no".
                raise AttributeError(name) from error
            raise
        return getattr(found, name)


local = Local(current)
local_manager = LocalManager([local])
application = ApplicationProxy(
    local,
    "application",
    unbound_message=(
        "No application is bound here: this code runs outside of a request, or its request is over, or it runs where no"
        " SQLASessionMiddleware is around it. Run it inside of one, or in 'with app.context():'."
    ),
)
