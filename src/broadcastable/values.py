"""From Python values and rows to JSON: the one place where their encoding is decided.

Reading a row never loads anything: it looks only at what the instance already holds, and says what is missing.
Everything here is pure; nothing does I/O.
"""

from __future__ import annotations

import dataclasses
import enum
import ipaddress
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from datetime import UTC, date, datetime, time, timedelta
from decimal import ROUND_HALF_UP, Decimal
from typing import Any, Final
from urllib.parse import quote
from uuid import UUID

import msgspec
import sqlalchemy as sa
from sqlalchemy.orm import ColumnProperty, Mapper

from .errors import UnencodableValue
from .events import check_text
from .names import key_part

MAX_SAFE_INTEGER: Final = 2**53 - 1
"""The largest integer that a JavaScript number holds exactly; larger ones travel as text."""

STREAM_INFO_KEY: Final = "stream"
"""A column with `info={"stream": False}` never leaves the application."""


def to_json_value(value: Any) -> Any:
    """*value* made of nothing but dict, list, str, int, float, bool and None.

    datetime: RFC 3339 in UTC (a naive one is taken as UTC); date, time, timedelta: ISO 8601; UUID, Decimal, Enum (its
    value) and IP addresses: text; bytes: base64; int beyond 2**53 - 1: text; NaN and infinities: null. Mappings,
    sequences, sets, dataclasses, msgspec Structs and Pydantic models are taken apart; mapping keys become text.

    Raises:
        UnencodableValue: It, or something in it, has no JSON form here.
    """
    convert = _CONVERTERS.get(value.__class__)
    try:
        return convert(value) if convert is not None else _to_json_by_kind(value)
    except RecursionError:
        raise UnencodableValue("The value holds itself, or is nested too deep for JSON. Send less of it") from None


def _same(value: Any) -> Any:
    return value


def _integer(value: int) -> int | str:
    return value if -MAX_SAFE_INTEGER <= value <= MAX_SAFE_INTEGER else str(value)


def _float(value: float) -> float | None:
    return value if value - value == 0.0 else None


def _datetime(value: datetime) -> str:
    moment = value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    return moment.isoformat().removesuffix("+00:00") + "Z"


def _builtin(value: Any) -> Any:
    return msgspec.to_builtins(value)


def _mapping(value: Mapping[Any, Any]) -> dict[str, Any]:
    return {key if key.__class__ is str else _key(key): to_json_value(each) for key, each in value.items()}


def _key(key: Any) -> str:
    text = to_json_value(key)
    if isinstance(text, bool | dict | list) or text is None:
        raise UnencodableValue(f"{key!r} cannot be the key of a JSON object. Use text")
    return str(text)


def _list(value: Iterable[Any]) -> list[Any]:
    return [to_json_value(each) for each in value]


_CONVERTERS: Final[dict[type, Callable[[Any], Any]]] = {
    type(None): _same,
    str: _same,
    bool: _same,
    int: _integer,
    float: _float,
    datetime: _datetime,
    date: date.isoformat,
    time: time.isoformat,
    timedelta: _builtin,
    Decimal: str,
    UUID: str,
    bytes: _builtin,
    dict: _mapping,
    list: _list,
    tuple: _list,
    set: _list,
    frozenset: _list,
}


def _to_json_by_kind(value: Any) -> Any:
    """The slow way, for subclasses and for types of other libraries."""
    if value is sa.JSON.NULL:  # an int to isinstance()
        return None
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, msgspec.Struct):
        return _struct(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return _integer(int(value))
    if isinstance(value, float):
        return _float(float(value))
    for kind, convert in _CONVERTERS.items():
        if isinstance(value, kind):
            return convert(value)
    if isinstance(value, bytearray | memoryview):
        return _builtin(bytes(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json_value(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return _mapping(value)
    if isinstance(value, Sequence | Set):
        return _list(value)
    if isinstance(value, _ADDRESSES):
        return str(value)
    of_a_library: Any = value
    if hasattr(value, "model_dump"):  # Pydantic, without importing it
        return to_json_value(of_a_library.model_dump(mode="json"))
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return to_json_value(of_a_library.tolist())
    raise UnencodableValue(
        f"A {type(value).__module__}.{type(value).__qualname__} has no JSON form here. Convert it in "
        'to_stream_value() or value=, or mark its column info={"stream": False}'
    )


def _struct(value: msgspec.Struct) -> dict[str, Any]:
    return {
        encoded: to_json_value(getattr(value, name))
        for name, encoded in zip(value.__struct_fields__, value.__struct_encode_fields__, strict=True)
        if getattr(value, name) is not msgspec.UNSET
    }


_ADDRESSES = (
    ipaddress.IPv4Address | ipaddress.IPv6Address | ipaddress.IPv4Network | ipaddress.IPv6Network
    | ipaddress.IPv4Interface | ipaddress.IPv6Interface
)  # fmt: skip


# Rows


@dataclasses.dataclass(frozen=True, slots=True)
class RowAttribute:
    """One mapped column of a row that travels.

    Attributes:
        name: The attribute's name on the class, and the field's name in JSON.
        column: The column of the row's own table (of the subclass, in joined inheritance).
        is_key: A primary or foreign key.
        convert: From the attribute's value to JSON, by the column's type; None passes through.
    """

    name: str
    column: sa.Column[Any]
    is_key: bool
    convert: Callable[[Any], Any]


def row_attributes(mapper: Mapper[Any]) -> tuple[RowAttribute, ...]:
    """The columns of *mapper* that travel: no SQL expressions, nothing deferred, nothing marked `stream: False`."""
    found = []
    for attribute in mapper.column_attrs:
        column = table_column(attribute)
        if column is None or attribute.deferred or not _leaves(attribute, column):
            continue
        is_key = any(each in mapper.primary_key or each.foreign_keys for each in _table_columns(attribute))
        found.append(RowAttribute(attribute.key, column, is_key, converter_for(column)))
    return tuple(found)


def table_column(attribute: ColumnProperty[Any]) -> sa.Column[Any] | None:
    """The table's column behind *attribute*, or None for an SQL expression."""
    return next(iter(_table_columns(attribute)), None)


def _table_columns(attribute: ColumnProperty[Any]) -> list[sa.Column[Any]]:
    return [column for column in attribute.columns if isinstance(column, sa.Column)]


def _leaves(attribute: ColumnProperty[Any], column: sa.Column[Any]) -> bool:
    return bool(attribute.info.get(STREAM_INFO_KEY, True) and column.info.get(STREAM_INFO_KEY, True))


def converter_for(column: sa.Column[Any]) -> Callable[[Any], Any]:
    """From a value as the application assigned it to the JSON of what the database will give back.

    The database normalises what it stores: 5 in a Numeric(10, 2) is 5.00, a name in an Enum column is the member.
    The event says what a later reader of the row sees.
    """
    column_type = column.type
    if isinstance(column_type, sa.Enum) and column_type.enum_class is not None:
        return _enum_converter(column_type.enum_class)
    if isinstance(column_type, sa.Boolean):
        return _boolean
    if isinstance(column_type, sa.Numeric) and column_type.asdecimal:
        return _numeric_converter(column_type.scale)
    if isinstance(column_type, sa.Date):
        return _date
    if isinstance(column_type, sa.JSON):
        return _json
    return to_json_value


def _boolean(value: Any) -> bool | None:
    return None if value is None else bool(value)


def _date(value: Any) -> Any:
    return value.date().isoformat() if isinstance(value, datetime) else to_json_value(value)


def _json(value: Any) -> Any:
    # As is, integers beyond 2**53 included: it was JSON before, and is for the application to know.
    return None if value is sa.JSON.NULL else value


def _enum_converter(enum_class: type[enum.Enum]) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if isinstance(value, str) and not isinstance(value, enum.Enum) and value in enum_class.__members__:
            value = enum_class[value]
        return to_json_value(value)

    return convert


def _numeric_converter(scale: int | None) -> Callable[[Any], Any]:
    exponent = None if scale is None else Decimal(1).scaleb(-scale)

    def convert(value: Any) -> str | None:
        if value is None:
            return None
        number = value if isinstance(value, Decimal) else Decimal(str(value))
        if not number.is_finite():
            return None
        if exponent is not None:
            number = number.quantize(exponent, ROUND_HALF_UP)
        return format(number, "f")

    return convert


def key_value(value: Any) -> str | None:
    """A primary or foreign key column's value as it travels: text, or None for null."""
    return None if value is None else key_part(value)


def key_text(identity: Sequence[Any]) -> str:
    """A primary key as the key of an event: text; the parts of a composite one percent-encoded and joined by `/`."""
    if len(identity) == 1:
        return key_part(identity[0])
    return "/".join(quote(key_part(part), safe="") for part in identity)


def event_key(value: object) -> str:
    """What an application gives as the key of an event, as text.

    Raises:
        UsageError: None, an empty text, or one that is no Unicode: readers could not tell the row from others.
    """
    text = None if value is None else key_part(value)
    check_text("key", text)
    assert text is not None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnencodableValue(f"The key {text!r} holds a lone surrogate and cannot be encoded") from error
    return text


def row_value(value: Any) -> dict[str, Any]:
    """What an application gives as the value of a row, made of nothing but JSON values.

    Raises:
        UnencodableValue: It has no JSON form, or is no object: StreamDB, the reference client, throws on anything else.
    """
    made = to_json_value(value)
    if not isinstance(made, dict):
        raise UnencodableValue(
            f"The value of a row is a JSON object; got {made!r}. Return a mapping from to_stream_value() or value="
        )
    return made


Row = Mapping[str, Any]
"""Column attributes by name, as in `InstanceState.dict`."""


def row_reader(attributes: Sequence[RowAttribute], *, keys_as_strings: bool) -> Callable[[Row], dict[str, Any]]:
    """A function from a row to its JSON value; it raises KeyError for an attribute that the row does not hold."""
    converters = [(each.name, key_value if each.is_key and keys_as_strings else each.convert) for each in attributes]

    def read(row: Row) -> dict[str, Any]:
        return {name: convert(row[name]) for name, convert in converters}

    return read


EventEncoder = Callable[[Row], tuple[str, bytes]]
"""From a row to its key and the beginning of its event in JSON, up to the closing brace, which is still there."""


def compile_event_encoder(
    type_: str, attributes: Sequence[RowAttribute], key: Sequence[str], *, keys_as_strings: bool, absent_is_null: bool
) -> EventEncoder:
    """The whole-row encoder of one class, written out as Python and compiled once: capture spends its time here.

    What it returns equals `row_reader` and `key_text` on the same row, to the byte; the tests hold it to that.

    Args:
        type_: The `type` of the events.
        attributes: The columns that travel.
        key: The names of the primary key's attributes.
        keys_as_strings: `Settings.keys_as_strings`.
        absent_is_null: What the row does not hold was never set, so that the INSERT stored null.

    Raises (when called):
        KeyError: The row does not hold an attribute, unless *absent_is_null*.
        UnencodableValue: A value without a JSON form.
        UsageError: A primary key that is the empty text.
    """
    fields = [f"f{index}" for index in range(len(attributes))]
    row_struct = msgspec.defstruct(
        "Row", fields, rename=dict(zip(fields, (each.name for each in attributes), strict=True)), gc=False
    )
    event_struct = msgspec.defstruct("Event", ["type", "key", "value"], gc=False)
    names: dict[str, Any] = {
        "encode": msgspec.json.Encoder(enc_hook=to_json_value).encode,
        "Row": row_struct,
        "Event": event_struct,
        "key_value": key_value,
        "key_text": key_text,
        "check_text": check_text,
        "type_": type_,
        "int": int,
        "datetime": datetime,
        "UTC": UTC,
        **{native.__name__: native for _, native in _NATIVE},
        "UnencodableValue": UnencodableValue,
        "failures": (TypeError, ValueError, ArithmeticError, RecursionError, msgspec.MsgspecError),
    }
    arguments = []
    for index, each in enumerate(attributes):
        names[f"convert{index}"] = each.convert
        access = f"get({each.name!r})" if absent_is_null else f"row[{each.name!r}]"
        arguments.append(_expression(index, access, each, keys_as_strings))
    if len(key) == 1:
        # "key = v if v.__class__ is str else ..." costs a third of a call.
        key_expression = f"str(k) if (k := row[{key[0]!r}]).__class__ is int else key_text((k,))"
    else:
        key_expression = f"key_text(({', '.join(f'row[{name!r}]' for name in key)},))"
    source = (
        "def encode_event(row):\n"
        "    get = row.get\n"
        f"    key = {key_expression}\n"
        "    if not key:\n"
        "        check_text('key', key)\n"
        "    try:\n"
        f"        return key, encode(Event(type_, key, Row({', '.join(arguments)})))\n"
        "    except UnencodableValue:\n"
        "        raise\n"
        "    except failures as error:\n"
        "        raise UnencodableValue(str(error)) from error\n"
    )
    exec(compile(source, f"<broadcastable encoder of {type_!r}>", "exec"), names)  # noqa: S102 - names enter only as reprs
    encode_event: EventEncoder = names["encode_event"]
    return encode_event


def _expression(index: int, value: str, attribute: RowAttribute, keys_as_strings: bool) -> str:
    """The Python that encodes one attribute: what msgspec writes just as `to_json_value` would goes without a call."""
    slow = f"convert{index}(v)"
    if attribute.is_key and keys_as_strings:
        return f"(str(v) if (v := {value}).__class__ is int else key_value(v))"
    column_type = attribute.column.type
    if isinstance(column_type, sa.Integer):
        limit = MAX_SAFE_INTEGER
        return f"(v if (v := {value}) is None or v.__class__ is int and -{limit} <= v <= {limit} else {slow})"
    if isinstance(column_type, sa.DateTime):
        return (
            f"(v if (v := {value}) is None else v.replace(tzinfo=UTC) "
            f"if v.__class__ is datetime and v.tzinfo is None else {slow})"
        )
    for kind, native in _NATIVE:
        if isinstance(column_type, kind) and not isinstance(column_type, sa.Enum):
            return f"(v if (v := {value}) is None or v.__class__ is {native.__name__} else {slow})"
    return f"convert{index}({value})"


_NATIVE: Final = (
    (sa.String, str),
    (sa.Boolean, bool),
    (sa.Float, float),
    (sa.Uuid, UUID),
    (sa.Date, date),
    (sa.LargeBinary, bytes),
)
