"""A plugin of pytest for the tests of pyramid_tm and pyramid_retry: their ``config.include()`` finds ours.

It is not imported with the other tests: ``pyramid_suites.py`` gives it to the pytest that runs in the folder of theirs.
"""

from __future__ import annotations

from typing import Any

import pyramid_retry
import pyramid_tm


def include_ours(config: Any) -> None:
    """Include ours, once, with a database."""
    config.get_settings().setdefault("sqlalchemy.url", "sqlite://")
    config.include("sqlasession_middleware.pyramid")


def includeme(config: Any) -> None:
    include_ours(config)


# Configurator.include() asks for the module of the function, and includes nothing twice.
pyramid_tm.includeme = pyramid_retry.includeme = includeme
