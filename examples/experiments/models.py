"""The tables of the ticket shop."""

from __future__ import annotations

from sqlalchemy import ForeignKey, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class Base(DeclarativeBase):
    """The base of this package's models."""


class Concert(Base):
    """A concert, and how many of its tickets are left."""

    __tablename__ = "concert"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(40))
    tickets: Mapped[int]
    orders: Mapped[list[Order]] = relationship(back_populates="concert", order_by="Order.id")


class Order(Base):
    """An order of one ticket."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    buyer: Mapped[str] = mapped_column(String(40))
    concert_id: Mapped[int] = mapped_column(ForeignKey("concert.id"))
    concert: Mapped[Concert] = relationship(back_populates="orders")
