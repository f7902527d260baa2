"""Pyramid with two databases: a shop, and an audit of what it has sold. A request commits both, or neither.

Run it in this folder, and sell something::

    gunicorn --bind 127.0.0.1:8000 --threads 4 app:app
    curl --json '{"product": "tea", "pieces": 2}' http://127.0.0.1:8000/sales
    curl http://127.0.0.1:8000/sales
"""

import os
from typing import Any

from pyramid.config import Configurator
from pyramid.httpexceptions import HTTPBadRequest, HTTPConflict
from pyramid.request import Request
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from tables import AuditBase, Product, Sale, ShopBase

from sqlasession_middleware import SQLASessionMiddleware, session


def list_sales(request: Request) -> dict[str, Any]:
    dbsession: Session = request.dbsession
    stock = {each.name: each.stock for each in dbsession.scalars(select(Product))}
    sold = dbsession.execute(select(Sale.product, func.sum(Sale.pieces)).group_by(Sale.product))
    return {"stock": stock, "sold": {product: int(pieces) for product, pieces in sold}}


def sell(request: Request) -> dict[str, Any]:
    dbsession: Session = request.dbsession
    try:
        name, pieces = str(request.json_body["product"]), int(request.json_body["pieces"])
    except (KeyError, OverflowError, TypeError, ValueError):  # It may be no JSON at all.
        raise HTTPBadRequest("Send a product, and how many pieces of it.") from None
    if not name.isprintable() or abs(pieces) > 1000:  # What no database can store.
        raise HTTPBadRequest("There is no such product, or never so many.")
    dbsession.add(Sale(product=name[:40], pieces=pieces))
    product = dbsession.get(Product, name, with_for_update=True)
    if product is None or not 0 < pieces <= product.stock:
        raise HTTPConflict("There are not so many.")  # Like any 4xx or 5xx, it rolls back: both databases.
    product.stock -= pieces
    return {"left": product.stock}


def fill_shelves() -> None:
    session.merge(Product(name="tea", stock=10))


def main(**settings: Any) -> Any:
    with Configurator(settings=settings) as config:
        config.include("sqlasession_middleware.pyramid")
        config.add_route("sales", "/sales")
        config.add_view(list_sales, route_name="sales", request_method="GET", renderer="json")
        config.add_view(sell, route_name="sales", request_method="POST", renderer="json")
        return config.make_wsgi_app()


settings: dict[str, Any] = {
    "sqlalchemy.url": os.environ.get("SHOP_URL", "sqlite:///shop.db"),
    "sqlalchemy.binds.audit.url": os.environ.get("AUDIT_URL", "sqlite:///audit.db"),
    "metadata": [ShopBase.metadata, AuditBase.metadata],
    "sqlasession_middleware.name": "shop",
}
app = main(**settings)
database: SQLASessionMiddleware = app.registry["sqlasession_middleware"]
database.init_database()
database.run(fill_shelves)
