"""The engines of an application, from a URL and options, or as an Engine that is given.

An engine is created at its first use. Whatever can be checked before that is checked when the application is
constructed. SQLAlchemy's defaults apply, except for these, which cause trouble in a server:

A connection that was lost while it was idle is replaced, for databases behind a network.
    After a restart of the server, or where a firewall drops idle connections, one request would fail for each
    connection in the pool. SQLAlchemy's remedy, ``pool_pre_ping``, costs each request a round trip. Here the pool looks
    at the connection's socket instead, and pings the server only if there is something to read, or if the connection
    was idle for longer than ``ping_after`` seconds (60 by default; 0 is ``pool_pre_ping``, None is never).

No connection waits for a network without end, where the application has said nothing about that.
    A server that is gone without a word keeps a request for minutes when it connects, for a quarter of an hour when it
    sends, and for hours when it waits for an answer. Here connecting may take 10 seconds, and a server whose machine
    does not answer any more is given up after a minute: see `Servers that are gone without a word`_. An explicit
    ``module``, ``creator`` or ``pool`` leaves this to SQLAlchemy and the driver.

No ROLLBACK is sent that has nothing to undo, with PyMySQL, mysqlclient and mariadb.
    The pool rolls back each connection that is returned, also after the session has done so. psycopg and psycopg2 then
    send nothing, but these drivers wait for the server once more. Here their connections' ``rollback()`` sends nothing
    either if nothing was sent since the last COMMIT or ROLLBACK, be it by the driver's own cursors. For this the
    connections are of a class derived from the driver's, which ``create_engine()`` gets by its ``module``. An explicit
    ``module``, ``creator``, ``pool``, ``plugins``, ``pool_reset_on_return`` or ``skip_autocommit_rollback`` leaves
    everything to SQLAlchemy, and a driver whose ``connect()`` was replaced, such as to measure it, makes its own.

``sqlite://`` (``:memory:``) is one database for all threads.
    SQLAlchemy gives each thread an empty database of its own. Here every connection of the engine opens the same
    database of SQLite's ``memdb``, with transactions and locks of its own. It exists until the engine is disposed of.

An SQLite file in a folder that does not exist is an error.
    The first request would fail otherwise, with "unable to open database file".

After a fork the child process starts with empty pools: see :doc:`deployment`. An in-memory database is copied with
the process, so its pool is kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine, create_engine
from sqlalchemy.engine import URL, Dialect
from sqlalchemy.exc import NoSuchModuleError
from sqlalchemy.pool import QueuePool

from .._drivers.registry import SERVER_NAMES, server_of_url
from .._drivers.sqlite import can_share_memory, is_memory, keeps_memory, share_memory
from .._settings.checks import check_types, copy_options
from .._settings.options import DRIVER_ARGUMENTS, ENGINE_OPTIONS
from ..errors import ConfigurationError, nearest, shown
from .forks import check_process, fork_safe_lock, has_unseen_forks, leave_to_parent
from .liveness import PING_AFTER, has_to_ping_always, replace_lost_connections
from .network import CONNECT_TIMEOUT, leaves_network_to_us, limit_network_waits
from .pool import ObservedPool
from .reads import watch_reads
from .rollbacks import leave_out_rollbacks
from .secrets import shown_url, without_passwords_of_urls, without_secrets
from .urls import absolute, check_folder, check_secrets, parse_url

__all__ = ["EngineSource", "read_source", "source_of", "without_passwords_of_urls", "without_secrets"]

#: The dialects that an error suggests for a misspelt name.
DIALECTS = (*SERVER_NAMES, "oracle", "mssql", "cockroachdb")

# Reentrant: the garbage collector may run the code of a response that was dropped at any time.
_creating = fork_safe_lock()

# The dialects of drivers and options that create_engine() has accepted, so that 10,000 applications with the same
# options do not create 10,000 engines to check them.
_accepted: dict[Any, Dialect] = {}
_ACCEPTED_AT_MOST = 256
_OF_ANOTHER_POOL = ("poolclass", "pool_size", "max_overflow", "pool_timeout", "pool_use_lifo")
#: SQLAlchemy's message about options: the first of them, and the class of the pool.
_REFUSED = re.compile(r"Invalid argument\(s\) '(?P<name>\w+)'.* using configuration \w+/(?P<pool>\w+)/")
_PLAIN = (str, int, float, bool, type(None), type)


class EngineSource:
    """An engine that is given, or the URL and options to create it from at first use.

    :param bind: a URL string, a :class:`~sqlalchemy.engine.URL`, or an :class:`~sqlalchemy.engine.Engine`.
    :param options: options of :func:`~sqlalchemy.create_engine`.
    :raises ConfigurationError: if no engine can be created from them. No connection is made.
    """

    __slots__ = ("_engine", "_on_creation", "_options", "connect_timeout", "given", "ping_after", "url")

    def __init__(self, bind: str | URL | Engine, options: Mapping[str, Any] | None = None) -> None:
        self._engine: Engine | None = None
        self._on_creation: tuple[Callable[[Engine], None], ...] = ()
        self._options: dict[str, Any] | None = None
        #: in how many seconds a server has to accept a connection, unless the application has said it
        self.connect_timeout = CONNECT_TIMEOUT
        #: how many seconds a connection may be idle before it is pinged; None for ever
        self.ping_after: float | None = PING_AFTER
        #: whether it was given as an Engine, which its owner disposes of
        self.given = isinstance(bind, Engine)
        if isinstance(bind, Engine):
            if options:
                raise ConfigurationError("engine_options", "cannot be applied to an existing Engine: give a URL.")
            self.url = bind.url
            self._engine = bind
            _take_care(bind)
            return
        self.url = absolute(parse_url(bind))
        if options is not None:
            self._options = _check_options(options)
            check_secrets(self._options.get("connect_args"))
        if self._options and "pool" in self._options:
            # A pool works for one engine, so it cannot be used to check the options and again later.
            self._engine = self._make()
            _take_care(self._engine)
        else:
            self._check()

    @property
    def engine(self) -> Engine:
        """The engine, created at first use."""
        if has_unseen_forks:  # pragma: no cover  # in uWSGI
            check_process()
        if self._engine is None:
            with _creating:
                if self._engine is None:
                    engine = self._make()
                    _take_care(engine)
                    for call in self._on_creation:
                        call(engine)
                    self._engine = engine
        return self._engine

    @property
    def created(self) -> Engine | None:
        """The engine, if it was created."""
        return self._engine

    def sets(self, argument: str) -> bool:
        """Whether the application has set an argument of the driver, or has made the engine itself."""
        return self.given or argument in self.url.query or argument in (self._options or {}).get("connect_args", ())

    def on_creation(self, call: Callable[[Engine], None]) -> None:
        """Call a function with the engine when it is created, or now if it exists."""
        if self._engine is not None:
            call(self._engine)
        self._on_creation = (*self._on_creation, call)

    def dispose(self) -> None:
        """Close the pool, unless the engine was given. The next use opens another one."""
        if self._engine is not None and not self.given:
            self._engine.dispose()

    def without_secrets(self, text: str) -> str:
        """Replace with stars whatever in a text may be a password of this engine."""
        return without_secrets(text, self.url, self._options or {})

    def __repr__(self) -> str:
        return shown_url(self.url)

    def _check(self) -> None:
        url, options = self.url, self._options or {}
        key = None
        if "plugin" not in url.query and all(isinstance(value, _PLAIN) for value in options.values()):
            key = (url.drivername, is_memory(url), frozenset(options.items()))
        dialect = _accepted.get(key)
        if dialect is None:
            dialect = self._make().dialect
            if dialect.is_async:
                raise _for_asyncio(url)
            _check_isolation_level(dialect, options.get("isolation_level"))
            if key is not None and len(_accepted) < _ACCEPTED_AT_MOST:
                _accepted[key] = dialect
        else:
            with _errors_explained(url, options):
                dialect.create_connect_args(url)
        check_folder(url)

    def _make(self) -> Engine:
        url, options = self.url, dict(self._options or {})
        memory = not {"creator", "pool", "poolclass"} & options.keys() and is_memory(url)
        if memory:
            options["poolclass"] = ObservedPool
            options["connect_args"] = {"check_same_thread": False, **options.get("connect_args", {})}
            if not can_share_memory():
                # One connection, one request at a time: slower, but no request sees or undoes another's work.
                options.update(pool_size=1, max_overflow=0)
        looks = not {"pool", "pool_pre_ping"} & options.keys() and server_of_url(url).is_networked
        if looks and has_to_ping_always(self.ping_after):
            options["pool_pre_ping"], looks = True, False
        with _errors_explained(url, options):
            if not {"pool", "poolclass"} & options.keys():
                pool_class = getattr(url.get_dialect(), "get_pool_class", None)
                if pool_class is not None and pool_class(url) is QueuePool:
                    options["poolclass"] = ObservedPool
            engine = create_engine(url, **options, **leave_out_rollbacks(url, options))
        if memory and can_share_memory():
            share_memory(engine)
        if looks:
            replace_lost_connections(engine, self.ping_after)
        if leaves_network_to_us(options):
            limit_network_waits(engine, self.connect_timeout)
        return engine


def source_of(bind: Any, options: Mapping[str, Any] | None = None) -> EngineSource:
    """The source of an engine.

    :param bind: as for an :class:`EngineSource`; or a source, where the library itself has made it before.
    """
    return bind if isinstance(bind, EngineSource) else EngineSource(bind, options)


def read_source(parameter: str, given: Any, inherited: Mapping[str, Any] | None = None) -> EngineSource:
    """The engine of one of several binds or replicas.

    :param parameter: its name in errors, ``"binds['audit']"``.
    :param given: the ``bind`` of an :class:`EngineSource`, a dict of engine options with ``url``, or a source.
    :param inherited: engine options that apply unless ``given`` has its own.
    :raises ConfigurationError: if no engine can be created from it.
    """
    if isinstance(given, EngineSource):
        return given
    options: dict[str, Any] = {}
    key = None
    if isinstance(given, Mapping):
        options, key = dict(given), "url"
        if key not in options:
            raise ConfigurationError(parameter, "is missing: set it to the URL of the database.", key)
        given = options.pop(key)
    if not isinstance(given, Engine):
        options = _with_inherited(options, inherited or {})
    try:
        return EngineSource(given, options or None)
    except ConfigurationError as error:
        if error.parameter == "engine_options":
            key = error.key
        raise ConfigurationError(parameter, error.problem, key) from error.__cause__


def _with_inherited(options: dict[str, Any], inherited: Mapping[str, Any]) -> dict[str, Any]:
    """Merge options with those that are inherited, and ``connect_args`` argument by argument."""
    # These lead to the database of the inherited engine, whatever the URL.
    inherited = {name: value for name, value in inherited.items() if name not in ("creator", "pool")}
    if options.keys() & {"pool", "poolclass"}:
        # The options of the inherited pool do not apply to a pool of another class.
        inherited = {name: value for name, value in inherited.items() if name not in _OF_ANOTHER_POOL}
    merged = {**inherited, **options}
    arguments = [each.get("connect_args") for each in (inherited, options)]
    if all(isinstance(each, Mapping) for each in arguments):
        merged["connect_args"] = {**arguments[0], **arguments[1]}  # type: ignore[dict-item]  # both are
    return merged


def _take_care(engine: Engine) -> None:
    """Watch what is sent, and leave the connections to the parent after a fork, except those to its memory."""
    watch_reads(engine)
    if not keeps_memory(engine.url):
        leave_to_parent(engine)


def _check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(options, Mapping):
        raise ConfigurationError("engine_options", f"must be a dict, got {type(options).__name__}.")
    for name in options:
        if not isinstance(name, str):
            raise ConfigurationError("engine_options", f"must have names as keys, got {shown(name)}.")
    check_types("engine_options", options, ENGINE_OPTIONS)
    return {name: copy_options(value) for name, value in options.items()}


def _for_asyncio(url: URL) -> ConfigurationError:
    # By the name in the URL: the dialect of "psycopg_async" has the driver "psycopg".
    driver = url.drivername.partition("+")[2] or url.drivername
    return ConfigurationError("bind", f"names the driver {driver!r}, which requires asyncio: use a synchronous driver.")


def _check_isolation_level(dialect: Dialect, level: Any) -> None:
    """Check the level now: SQLAlchemy does so at each connection."""
    try:
        known = list(dialect.get_isolation_level_values(None))  # type: ignore[arg-type]  # not connected yet
    except Exception:
        return  # This dialect asks the connection.
    if isinstance(level, str) and level.replace("_", " ").upper() not in known:
        problem = f"must be one of {', '.join(known)} for {dialect.name}, got {shown(level)}."
        raise ConfigurationError("engine_options", problem, "isolation_level")


@contextmanager
def _errors_explained(url: URL, options: Mapping[str, Any]) -> Iterator[None]:
    """Turn an error of SQLAlchemy into one that names the setting and hides secrets."""
    try:
        yield
    except Exception as error:
        text = without_secrets(str(error), url, options)
        refused = _REFUSED.search(text) if isinstance(error, TypeError) else None
        if refused and refused["name"] in ENGINE_OPTIONS:
            problem = f"does not go with the pool, a {refused['pool']}: leave it out, or choose another 'poolclass'."
            raise ConfigurationError("engine_options", problem, refused["name"]) from None
        guilty = _find_guilty_option(url, options, text)
        if guilty is not None:
            problem = f"is refused by create_engine() for {url.drivername}: {text}"
            if isinstance(error, TypeError) and guilty in DRIVER_ARGUMENTS:
                problem = (
                    f"is an argument of the driver: set it in 'connect_args', or as 'connect_args.{guilty}' in an ini."
                )
            elif isinstance(error, TypeError) and guilty not in ENGINE_OPTIONS:
                problem = f"is not an option of create_engine() for {url.drivername}{nearest(guilty, ENGINE_OPTIONS)}"
            raise ConfigurationError("engine_options", problem, guilty) from None
        if isinstance(error, NoSuchModuleError) and "sqlalchemy.dialects" in text:
            dialect, _, driver = url.drivername.partition("+")
            what = f"the driver {driver!r} for {dialect}" if driver else f"the database {dialect!r}"
            near = "." if driver else nearest(dialect, DIALECTS)
            raise ConfigurationError("bind", f"names {what}, for which SQLAlchemy has no dialect{near}") from None
        if isinstance(error, ImportError):
            if url.get_dialect().is_async:  # To install it would not help.
                raise _for_asyncio(url) from None
            problem = f"needs the driver of {url.drivername!r}, which cannot be imported ({text}): install it."
            raise ConfigurationError("bind", problem) from error
        raise ConfigurationError("bind", f"cannot create an engine for {url.drivername}: {text}") from None


def _find_guilty_option(url: URL, options: Mapping[str, Any], text: str) -> str | None:
    """Find the option that causes an error, by leaving out each of them: SQLAlchemy does not always name it."""
    for name in sorted(options, key=lambda name: repr(name) not in text):
        try:
            create_engine(url, **{other: value for other, value in options.items() if other != name})
        except Exception:
            continue
        return name
    return None
