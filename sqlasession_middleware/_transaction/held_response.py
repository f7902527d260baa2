"""The beginning of a response, held back until it is known when to commit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from types import GeneratorType
from typing import NamedTuple

from .._wsgi.bodies import LIST_ITERATORS, callable_again, content_length, first_chunk
from .._wsgi.event_stream import unit_ends
from .._wsgi.held_head import HeldHead

__all__ = ["HeldResponse", "hold_response"]


class HeldResponse(NamedTuple):
    """The beginning of a response.

    :param chunks: the chunks that were taken from the body and are not released yet.
    :param rest: the chunks that follow; None if there are none.
    :param is_complete: whether ``chunks`` complete the response: it is committed before they are released.
    :param missing: the number of bytes of ``rest`` that complete the response; None if only the end of ``rest`` does.
    :param ends_unit: in a stream of units, returns whether a unit ends with a chunk.
    """

    chunks: list[bytes]
    rest: Iterator[bytes] | None = None
    is_complete: bool = True
    missing: int | None = None
    ends_unit: Callable[[bytes], bool] | None = None


def hold_response(head: HeldHead, body: Iterable[bytes], unit_types: Collection[str]) -> HeldResponse:
    """Take chunks from a body until it is known when to commit.

    :param head: the head of the response, with the data that was passed to ``write()``.
    :param unit_types: content types whose chunks are units, in addition to ``text/event-stream``.
    :raises AssertionError: if the application has not called ``start_response()``.
    """
    iterator = iter(body)
    kind = type(iterator)
    if kind is not GeneratorType:
        iterator = callable_again(iterator)
    chunks = first_chunk(iterator)
    # Nothing is to come of what is in a list, as in that of Django's responses.
    is_exhausted = not chunks or kind in LIST_ITERATORS
    if is_exhausted:
        chunks += iterator
    head.check()
    if head.written:
        chunks[:0] = head.written
        head.written = []
    if is_exhausted:
        return HeldResponse(chunks)
    length = content_length(head.headers)
    missing = None if length is None else length - (head.sent if head.released else 0) - sum(map(len, chunks))
    is_reached = missing is not None and missing <= 0
    if is_reached:
        # May still raise or write to the database.
        surplus = first_chunk(iterator)
        if not surplus:
            return HeldResponse(chunks)
        chunks += surplus
    ends_unit = unit_ends(head.headers, unit_types)
    has_no_body = head.has_no_body()
    if is_reached or has_no_body:
        if has_no_body and ends_unit is None:
            # The client does not get the rest, but the application's code still has to run.
            for _ in iterator:
                pass
            return HeldResponse(chunks)
        return HeldResponse(chunks, iterator, ends_unit=ends_unit)
    return HeldResponse(chunks, iterator, False, None if ends_unit is not None else missing, ends_unit)
