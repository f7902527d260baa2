"""The form for a new entry: what was typed, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .models import MESSAGE_LENGTH, NAME_LENGTH


@dataclass
class EntryForm:
    """The fields as they were typed, and an error message for each that cannot be used."""

    name: str = ""
    message: str = ""
    errors: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_fields(cls, fields: Mapping[str, object]) -> EntryForm:
        """Read and check what a browser sent."""
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
    if not isinstance(value, str):  # It is missing, or a file was uploaded in its place.
        return ""
    # PostgreSQL cannot store NUL in a text; browsers end lines with both characters.
    return value.replace("\0", "").replace("\r\n", "\n")
