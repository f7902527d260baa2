"""The tween: it commits a request, or rolls it back, where exception views can still make a page of what fails.

It goes by pyramid_tm's rules, and has its place: over the tween of the exception views. A response of any kind is
committed there. What streams, callbacks and tweens around it do with the session afterwards is another transaction,
which the WSGI middleware commits at the end of the response, unless the tween has rolled back.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

from pyramid.httpexceptions import HTTPNotFound
from pyramid.request import Request
from transaction.interfaces import NoTransaction

from .._database.attribution import failure_of
from .._database.recovery import pending_failure
from .._scope.scope import running_scope
from .._sessions.calls import find_calls
from .._transaction.request_transaction import RequestTransaction
from ..failures import Failure
from .joining import CHARGE, REPEATABLE, Charge
from .names import TM_ACTIVE, TM_MANAGER
from .policy import PyramidPolicy, policy_of

__all__ = ["tm_tween_factory"]

Handler = Callable[[Request], Any]


def tm_tween_factory(handler: Handler, registry: Any) -> Handler:
    """The factory of the tween. To name it in ``over`` and ``under``, use ``"pyramid_tm.tm_tween_factory"``."""
    policy = policy_of(registry)

    def tm_tween(request: Request) -> Any:
        environ = request.environ
        scope = running_scope()
        managed = None
        if scope is not None and scope.environ is not None:
            # A request that the request makes is part of it; a websocket has no transaction.
            if scope.environ is not environ or scope.transaction is None:
                return handler(request)
            managed = cast("RequestTransaction", scope.transaction)
        is_given = TM_ACTIVE in environ  # by a test, which commits or aborts by itself
        activate = policy.options.activate
        if is_given or (activate is not None and not activate(request)):
            if managed is not None:
                managed.doomed = True  # What the application has not committed.
                environ[CHARGE] = Charge(request.tm, None, waits=not is_given)
            return handler(request)
        return _Turn(policy, request, managed).run(handler)

    return tm_tween


class _Turn:
    """The transaction of one call.

    :param managed: what the WSGI middleware knows of it; None where Pyramid is called without it.
    """

    def __init__(self, policy: PyramidPolicy, request: Request, managed: RequestTransaction | None) -> None:
        self.policy = policy
        self.request = request
        self.managed = managed
        self.manager = request.tm
        self.charge = Charge(self.manager, managed)

    def run(self, handler: Handler) -> Any:
        request, manager = self.request, self.manager
        request.environ.update({TM_ACTIVE: True, TM_MANAGER: manager, CHARGE: self.charge})
        self._describe(manager.begin())
        scope = running_scope()
        if scope is not None and scope.session is not None and scope.session.in_transaction():
            self.charge.join(scope.session).attach()  # A tween around this one has used it.
        try:
            if self.policy.options.annotates_user and (user := request.authenticated_userid):
                manager.get().user = str(user)
            response = handler(request)
        except Exception as error:
            self._ask_to_repeat(error)
            answer = self._finish(self._abort, None)
            if answer is None:
                raise
            return answer
        except BaseException:
            self._end()
            self._abort()
            raise
        handled = getattr(request, "exception", None)
        if handled is not None:
            self._ask_to_repeat(handled)
        return self._finish(self._abort if self._is_vetoed(response, handled) else self._commit, response)

    def _describe(self, transaction: Any) -> None:
        try:
            transaction.note(self.request.path_info)
        except UnicodeDecodeError:
            transaction.note("a path that is not UTF-8")

    def _is_vetoed(self, response: Any, error: BaseException | None) -> bool:
        """Whether to roll back, although there is a response."""
        if (self.managed is not None and self.managed.doomed) or self._is_doomed():
            return True
        veto = self.policy.options.veto
        # Without a veto, what was raised is rolled back, whatever an exception view has made of it.
        return error is not None if veto is None else bool(veto(self.request, response))

    def _is_doomed(self) -> bool:
        try:
            return bool(self.manager.isDoomed())
        except NoTransaction:
            return False

    def _commit(self) -> None:
        try:
            self.manager.get()
        except NoTransaction:
            return  # The view has ended it.
        self.manager.commit()

    def _abort(self) -> None:
        if self.managed is not None:
            self.managed.doomed = True
        try:
            self.manager.abort()
        except NoTransaction:
            pass

    def _ask_to_repeat(self, error: BaseException) -> None:
        """Have the request repeated if the error asks for that. The data managers are asked before they forget."""
        if self.policy.is_retryable(error) or self._is_retryable_to_managers(error):
            self.policy.ask_to_repeat(self.managed, error)

    def _is_retryable_to_managers(self, error: BaseException) -> bool:
        try:
            return bool(self.manager.get().isRetryableError(error))
        except NoTransaction:
            return False

    def _end(self) -> None:
        scope = running_scope()
        session = None if scope is None else scope.session
        self.charge.end(session)
        calls = None if session is None else find_calls(session)
        if calls is not None:
            calls.make()

    def _finish(self, finisher: Callable[[], None], response: Any) -> Any:
        """End the transaction.

        :returns: the response; or that of an exception view to what has failed.
        """
        request, managed = self.request, self.managed
        # An exception view for what fails now must not take the transaction to be there.
        for key in (TM_ACTIVE, TM_MANAGER):
            request.environ.pop(key, None)
        try:
            finisher()
        except Exception as error:
            self._end()
            if self._goes_around(error):
                raise
            if managed is not None:
                managed.doomed = True
            try:
                response = request.invoke_exception_view(sys.exc_info())
            except HTTPNotFound:
                raise error from None
            if managed is not None:
                managed.commit_failed = False  # It is answered.
            return response
        self._end()
        return response

    def _goes_around(self, error: Exception) -> bool:
        """Whether the WSGI middleware answers an error of the commit: by another attempt, 503, or a page."""
        managed = self.managed
        if managed is None:
            return False
        scope = managed.scope
        failure = failure_of(error, pending_failure(scope))
        if failure is Failure.UNKNOWN:
            return True
        may_help = failure in REPEATABLE or self.policy.is_retryable(error)
        if may_help and self.policy.ask_to_repeat(managed, error):
            return True
        answers_503 = scope.owner.answers_503
        return answers_503 is not None and answers_503(self.request.environ, failure)
