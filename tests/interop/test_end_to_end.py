"""From a commit to a row on a page that nobody here wrote."""

from __future__ import annotations

import datetime
import decimal
import uuid
from collections.abc import Callable

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from broadcastable.durable_streams import DurableStreams
from broadcastable.errors import StreamClosed
from broadcastable.transactions import confirm_txid
from tests.interop.application import Application, http_front
from tests.interop.conftest import Page, Server
from tests.interop.models import Colour, Message, Room, Sample

MESSAGES = {"messages": ("message", "id")}
ROOMS = {"rooms": ("room", "id")}
SAMPLES = {"samples": ("sample", "id")}


@pytest.fixture
def app(server: Server, open_application: Callable[..., Application], request: pytest.FixtureRequest) -> Application:
    """The application, with a gid of its own so that no other test has its streams."""
    return open_application(server, gid_app=f"app{id(request):x}")


@pytest.fixture
def lobby(app: Application) -> str:
    """The stream of everything, without what other tests left there."""
    app.durable_streams.delete_stream("lobby")
    app.provision("lobby")
    return "lobby"


def room_stream(app: Application, *names: str) -> str:
    return "/".join([f"gid://{app.durable_streams.settings.gid_app}/Room/1", *names])


def test_a_committed_row_is_on_the_page_and_its_txid_is_seen(app: Application, page: Page) -> None:
    messages = room_stream(app, "messages")
    app.provision(messages)
    page.open(messages, MESSAGES)
    assert page.rows("messages") == []
    seen = app.commit(Room(id=1, name="Lobby"), Message(id="m1", room_id=1, body="hello"))
    page.await_txid(seen)
    assert page.rows("messages") == [{"id": "m1", "room_id": "1", "body": "hello"}]


def test_what_was_rolled_back_never_comes(app: Application, page: Page) -> None:
    messages = room_stream(app, "messages")
    app.provision(messages)
    page.open(messages, MESSAGES)
    with app.session() as session:
        session.add(Room(id=1, name="Lobby"))
        with pytest.raises(ZeroDivisionError), session.begin_nested():
            session.add(Message(id="m1", room_id=1, body="in a savepoint that fails"))
            session.flush()
            raise ZeroDivisionError
        session.add(Message(id="m2", room_id=1, body="beside it"))
        session.commit()
        session.add(Message(id="m3", room_id=1, body="in a transaction that fails"))
        session.flush()
        session.rollback()
    page.await_txid(app.commit(Message(id="m4", room_id=1, body="after it")))
    assert [row["id"] for row in page.rows("messages")] == ["m2", "m4"]


def test_edits_and_deletes_show(app: Application, page: Page) -> None:
    messages = room_stream(app, "messages")
    app.commit(
        Room(id=1, name="Lobby"),
        Message(id="m1", room_id=1, body="hello"),
        Message(id="m2", room_id=1, body="oops"),
    )
    assert app.durable_streams.drain()
    page.open(messages, MESSAGES)

    def change(session: Session) -> None:
        session.get_one(Message, "m1").body = "hello you"
        session.delete(session.get_one(Message, "m2"))

    page.await_txid(app.change(change))
    assert page.rows("messages") == [{"id": "m1", "room_id": "1", "body": "hello you"}]


def test_a_message_that_moves_leaves_one_page_and_comes_to_the_other(app: Application, page: Page) -> None:
    other = room_stream(app, "messages").replace("/1/", "/2/")
    app.commit(Room(id=1, name="A"), Room(id=2, name="B"), Message(id="m1", room_id=1, body="hello"))
    app.provision(other)
    assert app.durable_streams.drain()
    page.open(room_stream(app, "messages"), MESSAGES, name="one")
    page.open(other, MESSAGES, name="other")

    def move(session: Session) -> None:
        session.get_one(Message, "m1").room_id = 2

    page.await_txid(app.change(move), "one", "other")
    assert page.rows("messages", "one") == []
    assert page.rows("messages", "other") == [{"id": "m1", "room_id": "2", "body": "hello"}]


def test_rows_of_two_collections_are_joined_on_their_foreign_key(app: Application, page: Page, lobby: str) -> None:
    """From one stream and from two."""
    messages, room = room_stream(app, "messages"), room_stream(app)
    app.provision(messages, room)
    page.open(lobby, MESSAGES | ROOMS)
    page.open(messages, MESSAGES, name="messages")
    page.open(room, ROOMS, name="room")
    page.node.do("join", name="in one", **{"from": "db.messages"}, to="db.rooms", by="room_id")
    page.node.do("join", name="in two", **{"from": "messages.messages"}, to="room.rooms", by="room_id")
    seen = app.commit(Room(id=1, name="Lobby"), Message(id="m1", room_id=1, body="hello"))
    page.await_txid(seen, "db", "messages", "room")
    expected = [
        [
            {"id": "m1", "room_id": "1", "body": "hello"},
            {"id": "1", "name": "Lobby", "messages_count": 0},
        ]
    ]
    assert page.node.do("joined", name="in one") == expected
    assert page.node.do("joined", name="in two") == expected


SAMPLE = Sample(
    id=1,
    integer=-7,
    big=2**60 + 1,
    ratio=0.1,
    price=decimal.Decimal("12.30"),
    flag=True,
    text="žluť 寿司 🍣 \u2028 \"'\\ </script> \u0001\t",
    missing=None,
    moment=datetime.datetime(2025, 1, 15, 12, 30, 0, 125, tzinfo=datetime.timezone(datetime.timedelta(hours=2))),
    naive=datetime.datetime(2025, 1, 15, 10, 30),
    day=datetime.date(2025, 1, 15),
    hour=datetime.time(10, 30, 0, 500_000),
    lasting=datetime.timedelta(days=1, hours=2, seconds=3.5),
    token=uuid.UUID(int=7),
    blob=b"\x00\xff\xfe",
    colour=Colour.BLUE,
    document={"list": [1, None, {"deep": True}], "": "empty key"},
)

AS_THE_PAGE_HAS_IT = {
    "id": "1",
    "integer": -7,
    "big": "1152921504606846977",
    "ratio": 0.1,
    "price": "12.30",
    "flag": True,
    "text": "žluť 寿司 🍣 \u2028 \"'\\ </script> \u0001\t",
    "missing": None,
    "moment": "2025-01-15T10:30:00.000125Z",
    "naive": "2025-01-15T10:30:00Z",
    "day": "2025-01-15",
    "hour": "10:30:00.500000",
    "lasting": "P1DT7203.5S",
    "token": "00000000-0000-0000-0000-000000000007",
    "blob": "AP/+",
    "colour": "blue",
    "document": {"list": [1, None, {"deep": True}], "": "empty key"},
}


def test_a_value_of_every_type_comes_through(
    server: Server, open_application: Callable[..., Application], page: Page, postgres_url: str
) -> None:
    app = open_application(server, database_url=postgres_url)
    app.provision("samples")
    page.open("samples", SAMPLES)
    values = {name: value for name, value in vars(SAMPLE).items() if name != "_sa_instance_state"}
    page.await_txid(app.commit(Sample(**values)))
    assert page.rows("samples") == [AS_THE_PAGE_HAS_IT]

    def empty(session: Session) -> None:
        sample = session.get_one(Sample, 1)
        sample.text, sample.missing, sample.document, sample.blob = "", "something now", [], b""

    page.await_txid(app.change(empty))
    emptied = {"text": "", "missing": "something now", "document": [], "blob": ""}
    # What an update does not name is merged by the client, so only the next one shows that nulls are written out.
    assert page.rows("samples") == [AS_THE_PAGE_HAS_IT | emptied]
    page.await_txid(app.change(lambda session: setattr(session.get_one(Sample, 1), "missing", None)))
    assert page.rows("samples") == [AS_THE_PAGE_HAS_IT | emptied | {"missing": None}]
    app.durable_streams.delete_stream("samples")


def test_an_optimistic_row_stands_once_its_txid_is_seen_on_three_streams(
    app: Application, page: Page, lobby: str
) -> None:
    messages, room = room_stream(app, "messages"), room_stream(app)
    app.commit(Room(id=1, name="Lobby"))
    app.provision(messages)
    assert app.durable_streams.drain()
    for name, stream in {"messages": messages, "room": room, "lobby": lobby}.items():
        page.open(stream, MESSAGES | ROOMS, name=name)

    def post_message(document: dict[str, str]) -> str:
        def change(session: Session) -> None:
            session.add(Message(id=document["id"], room_id=int(document["room_id"]), body=document["body"].strip()))
            session.get_one(Room, 1).messages_count += 1

        return app.change(change)

    with http_front(post_message) as url:
        shown = page.node.do(
            "act",
            collection="messages.messages",
            row={"id": "m1", "room_id": "1", "body": "  hello  "},
            request={"url": url},
            dbs=["messages", "room", "lobby"],
        )
    assert shown["optimistic"] == [{"id": "m1", "room_id": "1", "body": "  hello  "}]
    assert shown["confirmed"] == [{"id": "m1", "room_id": "1", "body": "hello"}]
    assert page.rows("messages", "lobby") == shown["confirmed"]
    assert page.rows("rooms", "room") == [{"id": "1", "name": "Lobby", "messages_count": 1}]


def test_an_optimistic_row_that_the_application_refuses_is_taken_back_by_its_txid(app: Application, page: Page) -> None:
    """A request that changes nothing: without the marker the page would wait for a txid that never comes."""
    messages = room_stream(app, "messages")
    app.commit(Room(id=1, name="Lobby"))
    app.provision(messages)
    page.open(messages, MESSAGES)

    def refuse(document: dict[str, str]) -> str:
        def change(session: Session) -> None:
            if session.get_one(Room, int(document["room_id"])).name == "Lobby":
                confirm_txid(session, messages)

        return app.change(change)

    with http_front(refuse) as url:
        shown = page.node.do(
            "act",
            collection="db.messages",
            row={"id": "m1", "room_id": "1", "body": "spam"},
            request={"url": url},
            dbs=["db"],
        )
    assert [row["id"] for row in shown["optimistic"]] == ["m1"]
    assert shown["confirmed"] == []


def test_ten_thousand_rows_are_there_for_a_page_that_watched_and_for_one_that_comes_later(
    app: Application, page: Page, open_page: Callable[[Server], Page], server: Server
) -> None:
    messages = room_stream(app, "messages")
    app.commit(Room(id=1, name="Lobby"))
    app.provision(messages)
    page.open(messages, MESSAGES)
    for first in range(0, 10_000, 500):
        last = app.commit(*(Message(id=f"{n:05}", room_id=1, body=f"message {n}") for n in range(first, first + 500)))
    assert app.durable_streams.drain(60)
    page.await_txid(last, timeout=60)
    expected = [{"id": f"{n:05}", "room_id": "1", "body": f"message {n}"} for n in range(10_000)]
    assert [event["key"] for event in page.events()] == [row["id"] for row in expected]
    assert sorted(page.rows("messages"), key=lambda row: row["id"]) == expected
    later = open_page(server)
    later.open(messages, MESSAGES)
    assert sorted(later.rows("messages"), key=lambda row: row["id"]) == expected


def test_a_page_and_the_application_catch_up_when_the_server_was_away(
    restartable: Server, open_page: Callable[[Server], Page], open_application: Callable[..., Application]
) -> None:
    app, page = open_application(restartable), open_page(restartable)
    messages = room_stream(app, "messages")
    app.commit(Room(id=1, name="Lobby"), Message(id="m0", room_id=1, body="before"))
    assert app.durable_streams.drain()
    page.open(messages, MESSAGES)
    restartable.stop()
    for n in range(1, 4):
        last = app.commit(Message(id=f"m{n}", room_id=1, body="while it was away"))
    restartable.start()
    page.await_txid(last, timeout=60)
    page.await_txid(app.commit(Message(id="m4", room_id=1, body="after")), timeout=60)
    assert [event["key"] for event in page.read(messages)["items"]] == [f"m{n}" for n in range(5)]
    assert [event["key"] for event in page.events()] == [f"m{n}" for n in range(5)]
    assert [row["id"] for row in page.rows("messages")] == [f"m{n}" for n in range(5)]


def test_the_plain_client_reads_on_from_an_offset(app: Application, page: Page) -> None:
    messages = room_stream(app, "messages")
    app.commit(Room(id=1, name="Lobby"), Message(id="m1", room_id=1, body="one"))
    assert app.durable_streams.drain()
    first = page.read(messages)
    assert [event["key"] for event in first["items"]] == ["m1"]
    assert first["offset"] == app.durable_streams.stream_offset(messages)
    app.commit(Message(id="m2", room_id=1, body="two"))
    assert app.durable_streams.drain()
    assert [event["key"] for event in page.read(messages, first["offset"])["items"]] == ["m2"]


@pytest.mark.parametrize("change", ["closed", "another lifetime"])
def test_a_process_that_never_saw_a_stream_follows_it_as_it_is(app: Application, page: Page, change: str) -> None:
    """Its PUT is a conflict on every server, and none says why."""
    messages = room_stream(app, "messages")
    app.commit(Room(id=1, name="Lobby"), Message(id="m1", room_id=1, body="one"))
    assert app.durable_streams.drain()
    ttl = None
    if change == "closed":
        app.durable_streams.close_stream(messages)
    else:
        ttl = 3_600
    with DurableStreams(app.durable_streams.settings, stream_ttl=ttl) as later:
        assert later.stream_offset(messages) == app.durable_streams.stream_offset(messages)
        if ttl is None:
            with pytest.raises(StreamClosed):
                later.broadcast_to(messages, n=2)
        else:
            later.broadcast_to(messages, n=2)
    assert [event.get("key") for event in page.read(messages)["items"]] == ["m1", *([None] if ttl else [])]


def test_the_events_of_one_transaction_come_to_the_page_at_once(app: Application, page: Page) -> None:
    """All with the same txid, in the order in which they were flushed."""
    messages = room_stream(app, "messages")
    app.provision(messages)
    page.open(messages, MESSAGES)
    seen = app.commit(Room(id=1, name="Lobby"), *(Message(id=f"m{n}", room_id=1, body="hello") for n in range(20)))
    page.await_txid(seen)
    events = page.events()
    assert [event["key"] for event in events] == [f"m{n}" for n in range(20)]
    assert {event["headers"]["txid"] for event in events} == {seen}


def test_statements_past_the_unit_of_work_do_not_disturb_the_page(app: Application, page: Page) -> None:
    """What is not captured changes nothing on the page, and the next change of the row brings it whole."""
    messages = room_stream(app, "messages")
    app.commit(Room(id=1, name="Lobby"), Message(id="m1", room_id=1, body="one"))
    assert app.durable_streams.drain()
    page.open(messages, MESSAGES)
    with app.engine.begin() as connection:
        connection.execute(sa.text("UPDATE messages SET body = 'past it'"))
    page.await_txid(app.change(lambda session: setattr(session.get_one(Message, "m1"), "body", "seen")))
    assert page.rows("messages") == [{"id": "m1", "room_id": "1", "body": "seen"}]
