"""The tables of options: the name of each, and the kind of its value.

The ini reader and the checks of arguments follow these tables, and ``tests/test_docs.py`` compares ``docs/ini.rst``
with them.
"""

from __future__ import annotations

from collections.abc import Mapping

from .kinds import (
    BOOLEAN,
    BOOLEAN_OR_DOTTED,
    BYTES,
    DEADLINE,
    DOTTED,
    DOTTED_NAMES,
    DOTTED_OR_NONE,
    ECHO,
    MAPPING,
    MAX_OVERFLOW,
    OBJECT,
    POOL_SIZE,
    SECONDS,
    SECONDS_OR_NONE,
    TEXT,
    URL_PATH,
    URL_PATH_OR_NONE,
    WHOLE,
    WORDS,
    Kind,
)

__all__ = [
    "BACKGROUND_OPTIONS",
    "COMMENT_OPTIONS",
    "DRIVER_ARGUMENTS",
    "ENGINE_OPTIONS",
    "GROUPS",
    "HEALTH_OPTIONS",
    "INSPECTOR_OPTIONS",
    "OTHER_SETTINGS",
    "SESSION_OPTIONS",
    "SLOW_OPTIONS",
    "STACKED",
    "TENANTS_OPTIONS",
    "TRANSACTION_OPTIONS",
    "UNAVAILABLE_OPTIONS",
]

#: The parameters of :func:`sqlalchemy.create_engine`. A dialect may accept more.
ENGINE_OPTIONS: Mapping[str, Kind] = {
    "connect_args": MAPPING,
    "creator": DOTTED,
    "echo": ECHO,
    "echo_pool": ECHO,
    "enable_from_linting": BOOLEAN,
    "execution_options": MAPPING,
    "future": BOOLEAN,
    "hide_parameters": BOOLEAN,
    "implicit_returning": BOOLEAN,
    "insertmanyvalues_page_size": WHOLE,
    "isolation_level": TEXT,
    "json_deserializer": DOTTED,
    "json_serializer": DOTTED,
    "label_length": WHOLE,
    "logging_name": TEXT,
    "max_identifier_length": WHOLE,
    "max_overflow": MAX_OVERFLOW,
    "module": DOTTED,
    "paramstyle": TEXT,
    "plugins": WORDS,
    "pool": OBJECT,
    "pool_events": OBJECT,
    "pool_logging_name": TEXT,
    "pool_pre_ping": BOOLEAN,
    "pool_recycle": WHOLE,
    "pool_reset_on_return": TEXT,
    "pool_size": POOL_SIZE,
    "pool_timeout": SECONDS,
    "pool_use_lifo": BOOLEAN,
    "poolclass": DOTTED,
    "query_cache_size": WHOLE,
    "skip_autocommit_rollback": BOOLEAN,
    "use_insertmanyvalues": BOOLEAN,
}

#: Arguments of drivers that are taken for options of the engine.
DRIVER_ARGUMENTS = frozenset(
    (
        "application_name",
        "autocommit",
        "cached_statements",
        "charset",
        "check_same_thread",
        "client_flag",
        "connect_timeout",
        "detect_types",
        "init_command",
        "keepalives",
        "keepalives_count",
        "keepalives_idle",
        "keepalives_interval",
        "local_infile",
        "options",
        "prepare_threshold",
        "read_timeout",
        "ssl",
        "ssl_ca",
        "ssl_cert",
        "ssl_key",
        "sslcert",
        "sslkey",
        "sslmode",
        "sslrootcert",
        "tcp_user_timeout",
        "timeout",
        "unix_socket",
        "uri",
        "write_timeout",
    )
)

#: The parameters of :class:`sqlalchemy.orm.Session` that an application may set, and ``class_``, the class itself.
SESSION_OPTIONS: Mapping[str, Kind] = {
    "autobegin": BOOLEAN,
    "autoflush": BOOLEAN,
    "class_": DOTTED,
    "close_resets_only": BOOLEAN,
    "enable_baked_queries": BOOLEAN,
    "execution_options": MAPPING,
    "expire_on_commit": BOOLEAN,
    "info": MAPPING,
    "join_transaction_mode": TEXT,
    "query_cls": DOTTED,
    "twophase": BOOLEAN,
}

#: Ini keys that have the name of the constructor's parameter.
OTHER_SETTINGS: Mapping[str, Kind] = {
    "deadline": DEADLINE,
    "lazy_begin": BOOLEAN,
    "metadata": DOTTED_NAMES,
    "name": TEXT,
    "ping_after": SECONDS_OR_NONE,
    "read_your_writes": SECONDS,
    "replica_retry": SECONDS,
    "report_leaks": BOOLEAN,
    "server_timing": BOOLEAN_OR_DOTTED,
    "streams": WORDS,
}

#: The parameters of :class:`~sqlasession_middleware.transaction.TransactionMiddleware`.
TRANSACTION_OPTIONS: Mapping[str, Kind] = {
    "activate": DOTTED_OR_NONE,
    "attempts": WHOLE,
    "backoff_base": SECONDS,
    "backoff_cap": SECONDS,
    "commit_failed": DOTTED_OR_NONE,
    "commit_veto": DOTTED_OR_NONE,
    "replay_body_max": BYTES,
    "replay_body_memory": BYTES,
    "retry_on": WORDS,
}

#: The parameters of :class:`~sqlasession_middleware.unavailable.UnavailableMiddleware`.
UNAVAILABLE_OPTIONS: Mapping[str, Kind] = {
    "breaker_failures": WHOLE,
    "breaker_seconds": SECONDS,
    "page": DOTTED_OR_NONE,
    "retry_after": WHOLE,
    "transient": BOOLEAN,
}

#: The parameters of :class:`~sqlasession_middleware.health.HealthMiddleware`.
HEALTH_OPTIONS: Mapping[str, Kind] = {
    "application": DOTTED,
    "live": URL_PATH_OR_NONE,
    "ready": URL_PATH_OR_NONE,
    "timeout": SECONDS,
}

#: The parameters of :class:`~sqlasession_middleware.inspector.InspectorMiddleware`.
INSPECTOR_OPTIONS: Mapping[str, Kind] = {
    "applications": DOTTED_NAMES,
    "hosts": WORDS,
    "memory": BYTES,
    "path": URL_PATH,
    "peers": WORDS,
    "proxied": BOOLEAN,
    "requests": WHOLE,
    "store": TEXT,
    "token": TEXT,
}

#: The parameters of :class:`~sqlasession_middleware._lifecycle.background.BackgroundThreads`.
BACKGROUND_OPTIONS: Mapping[str, Kind] = {
    "seconds": SECONDS,
    "threads": WHOLE,
}

#: The parameters of :class:`~sqlasession_middleware._recording.requests.SlowRequests`.
SLOW_OPTIONS: Mapping[str, Kind] = {
    "queries": WHOLE,
    "seconds": SECONDS,
}

#: The parameters of :class:`~sqlasession_middleware._database.comments.SQLComments`.
COMMENT_OPTIONS: Mapping[str, Kind] = {
    "application": TEXT,
    "method": BOOLEAN,
    "route": BOOLEAN_OR_DOTTED,
    "traceparent": BOOLEAN,
    "values": DOTTED_OR_NONE,
}

#: The parameters of :class:`~sqlasession_middleware.tenants.TenantsMiddleware`, beside those of
#: :class:`~sqlasession_middleware.SQLASessionMiddleware`. ``known`` is read by two further keys as well.
TENANTS_OPTIONS: Mapping[str, Kind] = {
    "domain": TEXT,
    "hosts": DOTTED,
    "idle": SECONDS,
    "known": WORDS,
    "known_seconds": SECONDS,
    "most": WHOLE,
    "required": BOOLEAN,
    "schema": TEXT,
    "tenant": TEXT,
}

#: The parameters whose argument is a dict of options, by which they are switched on.
GROUPS: Mapping[str, Mapping[str, Kind]] = {
    "background": BACKGROUND_OPTIONS,
    "slow_requests": SLOW_OPTIONS,
    "sql_comments": COMMENT_OPTIONS,
}

#: The parameters that switch an inner middleware on, and its options. Ini keys have the parameter as their prefix.
STACKED: Mapping[str, Mapping[str, Kind]] = {"transaction": TRANSACTION_OPTIONS, "unavailable": UNAVAILABLE_OPTIONS}
