"""The form for a new entry: its fields and its errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .models import MESSAGE_LENGTH, NAME_LENGTH


@dataclass
class EntryForm:
    """The fields as they were entered, and an error message for each invalid one."""

    name: str = ""
    message: str = ""
    errors: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_fields(cls, fields: Mapping[str, object]) -> EntryForm:
        """Read and check the fields that a browser sent."""
        form = cls(name=" ".join(read_text(fields, "name").split()), message=read_text(fields, "message").strip())
        if not form.name:
            form.errors["name"] = "Please tell us your name."
        elif len(form.name) > NAME_LENGTH:
            form.errors["name"] = f"Please shorten your name to {NAME_LENGTH} characters (it has {len(form.name)})."
        if not form.message:
            form.errors["message"] = "Please write a message."
        elif len(form.message) > MESSAGE_LENGTH:
            form.errors["message"] = (
                f"Please shorten your message to {MESSAGE_LENGTH} characters (it has {len(form.message)})."
            )
        return form


def read_text(fields: Mapping[str, object], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):  # It is missing, or it is an uploaded file.
        return ""
    # PostgreSQL cannot store NUL in text; browsers end lines with CRLF.
    return value.replace("\0", "").replace("\r\n", "\n")
