"""Who has caught an error of the database: the application, to go on, or its framework, to make a page of it.

Both may query afterwards. A view that has caught an error and queries has recovered from it. An error handler, a
function that Flask calls after a request, or an exception view that queries is part of the answer to the error.

The first entry of an error's traceback is the frame that has caught it. If that is one of the functions in which a
framework catches what its views raise, then no code of the application has dealt with the error, and what that function
calls from there on belongs to the page. So does what the function around it calls after it has returned, while none
like it runs again. An error that a view has raised in place of the database's counts as well, while it is handled.

If in doubt, the application has recovered: to repeat a request that has, would do twice what it did after that, while a
request that is not repeated is only an error more. So unknown frameworks, libraries such as tenacity, and code of the
application that catches errors around its views have the last word, as a view has.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from .._dependencies import calling_frame, catches_errors_of_views, goes_on_after
from .replaced_errors import causes_of, driver_error_of

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["is_in_one_application", "is_making_error_page", "was_left_to_framework"]


def is_making_error_page(error: BaseException) -> bool:
    """Whether a framework has caught an error, or one that came of it, and the running code is called because of that.

    :param error: the error of the database.
    """
    handled = sys.exception()
    return any(
        # What is handled has a handler that runs. Cython's frames (Falcon may be compiled) are not seen to run.
        _is_of_framework(each) and (each is handled or _goes_on(_catcher_of(each)))
        for each in _raised_since(error, handled)
    )


def was_left_to_framework(error: BaseException) -> bool:
    """Whether a framework has caught an error, and none of its views. It need not be running any more."""
    return _is_of_framework(error)


def is_in_one_application() -> bool:
    """Whether one application of a framework runs, and not one that a view of another has called.

    That view may go on when the inner application has made its page. Django has its function once for each of its
    middlewares: that counts as several.
    """
    catchers = [each for each in _running_frames() if catches_errors_of_views(each)]
    modules = {each.f_globals["__name__"] for each in catchers}
    packages = {module.partition(".")[0] for module in modules}
    return len(packages) == 1 and len({each.f_code for each in catchers}) == len(catchers)


def _running_frames() -> list[FrameType]:
    """The frames around the function that calls this.

    Without the function's own: it would lead to itself by what it has, and all that these frames have, connections and
    responses, would wait for the garbage collector.
    """
    frames: list[FrameType] = []
    frame: FrameType | None = calling_frame(2)
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _raised_since(error: BaseException, handled: BaseException | None) -> list[BaseException]:
    """An error, and those that have come of it and are being handled."""
    original = driver_error_of(error)
    later: list[BaseException] = []
    for each in () if handled is None else causes_of(handled):
        if each is error or each is original:
            return [error, *later]
        later.append(each)
    return [error]


def _catcher_of(error: BaseException) -> FrameType | None:
    return None if error.__traceback__ is None else error.__traceback__.tb_frame


def _is_of_framework(error: BaseException) -> bool:
    catcher = _catcher_of(error)
    return catcher is not None and catches_errors_of_views(catcher)


def _goes_on(catcher: FrameType | None) -> bool:
    """Whether the running code is called by the function that has caught an error, or afterwards around it."""
    running = _running_frames()
    if any(each is catcher for each in running):
        return True
    if catcher is None or any(each.f_code is catcher.f_code for each in running):
        return False
    return any(goes_on_after(catcher, each) for each in running)
