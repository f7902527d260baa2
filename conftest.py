"""Runs what the documentation's pages show, each page in a namespace and a folder of its own: see tests/pages.py."""

from sybil import Sybil
from sybil.parsers.rest import CodeBlockParser, DocTestParser, SkipParser
from sybil.sybil import SybilCollection

from tests.pages import close_page, evaluate_console, evaluate_file, evaluate_ini, evaluate_python

#: What is shown there is read from top to bottom, and typed, a Python shell's lines too.
TUTORIAL = "docs/tutorial.rst"
#: Its ini files are loaded.
PASTE = "docs/paste.rst"

everywhere = [
    SkipParser(),
    CodeBlockParser("python", evaluate_python),
    CodeBlockParser("console", evaluate_console),
    CodeBlockParser("text", evaluate_file),
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
