"""Runs the examples of the documentation's pages, each page in its own namespace and folder: see tests/pages.py."""

from sybil import Sybil
from sybil.parsers.rest import CodeBlockParser, DocTestParser, SkipParser
from sybil.sybil import SybilCollection

from tests.pages import close_page, evaluate_console, evaluate_file, evaluate_ini, evaluate_python

pytest_plugins = ["tests.databases", "tests.parallel"]

#: It is read from top to bottom, and its commands, including Python shell lines, are typed.
TUTORIAL = "docs/tutorial.rst"
#: Its ini files are loaded.
PASTE = "docs/paste.rst"

everywhere = [
    SkipParser(),
    CodeBlockParser("python", evaluate_python),
    CodeBlockParser("console", evaluate_console),
    CodeBlockParser("text", evaluate_file),
    CodeBlockParser("yaml", evaluate_file),
    CodeBlockParser("docker", evaluate_file),
]
files = CodeBlockParser("ini", evaluate_file)

pytest_collect_file = SybilCollection(
    Sybil(parsers, patterns=patterns, excludes=excludes, teardown=close_page)
    for parsers, patterns, excludes in (
        ([*everywhere, files, DocTestParser()], ["docs/*.rst"], [TUTORIAL, PASTE]),
        ([*everywhere, files], [TUTORIAL], []),
        ([*everywhere, CodeBlockParser("ini", evaluate_ini), DocTestParser()], [PASTE], []),
    )
).pytest()
