"""The version is one, wherever it is told."""

from __future__ import annotations

import re
from importlib.metadata import metadata, version
from pathlib import Path

import sqlasession_middleware

ROOT = Path(__file__).resolve().parent.parent


def test_version_is_that_of_the_distribution_and_of_the_pages() -> None:
    told = sqlasession_middleware.__version__
    assert told == version("sqlasession_middleware")
    headings = re.findall(
        r"^(\S+) \((unreleased|\d{4}-\d\d-\d\d)\)\n-+$", (ROOT / "CHANGES.rst").read_text("utf-8"), re.M
    )
    # After a release, the next version has a heading, and nothing but that.
    released = [number for number, date in headings if date != "unreleased"] or [headings[0][0]]
    assert told == released[0]
    assert f"sqlasession_middleware-{told}-py3-none-any.whl" in (ROOT / "docs/tutorial.rst").read_text("utf-8")


def test_metadata_say_what_an_index_shows() -> None:
    told = metadata("sqlasession_middleware")
    for key in ("Summary", "Author", "Keywords", "License", "Requires-Python"):
        assert told.get(key) or told.get(f"{key}-Expression"), key
    assert told.get_all("Classifier")
    assert "gives each request one SQLAlchemy session" in (told.get_payload() or told["Description"])
