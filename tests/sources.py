"""The modules of the package, for the tests that read its source."""

from __future__ import annotations

import ast
from pathlib import Path

import sqlasession_middleware

PACKAGE = Path(sqlasession_middleware.__file__).parent


def module_files() -> dict[str, Path]:
    """The files of all modules, those of the sub-packages included, by their dotted names."""
    found = {_dotted(path): path for path in sorted(PACKAGE.rglob("*.py"))}
    # An empty list would make the tests pass without checking anything.
    names = {"sqlasession_middleware", "sqlasession_middleware.middleware", "sqlasession_middleware._scope.scope"}
    assert names <= found.keys(), f"the package's modules are not found under {PACKAGE}: {sorted(found)}"
    return found


def parse(path: Path) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(path.read_text(encoding="utf-8"))


def _dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")
