"""The reference of environ keys and loggers: none that the package has is missing there."""

from __future__ import annotations

import ast
import re

from .rst import literals, read_page, rows, sections
from .sources import module_files, parse

KEY = re.compile(r"(wsgi|sqlasession|werkzeug\.debug)\.[a-z_]+|(HTTP|REQUEST|PATH|CONTENT|SCRIPT|QUERY)_[A-Z_]+")
SECTIONS = sections(read_page("environ"))


def first_cells(title: str) -> list[str]:
    """The literals in the first column of the tables of a section."""
    return [literal for cells in rows(SECTIONS[title]) for literal in literals(cells[0])]


def test_each_key_of_the_source_is_on_the_page() -> None:
    found = {
        node.value
        for path in module_files().values()
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and KEY.fullmatch(node.value)
    }
    documented = first_cells("Keys of environ that it sets") + first_cells("Keys of environ that it reads")
    assert {"sqlasession.attempt", "HTTP_COOKIE"} <= found <= set(documented)


def test_loggers_and_their_attributes_are_those_of_the_page() -> None:
    loggers, extras = [], set()
    for name, path in module_files().items():
        calls = [node for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
        loggers += [_logger_name(call, name) for call in calls if ast.unparse(call.func) == "logging.getLogger"]
        extras |= {
            key.value
            for call in calls
            for keyword in call.keywords
            if keyword.arg == "extra" and isinstance(keyword.value, ast.Dict)
            for key in keyword.value.keys
            if isinstance(key, ast.Constant)
        }
    assert first_cells("Loggers") == sorted(set(loggers))
    assert extras == {"application", "finisher", "slow"}
    assert extras <= set(literals(SECTIONS["Loggers"]))


def _logger_name(call: ast.Call, module: str) -> str:
    """The name that a call of ``logging.getLogger()`` gives: a text, or that of its module."""
    (argument,) = call.args
    return argument.value if isinstance(argument, ast.Constant) else module
