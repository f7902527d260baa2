"""The body of a response that is released before its transaction has ended."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from .._database.attribution import failure_of
from .._database.recovery import pending_failure
from .._wsgi.bodies import first_chunk
from ..failures import Failure
from .held_response import HeldResponse
from .request_transaction import RequestTransaction

__all__ = ["CommittingBody"]

logger = logging.getLogger("sqlasession_middleware.transaction")


class CommittingBody:
    """Commits before the chunk that completes the response, or after the last one.

    :param transaction: concluded at the end of the body, unless it already is.
    :param body: the application's body, which is closed with this one.
    :param held: the chunks that were already taken from the body, and the rest.
    """

    def __init__(self, transaction: RequestTransaction, body: Iterable[bytes], held: HeldResponse) -> None:
        self._transaction = transaction
        self._body = body
        self._held = held

    def __iter__(self) -> Iterator[bytes]:
        chunks, rest, _, missing, ends_unit = self._held
        yield from chunks
        transaction = self._transaction
        try:
            for chunk in rest or ():
                if missing is not None and not transaction.concluded:
                    missing -= len(chunk)
                    if missing <= 0:
                        # May still raise or write to the database.
                        completing = [chunk, *first_chunk(rest or iter(()))]
                        transaction.conclude()
                        yield from completing
                        continue
                elif ends_unit is not None and ends_unit(chunk):
                    transaction.in_units = True
                    transaction.end_unit()
                yield chunk
            if not transaction.concluded:
                transaction.conclude()
            transaction.scope.transaction = None
        except GeneratorExit:
            raise  # Not an error of the application: the client does not read the rest. close() follows.
        except BaseException as error:
            failure = failure_of(error, pending_failure(transaction.scope))
            if failure is Failure.UNKNOWN:
                logger.error("It is not known whether a transaction was committed: %s", error)
            transaction.abort(failure)
            raise

    def close(self) -> None:
        """Roll back what was not committed, and close the application's body."""
        transaction = self._transaction
        if not transaction.concluded:
            transaction.abort()
        transaction.scope.transaction = None
        body, self._body = self._body, ()
        close = getattr(body, "close", None)
        if close is not None:
            close()
