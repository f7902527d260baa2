"""The execution policy: what Pyramid's Router calls for each request is the WSGI middleware, around the Router."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

from pyramid.request import Request
from sqlalchemy.orm import Session

from .._scope.scope import running_scope
from .._settings.arguments import wrap
from .._settings.ini import ini_names
from .._transaction.request_transaction import RequestTransaction
from ..errors import ConfigurationError, shown
from ..middleware import SQLASessionMiddleware
from ..paste import collect
from ..transaction import ATTEMPT, TransactionMiddleware
from .joining import joining
from .names import RETRY_ATTEMPT, RETRY_ATTEMPTS, is_marked, make_event
from .settings import NAME, PREFIX, Options

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from pyramid.router import Router

__all__ = ["MIDDLEWARE", "PyramidPolicy", "policy_of"]

#: The key of the SQLASessionMiddleware in the registry.
MIDDLEWARE = "sqlasession_middleware"
_POLICY = "sqlasession_middleware.policy"


class PyramidPolicy:
    """Called as Pyramid's ``IExecutionPolicy``.

    ``make_wsgi_app()`` returns Pyramid's Router as ever, so that scripts and tests find what they look for in it.
    """

    options: Options
    middleware: SQLASessionMiddleware
    #: None if the application commits by itself
    transaction: TransactionMiddleware | None = None
    #: All of one registry do the same.
    router: Router

    def set_up(self, options: Options, registry: Any) -> None:
        """Make the middleware, and put it into the registry.

        :raises ConfigurationError: if a setting is wrong.
        """
        self.options = options
        arguments = options.arguments
        session_options = arguments["session_options"]
        session_class = session_options.get("class_", Session)
        if isinstance(session_class, type) and issubclass(session_class, Session):  # Others are refused below.
            session_options["class_"] = joining(cast(Any, session_class))
        app: Any = self.answer
        try:
            if options.transaction is not None:
                app = self.transaction = wrap("transaction", TransactionMiddleware, app, options.transaction)
            self.middleware = SQLASessionMiddleware(app, arguments.pop("bind"), **arguments)
        except ConfigurationError as error:
            names = {**ini_names(PREFIX, arguments), "transaction": "transaction.", "name": NAME}
            raise error.renamed(names, "") from error.__cause__
        collect(self.middleware)
        registry[_POLICY] = self
        registry[MIDDLEWARE] = self.middleware
        # The cookiecutter's name, for tests that open a session of their own.
        registry["dbsession_factory"] = self.middleware.new_session

    def __call__(self, environ: WSGIEnvironment, router: Router) -> SQLASessionMiddleware:
        self.router = router
        return self.middleware

    def answer(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """The wrapped WSGI application: Pyramid, as its own execution policy calls it."""
        scope = running_scope()
        managed = cast("RequestTransaction | None", None if scope is None else scope.transaction)
        context = self.router.request_context(environ)
        request = context.begin()
        try:
            if managed is not None and self.transaction is not None:
                self._limit_attempts(request, managed, self.transaction.attempts)
            try:
                response = self.router.invoke_request(request)
            except Exception as error:
                self._announce_repetition(request, managed, error, None)
                raise
            self._announce_repetition(request, managed, getattr(request, "exception", None), response)
        finally:
            context.end()
        return cast("Iterable[bytes]", response(environ, start_response))

    def _limit_attempts(self, request: Request, managed: RequestTransaction, attempts: int) -> None:
        environ = request.environ
        number = environ[ATTEMPT]
        attempts_of = self.options.attempts_of
        limit = None if attempts_of is None else attempts_of(request)
        if limit is None:
            limit = attempts
        elif type(limit) is not int or not 1 <= limit <= attempts:
            raise ConfigurationError(
                "'retry.activate_hook'",
                f"must return None, or a whole number from 1 to the {attempts} of all requests, got {shown(limit)}.",
            )
        if number >= limit:
            managed.may_repeat = False
        environ[RETRY_ATTEMPT] = number - 1
        environ[RETRY_ATTEMPTS] = limit if managed.may_repeat else number

    def is_retryable(self, error: BaseException) -> bool:
        """Whether the application says that a request is to be repeated after an error."""
        return is_marked(error) or (self.transaction is not None and isinstance(error, self.transaction.retry_on))

    def ask_to_repeat(self, managed: RequestTransaction | None, error: BaseException) -> bool:
        """Have the request repeated, if it can be.

        :returns: whether it is.
        """
        if managed is None or not managed.may_repeat or managed.commits:
            return False
        managed.doomed = True
        managed.repeat_for = error
        return True

    def _announce_repetition(
        self, request: Request, managed: RequestTransaction | None, error: BaseException | None, response: Any
    ) -> None:
        """Tell subscribers that the request is repeated now."""
        if managed is None or error is None:
            return
        if managed.repeat_for is not None or (self.is_retryable(error) and self.ask_to_repeat(managed, error)):
            request.registry.notify(make_event(request, error, response))


def policy_of(registry: Any) -> PyramidPolicy:
    """What the include has put into the registry of a Pyramid application."""
    return cast("PyramidPolicy", registry[_POLICY])
