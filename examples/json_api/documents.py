"""The table of the API, and its job."""

from typing import Any

from sqlalchemy import LargeBinary, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqlasession_middleware import session


class Base(DeclarativeBase):
    pass


class Document(Base):
    __tablename__ = "document"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    content: Mapped[bytes] = mapped_column(LargeBinary, deferred=True)
    words: Mapped[int | None]  # The job sets it.

    def as_dict(self) -> dict[str, Any]:
        return {"id": self.id, "name": self.name, "words": self.words}


def count_words(number: int) -> None:
    """The job: a transaction of its own, in a thread of its own."""
    document = session.get_one(Document, number)
    document.words = len(document.content.split())
