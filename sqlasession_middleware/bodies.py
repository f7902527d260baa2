"""The bodies of responses: iterated as PEP 3333 has it, taken apart, and closed."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from types import GeneratorType

__all__ = ["HeldBody", "close_quietly", "content_length", "first_chunk", "iterate"]

logger = logging.getLogger(__name__)

# Not None: an application that yields that by mistake gets the server's error for it.
_END = object()


def iterate(body: Iterable[bytes]) -> Iterator[bytes]:
    """An iterator that several loops can share: some have no ``iter()`` of their own, or only once."""
    iterator = iter(body)
    return iterator if type(iterator) is GeneratorType else iter(iterator.__next__, _END)


class HeldBody:
    """Chunks that were taken from a body, and the rest of it, which is closed with them."""

    def __init__(self, chunks: list[bytes], rest: Iterator[bytes], body: object) -> None:
        self._chunks = chunks
        self._rest = rest
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        yield from self._chunks
        self._chunks = []
        yield from self._rest

    def close(self) -> None:
        """Close the body."""
        close = getattr(self._body, "close", None)
        if close is not None:
            close()


def first_chunk(iterator: Iterator[bytes]) -> list[bytes]:
    """The chunks up to the first that is not empty: before that one a server sends nothing. Empty at the end."""
    for chunk in iterator:
        if chunk:
            return [chunk]
    return []


def content_length(headers: Iterable[tuple[str, str]]) -> int | None:
    """The length that a response declares in bytes, if it does."""
    for name, value in headers:
        if len(name) == 14 and name.lower() == "content-length":
            return int(value) if value.strip().isdecimal() else None
    return None


def close_quietly(body: object) -> None:
    """Close the body of a response that the server will not get. A failure is logged."""
    close = getattr(body, "close", None)
    if close is not None:
        try:
            close()
        except Exception:
            logger.exception("The body of a failed response could not be closed")
