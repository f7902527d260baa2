"""Sends a tenant's settings together with BEGIN, so that text SQL and policies find whose transaction it is.

The settings belong to the transaction, and not to the connection: the server undoes them at its end, also behind
PgBouncer in transaction mode. PostgreSQL parses a prepared statement anew when ``search_path`` differs from that of its
last execution ("PREPARE", Notes).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

from sqlalchemy import Connection, Engine, event

from .._database.forks import fork_safe_lock
from .._database.lazy_begin import can_wait
from .._database.observers import commits_each_statement
from .._database.reads import BEGINS, FIRST, note_first
from .._drivers.registry import driver_of
from ..errors import ScopeError
from .binds import OPTION, PLACE

__all__ = ["begin_with_settings", "prepare_nothing", "setting_statement"]

_listening: WeakSet[Engine] = WeakSet()
_lock = fork_safe_lock()


def setting_statement(settings: Mapping[str, str], name: str) -> str:
    """The statement that sets something for the transaction of a tenant.

    :param settings: the values by the names of PostgreSQL's settings, at least one.
    :param name: of the tenant.
    """
    calls = (
        f"set_config({_quoted(key)}, {_quoted(value.replace(PLACE, name))}, true)" for key, value in settings.items()
    )
    return f"SELECT {', '.join(calls)}"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def begin_with_settings(engine: Engine) -> None:
    """Have each transaction of an engine, and of those that are made of it, begin with its settings."""
    with _lock:
        if engine not in _listening:
            event.listen(engine, "begin", _set)
            event.listen(engine, "begin_twophase", _refuse)
            _listening.add(engine)


def prepare_nothing(engine: Engine) -> None:
    """Have the driver prepare no statement that is sent often.

    Where tables of one name have different columns, because one schema was migrated and the next one was not, the
    server would refuse it: "cached plan must not change result type".
    """
    driver = driver_of(engine)

    def stop(driver_connection: Any, record: object) -> None:
        driver.stop_preparing(driver_connection)

    event.listen(engine, "connect", stop)


def _set(connection: Connection) -> None:
    options = connection.get_execution_options()
    if OPTION in options:
        if commits_each_statement(connection):
            _refuse(connection)
        if FIRST in options and can_wait(connection):
            note_first(connection, is_due=True)
        else:
            connection.exec_driver_sql(options[OPTION], execution_options={BEGINS: True})


def _refuse(connection: Connection, xid: Any = None) -> None:
    if OPTION in connection.get_execution_options():
        raise ScopeError(
            "A tenant's connection cannot be in AUTOCOMMIT, or in a transaction of two phases: the tenant is set for a"
            " transaction. Use an Engine of your own for such statements."
        )
