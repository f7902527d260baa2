"""The scope: what one request, or one ``with app.context():``, owns.

One :class:`~contextvars.ContextVar` leads to it, and its value during a request *is* the request's :class:`Scope`: the
dict that Werkzeug's :class:`~werkzeug.local.Local` reads and writes. So finding the session is one look at a context
variable, and whatever is stored on ``local`` lives as long as its request.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, Final

from ..errors import ScopeError, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from _typeshed.wsgi import StartResponse
    from sqlalchemy.orm import Session

    from ..failures import ObservedFailure
    from .protocols import Application, ManagedTransaction

__all__ = [
    "ENDED",
    "ENDING",
    "NOTHING",
    "RUNNING",
    "WAITING",
    "Scope",
    "begin",
    "current",
    "leave",
    "outwards",
    "running_scope",
]

#: What the Local reads and writes. Inside a scope its value is that :class:`Scope`.
current: ContextVar[dict[str, Any]] = ContextVar("sqlasession_middleware.current")

#: The value of ``current`` where no scope is left. A Local copies it before it writes.
NOTHING: dict[str, Any] = {}

#: The application's code is on the stack: in the call, in a step of the body, in the ``with`` block.
RUNNING: Final = 1
#: The server has yet to take the next step, or to close.
WAITING: Final = 2
#: The finishers run, and with them the body's ``close()``.
ENDING: Final = 3
#: The scope has ended and stays empty.
ENDED: Final = 4


class Scope(dict[str, Any]):
    """The owner, the session and the Local's values of one request or context.

    Scopes are compared by identity. A context's begins in :func:`begin`, a request's in the middleware.
    """

    __slots__ = (
        "__weakref__",
        "environ",
        "failure",
        "headers",
        "inner",
        "lost_each_time",
        "owner",
        "process",
        "session",
        "start_response",
        "state",
        "status",
        "token",
        "transaction",
    )

    #: until when this scope may wait for its databases, in seconds of time.monotonic(): see :mod:`.deadline`
    deadline: float | None = None
    #: the middleware instance (or, in a shell, whatever was assigned to ``local.application``)
    owner: Application
    #: the request's environ; None outside of a request and after the end
    environ: dict[str, Any] | None
    #: the last failure of the database in this scope, if a middleware asked to observe failures
    failure: ObservedFailure | None
    #: the response's headers, once the application has called ``start_response()``
    headers: list[tuple[str, str]] | None
    #: a context that the last step of the body entered and did not leave; NOTHING if a context was entered since, and
    #: the step has yet to look whether it was left
    inner: dict[str, Any] | None
    #: whether all attempts before this one have lost their connection; not set in the first one
    lost_each_time: bool
    #: the process that opened the Session
    process: int
    #: the open Session, if the scope has used one
    session: Session | None
    #: the server's; None outside of a request and after the end
    start_response: StartResponse | None
    #: RUNNING, WAITING, ENDING or ENDED
    state: int
    #: the response's status; set together with ``headers``
    status: str
    #: the result of ``current.set()`` when the scope began: ``old_value`` is what the Local held before
    token: Token[dict[str, Any]]
    #: the transaction that a TransactionMiddleware will commit, if one is in charge
    transaction: ManagedTransaction | None

    def start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        """The application's ``start_response``: the head tells how the response ends."""
        self.status = status
        self.headers = headers
        if exc_info is None:
            return self.start_response(status, headers)  # type: ignore[misc]  # it is there in a request
        return self.start_response(status, headers, exc_info)  # type: ignore[misc]

    def copy(self) -> dict[str, Any]:
        """The scope itself while the application's code runs, else an empty dict.

        Werkzeug's Local copies its dict before it writes. Here the write has to reach every context that the
        request's code runs in, so the Local gets the only dict there is. Code that writes between two steps or after
        the end is not the request's: it runs in a copy of a context that a step ran in.
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
    """Make a new scope, which is not a request's, the current one.

    :param scope: holds its ``application`` already.
    """
    scope.owner = scope["application"]
    scope.environ = scope.start_response = scope.headers = None
    scope.inner = scope.session = scope.transaction = scope.failure = None
    scope.state = RUNNING
    scope.token = current.set(scope)
    outer = scope.token.old_value
    if isinstance(outer, Scope) and outer.inner is None:
        outer.inner = NOTHING


def leave(scope: Scope) -> None:
    """Set the Local to what it was before ``scope`` began, without scopes that have ended since."""
    token = scope.token
    before: Any = token.old_value
    while isinstance(before, Scope) and before.state is ENDED:
        # Such a scope has dropped its token, unless it was a context that was left before a later one.
        before = before.token.old_value if hasattr(before, "token") else Token.MISSING
    if before is not token.old_value:
        current.set(NOTHING if before is Token.MISSING else before)
        return
    try:
        current.reset(token)
    except ValueError:  # The scope ends in a copy of the context that it began in.
        current.set(NOTHING if before is Token.MISSING else before)


def outwards(innermost: object) -> Iterator[Scope]:
    """A scope and those around it, from the innermost outwards.

    :param innermost: a value of ``current``; yields nothing if it is not a scope.
    """
    while isinstance(innermost, Scope):
        yield innermost
        innermost = innermost.token.old_value if hasattr(innermost, "token") else None


def running_scope() -> Scope | None:
    """The current scope, if its code is running: not between two steps of a response, and not after its end."""
    scope = current.get(None)
    return scope if isinstance(scope, Scope) and (scope.state is RUNNING or scope.state is ENDING) else None
