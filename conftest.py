"""Runs the Python of the documentation's pages, each page in a namespace of its own."""

from sybil import Sybil
from sybil.parsers.rest import DocTestParser, PythonCodeBlockParser

pytest_collect_file = Sybil(parsers=[DocTestParser(), PythonCodeBlockParser()], patterns=["docs/*.rst"]).pytest()
