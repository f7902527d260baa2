"""Refuses to merge, or to save in bulk, objects that have added themselves to the Session."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import inspect
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session

from .._scope.scope import Scope, current

__all__ = ["AddsItself", "refuse_bulk_save", "refuse_merge"]


class AddsItself:
    """Marks the classes whose constructor adds the object to a Session."""

    __slots__ = ()


def refuse_merge(session: Session, instances: Iterable[object]) -> None:
    """Refuse to merge a pending object that has added itself, if it would be inserted in addition to the merged one.

    If it has a primary key, the row may exist already. If it has none, merge() flushes the object first and returns it,
    unless autoflush is off, or the object has added itself to the scope's Session, and is merged into another one.

    :param instances: the objects to merge. Objects that the cascade "merge" reaches are checked as well.
    :raises InvalidRequestError: if one of these objects would be inserted.
    """
    pending = [
        (each, adopter) for adopter in _adopters(session) for each in adopter.new if isinstance(each, AddsItself)
    ]
    if not pending:
        return
    merged = {id(each) for instance in instances for each in _merged_with(instance)}
    for each, adopter in pending:
        key = inspect(type(each)).primary_key_from_instance(each)
        if id(each) in merged and (None not in key or not session.autoflush or adopter is not session):
            name = type(each).__name__
            raise InvalidRequestError(
                f"merge() would insert the {name} with the primary key {tuple(key)!r}, because it added itself to the"
                f" session when it was made: make an object that is only to be merged with {name}.transient(…), or in"
                " 'with transient_objects():'."
            )


def refuse_bulk_save(session: Session, instances: Iterable[object]) -> None:
    """Refuse to save in bulk a pending object that has added itself: the next flush would insert it again.

    :raises InvalidRequestError: if one of the objects is pending.
    """
    for each in instances:
        if isinstance(each, AddsItself) and any(each in adopter.new for adopter in _adopters(session)):
            name = type(each).__name__
            raise InvalidRequestError(
                f"bulk_save_objects() would insert a {name} that the next flush inserts as well, because it added"
                f" itself to the session when it was made: make it with {name}.transient(…), or in"
                " 'with transient_objects():'."
            )


def _adopters(session: Session) -> set[Session]:
    """A Session, and the scope's: an object that adds itself adds itself to the latter."""
    scope = current.get(None)
    adopter = scope.session if isinstance(scope, Scope) else None
    return {session} if adopter is None else {session, adopter}


def _merged_with(instance: object) -> Iterable[Any]:
    """An object, and the objects that are merged with it."""
    state: Any = inspect(instance, raiseerr=False)
    if not hasattr(state, "mapper"):
        return  # merge() itself raises an error.
    yield instance
    for related in state.mapper.cascade_iterator("merge", state):
        yield related[0]
