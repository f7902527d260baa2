"""Answers the questions of load balancers and orchestrators: is the process alive, is the site ready.

.. code-block:: python

    app = HealthMiddleware(SQLASessionMiddleware(app, "postgresql+psycopg://localhost/shop"))

``/healthz`` answers as long as the process does, and never touches a database. ``/readyz`` asks each engine, outside of
its pool. What a stranger gets to see are the names of the engines and a word on each; the log has the rest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ._database.breaker import breaker_state
from ._database.pings import State, ask_engines, prepare_pings
from ._scope.local import application as _application
from ._scope.scope import running_scope
from ._settings.checks import check_application, check_path_or_none, check_seconds_above_0
from ._tenants.readiness import readiness_of_application
from ._wsgi.webob import Request, Response
from ._wsgi.wrapped import applications_in
from .errors import ConfigurationError, of_application, shown
from .middleware import SQLASessionMiddleware
from .tenants import TenantsMiddleware

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy import Engine

__all__ = ["HealthMiddleware"]

#: The proxy that stands for the application of the running request.
_AROUND: Any = _application

#: Whose engines can be asked.
_ASKED = (SQLASessionMiddleware, TenantsMiddleware)

_TYPES = ("text/plain", "application/json")
_METHODS = ("GET", "HEAD")


class HealthMiddleware:
    """Answers at two paths, and hands all other requests on.

    :param app: any WSGI application: a :class:`~sqlasession_middleware.SQLASessionMiddleware` or a
        :class:`~sqlasession_middleware.tenants.TenantsMiddleware`, or what leads to one.
    :param application: the one of these whose engines are asked, if ``app`` does not lead to it.
        :data:`sqlasession_middleware.application` is the one that is around this middleware.
    :param live: the path that answers as long as the process does; None for none.
    :param ready: the path that asks the engines; None for none.
    :param timeout: after how many seconds ``ready`` answers at the latest, whatever the engines do.
    :raises ConfigurationError: if an option is wrong, or if ``app`` leads to no SQLASessionMiddleware, or to several,
        and ``application`` is not given.
    """

    def __init__(
        self,
        app: WSGIApplication,
        *,
        application: SQLASessionMiddleware | TenantsMiddleware | None = None,
        live: str | None = "/healthz",
        ready: str | None = "/readyz",
        timeout: float = 1.0,
    ) -> None:
        check_application(app)
        check_path_or_none("live", live)
        check_path_or_none("ready", ready)
        if live is not None and live == ready:
            raise ConfigurationError("ready", f"must be another path than 'live', got {shown(ready)} for both.")
        check_seconds_above_0("timeout", timeout)
        self.app = app
        self.timeout = timeout
        self._application: SQLASessionMiddleware | TenantsMiddleware | None = None
        if application is not _AROUND and (ready is not None or application is not None):
            self._application = _find(app) if application is None else _check(application)
            if isinstance(self._application, TenantsMiddleware):
                self._application.prepare_readiness(prepare_pings)
            else:
                for source in self._application._sources():
                    source.on_creation(prepare_pings)
        answers = {live: self._answer_live, ready: self._answer_ready}
        self._answers: dict[str | None, Callable[[], tuple[int, dict[str, Any], str]]] = {
            path: answer for path, answer in answers.items() if path is not None
        }

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        answer = self._answers.get(environ.get("PATH_INFO"))
        if answer is None:
            return self.app(environ, start_response)
        response: Iterable[bytes] = self._respond(environ, answer)(environ, start_response)
        return response

    def _respond(self, environ: WSGIEnvironment, answer: Callable[[], tuple[int, dict[str, Any], str]]) -> Response:
        is_asked = environ["REQUEST_METHOD"] in _METHODS
        status, found, text = answer() if is_asked else (405, {"allowed": _METHODS}, "Only GET and HEAD are allowed.\n")
        accepted = Request(environ).accept.acceptable_offers(_TYPES)
        is_json = bool(accepted) and accepted[0][0] == "application/json"
        body = json.dumps(found) + "\n" if is_json else text
        response = Response(body.encode(), status, content_type=_TYPES[is_json])
        response.headers["Cache-Control"] = "no-store"
        if not is_asked:
            response.headers["Allow"] = ", ".join(_METHODS)
        return response

    def _answer_live(self) -> tuple[int, dict[str, Any], str]:
        return 200, {"alive": True}, "alive\n"

    def _answer_ready(self) -> tuple[int, dict[str, Any], str]:
        application = self._owner()
        if isinstance(application, TenantsMiddleware):
            asked = application.readiness()
        else:
            asked = readiness_of_application(application)
        states = ask_engines(asked.engines, self.timeout, asked.without_secrets, of_application(application))
        is_ready = asked.is_ready(states)
        engines = {name: _described(asked.engines[name], state) for name, state in states.items()}
        lines = ["ready" if is_ready else "not ready"]
        for name, words in engines.items():
            breaker = words.get("breaker")
            lines.append(f"{name}: {words['state']}" + (f", breaker {breaker}" if breaker else ""))
        told = {} if application.name is None else {"application": application.name}
        return 200 if is_ready else 503, {"ready": is_ready, **told, "engines": engines}, "\n".join(lines) + "\n"

    def _owner(self) -> SQLASessionMiddleware | TenantsMiddleware:
        if self._application is not None:
            return self._application
        scope = running_scope()
        if scope is None or not isinstance(scope.owner, SQLASessionMiddleware):
            raise ConfigurationError(
                "application",
                "is the SQLASessionMiddleware around this one, but there is none: put the HealthMiddleware inside of"
                " it, or leave 'application' out.",
            )
        return scope.owner


def _described(engine: Engine, state: State) -> dict[str, str]:
    """What is told of an engine, by the keys in JSON."""
    breaker = breaker_state(engine)
    return {"state": state.value} | ({} if breaker in (None, "closed") else {"breaker": breaker})


def _check(application: Any) -> SQLASessionMiddleware | TenantsMiddleware:
    if not isinstance(application, _ASKED):
        raise ConfigurationError("application", f"must be a SQLASessionMiddleware, got {type(application).__name__}.")
    return application


def _find(app: Any) -> SQLASessionMiddleware | TenantsMiddleware:
    """Find the middleware that an application is, or that it wraps.

    :raises ConfigurationError: if there is none, or more than one.
    """
    found = [each for each in applications_in(app, leaf=_ASKED) if isinstance(each, _ASKED)]
    if len(found) == 1:
        return found[0]
    if found:
        problem = f"is needed, because {type(app).__name__} leads to {len(found)} of them: pass the one to ask."
    else:
        problem = (
            f"is needed, because {type(app).__name__} leads to no SQLASessionMiddleware: pass the one to ask, or"
            " sqlasession_middleware.application if it is around this middleware."
        )
    raise ConfigurationError("application", problem)
