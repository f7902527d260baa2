"""Shared by the applications in this folder: a table, and the check of what a client sends.

Nothing in this module depends on requests, sessions or a framework.
"""

import os
from collections.abc import Mapping

from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite:///guests.db")


class Base(DeclarativeBase):
    pass


class Guest(Base):
    __tablename__ = "guest"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(40), unique=True)

    @classmethod
    def from_fields(cls, fields):
        """Create a guest from a form, or from any JSON value.

        :raises ValueError: if the fields are not valid; the message is for the client.
        """
        name = fields.get("name") if isinstance(fields, Mapping) else None
        if not isinstance(name, str) or not name.strip() or not name.isprintable() or len(name) > 40:
            raise ValueError("A guest has a name of 1 to 40 printable characters.")
        return cls(name=name)

    def as_dict(self):
        return {"id": self.id, "name": self.name}
