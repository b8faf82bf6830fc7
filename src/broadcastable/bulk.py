"""Statements that change rows past the unit of work: noticed, refused, ignored or captured, as the model says.

`session.execute(update(Message)...)` and its like, `Query.update()`, and the legacy `session.bulk_*` methods fire no
event of the unit of work. SQLAlchemy has a hook for some of them (`do_orm_execute`), but any listener there costs each
SELECT of each session 5 % (measured), and the legacy methods have none. So the methods of `Session` themselves are
wrapped: what is no DML of a model with streams passes through after one look.

With "capture", `bulk_rows` reads the rows before and after.
"""

from __future__ import annotations

import functools
import itertools
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Result
from sqlalchemy.orm import Mapper, Session, registry
from sqlalchemy.orm.exc import UnmappedClassError
from sqlalchemy.sql import dml
from sqlalchemy.sql.visitors import iterate

from . import unsent, upserts
from .bulk_rows import BulkRows, Call
from .counters import counters
from .declarations import Plan, plan_of_class, plan_of_table
from .errors import BulkStatementError
from .suppression import is_suppressed
from .upserts import Conflicts


class UncapturedBulkStatement(UserWarning):
    """A bulk statement changed rows of a model with streams, and no reader will hear of it."""


class UncapturedSecondary(UserWarning):
    """A relationship writes to the table of a model with streams, its `secondary`, and no reader will hear of it."""


def _execute(original: Callable[..., Result[Any]], session: Session, statement: Any, *args: Any, **kwargs: Any) -> Any:
    plan = _plan_of(statement)
    if plan is None:
        _note_hidden(session, statement)
        return original(session, statement, *args, **kwargs)
    call = Call(functools.partial(original, session), statement, args, kwargs)
    _note_hidden(session, statement)
    if _policy(plan, call, session) != "capture":
        return call()
    if isinstance(statement, dml.Insert):
        return _insert(session, plan, call)
    rows = BulkRows(session, plan, call)
    if call.names_rows_by_key:
        return rows.change_by_key(call, call.params)
    if isinstance(statement, dml.Delete):
        return rows.change(call, returning=False)
    returning = call.sets is None and _returns_updated(plan, _dialect(session, plan, call))
    return rows.change(call, returning=returning, moves_keys=_sets_a_key(plan, call))


def _insert(session: Session, plan: Plan, call: Call) -> Any:
    rows = BulkRows(session, plan, call)
    if _result_tells_key(call):
        result = rows.insert(call)
        if any(part is None for part in result.inserted_primary_key):  # type: ignore[attr-defined]
            _warn_uncaptured(plan, call, "its primary key is an SQL expression, and the database does not tell it")
        return result
    conflicts: Conflicts | None = {}
    if upserts.changes_rows(call.statement):
        conflicts = upserts.conflicts_of(call.statement, call.params, plan.mapper)
        if conflicts is None:
            _warn_uncaptured(
                plan,
                call,
                "its parameters do not tell which rows it changes: they are sent as updates where they are now, and a "
                "stream that they have left keeps them",
            )
    return rows.insert_returning(call, conflicts)


def _scalars(original: Callable[..., Any], session: Session, statement: Any, *args: Any, **kwargs: Any) -> Any:
    if _plan_of(statement) is None:
        _note_hidden(session, statement)
        return original(session, statement, *args, **kwargs)
    return session.execute(statement, *args, **kwargs).scalars()


def _scalar(original: Callable[..., Any], session: Session, statement: Any, *args: Any, **kwargs: Any) -> Any:
    if _plan_of(statement) is None:
        _note_hidden(session, statement)
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
    if plan is None or _policy(plan, "bulk_insert_mappings", session) != "capture":
        original(session, mapper, mappings, return_defaults, render_nulls)
        return
    # SQLAlchemy writes the new keys into the dicts that it is given; before 2.0.32 it does not tell them at all.
    written = list(mappings) if return_defaults else [dict(each) for each in mappings]
    if not return_defaults and not _all_have_keys(plan, written):
        options = {"autoflush": False, "render_nulls": render_nulls}
        run = functools.partial(_originals["execute"], session)
        call = Call(run, sa.insert(plan.mapper.class_), (written,), {"execution_options": options})
        if not _obstacle_to_insert(plan, call, session):
            BulkRows(session, plan, call).insert_returning(call, conflicts={})
            return
    original(session, mapper, written, True, render_nulls)
    rows = BulkRows(session, plan)
    rows.record({}, rows.read([_key_in(plan, each) for each in written], lock=False))
    if not _all_have_keys(plan, written):
        _warn_uncaptured(plan, "bulk_insert_mappings", "SQLAlchemy, before 2.0.32, does not tell the new primary keys")


def _all_have_keys(plan: Plan, mappings: Iterable[Mapping[str, Any]]) -> bool:
    return not any(part is None for each in mappings for part in _key_in(plan, each))


def _key_in(plan: Plan, mapping: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(mapping.get(name) for name in plan.key)


def _bulk_update_mappings(
    original: Callable[..., None], session: Session, mapper: Any, mappings: Iterable[dict[str, Any]]
) -> None:
    plan = _plan_of_class(mapper)
    if plan is None or _policy(plan, "bulk_update_mappings", session) != "capture":
        original(session, mapper, mappings)
        return
    written = list(mappings)
    BulkRows(session, plan).change_by_key(lambda: original(session, mapper, written), written)


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
    captured = [plan for plan in plans if _policy(plan, "bulk_save_objects", session) == "capture"]
    work = []
    for plan in captured:
        states = [sa.inspect(each) for each in saved if type(each) is plan.mapper.class_]
        rows = BulkRows(session, plan)
        work.append((plan, rows, states, rows.read([state.key[1] for state in states if state.key is not None])))
    original(session, saved, return_defaults or bool(work), update_changed_only, preserve_order)
    for plan, rows, states, before in work:
        rows.record(before, rows.read([_identity(plan, state) for state in states]))


def _identity(plan: Plan, state: Any) -> tuple[Any, ...]:
    return tuple(state.key[1] if state.key is not None else (state.dict.get(name) for name in plan.key))


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
    return plan_of_class(mapper.mapper)


def _policy(plan: Plan, call: Call | str, session: Session) -> str:
    """What is to be done about *call*, or about the method of that name: "ignore", "warn" (it has warned) or "capture".

    Raises:
        BulkStatementError: The model refuses it.
    """
    cls = plan.mapper.class_
    policy: str = cls.__stream_bulk__
    if is_suppressed(cls):
        return "ignore"
    if policy == "ignore":
        if unsent.listeners:
            unsent.note(unsent.Reason.BULK, model=plan.name)
        return "ignore"
    why = 'its __stream_bulk__ is not "capture"'
    if policy == "capture":
        why = _obstacle(plan, call, session)
        if not why:
            return "capture"
    if policy == "raise":
        raise BulkStatementError(_message(plan, call, why))
    _warn_uncaptured(plan, call, why)
    return "warn"


def _message(plan: Plan, call: Call | str, why: str) -> str:
    name = call if isinstance(call, str) else type(call.statement).__name__.lower()
    return (
        f"A bulk {name} of {plan.name} passes the unit of work, and no reader of its streams hears of it ({why}). Set "
        f'{plan.name}.__stream_bulk__ to "capture", change the records one by one, or say "ignore"'
    )


def _warn_uncaptured(plan: Plan, call: Call | str, why: str) -> None:
    counters.increment("bulk_statements_uncaptured")
    if unsent.listeners:
        unsent.note(unsent.Reason.BULK, model=plan.name)
    _warn(_message(plan, call, why))


def _obstacle(plan: Plan, call: Call | str, session: Session) -> str:
    """Why it cannot be captured; empty when it can."""
    if plan.mapper.polymorphic_on is not None and len(list(plan.mapper.self_and_descendants)) > 1:
        return "its rows may be of several classes; name the subclass"
    if isinstance(call, str):
        return ""
    if isinstance(call.statement, dml.Insert):
        return _obstacle_to_insert(plan, call, session)
    where = call.statement.whereclause
    if where is not None and any(getattr(each, "is_dml", False) for each in iterate(where)):
        return "its WHERE clause changes rows itself, so it cannot be asked beforehand which rows it means"
    returning = call.sets is None and _returns_updated(plan, _dialect(session, plan, call))
    if isinstance(call.statement, dml.Update) and not returning and _sets_a_key(plan, call):
        return "it changes primary keys, and the new ones are not returned"
    return ""


def _obstacle_to_insert(plan: Plan, call: Call, session: Session) -> str:
    if len(plan.mapper.tables) > 1:
        return "an INSERT into the tables of joined inheritance returns no rows"
    dialect = _dialect(session, plan, call)
    if _result_tells_key(call):
        return ""
    if not dialect.insert_returning or (call.sets is not None and not dialect.insert_executemany_returning):
        return f"{dialect.name} has no RETURNING for it"
    return ""


def _result_tells_key(call: Call) -> bool:
    """Whether the result of this INSERT has the primary key of its one row."""
    insert = call.statement
    if call.sets is not None or call.inserts_in_bulk or insert._multi_values or insert.select is not None:
        return False
    return not (insert._returning or insert._inline or upserts.changes_rows(insert) or upserts.skips_rows(insert))


def _dialect(session: Session, plan: Plan, call: Call) -> sa.Dialect:
    arguments = call.bind_arguments(plan)
    bind = arguments.pop("bind", None) or session.get_bind(**arguments)
    return bind.dialect


def _returns_updated(plan: Plan, dialect: sa.Dialect) -> bool:
    return dialect.update_returning and len(plan.mapper.tables) == 1


def _sets_a_key(plan: Plan, call: Call) -> bool:
    if call.names_rows_by_key:
        return False
    statement = call.statement
    # SQLAlchemy 2.0 keeps ordered values apart.
    values = {*dict(getattr(statement, "_ordered_values", None) or statement._values or {})}
    for given in call.sets or [call.params or {}]:
        values |= given.keys()  # columns that the statement itself does not name
    names = {column if isinstance(column, str) else column.key for column in values}
    return not names.isdisjoint({*plan.key, *(column.key for column in plan.mapper.primary_key)})


def _note_hidden(session: Session, statement: Any) -> None:
    """Look for an UPDATE or the like inside a CTE, where a look costs next to nothing: each SELECT comes here."""
    ctes = getattr(statement, "_independent_ctes", ())
    for column in getattr(statement, "_raw_columns", ()):
        if isinstance(table := getattr(column, "table", column), sa.CTE):
            ctes = (*ctes, table)
    for cte in dict.fromkeys(ctes):
        plan = _plan_of(cte.element)
        if plan is not None:
            _refuse_hidden(plan, cte.element, session)


def _refuse_hidden(plan: Plan, statement: Any, session: Session) -> None:
    cls = plan.mapper.class_
    if cls.__stream_bulk__ == "ignore" or is_suppressed(cls):
        return
    call = Call(session.execute, statement)
    why = "it is inside a CTE"
    if cls.__stream_bulk__ == "raise":
        raise BulkStatementError(_message(plan, call, why))
    _warn_uncaptured(plan, call, why)


_TOLD: Final = "_broadcastable_told"


def warn_of_secondaries(registries: Iterable[registry]) -> None:
    """Warn, once for each, of relationships that write to the table of a model with streams as their `secondary`."""
    for mapper in itertools.chain.from_iterable(_configured_mappers(each) for each in registries):
        for relationship in mapper.relationships:
            plan = None if relationship.viewonly else plan_of_table(relationship.secondary)
            if plan is None or _TOLD in relationship.info or plan.mapper.class_.__stream_bulk__ == "ignore":
                continue
            relationship.info[_TOLD] = True
            _warn(
                f"{relationship} writes to the table of {plan.name} past the unit of work, and no reader of the "
                f"streams of {plan.name} hears of it. Give it viewonly=True and add and delete {plan.name} records, or "
                f'set {plan.name}.__stream_bulk__ to "ignore"',
                UncapturedSecondary,
            )


def _configured_mappers(of: registry) -> list[Mapper[Any]]:
    try:
        return [mapper for mapper in of.mappers if mapper.configured]
    except UnmappedClassError:  # DeferredReflection, before its prepare(); there is another configuration after it
        return []


def _warn(message: str, category: type[Warning] = UncapturedBulkStatement) -> None:
    """Once for each call site, as the standard filters do; the site is the application's, not SQLAlchemy's or ours."""
    frame = _application_frame()
    if frame is None:
        warnings.warn(message, category, stacklevel=2)
        return
    warnings.warn_explicit(
        message,
        category,
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
