"""Sphinx: ``make docs`` builds into docs/_build, with warnings as errors."""

import re
from importlib.metadata import version as version_of

from docutils import nodes

project = "sqlasession_middleware"
author = "The sqlasession_middleware authors"
project_copyright = author
version = release = version_of("sqlasession_middleware")
extensions = ["sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"sqlasession_middleware {version}"
pygments_dark_style = "github-dark"
html_static_path = ["_static"]
html_css_files = ["docs.css"]
html_js_files = ["tables.js"]
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
# Types are shown as they are written; there is no inventory of other projects to look them up in.
nitpicky = False


def leave_out_nothing(app, domain, objtype, content):
    """Drop the return type of what returns nothing, or is a context manager that gives nothing."""
    for field in list(content.findall(nodes.field)):
        if field[0].astext() == "rtype" and re.fullmatch(r"None|\S*Iterator\[None\]", field[1].astext()):
            field.parent.remove(field)


def setup(app):
    # After autodoc, which adds the types at 500.
    app.connect("object-description-transform", leave_out_nothing, priority=600)
