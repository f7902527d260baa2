"""The scope: what one request, or one ``with app.context():``, owns.

``local``, ``local_manager`` and ``application`` are the names of the pattern that Werkzeug's documentation
published. Behind them is one :class:`~contextvars.ContextVar`, and what it holds during a request *is* the
request's :class:`Scope`: the dict that Werkzeug's :class:`~werkzeug.local.Local` reads and writes. So finding
the session is one look at a context variable, and whatever is stored on ``local`` lives as long as its request.

This is the only module that imports :mod:`werkzeug.local`.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, Final, cast

from werkzeug.local import Local, LocalManager, release_local

from .errors import ScopeError, shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed.wsgi import StartResponse
    from sqlalchemy.orm import Session

    from .middleware import SQLASessionMiddleware
    from .transaction import Attempt
    from .watch import Noted

__all__ = [
    "ENDED",
    "ENDING",
    "NOTHING",
    "RUNNING",
    "WAITING",
    "Scope",
    "application",
    "begin",
    "current",
    "leave",
    "local",
    "local_manager",
    "release_local",
]

#: What the Local reads and writes. Inside a scope its value is that :class:`Scope`.
current: ContextVar[dict[str, Any]] = ContextVar("sqlasession_middleware.current")

#: What ``current`` is set to where no scope is left. A Local copies it before it writes.
NOTHING: dict[str, Any] = {}

local = Local(current)
local_manager = LocalManager([local])
application = cast(
    "SQLASessionMiddleware",
    local(
        "application",
        unbound_message=(
            "No application is bound here: this code runs outside of a request, or its request is over."
            " Run it inside a request, or in 'with app.context():'."
        ),
    ),
)


#: The application's code is on the stack: in the call, in a step of the body, in the ``with`` block.
RUNNING: Final = 1
#: The server has yet to take the next step, or to close.
WAITING: Final = 2
#: The finishers run, and with them the body's ``close()``.
ENDING: Final = 3
#: It is over: the scope is an empty dict for good.
ENDED: Final = 4


class Scope(dict[str, Any]):
    """The owner, the session and the Local's values of one request or context.

    Scopes are told apart by identity. They begin in :func:`begin`, and a request's in the middleware.
    """

    __slots__ = (
        "environ",
        "failure",
        "headers",
        "inner",
        "owner",
        "session",
        "start_response",
        "state",
        "token",
        "transaction",
    )

    #: the middleware instance (or, in a shell, whatever was assigned to ``local.application``)
    owner: Any
    #: the request's environ; None outside of a request and after the end
    environ: dict[str, Any] | None
    #: the last failure of the database that the scope has met, where somebody asks for it
    failure: Noted | None
    #: the response's headers, once the application has told them
    headers: list[tuple[str, str]] | None
    #: what the last step has left on the Local instead of this scope: a context that it is still in
    inner: Scope | None
    #: the open Session, if the scope has used one
    session: Session | None
    #: the server's; None outside of a request and after the end
    start_response: StartResponse | None
    #: RUNNING, WAITING, ENDING or ENDED
    state: int
    #: what ``current.set()`` gave when the scope began: ``old_value`` is what the Local held before
    token: Token[dict[str, Any]]
    #: the attempt at a transaction that will commit, where a TransactionMiddleware is in charge
    transaction: Attempt | None

    def start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        """The application's ``start_response``: the headers tell whether the body is a stream of events."""
        self.headers = headers
        start_response = self.start_response
        assert start_response is not None
        return start_response(status, headers) if exc_info is None else start_response(status, headers, exc_info)

    def copy(self) -> dict[str, Any]:
        """The scope itself while the application's code runs, else an empty dict.

        Werkzeug's Local copies its dict before it writes. Here the write has to reach every context that the
        request's code runs in, so the Local is handed the one dict there is. Who writes between two steps or after
        the end is somebody else, who has found the scope where it was left.
        """
        return {} if self.state is WAITING or self.state is ENDED else self

    def __setitem__(self, name: str, value: Any) -> None:
        if name == "application" and self.session is not None and value is not self.get(name):
            raise ScopeError(
                f"local.application cannot become {shown(value)} while a session of {self.get(name)!r} is open:"
                " call session.remove() first."
            )
        super().__setitem__(name, value)


def begin(scope: Scope) -> None:
    """Make a new scope that is no request's the current one.

    :param scope: holds its ``application`` already.
    """
    scope.owner = scope["application"]
    scope.environ = scope.start_response = scope.headers = None
    scope.inner = scope.session = scope.transaction = scope.failure = None
    scope.state = RUNNING
    scope.token = current.set(scope)


def leave(scope: Scope) -> None:
    """Make the Local what it was before ``scope`` began, but for other scopes that have ended since."""
    token = scope.token
    before: Any = token.old_value
    while isinstance(before, Scope) and before.state is ENDED:
        # Only a context that was left in another order than it was entered still knows what was before it.
        before = before.token.old_value if hasattr(before, "token") else Token.MISSING
    if before is not token.old_value:
        current.set(NOTHING if before is Token.MISSING else before)
        return
    try:
        current.reset(token)
    except ValueError:  # The end has come in a copy of the context that the scope began in.
        current.set(NOTHING if before is Token.MISSING else before)
