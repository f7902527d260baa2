"""The reference of environ keys and loggers: none that the package has is missing there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import sqlasession_middleware

from .rst import literals, read_page, rows, sections

PACKAGE = Path(sqlasession_middleware.__file__).parent
KEY = re.compile(r"(wsgi|sqlasession|werkzeug\.debug)\.[a-z_]+|(HTTP|REQUEST|PATH|CONTENT|SCRIPT|QUERY)_[A-Z_]+")
SECTIONS = sections(read_page("environ"))


def first_cells(title: str) -> list[str]:
    """The literals in the first column of the tables of a section."""
    return [literal for cells in rows(SECTIONS[title]) for literal in literals(cells[0])]


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.glob("*.py")):
        yield path.stem, ast.parse(path.read_text(encoding="utf-8"))


def test_each_key_of_the_source_is_on_the_page() -> None:
    found = {
        node.value
        for _, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and KEY.fullmatch(node.value)
    }
    documented = first_cells("Keys of environ that it sets") + first_cells("Keys of environ that it reads")
    assert {"sqlasession.attempt", "HTTP_COOKIE"} <= found <= set(documented)


def test_loggers_and_their_attributes_are_those_of_the_page() -> None:
    loggers, extras = [], set()
    for name, tree in sources():
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        loggers += [f"sqlasession_middleware.{name}" for call in calls if ast.unparse(call.func) == "logging.getLogger"]
        extras |= {
            key.value
            for call in calls
            for keyword in call.keywords
            if keyword.arg == "extra" and isinstance(keyword.value, ast.Dict)
            for key in keyword.value.keys
            if isinstance(key, ast.Constant)
        }
    assert first_cells("Loggers") == loggers
    assert extras == {"application", "finisher"}
    assert extras <= set(literals(SECTIONS["Loggers"]))
