"""Metrics of an application's databases, for OpenTelemetry.

.. code-block:: python

    from sqlasession_middleware import metrics

    metrics.observe(app)

The names of statements and connections are those of OpenTelemetry's semantic conventions for clients of databases. An
engine is told by its name in ``app.engines``. Beside them there are counters of what only this library knows: how
transactions end, how many attempts requests need, and which of them are answered with 503. See :doc:`observing`.

This module needs the extra ``metrics``. It uses OpenTelemetry's API, so that what collects the metrics, and where they
go, is up to the application: with Prometheus it is a ``PrometheusMetricReader``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from operator import add
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar, Final
from weakref import WeakKeyDictionary

from opentelemetry.metrics import MeterProvider, Observation, get_meter_provider
from sqlalchemy import event
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import QueuePool

from ._database.breaker import breaker_state
from ._database.forks import fork_safe_lock
from ._dependencies import max_overflow
from ._recording.record import RECORD
from ._recording.waits import EndKind, TimedWaits
from ._scope.scope import ENDED, Scope
from .errors import ConfigurationError, shown
from .middleware import SQLASessionMiddleware
from .tenants import TenantsMiddleware

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine
    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

    from ._recording.record import Record
    from ._tenants.application import TenantApplication

__all__ = ["observe"]

#: "Semantic conventions for database client metrics": boundaries in seconds.
_BOUNDARIES: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)

#: What the conventions call a system where SQLAlchemy has another name.
_SYSTEMS: Final = {"mssql": "microsoft.sql_server", "oracle": "oracle.db"}

#: The attribute of an ExecutionContext with the time at which its statement began.
_BEGUN: Final = "sqlasession_begun"

_meters: WeakKeyDictionary[MeterProvider, _Meters] = WeakKeyDictionary()
_lock = fork_safe_lock()


def observe(
    app: SQLASessionMiddleware | TenantsMiddleware,
    meter_provider: MeterProvider | None = None,
    *,
    by_tenant: bool = False,
) -> None:
    """Have an application's metrics collected from now on.

    :param app: an application; with Flask it is ``db.middleware``. Call this once for each, before the first request.
        Those of a :class:`~sqlasession_middleware.tenants.TenantsMiddleware` are counted together.
    :param meter_provider: OpenTelemetry's; None for the global one.
    :param by_tenant: whether they are told apart, by ``tenant`` and by ``db.namespace``.
    :raises ConfigurationError: if ``app`` is something else, or is observed already.
    """
    if isinstance(app, TenantsMiddleware):
        _observe_tenants(app, meter_provider, by_tenant)
        return
    if not isinstance(app, SQLASessionMiddleware):
        raise ConfigurationError("app", f"must be a SQLASessionMiddleware, got {shown(app)}.")
    _observe(app, _meters_of(meter_provider))


def _observe_tenants(tenants: TenantsMiddleware, meter_provider: MeterProvider | None, by_tenant: bool) -> None:
    meters = _meters_of(meter_provider)
    if tenants.shared is not None:
        _observe(tenants.shared, meters)  # The pool that all of them share.

    def observe(application: TenantApplication) -> None:
        _observe(application, meters, {"tenant": application.tenant} if by_tenant else {})

    tenants.on_making(observe)


def _meters_of(meter_provider: MeterProvider | None) -> _Meters:
    provider = get_meter_provider() if meter_provider is None else meter_provider
    with _lock:
        meters = _meters.get(provider)
        if meters is None:
            meters = _meters[provider] = _Meters(provider)
    return meters


def _observe(app: SQLASessionMiddleware, meters: _Meters, more: dict[str, str] | None = None) -> None:
    """Observe one application.

    :param more: attributes that tell a tenant; empty for one that is not told.
    """
    if app.note_503 is not None:
        raise ConfigurationError("app", "is observed already: call observe() once for each application.")
    told = {**({} if app.name is None else {"application": app.name}), **(more or {})}
    app.note_503 = partial(meters.note_503, told)
    app.record_requests(partial(_metered, meters=meters, told=told))
    for name, source in app.named_sources().items():
        pool = name if app.name is None else f"{app.name}.{name}"
        source.on_creation(partial(meters.observe_engine, name=pool, more=more))


class _Meters:
    """The instruments of one provider, which all applications share that it collects the metrics of."""

    def __init__(self, provider: MeterProvider) -> None:
        meter = provider.get_meter("sqlasession_middleware")
        self._engines: WeakKeyDictionary[Engine, _ObservedEngine] = WeakKeyDictionary()

        def seconds(name: str, what: str) -> Any:
            return meter.create_histogram(name, "s", what, explicit_bucket_boundaries_advisory=_BOUNDARIES)

        self.operations = seconds("db.client.operation.duration", "Duration of database client operations.")
        self.creations = seconds("db.client.connection.create_time", "The time it took to create a new connection.")
        self.waits = seconds(
            "db.client.connection.wait_time", "The time it took to obtain an open connection from the pool."
        )
        self.uses = seconds(
            "db.client.connection.use_time", "The time between borrowing a connection and returning it to the pool."
        )
        self.timeouts = meter.create_counter(
            "db.client.connection.timeouts", "{timeout}", "How often no connection of the pool became free in time."
        )
        for name, unit, of_engine, what in (
            ("connection.count", "{connection}", _ObservedEngine.count, "The connections that are idle, or used."),
            ("connection.max", "{connection}", _ObservedEngine.most, "How many connections the pool may open."),
            ("connection.pending_requests", "{request}", _ObservedEngine.waiting, "Who waits for a connection."),
        ):
            callback = partial(self._observe_all, of_engine)
            meter.create_observable_up_down_counter(f"db.client.{name}", [callback], unit, what)
        breaker = partial(self._observe_all, _ObservedEngine.breaker, combine=max)
        meter.create_observable_gauge("sqlasession.breaker.state", [breaker], "1", "1 for the state that it is in.")
        self._outcomes = meter.create_counter(
            "sqlasession.request.transactions", "{transaction}", "How the transactions of requests have ended."
        )
        self._attempts = meter.create_counter(
            "sqlasession.request.attempts", "{attempt}", "At requests: more than one if they are repeated."
        )
        self._answers = meter.create_counter(
            "sqlasession.request.unavailable", "{response}", "Requests that were answered with 503."
        )

    def observe_engine(self, engine: Engine, name: str, more: dict[str, str] | None = None) -> None:
        with _lock:
            if engine not in self._engines:
                self._engines[engine] = _ObservedEngine(self, engine, name, more)

    def _observe_all(
        self,
        of_engine: Callable[[_ObservedEngine, Engine], Iterator[Observation]],
        options: object,
        combine: Callable[[float, float], float] = add,
    ) -> Iterator[Observation]:
        # The engines of tenants that are not told apart have the same attributes, and are one series.
        sums: dict[tuple[tuple[str, Any], ...], float] = {}
        for engine, observed in list(self._engines.items()):
            for each in of_engine(observed, engine):
                key = tuple((each.attributes or {}).items())
                sums[key] = combine(sums.get(key, 0), each.value)
        for key, value in sums.items():
            yield Observation(value, dict(key))

    def note_503(self, told: dict[str, str], reason: str) -> None:
        self._answers.add(1, {**told, "reason": reason})

    def note_request(self, told: dict[str, str], environ: dict[str, Any], record: Record) -> None:
        self._outcomes.add(1, {**told, "outcome": record.outcome})
        self._attempts.add(environ.get("sqlasession.attempt", 1), told)


class _ObservedEngine(TimedWaits):
    """The listeners of one engine. They lead to it by nothing that would keep it.

    :param name: that of its pool.
    :param more: attributes that tell a tenant; None if there are no tenants, and empty if they are not told apart.
    """

    def __init__(self, meters: _Meters, engine: Engine, name: str, more: dict[str, str] | None = None) -> None:
        super().__init__(engine, meters)
        self._meters = meters
        self._pool = {"db.client.connection.pool.name": name, **(more or {})}
        url = engine.url
        told = {
            "db.system.name": _SYSTEMS.get(engine.dialect.name, engine.dialect.name),
            "db.namespace": url.database if more is None or more else None,
            "server.address": url.host,
            "server.port": url.port,
        }
        self._attributes = {**{key: value for key, value in told.items() if value is not None}, **(more or {})}
        self._ends = {kind: {**self._attributes, "db.operation.name": kind.upper()} for kind in ("commit", "rollback")}
        self._pending = 0
        self._counting = fork_safe_lock()
        #: the key in the ``info`` of a connection with the time at which it was taken
        self._taken = f"sqlasession_middleware.metrics.{id(meters)}"
        event.listen(engine, "before_cursor_execute", self._begin_statement, retval=True)
        event.listen(engine, "after_cursor_execute", self._end_statement)
        event.listen(engine, "handle_error", self._fail_statement)
        event.listen(engine, "checkout", self._take)
        for name_of_event in ("checkin", "detach", "invalidate"):
            event.listen(engine, name_of_event, self._give_back)

    # -- statements

    def _begin_statement(
        self, connection: Connection, cursor: Any, sql: Any, parameters: Any, context: Any, _: bool
    ) -> tuple[Any, Any]:
        setattr(context, _BEGUN, perf_counter())
        return sql, parameters

    def _end_statement(
        self, connection: Connection, cursor: Any, sql: Any, parameters: Any, context: Any, _: bool
    ) -> None:
        self._note_statement(context, self._attributes)

    def _fail_statement(self, context: ExceptionContext) -> None:
        kind = type(context.original_exception).__qualname__
        self._note_statement(context.execution_context, {**self._attributes, "error.type": kind})

    def _note_statement(self, context: Any, attributes: dict[str, Any]) -> None:
        begun = getattr(context, _BEGUN, None)
        if begun is not None:  # It may fail once more, when its rows are fetched.
            setattr(context, _BEGUN, None)
            self._meters.operations.record(perf_counter() - begun, attributes)

    # -- connections

    def wanted(self) -> bool:
        return True

    def note_connect(self, wanted: bool, entry: ConnectionPoolEntry, begin: float | None) -> None:
        if begin is not None:
            self._meters.creations.record(perf_counter() - begin, self._pool)

    def begin_wait(self, wanted: bool) -> None:
        with self._counting:
            self._pending += 1

    def note_wait(self, wanted: bool, begin: float, connecting: float | None, error: BaseException | None) -> None:
        if error is None:
            self._meters.waits.record(perf_counter() - begin, self._pool)
        elif isinstance(error, PoolTimeoutError):
            self._meters.timeouts.add(1, self._pool)
        with self._counting:
            self._pending -= 1

    def note_end(
        self, wanted: bool, kind: EndKind, driver_connection: Any, waits: int, begin: float, error: BaseException | None
    ) -> None:
        if waits:
            told = self._ends[kind]
            failed = told if error is None else {**told, "error.type": type(error).__qualname__}
            self._meters.operations.record(perf_counter() - begin, failed)

    def _take(self, driver_connection: Any, entry: ConnectionPoolEntry, proxy: PoolProxiedConnection) -> None:
        entry.info[self._taken] = perf_counter()

    def _give_back(self, driver_connection: Any, entry: ConnectionPoolEntry, error: object = None) -> None:
        taken = entry.info.pop(self._taken, None)
        if taken is not None:
            self._meters.uses.record(perf_counter() - taken, self._pool)

    # -- what is looked at when metrics are collected

    def count(self, engine: Engine) -> Iterator[Observation]:
        pool = engine.pool
        if isinstance(pool, QueuePool):
            yield Observation(pool.checkedin(), {**self._pool, "db.client.connection.state": "idle"})
            yield Observation(pool.checkedout(), {**self._pool, "db.client.connection.state": "used"})

    def most(self, engine: Engine) -> Iterator[Observation]:
        pool = engine.pool
        if isinstance(pool, QueuePool) and (overflow := max_overflow(pool)) >= 0:
            yield Observation(pool.size() + overflow, self._pool)

    def waiting(self, engine: Engine) -> Iterator[Observation]:
        yield Observation(self._pending, self._pool)

    def breaker(self, engine: Engine) -> Iterator[Observation]:
        state = breaker_state(engine)
        if state is not None:
            for each in ("closed", "open", "half open"):
                yield Observation(int(each == state), {**self._pool, "state": each})


def _metered(scope_class: type[Scope], meters: _Meters, told: dict[str, str]) -> type[Scope]:
    """A subclass of ``scope_class`` that counts requests.

    :param told: the attributes of what it counts.
    """
    return type(scope_class.__name__, (_MeteredScope, scope_class), {"meters": meters, "told": told})


class _MeteredScope(Scope):
    """A scope whose request is counted at its end."""

    meters: _Meters
    told: ClassVar[dict[str, str]]

    def clear(self) -> None:
        """Forget the scope's values; at the end of the scope, count the request."""
        super().clear()
        environ = self.environ
        if self.state is ENDED and environ is not None and RECORD in environ:
            self.meters.note_request(self.told, environ, environ[RECORD])
