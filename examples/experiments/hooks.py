"""Where the experiment with two buyers takes hold of a request, so that they always meet.

``experiments.meeting`` of environ is its :class:`Meeting`. A request of a visitor has none.
"""

from __future__ import annotations

from collections.abc import Iterable
from threading import Barrier, Event
from typing import TYPE_CHECKING

from webob import Request

from .log import note

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["MEETING", "Meeting", "before_each_attempt", "meet"]

MEETING = "experiments.meeting"
#: Seconds that nobody waits who has not lost the other one.
PATIENCE = 10


class Meeting:
    """Two buyers look at the last ticket before one of them buys it."""

    def __init__(self) -> None:
        self.both_have_looked = Barrier(2)
        self.one_is_done = Event()


def meet(request: Request) -> None:
    """Wait until the other buyer has looked as well, in the first attempt of both."""
    meeting: Meeting | None = request.environ.get(MEETING)
    if meeting is not None and request.environ.get("sqlasession.attempt", 1) == 1:
        meeting.both_have_looked.wait(PATIENCE)


def before_each_attempt(app: WSGIApplication) -> WSGIApplication:
    """Note the number of each attempt. A second one of two buyers begins when the other has a response."""

    def call(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        attempt = environ.get("sqlasession.attempt", 1)
        meeting: Meeting | None = environ.get(MEETING)
        if meeting is not None:
            note("attempt", f"attempt {attempt}")
            if attempt > 1:
                meeting.one_is_done.wait(PATIENCE)
        return app(environ, start_response)

    return call
