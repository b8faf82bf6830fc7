"""What the flush did not know is read before the commit: one SELECT for each class, whatever the number of rows.

Server-generated columns that the flush did not fetch, columns of expired objects, and the rows on the way from a record
to a stream several relationships away.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeAlias

import sqlalchemy as sa
from sqlalchemy.orm import InstanceState, Mapper, Session
from sqlalchemy.orm.base import NO_VALUE

from .counters import counters
from .declarations import Hop, PathTarget, Plan, Route
from .transactions import Change, Changes, Delivery, EntityKey, Level, Unread, coalesce, report_missing
from .values import key_text

log = logging.getLogger(__name__)

State: TypeAlias = InstanceState[Any]

_PARAMETERS: Final = 30_000
"""Bound parameters in one statement: below the limits of SQLite (32,766) and PostgreSQL (65,535)."""

NO_STREAM: Final[Changes] = {}
"""Stands for the stream of a row that has none, such as one without a parent. Never written to."""


def changes_at(route: Route, values: tuple[Any, ...], level: Level, delivery: Delivery) -> Changes:
    """The changes of the stream where *route* leads for these values of its target's columns, or `NO_STREAM`.

    Raises:
        InvalidStreamName: The values make no name.
    """
    assert not isinstance(route.target, PathTarget)
    name = route.stream_name(values, delivery.settings.gid_app)
    return NO_STREAM if name is None else level.stream(delivery, name).changes


def select_rows(
    connection: sa.Connection,
    mapper: Mapper[Any],
    names: Sequence[str],
    key: Sequence[str],
    keys: Iterable[Sequence[Any]],
) -> dict[str, dict[str, Any]]:
    """The attributes *names* of the rows with these primary *keys*, by the key's text; absent where the row is gone.

    Through the connection, so that nothing is flushed and no criteria of the application hide a row.
    """
    cls = mapper.class_
    key_columns = [getattr(cls, name) for name in key]
    condition = key_columns[0] if len(key) == 1 else sa.tuple_(*key_columns)
    wanted = list(dict.fromkeys((*key, *names)))
    identities = list({key_text(each): tuple(each) for each in keys}.values())
    step = _PARAMETERS // len(key)
    found = {}
    for start in range(0, len(identities), step):
        chunk = identities[start : start + step]
        statement = sa.select(*(getattr(cls, name).label(f"c{index}") for index, name in enumerate(wanted))).where(
            condition.in_([each[0] for each in chunk] if len(key) == 1 else chunk)
        )
        for values in connection.execute(statement):
            row = dict(zip(wanted, values, strict=True))
            found[key_text([row[name] for name in key])] = row
    return found


def report_failure(
    model: str, key: object, route: Route, error: Exception, *, first: bool, before: bool = False
) -> None:
    """Count an event that could not be made; log it, the first of its kind in a transaction in full.

    Args:
        before: What could not be told is where the row was before; if that was another stream, it stays there.
    """
    counters.increment("events_failed")
    what = "it cannot be told whether it left a stream" if before else "its event could not be made and is not sent"
    if first:
        log.error(
            "%s %s is stored, but for %s %s (%s: %s)",
            model,
            key,
            route,
            what,
            type(error).__name__,
            error,
            exc_info=error,
        )
    else:
        log.debug("%s %s: for %s %s either (%s)", model, key, route, what, error)


@dataclasses.dataclass(frozen=True, slots=True)
class Unplaced:
    """A row that changed, of which not even the stream is known yet."""

    route: Route
    identity: tuple[Any, ...]
    existed: bool
    old_value: bytes | None


class RowReader:
    """Reads rows of one class: to fill the `Unread` and to place the `Unplaced`."""

    def __init__(self, plan: Plan, delivery: Delivery, paths: PathReader) -> None:
        self._plan = plan
        self._delivery = delivery
        self._paths = paths

    def read(self, session: Session, level: Level, waiting: list[tuple[Route, Unread] | Unplaced]) -> None:
        plan = self._plan
        connection = level.connection(session, plan.mapper)
        identities = [each.identity if isinstance(each, Unplaced) else each[1].identity for each in waiting]
        rows = select_rows(connection, plan.mapper, plan.names, plan.key, identities)
        unplaced: list[EntityKey] = []
        failures = 0
        for each, identity in zip(waiting, identities, strict=True):
            row = rows.get(key_text(identity))
            route = each.route if isinstance(each, Unplaced) else each[0]
            if row is None:  # deleted again, or hidden from us by the database
                if not isinstance(each, Unplaced):
                    each[1].is_missing = True
                elif plan.mapper.identity_key_from_primary_key(identity) in session.identity_map:
                    unplaced.append((route.type, key_text(identity)))  # the session, too, thinks that it is there
                continue
            try:
                self._complete(session, level, each, row)
            except Exception as error:
                report_failure(plan.name, key_text(identity), route, error, first=not failures)
                failures += 1
        if unplaced:
            report_missing(unplaced)

    def _complete(
        self, session: Session, level: Level, item: tuple[Route, Unread] | Unplaced, row: dict[str, Any]
    ) -> None:
        route = item.route if isinstance(item, Unplaced) else item[0]
        encode = route.encoder(keys_as_strings=self._delivery.settings.keys_as_strings, absent_is_null=False)
        key, body = encode(row)
        if not isinstance(item, Unplaced):
            item[1].body = body
            return
        values = tuple(row[name] for name in route.target_attributes)
        change: Change = (item.existed, True, body, item.old_value, route.on)
        if isinstance(route.target, PathTarget):
            self._paths.add(session, level, Underway(route, values, (route.type, key), change))
            return
        changes = changes_at(route, values, level, self._delivery)
        if changes is not NO_STREAM:
            coalesce(changes, (route.type, key), change)


@dataclasses.dataclass(frozen=True, slots=True)
class Underway:
    """A change on its way to the stream at the end of a path."""

    route: Route
    values: tuple[Any, ...]
    entity: EntityKey
    change: Change
    end: tuple[Any, ...] | None = None
    """The values at the end of the path: () when it leads nowhere, None when that is not known yet."""


class PathReader:
    """Follows paths from row to row, and reads the rows that the session does not hold, all of a class at once.

    What arrives on a stream can wait for that until the commit, but not what leaves it: the rows on its way may be the
    next ones to be deleted.
    """

    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery
        self._found: dict[Hop, dict[str, tuple[Any, ...] | None]] = {}
        self._is_leaving = False

    def add(self, session: Session, level: Level, underway: Underway) -> None:
        """Have the change placed before the commit, in the order in which changes came.

        What the session knows of the way is taken now.
        """
        end = self._walk(session, underway)
        self._is_leaving |= end is None and not underway.change[1]
        level.wait_for(self, underway if end is None else dataclasses.replace(underway, end=end))

    def keep_deleted(self, session: Session, hops: Iterable[Hop]) -> None:
        """Within a flush, before it deletes: read the rows on the way that are going to be, and that are not loaded."""
        deleted: list[State] = [sa.inspect(record) for record in session.deleted]
        for hop in hops:
            identities = {
                key_text(state.key[1]): tuple(state.key[1])
                for state in deleted
                if state.key is not None
                and state.mapper.isa(hop.mapper)
                and any(name not in state.dict for name in hop.attributes)
            }
            if identities:
                self._read_hop(session.connection(bind_arguments={"mapper": hop.mapper}), hop, identities)

    def settle(self, session: Session, levels: Iterable[Level]) -> None:
        """A flush or a bulk statement is done: find where what left was, and with it all else that waits."""
        try:
            if self._is_leaving:
                for level in levels:
                    waiting: list[Underway] = level.waiting_for(self)
                    self._read_gaps(session, level, waiting)
                    waiting[:] = [
                        dataclasses.replace(each, end=self._walk(session, each)) if each.end is None else each
                        for each in waiting
                    ]
        finally:
            self._is_leaving = False
            self._found.clear()

    def read(self, session: Session, level: Level, waiting: list[Underway]) -> None:
        self._read_gaps(session, level, waiting)
        failures = 0
        for underway in waiting:
            try:
                end = underway.end if underway.end is not None else self._walk(session, underway)
                assert end is not None
                self._place(level, underway, end)
            except Exception as error:
                report_failure(underway.route.plan.name, underway.entity[1], underway.route, error, first=not failures)
                failures += 1

    def _read_gaps(self, session: Session, level: Level, waiting: Iterable[Underway]) -> None:
        while True:
            missing: dict[Hop, dict[str, tuple[Any, ...]]] = {}
            for underway in waiting:
                gap = self._first_gap(session, underway)
                if gap is not None:
                    hop, identity = gap
                    missing.setdefault(hop, {})[key_text(identity)] = identity
            if not missing:
                break
            for hop, identities in missing.items():
                self._read_hop(level.connection(session, hop.mapper), hop, identities)

    def _read_hop(self, connection: sa.Connection, hop: Hop, identities: dict[str, tuple[Any, ...]]) -> None:
        rows = select_rows(connection, hop.mapper, hop.attributes, hop.key, identities.values())
        found = self._found.setdefault(hop, {})
        for text in identities:
            row = rows.get(text)
            found[text] = None if row is None else tuple(row[name] for name in hop.attributes)

    def _walk(self, session: Session, underway: Underway) -> tuple[Any, ...] | None:
        """The values at the end of the path: () when it ends in nothing, None when a row on the way is not known."""
        values: tuple[Any, ...] | None = underway.values
        target = underway.route.target
        assert isinstance(target, PathTarget)
        for hop in target.hops:
            assert values is not None
            if any(value is None for value in values):
                return ()
            known, values = self._known(session, hop, values, before=not underway.change[1])
            if not known:
                return None
            if values is None:
                return ()
        return values

    def _first_gap(self, session: Session, underway: Underway) -> tuple[Hop, tuple[Any, ...]] | None:
        values: tuple[Any, ...] | None = underway.values
        target = underway.route.target
        assert isinstance(target, PathTarget)
        if underway.end is not None:
            return None
        for hop in target.hops:
            if values is None or any(value is None for value in values):
                return None
            identity = values
            known, values = self._known(session, hop, identity, before=not underway.change[1])
            if not known:
                return hop, identity
        return None

    def _known(
        self, session: Session, hop: Hop, identity: tuple[Any, ...], *, before: bool
    ) -> tuple[bool, tuple[Any, ...] | None]:
        record = session.identity_map.get(hop.mapper.identity_key_from_primary_key(identity))
        if record is not None:
            state: State = sa.inspect(record)
            row = state.dict
            if before:  # what leaves in the flush in which the row on its way changes
                old = {name: value for name, value in state.committed_state.items() if value is not NO_VALUE}
                row = {**row, **old}
            if all(name in row for name in hop.attributes):
                return True, tuple(row[name] for name in hop.attributes)
        found = self._found.get(hop, {})
        text = key_text(identity)
        return text in found, found.get(text)

    def _place(self, level: Level, underway: Underway, values: tuple[Any, ...]) -> None:
        target = underway.route.target
        assert isinstance(target, PathTarget)
        name = target.name(values, self._delivery.settings.gid_app) if values else None
        if name is not None:
            coalesce(level.stream(self._delivery, name).changes, underway.entity, underway.change)
