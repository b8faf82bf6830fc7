"""Statements that change rows past the unit of work: noticed, refused, ignored or captured, as the model says.

`session.execute(update(Message)...)` and its like, `Query.update()`, and the legacy `session.bulk_*` methods fire no
event of the unit of work. SQLAlchemy has a hook for some of them (`do_orm_execute`), but any listener there costs each
SELECT of each session 5 % (measured), and the legacy methods have none. So the methods of `Session` themselves are
wrapped: what is no DML of a model with streams passes through after one look.

With "capture", the rows are read: before an UPDATE or DELETE (where they were, locked where the database can), and
after an INSERT or UPDATE through RETURNING, else by primary key.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import IteratorResult, Result
from sqlalchemy.engine.result import SimpleResultMetaData
from sqlalchemy.orm import Mapper, Session
from sqlalchemy.sql import dml

from . import unsent
from .completion import report_failure, select_rows
from .counters import counters
from .declarations import PLAN_ATTRIBUTE, Plan, Route, plan_of_table
from .errors import BulkStatementError
from .recording import NOWHERE, Recording, RecordView, notes_of
from .suppression import is_suppressed
from .transactions import Change, buffers_of
from .values import Row, key_text

Rows = dict[str, dict[str, Any]]
"""Rows by the text of their primary key."""


class UncapturedBulkStatement(UserWarning):
    """A bulk statement changed rows of a model with streams, and no reader will hear of it."""


def _execute(original: Callable[..., Result[Any]], session: Session, statement: Any, *args: Any, **kwargs: Any) -> Any:
    plan = _plan_of(statement)
    if plan is None:
        return original(session, statement, *args, **kwargs)
    params = args[0] if args else kwargs.get("params")
    policy = _policy(plan, statement, params, session)
    if policy != "capture":
        return original(session, statement, *args, **kwargs)
    run = functools.partial(original, session)
    if isinstance(statement, dml.Insert):
        return _Bulk(session, plan).insert(run, statement, args, kwargs)
    if isinstance(params, Sequence) and not isinstance(params, Mapping):
        return _Bulk(session, plan).change_by_key(lambda: run(statement, *args, **kwargs), params)
    return _Bulk(session, plan).change(run, statement, args, kwargs)


def _scalars(original: Callable[..., Any], session: Session, statement: Any, *args: Any, **kwargs: Any) -> Any:
    if _plan_of(statement) is None:
        return original(session, statement, *args, **kwargs)
    return session.execute(statement, *args, **kwargs).scalars()


def _scalar(original: Callable[..., Any], session: Session, statement: Any, *args: Any, **kwargs: Any) -> Any:
    if _plan_of(statement) is None:
        return original(session, statement, *args, **kwargs)
    return session.execute(statement, *args, **kwargs).scalar()


def _bulk_insert_mappings(
    original: Callable[..., None],
    session: Session,
    mapper: Any,
    mappings: Iterable[dict[str, Any]],
    return_defaults: bool = False,
    render_nulls: bool = False,
) -> None:
    plan = _plan_of_class(mapper)
    if plan is None or _policy(plan, "bulk_insert_mappings", None, session) != "capture":
        original(session, mapper, mappings, return_defaults, render_nulls)
        return
    written = list(mappings)
    original(session, mapper, written, True, render_nulls)  # with defaults: how else to know the keys
    bulk = _Bulk(session, plan)
    bulk.record({}, bulk.read([tuple(each[name] for name in plan.key) for each in written]))


def _bulk_update_mappings(
    original: Callable[..., None], session: Session, mapper: Any, mappings: Iterable[dict[str, Any]]
) -> None:
    plan = _plan_of_class(mapper)
    if plan is None or _policy(plan, "bulk_update_mappings", None, session) != "capture":
        original(session, mapper, mappings)
        return
    written = list(mappings)
    _Bulk(session, plan).change_by_key(lambda: original(session, mapper, written), written)


def _bulk_save_objects(
    original: Callable[..., None],
    session: Session,
    objects: Iterable[object],
    return_defaults: bool = False,
    update_changed_only: bool = True,
    preserve_order: bool = True,
) -> None:
    saved = list(objects)
    plans = {plan for each in saved if (plan := _plan_of_class(type(each))) is not None}
    captured = [plan for plan in plans if _policy(plan, "bulk_save_objects", None, session) == "capture"]
    work = []
    for plan in captured:
        states = [sa.inspect(each) for each in saved if type(each) is plan.mapper.class_]
        bulk = _Bulk(session, plan)
        work.append((bulk, states, bulk.read([state.key[1] for state in states if state.key is not None])))
    original(session, saved, return_defaults or bool(work), update_changed_only, preserve_order)
    for bulk, states, before in work:
        identities = [tuple(state.dict.get(name) for name in bulk.plan.key) for state in states]
        bulk.record(before, bulk.read(identities))


# What a statement is about, and what is to be done about it


def _plan_of(statement: Any) -> Plan | None:
    """The plan of the model whose rows *statement* changes; None for anything else."""
    if not getattr(statement, "is_dml", False):
        return None
    try:
        entity = statement.entity_description.get("entity")
    except KeyError:  # a statement on a table, with a model's attributes in its WHERE clause (SQLAlchemy 2.1)
        entity = None
    return _plan_of_class(entity) if entity is not None else plan_of_table(statement.table)


def _plan_of_class(entity: Any) -> Plan | None:
    mapper: Any = sa.inspect(entity, raiseerr=False)
    if mapper is None or not isinstance(getattr(mapper, "mapper", None), Mapper):
        return None
    plan: Plan | None = mapper.mapper.class_.__dict__.get(PLAN_ATTRIBUTE)
    return plan


def _policy(plan: Plan, statement: Any, params: Any, session: Session) -> str:
    cls = plan.mapper.class_
    policy: str = cls.__stream_bulk__
    if policy == "ignore" or is_suppressed(cls):
        return "ignore"
    why = 'its __stream_bulk__ is not "capture"'
    if policy == "capture":
        why = _obstacle(plan, statement, params, session)
        if not why:
            return "capture"
        policy = "warn"
    name = statement if isinstance(statement, str) else type(statement).__name__.lower()
    message = (
        f"A bulk {name} of {plan.name} passes the unit of work, and no reader of its streams hears of it ({why}). Set "
        f'{plan.name}.__stream_bulk__ to "capture", change the records one by one, or say "ignore"'
    )
    if policy == "raise":
        raise BulkStatementError(message)
    counters.increment("bulk_statements_uncaptured")
    if unsent.listeners:
        unsent.note(unsent.Reason.BULK, model=plan.name)
    _warn(message)
    return "warn"


def _obstacle(plan: Plan, statement: Any, params: Any, session: Session) -> str:
    """Why *statement* cannot be captured; empty when it can."""
    if plan.mapper.polymorphic_on is not None and len(list(plan.mapper.self_and_descendants)) > 1:
        return "its rows may be of several classes; name the subclass"
    if isinstance(statement, dml.Update) and not _returns_updated(plan, session) and _sets_a_key(plan, statement):
        return "it changes primary keys, and the new ones are not returned"
    if not isinstance(statement, dml.Insert):
        return ""
    dialect = session.get_bind(plan.mapper).dialect
    if len(plan.mapper.tables) > 1:
        return "an INSERT into the tables of joined inheritance returns no rows"
    many = isinstance(params, Sequence) and not isinstance(params, Mapping)
    single = not many and not statement._multi_values and statement.select is None and not statement._returning
    if single:
        return ""
    if not dialect.insert_returning or (many and not dialect.insert_executemany_returning):
        return f"{dialect.name} has no RETURNING for it"
    return ""


def _returns_updated(plan: Plan, session: Session) -> bool:
    return session.get_bind(plan.mapper).dialect.update_returning and len(plan.mapper.tables) == 1


def _sets_a_key(plan: Plan, statement: dml.Update) -> bool:
    # SQLAlchemy 2.0 keeps ordered values apart.
    values = dict(getattr(statement, "_ordered_values", None) or statement._values or {})
    names = {column if isinstance(column, str) else column.key for column in values}
    return not names.isdisjoint({*plan.key, *(column.key for column in plan.mapper.primary_key)})


def _warn(message: str) -> None:
    """Once for each call site, as the standard filters do; the site is the application's, not SQLAlchemy's or ours."""
    frame = _application_frame()
    if frame is None:
        warnings.warn(message, UncapturedBulkStatement, stacklevel=2)
        return
    warnings.warn_explicit(
        message,
        UncapturedBulkStatement,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


_NOT_THE_APPLICATION: Final = ("sqlalchemy", "broadcastable", "greenlet", "asyncio")


def _application_frame() -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    asked_parent = False
    while True:
        while frame is not None:
            if frame.f_globals.get("__name__", "").partition(".")[0] not in _NOT_THE_APPLICATION:
                return frame
            frame = frame.f_back
        # Under asyncio SQLAlchemy runs us in a greenlet; the application's frames are its parent's.
        if asked_parent or "greenlet" not in sys.modules:
            return None
        asked_parent = True
        parent = sys.modules["greenlet"].getcurrent().parent
        frame = None if parent is None else parent.gr_frame


# Capture


class _Bulk:
    """The rows of one bulk statement."""

    def __init__(self, session: Session, plan: Plan) -> None:
        self.plan = plan
        self._session = session

    def insert(
        self, run: Callable[..., Any], statement: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Result[Any]:
        """Run an INSERT and record the new rows."""
        params = args[0] if args else kwargs.get("params")
        single = params is None or isinstance(params, Mapping)
        upsert = getattr(statement, "_post_values_clause", None) is not None
        if single and not (statement._multi_values or statement.select is not None or statement._returning or upsert):
            # Its result tells the key, which that of an INSERT with RETURNING would not.
            plain: Result[Any] = run(statement, *args, **kwargs)
            self.record({}, self.read([tuple(plain.inserted_primary_key)]))  # type: ignore[attr-defined]
            return plain
        result, rows = self._returning(run, statement, args, kwargs)
        # ON CONFLICT: whether a row was there before is not told, and an update is right in either case.
        self.record(rows if upsert else {}, rows)
        return result

    def change(
        self, run: Callable[..., Any], statement: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Result[Any]:
        """Run an UPDATE or DELETE with a WHERE clause."""
        plan = self.plan
        cls = plan.mapper.class_
        wanted = sa.select(*(getattr(cls, name).label(f"c{index}") for index, name in enumerate(plan.names)))
        if statement.whereclause is not None:
            wanted = wanted.where(statement.whereclause)
        options = {"populate_existing": False}
        found = run(wanted.with_for_update(), *args, execution_options=options, **_without_options(kwargs))
        before = self._by_key(dict(zip(plan.names, values, strict=True)) for values in found)
        if isinstance(statement, dml.Delete):
            deleted: Result[Any] = run(statement, *args, **kwargs)
            self.record(before, {})
            return deleted
        result: Result[Any]
        if _returns_updated(plan, self._session):
            result, after = self._returning(run, statement, args, kwargs)
        else:
            result = run(statement, *args, **kwargs)
            after = self.read([self._identity(row) for row in before.values()])
        self.record(before, after)
        return result

    def change_by_key(self, run: Callable[[], Any], parameters: Sequence[Any]) -> Any:
        """Run an UPDATE whose parameter sets name the rows by primary key."""
        identities = [tuple(each[name] for name in self.plan.key) for each in parameters]
        before = self.read(identities)
        result = run()
        self.record(before, self.read(identities))
        return result

    def read(self, identities: Sequence[Sequence[Any]]) -> Rows:
        """The rows with these primary keys, as they are now in this transaction."""
        if not identities:
            return {}
        plan = self.plan
        connection = self._session.connection(bind_arguments={"mapper": plan.mapper})
        return select_rows(connection, plan.mapper, plan.names, plan.key, identities)

    def _returning(
        self, run: Callable[..., Any], statement: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Result[Any], Rows]:
        plan = self.plan
        columns = [plan.mapper.attrs[name].columns[0] for name in plan.names]
        own = bool(statement._returning)
        result = run(statement.returning(*columns), *args, **kwargs)
        found = result.all()
        rows = self._by_key(dict(zip(plan.names, values[-len(columns) :], strict=True)) for values in found)
        if not own:
            # What the ORM wraps in rows of its own has the cursor's result inside. Some drivers count rows only as they
            # are fetched, which SQLAlchemy does not wait for.
            plain = getattr(result, "raw", result)
            plain.rowcount = len(found)
            return plain, rows
        keys = list(result.keys())[: -len(columns)]
        asked_for = [tuple(values[: -len(columns)]) for values in found]
        return IteratorResult(SimpleResultMetaData(keys), iter(asked_for)), rows

    def _by_key(self, rows: Iterable[dict[str, Any]]) -> Rows:
        return {key_text(self._identity(row)): row for row in rows}

    def _identity(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in self.plan.key)

    def record(self, before: Rows, after: Rows) -> None:
        """Note that the rows *before* became the rows *after*. Never raises."""
        buffers = buffers_of(self._session)
        level = buffers.level(self._session)
        level.mapper = level.mapper or self.plan.mapper
        recording = Recording(self._session, notes_of(buffers), level, buffers.delivery_for(self._session))
        unchanged = {
            key for key in before.keys() & after.keys() if before[key] is not after[key] and before[key] == after[key]
        }
        for route in self.plan.routes:
            failures = 0
            for rows, note in ((before, _leaves), (after, _arrives)):
                for key, row in rows.items():
                    if key in unchanged:
                        continue
                    try:
                        note(recording, route, row)
                    except Exception as error:
                        report_failure(self.plan.name, key, route, error, first=not failures)
                        failures += 1


def _leaves(recording: Recording, route: Route, row: dict[str, Any]) -> None:
    handle, entity = recording.place(route, RecordView(route.plan, row), row)
    if handle is not NOWHERE:
        recording.add(route, handle, entity, (True, False, None, recording.old_value(route, row), route.on))


def _arrives(recording: Recording, route: Route, row: dict[str, Any]) -> None:
    view = RecordView(route.plan, row)
    handle, entity = recording.place(route, view, row)
    if handle is NOWHERE:
        return
    if route.value_of is not None:
        value = route.value_of(view, row, recording.keys_as_strings)
    else:
        value = route.plan.reader(keys_as_strings=recording.keys_as_strings)(row)
    change: Change = (False, True, route.encode(entity[1], value), None, route.on)
    recording.add(route, handle, entity, change)


def _without_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name == "bind_arguments" or name == "params"}


# Hooks

_WRAPPED: Final[dict[str, Callable[..., Any]]] = {
    "execute": _execute,
    "scalars": _scalars,
    "scalar": _scalar,
    "bulk_save_objects": _bulk_save_objects,
    "bulk_insert_mappings": _bulk_insert_mappings,
    "bulk_update_mappings": _bulk_update_mappings,
}

_originals: dict[str, Callable[..., Any]] = {}


def install() -> None:
    """Wrap the methods of `Session`; does nothing when it is done already."""
    for name, wrapper in _WRAPPED.items():
        if name not in _originals:
            _originals[name] = original = getattr(Session, name)
            setattr(Session, name, _wrap(original, wrapper))


def _wrap(original: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapped(session: Session, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, session, *args, **kwargs)

    return wrapped


def remove() -> None:
    """Put the methods back, unless somebody else has wrapped them since."""
    for name, original in list(_originals.items()):
        if getattr(getattr(Session, name), "__wrapped__", None) is original:
            setattr(Session, name, original)
            del _originals[name]
