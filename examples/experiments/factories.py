"""The functions that ``use = call:experiments:…`` in an ini file calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from werkzeug.middleware.dispatcher import DispatcherMiddleware

from sqlasession_middleware.testing import no_n_plus_one

from . import by_hand, with_library
from .database import Database
from .entrance import Entrance, enter
from .page import Page
from .runs import Shop

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

__all__ = ["Experiments", "entrance", "experiments"]


class Experiments(DispatcherMiddleware):
    """The page, with the shops below it.

    :param shops: the one with the library first.
    """

    def __init__(self, shops: list[Shop]) -> None:
        super().__init__(Page(shops), {shop.path: shop.app for shop in shops})
        self.shops = shops

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        for shop in self.shops:
            shop.database.create()
        enter(environ, super().__call__)
        return super().__call__(environ, start_response)

    def dispose(self) -> None:
        """Close the idle connections."""
        for shop in self.shops:
            shop.database.dispose()


def entrance(global_conf: Mapping[str, str]) -> type[Entrance]:
    """A ``paste.filter_factory``: it returns what wraps an application."""
    return Entrance


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
