"""Writing one row's change into the buffer of a transaction: where a route leads, and what it says there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeAlias

import sqlalchemy as sa
from sqlalchemy.orm import Mapper, Session

from .completion import NO_STREAM, PathReader, RowReader, State, Underway, changes_at
from .declarations import PathTarget, Plan, RecordTarget, Route
from .events import check_text, encode_json
from .transactions import Buffers, Change, Changes, Delivery, EntityKey, Level, coalesce
from .values import event_key, key_text
from .views import Parents, RecordView, bind


class Notes:
    """What the capture remembers of a transaction, and of the flush under way."""

    def __init__(self) -> None:
        # Of the flush: values that attributes had before it, where the unit of work does not know them.
        self.known_before: dict[State, dict[str, Any]] = {}
        # Of the flush: attributes set to an SQL expression; their history is gone when it ends.
        self.expressions: dict[State, set[str]] = {}
        # Of the flush: classes of which the rows on their paths that it deletes have been read.
        self.kept: set[Plan] = set()
        self.failed: set[Route] = set()
        self._rows: dict[Plan, RowReader] = {}
        self._paths: PathReader | None = None

    def forget_flush(self) -> None:
        self.known_before.clear()
        self.expressions.clear()
        self.kept.clear()

    def settle(self, session: Session, buffers: Buffers) -> None:
        """After a flush or a bulk statement, whose `Recording` is complete."""
        if self._paths is not None:
            self._paths.settle(session, buffers.levels.values())

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


ABSENT_IS_UNKNOWN: Final = "_broadcastable_absent_is_unknown"
"""In `InstanceState.info` of an object made in this process: what it was never given need not be null in its row."""


def note_rewritten(session: Session, mapper: Mapper[Any], identities: Iterable[Sequence[Any]]) -> None:
    """A bulk statement has changed these rows: it leaves absent what the session's new objects were never given."""
    if not session.identity_map:
        return
    for identity in identities:
        record = session.identity_map.get(mapper.identity_key_from_primary_key(tuple(identity)))
        if record is not None:
            sa.inspect(record).info[ABSENT_IS_UNKNOWN] = True


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
        self.parents = Parents(session)

    def place(self, route: Route, record: Any, row: Any) -> tuple[Handle, EntityKey]:
        bind(record, self.parents, self.delivery)
        if route.when is not None and not route.when(record):
            return NOWHERE, (route.type, "")
        key = (
            event_key(route.key_of(record))
            if route.key_of is not None
            else key_text([row[name] for name in route.plan.key])
        )
        entity = (route.type, key)
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


__all__ = [
    "ABSENT_IS_UNKNOWN",
    "NOWHERE",
    "Handle",
    "Notes",
    "RecordView",
    "Recording",
    "State",
    "note_rewritten",
    "notes_of",
]
