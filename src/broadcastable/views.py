"""How the application's functions see a row that no record shows: as it was before a flush, or in a bulk statement.

Many-to-one relationships are told from the foreign key and not from what the record has loaded: that is the parent as
of then, and for a record just made it is one at all. Nothing is read for it unless a function asks for more of the
parent than its key.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.hybrid import hybrid_method, hybrid_property
from sqlalchemy.orm import InspectionAttr, InstanceState, Mapper, Session, make_transient_to_detached
from sqlalchemy.orm.attributes import set_committed_value

from .names import GID, gid_from_identity, gid_name

if TYPE_CHECKING:
    from .declarations import ParentLink, Plan
    from .transactions import Delivery

DELIVERY_KEY: Final = "_broadcastable_delivery"
"""In `InstanceState.info` of an instance that is in no session: the delivery of the session that it stands in for."""


class Parents:
    """Finds parents by foreign key among what *session* holds; the others get a stand-in. Lives as long as one flush.

    Nothing is read here, and the records stay as they are.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._new: dict[Any, Any] | None = None
        self._stand_ins: dict[Any, Any] = {}

    def find(self, link: ParentLink, row: Mapping[str, Any]) -> Any:
        """The parent of *row*: a record, a `Parent`, or None.

        Raises:
            AttributeError: The foreign key is not known of this row.
        """
        unknown = [name for name in link.attributes if name not in row]
        if unknown:
            raise AttributeError(f"{link.name} is not known of this row, since {', '.join(unknown)} is not")
        identity = tuple(row[name] for name in link.attributes)
        if any(part is None for part in identity):
            return None
        key = link.mapper.identity_key_from_primary_key(identity)
        found = self.session.identity_map.get(key)
        if found is None:
            found = self._new_records().get(key)
        if found is None:
            found = self._stand_ins.get(key)
        if found is None:
            found = self._stand_ins[key] = Parent(self.session, link.mapper, identity)
        return found

    def _new_records(self) -> dict[Any, Any]:
        # What this flush inserts gets into the identity map only when it ends.
        if self._new is None:
            self._new = {}
            for record in self.session.new:
                mapper = sa.inspect(record).mapper
                self._new[mapper.identity_key_from_primary_key(identity_now(sa.inspect(record)))] = record
        return self._new

    def corrections(self, plan: Plan, row: Mapping[str, Any]) -> dict[str, Any]:
        """What *row*, a record's loaded attributes, should have for its parents, where it has nothing or another one.

        SQLAlchemy leaves a loaded parent as it is when the foreign key is set, and gives a pending record none.
        """
        found = {}
        for link in plan.parents.values():
            if any(name not in row for name in link.attributes):
                continue
            identity = tuple(row[name] for name in link.attributes)
            wanted = None if any(part is None for part in identity) else identity
            shown = row.get(link.name)
            if (None if shown is None else identity_now(sa.inspect(shown))) != wanted:
                found[link.name] = self.find(link, row)
        return found


def identity_now(state: InstanceState[Any]) -> tuple[Any, ...]:
    """The primary key of a record as of the flush, whose end only gives it that as its identity. Loads nothing."""
    names = [state.mapper.get_property_by_column(column).key for column in state.mapper.primary_key]
    known = state.key[1] if state.key is not None else (None,) * len(names)
    return tuple(state.dict.get(name, before) for name, before in zip(names, known, strict=True))


class Parent:
    """Stands in for a record that the session does not hold: its key is known, all else is read when asked for."""

    def __init__(self, session: Session, mapper: Mapper[Any], identity: tuple[Any, ...]) -> None:
        names = [mapper.get_property_by_column(column).key for column in mapper.primary_key]
        self.__dict__.update(zip(names, identity, strict=True))
        self.__dict__["_broadcastable_parent"] = session, mapper, identity

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] - nobody sets it
        return self.__dict__["_broadcastable_parent"][1].class_

    def __getattr__(self, name: str) -> Any:
        return getattr(_load(self), name)


def _load(parent: Parent) -> Any:
    session, mapper, identity = parent.__dict__["_broadcastable_parent"]
    record = parent.__dict__.get("_broadcastable_record")
    if record is None:
        with session.no_autoflush:
            record = session.get(mapper.class_, identity)
        if record is None:
            raise LookupError(f"There is no {mapper.class_.__name__} with the key {identity!r}")
        parent.__dict__["_broadcastable_record"] = record
    return record


class RecordView:
    """Shows the application's own functions a row as if it were a record: as it was before the flush, or in bulk.

    Methods and properties of the class run on this view, so that `when=lambda message: message.is_public()` works, and
    it has the parents that the row had. All else, such as collections, is that of *record*; in bulk, where there is
    none, an instance outside any session is filled from the row.
    """

    def __init__(self, plan: Plan, row: Mapping[str, Any], record: Any = None) -> None:
        self.__dict__.update(row)
        self.__dict__["_broadcastable_view"] = plan, row, record

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] - nobody sets it
        # Lets isinstance() and super() in the methods of the model have their way.
        return self.__dict__["_broadcastable_view"][0].mapper.class_

    def __getattr__(self, name: str) -> Any:
        plan, row, record = self.__dict__["_broadcastable_view"]
        if record is None:
            return getattr(_filled(self), name)
        mapper = plan.mapper
        if name in plan.parents:
            return self.__dict__["_broadcastable_parents"].find(plan.parents[name], row)
        if name in mapper.synonyms:
            return getattr(self, mapper.synonyms[name].name)
        if name in mapper.composites:
            composite = mapper.composites[name]
            return composite.composite_class(*(getattr(self, each.key) for each in composite.props))
        if name in plan.equal and name in sa.inspect(record).committed_state:
            raise AttributeError(f"{plan.name}.{name} is not known of this row")
        attribute = inspect.getattr_static(mapper.class_, name, None)
        is_mapped = isinstance(attribute, InspectionAttr) and not isinstance(attribute, hybrid_method | hybrid_property)
        binds = getattr(attribute, "__get__", None)
        if binds is not None and not is_mapped:
            return binds(self, mapper.class_)  # methods, properties
        return getattr(record, name)


def bind(record: Any, parents: Parents, delivery: Delivery) -> None:
    """Tell a `RecordView` where it is: what its parents are found among, and how its keys travel."""
    if type(record) is RecordView:
        record.__dict__["_broadcastable_parents"] = parents
        record.__dict__["_broadcastable_delivery"] = delivery


def _filled(view: RecordView) -> Any:
    instance = view.__dict__.get("_broadcastable_instance")
    if instance is not None:
        return instance
    plan, row, _ = view.__dict__["_broadcastable_view"]
    instance = view.__dict__["_broadcastable_instance"] = plan.mapper.class_manager.new_instance()
    state: InstanceState[Any] = sa.inspect(instance)
    for name, value in row.items():
        set_committed_value(instance, name, value)
    make_transient_to_detached(instance)  # so that what is not known raises, and is not None
    parents: Parents | None = view.__dict__.get("_broadcastable_parents")
    if parents is not None:
        for name, parent in parents.corrections(plan, state.dict).items():
            state.dict[name] = parent
            state.expired_attributes.discard(name)
        state.info[DELIVERY_KEY] = view.__dict__["_broadcastable_delivery"]
    return instance


def gid_of_stand_in(streamable: Any, app: str) -> GID | None:
    """The gid of what a `Parent` or a `RecordView` stands for; None for anything else.

    A parent's class may be a subclass with a name of its own: only then it is read.
    """
    if type(streamable) is Parent:
        _, mapper, identity = streamable.__dict__["_broadcastable_parent"]
        if len({gid_name(each.class_) for each in mapper.self_and_descendants}) > 1:
            mapper = sa.inspect(_load(streamable)).mapper
        return gid_from_identity(mapper, identity, app=app)
    if type(streamable) is RecordView:
        plan, row, _ = streamable.__dict__["_broadcastable_view"]
        return gid_from_identity(plan.mapper, [row[name] for name in plan.key], app=app)
    return None
