"""The reference of the ini's keys says what the code does. What the pages show is run: see conftest.py at the root."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from docutils import nodes
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool

from sqlasession_middleware import SQLASessionMiddleware, settings
from sqlasession_middleware.settings import Kind
from sqlasession_middleware.transaction import TransactionMiddleware
from sqlasession_middleware.unavailable import UnavailableMiddleware

from .rst import read_page

#: What the page calls the types.
TYPES = {
    settings.BOOLEAN: "true or false",
    settings.ECHO: "true, false or debug",
    settings.WHOLE: "whole number",
    settings.POOL_SIZE: "whole number",
    settings.MAX_OVERFLOW: "whole number",
    settings.SECONDS: "seconds",
    settings.TEXT: "text",
    settings.WORDS: "names",
    settings.DOTTED: "dotted name",
    settings.DOTTED_OR_NONE: "dotted name or none",
    settings.DOTTED_NAMES: "dotted names",
    settings.MAPPING: "only in Python",
    settings.OBJECT: "only in Python",
}
#: The keys that are in none of the tables of settings.py, and what the page says of their types.
OTHERS = {
    "sqlalchemy.url": "text",
    "sqlalchemy.connect_args.*": "any",
    "sqlalchemy.binds.NAME.url": "text",
    "sqlalchemy.binds.NAME.*": "as above",
    "sqlalchemy.replicas": "URLs",
    "sqlalchemy.replicas.*": "as above",
    **dict.fromkeys(settings.STACKED, TYPES[settings.BOOLEAN]),
}
#: The keys' prefix, the table of them, and whose parameters have their defaults, with how the names begin there.
TABLES: tuple[tuple[str, Mapping[str, Kind], Callable[..., Any], str], ...] = (
    ("sqlalchemy.", settings.ENGINE_OPTIONS, QueuePool, "pool_"),
    ("session.", settings.SESSION_OPTIONS, Session, ""),
    ("", settings.OTHER_SETTINGS, SQLASessionMiddleware, ""),
    ("transaction.", settings.TRANSACTION_OPTIONS, TransactionMiddleware, ""),
    ("unavailable.", settings.UNAVAILABLE_OPTIONS, UnavailableMiddleware, ""),
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
            elif isinstance(default, int | float):
                compared[prefix + name] = f"{default:g}"
    assert {"sqlalchemy.pool_size", "session.autoflush", "replica_retry", "transaction.attempts"} <= set(compared)
    assert {key: documented[key][1] for key in compared} == compared
