"""What environ tells of a request that has few values, however many requests there are; and its trace."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

__all__ = ["method_of", "route_of", "trace_finder"]

#: RFC 9110 and 5789. Clients may send any other word.
_METHODS: Final = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})

#: W3C, "Trace Context": version, trace, span, flags.
_TRACEPARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def method_of(environ: Mapping[str, Any]) -> str | None:
    """The method of a request, if it is one of HTTP's own."""
    method: str | None = environ.get("REQUEST_METHOD")
    return method if method in _METHODS else None


def route_of(environ: Mapping[str, Any]) -> str | None:
    """The pattern of the route, where the application or its framework has put it into environ; never the path."""
    route = environ.get("sqlasession.route")
    if route is not None:
        return str(route)
    # Flask's request has the rule; one of Werkzeug alone has no such attribute.
    rule = getattr(environ.get("werkzeug.request"), "url_rule", None) or environ.get("bottle.route")
    return None if rule is None else str(rule.rule)


def trace_finder() -> Callable[[Mapping[str, Any]], str | None]:
    """What tells the ``traceparent`` of a request: that of OpenTelemetry's current span, or else the client's."""
    try:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ImportError:
        return _trace_of_client
    inject = TraceContextTextMapPropagator().inject

    def find(environ: Mapping[str, Any]) -> str | None:
        found: dict[str, str] = {}
        inject(found)
        return found.get("traceparent") or _trace_of_client(environ)

    return find


def _trace_of_client(environ: Mapping[str, Any]) -> str | None:
    sent = environ.get("HTTP_TRACEPARENT", "")
    return sent if _TRACEPARENT.fullmatch(sent) else None
