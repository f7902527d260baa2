"""The events with which SQLAlchemy executes statements, for listeners of this library.

They are the dialect's, which engines share that were made of each other by ``execution_options()``. Unlike the events
of an engine, they cost nothing where nobody listens to them: once an engine has one listener, SQLAlchemy joins seven
events for each of its connections.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import event

from .._dependencies import call_first

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine
    from sqlalchemy.engine import Dialect

__all__ = ["has_other_listeners", "listen_to_executions"]

#: The attribute of a dialect that says how many listeners of this library each of the events has.
_OWN: Final = "sqlasession_own_listeners"


def listen_to_executions(
    engine: Engine,
    execute: Callable[..., Any],
    execute_many: Callable[..., Any],
    execute_without_parameters: Callable[..., Any],
    first: bool = True,
) -> None:
    """Have listeners called when a statement is executed.

    :param execute: and the others: listeners of ``do_execute``, ``do_executemany`` and ``do_execute_no_params``.
    :param first: before all others, since one may execute the statement by itself, and then no other is called.
    """
    dialect = engine.dialect
    setattr(dialect, _OWN, getattr(dialect, _OWN, 0) + 1)
    listeners = {
        "do_execute": execute,
        "do_executemany": execute_many,
        "do_execute_no_params": execute_without_parameters,
    }
    for name, listener in listeners.items():
        event.listen(engine, name, listener)
        if first:
            call_first(engine, listener, name)


def has_other_listeners(dialect: Dialect, listeners: Any) -> bool:
    """Whether the application listens to an event, too.

    :param listeners: those of the event.
    """
    return len(listeners) > getattr(dialect, _OWN, 0)
