"""The view predicates of pyramid_tm and pyramid_retry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyramid.exceptions import ConfigurationError
from pyramid.request import Request

from .names import is_error_retryable, is_last_attempt, is_tm_active

__all__ = ["PREDICATES"]


def _is_retryable(request: Request) -> bool:
    return is_error_retryable(request, getattr(request, "exception", None))


def _predicate(name: str, ask: Callable[[Request], bool]) -> type[Any]:
    class Predicate:
        """A view that is called only if the answer is ``wanted``."""

        def __init__(self, wanted: Any, config: Any) -> None:
            if not isinstance(wanted, bool):
                raise ConfigurationError(f"The view predicate {name!r} must be True or False, got {wanted!r}.")
            self.wanted = wanted

        def text(self) -> str:
            return f"{name} = {self.wanted}"

        phash = text

        def __call__(self, context: object, request: Request) -> bool:
            return ask(request) is self.wanted

    return Predicate


#: The classes of the predicates, by their names, and the package that they come from.
PREDICATES = {
    "tm_active": (_predicate("tm_active", is_tm_active), "pyramid_tm"),
    "last_retry_attempt": (_predicate("last_retry_attempt", is_last_attempt), "pyramid_retry"),
    "retryable_error": (_predicate("retryable_error", _is_retryable), "pyramid_retry"),
}
