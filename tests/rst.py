"""Reads the documentation's pages with docutils, for the tests that compare the pages with the code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from docutils import nodes
from docutils.core import publish_doctree

DOCS = Path(__file__).parent.parent / "docs"


def read_page(name: str) -> nodes.document:
    """Parse a page of docs/. Errors are ignored, because docutils does not know Sphinx's directives and roles."""
    source = (DOCS / f"{name}.rst").read_text(encoding="utf-8")
    return publish_doctree(source, settings_overrides={"report_level": 5, "halt_level": 6})


def sections(page: nodes.document) -> dict[str, nodes.section]:
    """Title -> section, of all levels."""
    return {each.children[0].astext(): each for each in page.findall(nodes.section)}


def rows(section: nodes.section) -> Iterator[list[nodes.entry]]:
    """The cells of the rows of a section's tables, without the tables' heads."""
    for body in section.findall(nodes.tbody):
        for row in body.findall(nodes.row):
            yield [cell for cell in row.children if isinstance(cell, nodes.entry)]


def literals(node: nodes.Element) -> list[str]:
    return [each.astext() for each in node.findall(nodes.literal)]
