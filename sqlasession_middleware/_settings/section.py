"""Finds the name of the ini section that a filter was made from: PasteDeploy does not tell it."""

from __future__ import annotations

import configparser
from collections.abc import Mapping

__all__ = ["section_name"]

#: What PasteDeploy itself reads in the section of a filter.
_OF_PASTE = ("use", "next", "filter-with", "require", "paste.filter_app_factory")
_KINDS = ("filter", "filter-app")


def section_name(global_conf: Mapping[str, str], settings: Mapping[str, str]) -> str | None:
    """Return the name of the section whose keys are ``settings``; None if there is none, or more than one.

    :param global_conf: PasteDeploy's, with the ``__file__`` and the variables that the file refers to.
    :param settings: the keys of the section, as the filter gets them.
    """
    # As PasteDeploy has them: a value may refer to others, and a percent sign is doubled.
    parser = configparser.ConfigParser(defaults=global_conf)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    try:
        parser.read(global_conf.get("__file__", ()))
        found = [
            name
            for section in parser.sections()
            for kind, _, name in [section.partition(":")]
            if kind in _KINDS and name and _settings_of(parser, section) == settings
        ]
    except (configparser.Error, UnicodeError, RecursionError):
        return None  # A section that nothing uses may be one that cannot be read.
    return found[0] if len(found) == 1 else None


def _settings_of(parser: configparser.ConfigParser, section: str) -> dict[str, str]:
    """The keys of a section, over those of the section that it uses."""
    used = parser.get(section, "use", fallback="")
    settings = _settings_of(parser, f"filter:{used}") if parser.has_section(f"filter:{used}") else {}
    for key in parser.options(section):
        if key in parser.defaults() or key in _OF_PASTE or key.startswith("set "):
            continue
        value = parser.get(section, key)
        if key.startswith("get "):
            key, value = key[4:].strip(), parser.defaults().get(value, "")
        settings[key] = value
    return settings
