"""The engines of an application with binds or replicas, by the names that statements find them by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Engine

from .binds import DEFAULT, unknown_bind_key
from .engines import EngineSource
from .replicas import Replicas, replica_name

__all__ = ["Routing"]


class Routing:
    """The engines of one application.

    :param default: the engine of everything without a bind key: the primary, if there are replicas.
    :param binds: by their bind keys.
    :param replicas: of the default engine.
    """

    def __init__(self, default: EngineSource, binds: Mapping[str, EngineSource], replicas: Replicas | None) -> None:
        self._default = default
        self.binds = binds
        self.replicas = replicas
        #: bind keys by mapper. Cached, because they do not change and most statements have a mapper.
        self.keys: dict[Any, str | None] = {}

    def source_of(self, key: str | None, what: object) -> EngineSource:
        """What the engine of a bind key is made of.

        :param what: the table, mapper or argument that has the key, for the error.
        :raises UnboundExecutionError: if there is no such key.
        """
        if key is None or key == DEFAULT:
            return self._default
        if key not in self.binds:
            raise unknown_bind_key(key, self.binds, what)
        return self.binds[key]

    def sources(self) -> dict[str, EngineSource]:
        """The sources of all engines by name, but the default one."""
        replicas = () if self.replicas is None else self.replicas.sources
        return {**self.binds, **{replica_name(number): source for number, source in enumerate(replicas)}}

    def dispose(self) -> None:
        """Close the idle connections of all engines but the default one."""
        for source in self.sources().values():
            source.dispose()

    def all_engines(self) -> dict[str, Engine]:
        """All engines by name: ``"default"``, the bind keys, and ``"replicas[0]"`` and so on."""
        engines = {DEFAULT: self._default.engine, **{key: source.engine for key, source in self.binds.items()}}
        for number, engine in enumerate(self.replicas.engines if self.replicas is not None else ()):
            engines[replica_name(number)] = engine
        return engines
