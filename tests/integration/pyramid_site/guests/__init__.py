"""A Pyramid application in the form of pyramid-cookiecutter-starter with SQLAlchemy: see ``test_pyramid_site.py``."""

from __future__ import annotations

from typing import Any

from pyramid.config import Configurator


def main(global_config: Any, **settings: Any) -> Any:
    with Configurator(settings=settings) as config:
        config.include(".models")
        config.include(".views")
    return config.make_wsgi_app()
