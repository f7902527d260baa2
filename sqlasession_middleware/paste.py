"""PasteDeploy's way to the middleware: ``use = egg:sqlasession_middleware``.

.. code-block:: ini

    [filter:db]
    use = egg:sqlasession_middleware
    sqlalchemy.url = sqlite:///%(here)s/shop.db

Nothing here imports PasteDeploy: it calls, and hands over strings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .middleware import SQLASessionMiddleware

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

__all__ = ["main"]


def main(app: WSGIApplication, global_conf: Mapping[str, str], **settings: str) -> SQLASessionMiddleware:
    """The ``paste.filter_app_factory`` named ``main``.

    :param global_conf: the ini's defaults, of which only ``here`` and ``__file__`` are used.
    :param settings: the section's own keys.
    """
    place = {key: global_conf[key] for key in ("here", "__file__") if key in global_conf}
    return SQLASessionMiddleware.from_config(app, {**place, **settings})
