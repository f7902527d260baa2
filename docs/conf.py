"""Sphinx: ``make docs`` builds into docs/_build, with warnings as errors."""

from importlib.metadata import version as version_of

project = "sqlasession_middleware"
author = "The sqlasession_middleware authors"
project_copyright = author
version = release = version_of("sqlasession_middleware")
extensions = ["sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"sqlasession_middleware {version}"
html_static_path = ["_static"]
html_css_files = ["docs.css"]
autodoc_typehints = "description"
autodoc_member_order = "bysource"
# Types are shown as they are written; there is no inventory of other projects to look them up in.
nitpicky = False
