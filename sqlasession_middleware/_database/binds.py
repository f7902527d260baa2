"""Several databases in one application: the bind key of a table names its engine.

.. code-block:: python

    audit = MetaData(info={"bind_key": "audit"})
    app = SQLASessionMiddleware(app, "postgresql+psycopg://localhost/shop", binds={"audit": "sqlite:///audit.db"})

The bind key is in ``MetaData.info["bind_key"]``, as in Flask-SQLAlchemy, so that models work with both. A key in
``Table.info["bind_key"]`` overrides it. A table without a key belongs to the default engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import Index, Sequence, Table, UpdateBase, inspect
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import Mapper
from sqlalchemy.sql import visitors
from sqlalchemy.sql.functions import next_value

from .._dependencies import RAW_COLUMNS
from ..errors import ConfigurationError, nearest, shown
from .engines import EngineSource, read_source

__all__ = ["DEFAULT", "key_of", "key_of_mapper", "key_of_statement", "read_binds", "unknown_bind_key"]

#: the name of the engine for tables without a bind key
DEFAULT = "default"

_OWNERS = (Table, Sequence)
_WITH_TARGET = (UpdateBase, Index)


def read_binds(binds: Any) -> dict[str, EngineSource]:
    """Return the sources of engines from the setting ``binds``, by their bind keys.

    :raises ConfigurationError: if a key or a value is wrong.
    """
    if not isinstance(binds, Mapping):
        raise ConfigurationError(
            "binds", f"must be a dict of databases by their bind keys, got {type(binds).__name__}."
        )
    sources = {}
    for key, given in binds.items():
        if not isinstance(key, str) or not key.isprintable() or not key.strip() or "://" in key:
            raise ConfigurationError("binds", f"must have names as keys, got {shown(key)}.")
        if key == DEFAULT:
            raise ConfigurationError(
                "binds", "is reserved for tables without a bind key: pass this database as 'bind'.", key
            )
        sources[key] = read_source(f"binds[{key!r}]", given)
    return sources


def key_of_mapper(mapper: Any) -> str | None:
    """Return the bind key of a mapped class; None for the default engine.

    :param mapper: what :meth:`Session.get_bind` gets as ``mapper``: a mapper, or a class.
    """
    if not isinstance(mapper, Mapper):
        mapper = inspect(mapper).mapper
    # The base mapper, because a flush passes it and writes all tables of an inheritance on one connection.
    table = mapper.base_mapper.local_table
    return key_of(table) if type(table) is Table else _find(table)


def key_of_statement(clause: Any) -> str | None:
    """Return the bind key of the first table of a statement, of DML its target's; None for the default engine.

    The other tables have to be in the same database.

    :param clause: what :meth:`Session.get_bind` gets as ``clause``: a statement, or None.
    """
    # Most statements are a SELECT whose first column has a table.
    columns = getattr(clause, RAW_COLUMNS, None)
    if columns:
        first = columns[0]
        table = first if type(first) is Table else getattr(first, "table", None)
        if isinstance(table, Table):
            # Most tables have neither, and need no call of key_of().
            return key_of(table) if table.info or table.metadata.info else None
    return _find(clause)


def _find(clause: Any) -> str | None:
    element = getattr(clause, "element", clause)  # of DDL: a table, an index, a sequence
    if isinstance(element, _WITH_TARGET):
        element = element.table
    if not isinstance(element, _OWNERS):
        if not hasattr(element, "get_children"):
            return None
        element = next((each for each in map(_owner, visitors.iterate(element)) if each is not None), None)
    return None if element is None else key_of(element)


def _owner(element: Any) -> Table | Sequence | None:
    """Return the table or sequence that an element of a statement is or belongs to, or None."""
    if isinstance(element, Table):
        return element
    owner = getattr(element, "sequence" if isinstance(element, next_value) else "table", None)
    return owner if isinstance(owner, _OWNERS) else None


def key_of(element: Table | Sequence) -> str | None:
    """Return the bind key of a table or sequence; None for the default engine."""
    key: str | None = element.info.get("bind_key")
    if key is None:
        metadata = element.metadata
        if metadata is None or (key := metadata.info.get("bind_key")) is None:
            return None
    return None if key == DEFAULT else key


def unknown_bind_key(key: str, known: Iterable[str], what: object) -> UnboundExecutionError:
    """Return the error for a bind key that is not in ``binds``.

    :param known: the keys of ``binds``.
    :param what: the table, statement or argument with the key.
    """
    names = sorted(known)
    return UnboundExecutionError(
        f"{what} has the bind key {key!r}, and no bind of the application has that name"
        f" (there are: {', '.join(map(repr, names)) or 'none'}){nearest(str(key), names)}"
    )
