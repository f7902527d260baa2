"""The page of the promises names tests for each of them, and each that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from .rst import literals, read_page, sections

ROOT = Path(__file__).parent.parent


def named_tests() -> dict[str, list[tuple[str, str]]]:
    """Promise -> the tests that the page names for it, each as its file and its name."""
    promises: dict[str, list[tuple[str, str]]] = {}
    for title, section in sections(read_page("promises")).items():
        if not re.match(r"G\d+ ", title):
            continue
        tests = promises[title.split()[0]] = []
        file = ""
        for literal in literals(section):
            if re.fullmatch(r"tests/\S+\.py", literal):
                file = literal
            elif re.fullmatch(r"test_\w+|Test\w+", literal):
                tests.append((file, literal))
    return promises


NAMED = named_tests()


def test_each_promise_has_its_tests() -> None:
    assert list(NAMED) == [
        f"G{number}" for number in (*range(1, 9), *range(17, 22), *range(9, 12), 23, *range(12, 15), 22, 15, 16)
    ]
    assert all(NAMED.values())


@pytest.mark.parametrize(("file", "name"), sorted({each for named in NAMED.values() for each in named}))
def test_test_exists_when_the_page_names_it(file: str, name: str) -> None:
    module = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assigned = [target for each in module.body if isinstance(each, ast.Assign) for target in each.targets]
    defined = {each.name for each in module.body if isinstance(each, ast.FunctionDef | ast.ClassDef)}
    assert name in defined | {target.id for target in assigned if isinstance(target, ast.Name)}
