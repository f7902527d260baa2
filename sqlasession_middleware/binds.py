"""Several databases in one application: which engine a table belongs to.

.. code-block:: python

    audit = MetaData(info={"bind_key": "audit"})
    app = SQLASessionMiddleware(app, "postgresql+psycopg://localhost/shop", binds={"audit": "sqlite:///audit.db"})

The key is where Flask-SQLAlchemy has it, in ``MetaData.info["bind_key"]``, so that models are portable; a table may
have one of its own, in ``Table.info["bind_key"]``. What has no key belongs to the default engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import Index, Sequence, Table, UpdateBase, inspect
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import Mapper
from sqlalchemy.sql import visitors
from sqlalchemy.sql.functions import next_value

from .engines import EngineSource, read_source
from .errors import ConfigurationError, nearest, shown

__all__ = ["DEFAULT", "key_of", "key_of_mapper", "key_of_statement", "read_binds", "unknown_bind_key"]

#: the name of the engine that is no bind's
DEFAULT = "default"

_OWNERS = (Table, Sequence)
_WITH_TARGET = (UpdateBase, Index)


def read_binds(binds: Any) -> dict[str, EngineSource]:
    """The sources of the engines that ``binds`` names.

    :raises ConfigurationError: if one of them is wrong.
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
            raise ConfigurationError("binds", "is the engine of everything without a bind key: give it as 'bind'.", key)
        sources[key] = read_source(f"binds[{key!r}]", given)
    return sources


def key_of_mapper(mapper: Any) -> str | None:
    """The bind key of a mapped class, as :meth:`Session.get_bind` is given it; None for the default engine."""
    if not isinstance(mapper, Mapper):
        mapper = inspect(mapper).mapper
    # A flush asks for the base of an inheritance, and writes all of its tables on one connection.
    table = mapper.base_mapper.local_table
    return key_of(table) if type(table) is Table else _find(table)


def key_of_statement(clause: Any) -> str | None:
    """The bind key of a statement of tables, as :meth:`Session.get_bind` is given it; None for the default engine.

    Where it has several tables it is the first one's, of DML the target's: no database joins two.
    """
    # Most statements are a SELECT whose first column tells; a public name for it would take longer than the rest.
    columns = getattr(clause, "_raw_columns", None)
    if columns:
        first = columns[0]
        table = first if type(first) is Table else getattr(first, "table", None)
        if isinstance(table, Table):
            # To ask is the call that most tables do without.
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
    """The table or sequence that an element of a statement surely comes from."""
    if isinstance(element, Table):
        return element
    owner = getattr(element, "sequence" if isinstance(element, next_value) else "table", None)
    return owner if isinstance(owner, _OWNERS) else None


def key_of(element: Table | Sequence) -> str | None:
    """The bind key of a table or sequence; None for the default engine."""
    key: str | None = element.info.get("bind_key")
    if key is None:
        metadata = element.metadata
        if metadata is None or (key := metadata.info.get("bind_key")) is None:
            return None
    return None if key == DEFAULT else key


def unknown_bind_key(key: str, known: Iterable[str], what: object) -> UnboundExecutionError:
    """The error for a key that no bind has."""
    names = sorted(known)
    return UnboundExecutionError(
        f"{what} has the bind key {key!r}, and no bind of the application has that name"
        f" (there are: {', '.join(map(repr, names)) or 'none'}){nearest(str(key), names)}"
    )
