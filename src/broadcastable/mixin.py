"""`Broadcastable`: what a model gets for saying which streams its rows belong to."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import InstanceState, Mapper
from sqlalchemy.orm.exc import UnmappedClassError

from . import bulk, capture
from .declarations import StreamDeclaration, expect_plan, plan_for, stream_type
from .errors import UnknownModelError, UsageError
from .events import Operation
from .names import GID, Streamable, gid_name, gid_of, stream_name_from
from .suppression import is_suppressed, suppressing_streams
from .transactions import may_do_io
from .values import key_text, row_attributes, row_reader, row_value
from .views import DELIVERY_KEY

if TYPE_CHECKING:
    from .durable_streams import DurableStreams

BulkPolicy = Literal["warn", "raise", "ignore", "capture"]


class Broadcastable:
    """A model whose committed changes go to the streams that it declares.

    Put it beside the declarative base: `class Room(Base, Broadcastable)`.

    The verbs `stream_insert`, `stream_update`, `stream_upsert` and `stream_delete` send an event about this record as
    it is now, whether or not it changed. Each has four forms: to the record's own stream or, with `_to`, to the stream
    of the given streamables; at once in one request or, with `_later`, through the outbox. A `_later` form inside a
    transaction waits for its commit and dies with its rollback; in asyncio code use only those. All return the txid,
    or None when streams are suppressed or the streamables are all blank.

    They raise `UnsavedRecordError` for a record that was never flushed, and `UsageError` for an expired or detached one
    whose columns cannot be loaded here.
    """

    __streams__: ClassVar[StreamDeclaration | Iterable[StreamDeclaration]] = ()
    """What is sent where: `streams(...)`, `streams_to(...)`, or a list of those."""

    __stream_type__: ClassVar[str | None] = None
    """The `type` of the events; the class name in snake_case when None. Subclasses inherit it."""

    __stream_bulk__: ClassVar[BulkPolicy] = "warn"
    """What becomes of statements that change rows past the unit of work: "warn", "raise", "ignore" or "capture"."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _classes.add(cls)
        install()
        mapper = _mapper_of(cls)
        if mapper is not None:  # a declarative base has mapped it by now, perhaps before there was a listener
            expect_plan(mapper)

    @classmethod
    def suppressing_streams(cls) -> AbstractContextManager[None]:
        """Broadcast nothing for this model and its subclasses in this block; see `suppressing_streams`."""
        return suppressing_streams(cls)

    def to_gid(self) -> GID:
        """The record's identity, also after its deletion.

        Raises:
            UnsavedRecordError: It was never flushed.
        """
        return gid_of(self, app=_durable_streams(self).settings.gid_app)

    def to_stream_value(self) -> Any:
        """What events say of this record: all its columns but deferred ones and those marked `info={"stream": False}`.

        Override it to say something else; it is called inside the flush, so look only at what is loaded.
        """
        mapper: Mapper[Any] = sa.inspect(type(self))
        attributes = row_attributes(mapper)
        row = {each.name: _loaded(self, each.name) for each in attributes}
        return row_reader(attributes, keys_as_strings=_durable_streams(self).settings.keys_as_strings)(row)

    # This record's change

    def stream_insert(self) -> str | None:
        """Send this record as new, to its own stream, at once."""
        return _send(self, Operation.INSERT, (self,), later=False)

    def stream_insert_to(self, *streamables: Streamable) -> str | None:
        """Send this record as new, to the stream *streamables*, at once."""
        return _send(self, Operation.INSERT, streamables, later=False)

    def stream_insert_later(self) -> str | None:
        """Send this record as new, to its own stream, with the commit."""
        return _send(self, Operation.INSERT, (self,), later=True)

    def stream_insert_later_to(self, *streamables: Streamable) -> str | None:
        """Send this record as new, to the stream *streamables*, with the commit."""
        return _send(self, Operation.INSERT, streamables, later=True)

    def stream_update(self) -> str | None:
        """Send this record as changed, to its own stream, at once."""
        return _send(self, Operation.UPDATE, (self,), later=False)

    def stream_update_to(self, *streamables: Streamable) -> str | None:
        """Send this record as changed, to the stream *streamables*, at once."""
        return _send(self, Operation.UPDATE, streamables, later=False)

    def stream_update_later(self) -> str | None:
        """Send this record as changed, to its own stream, with the commit."""
        return _send(self, Operation.UPDATE, (self,), later=True)

    def stream_update_later_to(self, *streamables: Streamable) -> str | None:
        """Send this record as changed, to the stream *streamables*, with the commit."""
        return _send(self, Operation.UPDATE, streamables, later=True)

    def stream_upsert(self) -> str | None:
        """Send this record as new or changed, to its own stream, at once."""
        return _send(self, Operation.UPSERT, (self,), later=False)

    def stream_upsert_to(self, *streamables: Streamable) -> str | None:
        """Send this record as new or changed, to the stream *streamables*, at once."""
        return _send(self, Operation.UPSERT, streamables, later=False)

    def stream_upsert_later(self) -> str | None:
        """Send this record as new or changed, to its own stream, with the commit."""
        return _send(self, Operation.UPSERT, (self,), later=True)

    def stream_upsert_later_to(self, *streamables: Streamable) -> str | None:
        """Send this record as new or changed, to the stream *streamables*, with the commit."""
        return _send(self, Operation.UPSERT, streamables, later=True)

    def stream_delete(self) -> str | None:
        """Send that this record is gone, to its own stream, at once."""
        return _send(self, Operation.DELETE, (self,), later=False)

    def stream_delete_to(self, *streamables: Streamable) -> str | None:
        """Send that this record is gone, to the stream *streamables*, at once."""
        return _send(self, Operation.DELETE, streamables, later=False)

    def stream_delete_later(self) -> str | None:
        """Send that this record is gone, to its own stream, with the commit."""
        return _send(self, Operation.DELETE, (self,), later=True)

    def stream_delete_later_to(self, *streamables: Streamable) -> str | None:
        """Send that this record is gone, to the stream *streamables*, with the commit."""
        return _send(self, Operation.DELETE, streamables, later=True)

    # Any event

    def broadcast_event_to(
        self, *names: Streamable, type: str, key: object, value: Any = None, operation: str, old_value: Any = None
    ) -> str | None:
        """Send any change event to the stream of this record and *names* below it, at once; the txid."""
        if is_suppressed(self.__class__):
            return None
        return _durable_streams(self).broadcast_event_to(
            self, *names, type=type, key=key, value=value, operation=operation, old_value=old_value
        )

    def broadcast_event_later_to(
        self, *names: Streamable, type: str, key: object, value: Any = None, operation: str, old_value: Any = None
    ) -> str | None:
        """Send any change event to the stream of this record and *names* below it, with the commit; the txid.

        `room.broadcast_event_later_to("messages", ...)` goes to `gid://app/Room/1/messages`.
        """
        if is_suppressed(self.__class__):
            return None
        return _durable_streams(self).broadcast_event_later_to(
            self, *names, type=type, key=key, value=value, operation=operation, old_value=old_value
        )

    def broadcast_to(self, /, *names: Streamable, **payload: Any) -> bool | None:
        """Send the JSON object *payload* to the stream of this record and *names* below it, at once."""
        if is_suppressed(self.__class__):
            return None
        return _durable_streams(self).broadcast_to(self, *names, **payload)

    def broadcast_later_to(self, /, *names: Streamable, session: Any = None, **payload: Any) -> bool | None:
        """Send the JSON object *payload* to the stream of this record and *names* below it, with the commit.

        That of its own session, or of *session*.
        """
        if is_suppressed(self.__class__):
            return None
        return _durable_streams(self).broadcast_later_to(self, *names, session=session, **payload)


def _durable_streams(record: Any) -> DurableStreams:
    from .durable_streams import current, durable_streams_for  # the verbs are called long after all modules are there

    state: InstanceState[Any] = sa.inspect(record)
    if DELIVERY_KEY in state.info:  # a bulk statement's row that has taken the shape of a record
        found: DurableStreams = state.info[DELIVERY_KEY]
        return found
    return current() if state.session is None else durable_streams_for(state.session)


def _send(
    record: Broadcastable, operation: Operation, streamables: tuple[Streamable, ...], *, later: bool
) -> str | None:
    cls = type(record)
    if is_suppressed(cls):
        return None
    durable_streams = _durable_streams(record)
    name = stream_name_from(*streamables, app=durable_streams.settings.gid_app)
    if not name:
        return None
    state: InstanceState[Any] = sa.inspect(record)
    gid_of(record)  # raises for a record without an identity
    assert state.identity is not None
    verb: Callable[..., str | None] = durable_streams.broadcast_event_to
    if later:
        verb = functools.partial(durable_streams.broadcast_event_later_to, session=state.session)
    return verb(
        name,
        type=stream_type(cls),
        key=key_text(state.identity),
        value=None if operation is Operation.DELETE else row_value(record.to_stream_value()),
        operation=operation.value,
    )


def _loaded(record: Any, name: str) -> Any:
    state: InstanceState[Any] = sa.inspect(record)
    if name in state.expired_attributes and not (state.session is not None and may_do_io(state.session, state.mapper)):
        raise UsageError(
            f"{type(record).__name__}.{name} is not loaded and cannot be loaded here. Call the verb before the commit, "
            "refresh the record first (await session.refresh(record)), or use expire_on_commit=False"
        )
    return getattr(record, name)


# The models there are

_classes: weakref.WeakSet[type[Broadcastable]] = weakref.WeakSet()


def _mapper_of(cls: type) -> Mapper[Any] | None:
    try:
        mapper: Any = sa.inspect(cls, raiseerr=False)
    except UnmappedClassError:  # DeferredReflection, before its prepare()
        return None
    return mapper if isinstance(mapper, Mapper) else None


def _mappers() -> list[Mapper[Any]]:
    return [mapper for cls in list(_classes) if (mapper := _mapper_of(cls)) is not None]


def broadcastable_model(name: str) -> type[Broadcastable]:
    """The mapped class that a gid calls *name*.

    Raises:
        UnknownModelError: There is none, or more than one.
    """
    found = [mapper.class_ for mapper in _mappers() if gid_name(mapper.class_) == name]
    if not found:
        raise UnknownModelError(f"No Broadcastable model is called {name!r} in a gid. Is its module imported?")
    if len(found) > 1:
        names = ", ".join(sorted(f"{cls.__module__}.{cls.__qualname__}" for cls in found))
        raise UnknownModelError(f"Several models are called {name!r} in a gid: {names}. Give them a __gid_name__ each")
    return found[0]


def _after_mapped(mapper: Mapper[Any], cls: type) -> None:
    expect_plan(mapper)


def _after_configured() -> None:
    """Make all plans that can be made: a class with a mistake must not cost others their events.

    Raises:
        DeclarationError: A declaration does not fit.
    """
    mappers = [mapper for mapper in _mappers() if mapper.configured]  # another registry's turn comes
    mistake: Exception | None = None
    for mapper in mappers:
        try:
            plan_for(mapper)
        except Exception as error:
            mistake = mistake or error
    if mistake is not None:
        raise mistake
    bulk.warn_of_secondaries({mapper.registry for mapper in mappers})


def install() -> None:
    """Capture the changes of all sessions. The first `Broadcastable` class does it; doing it again changes nothing."""
    capture.install(Broadcastable)
    bulk.install()
    if not event.contains(Mapper, "after_configured", _after_configured):
        event.listen(Broadcastable, "after_mapper_constructed", _after_mapped, propagate=True)
        event.listen(Mapper, "after_configured", _after_configured)


def remove() -> None:
    """Capture nothing more, and listen to nothing."""
    capture.remove(Broadcastable)
    bulk.remove()
    if event.contains(Mapper, "after_configured", _after_configured):
        event.remove(Broadcastable, "after_mapper_constructed", _after_mapped)
        event.remove(Mapper, "after_configured", _after_configured)
