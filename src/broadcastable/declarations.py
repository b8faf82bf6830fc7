"""What a model says of its streams, and what becomes of it once the mappers are configured.

`streams()` and `streams_to()` only note what was asked for. `plan_for` turns the notes of one class into routes: where
a row's changes go, computed from the row alone wherever that is possible, and what they say. A declaration that does
not fit its model raises `DeclarationError` then, and again wherever a row of that model is written.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from operator import itemgetter, methodcaller
from typing import Any, Final, TypeAlias

import msgspec
import sqlalchemy as sa
from sqlalchemy.orm import InstanceState, Mapper, RelationshipDirection, RelationshipProperty
from sqlalchemy.orm.exc import UnmappedColumnError
from sqlalchemy.sql import operators

from .errors import DeclarationError, InvalidStreamName
from .events import Operation, encode_json
from .names import GID, Streamable, gid_name, key_part, stream_name_from
from .values import (
    EventEncoder,
    Row,
    RowAttribute,
    compile_event_encoder,
    key_value,
    row_attributes,
    row_reader,
    row_value,
)
from .views import gid_of_stand_in, identity_now

Predicate: TypeAlias = Callable[[Any], bool]
ValueSource: TypeAlias = Callable[[Any], Any] | type

ALL_OPERATIONS: Final = (Operation.INSERT, Operation.UPDATE, Operation.DELETE)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class StreamDeclaration:
    """One entry of `__streams__`, as made by `streams()` or `streams_to()`."""

    target: tuple[Any, ...] | None
    on: frozenset[str]
    type: str | None
    key: str | Callable[[Any], object] | None
    value: ValueSource | None
    when: Predicate | None
    old_value: bool


def streams(
    *,
    on: Iterable[str] = ALL_OPERATIONS,
    type: str | None = None,
    key: str | Callable[[Any], object] | None = None,
    value: ValueSource | None = None,
    when: Predicate | None = None,
    old_value: bool = False,
) -> StreamDeclaration:
    """Send a record's changes to its own stream, `gid://app/Room/1`. For the keywords see `streams_to`."""
    return _declaration(None, on, type, key, value, when, old_value)


def streams_to(
    *target: Streamable | Callable[[Any], Streamable],
    on: Iterable[str] = ALL_OPERATIONS,
    type: str | None = None,
    key: str | Callable[[Any], object] | None = None,
    value: ValueSource | None = None,
    when: Predicate | None = None,
    old_value: bool = False,
) -> StreamDeclaration:
    """Send a record's changes to the stream *target*: `streams_to("room", "messages")`.

    Args:
        target: First the name of a many-to-one relationship (`"room"`), a path of those (`"room.account"`), a plain
            name, or a function from the record to streamables; then plain names. A relationship is followed by its
            foreign key, without a query; a path costs at most one query for each class on it in a transaction. Where
            the relationship is None there is no stream, and so no event.
        on: The operations that are sent, as they stand at the commit: an insert and an update in one transaction are
            one insert.
        type: The events' type; `__stream_type__`, else the class name in snake_case.
        key: The events' key: an attribute's name or a function from the record; the primary key when None. Where it
            gives None or an empty text there is no event, but an error in the log.
        value: What the events say, a JSON object: a function from the record, or a Pydantic model, msgspec Struct or
            dataclass class, filled from the attributes that are loaded. `to_stream_value()`, the whole row, when None.
        when: The row is on the stream while this is true of the record: an update that makes it false is a delete
            there, and one that makes it true an insert.
        old_value: Whether updates and deletes also carry the row as it was before the transaction.

    Raises:
        DeclarationError: An empty target or an unknown operation; the rest when the mappers are configured.
    """
    if not target:
        raise DeclarationError("streams_to() needs a target. For the record's own stream say streams()")
    return _declaration(target, on, type, key, value, when, old_value)


def _declaration(
    target: tuple[Any, ...] | None,
    on: Iterable[str],
    type_: str | None,
    key: str | Callable[[Any], object] | None,
    value: ValueSource | None,
    when: Predicate | None,
    old_value: bool,
) -> StreamDeclaration:
    wanted = frozenset([on] if isinstance(on, str) else on)
    unknown = sorted(wanted - set(ALL_OPERATIONS))
    if unknown or not wanted:
        raise DeclarationError(f'on= takes some of "insert", "update", "delete"; got {", ".join(unknown) or "none"}')
    return StreamDeclaration(target=target, on=wanted, type=type_, key=key, value=value, when=when, old_value=old_value)


# Targets


@dataclasses.dataclass(frozen=True, eq=False)
class RowTarget:
    """A stream whose name follows from columns of the row: its own stream, a parent's, or always the same one.

    Attributes:
        attributes: The columns, in the order of the target's primary key.
        mapper: Whose gid the name begins with; None for a plain name.
        suffix: The rest of the name.
    """

    attributes: tuple[str, ...]
    mapper: Mapper[Any] | None
    suffix: tuple[Any, ...]

    def name(self, values: Sequence[Any], app: str) -> str | None:
        """The stream's name for these columns' values; None when there is no such stream.

        Raises:
            InvalidStreamName: The values make no name.
        """
        return _name_below(self.mapper, values, self.suffix, app)


@dataclasses.dataclass(frozen=True, eq=False)
class Hop:
    """One step of a path: from the primary key of *mapper*, whose attributes are *key*, to the values of others."""

    mapper: Mapper[Any]
    key: tuple[str, ...]
    attributes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class PathTarget:
    """A stream several relationships away, or whose class is only known from the parent's row."""

    attributes: tuple[str, ...]
    hops: tuple[Hop, ...]
    mapper: Mapper[Any]
    polymorphic: bool
    suffix: tuple[Any, ...]

    def name(self, values: tuple[Any, ...], app: str) -> str | None:
        """As in `RowTarget`; with *polymorphic* the last of *values* is the discriminator."""
        mapper = self.mapper
        if self.polymorphic:
            values, discriminator = values[:-1], values[-1]
            mapper = self.mapper.polymorphic_map.get(discriminator, self.mapper)
        return _name_below(mapper, values, self.suffix, app)


@dataclasses.dataclass(frozen=True, eq=False)
class RecordTarget:
    """A stream that a function names."""

    function: Callable[[Any], Streamable]
    suffix: tuple[Any, ...]

    def name(self, record: Any, app: str) -> str | None:
        """The stream's name for *record*; None when the function gives nothing."""
        streamables = self.function(record)
        first = stream_name_from(_known(streamables, app), app=app)
        return stream_name_from(first, *self.suffix, app=app) if first else None


Target: TypeAlias = RowTarget | PathTarget | RecordTarget


def _name_below(mapper: Mapper[Any] | None, values: Sequence[Any], suffix: tuple[Any, ...], app: str) -> str | None:
    if mapper is None:
        return stream_name_from(*suffix, app=app) or None
    if any(value is None for value in values):
        return None
    gid = GID(app, gid_name(mapper.class_), tuple(key_part(value) for value in values))
    return stream_name_from(gid, *suffix, app=app)


def _known(streamable: Any, app: str) -> Any:
    """*streamable* with a gid in place of each record: inside the flush a record has a new key, but no identity yet."""
    if isinstance(streamable, list | tuple | Iterator):
        return [_known(each, app) for each in streamable]
    stands_for = gid_of_stand_in(streamable, app)
    if stands_for is not None:
        return stands_for
    state = sa.inspect(streamable, raiseerr=False)
    if isinstance(state, InstanceState):
        identity = identity_now(state)
        if not any(part is None for part in identity):
            return GID(app, gid_name(state.mapper.class_), tuple(key_part(part) for part in identity))
    return streamable


def _target_of(declaration: StreamDeclaration, mapper: Mapper[Any]) -> Target:
    if declaration.target is None:
        return RowTarget(_key_names(mapper), mapper, ())
    first, *rest = declaration.target
    suffix = tuple(rest)
    if callable(first):
        _check_suffix(suffix, mapper)
        return RecordTarget(first, suffix)
    if isinstance(first, str):
        names = first.split(".")
        if names[0] in mapper.relationships:
            _check_suffix(suffix, mapper)
            return _path_target(names, suffix, mapper)
        _refuse_near_miss(first, names, mapper)
    _check_suffix((first, *suffix), mapper)
    return RowTarget((), None, (first, *suffix))


def _check_suffix(suffix: tuple[Any, ...], mapper: Mapper[Any]) -> None:
    try:
        stream_name_from(*suffix, app="app")
    except InvalidStreamName as error:
        raise DeclarationError(f"{mapper.class_.__name__}.__streams__: {error}") from error


def _refuse_near_miss(first: str, names: list[str], mapper: Mapper[Any]) -> None:
    """A plain name that looks like a slip of the keyboard is one."""
    cls = mapper.class_.__name__
    meant = f"If the plain name {first!r} is meant, put it in a tuple: streams_to(({first!r},), ...)"
    if names[0] in mapper.all_orm_descriptors:
        raise DeclarationError(
            f"{cls}.__streams__: {names[0]!r} is an attribute of {cls}, but not a relationship. Name a many-to-one "
            f"relationship or give a function. {meant}"
        )
    import difflib  # for this message alone

    near = difflib.get_close_matches(names[0], mapper.relationships.keys(), n=1, cutoff=0.75)
    if near or len(names) > 1:
        known = ", ".join(sorted(mapper.relationships.keys())) or "none"
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DeclarationError(f"{cls} has no relationship {names[0]!r}: {hint}it has {known}. {meant}")


def _path_target(names: list[str], suffix: tuple[Any, ...], mapper: Mapper[Any]) -> RowTarget | PathTarget:
    start, at = _follow(mapper, names[0])
    hops = []
    for name in names[1:]:
        attributes, parent = _follow(at, name)
        hops.append(Hop(at, _key_names(at), attributes))
        at = parent
    polymorphic = len({gid_name(each.class_) for each in at.self_and_descendants}) > 1
    if polymorphic:
        if at.polymorphic_on is None:
            raise DeclarationError(
                f"{mapper.class_.__name__}.__streams__: {'.'.join(names)} leads to {at.class_.__name__}, whose "
                "subclasses have gids of their own and no discriminator. Give them the same __gid_name__, or a function"
            )
        discriminator = at.get_property_by_column(at.polymorphic_on).key
        hops.append(Hop(at, _key_names(at), (*_key_names(at), discriminator)))
    if hops:
        return PathTarget(start, tuple(hops), at, polymorphic, suffix)
    return RowTarget(start, at, suffix)


def _follow(mapper: Mapper[Any], name: str) -> tuple[tuple[str, ...], Mapper[Any]]:
    """Where the relationship *name* leads: the attributes that hold the key of the other side, and its mapper."""
    cls = mapper.class_.__name__
    relationship: RelationshipProperty[Any] | None = mapper.relationships.get(name)
    if relationship is None:
        known = ", ".join(sorted(mapper.relationships.keys())) or "none"
        raise DeclarationError(f"{cls} has no relationship {name!r}; it has {known}")
    parent = relationship.mapper
    attributes = _foreign_key(mapper, relationship)
    if attributes is None:
        raise DeclarationError(
            f"{cls}.{name} does not lead from a foreign key of {cls} alone to the primary key of "
            f"{parent.class_.__name__}, so the stream does not follow from the row. Give a function: "
            "streams_to(lambda record: ..., ...)"
        )
    return attributes, parent


def _foreign_key(mapper: Mapper[Any], relationship: RelationshipProperty[Any]) -> tuple[str, ...] | None:
    """The attributes of *mapper* that hold the primary key of the other side; None where that is not how it is told."""
    if relationship.direction is not RelationshipDirection.MANYTOONE:
        return None
    parent = relationship.mapper
    by_key: dict[str, str] = {}
    try:
        for local, remote in relationship.local_remote_pairs or ():
            by_key[parent.get_property_by_column(remote).key] = mapper.get_property_by_column(local).key
    except UnmappedColumnError:
        return None
    wanted = _key_names(parent)
    conditions = list(_conditions(relationship.primaryjoin))
    # With more criteria the other side may be None although the foreign key is not.
    if set(by_key) != set(wanted) or len(conditions) != len(wanted) or not all(map(_equates_columns, conditions)):
        return None
    return tuple(by_key[key] for key in wanted)


def _conditions(join: sa.ColumnElement[bool]) -> Iterator[Any]:
    if isinstance(join, sa.BooleanClauseList) and join.operator is operators.and_:
        for each in join.clauses:
            yield from _conditions(each)
    else:
        yield join


def _equates_columns(condition: Any) -> bool:
    return (
        isinstance(condition, sa.BinaryExpression)
        and condition.operator is operators.eq
        and isinstance(condition.left, sa.ColumnClause)
        and isinstance(condition.right, sa.ColumnClause)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class ParentLink:
    """A many-to-one relationship *name*: where the *attributes* lead, which hold the primary key of *mapper*."""

    name: str
    attributes: tuple[str, ...]
    mapper: Mapper[Any]


def _parents(mapper: Mapper[Any]) -> dict[str, ParentLink]:
    """The relationships whose other side follows from the foreign key alone."""
    found = {}
    for relationship in mapper.relationships:
        attributes = _foreign_key(mapper, relationship)
        if attributes is not None and not relationship.uselist:
            found[relationship.key] = ParentLink(relationship.key, attributes, relationship.mapper)
    return found


def _key_names(mapper: Mapper[Any]) -> tuple[str, ...]:
    return tuple(mapper.get_property_by_column(column).key for column in mapper.primary_key)


# Routes

_NAMES_REMEMBERED: Final = 4096
"""For each route; a name of 100 bytes makes that less than a megabyte."""


class Route:
    """One declaration of one class, ready for use.

    Attributes:
        target: Where to.
        type: The events' type.
        on: The wanted operations; None for all.
        direct: Everything follows from the row's columns: nothing of the application's is called.
        whole_row: The value is the row as `values` reads it.
        attributes: The columns that are needed to say where and what.
        placing: The columns whose change moves the row: to another stream, or to another key.
        target_of: From a row to the values of the target's columns: one value where there is one column, else a tuple.
        target_of_new: The same for a row just inserted, where what is absent is null.
    """

    def __init__(self, declaration: StreamDeclaration, plan: Plan) -> None:
        self.declaration = declaration
        self.plan = plan
        self.target = _target_of(declaration, plan.mapper)
        self.type = declaration.type or stream_type(plan.mapper.class_)
        if not self.type:
            raise DeclarationError(f"{plan.name}: the type of its events is text that is not empty")
        self.on: Collection[str] | None = None if declaration.on == set(ALL_OPERATIONS) else declaration.on
        self.when = declaration.when
        self.old_value = declaration.old_value
        self.key_of = self._key_source()
        self.whole_row = declaration.value is None and not plan.overrides_value
        self.value_of = None if self.whole_row else _value_source(declaration.value, plan)
        self.direct = (
            not isinstance(self.target, RecordTarget) and self.whole_row and self.key_of is None and self.when is None
        )
        self.target_attributes = () if isinstance(self.target, RecordTarget) else self.target.attributes
        self.attributes = frozenset((*self.target_attributes, *plan.key, *(each.name for each in plan.attributes)))
        self.placing = frozenset((*self.target_attributes, *plan.key))
        self.target_of = _getter(self.target_attributes)
        self.target_of_new = _lenient_getter(self.target_attributes)
        self._encoders: dict[tuple[bool, bool], EventEncoder] = {}
        self._names: dict[tuple[str, tuple[Any, ...]], str | None] = {}

    def stream_name(self, values: tuple[Any, ...], app: str) -> str | None:
        """`target.name`, remembered: most transactions write to a stream that an earlier one has written to."""
        assert not isinstance(self.target, RecordTarget)
        try:
            return self._names[app, values]
        except KeyError:
            if len(self._names) >= _NAMES_REMEMBERED:
                self._names.clear()
            name = self._names[app, values] = self.target.name(values, app)
            return name

    def __str__(self) -> str:
        target = self.declaration.target
        return f"{self.plan.name}'s own stream" if target is None else f"streams_to{target!r}"

    def _key_source(self) -> Callable[[Any], object] | None:
        key = self.declaration.key
        if key is None or callable(key):
            return key
        if key not in self.plan.mapper.column_attrs:
            raise DeclarationError(f"{self.plan.name}.__streams__: key={key!r} is no column of it")
        name = key
        return lambda record: getattr(record, name)

    def encoder(self, *, keys_as_strings: bool, absent_is_null: bool) -> EventEncoder:
        """The compiled encoder of the whole row."""
        found = self._encoders.get((keys_as_strings, absent_is_null))
        if found is None:
            found = self._encoders[keys_as_strings, absent_is_null] = compile_event_encoder(
                self.type,
                self.plan.attributes,
                self.plan.key,
                keys_as_strings=keys_as_strings,
                absent_is_null=absent_is_null,
            )
        return found

    def encode(self, key: str, value: Any) -> bytes:
        """An event's beginning, closed by a brace, with a value that is JSON-ready."""
        return encode_json({"type": self.type, "key": key, "value": value})


def _getter(names: Sequence[str]) -> Callable[[Row], Any]:
    return itemgetter(*names) if names else lambda row: ()


def _lenient_getter(names: Sequence[str]) -> Callable[[Row], Any]:
    if len(names) == 1:
        return methodcaller("get", names[0])
    return lambda row: tuple(row.get(name) for name in names)


ValueOf: TypeAlias = Callable[[Any, Row, bool], Any]
"""From a record, its loaded attributes and `keys_as_strings` to a JSON-ready value."""


def _value_source(source: ValueSource | None, plan: Plan) -> ValueOf:
    if source is None:
        return lambda record, row, keys_as_strings: row_value(record.to_stream_value())
    if not isinstance(source, type):
        return lambda record, row, keys_as_strings: row_value(source(record))
    keys = {each.name for each in plan.attributes if each.is_key}
    fill = _filler(source, plan)

    def value(record: Any, row: Row, keys_as_strings: bool) -> Any:
        made = row_value(fill(row))
        if keys_as_strings:
            made.update({name: key_value(row[name]) for name in keys & made.keys() & row.keys()})
        return made

    return value


def _filler(cls: type, plan: Plan) -> Callable[[Row], Any]:
    if hasattr(cls, "model_validate"):
        return lambda row: cls.model_validate(dict(row))
    if issubclass(cls, msgspec.Struct):
        return functools.partial(_fill, cls, cls.__struct_fields__)
    if dataclasses.is_dataclass(cls):
        return functools.partial(_fill, cls, tuple(field.name for field in dataclasses.fields(cls) if field.init))
    raise DeclarationError(
        f"{plan.name}.__streams__: value={cls.__name__} is no Pydantic model, msgspec Struct or dataclass. "
        "Give one of those, or a function from the record"
    )


def _fill(cls: type, fields: tuple[str, ...], row: Row) -> Any:
    return cls(**{name: row[name] for name in fields if name in row})


class Plan:
    """Everything that capture knows of one mapped class; made once, when the mappers are configured."""

    def __init__(self, mapper: Mapper[Any], declarations: Sequence[StreamDeclaration]) -> None:
        self.mapper = mapper
        self.name = mapper.class_.__name__
        self.key = _key_names(mapper)
        self.attributes: tuple[RowAttribute, ...] = row_attributes(mapper)
        self.overrides_value = overrides_stream_value(mapper.class_)
        # As the unit of work compares, attribute by attribute.
        self.equal: dict[str, Callable[[Any, Any], bool]] = {
            attribute.key: attribute.columns[0].type.compare_values
            for attribute in mapper.column_attrs
            if isinstance(attribute.columns[0], sa.Column)
        }
        self.routes = tuple(Route(declaration, self) for declaration in declarations)
        # Columns whose values before the flush are needed.
        self.watched = frozenset(name for route in self.routes for name in route.target_attributes)
        # Functions of the application may look at any column.
        self.indirect = any(not route.direct for route in self.routes)
        self.wants_old_values = any(route.old_value for route in self.routes)
        # What functions look at is needed as it was before; the database gives these new values by itself.
        self.computed = frozenset(_computed(mapper)) if self.indirect or self.wants_old_values else frozenset()
        self.parents = _parents(mapper) if self.indirect else {}
        self.hops = tuple(
            hop for route in self.routes if isinstance(route.target, PathTarget) for hop in route.target.hops
        )
        self._readers: dict[bool, Callable[[Row], dict[str, Any]]] = {}

    @functools.cached_property
    def set_later(self) -> frozenset[str]:
        """Relationships whose foreign keys the unit of work sets after its hooks (`post_update`); mostly none."""
        return frozenset(each.key for each in self.mapper.relationships if each.post_update)

    def reader(self, *, keys_as_strings: bool) -> Callable[[Row], dict[str, Any]]:
        """From a row to its JSON value; see `values.row_reader`."""
        found = self._readers.get(keys_as_strings)
        if found is None:
            found = self._readers[keys_as_strings] = row_reader(self.attributes, keys_as_strings=keys_as_strings)
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """The attributes that every event of the class is made from."""
        return tuple(dict.fromkeys((*self.key, *self.watched, *(each.name for each in self.attributes))))


def _computed(mapper: Mapper[Any]) -> Iterator[str]:
    for attribute in mapper.column_attrs:
        for column in attribute.columns:
            if isinstance(column, sa.Column) and (
                column.onupdate is not None
                or column.server_onupdate is not None
                or column.computed is not None
                or column is mapper.version_id_col
            ):
                yield attribute.key


PLAN_ATTRIBUTE: Final = "__stream_plan__"
"""Of each mapped `Broadcastable` class itself: its plan, None when it declares no streams, or `_UNPLANNED`."""

_UNPLANNED: Final = object()

_TABLE_INFO_KEY: Final = "_broadcastable_mappers"


def expect_plan(mapper: Mapper[Any]) -> None:
    """Take note of a class that was just mapped: until its mapper is configured nobody can say what it declares."""
    type.__setattr__(mapper.class_, PLAN_ATTRIBUTE, _UNPLANNED)
    inherited = mapper.inherits is not None and mapper.inherits.local_table is mapper.local_table
    if isinstance(mapper.local_table, sa.Table) and not inherited:
        info = mapper.local_table.info  # a copy of the table takes it along, so what is in there does not change
        others = (each for each in info.get(_TABLE_INFO_KEY, ()) if each is not mapper and _is_in_use(each))
        info[_TABLE_INFO_KEY] = (mapper, *others)


def plan_for(mapper: Mapper[Any]) -> Plan | None:
    """The plan of a mapped class, None when it declares no streams; made at the first call.

    Raises:
        DeclarationError: A declaration does not fit; again at each call.
    """
    cls = mapper.class_
    if cls.__dict__.get(PLAN_ATTRIBUTE, _UNPLANNED) is _UNPLANNED:
        mapper.registry.configure(cascade=True)  # as a rule this makes the plan
        if cls.__dict__.get(PLAN_ATTRIBUTE, _UNPLANNED) is _UNPLANNED:
            declared = declarations_of(cls)
            type.__setattr__(cls, PLAN_ATTRIBUTE, Plan(mapper, declared) if declared else None)
    found: Plan | None = cls.__dict__[PLAN_ATTRIBUTE]
    return found


def plan_of_class(mapper: Mapper[Any]) -> Plan | None:
    """As `plan_for`, for any class there is: one that is not `Broadcastable` costs one look."""
    plan: Plan | None = mapper.class_.__dict__.get(PLAN_ATTRIBUTE)
    return plan_for(mapper) if plan is _UNPLANNED else plan


def plan_of_table(table: Any) -> Plan | None:
    """The plan of the class that is mapped to *table*, for statements on the table itself."""
    if not isinstance(table, sa.Table):
        return None
    for mapper in table.info.get(_TABLE_INFO_KEY, ()):
        if mapper.local_table is table and _is_in_use(mapper) and (plan := plan_for(mapper)) is not None:
            return plan
    return None


def _is_in_use(mapper: Mapper[Any]) -> bool:
    """Whether its class is still mapped by it: not after `registry.dispose()` or `clear_mappers()`."""
    return sa.inspect(mapper.class_, raiseerr=False) is mapper


def declarations_of(cls: type) -> tuple[StreamDeclaration, ...]:
    """`__streams__` as a tuple.

    Raises:
        DeclarationError: It holds something else than `streams()` and `streams_to()` make.
    """
    declared = getattr(cls, "__streams__", ())
    found = (declared,) if isinstance(declared, StreamDeclaration) else tuple(declared)
    for each in found:
        if not isinstance(each, StreamDeclaration):
            raise DeclarationError(
                f"{cls.__name__}.__streams__ is streams(...), streams_to(...), or a list of those; got {each!r}"
            )
    return found


def stream_type(cls: type) -> str:
    """`__stream_type__`, else the class name in snake_case: ChatRoom is chat_room, HTTPLog is http_log."""
    chosen = getattr(cls, "__stream_type__", None)
    return chosen if chosen is not None else snake_case(cls.__name__)


_WORD_START = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def snake_case(name: str) -> str:
    return _WORD_START.sub("_", name).lower()


def overrides_stream_value(cls: type) -> bool:
    """Whether the application wrote a `to_stream_value` of its own."""
    from .mixin import Broadcastable  # the mixin stands on the declarations

    return getattr(cls, "to_stream_value", None) is not Broadcastable.to_stream_value


__all__ = [
    "Hop",
    "PathTarget",
    "Plan",
    "RecordTarget",
    "Route",
    "RowTarget",
    "StreamDeclaration",
    "plan_for",
    "streams",
    "streams_to",
]
