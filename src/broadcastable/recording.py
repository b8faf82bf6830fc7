"""Writing one row's change into the buffer of a transaction: where a route leads, and what it says there."""

from __future__ import annotations

import inspect
import types
from typing import Any, Final, TypeAlias

from sqlalchemy.orm import InstanceState, Session

from .completion import NO_STREAM, PathReader, RowReader, Underway, changes_at
from .declarations import PathTarget, Plan, RecordTarget, Route
from .events import check_text, encode_json
from .transactions import Buffers, Change, Changes, Delivery, EntityKey, Level, coalesce
from .values import event_key, key_text

State: TypeAlias = InstanceState[Any]


class Notes:
    """What the capture remembers of a transaction, and of the flush under way."""

    def __init__(self) -> None:
        # Of the flush: values that attributes had before it, where the unit of work does not know them.
        self.known_before: dict[State, dict[str, Any]] = {}
        # Of the flush: attributes set to an SQL expression; their history is gone when it ends.
        self.expressions: dict[State, set[str]] = {}
        self.failed: set[Route] = set()
        self._rows: dict[Plan, RowReader] = {}
        self._paths: PathReader | None = None

    def paths(self, delivery: Delivery) -> PathReader:
        if self._paths is None:
            self._paths = PathReader(delivery)
        return self._paths

    def rows(self, plan: Plan, delivery: Delivery) -> RowReader:
        found = self._rows.get(plan)
        if found is None:
            found = self._rows[plan] = RowReader(plan, delivery, self.paths(delivery))
        return found


def notes_of(buffers: Buffers) -> Notes:
    if buffers.notes is None:
        buffers.notes = Notes()
    notes: Notes = buffers.notes
    return notes


Handle: TypeAlias = Any
"""Where a route leads for one row: the values of its target's columns, or the stream's name from a function."""

NOWHERE: Final[Handle] = object()


class Recording:
    """What a capture writes with: one flush, or one bulk statement."""

    def __init__(self, session: Session, notes: Notes, level: Level, delivery: Delivery) -> None:
        self.session = session
        self.notes = notes
        self.level = level
        self.delivery = delivery
        self.app = delivery.settings.gid_app
        self.keys_as_strings = delivery.settings.keys_as_strings

    def place(self, route: Route, record: Any, row: Any) -> tuple[Handle, EntityKey]:
        key = (
            event_key(route.key_of(record))
            if route.key_of is not None
            else key_text([row[name] for name in route.plan.key])
        )
        entity = (route.type, key)
        if route.when is not None and not route.when(record):
            return NOWHERE, entity
        if isinstance(route.target, RecordTarget):
            return route.target.name(record, self.app) or NOWHERE, entity
        return tuple(row.get(name) for name in route.target_attributes), entity

    def old_value(self, route: Route, row: dict[str, Any]) -> bytes | None:
        if not route.old_value:
            return None
        reader = route.plan.reader(keys_as_strings=self.keys_as_strings)
        try:
            return encode_json(reader(row))
        except KeyError:
            return None

    def open(self, route: Route, target: Any) -> Changes:
        values = target if isinstance(target, tuple) else (target,)
        return changes_at(route, values, self.level, self.delivery)

    def add(self, route: Route, handle: Handle, entity: EntityKey, change: Change) -> None:
        check_text("key", entity[1])
        if isinstance(route.target, RecordTarget):
            changes = self.level.stream(self.delivery, handle).changes
        elif isinstance(route.target, PathTarget):
            if all(value is not None for value in handle):
                underway = Underway(route, handle, entity, change)
                self.notes.paths(self.delivery).add(self.session, self.level, underway)
            return
        else:
            changes = changes_at(route, handle, self.level, self.delivery)
        if changes is not NO_STREAM:
            coalesce(changes, entity, change)


class RecordView:
    """Shows the application's own functions a row as if it were a record: as it was before the flush, or in bulk.

    Methods and properties of the class run on this view, so that `when=lambda message: message.is_public()` works. All
    else, such as relationships, is that of *record*, if there is one.
    """

    def __init__(self, plan: Plan, row: dict[str, Any], record: Any = None) -> None:
        self.__dict__["_broadcastable_view"] = plan, row, record

    def __getattr__(self, name: str) -> Any:
        plan, row, record = self.__dict__["_broadcastable_view"]
        if name in row:
            return row[name]
        if name in plan.equal:
            raise AttributeError(f"{plan.name}.{name} is not known of this row")
        attribute = inspect.getattr_static(plan.mapper.class_, name, None)
        if isinstance(attribute, types.FunctionType):
            return types.MethodType(attribute, self)
        getter = getattr(attribute, "fget", None)  # property, hybrid_property
        if getter is not None:
            return getter(self)
        if record is None:
            raise AttributeError(f"A bulk statement has rows, not records: {plan.name}.{name} cannot be had there")
        return getattr(record, name)
