"""Listeners of sessions that note which objects the ORM loads, and for which relationship it sends a statement."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import event
from sqlalchemy.orm import Session

from .._database.forks import fork_safe_lock
from .present import present_records
from .record import EAGER

if TYPE_CHECKING:
    from sqlalchemy.orm import ORMExecuteState

__all__ = ["RELATIONSHIP", "is_flushing", "record_objects"]

#: The execution option with the relationship that the ORM loads.
RELATIONSHIP: Final = "sqlasession_relationship"

is_flushing: ContextVar[bool] = ContextVar("sqlasession_middleware.is_flushing", default=False)

_listening = fork_safe_lock()


def record_objects() -> None:
    """Note which objects the ORM loads, and for which relationship it sends a statement."""
    with _listening:
        if not event.contains(Session, "do_orm_execute", _note_relationship):
            event.listen(Session, "do_orm_execute", _note_relationship)
            event.listen(Session, "loaded_as_persistent", _note_object)
            event.listen(Session, "before_flush", _begin_flush)
            event.listen(Session, "after_flush", _end_flush)
            event.listen(Session, "after_soft_rollback", _end_flush)


def _note_relationship(state: ORMExecuteState) -> None:
    if not (state.is_select and state.is_orm_statement):
        return
    is_lazy = state.lazy_loaded_from is not None or state.is_column_load
    if not (is_lazy or state.is_relationship_load) or not present_records()[0]:
        return
    if not is_lazy:  # selectinload() and subqueryload() ask for many objects, and again for further ones.
        state.update_execution_options(**{RELATIONSHIP: EAGER})
        return
    path: Any = state.loader_strategy_path
    last = path.path[-1] if path is not None and path.path else None
    if last is not None and not state.is_column_load:
        name = f"{last.parent.class_.__name__}.{last.key}"
    else:
        name = state.bind_mapper.class_.__name__ if state.bind_mapper is not None else ""
    state.update_execution_options(**{RELATIONSHIP: name})


def _begin_flush(session: Session, context: object, instances: object) -> None:
    is_flushing.set(True)


def _end_flush(session: Session, context: object) -> None:
    is_flushing.set(False)


def _note_object(session: Session, instance: object) -> None:
    kind = type(instance)
    for record in present_records()[0]:
        record.objects[kind] = record.objects.get(kind, 0) + 1
