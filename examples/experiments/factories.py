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

__all__ = ["Experiments", "experiments"]


class Experiments(DispatcherMiddleware):
    """The page, with the shops below it.

    :param shops: the one with the library first.
    """

    def __init__(self, shops: list[Shop]) -> None:
        super().__init__(Page(shops), {shop.path: shop.app for shop in shops})
        self.shops = shops

    def dispose(self) -> None:
        """Close the idle connections."""
        for shop in self.shops:
            shop.database.dispose()


def experiments(global_conf: Mapping[str, str], folder: str) -> Experiments:
    """A ``paste.app_factory``.

    :param folder: for the SQLite files of the shops.
    """
    library = Database(Path(folder).resolve() / "experiments-library.db")
    hand = Database(Path(folder).resolve() / "experiments-by-hand.db")
    return Experiments(
        [
            Shop(
                "With the library",
                "/library",
                with_library.make_shop(library.engine),
                library,
                with_library.VIEWS,
                with_library.forgotten,
                no_n_plus_one,
            ),
            Shop(
                "By hand",
                "/by-hand",
                by_hand.make_shop(hand.engine),
                hand,
                by_hand.VIEWS,
                by_hand.forgotten,
                nullcontext,
            ),
        ]
    )
