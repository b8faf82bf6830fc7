"""Stream names: one normaliser, reversible gids, and paths that one percent-decoding turns back into names."""

from __future__ import annotations

import datetime
import decimal
import enum
import re
import sys
import uuid
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

import pytest
import sqlalchemy as sa
from hypothesis import assume, given, reject
from hypothesis import strategies as st
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, make_transient, mapped_column

from broadcastable import Broadcastable, settings
from broadcastable.errors import InvalidStreamName, UnknownModelError, UnsavedRecordError
from broadcastable.names import (
    GID,
    MAX_NAME_LENGTH,
    gid_name,
    gid_of,
    identity_from,
    key_part,
    locate,
    shard_of,
    stream_name_from,
    stream_path,
    validate_stream_name,
)


class Base(DeclarativeBase):
    pass


class Room(Base):
    __tablename__ = "rooms"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(default="room")
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "room"}  # noqa: RUF012

    def __eq__(self, other: object) -> bool:
        raise AssertionError("naming a stream compares no records: that may load them")

    __hash__ = Base.__hash__

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("a record is one streamable, whatever it may be iterated for")


class Lobby(Room):
    __mapper_args__ = {"polymorphic_identity": "lobby"}  # noqa: RUF012


class Seat(Base):
    __tablename__ = "seats"
    __gid_name__ = "Chair"
    row: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)


class Stool(Seat):
    pass


class Vault(Base, Broadcastable):
    __tablename__ = "vaults"
    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture
def session() -> Iterator[Session]:
    engine = sa.create_engine("sqlite://")
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        yield session
    engine.dispose()


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
gids = st.builds(GID, text, text, st.lists(text, min_size=1, max_size=3).map(tuple))
segments = text.filter(
    lambda part: not re.search(r"[\x00-\x1f\x7f-\x9f?#\\/]", part) and part not in {".", "..", "__ds"}
)
names = st.lists(segments, min_size=1, max_size=4).map("/".join).filter(lambda name: len(name) <= MAX_NAME_LENGTH)
short_gids = gids.filter(lambda gid: len(str(gid)) <= 200)
plain = st.none() | st.just("") | names
streamables = st.recursive(plain | short_gids, lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner))


# gids


@given(gids)
def test_a_gid_is_read_back_as_it_was_written(gid: GID) -> None:
    assert GID.parse(str(gid)) == gid


@given(gids, gids)
def test_two_rows_never_share_a_gid(one: GID, other: GID) -> None:
    assert (str(one) == str(other)) == (one == other)


@given(short_gids)
def test_every_gid_is_a_stream_name_of_printable_ascii(gid: GID) -> None:
    assert stream_name_from(gid) == str(gid)
    assert str(gid).isascii()
    assert str(gid).isprintable()


@pytest.mark.parametrize(
    ("gid", "written"),
    [
        (GID("app", "Room", ("1",)), "gid://app/Room/1"),
        (GID("app", "Seat", ("A", "7")), "gid://app/Seat/A/7"),
        (GID("app", "Page", ("a/b c",)), "gid://app/Page/a%2Fb%20c"),
        (GID("app", "Page", ("..",)), "gid://app/Page/%2E%2E"),
        (GID("app", "Page", (".",)), "gid://app/Page/%2E"),
        (GID("app", "Page", ("...",)), "gid://app/Page/..."),
        (GID("app", "Page", ("%2F",)), "gid://app/Page/%252F"),
        (GID("app", "Page", ("žluť",)), "gid://app/Page/%C5%BElu%C5%A5"),
    ],
)
def test_gids_are_written_so(gid: GID, written: str) -> None:
    assert str(gid) == written


@pytest.mark.parametrize(
    "text",
    ["", "Room/1", "gid://", "gid://app", "gid://app/Room", "gid://app/Room/", "gid://app/Room/1//2", "gid://a/b/%FF"],
)
def test_what_is_no_gid_is_refused(text: str) -> None:
    with pytest.raises(InvalidStreamName, match="not a gid"):
        GID.parse(text)


@pytest.mark.parametrize("key", [("",), ("\ud800",)])
def test_a_key_that_cannot_be_written_is_refused(key: tuple[str]) -> None:
    with pytest.raises(InvalidStreamName):
        str(GID("app", "Room", key))


def test_a_record_is_named_by_its_class_and_primary_key(session: Session) -> None:
    room, lobby, seat = Room(id=1), Lobby(id=2), Seat(row="A/1", number=7)
    session.add_all([room, lobby, seat])
    session.flush()
    assert str(gid_of(room)) == "gid://app/Room/1"
    assert str(gid_of(lobby)) == "gid://app/Lobby/2"
    assert str(gid_of(seat)) == "gid://app/Chair/A%2F1/7"
    assert str(gid_of(seat, app="shop")) == "gid://shop/Chair/A%2F1/7"
    with settings.override(gid_app="chat"):
        assert str(gid_of(room)) == "gid://chat/Room/1"


def test_a_gid_name_is_not_handed_down_to_subclasses() -> None:
    assert [gid_name(Seat), gid_name(Stool)] == ["Chair", "Stool"]


def test_a_record_without_an_identity_names_no_stream(session: Session) -> None:
    transient = Room(id=1)
    with pytest.raises(UnsavedRecordError, match=r"Room .*Flush or commit"):
        stream_name_from(transient, "messages")
    session.add(transient)
    with pytest.raises(UnsavedRecordError):
        stream_name_from(transient)
    session.flush()
    assert stream_name_from(transient) == "gid://app/Room/1"
    session.rollback()
    with pytest.raises(UnsavedRecordError):
        stream_name_from(transient)


def test_a_record_keeps_its_name_when_it_is_expired_deleted_or_detached(session: Session) -> None:
    """Without a statement: an expired record is not loaded for its name, and a deleted one could not be."""
    room = Room(id=1)
    session.add(room)
    session.commit()
    statements: list[str] = []
    sa.event.listen(session.get_bind(), "before_cursor_execute", lambda *call: statements.append(call[2]))
    assert stream_name_from(room) == "gid://app/Room/1"
    assert statements == []
    session.delete(room)
    session.flush()
    assert stream_name_from(room) == "gid://app/Room/1"
    session.commit()
    assert stream_name_from(room) == "gid://app/Room/1"
    make_transient(room)
    with pytest.raises(UnsavedRecordError):
        stream_name_from(room)


# Keys


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Size(str, enum.Enum):  # noqa: UP042  the kind of enum that str() shows with its class
    SMALL = "s"
    LARGE = "l"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


MOMENT = datetime.datetime(2025, 1, 15, 10, 30, 0, 125, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    ("column_type", "value", "written"),
    [
        (sa.Integer(), 7, "7"),
        (sa.Text(), "a/b", "a/b"),
        (sa.Uuid(), uuid.UUID(int=7), "00000000-0000-0000-0000-000000000007"),
        (sa.Uuid(as_uuid=False), "00000000-0000-0000-0000-000000000007", "00000000-0000-0000-0000-000000000007"),
        (sa.LargeBinary(), b"\x00\xff", "00ff"),
        (sa.Numeric(10, 2), decimal.Decimal("1.50"), "1.5"),
        (sa.Float(), 7.0, "7"),
        (sa.Boolean(), False, "False"),
        (sa.Date(), MOMENT.date(), "2025-01-15"),
        (sa.DateTime(timezone=True), MOMENT, "2025-01-15 10:30:00.000125"),
        (sa.DateTime(), MOMENT.replace(tzinfo=None), "2025-01-15 10:30:00.000125"),
        (sa.Enum(Colour), Colour.BLUE, "2"),
        (sa.Enum(Size), Size.LARGE, "l"),
        (sa.Enum(Level), Level.HIGH, "2"),
    ],
)
def test_a_key_of_every_type_is_written_and_read_back(column_type: Any, value: Any, written: str) -> None:
    assert key_part(value) == written
    model = type("Thing", (), {})
    sa.orm.registry().map_imperatively(
        model, sa.Table("things", sa.MetaData(), sa.Column("id", column_type, primary_key=True))
    )
    gid = GID("app", "Thing", (key_part(value),))
    assert identity_from(model, GID.parse(str(gid))) == (value,)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ([5, 5.0, decimal.Decimal(5), decimal.Decimal("5.00"), decimal.Decimal("5E+0")], "5"),
        ([500, decimal.Decimal("5E+2"), decimal.Decimal("500.0")], "500"),
        ([0, -0.0, decimal.Decimal("-0.00"), decimal.Decimal("0E-7")], "0"),
        ([-1.5, decimal.Decimal("-1.500")], "-1.5"),
        ([decimal.Decimal("1" * 40 + ".50")], "1" * 40 + ".5"),
        ([decimal.Decimal("NaN"), float("nan")], None),
        (
            [
                MOMENT,
                MOMENT.replace(tzinfo=None),
                MOMENT.astimezone(datetime.timezone(datetime.timedelta(hours=2))),
                MOMENT.astimezone(datetime.timezone(-datetime.timedelta(hours=11))),
            ],
            "2025-01-15 10:30:00.000125",
        ),
    ],
)
def test_equal_keys_have_one_text(keys: list[Any], text: str | None) -> None:
    """A program writes 5 where the database gives back 5.00; each in the zone that it likes."""
    assert {key_part(key) for key in keys} == ({text} if text else {"NaN", "nan"})


@given(st.decimals(allow_nan=False, allow_infinity=False, places=4), st.decimals(allow_nan=False, places=9))
def test_keys_that_differ_have_texts_that_differ(one: decimal.Decimal, other: decimal.Decimal) -> None:
    assert (key_part(one) == key_part(other)) == (one == other)
    assert decimal.Decimal(key_part(one)) == one


@pytest.mark.parametrize(
    ("column_type", "text"),
    [
        (sa.Integer(), "one"),
        (sa.Uuid(), "7"),
        (sa.LargeBinary(), "xyz"),
        (sa.Numeric(), "a"),
        (sa.Boolean(), "yes"),
        (sa.Date(), "yesterday"),
        (sa.Enum(Colour), "GREEN"),
        (sa.Interval(), "1"),
    ],
)
def test_a_key_that_does_not_fit_its_column_names_the_model(column_type: Any, text: str) -> None:
    model = type("Thing", (), {})
    sa.orm.registry().map_imperatively(
        model, sa.Table("things", sa.MetaData(), sa.Column("id", column_type, primary_key=True))
    )
    with pytest.raises(UnknownModelError, match="Thing"):
        identity_from(model, GID("app", "Thing", (text,)))


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**30, 10**5000], ids=["2**63", "-2**63-1", "10**30", "long"])
def test_a_number_that_no_driver_takes_names_no_row(session: Session, number: int) -> None:
    """A gid may come from anywhere; what is wrong with it is the library's error, not the driver's."""
    sys.set_int_max_str_digits(0)
    try:
        gid = GID("app", "Vault", (str(number),))
    finally:
        sys.set_int_max_str_digits(sys.int_info.default_max_str_digits)
    with pytest.raises(UnknownModelError, match="the key does not fit Vault"):
        locate(session, gid)


def test_a_number_that_is_just_large_is_looked_for(session: Session) -> None:
    assert locate(session, f"gid://app/Vault/{2**63 - 1}") is None


def test_a_key_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(UnknownModelError, match="2 primary key columns, not 1"):
        identity_from(Seat, GID("app", "Chair", ("A",)))


# Stream names


@given(st.lists(streamables, max_size=3))
def test_a_stream_name_is_itself_a_streamable(parts: list[Any]) -> None:
    try:
        name = stream_name_from(*parts)
    except InvalidStreamName:  # too long once joined
        reject()
    assert stream_name_from(name) == name
    assert stream_name_from([[name], None], "") == name


@given(st.lists(plain, max_size=4))
def test_nesting_and_blanks_change_nothing(parts: list[str | None]) -> None:
    expected = "/".join(part for part in parts if part)
    assume(len(expected) <= MAX_NAME_LENGTH)
    assert stream_name_from(*parts) == expected
    assert stream_name_from(parts) == expected
    assert stream_name_from([tuple(parts), []], None, iter([])) == expected
    assert stream_name_from(part for part in parts) == expected


def test_a_record_and_the_names_under_it_are_joined_by_a_slash(session: Session) -> None:
    room = Room(id=1)
    session.add(room)
    session.flush()
    assert stream_name_from(room, "messages") == "gid://app/Room/1/messages"
    assert stream_name_from([room, ["messages", None, "drafts"]]) == "gid://app/Room/1/messages/drafts"
    assert stream_name_from(room, "messages", app="shop") == "gid://shop/Room/1/messages"
    assert stream_name_from("tenants", room) == "tenants/gid://app/Room/1"


@pytest.mark.parametrize("blank", [(), (None,), ("",), ([],), ([None, ["", ()]],)])
def test_blank_streamables_give_the_empty_name(blank: tuple[Any, ...]) -> None:
    assert stream_name_from(*blank) == ""


def test_an_enum_member_that_is_text_gives_its_value() -> None:
    assert stream_name_from(Size.SMALL) == "s"


@pytest.mark.parametrize("thing", [7, 1.5, b"room", {"a": 1}, {"a", "b"}, frozenset("a"), Room, object(), Colour.RED])
def test_what_is_no_streamable_is_refused(thing: object) -> None:
    """A set among them: its order differs from process to process, and so would the name."""
    with pytest.raises(InvalidStreamName, match="no streamable"):
        stream_name_from(thing)


@pytest.mark.parametrize(
    "name",
    [
        "/rooms",
        "rooms/",
        "rooms//1",
        "//rooms",
        "/",
        ".",
        "..",
        "rooms/..",
        "rooms/./1",
        "rooms?offset=-1",
        "rooms#1",
        "rooms\\1",
        "rooms\n1",
        "rooms\x7f",
        "rooms\x85",
        "rooms\x00",
        "\ud800",
        "__ds",
        "__ds/rooms",
        "gid:/",
        "gid://",
        "gid:///rooms",
        "agid://rooms",
        "x" * (MAX_NAME_LENGTH + 1),
    ],
)
def test_a_name_that_no_stream_may_have_is_refused(name: str) -> None:
    with pytest.raises(InvalidStreamName):
        stream_name_from(name)
    with pytest.raises(InvalidStreamName):
        validate_stream_name(name)


@pytest.mark.parametrize(
    "name", ["rooms", "rooms/1", "a b", "žluť/寿司", "...", "rooms/__ds", "100%", "x" * MAX_NAME_LENGTH]
)
def test_a_plain_name_is_kept_as_it_is(name: str) -> None:
    assert stream_name_from(name) == name


# On the wire


@given(names)
def test_one_decoding_of_the_path_gives_the_name_back(name: str) -> None:
    path = stream_path(name)
    assert unquote(path, errors="strict") == name
    assert re.fullmatch(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-F]{2})+", path)


@given(names, names)
def test_two_names_never_share_a_path(one: str, other: str) -> None:
    assert (stream_path(one) == stream_path(other)) == (one == other)


def test_a_gid_goes_out_as_it_is_written() -> None:
    assert stream_path("gid://app/Room/1/messages") == "gid://app/Room/1/messages"
    assert stream_path("gid://app/Page/a%2Fb") == "gid://app/Page/a%252Fb"


# Shards


@given(names, st.integers(1, 8))
def test_another_server_takes_over_its_own_share_and_moves_nothing_else(name: str, shards: int) -> None:
    before, after = shard_of(name, shards), shard_of(name, shards + 1)
    assert 0 <= before < shards
    assert after in {before, shards}


def test_the_shard_of_a_name_never_changes() -> None:
    """Written down, so that a release that would send streams to other servers fails here."""
    assert [shard_of(f"gid://app/Room/{n}", 4) for n in range(12)] == [0, 3, 2, 2, 3, 2, 1, 3, 2, 3, 0, 1]


def test_streams_are_spread_evenly() -> None:
    counts = [0] * 4
    for n in range(4_000):
        counts[shard_of(f"gid://app/Room/{n}", 4)] += 1
    assert all(800 < count < 1_200 for count in counts)
