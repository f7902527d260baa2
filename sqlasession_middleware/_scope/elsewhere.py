"""Finds the request that code runs in which has no scope: the middleware stands elsewhere in the pipeline.

Nothing but the stack tells. It is looked at when there is an error to explain.
"""

from __future__ import annotations

import sys
from inspect import currentframe

__all__ = ["is_in_flask_context", "request_without_scope"]

#: The keys that PEP 3333 requires, and nothing else has.
_REQUIRED = ("REQUEST_METHOD", "wsgi.input", "wsgi.url_scheme")


def is_in_flask_context() -> bool:
    """Whether a context of Flask is pushed."""
    flask = sys.modules.get("flask")
    return flask is not None and bool(flask.has_app_context())


def request_without_scope() -> str | None:
    """Return the request that the calling code runs in, such as ``"GET '/shop'"``; None if no server has called it."""
    frame = currentframe()
    while frame is not None:
        for value in list(frame.f_locals.values()):
            # Exactly a dict, as PEP 3333 requires: other mappings may do anything.
            if type(value) is dict and all(key in value for key in _REQUIRED):
                return f"{value['REQUEST_METHOD']} {value.get('PATH_INFO', '')!r}"
        frame = frame.f_back
    return None
