"""The application of ``development.ini``: it lists the names of a shop's products; a POST adds one.

Alembic creates the tables, so nothing calls ``init_database()``.
"""

from sqlalchemy import String, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from webob import Response
from webob.dec import wsgify
from webob.exc import HTTPBadRequest

from sqlasession_middleware import session


class Base(DeclarativeBase):
    pass


class Product(Base):
    __tablename__ = "product"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(40), index=True)


@wsgify
def shop(request):
    if request.method == "POST":
        name = request.POST.get("name", "")
        if not 1 <= len(name) <= 40:
            raise HTTPBadRequest("A product has a name of 1 to 40 characters.")
        session.add(Product(name=name))
    return Response(json=session.scalars(select(Product.name).order_by(Product.name)).all())


def make_app(global_conf):
    """A ``paste.app_factory``."""
    return shop
