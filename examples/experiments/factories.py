"""The function that ``use = call:experiments:experiments`` in an ini file calls."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from werkzeug.middleware.dispatcher import DispatcherMiddleware

from sqlasession_middleware.testing import no_n_plus_one

from . import by_hand, with_library
from .database import Database
from .page import Page
from .runs import Shop

__all__ = ["experiments"]


def experiments(global_conf: Mapping[str, str], folder: str) -> DispatcherMiddleware:
    """A ``paste.app_factory``: the page, with the two shops below it.

    :param folder: for the SQLite files of the shops.
    """
    library = Database(Path(folder).resolve() / "experiments-library.db")
    hand = Database(Path(folder).resolve() / "experiments-by-hand.db")
    shops = {
        "/library": Shop(
            "With the library",
            "/library",
            with_library.make_shop(library.engine),
            library,
            with_library.VIEWS,
            with_library.forgotten,
            no_n_plus_one,
        ),
        "/by-hand": Shop(
            "By hand",
            "/by-hand",
            by_hand.make_shop(hand.engine),
            hand,
            by_hand.VIEWS,
            by_hand.forgotten,
            nullcontext,
        ),
    }
    page = Page(list(shops.values()))
    return DispatcherMiddleware(page, {path: shop.app for path, shop in shops.items()})
