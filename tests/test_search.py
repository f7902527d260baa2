"""What people type into the search of the documentation leads to the page that answers it.

Sphinx's search puts a main entry of the index ("! entry") that is what was typed above all titles and texts: it scores
100, a title at most 16. So one such entry, on one page only, makes that page the first result.
"""

from __future__ import annotations

import re
from collections import defaultdict

import pytest

from .rst import DOCS

#: What is typed -> the page that has to come first.
SEARCHED = {
    "slow queries": "observing",
    "slow query": "observing",
    "statement timeout": "timeouts",
    "idle in transaction": "timeouts",
    "health check": "health",
    "celery": "jobs",
    "background jobs": "jobs",
    "docker": "production",
    "kubernetes": "production",
    "rolling deploy": "production",
    "rotating passwords": "production",
    "tenant": "tenants",
    "multiple databases": "binds",
    "pool exhausted": "deployment",
    "websocket": "websockets",
    "long polling": "websockets",
    "gevent": "concurrency",
    "async views": "concurrency",
    "error page": "error_pages",
    "pg_terminate_backend": "retries",
    "flask": "flask",
    "pyramid": "pyramid",
    "alembic": "examples",
}


def read_entries() -> dict[str, list[str]]:
    """Main entry of the index, in lower case -> the pages that have it."""
    entries = defaultdict(list)
    for path in sorted(DOCS.glob("*.rst")):
        for line in re.findall(r"^ *\.\. index:: (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE):
            for entry in line.split(","):
                assert entry.strip().startswith("! "), f"{entry!r} in {path.name} is no main entry: it comes last"
                entries[entry.strip()[2:].lower()].append(path.stem)
    return entries


ENTRIES = read_entries()


@pytest.mark.parametrize("typed", SEARCHED)
def test_search_finds_the_page_that_answers(typed: str) -> None:
    assert ENTRIES[typed] == [SEARCHED[typed]]


def test_no_two_pages_claim_the_same_search() -> None:
    assert {entry: pages for entry, pages in ENTRIES.items() if len(pages) > 1} == {}


def test_each_page_is_reached_from_the_index_page() -> None:
    index = (DOCS / "index.rst").read_text(encoding="utf-8")
    listed = re.findall(r"^    ([a-z0-9_]+)$", index, re.MULTILINE)
    assert sorted(listed) == sorted({path.stem for path in DOCS.glob("*.rst")} - {"index"})
