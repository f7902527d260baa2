"""From a URL and options, or an Engine, to the engine of an application.

An engine is made at its first use, but everything that can be known to be wrong with it is found out at once.
Where the user said nothing SQLAlchemy's defaults stand, but for these, each of which hurts in a server:

``pool_pre_ping`` is on for databases behind a network.
    A server that was restarted, or a firewall that forgot an idle connection, would fail one request for each
    pooled connection. The ping costs a round trip per request that uses the database.

``sqlite://`` (``:memory:``) is one database for all threads.
    SQLAlchemy gives each thread an empty one of its own. Here every connection of the engine opens the same
    database of SQLite's ``memdb``, with transactions and locks of its own, for as long as the engine lives.

An SQLite file in a folder that does not exist is refused.
    It would fail at the first request instead, with "unable to open database file".

After a fork the child begins with empty pools: see :mod:`sqlasession_middleware.forks`. In-memory databases are the
exception, of which the child has a copy.
"""

from __future__ import annotations

import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote
from uuid import uuid4

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL, Dialect, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError
from sqlalchemy.pool import QueuePool

from .errors import ConfigurationError, nearest, shown
from .forks import after_fork, check_process, has_unseen_forks, leave_to_parent
from .settings import ENGINE_OPTIONS, check_types, copy_options
from .watch import WatchedPool

__all__ = ["EngineSource", "read_source", "without_passwords_of_urls", "without_secrets"]

#: The names that people write for a database in a URL and that are none of its dialects'.
DIALECTS = ("postgresql", "mysql", "mariadb", "sqlite", "oracle", "mssql", "cockroachdb")

#: SQLite's memdb is shared between connections since 3.36.0 (SQLite's release history).
MEMDB_SINCE = (3, 36, 0)

# Reentrant, because the garbage collector may run an abandoned body's code at any time.
_creating = threading.RLock()


@after_fork
def _renew_lock() -> None:  # pragma: no cover  # in a child
    global _creating
    _creating = threading.RLock()


# Dialects of (driver, options) pairs that create_engine() has accepted: 10,000 applications on one kind of
# database need not make 10,000 engines to find out that their options are right.
_accepted: dict[Any, Dialect] = {}
_ACCEPTED_AT_MOST = 256
_OF_ANOTHER_POOL = ("poolclass", "pool_size", "max_overflow", "pool_timeout", "pool_use_lifo")
_PLAIN = (str, int, float, bool, type(None), type)


class EngineSource:
    """One engine: a given one, or the URL and options to make it from at first use.

    :param bind: URL string, :class:`~sqlalchemy.engine.URL`, or :class:`~sqlalchemy.engine.Engine`.
    :param options: of :func:`~sqlalchemy.create_engine`.
    :raises ConfigurationError: if they cannot make an engine. Nothing is connected to.
    """

    __slots__ = ("_engine", "_made", "_options", "given", "url")

    def __init__(self, bind: str | URL | Engine, options: Mapping[str, Any] | None = None) -> None:
        self._engine: Engine | None = None
        self._made: Callable[[Engine], None] | None = None
        self._options: dict[str, Any] | None = None
        #: whether the user made the engine, and so disposes of it
        self.given = isinstance(bind, Engine)
        if isinstance(bind, Engine):
            if options:
                raise ConfigurationError("engine_options", "cannot change an Engine that is made already: give a URL.")
            self.url = bind.url
            self._engine = bind
            _take_care(bind)
            return
        self.url = _absolute(_parse_url(bind))
        if options is not None:
            self._options = _check_options(options)
        if self._options and "pool" in self._options:
            # A pool is told which engine it works for, so there cannot be one engine to try and another to use.
            self._engine = self._make()
            _take_care(self._engine)
        else:
            self._check()

    @property
    def engine(self) -> Engine:
        """The engine, made now if this is its first use."""
        if has_unseen_forks:  # pragma: no cover  # in uWSGI
            check_process()
        if self._engine is None:
            with _creating:
                if self._engine is None:
                    engine = self._make()
                    _take_care(engine)
                    if self._made is not None:
                        self._made(engine)
                    self._engine = engine
        return self._engine

    def when_made(self, made: Callable[[Engine], None]) -> None:
        """Have ``made`` called with the engine as soon as there is one."""
        if self._engine is not None:
            made(self._engine)
        self._made = made

    def dispose(self) -> None:
        """Close the pool, unless the user made the engine. The next use opens another one."""
        if self._engine is not None and not self.given:
            self._engine.dispose()

    def without_secrets(self, text: str) -> str:
        """``text`` with stars for all that may be a password of this engine."""
        return without_secrets(text, self.url, self._options or {})

    def __repr__(self) -> str:
        # The query may hold secrets that SQLAlchemy does not know to be any (``?password=``, ``?sslpassword=``).
        return self.url.set(query={}).render_as_string()

    def _check(self) -> None:
        url, options = self.url, self._options or {}
        key = None
        if "plugin" not in url.query and all(isinstance(value, _PLAIN) for value in options.values()):
            key = (url.drivername, _is_memory(url), frozenset(options.items()))
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
        if dialect.name == "sqlite":
            _check_folder(url)

    def _make(self) -> Engine:
        url, options = self.url, dict(self._options or {})
        memory = not {"creator", "pool", "poolclass"} & options.keys() and _is_memory(url)
        if memory:
            options["poolclass"] = WatchedPool
            options["connect_args"] = {"check_same_thread": False, **options.get("connect_args", {})}
            if sqlite3.sqlite_version_info < MEMDB_SINCE:
                # One connection, one request at a time: slower, but no request sees or undoes another's work.
                options.update(pool_size=1, max_overflow=0)
        elif "pool" not in options and url.get_backend_name() != "sqlite":
            options.setdefault("pool_pre_ping", True)
        with _errors_explained(url, options):
            if not {"pool", "poolclass"} & options.keys():
                pool_class = getattr(url.get_dialect(), "get_pool_class", None)
                if pool_class is not None and pool_class(url) is QueuePool:
                    options["poolclass"] = WatchedPool
            engine = create_engine(url, **options)
        if memory and sqlite3.sqlite_version_info >= MEMDB_SINCE:
            _share_memory(engine)
        return engine


def read_source(parameter: str, given: Any, inherited: Mapping[str, Any] | None = None) -> EngineSource:
    """The engine of one of several binds or replicas.

    :param parameter: what errors call it, ``"binds['audit']"``.
    :param given: what :class:`EngineSource` takes as its bind, or a dict of engine options with ``url``.
    :param inherited: engine options, unless ``given`` has its own.
    :raises ConfigurationError: if it cannot make an engine.
    """
    options: dict[str, Any] = {}
    key = None
    if isinstance(given, Mapping):
        options, key = dict(given), "url"
        if key not in options:
            raise ConfigurationError(parameter, "is missing: it is the database URL.", key)
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
    """``options``, and of the inherited ones what they do not replace: each of the driver's arguments by itself."""
    # These lead to the inherited engine's database, whatever the URL.
    inherited = {name: value for name, value in inherited.items() if name not in ("creator", "pool")}
    if options.keys() & {"pool", "poolclass"}:
        # What the inherited pool was told is not for one of another kind.
        inherited = {name: value for name, value in inherited.items() if name not in _OF_ANOTHER_POOL}
    merged = {**inherited, **options}
    arguments = [each.get("connect_args") for each in (inherited, options)]
    if all(isinstance(each, Mapping) for each in arguments):
        merged["connect_args"] = {**arguments[0], **arguments[1]}  # type: ignore[dict-item]  # both are
    return merged


def _take_care(engine: Engine) -> None:
    url = engine.url
    named_memory = (url.database or "").startswith("file:") and re.search("mode=memory|vfs=memdb", str(url))
    if not _is_memory(url) and not named_memory:
        leave_to_parent(engine)


def _is_memory(url: URL) -> bool:
    return url.drivername in ("sqlite", "sqlite+pysqlite") and url.database in (None, "", ":memory:")


def _share_memory(engine: Engine) -> None:
    """Let all connections of ``engine`` open one in-memory database, which lives until the engine is disposed of."""
    name = f"file:/{uuid4().hex}?vfs=memdb"
    keepers: list[Any] = []  # SQLite drops the database with its last connection, and a pool may close any of its own.

    @event.listens_for(engine, "do_connect")
    def open_shared(dialect: Dialect, record: Any, arguments: list[Any], options: dict[str, Any]) -> None:
        arguments[0] = name
        options["uri"] = True
        if not keepers:
            keepers.append(dialect.connect(*arguments, **options))

    @event.listens_for(engine, "engine_disposed")
    def drop(engine: Engine) -> None:
        while keepers:
            keepers.pop().close()


def _absolute(url: URL) -> URL:
    """With the path of a SQLite file as it is now: the process may be in another folder at the first use."""
    path = url.database
    if url.get_backend_name() != "sqlite" or not path or path == ":memory:" or path.startswith("file:"):
        return url
    return url if os.path.isabs(path) else url.set(database=os.path.join(os.getcwd(), path))


def _check_folder(url: URL) -> None:
    path = url.database
    if not path or path == ":memory:" or path.startswith("file:"):
        return
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        text = f"names the SQLite file {path!r}, but there is no folder {folder!r}: create it, or mend the path."
        raise ConfigurationError("bind", without_secrets(text, url, {}))


def _check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(options, Mapping):
        raise ConfigurationError("engine_options", f"must be a dict, got {type(options).__name__}.")
    for name in options:
        if not isinstance(name, str):
            raise ConfigurationError("engine_options", f"must have names as keys, got {shown(name)}.")
    check_types("engine_options", options, ENGINE_OPTIONS)
    return {name: copy_options(value) for name, value in options.items()}


def _parse_url(bind: object) -> URL:
    if not isinstance(bind, str | URL):
        raise ConfigurationError("bind", f"must be a URL string, a URL or an Engine, got {type(bind).__name__}.")
    # Whatever cannot be parsed may hold a password anywhere, so none of it is repeated, and neither is the cause.
    if isinstance(bind, str) and "://" not in bind:
        raise ConfigurationError(
            "bind", f"must be a database URL such as 'sqlite:///shop.db', got {len(bind)} characters without '://'."
        )
    try:
        url = make_url(bind)
    except (ArgumentError, ValueError):
        url = None
    # No host has an '@' in it: it is the end of a password that was not encoded.
    if url is None or "@" in (url.host or ""):
        raise ConfigurationError(
            "bind",
            "is no URL that SQLAlchemy can read: 'dialect+driver://user:password@host:port/database', with a port"
            " that is a number and each of '@/:?#%' in the user or password percent-encoded.",
        )
    # Two URLs in one: the second would be the name of the first one's database, with the password in it.
    if "://" in (url.database or "").removeprefix("file://"):
        raise ConfigurationError(
            "bind", "holds another URL in the name of its database: give each a setting of its own."
        )
    return url


def _for_asyncio(url: URL) -> ConfigurationError:
    # By its name in the URL: psycopg's dialect says "psycopg" of "psycopg_async" as well.
    driver = url.drivername.partition("+")[2] or url.drivername
    return ConfigurationError("bind", f"names the driver {driver!r}, which is for asyncio: WSGI needs one that is not.")


def _check_isolation_level(dialect: Dialect, level: Any) -> None:
    """SQLAlchemy would find out at the first connection, and at each one after that."""
    try:
        known = list(dialect.get_isolation_level_values(None))  # type: ignore[arg-type]  # not connected yet
    except Exception:
        return  # It is the connection that knows.
    if isinstance(level, str) and level.replace("_", " ").upper() not in known:
        problem = f"must be one of {', '.join(known)} for {dialect.name}, got {shown(level)}."
        raise ConfigurationError("engine_options", problem, "isolation_level")


@contextmanager
def _errors_explained(url: URL, options: Mapping[str, Any]) -> Iterator[None]:
    """Turn what SQLAlchemy says of a URL and options into an error that names the setting and hides secrets."""
    try:
        yield
    except Exception as error:
        text = without_secrets(str(error), url, options)
        guilty = _find_guilty_option(url, options, text)
        if guilty is not None:
            problem = f"is refused by create_engine() for {url.drivername}: {text}"
            if isinstance(error, TypeError) and guilty not in ENGINE_OPTIONS:
                problem = f"is not an option of create_engine() for {url.drivername}{nearest(guilty, ENGINE_OPTIONS)}"
            raise ConfigurationError("engine_options", problem, guilty) from None
        if isinstance(error, NoSuchModuleError) and "sqlalchemy.dialects" in text:
            dialect, _, driver = url.drivername.partition("+")
            what = f"the driver {driver!r} for {dialect}" if driver else f"the database {dialect!r}"
            near = "." if driver else nearest(dialect, DIALECTS)
            raise ConfigurationError("bind", f"names {what}, which SQLAlchemy has no dialect for{near}") from None
        if isinstance(error, ImportError):
            if url.get_dialect().is_async:  # Nobody should install it for this.
                raise _for_asyncio(url) from None
            problem = f"needs the driver of {url.drivername!r}, which cannot be imported ({text}): install it."
            raise ConfigurationError("bind", problem) from error
        raise ConfigurationError("bind", f"cannot make an engine of {url.drivername}: {text}") from None


def _find_guilty_option(url: URL, options: Mapping[str, Any], text: str) -> str | None:
    """The option without which the engine can be made: SQLAlchemy's errors do not always name it."""
    for name in sorted(options, key=lambda name: repr(name) not in text):
        try:
            create_engine(url, **{other: value for other, value in options.items() if other != name})
        except Exception:
            continue
        return name
    return None


def without_secrets(text: str, url: URL, options: Mapping[str, Any]) -> str:
    """``text`` with stars for all that may be a password: where one belongs, and where one is put by mistake."""
    secrets = {str(url.password or "")}
    for name, value in (*url.normalized_query.items(), *(options.get("connect_args") or {}).items()):
        for each in value if isinstance(value, tuple) else (value,):
            pieces = [str(each), *re.split("[:;,@/]", str(each))]
            secrets.update(piece for piece in pieces if len(piece) > 3 or re.search("pass|pwd|secret|token", name))
    for secret in sorted(secrets - {""}, key=len, reverse=True):
        for written in (secret, quote(secret, safe="")):
            text = text.replace(written, "***")
    return without_passwords_of_urls(text)


def without_passwords_of_urls(text: str) -> str:
    """``text`` with stars for what stands where a URL has its password."""
    # In a whole URL it may hold ":" and "/". Where only an end of one is left, it begins at the nearest of them.
    return re.sub(r":[^:@/\s]+@", ":***@", re.sub(r"(://[^:/@\s]*:)\S*@", r"\1***@", text))
