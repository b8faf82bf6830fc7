"""From a flush to the buffers: which rows changed, where that is to be told, and with which values.

Runs once at the end of each flush, when every key is known and the history of every attribute is still there. Values
are taken then and there: the objects may be gone at the commit. What leaves or moves is noted before what arrives, so
a key that changes hands within one flush ends up with its new owner.
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import functools
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any, Concatenate, Final, ParamSpec, TypeAlias, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Mapper, Session, UOWTransaction
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.orm.base import NO_VALUE

from . import transactions, unsent
from .completion import NO_STREAM, Unplaced, report_failure, select_rows
from .declarations import PathTarget, Plan, RecordTarget, Route, plan_of_class
from .recording import ABSENT_IS_UNKNOWN, NOWHERE, Handle, Notes, Recording, RecordView, State, notes_of
from .suppression import is_suppressed
from .transactions import Change, Delivery, EntityKey, Level, Unread, buffers_of, coalesce
from .values import key_text
from .views import identity_now

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_by_insert_order = attrgetter("insert_order")


def _by_key(state: State) -> Any:
    assert state.key is not None
    return state.key[1]


def _by_key_of_first(updated: tuple[State, set[str]]) -> Any:
    return _by_key(updated[0])


def _after_flush(session: Session, context: UOWTransaction) -> None:
    plans = [(plan, mapper) for mapper in context.mappers if (plan := plan_of_class(mapper)) is not None]
    if not plans:
        return
    buffers = buffers_of(session)
    notes = notes_of(buffers)
    plans = [(plan, mapper) for plan, mapper in plans if not is_suppressed(mapper.class_)]
    if plans:
        level = buffers.level(session)
        for _, mapper in plans:
            level.remember_bind(session, mapper)
        _Flush(notes, level, buffers.delivery_for(session), context).capture(plans)
        notes.settle(session, buffers)
    notes.forget_flush()


class _Flushed:
    """The rows of one class that a flush wrote."""

    def __init__(self, plan: Plan, mapper: Mapper[Any], context: UOWTransaction, notes: Notes) -> None:
        self.plan = plan
        self._expressions = notes.expressions
        self.inserted: list[State] = []
        self.updated: list[tuple[State, set[str]]] = []
        self.deleted: list[State] = []
        # Deleted, and not by a DELETE: some were replaced by a new row with their key, and `_pair` tells which.
        self.taken_off: list[State] = []
        self.replaced: list[State] = []
        self.replaces = False
        for state in context.mappers[mapper]:
            is_delete, list_only = context.states[state]
            if is_delete:
                (self.taken_off if list_only else self.deleted).append(state)
            elif list_only:
                continue
            elif state.key is None:
                self.inserted.append(state)
            elif state.committed_state or state in notes.expressions:
                changed = self._changed(state)
                if changed:
                    self.updated.append((state, changed))
                elif unsent.listeners:
                    unsent.note(unsent.Reason.UNCHANGED, model=plan.name)
        self.inserted.sort(key=_by_insert_order)
        if len(self.updated) > 1 or len(self.deleted) > 1:
            # The unit of work has sets; readers of a log like the same order each time.
            with contextlib.suppress(Exception):  # keys that do not compare
                self.updated.sort(key=_by_key_of_first)
                self.deleted.sort(key=_by_key)

    def _changed(self, state: State) -> set[str]:
        equal = self.plan.equal
        row = state.dict
        changed = {
            name
            for name, old in state.committed_state.items()
            if name in equal and (old is NO_VALUE or name not in row or equal[name](row[name], old) is not True)
        }
        if state in self._expressions:
            changed |= self._expressions[state]
        return changed


_TAKEN_OFF: Final = (True, True)
_WRITTEN: Final = (False, False)
"""In `UOWTransaction.states`: whether it is a delete, and whether it is only listed, with nothing to be done."""


def _pair(flushed: Sequence[_Flushed], context: UOWTransaction) -> None:
    """Find out which rows were replaced: SQLAlchemy makes one UPDATE of a deleted row and a new one with its key.

    The new one may be of another class with the same table. What it was not given is not null: the row keeps it.
    """
    if _TAKEN_OFF not in context.states.values():
        return
    taken_off = {
        state.key[:2]: state for state, todo in context.states.items() if todo == _TAKEN_OFF and state.key is not None
    }
    replaced, new = set(), set()
    for state, todo in context.states.items():
        if todo == _WRITTEN and state.key is None:
            identity = state.mapper.primary_key_from_instance(state.obj())
            old = taken_off.get(state.mapper.identity_key_from_primary_key(identity)[:2])
            if old is not None:
                replaced.add(old)
                new.add(state)
                state.info[ABSENT_IS_UNKNOWN] = True
    for each in flushed:
        each.replaced = [state for state in each.taken_off if state in replaced]
        each.replaces = not new.isdisjoint(each.inserted)


class _Flush(Recording):
    """Takes what one flush wrote to the buffer of its transaction."""

    def __init__(self, notes: Notes, level: Level, delivery: Delivery, context: UOWTransaction) -> None:
        super().__init__(context.session, notes, level, delivery)
        self._context = context

    def capture(self, plans: Sequence[tuple[Plan, Mapper[Any]]]) -> None:
        flushed = [_Flushed(plan, mapper, self._context, self.notes) for plan, mapper in plans]
        _pair(flushed, self._context)
        arriving: list[tuple[Route, State, Handle, EntityKey, Change]] = []
        for each in flushed:
            for route in each.plan.routes:
                if route.direct:
                    self._remove_direct(route, each)
                else:
                    arriving.extend(self._move_indirect(route, each))
        for each in flushed:
            for route in each.plan.routes:
                if route.direct:
                    self._insert_direct(route, each)
                    self._update_direct(route, each)
        for route, state, handle, entity, change in arriving:
            self._guarded(self._add, route, state, handle, entity, change)

    # Routes that follow from the row alone

    def _remove_direct(self, route: Route, flushed: _Flushed) -> None:
        if not (flushed.deleted or flushed.replaced or flushed.updated):
            return
        leaving = [*flushed.deleted, *flushed.replaced]
        leaving += [state for state, changed in flushed.updated if not changed.isdisjoint(route.placing)]
        for state in leaving:
            self._guarded(self._remove, route, state)

    def _remove(self, route: Route, state: State) -> None:
        row = self._before(route.plan, state)
        handle = tuple(row[name] for name in route.target_attributes)
        change: Change = (True, False, None, self.old_value(route, row), route.on)
        self.add(route, handle, (route.type, _old_key(state)), change)

    def _insert_direct(self, route: Route, flushed: _Flushed) -> None:
        if not flushed.inserted:
            return
        if isinstance(route.target, PathTarget) or flushed.replaces:
            for state in flushed.inserted:
                self._guarded(self._arrive, route, state, False)
            return
        # The common case, and many rows of it: nothing here is a call that can be avoided.
        streams = self.level.lookups.setdefault(route, {})
        encode = route.encoder(keys_as_strings=self.keys_as_strings, absent_is_null=True)
        target_of = route.target_of_new
        needed, type_, on = route.attributes, route.type, route.on
        for state in flushed.inserted:
            row = state.dict
            try:
                expired = state.expired_attributes
                if expired and not needed.isdisjoint(expired):
                    self._arrive(route, state, False)
                    continue
                target = target_of(row)
                changes = streams.get(target)
                if changes is None:
                    changes = streams[target] = self.open(route, target)
                if changes is NO_STREAM:
                    continue
                key, body = encode(row)
                entity = (type_, key)
                if entity in changes:
                    coalesce(changes, entity, (False, True, body, None, on))
                else:
                    changes[entity] = (False, True, body, None, on)
            except DBAPIError:
                raise
            except Exception as error:
                self._failed(route, state, error)

    def _update_direct(self, route: Route, flushed: _Flushed) -> None:
        if not flushed.updated:
            return
        if isinstance(route.target, PathTarget) or route.old_value:
            for state, changed in flushed.updated:
                existed = changed.isdisjoint(route.placing)
                self._guarded(self._arrive, route, state, existed)
            return
        streams = self.level.lookups.setdefault(route, {})
        encode = route.encoder(keys_as_strings=self.keys_as_strings, absent_is_null=False)
        target_of = route.target_of
        placing, type_, on = route.placing, route.type, route.on
        for state, changed in flushed.updated:
            row = state.dict
            try:
                target = target_of(row)
                changes = streams.get(target)
                if changes is None:
                    changes = streams[target] = self.open(route, target)
                if changes is NO_STREAM:
                    continue
                key, body = encode(row)
                coalesce(changes, (type_, key), (changed.isdisjoint(placing), True, body, None, on))
            except KeyError:
                existed = changed.isdisjoint(placing)
                self._guarded(self._arrive, route, state, existed)
            except DBAPIError:
                raise
            except Exception as error:
                self._failed(route, state, error)

    def _arrive(self, route: Route, state: State, existed: bool) -> None:
        """The careful way: for rows that are not known whole, old values, and paths."""
        row = _as_stored(route.plan, state)
        old = self.old_value(route, self._before(route.plan, state)) if existed else None
        identity = _new_identity(route.plan, state)
        reader = self.notes.rows(route.plan, self.delivery)
        if any(name not in row for name in route.target_attributes):
            self.level.wait_for(reader, Unplaced(route, identity, existed, old))
            return
        handle = tuple(row[name] for name in route.target_attributes)
        body: bytes | Unread
        try:
            encode = route.encoder(keys_as_strings=self.keys_as_strings, absent_is_null=False)
            body = encode(row)[1]
        except KeyError:
            body = Unread(identity)
            self.level.wait_for(reader, (route, body))
        self.add(route, handle, (route.type, key_text(identity)), (existed, True, body, old, route.on))

    # Routes with functions of the application

    def _move_indirect(
        self, route: Route, flushed: _Flushed
    ) -> Iterator[tuple[Route, State, Handle, EntityKey, Change]]:
        """Note at once what leaves; yield what arrives."""
        try:
            self._load_missing(route.plan, [*flushed.inserted, *(state for state, _ in flushed.updated)])
        except DBAPIError:
            raise
        except Exception as error:
            log.debug("%s: what a flush wrote cannot be read together (%s)", route.plan.name, error)
        for state in (*flushed.deleted, *flushed.replaced):
            self._guarded(self._leave_indirect, route, state)
        for state in flushed.inserted:
            arrival = self._guarded(self._arrive_indirect, route, state, None)
            if arrival is not None:
                yield route, state, *arrival
        for state, _ in flushed.updated:
            arrival = self._guarded(self._update_indirect, route, state)
            if arrival is not None:
                yield route, state, *arrival

    def _leave_indirect(self, route: Route, state: State) -> None:
        row = self._before(route.plan, state)
        record = state.obj()
        handle, entity = self._place_before(route, state, record, row, fallback=NOWHERE)
        if handle is not NOWHERE:
            self.add(route, handle, entity, (True, False, None, self.old_value(route, row), route.on))

    def _update_indirect(self, route: Route, state: State) -> tuple[Handle, EntityKey, Change] | None:
        row = self._before(route.plan, state)
        record = state.obj()
        with self._with_its_parents(route.plan, state):
            now = self.place(route, record, state.dict)
        was = self._place_before(route, state, record, row, fallback=now[0])
        if was == now and now[0] is not NOWHERE:
            return self._arrive_indirect(route, state, self.old_value(route, row), place=now, existed=True)
        if was[0] is not NOWHERE:
            self.add(route, *was, (True, False, None, self.old_value(route, row), route.on))
        return self._arrive_indirect(route, state, None, place=now)

    def _arrive_indirect(
        self,
        route: Route,
        state: State,
        old: bytes | None,
        *,
        place: tuple[Handle, EntityKey] | None = None,
        existed: bool = False,
    ) -> tuple[Handle, EntityKey, Change] | None:
        record = state.obj()
        with self._with_its_parents(route.plan, state):
            handle, entity = place or self.place(route, record, state.dict)
            if handle is NOWHERE:
                if unsent.listeners:
                    unsent.note(unsent.Reason.UNWANTED, model=route.plan.name)
                return None
            row = _as_stored(route.plan, state)
            if route.value_of is not None:
                value = route.value_of(record, row, self.keys_as_strings)
            else:
                value = route.plan.reader(keys_as_strings=self.keys_as_strings)(row)
        return handle, entity, (existed, True, route.encode(entity[1], value), old, route.on)

    def _place_before(
        self, route: Route, state: State, record: Any, row: dict[str, Any], *, fallback: Handle
    ) -> tuple[Handle, EntityKey]:
        before = RecordView(route.plan, row, record)
        try:
            return self.place(route, before, row)
        except DBAPIError:
            raise
        except Exception as error:
            # What cannot be told of the past is taken to be as it is now.
            report_failure(
                route.plan.name, _old_key(state), route, error, first=self._is_first_failure(route), before=True
            )
            entity = (route.type, _old_key(state))
            if fallback is NOWHERE and not isinstance(route.target, RecordTarget):
                return tuple(row[name] for name in route.target_attributes), entity
            return fallback, entity

    def _load_missing(self, plan: Plan, states: list[State]) -> None:
        """Load, with one statement, what the application's functions would otherwise load row by row."""
        names = [each.name for each in plan.attributes]
        wanted = set(names)
        missing = [state for state in states if not wanted <= _as_stored(plan, state).keys()]
        if not missing:
            return
        connection = self.session.connection(bind_arguments={"mapper": plan.mapper})
        identities = [_new_identity(plan, state) for state in missing]
        rows = select_rows(connection, plan.mapper, names, plan.key, identities)
        for state in missing:
            row = rows.get(key_text(_new_identity(plan, state)), {})
            for name in row.keys() - state.dict.keys():
                set_committed_value(state.obj(), name, row[name])

    @contextlib.contextmanager
    def _with_its_parents(self, plan: Plan, state: State) -> Iterator[None]:
        """Have the record show the parents that its foreign keys say, for as long as functions look at it."""
        row = state.dict
        corrections = self.parents.corrections(plan, row)
        loaded = {name: row[name] for name in corrections if name in row}
        row.update(corrections)
        try:
            yield
        finally:
            for name, parent in corrections.items():
                if row.get(name) is parent:
                    del row[name]
            row.update(loaded)

    # Common to both

    def _before(self, plan: Plan, state: State) -> dict[str, Any]:
        """The row as the database had it before the flush; attributes that nobody knows are absent."""
        row = _as_stored(plan, state)
        for name, old in state.committed_state.items():
            if name in plan.equal:
                if old is NO_VALUE:
                    row.pop(name, None)
                else:
                    row[name] = old
        row.update(self.notes.known_before.get(state, ()))
        if state.key is not None:
            row.update(zip(plan.key, state.key[1], strict=True))
        return row

    def _add(self, route: Route, state: State, handle: Handle, entity: EntityKey, change: Change) -> None:
        self.add(route, handle, entity, change)

    def _guarded(
        self,
        step: Callable[Concatenate[Route, State, P], T],
        route: Route,
        state: State,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T | None:
        """Do *step*; whatever it raises costs this row's event, not the flush.

        But for an error of the database: after one PostgreSQL makes a ROLLBACK of the COMMIT, and says nothing.
        """
        try:
            return step(route, state, *args, **kwargs)
        except DBAPIError:
            raise
        except Exception as error:
            self._failed(route, state, error)
            return None

    def _failed(self, route: Route, state: State, error: Exception) -> None:
        key = state.key[1] if state.key is not None else tuple(state.dict.get(name) for name in route.plan.key)
        report_failure(route.plan.name, _for_the_log(key), route, error, first=self._is_first_failure(route))

    def _is_first_failure(self, route: Route) -> bool:
        first = route not in self.notes.failed
        self.notes.failed.add(route)
        return first


# Rows


def _as_stored(plan: Plan, state: State) -> dict[str, Any]:
    """What the instance holds, with null for what an INSERT of this session left out. Loads nothing."""
    row: dict[str, Any] = {name: value for name, value in state.dict.items() if name in plan.equal}
    # Made here, and no query has touched it since, nor anything but the unit of work its row.
    if state.runid is None and ABSENT_IS_UNKNOWN not in state.info:
        expired = state.expired_attributes
        for name in plan.names:
            if name not in row and name not in expired:
                row[name] = None
    return row


def _new_identity(plan: Plan, state: State) -> tuple[Any, ...]:
    row = state.dict
    known = state.key[1] if state.key is not None else (None,) * len(plan.key)
    return tuple(row.get(name, before) for name, before in zip(plan.key, known, strict=True))


def _old_key(state: State) -> str:
    assert state.key is not None
    return key_text(state.key[1])


def _for_the_log(key: tuple[Any, ...]) -> str:
    try:
        return key_text(key)
    except Exception:
        return f"with a key of {', '.join(type(part).__name__ for part in key)}"


# Before the flush writes

_PLAIN: Final = frozenset(
    {type(None), str, int, float, bool, bytes, dict, list, datetime.datetime, datetime.date, decimal.Decimal, uuid.UUID}
)
"""Types of values that are no SQL expressions; there are others, they take the longer way."""


Hook: TypeAlias = Callable[[Mapper[Any], Any, State], None]


def _harmless(hook: Hook) -> Hook:
    """What is not known afterwards costs events, of which there is a report then, and not the flush."""

    @functools.wraps(hook)
    def wrapped(mapper: Mapper[Any], connection: Any, state: State) -> None:
        try:
            hook(mapper, connection, state)
        except DBAPIError:
            raise
        except Exception as error:
            log.debug("%s: rows cannot be read before they change (%s)", mapper.class_.__name__, error)

    return wrapped


@_harmless
def _before_update(mapper: Mapper[Any], connection: sa.Connection, state: State) -> None:
    plan = plan_of_class(mapper)
    if plan is None:
        return
    if plan.hops:
        _keep_paths(plan, state)
    committed = state.committed_state
    row = state.dict
    for name, old in committed.items():
        value = row.get(name)
        if value.__class__ not in _PLAIN and name in plan.equal and _is_expression(value):
            notes = notes_of(buffers_of(_session_of(state)))
            notes.expressions.setdefault(state, set()).add(name)
            if old is not NO_VALUE:
                notes.known_before.setdefault(state, {})[name] = old
    if plan.computed:
        known = {name: row[name] for name in plan.computed if name in row and name not in committed}
        if known:
            notes_of(buffers_of(_session_of(state))).known_before.setdefault(state, {}).update(known)
    seen = plan.equal if plan.indirect else plan.watched
    if (
        plan.wants_old_values
        or any(old is NO_VALUE and name in seen for name, old in committed.items())
        or (plan.set_later and not plan.set_later.isdisjoint(committed))
    ):
        _read_before_if_unknown(plan, connection, state)


@_harmless
def _before_delete(mapper: Mapper[Any], connection: sa.Connection, state: State) -> None:
    plan = plan_of_class(mapper)
    if plan is None:
        return
    if plan.hops:
        _keep_paths(plan, state)
    _read_before_if_unknown(plan, connection, state)


def _before_flush(session: Session, context: UOWTransaction, instances: object) -> None:
    """Read what is unknown of rows that new ones replace: the unit of work calls no hook for their delete."""
    deleted = session.deleted
    if not deleted or not (new := session.new):
        return
    unknown: list[State] = [
        state
        for state in map(sa.inspect, deleted)
        if (plan := plan_of_class(state.mapper)) is not None and _unknown_before(plan, state)
    ]
    if not unknown:
        return
    tables = {state.mapper.base_mapper for state in unknown}
    keys = {
        state.mapper.identity_key_from_primary_key(identity_now(state))[:2]
        for state in map(sa.inspect, new)
        if state.mapper.base_mapper in tables
    }
    for state in unknown:
        if state.key is not None and state.key[:2] in keys:
            _before_replacement(state.mapper, None, state)


@_harmless
def _before_replacement(mapper: Mapper[Any], connection: Any, state: State) -> None:
    session = _session_of(state)
    if session.connection_callable is not None:  # of a session that chooses the database by the record
        found = session.connection_callable(mapper, state.obj())
    else:
        found = session.connection(bind_arguments={"mapper": mapper})
    _before_delete(mapper, found, state)


def _keep_paths(plan: Plan, state: State) -> None:
    """The unit of work deletes children first: the rows on the way to their streams are still there."""
    session = _session_of(state)
    buffers = buffers_of(session)
    notes = notes_of(buffers)
    if plan not in notes.kept:
        notes.kept.add(plan)
        if session.deleted and not is_suppressed(plan.mapper.class_):
            notes.paths(buffers.delivery_for(session)).keep_deleted(session, plan.hops)


def _read_before_if_unknown(plan: Plan, connection: sa.Connection, state: State) -> None:
    if _unknown_before(plan, state):
        _read_before(plan, connection, state)


def _unknown_before(plan: Plan, state: State) -> set[str]:
    """The needed attributes whose value in the database only the database knows."""
    row = _as_stored(plan, state)
    committed = state.committed_state
    wanted = set(plan.names if plan.wants_old_values or plan.indirect else plan.watched)
    if plan.indirect:  # a function may have looked at a deferred column too
        wanted.update(name for name, old in committed.items() if old is NO_VALUE and name in plan.equal)
    return {name for name in wanted if committed.get(name) is NO_VALUE or name not in row} - set(plan.key)


def _read_before(plan: Plan, connection: sa.Connection, state: State) -> None:
    """Read what is unknown of *state*, and in the same statement of all others of its class that are in this flush."""
    session = _session_of(state)
    notes = notes_of(buffers_of(session))
    if state in notes.known_before and not _unknown_before(plan, state) - notes.known_before[state].keys():
        return
    if is_suppressed(plan.mapper.class_):
        return
    unknown = {state: _unknown_before(plan, state)}
    for record in (*session.dirty, *session.deleted):
        other: State = sa.inspect(record)
        if other.mapper is state.mapper and other.key is not None and other not in unknown:
            names = _unknown_before(plan, other)
            if names:
                unknown[other] = names
    wanted = sorted(set().union(*unknown.values()))
    rows = select_rows(connection, plan.mapper, wanted, plan.key, [each.key[1] for each in unknown if each.key])
    for each, needed in unknown.items():
        row = rows.get(_old_key(each), {})
        notes.known_before.setdefault(each, {}).update({name: row[name] for name in needed if name in row})


def _session_of(state: State) -> Session:
    session = state.session
    assert session is not None
    return session


def _is_expression(value: Any) -> bool:
    return isinstance(value, sa.ClauseElement) or hasattr(value, "__clause_element__")


# Hooks


def install(model: type) -> None:
    """Listen to all sessions and to the classes below *model*; does nothing when it is done already."""
    transactions.install()
    if not event.contains(Session, "after_flush", _after_flush):
        event.listen(Session, "before_flush", _before_flush)
        # Before anybody reacts to the flush: those of `transactions` hand over what is found here.
        event.listen(Session, "after_flush", _after_flush, insert=True)
        event.listen(model, "before_update", _before_update, raw=True, propagate=True)
        event.listen(model, "before_delete", _before_delete, raw=True, propagate=True)


def remove(model: type) -> None:
    """Listen no more."""
    transactions.remove()
    if event.contains(Session, "after_flush", _after_flush):
        event.remove(Session, "before_flush", _before_flush)
        event.remove(Session, "after_flush", _after_flush)
        event.remove(model, "before_update", _before_update)
        event.remove(model, "before_delete", _before_delete)
