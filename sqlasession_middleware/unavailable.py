"""A database that is out of reach is a 503, whatever the application makes of it.

.. code-block:: python

    app = SQLASessionMiddleware(app, "postgresql+psycopg://localhost/shop", unavailable=True)

Refused and lost connections, servers that start or stop, and an exhausted pool count; constraint, schema and login
errors stay what they are. See :mod:`sqlasession_middleware.failures`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from sqlalchemy.exc import DBAPIError

from . import answers
from .bodies import HeldBody, close_quietly, first_chunk, iterate
from .context import ENDED, WAITING, Scope, current
from .engines import without_passwords_of_urls
from .errors import ConfigurationError, shown
from .failures import Failure
from .files import is_file
from .head import Head
from .watch import failure_of, watch_failures

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["UnavailableMiddleware"]

logger = logging.getLogger(__name__)

_OUT_OF_REACH = (Failure.UNAVAILABLE, Failure.LOST)


class UnavailableMiddleware:
    """Answers 503 with Retry-After where the wrapped application cannot reach the database.

    Inside of a :class:`~sqlasession_middleware.SQLASessionMiddleware` it also sees through the error page that a
    framework has made of the failure; alone, it goes by the exception.

    :param app: any WSGI application.
    :param retry_after: seconds after which the client may try again.
    :raises ConfigurationError: if an option is wrong.
    """

    def __init__(self, app: WSGIApplication, *, retry_after: int = 10) -> None:
        if not callable(app):
            raise ConfigurationError("app", f"must be a WSGI application, a callable, got {type(app).__name__}.")
        if type(retry_after) is not int or retry_after < 0:
            raise ConfigurationError(
                "retry_after", f"must be a whole number of seconds from 0, got {shown(retry_after)}."
            )
        self.app = app
        self.retry_after = retry_after
        self._owner: object = None

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        found = current.get(None)
        scope = found if isinstance(found, Scope) and found.state not in (WAITING, ENDED) else None
        if scope is not None and scope.owner is not self._owner:
            watch_failures(scope.owner)
            self._owner = scope.owner
        head = Head(start_response)
        body: Iterable[bytes] = ()
        try:
            body = self.app(environ, head)
            kind = type(body)
            if kind is not list and kind is not tuple and not is_file(environ, body):
                iterator = iterate(body)
                chunks = first_chunk(iterator)
                whole: Iterable[bytes] = HeldBody(chunks, iterator, body)
            else:
                whole = body
        except Exception as error:
            noted = scope.failure if scope is not None else None
            if head.released or failure_of(error, noted) not in _OUT_OF_REACH:
                close_quietly(body)
                raise
            return self._answer(environ, start_response, body, error)
        except BaseException:
            close_quietly(body)
            raise
        if head.status.startswith("500") and not head.released and scope is not None and scope.failure is not None:
            failure, cause = scope.failure
            if failure in _OUT_OF_REACH:
                return self._answer(environ, start_response, body, cause)
        head.release()
        return HeldBody(head.written, iter(whole), body) if head.written else whole

    def _answer(
        self, environ: WSGIEnvironment, start_response: StartResponse, body: Iterable[bytes], cause: BaseException
    ) -> Iterable[bytes]:
        close_quietly(body)
        logger.error(
            "The database is out of reach: %s %r is answered with 503: %s",
            environ.get("REQUEST_METHOD"),
            environ.get("PATH_INFO"),
            _said_by_the_driver(cause),
            exc_info=cause,
        )
        return answers.unavailable(self.retry_after)(environ, start_response)


def _said_by_the_driver(error: BaseException) -> str:
    """What is the matter, on one line, where the application may have made another error of it."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    original = next((each.orig for each in causes if isinstance(each, DBAPIError) and each.orig is not None), error)
    return without_passwords_of_urls(" ".join(str(original).split()))
