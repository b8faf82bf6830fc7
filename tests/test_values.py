from __future__ import annotations

import dataclasses
import enum
import ipaddress
import json
import uuid
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any

import msgspec
import pydantic
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.orm import DeclarativeBase, Mapped, column_property, deferred, mapped_column

from broadcastable.errors import UnencodableValue
from broadcastable.events import encode_json
from broadcastable.values import (
    compile_event_encoder,
    converter_for,
    key_text,
    row_attributes,
    row_reader,
    to_json_value,
)


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1


@dataclasses.dataclass
class Point:
    x: int
    at: datetime


class Shape(msgspec.Struct, rename="camel"):
    side_length: int
    note: str | msgspec.UnsetType = msgspec.UNSET


class Model(pydantic.BaseModel):
    price: Decimal


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        (2**53 - 1, 2**53 - 1),
        (-(2**53) + 1, -(2**53) + 1),
        (2**53, "9007199254740992"),
        (-(2**53), "-9007199254740992"),
        (0.5, 0.5),
        (float("nan"), None),
        (float("inf"), None),
        (datetime(2026, 1, 2, 3, 4, 5), "2026-01-02T03:04:05Z"),
        (datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC), "2026-01-02T03:04:05.000006Z"),
        (datetime(2026, 1, 2, 3, 4, tzinfo=timezone(timedelta(hours=2))), "2026-01-02T01:04:00Z"),
        (date(2026, 1, 2), "2026-01-02"),
        (time(3, 4, 5), "03:04:05"),
        (timedelta(days=1, seconds=3), "P1DT3S"),
        (Decimal("1.50"), "1.50"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Color.RED, "red"),
        (Level.LOW, "1"),
        (b"ab", "YWI="),
        (bytearray(b"ab"), "YWI="),
        (ipaddress.ip_address("10.0.0.1"), "10.0.0.1"),
        (ipaddress.ip_network("10.0.0.0/8"), "10.0.0.0/8"),
        ({"a": (1, {2}), 3: Color.BLUE}, {"a": [1, [2]], "3": "blue"}),
        (Point(1, datetime(2026, 1, 1)), {"x": 1, "at": "2026-01-01T00:00:00Z"}),
        (Shape(2), {"sideLength": 2}),
        (Model(price=Decimal("1.0")), {"price": "1.0"}),
        (sa.JSON.NULL, None),
    ],
)
def test_a_value_has_one_json_form(value: Any, expected: Any) -> None:
    assert to_json_value(value) == expected
    assert type(to_json_value(value)) is type(expected)


def test_an_unknown_type_is_refused_with_advice() -> None:
    with pytest.raises(UnencodableValue, match="to_stream_value"):
        to_json_value({"a": object()})


@pytest.mark.parametrize("key", [None, True, (1, 2)])
def test_a_mapping_key_that_is_no_text_is_refused(key: Any) -> None:
    with pytest.raises(UnencodableValue, match="key of a JSON object"):
        to_json_value({key: 1})


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8")) | st.binary()
    | st.decimals() | st.datetimes() | st.dates() | st.times() | st.timedeltas() | st.uuids(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")) | st.integers(), inner),
    max_leaves=10,
)  # fmt: skip


@given(anything)
def test_what_comes_out_is_strict_json_and_stays_as_it_is(value: Any) -> None:
    once = to_json_value(value)
    assert to_json_value(once) == once
    text = encode_json(once)
    assert json.loads(text, parse_constant=pytest.fail) == once


class Base(DeclarativeBase):
    pass


class Everything(Base):
    __tablename__ = "everything"
    id: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int | None] = mapped_column(sa.ForeignKey("everything.id"))
    text: Mapped[str | None]
    number: Mapped[int | None] = mapped_column(sa.BigInteger)
    ratio: Mapped[float | None]
    price: Mapped[Decimal | None] = mapped_column(sa.Numeric(10, 2))
    exact: Mapped[Decimal | None]
    flag: Mapped[bool | None]
    color: Mapped[Color | None]
    word: Mapped[str | None] = mapped_column(sa.Enum("on", "off", name="word"))
    day: Mapped[date | None]
    hour: Mapped[time | None]
    moment: Mapped[datetime | None]
    zoned: Mapped[datetime | None] = mapped_column(sa.DateTime(timezone=True))
    span: Mapped[timedelta | None]
    blob: Mapped[bytes | None]
    identity: Mapped[uuid.UUID | None]
    document: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON)
    renamed: Mapped[str | None] = mapped_column("column_name")
    secret: Mapped[str | None] = mapped_column(info={"stream": False})
    heavy: Mapped[str | None] = deferred(mapped_column(sa.Text))
    double: Mapped[int] = column_property(sa.literal_column("id * 2", sa.Integer))


MAPPER = sa.inspect(Everything)
ATTRIBUTES = row_attributes(MAPPER)


def test_marked_and_deferred_columns_and_expressions_never_leave() -> None:
    names = {each.name for each in ATTRIBUTES}
    assert names.isdisjoint({"secret", "heavy", "double", "column_name"})
    assert {"id", "parent_id", "renamed", "document"} <= names


texts = st.text(st.characters(codec="utf-8"))
rows = st.fixed_dictionaries(
    {
        "id": st.integers(-(2**63), 2**63 - 1),
        "parent_id": st.none() | st.integers(),
        "text": st.none() | texts,
        "number": st.none() | st.integers(),
        "ratio": st.none() | st.floats() | st.integers(-5, 5),
        "price": st.none() | st.decimals(-1000, 1000, places=3) | st.integers(-5, 5) | st.floats(-9, 9),
        "exact": st.none() | st.decimals(allow_nan=False, allow_infinity=False, min_value=-1000, max_value=1000),
        "flag": st.none() | st.booleans() | st.sampled_from([0, 1]),
        "color": st.none() | st.sampled_from([*Color, "RED"]),
        "word": st.none() | st.sampled_from(["on", "off"]),
        "day": st.none() | st.dates() | st.datetimes(),
        "hour": st.none() | st.times(),
        "moment": st.none() | st.datetimes(),
        "zoned": st.none() | st.datetimes(min_value=datetime(2, 1, 1), timezones=st.just(timezone(timedelta(hours=3)))),
        "span": st.none() | st.timedeltas(),
        "blob": st.none() | st.binary(),
        "identity": st.none() | st.uuids(),
        "document": st.none() | st.dictionaries(texts, st.integers() | texts),
        "renamed": st.none() | texts,
    }
)


@given(rows, st.booleans())
def test_the_compiled_encoder_says_to_the_byte_what_the_plain_reader_says(
    row: dict[str, Any], as_strings: bool
) -> None:
    encode = compile_event_encoder("thing", ATTRIBUTES, ["id"], keys_as_strings=as_strings, absent_is_null=False)
    value = row_reader(ATTRIBUTES, keys_as_strings=as_strings)(row)
    key, body = encode(row)
    assert key == key_text((row["id"],))
    assert body == encode_json({"type": "thing", "key": key, "value": value})


def test_keys_travel_as_text_unless_told_otherwise() -> None:
    row = {each.name: None for each in ATTRIBUTES} | {"id": 1, "parent_id": 2}
    assert row_reader(ATTRIBUTES, keys_as_strings=True)(row)["parent_id"] == "2"
    assert row_reader(ATTRIBUTES, keys_as_strings=False)(row)["parent_id"] == 2


def test_an_absent_attribute_is_null_or_an_error() -> None:
    lenient = compile_event_encoder("thing", ATTRIBUTES, ["id"], keys_as_strings=True, absent_is_null=True)
    strict = compile_event_encoder("thing", ATTRIBUTES, ["id"], keys_as_strings=True, absent_is_null=False)
    value = json.loads(lenient({"id": 1})[1])["value"]
    assert value.pop("id") == "1"
    assert set(value.values()) == {None}
    with pytest.raises(KeyError):
        strict({"id": 1})


def test_an_encoder_names_what_it_cannot_encode() -> None:
    encode = compile_event_encoder("thing", ATTRIBUTES, ["id"], keys_as_strings=True, absent_is_null=True)
    with pytest.raises(UnencodableValue, match="object"):
        encode({"id": 1, "document": {"a": object()}})
    with pytest.raises(UnencodableValue):
        encode({"id": 1, "text": "\ud800"})


@pytest.mark.parametrize(
    ("column", "assigned", "stored"),
    [
        ("price", 5, "5.00"),
        ("price", 1.005, "1.01"),
        ("price", Decimal("2.345"), "2.35"),
        ("flag", 1, True),
        ("color", "BLUE", "blue"),
        ("day", datetime(2026, 1, 2, 3), "2026-01-02"),
        ("document", sa.JSON.NULL, None),
        ("document", {"big": 2**60}, {"big": 2**60}),
    ],
)
def test_an_event_says_what_a_later_reader_of_the_row_would_see(column: str, assigned: Any, stored: Any) -> None:
    """The database normalises what the application assigned."""
    assert converter_for(MAPPER.attrs[column].columns[0])(assigned) == stored


@pytest.mark.parametrize(
    ("identity", "text"),
    [
        ((1,), "1"),
        (("a/b",), "a/b"),
        ((uuid.UUID(int=1),), "00000000-0000-0000-0000-000000000001"),
        ((1, "a"), "1/a"),
        (("a/b", "c"), "a%2Fb/c"),
        (("a", "b/c"), "a/b%2Fc"),
    ],
)
def test_a_composite_key_is_unambiguous(identity: tuple[Any, ...], text: str) -> None:
    assert key_text(identity) == text


def test_a_value_that_holds_itself_or_goes_too_deep_is_named() -> None:
    cycle: dict[str, Any] = {}
    cycle["self"] = [cycle]
    deep: list[Any] = []
    for _ in range(5_000):
        deep = [deep]
    for value in (cycle, deep):
        with pytest.raises(UnencodableValue, match="holds itself, or is nested too deep"):
            to_json_value(value)
