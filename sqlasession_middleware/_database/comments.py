"""Adds a comment to each statement that tells which application and route have sent it: the option ``sql_comments``.

What is sent in a request, a context or a job of an application that asks for comments has one. The server's views and
logs of statements then show where each comes from.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from sqlalchemy import event

from .._drivers.registry import driver_of
from .._scope.scope import Scope, current
from .._settings.checks import check_boolean, check_text_or_none, resolve_option
from .._wsgi.attribution import method_of, route_of, trace_finder
from .comment_text import add_comment, make_comment
from .forks import fork_safe_lock

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment
    from sqlalchemy import Connection, Engine
    from sqlalchemy.pool import ConnectionPoolEntry

__all__ = ["SQLComments", "comment_on"]

logger = logging.getLogger("sqlasession_middleware.sql_comments")

#: A longer value of ``values`` is cut.
LONGEST: Final = 200

#: So many comments of an application are kept. One of a few routes has no more.
_KEPT_AT_MOST: Final = 1000

_commented: WeakSet[Engine] = WeakSet()
_traced: WeakSet[Engine] = WeakSet()
_listening = fork_safe_lock()


class SQLComments:
    """What the comments of an application tell.

    :param application: its name.
    :param route: the pattern of the request's route, if environ has it; or a callable of environ that returns it, or
        None.
    :param method: the method of the request.
    :param traceparent: the trace that the request is a part of. It makes each statement another one.
    :param values: a callable of environ that returns a dict of further values by their keys, or None. It is called for
        each statement of a request.
    :raises ConfigurationError: if one of them is wrong.
    """

    def __init__(
        self,
        application: str | None = None,
        route: bool | Callable[[WSGIEnvironment], str | None] | str | None = True,
        method: bool = True,
        traceparent: bool = False,
        values: Callable[[WSGIEnvironment], Mapping[str, object] | None] | str | None = None,
    ) -> None:
        check_text_or_none("application", application)
        check_boolean("method", method)
        check_boolean("traceparent", traceparent)
        self.traceparent = traceparent
        self._application = {} if application is None else {"application": application}
        self._values = resolve_option("values", values)
        readers: dict[str, Callable[[Any], str | None]] = {}
        if method:
            readers["method"] = method_of
        if route is True:
            readers["route"] = route_of
        elif route is not False and route is not None:
            readers["route"] = resolve_option("route", route)
        if traceparent:
            readers["traceparent"] = trace_finder()
        self._readers = tuple(readers.items())
        #: the comments that were made, and the same with each ``%`` doubled
        self._made: dict[tuple[object, ...], tuple[str, str]] = {}

    def comment(self, environ: WSGIEnvironment | None) -> tuple[str, str]:
        """The comment of a statement, and the same with each ``%`` doubled. Both are "" if there is nothing to tell.

        :param environ: the request's; None outside of a request, where there is no more than the name, and a trace.
        """
        environ = {} if environ is None else environ
        found = [read(environ) for _, read in self._readers]
        more = self._values(environ) if environ and self._values is not None else None
        if more:
            told = {str(key): str(value)[:LONGEST] for key, value in more.items() if value is not None}
            key: tuple[object, ...] = (*found, *told.items())
        else:
            told = {}
            key = tuple(found)
        made = self._made.get(key)
        if made is None:
            pairs = {name: value for (name, _), value in zip(self._readers, found, strict=True) if value is not None}
            comment = make_comment({**self._application, **pairs, **told})
            made = comment, comment.replace("%", "%%")
            if len(self._made) >= _KEPT_AT_MOST:
                self._made.clear()
            self._made[key] = made
        return made


def comment_on(engine: Engine, comments: SQLComments) -> None:
    """Have statements of an engine commented, each as the application says in whose scope it is sent."""
    with _listening:
        if engine not in _commented:
            _commented.add(engine)
            event.listen(engine, "before_cursor_execute", _comment, retval=True)
        if comments.traceparent and engine not in _traced:
            _traced.add(engine)
            event.listen(engine, "connect", _Warning(engine).look)


def _comment(
    connection: Connection, cursor: Any, statement: Any, parameters: Any, context: Any, is_many: bool
) -> tuple[Any, Any]:
    scope = current.get(None)
    # Another application may use the engine, or, in a shell, something that is none.
    comments = getattr(scope.owner, "sql_comments", None) if isinstance(scope, Scope) else None
    # A driver may have statements that are no texts.
    if not isinstance(comments, SQLComments) or not isinstance(statement, str):
        return statement, parameters
    comment, doubled = comments.comment(scope.environ)  # type: ignore[union-attr]  # it is a Scope
    if comment:
        dialect = connection.dialect
        if dialect.paramstyle in ("format", "pyformat") and not _has_no_parameters(parameters, context):
            comment = doubled
        return add_comment(statement, comment, is_many and driver_of(dialect).gathers_rows), parameters
    return statement, parameters


def _has_no_parameters(parameters: Any, context: Any) -> bool:
    """Whether SQLAlchemy calls the driver without parameters, so that it leaves each ``%`` as it is."""
    return not parameters and bool(context.execution_options.get("no_parameters"))


class _Warning:
    """Warns once if the connections of an engine prepare statements, where each has another text."""

    def __init__(self, engine: Engine) -> None:
        self._driver = driver_of(engine)  # The engine itself would be kept by its own event.
        self._has_warned = False

    def look(self, driver_connection: Any, entry: ConnectionPoolEntry) -> None:
        if self._has_warned or not self._driver.prepares(driver_connection):
            return
        self._has_warned = True
        logger.warning(
            "With 'traceparent' no text is sent twice, but psycopg prepares those that are sent often:"
            " leave it out of 'sql_comments', or set connect_args={'prepare_threshold': None}"
        )
