"""The reference of the ini's keys says what the code does. What the pages show is run: see conftest.py at the root."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pkgutil import resolve_name
from typing import Any

import pytest
from docutils import nodes
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool

from sqlasession_middleware import SQLASessionMiddleware
from sqlasession_middleware._database.comments import SQLComments
from sqlasession_middleware._lifecycle.background import BackgroundThreads
from sqlasession_middleware._recording.requests import SlowRequests
from sqlasession_middleware._settings import kinds, options
from sqlasession_middleware._settings.kinds import Kind
from sqlasession_middleware.health import HealthMiddleware
from sqlasession_middleware.inspector import InspectorMiddleware
from sqlasession_middleware.tenants import TenantsMiddleware
from sqlasession_middleware.transaction import TransactionMiddleware
from sqlasession_middleware.unavailable import UnavailableMiddleware

from .rst import literals, read_page, rows, sections

#: What the page calls the types.
TYPES = {
    kinds.BOOLEAN: "true or false",
    kinds.BOOLEAN_OR_DOTTED: "true, false, or a dotted name",
    kinds.ECHO: "true, false or debug",
    kinds.WHOLE: "whole number",
    kinds.BYTES: "bytes",
    kinds.POOL_SIZE: "whole number",
    kinds.MAX_OVERFLOW: "whole number",
    kinds.SECONDS: "seconds",
    kinds.SECONDS_OR_NONE: "seconds or none",
    kinds.DEADLINE: "seconds, none, or a dotted name",
    kinds.TEXT: "text",
    kinds.WORDS: "names",
    kinds.DOTTED: "dotted name",
    kinds.DOTTED_OR_NONE: "dotted name or none",
    kinds.DOTTED_NAMES: "dotted names",
    kinds.MAPPING: "only in Python",
    kinds.OBJECT: "only in Python",
    kinds.URL_PATH: "path",
    kinds.URL_PATH_OR_NONE: "path or none",
}
#: The keys that are in none of the tables of options, and what the page says of their types.
OTHERS = {
    "sqlalchemy.url": "text",
    "sqlalchemy.engine": TYPES[kinds.DOTTED],
    "sqlalchemy.connect_args.*": "any",
    "sqlalchemy.binds.NAME.url": "text",
    "sqlalchemy.binds.NAME.engine": TYPES[kinds.DOTTED],
    "sqlalchemy.binds.NAME.*": "as above",
    "sqlalchemy.replicas": "URLs",
    "sqlalchemy.replicas.*": "as above",
    "tenants.known_url": "text",
    "tenants.known_query": "text",
    "tenants.set_local.*": "text",
    **dict.fromkeys(options.STACKED, TYPES[kinds.BOOLEAN]),
}
#: The keys' prefix, the table of them, and whose parameters have their defaults, with how the names begin there.
TABLES: tuple[tuple[str, Mapping[str, Kind], Callable[..., Any], str], ...] = (
    ("sqlalchemy.", options.ENGINE_OPTIONS, QueuePool, "pool_"),
    ("session.", options.SESSION_OPTIONS, Session, ""),
    ("", options.OTHER_SETTINGS, SQLASessionMiddleware, ""),
    ("transaction.", options.TRANSACTION_OPTIONS, TransactionMiddleware, ""),
    ("unavailable.", options.UNAVAILABLE_OPTIONS, UnavailableMiddleware, ""),
    ("background.", options.BACKGROUND_OPTIONS, BackgroundThreads, ""),
    ("slow_requests.", options.SLOW_OPTIONS, SlowRequests, ""),
    ("sql_comments.", options.COMMENT_OPTIONS, SQLComments, ""),
    ("", options.HEALTH_OPTIONS, HealthMiddleware, ""),
    ("", options.INSPECTOR_OPTIONS, InspectorMiddleware, ""),
    ("tenants.", options.TENANTS_OPTIONS, TenantsMiddleware, ""),
)


@pytest.fixture(scope="module")
def documented() -> dict[str, list[str]]:
    """The keys of the reference: the type and the default of each."""
    found: dict[str, list[str]] = {}
    for item in read_page("ini").findall(nodes.definition_list_item):
        key = item[0].astext()
        assert key not in found
        found[key] = [each.astext() for each in item.findall(nodes.classifier)]
    return found


def test_reference_has_every_key_and_its_type(documented: dict[str, list[str]]) -> None:
    known = {prefix + name: TYPES[kind] for prefix, table, _, _ in TABLES for name, kind in table.items()}
    assert {key: said[0] for key, said in documented.items()} == {**known, **OTHERS}


def test_reference_has_the_defaults_that_signatures_have(documented: dict[str, list[str]]) -> None:
    compared = {}
    for prefix, table, owner, beginning in TABLES:
        defaults = {name: parameter.default for name, parameter in inspect.signature(owner).parameters.items()}
        for name in table:
            default = defaults.get(name, defaults.get(name.removeprefix(beginning)))
            if isinstance(default, bool):
                compared[prefix + name] = str(default).lower()
            elif isinstance(default, int):
                compared[prefix + name] = str(default)
            elif isinstance(default, float):
                compared[prefix + name] = f"{default:g}"
            elif isinstance(default, str) and default.startswith("/"):
                compared[prefix + name] = default
    assert {"sqlalchemy.pool_size", "session.autoflush", "replica_retry", "transaction.attempts"} <= set(compared)
    assert {key: documented[key][1] for key in compared} == compared


#: The parameters of the constructor that keys of their own readers set: see the tables of ini.py.
READ_APART = {"bind", "binds", "replicas", "engine_options", "session_options", *options.GROUPS}


def test_each_parameter_has_an_ini_key_and_each_key_a_parameter() -> None:
    expected: list[tuple[Callable[..., Any], set[str]]] = [
        (SQLASessionMiddleware, {*READ_APART, *options.OTHER_SETTINGS, *options.STACKED}),
        (TransactionMiddleware, {*options.STACKED["transaction"]}),
        (UnavailableMiddleware, {*options.STACKED["unavailable"]}),
        (HealthMiddleware, {*options.HEALTH_OPTIONS}),
        (InspectorMiddleware, {*options.INSPECTOR_OPTIONS}),
        (TenantsMiddleware, {*options.TENANTS_OPTIONS, "bind", "set_local", "options"}),
        (BackgroundThreads, {*options.BACKGROUND_OPTIONS}),
        (SlowRequests, {*options.SLOW_OPTIONS}),
        (SQLComments, {*options.COMMENT_OPTIONS}),
    ]
    for owner, names in expected:
        assert {*inspect.signature(owner).parameters} - {"app"} == names


def test_life_of_a_request_names_what_is_in_the_source() -> None:
    names = [literal for cells in rows(sections(read_page("life"))["In the source"]) for literal in literals(cells[1])]
    assert len(names) > 20
    for name in names:
        if "." in name:  # The others are further methods of the class before them.
            resolve_name(f"sqlasession_middleware.{name}")
