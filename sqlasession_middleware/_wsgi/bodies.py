"""The bodies of responses: how they are iterated, split, and closed (PEP 3333)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from types import GeneratorType

__all__ = ["LIST_ITERATORS", "HeldBody", "callable_again", "close_quietly", "content_length", "first_chunk", "iterate"]

logger = logging.getLogger("sqlasession_middleware.bodies")

#: The iterators of lists and tuples. No code of the application runs in their steps.
LIST_ITERATORS: tuple[type, ...] = (type(iter([])), type(iter(())))

# A sentinel, not None: if an application yields None by mistake, the server has to report it.
_END = object()


def iterate(body: Iterable[bytes]) -> Iterator[bytes]:
    """Return an iterator over ``body`` that several loops can continue.

    Some iterators of applications and frameworks have no ``__iter__()``, or allow only one call of it.
    """
    iterator = iter(body)
    return iterator if type(iterator) is GeneratorType else callable_again(iterator)


def callable_again(iterator: Iterator[bytes]) -> Iterator[bytes]:
    """The same iterator, with an ``__iter__()`` that may be called again."""
    return iter(iterator.__next__, _END)


class HeldBody:
    """A body whose first chunks were read already: it yields these, then the rest.

    :param chunks: the chunks that were read.
    :param rest: the iterator that they were read from.
    :param body: the body of the application, which :meth:`close` closes.
    """

    def __init__(self, chunks: list[bytes], rest: Iterator[bytes], body: object) -> None:
        self._chunks = chunks
        self._rest = rest
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        yield from self._chunks
        self._chunks = []
        yield from self._rest

    def close(self) -> None:
        """Close the application's body, if it has a ``close()``."""
        close = getattr(self._body, "close", None)
        if close is not None:
            close()


def first_chunk(iterator: Iterator[bytes]) -> list[bytes]:
    """Return the first chunk that is not empty, in a list, or an empty list at the end of the body.

    Empty chunks are dropped: a server sends the head only with the first chunk that is not empty (PEP 3333).
    """
    for chunk in iterator:
        if chunk:
            return [chunk]
    return []


def content_length(headers: Iterable[tuple[str, str]]) -> int | None:
    """Return the ``Content-Length`` of a response in bytes, or None if it has none that is valid."""
    for name, value in headers:
        if len(name) == 14 and name.lower() == "content-length":
            return int(value) if value.strip().isdecimal() else None
    return None


def close_quietly(body: object) -> None:
    """Close a body that is not handed to the server. An exception is logged."""
    close = getattr(body, "close", None)
    if close is not None:
        try:
            close()
        except Exception:
            logger.exception("The body of a failed response could not be closed")
