"""Stream names: from streamables to the text that is signed, sent, tested and typed, and on to the path on the wire.

One normaliser, `stream_name_from`, serves every caller, so the name in a token and the name in a request cannot differ.
It is idempotent: a stream name is itself a streamable.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from typing import Any, Final, TypeAlias
from urllib.parse import quote, unquote
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.exc import DataError
from sqlalchemy.orm import InstanceState, Mapper, Session

from .errors import InvalidStreamName, UnknownModelError, UnsavedRecordError
from .settings import current_settings

Streamable: TypeAlias = Any
"""A persistent model instance, a plain name, None, or a sequence of those."""

MAX_NAME_LENGTH = 512
"""Characters in a whole stream name."""

_GID = re.compile(r"gid://([^/]+)/([^/]+)/(.+)", re.DOTALL)
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff?#\\]")
# A set has another order in another process, so two of them would name two streams.
_ORDERLESS = (bytes, Mapping, Set, type)
# pchar of RFC 3986, 3.3, and the slash. A literal percent sign is encoded, so that one decoding gives the name back.
_PATH_SAFE = "/:@!$&'()*+,;="

_PLAIN_KEYS: Final = frozenset({int, str, UUID})
"""Types of nearly all keys, whose text is `str`."""


@dataclass(frozen=True)
class GID:
    """The identity of a row, as `gid://<app>/<Model>/<key>[/<key>...]`; every part percent-encoded.

    `GID.parse(str(gid)) == gid` for any text in the parts.
    """

    app: str
    model: str
    key: tuple[str, ...]

    def __str__(self) -> str:
        return "gid://" + "/".join(_encode_part(part) for part in (self.app, self.model, *self.key))

    @classmethod
    def parse(cls, text: str) -> GID:
        """Read a gid back.

        Raises:
            InvalidStreamName: *text* is not a gid.
        """
        match = _GID.fullmatch(text)
        if match is None or not all(match[3].split("/")):
            raise InvalidStreamName(f"{text!r} is not a gid; one looks like gid://app/Room/1")
        try:
            app, model, *key = (unquote(part, errors="strict") for part in (match[1], match[2], *match[3].split("/")))
        except UnicodeDecodeError as error:
            raise InvalidStreamName(f"{text!r} is not a gid: its percent-encoding is not UTF-8") from error
        return cls(app, model, tuple(key))


def _encode_part(part: str) -> str:
    if part == "":
        raise InvalidStreamName("An empty text is no part of a gid: give the row a primary key that is not empty")
    if part.strip(".") == "" and len(part) <= 2:
        # Dots are unreserved, but a segment of one or two of them is navigation (RFC 3986, 5.2.4).
        return part.replace(".", "%2E")
    try:
        return quote(part, safe="")
    except UnicodeEncodeError as error:
        raise InvalidStreamName(f"{part!r} holds a lone surrogate and cannot be encoded") from error


def gid_name(cls: type) -> str:
    """The model part of a gid: `__gid_name__` if this very class says so, else the class name."""
    return str(cls.__dict__.get("__gid_name__", cls.__name__))


def gid_of(record: object, *, app: str | None = None) -> GID:
    """The gid of a persistent, detached or deleted instance. No I/O: the identity is known since its flush.

    Raises:
        UnsavedRecordError: The instance is transient or pending.
    """
    state: InstanceState[Any] = sa.inspect(record)
    if state.identity is None:
        raise UnsavedRecordError(
            f"This {type(record).__name__} has no primary key yet, so it names no stream. "
            "Flush or commit its session first"
        )
    return gid_from_identity(state.mapper, state.identity, app=app)


def gid_from_identity(mapper: Mapper[Any], identity: Sequence[Any], *, app: str | None = None) -> GID:
    """The gid of the row of *mapper* with the primary key *identity*."""
    return GID(app or current_settings().gid_app, gid_name(mapper.class_), tuple(key_part(part) for part in identity))


def key_part(value: object) -> str:
    """One primary key column's value as text: what `str` gives, but bytes as hex and enums by value.

    Equal keys have one text, whether a program has written them or the database has: numbers go without trailing
    zeros, and datetimes that have a zone go in UTC, without it, as those do that have none.
    """
    if value.__class__ in _PLAIN_KEYS:
        return str(value)
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, datetime) and value.tzinfo is not None:
        return str(value.astimezone(UTC).replace(tzinfo=None))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, Decimal) and value.is_finite():
        text = format(value, "f")
        return "0" if not value else text.rstrip("0").rstrip(".") if "." in text else text
    return str(value)


def stream_name_from(*streamables: Streamable, app: str | None = None) -> str:
    """The stream name of *streamables*, joined by `/`; the empty string when all of them are blank.

    Nested sequences are flattened; None, "" and empty sequences are dropped. No I/O.

    >>> stream_name_from(room, "messages")
    'gid://app/Room/1/messages'
    >>> stream_name_from("news", [None, ["sport", ""]])
    'news/sport'

    Args:
        streamables: Persistent instances, plain names, None, or sequences of those.
        app: The gid's application; `Settings.gid_app` when None.

    Raises:
        UnsavedRecordError: An instance without an identity.
        InvalidStreamName: A name with an empty, `.` or `..` segment, a control character, `?`, `#` or a backslash;
            a first segment `__ds` (reserved by the protocol); more than 512 characters; or something that is no
            streamable, a set among them.
    """
    name = "/".join(_part(each, app) for each in flattened(streamables))
    if name:
        validate_stream_name(name)
    return name


def _part(leaf: str | GID | object, app: str | None) -> str:
    if isinstance(leaf, str | GID):
        # A member of an Enum that is also a str gives its value here, as it does in a comparison.
        return str.__str__(leaf) if isinstance(leaf, str) else str(leaf)
    return str(gid_of(leaf, app=app))


def flattened(streamables: Iterable[Streamable]) -> tuple[Streamable, ...]:
    """The names, gids and records in *streamables*, in order, without the blanks: streamables once more.

    What looks at streamables more than once looks at these: a generator can be gone through only once.

    Raises:
        InvalidStreamName: Something that is no streamable.
    """
    return tuple(_leaves(streamables))


def _leaves(streamables: Iterable[Streamable]) -> Iterator[Streamable]:
    for streamable in streamables:
        if streamable is None or isinstance(streamable, str):
            if streamable:
                yield streamable
        elif isinstance(streamable, GID) or isinstance(sa.inspect(streamable, raiseerr=False), InstanceState):
            yield streamable
        elif isinstance(streamable, Iterable) and not isinstance(streamable, _ORDERLESS):
            yield from _leaves(streamable)
        else:
            raise InvalidStreamName(
                f"{streamable!r} is no streamable. Give a persistent record, a plain name (str), or a sequence of those"
            )


def validate_stream_name(name: str) -> None:
    """Raise `InvalidStreamName` unless a stream may have this *name*; see `stream_name_from`."""
    if len(name) > MAX_NAME_LENGTH:
        raise InvalidStreamName(f"A stream name has at most {MAX_NAME_LENGTH} characters; this one has {len(name)}")
    unsafe = _UNSAFE.search(name)
    if unsafe:
        raise InvalidStreamName(f"{name!r} holds {unsafe[0]!r}: control characters, '?', '#' and '\\' are not allowed")
    segments = name.split("/")
    if segments[0] == "__ds":
        raise InvalidStreamName(f"{name!r} begins with __ds, which the Durable Streams protocol reserves")
    previous = None
    for segment in segments:
        # The double slash of gid:// is the one empty segment there may be.
        if segment == "" and previous != "gid:":
            raise InvalidStreamName(f"{name!r} holds an empty segment: no leading, trailing or double slash")
        if segment in {".", ".."}:
            raise InvalidStreamName(f"{name!r} holds the segment {segment!r}, which a path would resolve away")
        previous = segment
    if segments[-1] == "":
        raise InvalidStreamName(f"{name!r} ends in a slash")


def stream_path(name: str) -> str:
    """*name* as the path of a request: as written, but for what RFC 3986, 3.3 forbids there, which is percent-encoded.

    One decoding of the path gives the name back, also when the name itself holds a percent sign.
    """
    return quote(name, safe=_PATH_SAFE)


def shard_of(name: str, shards: int) -> int:
    """Which of *shards* servers keeps the stream *name*: 0 to shards - 1, the same in every process and release.

    Rendezvous hashing (Thaler and Ravishankar, 1998): a further server takes over its own share and moves nothing else.
    """
    if shards == 1:
        return 0
    return max(range(shards), key=lambda shard: hashlib.blake2b(f"{shard}:{name}".encode(), digest_size=8).digest())


def locate(session: Session, gid: str | GID) -> Any:
    """Load the row that *gid* names, or None when it is gone. One SELECT at most.

    Raises:
        InvalidStreamName: Not a gid.
        UnknownModelError: Another application's gid, a model that is not Broadcastable here, or a key that does not
            fit.
    """
    from .mixin import broadcastable_model  # the models stand on the names, so this looks up late

    parsed = gid if isinstance(gid, GID) else GID.parse(gid)
    if parsed.app != current_settings().gid_app:
        raise UnknownModelError(
            f"{parsed} belongs to the application {parsed.app!r}, not {current_settings().gid_app!r}"
        )
    model = broadcastable_model(parsed.model)
    identity = identity_from(model, parsed)
    try:
        return session.get(model, identity)
    except (OverflowError, DataError) as error:
        # A driver refuses a number that the column cannot hold.
        raise UnknownModelError(f"{parsed}: the key does not fit {model.__name__}") from error


def identity_from(model: type, gid: GID) -> tuple[Any, ...]:
    """The primary key values in *gid*, as the columns of *model* want them.

    Raises:
        UnknownModelError: The number or the form of the parts does not fit.
    """
    columns: tuple[sa.Column[Any], ...] = sa.inspect(model).primary_key
    if len(columns) != len(gid.key):
        raise UnknownModelError(f"{gid}: {model.__name__} has {len(columns)} primary key columns, not {len(gid.key)}")
    try:
        return tuple(_from_text(column.type, part) for column, part in zip(columns, gid.key, strict=True))
    except (ValueError, TypeError, ArithmeticError, LookupError) as error:
        raise UnknownModelError(f"{gid}: the key does not fit {model.__name__}") from error


def _from_text(column_type: Any, text: str) -> Any:
    try:
        python_type = column_type.python_type
    except NotImplementedError:
        return text
    if isinstance(column_type, sa.DateTime):
        moment = datetime.fromisoformat(text)
        return moment.replace(tzinfo=UTC) if column_type.timezone and moment.tzinfo is None else moment
    if python_type is bytes:
        return bytes.fromhex(text)
    if python_type is str:
        return text
    if hasattr(python_type, "fromisoformat"):
        return python_type.fromisoformat(text)
    if issubclass(python_type, Enum):
        return {key_part(member): member for member in python_type}[text]
    if python_type is bool:
        return {"True": True, "False": False}[text]
    value = python_type(text)
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
        raise ValueError("no database has so large a number as a key")
    return value
