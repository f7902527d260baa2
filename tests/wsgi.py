"""Helpers for the tests in this folder: applications that check their own scope, and a minimal server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar
from weakref import WeakSet

from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from sqlasession_middleware import application, local, session

Environ = dict[str, Any]
StartResponse = Callable[..., Any]


class RecordedSession(Session):
    """A Session that the tests can find again, without keeping it alive."""

    opened: ClassVar[WeakSet[RecordedSession]] = WeakSet()

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.opened.add(self)


def environ(method: str = "GET", **more: Any) -> Environ:
    return {"REQUEST_METHOD": method, "PATH_INFO": "/", **more}


def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], None]:
    return lambda data: None


def select_one() -> int:
    """Execute a query, so that the current session takes a connection."""
    return session.execute(text("SELECT 1")).scalar_one()


class Chunks:
    """A body that checks its scope in each step, and raises at a chosen step.

    It expects to find the same application and session in every step.

    :param fault: "iter", "first step", "later step" or "close"; any other value for no error.
    :param error: the error to raise there.
    """

    def __init__(self, fault: str = "", error: BaseException | None = None, length: int = 3) -> None:
        self.fault = fault
        self.error = error or RuntimeError(fault)
        self.expected = application._get_current_object(), session()
        self.left = length
        self.taken = 0
        self.closed = 0

    def check(self, place: str) -> None:
        assert (application._get_current_object(), session()) == self.expected
        assert local.mark is self.expected[1]
        if place == self.fault:
            raise self.error

    def __iter__(self) -> Iterator[bytes]:
        self.check("iter")
        return self

    def __next__(self) -> bytes:
        self.check("later step" if self.taken else "first step")
        if not self.left:
            raise StopIteration
        self.left -= 1
        self.taken += 1
        return b"chunk"

    def close(self) -> None:
        self.closed += 1
        self.check("close")


def assert_given_back(engine: Engine) -> None:
    """Check that no Session is registered or open, and that no connection is checked out of the pool."""
    assert not session.registry.has()
    assert [each for each in RecordedSession.opened if each.bind is engine and each.in_transaction()] == []
    assert engine.pool.checkedout() == 0


def consume(result: Iterable[bytes]) -> bytes:
    """Read and close a response, as a server does."""
    try:
        return b"".join(result)
    finally:
        close = getattr(result, "close", None)
        if close is not None:
            close()
