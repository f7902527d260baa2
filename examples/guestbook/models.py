"""The table of the guestbook."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import sqlasession_middleware

NAME_LENGTH = 80
MESSAGE_LENGTH = 2000


def utc_now() -> datetime:
    """The current time in UTC, without a time zone: not every database can store one."""
    return datetime.now(UTC).replace(tzinfo=None, microsecond=0)


class Base(DeclarativeBase):
    """The base of this package's models. It uses the metadata that ``application.init_database()`` creates."""

    metadata = sqlasession_middleware.metadata


class Entry(Base):
    """An entry written by a guest."""

    __tablename__ = "guestbook_entry"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(NAME_LENGTH))
    message: Mapped[str] = mapped_column(String(MESSAGE_LENGTH))
    written: Mapped[datetime] = mapped_column(default=utc_now)
