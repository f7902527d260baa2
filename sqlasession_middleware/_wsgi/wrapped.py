"""What an application wraps or holds, as far as the attributes of middlewares and composites tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

__all__ = ["applications_in"]

#: What middlewares call the application that they wrap: most of them, those of Paste and Werkzeug's debugger, and a
#: Flask that is wrapped inside. Then the object of a bound method, and what a partial or a wrapper of functions calls.
_WRAPPED: Final = ("app", "application", "wsgi_app", "__self__", "func", "__wrapped__")
#: What composites call the applications that they hold: Werkzeug's dispatcher, and Paste's urlmap and cascade.
_MOUNTED: Final = ("mounts", "applications", "apps")
#: An object with attributes of any name has no end.
_LOOKED_AT_AT_MOST: Final = 1000


def applications_in(app: Any, leaf: type | tuple[type, ...] | None = None) -> Iterator[Any]:
    """An application and all that it wraps or holds, at any depth, the outermost first.

    :param leaf: a class, or several, of which nothing is looked at inside.
    """
    # By identity, because an application may be of a class that cannot be hashed. It is kept, or its id might become
    # another one's.
    seen: dict[int, Any] = {}
    left = [app]
    while left and len(seen) < _LOOKED_AT_AT_MOST:
        looked_at = left.pop(0)
        if id(looked_at) in seen:
            continue
        seen[id(looked_at)] = looked_at
        yield looked_at
        if leaf is None or not isinstance(looked_at, leaf):
            left += _inside(looked_at)


def _inside(app: Any) -> Iterator[Any]:
    for name in _WRAPPED:
        inner = _read(app, name)
        if inner is not None:
            yield inner
    for name in _MOUNTED:
        held = _read(app, name)
        if isinstance(held, Mapping):
            held = list(held.values())
        if isinstance(held, list | tuple):
            for each in held:
                # urlmap has each with its path.
                yield each[-1] if isinstance(each, tuple) and each else each


def _read(app: Any, name: str) -> Any:
    try:
        return getattr(app, name, None)
    except Exception:  # Such as a proxy that stands for nothing.
        return None
