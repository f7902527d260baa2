"""PasteDeploy's way to the middleware: ``use = egg:sqlasession_middleware``.

.. code-block:: ini

    [filter:db]
    use = egg:sqlasession_middleware
    sqlalchemy.url = sqlite:///%(here)s/shop.db

Nothing here imports PasteDeploy: it calls, and hands over strings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

from .errors import ConfigurationError
from .middleware import SQLASessionMiddleware
from .settings import TRANSACTION_OPTIONS, UNAVAILABLE_OPTIONS, Kind, ini_place, read_options
from .transaction import TransactionMiddleware
from .unavailable import UnavailableMiddleware

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

Middleware = TypeVar("Middleware")

__all__ = ["collected", "main", "transaction", "unavailable"]

_made: ContextVar[list[SQLASessionMiddleware] | None] = ContextVar("sqlasession_middleware.made", default=None)


def main(app: WSGIApplication, global_conf: Mapping[str, str], **settings: str) -> SQLASessionMiddleware:
    """The ``paste.filter_app_factory`` named ``main``.

    :param global_conf: the ini's defaults, of which only ``here`` and ``__file__`` are used.
    :param settings: the section's own keys.
    """
    place = {key: global_conf[key] for key in ("here", "__file__") if key in global_conf}
    made = SQLASessionMiddleware.from_config(app, {**place, **settings})
    collection = _made.get()
    if collection is not None:
        collection.append(made)
    return made


@contextmanager
def collected() -> Iterator[list[SQLASessionMiddleware]]:
    """Gives the list of the middleware that :func:`main` makes inside of the block, wherever in an ini they are."""
    collection: list[SQLASessionMiddleware] = []
    token = _made.set(collection)
    try:
        yield collection
    finally:
        _made.reset(token)


def transaction(app: WSGIApplication, global_conf: Mapping[str, str], **settings: str) -> TransactionMiddleware:
    """The ``paste.filter_app_factory`` named ``transaction``.

    :param settings: the options of :class:`TransactionMiddleware`, without a prefix.
    """
    return _make(TransactionMiddleware, app, settings, TRANSACTION_OPTIONS, ini_place(global_conf))


def unavailable(app: WSGIApplication, global_conf: Mapping[str, str], **settings: str) -> UnavailableMiddleware:
    """The ``paste.filter_app_factory`` named ``unavailable``.

    :param settings: the options of :class:`UnavailableMiddleware`, without a prefix.
    """
    return _make(UnavailableMiddleware, app, settings, UNAVAILABLE_OPTIONS, ini_place(global_conf))


def _make(
    middleware: Callable[..., Middleware],
    app: WSGIApplication,
    settings: Mapping[str, str],
    kinds: Mapping[str, Kind],
    place: str,
) -> Middleware:
    options = read_options(settings, kinds, place)
    try:
        return middleware(app, **options)
    except ConfigurationError as error:
        raise error.renamed({}, place) from error.__cause__
