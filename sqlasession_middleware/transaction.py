"""One transaction per request: committed on success, rolled back otherwise, repeated where that may help.

.. code-block:: python

    app = SQLASessionMiddleware(app, "postgresql+psycopg://localhost/shop", transaction={"attempts": 3})

or, with other middleware in between, ``SQLASessionMiddleware(other(TransactionMiddleware(app)), …)``.

No complete success leaves before its transaction is durable. What the server gets from here is therefore held back:
the head until the first chunk is there, and whatever completes the response until the commit has succeeded.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import GeneratorType
from typing import TYPE_CHECKING, Any

from . import answers
from .bodies import HeldBody, close_quietly, content_length, first_chunk, iterate
from .context import ENDED, WAITING, Scope, current
from .errors import ConfigurationError, ScopeError, shown
from .failures import Failure, classify
from .files import is_file
from .head import Head
from .replay import Repeatable
from .routing import note_unknown_commit
from .sessions import current_scope, open_connections, remove_session
from .settings import check_seconds, resolve_option
from .streams import held_connections, release, unit_ends
from .watch import Noted, failure_of, read_only, watch_commits, watch_failures

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session, SessionTransaction

__all__ = ["TransactionMiddleware", "default_commit_veto", "doom", "release"]

logger = logging.getLogger(__name__)

CommitVeto = Callable[["WSGIEnvironment", str, list[tuple[str, str]]], object]

#: MySQL's and MariaDB's ER_LOCK_DEADLOCK.
DEADLOCK = 1213

#: The environ key with the number of the attempt, from 1.
ATTEMPT = "sqlasession.attempt"


def default_commit_veto(environ: WSGIEnvironment, status: str, headers: list[tuple[str, str]]) -> bool:
    """The rules of repoze.tm2: a header ``X-Tm`` decides, ``commit`` or anything else; else 4xx and 5xx are vetoed."""
    for name, value in headers:
        if len(name) == 4 and name.lower() == "x-tm":
            return value.strip().lower() != "commit"
    return status.startswith(("4", "5"))


def doom() -> None:
    """Roll back the current request's transaction at its end, even if the request succeeds.

    :raises ScopeError: where no transaction is in charge.
    """
    attempt = current_scope().transaction
    if attempt is None:
        raise ScopeError(
            "doom() needs a transaction: no TransactionMiddleware is in charge of this code, or it has ended already."
        )
    attempt.doomed = True


class TransactionMiddleware:
    """Commits the scope's session when the wrapped application succeeds.

    It stands inside of a :class:`~sqlasession_middleware.SQLASessionMiddleware`; met again in the same scope, it joins
    the transaction that is in charge.

    :param app: any WSGI application.
    :param commit_veto: called with environ, status and headers; true rolls back. Or its dotted name. None commits
        whatever the status.
    :param attempts: how often a request is tried in all, where the database says that a repetition may help.
    :param backoff_base: seconds; before the second attempt a random time up to this is waited, before each further
        one up to twice the time.
    :param backoff_cap: seconds; no wait is longer.
    :param activate: called with environ; false leaves the request without a transaction. Or its dotted name.
    :param retry_on: exceptions that are repeated beside those that the database is known for, or their dotted names.
    :raises ConfigurationError: if an option is wrong.
    """

    def __init__(
        self,
        app: WSGIApplication,
        *,
        commit_veto: CommitVeto | str | None = default_commit_veto,
        attempts: int = 1,
        backoff_base: float = 0.05,
        backoff_cap: float = 1.0,
        activate: Callable[[WSGIEnvironment], object] | str | None = None,
        retry_on: type[Exception] | str | Sequence[type[Exception] | str] = (),
    ) -> None:
        if not callable(app):
            raise ConfigurationError("app", f"must be a WSGI application, a callable, got {type(app).__name__}.")
        if type(attempts) is not int or attempts < 1:
            raise ConfigurationError("attempts", f"must be a whole number from 1, got {shown(attempts)}.")
        check_seconds("backoff_base", backoff_base)
        check_seconds("backoff_cap", backoff_cap)
        self.app = app
        self.attempts = attempts
        self.backoff_base = backoff_base
        self.backoff_cap = backoff_cap
        self.commit_veto: CommitVeto | None = resolve_option("commit_veto", commit_veto)
        self.activate: Callable[[WSGIEnvironment], object] | None = resolve_option("activate", activate)
        self.retry_on = _read_exceptions(retry_on)
        #: the application whose engines tell what they see; they are made at the first request, not before
        self._owner: object = None

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        scope = current.get(None)
        if not isinstance(scope, Scope) or scope.state is WAITING or scope.state is ENDED:
            raise ScopeError(
                "TransactionMiddleware has no session to commit: put it inside of a SQLASessionMiddleware,"
                " or give that one 'transaction=True'."
            )
        if scope.transaction is not None or (self.activate is not None and not self.activate(environ)):
            return self.app(environ, start_response)
        if scope.owner is not self._owner:
            watch_failures(scope.owner)
            if self.attempts > 1:
                watch_commits(scope.owner)
            self._owner = scope.owner
        if self.attempts > 1:
            return self._repeat(environ, start_response, scope)
        environ[ATTEMPT] = 1
        return Attempt(self, environ, start_response, scope).run()

    def _repeat(self, environ: WSGIEnvironment, start_response: StartResponse, scope: Scope) -> Iterable[bytes]:
        """Try up to ``attempts`` times; all but the last may end in :class:`_Again`."""
        request = Repeatable(environ, scope)
        for number in range(1, self.attempts):
            environ[ATTEMPT] = number
            try:
                return Attempt(self, environ, start_response, scope, request.is_repeatable).run()
            except _Again as again:
                wait = random.uniform(0, min(self.backoff_cap, self.backoff_base * 2 ** min(number - 1, 60)))
                logger.warning(
                    "Attempt %d of %d at %s %r failed and is repeated in %.3f s: %r",
                    number,
                    self.attempts,
                    environ.get("REQUEST_METHOD"),
                    environ.get("PATH_INFO"),
                    wait,
                    again.cause,
                    exc_info=again.cause,
                )
            request.restore()
            time.sleep(wait)
        environ[ATTEMPT] = self.attempts
        return Attempt(self, environ, start_response, scope).run()


class _Again(Exception):  # noqa: N818  # a signal to _repeat()
    """The attempt has failed, was rolled back and closed, and may be repeated."""

    def __init__(self, cause: BaseException) -> None:
        self.cause = cause


class Attempt(Head):
    """One attempt at a request: its transaction, and the head of its response while that is held back."""

    # Defaults of the class, so that an attempt that needs none of them does not pay for them.

    #: what the application returned
    body: Iterable[bytes] = ()
    #: how many commits have taken place, the middleware's own among them; counted only where attempts are repeated
    commits = 0
    #: whose commit was the last to be counted
    committing: Connection | None = None
    #: the session's transaction, if the database has rolled it back by itself
    rolled_back: SessionTransaction | None = None
    #: set by doom()
    doomed = False
    #: whether a part of the body is released before the transaction is concluded
    is_streaming = False
    #: of a stream of units: what tells where they end
    unit_ends: Callable[[bytes], bool] | None = None
    #: whether the first unit of such a stream has ended: each is committed by itself
    in_units = False
    #: whether the transaction was committed or rolled back for good
    concluded = False
    _veto: bool | None = None

    def __init__(
        self,
        middleware: TransactionMiddleware,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        scope: Scope,
        may_repeat: bool = False,
    ) -> None:
        self.start_response = start_response
        self.middleware = middleware
        self.environ = environ
        self.scope = scope
        self.may_repeat = may_repeat

    def run(self) -> Iterable[bytes]:
        """Call the application.

        :returns: what the server gets as the body.
        :raises _Again: if the attempt is to be repeated.
        """
        self.scope.transaction = self
        try:
            self.body = body = self.middleware.app(self.environ, self)
            kind = type(body)
            is_list = (kind is list or kind is tuple) and self.written is None
            chunks = body if is_list else self._hold(body)
            answer = self._answer_to_swallowed() if self.status.startswith("5") and not self.released else None
            if answer is not None:
                return answer
            if not self.is_streaming:
                self.conclude()
            elif self.in_units:
                self.end_unit()
            elif self.is_vetoed():
                self.roll_back()  # At once, so that its locks do not wait for the client.
            self.release()
            return chunks
        except _Again:
            raise
        except BaseException as error:
            failure = failure_of(error, self.scope.failure)
            self.abort(failure)
            self.close_body()
            if self.released or not isinstance(error, Exception):
                raise
            answer = self._answer_to(failure, error)
            if answer is None:
                raise
            return answer
        finally:
            if self.concluded:
                self.scope.transaction = None

    def _hold(self, body: Iterable[bytes]) -> Iterable[bytes]:
        """Take from a body what decides when to commit, and whether that is before anything is released."""
        if not self.written and is_file(self.environ, body):
            return body  # As it is, for the server to send by its own means. No code of the application is in it.
        iterator = iterate(body)
        chunks = first_chunk(iterator)
        exhausted = not chunks or type(body) in (list, tuple)
        if exhausted:
            chunks += iterator
        self.check()
        if self.written:
            chunks[:0] = self.written
            self.written = []
        length = content_length(self.headers)
        sent = (self.sent if self.released else 0) + sum(map(len, chunks))
        if not exhausted and length is not None and sent >= length:
            surplus = first_chunk(iterator)
            exhausted = not surplus
            chunks += surplus
            length = None
            complete = True
        else:
            complete = exhausted or self.has_no_body()
        self.unit_ends = None if exhausted else unit_ends(self.headers, self.scope.owner.streams)
        if complete and not exhausted and self.unit_ends is None and self.has_no_body():
            # Nobody is to see the rest, but it is the application's work all the same.
            for _ in iterator:
                pass
            exhausted = True
        if not complete:
            self.is_streaming = True
            if self.unit_ends is not None:
                length = None
                self.in_units = sum(map(self.unit_ends, chunks)) > 0
        if not exhausted:
            return AttemptBody(self, chunks, iterator, None if length is None else length - sent)
        if type(body) is GeneratorType or not hasattr(body, "close"):
            return chunks
        return HeldBody(chunks, iter(()), body)

    def has_no_body(self) -> bool:
        return self.environ.get("REQUEST_METHOD") == "HEAD" or super().has_no_body()

    def is_vetoed(self) -> bool:
        """Whether what was done is to be rolled back although nothing was raised."""
        if self._veto is None:
            veto = self.middleware.commit_veto
            self._veto = veto is not None and bool(veto(self.environ, self.status, self.headers))
        return self.doomed or self._veto

    def conclude(self) -> None:
        """Commit, or roll back what is vetoed.

        :raises Exception: if that failed. Then nothing was stored, unless that is not known.
        """
        self.check()
        opened = self.scope.session
        if opened is not None:
            if self.is_vetoed():
                self.roll_back()
            elif opened.in_transaction():
                if self.may_repeat and not opened.twophase and _has_several_to_commit(opened):
                    self.may_repeat = False  # Some of them may be committed when another one fails.
                opened.commit()
        self.concluded = True

    def end_unit(self) -> bool:
        """Commit what belongs to one unit of a stream.

        :returns: whether no connection is held any more.
        """
        opened = self.scope.session
        if opened is None:
            return True
        if opened.is_active and held_connections(opened) is None:
            return False
        if self.is_vetoed():
            self.roll_back()
        elif opened.in_transaction():
            opened.commit()
        return True

    def roll_back(self) -> None:
        """Undo what the session has done, whatever state it is in."""
        opened = self.scope.session
        if opened is not None:
            try:
                opened.rollback()
            except Exception:
                logger.exception("A transaction could not be rolled back: its connection is given up")
                self._remove_session()

    def abort(self, failure: Failure | None = None) -> None:
        """Roll back for good.

        :param failure: why.
        """
        self.concluded = True
        opened = self.scope.session
        if failure is Failure.UNKNOWN and opened is not None and opened.twophase:
            # The other databases have prepared, and one may have committed: they wait for somebody who can tell.
            opened.invalidate()
        else:
            self.roll_back()

    def close_body(self) -> None:
        """Close the body of a response that the server will not get."""
        body, self.body = self.body, ()
        close_quietly(body)

    def _remove_session(self) -> None:
        try:
            remove_session(self.scope)
        except Exception:
            logger.exception("A session could not be closed")

    def note_rolled_back(self, error: BaseException) -> None:
        """Remember that the database has rolled back the session's transaction by itself.

        MySQL and MariaDB do so at a deadlock, and not at a lock timeout ("InnoDB Error Handling"). What the application
        does after that would be committed, and what it has done before would not.
        """
        if DEADLOCK in (getattr(error, "errno", None), *error.args[:1]) and self.scope.session is not None:
            self.rolled_back = self.scope.session.get_transaction()

    def _answer_to_swallowed(self) -> Iterable[bytes] | None:
        """What to do about an error page that the application has made of a failure of the database.

        :returns: another answer, or None for the page.
        """
        noted = self.scope.failure or _failed_flush(self.scope)
        if noted is None:
            return None
        return self._answer_to(noted.failure, noted.error)

    def _answer_to(self, failure: Failure | None, cause: BaseException) -> Iterable[bytes] | None:
        """What to do about a failure that ends the attempt.

        :returns: another answer; None if there is nothing better than what the application did.
        :raises _Again: if the attempt is to be repeated.
        """
        if failure is Failure.UNKNOWN:
            self.abort(failure)
            self.close_body()
            logger.error("It is not known whether a transaction was committed: %s", cause, exc_info=cause)
            note_unknown_commit(self.scope)
            return answers.outcome_unknown()(self.environ, self.start_response)
        repeatable = failure in (Failure.TRANSIENT, Failure.LOST) or isinstance(cause, self.middleware.retry_on)
        if repeatable and self.may_repeat and self.commits == 0:
            self.abort()
            self.close_body()
            self._remove_session()
            raise _Again(cause)
        return None


class AttemptBody:
    """The body of a response with an attempt's transaction behind it, which ends before the body does.

    :param chunks: were taken from the body already, and may be released.
    :param rest: the rest of the body.
    :param missing: how many bytes of ``rest`` complete the response; None where only its end does.
    """

    def __init__(self, attempt: Attempt, chunks: list[bytes], rest: Iterator[bytes], missing: int | None) -> None:
        self._attempt = attempt
        self._chunks = chunks
        self._rest = rest
        self._missing = missing

    def __iter__(self) -> Iterator[bytes]:
        yield from self._chunks
        attempt, missing, ends = self._attempt, self._missing, self._attempt.unit_ends
        try:
            for chunk in self._rest:
                if missing is not None and not attempt.concluded:
                    missing -= len(chunk)
                    if missing <= 0:
                        # What comes after it is the application's last chance to fail, and to write.
                        held = [chunk, *first_chunk(self._rest)]
                        attempt.conclude()
                        yield from held
                        continue
                elif ends is not None and ends(chunk):
                    attempt.in_units = True
                    attempt.end_unit()
                yield chunk
            if not attempt.concluded:
                attempt.conclude()
            attempt.scope.transaction = None
        except GeneratorExit:
            raise  # Not the application's: nobody wants the rest. close() is still to come.
        except BaseException as error:
            failure = failure_of(error, attempt.scope.failure)
            if failure is Failure.UNKNOWN:
                logger.error("It is not known whether a transaction was committed: %s", error)
            attempt.abort(failure)
            raise

    def close(self) -> None:
        """Roll back what was not committed, and close the body."""
        attempt = self._attempt
        if not attempt.concluded:
            attempt.abort()
        attempt.scope.transaction = None
        body, attempt.body = attempt.body, ()
        close = getattr(body, "close", None)
        if close is not None:
            close()


def _has_several_to_commit(opened: Session) -> bool:
    held = open_connections(opened)
    return len(held) > 1 and sum(connection.engine not in read_only for connection in held) > 1


def _failed_flush(scope: Scope) -> Noted | None:
    """What made a flush fail, where no driver was involved (a StaleDataError), and the session still knows."""
    transaction = getattr(scope.session, "_transaction", None)
    error = getattr(transaction, "_rollback_exception", None)
    failure = None if error is None else classify(error)
    return None if error is None or failure is None else Noted(failure, error)


def _read_exceptions(given: Any) -> tuple[type[Exception], ...]:
    kinds = []
    for each in given if isinstance(given, list | tuple | set | frozenset) else (given,):
        kind = resolve_option("retry_on", each)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            raise ConfigurationError("retry_on", f"must be exception classes or their dotted names, got {shown(each)}.")
        kinds.append(kind)
    return tuple(kinds)
