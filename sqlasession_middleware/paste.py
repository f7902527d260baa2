"""The filters for PasteDeploy: ``use = egg:sqlasession_middleware``.

.. code-block:: ini

    [filter:db]
    use = egg:sqlasession_middleware
    sqlalchemy.url = sqlite:///%(here)s/shop.db

PasteDeploy calls these functions with strings. This module does not import it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

from ._settings.ini import PLACE_KEYS, ini_place, read_options
from ._settings.kinds import Kind
from ._settings.options import HEALTH_OPTIONS, INSPECTOR_OPTIONS, TRANSACTION_OPTIONS, UNAVAILABLE_OPTIONS
from ._settings.section import section_name
from .errors import ConfigurationError
from .health import HealthMiddleware
from .middleware import SQLASessionMiddleware
from .tenants import TenantsMiddleware
from .transaction import TransactionMiddleware
from .unavailable import UnavailableMiddleware

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

    from .inspector import InspectorMiddleware

Middleware = TypeVar("Middleware")

__all__ = ["collect", "collected", "health", "inspector", "main", "tenants", "transaction", "unavailable"]

_collection: ContextVar[list[SQLASessionMiddleware | TenantsMiddleware] | None] = ContextVar(
    "sqlasession_middleware.collection", default=None
)


def main(app: WSGIApplication, global_conf: Mapping[str, str], **settings: str) -> SQLASessionMiddleware:
    """The ``paste.filter_app_factory`` named ``main``.

    :param global_conf: the default values of the ini file, which is read once more for the name of the section.
    :param settings: the keys of the section. Its name is the default of ``name``.
    """
    place = {key: global_conf[key] for key in PLACE_KEYS if key in global_conf}
    if "name" not in settings and (name := section_name(global_conf, settings)) is not None:
        settings["name"] = name
    middleware = SQLASessionMiddleware.from_config(app, {**place, **settings})
    collect(middleware)
    return middleware


def tenants(app: WSGIApplication, global_conf: Mapping[str, str], **settings: str) -> TenantsMiddleware:
    """The ``paste.filter_app_factory`` named ``tenants``.

    :param global_conf: and ``settings``: as for :func:`main`.
    """
    place = {key: global_conf[key] for key in PLACE_KEYS if key in global_conf}
    middleware = TenantsMiddleware.from_config(app, {**place, **settings})
    collect(middleware)
    return middleware


def collect(middleware: SQLASessionMiddleware | TenantsMiddleware) -> None:
    """Tell whoever collects them of a middleware."""
    collection = _collection.get()
    if collection is not None:
        collection.append(middleware)


@contextmanager
def collected() -> Iterator[list[SQLASessionMiddleware | TenantsMiddleware]]:
    """Collect what this module's filters, and the include for Pyramid, make inside the block, wherever in an ini."""
    collection: list[SQLASessionMiddleware | TenantsMiddleware] = []
    token = _collection.set(collection)
    try:
        yield collection
    finally:
        _collection.reset(token)


def transaction(app: WSGIApplication, global_conf: Mapping[str, str], **settings: str) -> TransactionMiddleware:
    """The ``paste.filter_app_factory`` named ``transaction``.

    :param settings: the options of :class:`.TransactionMiddleware`, without a prefix.
    """
    return _make(TransactionMiddleware, app, settings, TRANSACTION_OPTIONS, ini_place(global_conf))


def unavailable(app: WSGIApplication, global_conf: Mapping[str, str], **settings: str) -> UnavailableMiddleware:
    """The ``paste.filter_app_factory`` named ``unavailable``.

    :param settings: the options of :class:`.UnavailableMiddleware`, without a prefix.
    """
    return _make(UnavailableMiddleware, app, settings, UNAVAILABLE_OPTIONS, ini_place(global_conf))


def health(app: WSGIApplication, global_conf: Mapping[str, str], **settings: str) -> HealthMiddleware:
    """The ``paste.filter_app_factory`` named ``health``.

    :param settings: the options of :class:`.HealthMiddleware`; ``application`` by its dotted name.
    """
    return _make(HealthMiddleware, app, settings, HEALTH_OPTIONS, ini_place(global_conf))


def inspector(app: WSGIApplication, global_conf: Mapping[str, str], **settings: str) -> InspectorMiddleware:
    """The ``paste.filter_app_factory`` named ``inspector``.

    :param settings: the options of :class:`.InspectorMiddleware`; ``applications`` by their dotted names.
    """
    from .inspector import InspectorMiddleware  # It imports what records requests.

    return _make(InspectorMiddleware, app, settings, INSPECTOR_OPTIONS, ini_place(global_conf))


def _make(
    middleware: Callable[..., Middleware],
    app: WSGIApplication,
    settings: Mapping[str, str],
    kinds: Mapping[str, Kind],
    place: str,
) -> Middleware:
    """Make a middleware of a section of its own. Errors name the key and the file.

    :param kinds: the table of its options.
    :param place: the result of :func:`ini_place`.
    """
    options = read_options(settings, kinds, place)
    try:
        return middleware(app, **options)
    except ConfigurationError as error:
        raise error.renamed({}, place) from error.__cause__
