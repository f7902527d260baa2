"""When the connection goes back to the pool before the response is closed.

A client may take an hour to read its response, and a server may close the response only then. So a transaction that has
only read ends as soon as the response is known to be complete: before its last chunk, or the whole of it, is handed to
the server. In a stream of events, which may stay open for hours and mostly waits, each event is a unit: the transaction
ends before the first one, and at the end of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from types import GeneratorType
from typing import Any, cast

from .._dependencies import innermost_transaction
from .._scope.scope import Scope
from .._sessions.release import end_known_reading, end_reading, has_handed_out
from .._wsgi.bodies import LIST_ITERATORS, close_quietly, content_length
from .._wsgi.event_stream import unit_ends
from .._wsgi.file_wrapper import is_whole_file
from .._wsgi.held_head import BODILESS
from .ending import log_failure

__all__ = ["end_with_call", "steps"]

_END = cast(bytes, object())


def end_with_call(scope: Scope, body: Iterable[bytes], kind: type) -> None:
    """End what has only read before a response is handed to the server, if it is known to be complete then.

    The scope has a session, and is current.

    :param kind: the class of ``body``.
    """
    session: Any = scope.session
    if innermost_transaction(session) is None or scope.transaction is not None:
        return  # Nothing is open, or a transaction is in charge that ends by itself.
    try:
        if kind is list or kind is tuple:
            # No code of the application follows that could see that its objects are not expired.
            end_known_reading(session, expire=False)
        elif is_whole_file(body):
            end_known_reading(session)
        elif (
            scope.headers is not None
            and unit_ends(scope.headers, scope.owner.streams) is not None
            # The first event may be made with a connection that the call has got.
            and not has_handed_out(session)
        ):
            end_reading(scope)
    except Exception as error:
        log_failure(scope, "session.remove", error)
    except BaseException:
        close_quietly(body)
        raise


def steps(scope: Scope, body: Iterable[bytes]) -> Iterator[bytes]:
    """The steps of a response's body. This is called in the first of them.

    A body that has not used the session by the end of its first step is left alone.
    """
    iterator = iter(body)
    kind = type(iterator)
    if kind is not GeneratorType:
        iterator = iter(iterator.__next__, _END)  # As callable_again(), without a call for each request.
    headers = scope.headers
    if scope.session is None or headers is None:
        # An application that is a generator calls start_response() in its first step.
        first = next(iterator, _END)
        if first is _END:
            return iter(())
        headers = scope.headers
        iterator = chain((first,), iterator)
    if headers is None:
        return iterator
    ends = unit_ends(headers, scope.owner.streams)
    if ends is not None:
        return _give_back_after_units(scope, iterator, ends)
    return iterator if scope.session is None else _give_back_at_end(scope, iterator, kind in LIST_ITERATORS)


def _give_back_after_units(scope: Scope, iterator: Iterator[bytes], ends: Callable[[bytes], bool]) -> Iterator[bytes]:
    for chunk in iterator:
        if ends(chunk):
            end_reading(scope)
        yield chunk


def _give_back_at_end(scope: Scope, iterator: Iterator[bytes], is_complete: bool) -> Iterator[bytes]:
    """Give back the connection before the chunk leaves that completes the response; if there is none, at the end.

    :param is_complete: whether no code of the application runs in the steps.
    """
    environ: Any = scope.environ
    missing = content_length(scope.headers or ())
    if is_complete or scope.status.startswith(BODILESS) or environ.get("REQUEST_METHOD") == "HEAD":
        missing = 0  # Or the client gets no more than the head.
    if missing is None:
        yield from iterator
        return
    for chunk in iterator:
        missing -= len(chunk or b"")
        if missing <= 0:
            _end(scope)
            yield chunk
            yield from iterator
            return
        yield chunk
    _end(scope)


def _end(scope: Scope) -> None:
    session = scope.session
    if session is not None and scope.transaction is None:
        try:
            end_known_reading(session)
        except Exception as error:
            log_failure(scope, "session.remove", error)
