"""What a test expects to see on which stream. Pure: no I/O, no global state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import InstanceState

from broadcastable.errors import BlankStreamables, UsageError
from broadcastable.events import Operation
from broadcastable.names import GID, Streamable, flattened, stream_name_from
from broadcastable.values import event_key, key_text, to_json_value

from .broadcasts import Broadcast


@dataclass(frozen=True, slots=True)
class Target:
    """Which streams are meant: one, one with those beneath it, or (`name` None) all there are.

    Attributes:
        records: The records that name it, for whoever asks what their sessions have still to send.
    """

    name: str | None
    beneath: bool = False
    records: tuple[object, ...] = field(default=(), repr=False, compare=False)

    def covers(self, stream: str) -> bool:
        if self.name is None or stream == self.name:
            return True
        return self.beneath and stream.startswith(self.name + "/")

    def __str__(self) -> str:
        if self.name is None:
            return "any stream"
        return f"{self.name} or beneath it" if self.beneath else self.name


def target_from(streamables: Sequence[Streamable], *, exact: bool) -> Target:
    """The streams that *streamables* mean in a test: a lone record stands for the streams beneath it too.

    Raises:
        BlankStreamables: There are some, and all are blank: an empty variable must not mean every stream.
    """
    if not streamables:
        return Target(None)
    leaves = flattened(streamables)
    if not leaves:
        raise BlankStreamables("All streamables are blank. Name a stream, or give none at all to mean every stream")
    records = tuple(each for each in leaves if isinstance(sa.inspect(each, raiseerr=False), InstanceState))
    is_lone_record = len(leaves) == 1 and (bool(records) or isinstance(leaves[0], GID))
    return Target(stream_name_from(*leaves), beneath=is_lone_record and not exact, records=records)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What an event must have to count. None means anything.

    Attributes:
        value: What the event's value, or a whole free payload, must hold: mappings as subsets, all else as equal.
    """

    type: str | None = None
    operation: str | None = None
    key: str | None = None
    value: Any = None

    def matches(self, broadcast: Broadcast) -> bool:
        return next(self.differences(broadcast), None) is None

    def differences(self, broadcast: Broadcast) -> Iterator[str]:
        """Each difference as a line: `value.body: expected 'Hi', was 'Ho'`."""
        for name in ("type", "operation", "key"):
            wanted = getattr(self, name)
            if wanted is not None and wanted != getattr(broadcast, name):
                yield f"{name}: expected {wanted!r}, was {getattr(broadcast, name)!r}"
        if self.value is not None:
            seen = broadcast.value if broadcast.is_change else broadcast.payload
            yield from _differences("value", self.value, seen)

    def __str__(self) -> str:
        parts = [
            f"{name}={getattr(self, name)!r}"
            for name in ("type", "operation", "key", "value")
            if getattr(self, name) is not None
        ]
        return " with " + ", ".join(parts) if parts else ""


def wanted_from(*, type: str | None, operation: str | None, key: object, value: Any) -> Wanted:
    """`Wanted` from what a test's author writes.

    Raises:
        UsageError: No such operation, or a key that no event has.
    """
    if operation is not None:
        try:
            known = Operation(operation)
        except ValueError:
            raise UsageError(f"operation is one of {', '.join(Operation)}; got {operation!r}") from None
        operation = (Operation.UPDATE if known is Operation.UPSERT else known).value
    return Wanted(type=type, operation=operation, key=None if key is None else _key(key), value=value)


def _key(key: object) -> str:
    """*key* as it travels; several parts are those of a composite primary key."""
    return event_key(key_text(key) if isinstance(key, tuple | list) else key)


def _differences(path: str, wanted: Any, seen: Any) -> Iterator[str]:
    if isinstance(wanted, Mapping):
        if not isinstance(seen, dict):
            yield f"{path}: expected {dict(wanted)!r}, was {seen!r}"
            return
        for name, each in wanted.items():
            if name in seen:
                yield from _differences(f"{path}.{name}", each, seen[name])
            else:
                yield f"{path}.{name}: expected {each!r}, was not there"
    elif isinstance(wanted, list | tuple) and isinstance(seen, list) and len(wanted) == len(seen):
        for index, (each, other) in enumerate(zip(wanted, seen, strict=True)):
            yield from _differences(f"{path}[{index}]", each, other)
    elif not _equal(wanted, seen):
        yield f"{path}: expected {wanted!r}, was {seen!r}"


def _equal(wanted: Any, seen: Any) -> bool:
    if isinstance(wanted, bool) or isinstance(seen, bool):
        return wanted is seen
    # As written first, for objects that compare in their own way (`unittest.mock.ANY`, `pytest.approx`); then in its
    # JSON form, for dates, UUIDs and their like.
    if wanted == seen:
        return True
    try:
        return bool(to_json_value(wanted) == seen)
    except UsageError:
        return False
