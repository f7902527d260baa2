"""``local``, ``local_manager`` and ``application``: the names of the pattern that Werkzeug's documentation published.

Behind them is the variable of :mod:`.scope`. This is the only module that imports :mod:`werkzeug.local`.
"""

from __future__ import annotations

from werkzeug.local import Local, LocalManager, LocalProxy, release_local

from .protocols import Application
from .scope import current

__all__ = ["application", "local", "local_manager", "release_local"]

local = Local(current)
local_manager = LocalManager([local])
application: LocalProxy[Application] = local(
    "application",
    unbound_message=(
        "No application is bound here: this code runs outside of a request, or its request is over."
        " Run it inside a request, or in 'with app.context():'."
    ),
)
