"""The guestbook's one table."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import sqlasession_middleware

NAME_LENGTH = 80
MESSAGE_LENGTH = 2000


def utc_now() -> datetime:
    """The time in UTC, without saying so: not every database can keep a time zone."""
    return datetime.now(UTC).replace(tzinfo=None, microsecond=0)


class Base(DeclarativeBase):
    """The models of this package, in the metadata that ``application.init_database()`` creates."""

    metadata = sqlasession_middleware.metadata


class Entry(Base):
    """What one guest wrote."""

    __tablename__ = "guestbook_entry"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(NAME_LENGTH))
    message: Mapped[str] = mapped_column(String(MESSAGE_LENGTH))
    written: Mapped[datetime] = mapped_column(default=utc_now)
