"""The tables of two databases: each has a base, whose metadata says which database it is."""

from sqlalchemy import MetaData, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class ShopBase(DeclarativeBase):
    pass


class AuditBase(DeclarativeBase):
    metadata = MetaData(info={"bind_key": "audit"})


class Product(ShopBase):
    __tablename__ = "product"
    name: Mapped[str] = mapped_column(String(40), primary_key=True)
    stock: Mapped[int]


class Sale(AuditBase):
    __tablename__ = "sale"
    id: Mapped[int] = mapped_column(primary_key=True)
    product: Mapped[str] = mapped_column(String(40))
    pieces: Mapped[int]
