"""The demo without a page: a script of commits, and a reader that is not ours.

The reader is the Durable Streams project's own Python client, over the network. What it is given decides the outcome.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any, NoReturn, Self, TypeVar

import durable_streams
import httpx

from broadcastable.cli.console import fail, out, step

from .chat import Chat
from .models import Message

PATIENCE = 15.0
"""Seconds to wait for the events of one step."""

BURST = 100
MOST_SHOWN = 3

T = TypeVar("T")


@dataclass(frozen=True)
class Arrival:
    """One event at the reader."""

    stream: str
    event: dict[str, Any]
    offset: str
    at: float

    @property
    def what(self) -> tuple[str, str, str]:
        """Which event it is, whatever it says."""
        return self.stream, self.event["headers"]["operation"], f"{self.event['type']}/{self.event['key']}"


class Inbox:
    """What all readers have been given so far, in order of arrival. Thread safe.

    Attributes:
        last_error: Why a reader was last given nothing; the empty text when none ever failed.
    """

    def __init__(self) -> None:
        self.last_error = ""
        self._arrived: list[Arrival] = []
        self._changed = threading.Condition()

    def put(self, arrivals: Sequence[Arrival]) -> None:
        with self._changed:
            self._arrived.extend(arrivals)
            self._changed.notify_all()

    def wait_for(self, count: int) -> list[Arrival]:
        """Everything, once there are *count* of them or patience has run out."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._arrived) >= count, PATIENCE)
            return list(self._arrived)


class Reader(threading.Thread):
    """Follows one stream from its present end, and from where it was after the server has been away."""

    def __init__(self, chat: Chat, name: str, inbox: Inbox) -> None:
        super().__init__(name=f"reader of {name}", daemon=True)
        self._chat = chat
        self._stream = name
        self._inbox = inbox
        self._offset = chat.durable_streams.stream_offset(name)
        self._url, self._token = chat.durable_streams.signed_stream_primitives(name)
        self._done = threading.Event()
        self._connected = threading.Event()
        self._client = httpx.Client(timeout=httpx.Timeout(30, connect=2), trust_env=False)

    def __enter__(self) -> Self:
        self.start()
        if not self._connected.wait(PATIENCE):
            self._done.set()
            _fail_without_events(self._inbox)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._done.set()

    def run(self) -> None:
        while not self._done.is_set():
            try:
                for event in self._events():
                    self._inbox.put(event)
            except (httpx.HTTPError, durable_streams.DurableStreamError) as error:
                self._inbox.last_error = f"{type(error).__name__}: {error}"
                self._done.wait(0.05)

    def _events(self) -> Iterator[list[Arrival]]:
        headers: dict[str, str | Callable[[], str]] = {"authorization": f"Bearer {self._token}"}
        with durable_streams.stream(
            self._url, offset=self._offset, live="sse", headers=headers, client=self._client
        ) as response:
            self._connected.set()
            for piece in response.iter_events("json"):
                now = time.perf_counter()
                yield [Arrival(self._stream, event, piece.next_offset, now) for event in piece.data]
                self._offset = piece.next_offset


class Story:
    """Does one thing after the other, prints what the readers get, and remembers what they should have got."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._expected: list[tuple[str, str, str]] = []
        self._took: list[float] = []
        self._commits = 0

    def tell(
        self,
        says: str,
        does: Callable[[], T],
        makes: Callable[[T], Sequence[tuple[str, str, str]]],
        *,
        commits: int = 1,
        timed: bool = True,
    ) -> T:
        """Do it, and wait for the events that it makes: stream, operation and type/key of each.

        *timed* says that the time until an event is a latency, and not that of an outage or a queue.

        Raises:
            typer.Exit: Nothing came of what had to. What follows would wait in vain too, so the reader's error is said.
        """
        seen = len(self._expected)
        out.print(f"[bold]{says}[/]")
        started = time.perf_counter()
        made = does()
        self._expected += makes(made)
        self._commits += commits
        arrived = self._inbox.wait_for(len(self._expected))[seen:]
        for each in arrived[:MOST_SHOWN]:
            took = (each.at - started) * 1_000
            if timed:
                self._took.append(took)
            _print_arrival(each, f"{took:.1f} ms" if timed else "")
        if len(arrived) > MOST_SHOWN:
            took = (arrived[-1].at - started) * 1_000
            out.print(f"  [dim]… and {len(arrived) - MOST_SHOWN} more, the last after {took:.0f} ms[/]")
        if not arrived:
            out.print("  [dim]nothing came[/]")
            if len(self._expected) > seen:
                _fail_without_events(self._inbox)
        return made

    def sum_up(self) -> bool:
        """Say how it went; whether each event came once, in order, and none else."""
        arrived = [each.what for each in self._inbox.wait_for(len(self._expected))]
        streams = {stream for stream, _, _ in (*self._expected, *arrived)}
        right = all(_on(stream, arrived) == _on(stream, self._expected) for stream in streams)
        if right:
            took = f"commit to reader {median(self._took):.1f} ms at the median, {max(self._took):.1f} ms at most"
            out.print(
                f"\n[bold green]All arrived[/]: {self._commits} commits, {len(arrived)} events on {len(streams)} "
                f"streams, each once and in order; {took}."
            )
        else:
            due, came = Counter(self._expected), Counter(arrived)
            missing, beyond = (due - came).total(), (came - due).total()
            out.print(
                f"\n[bold red]Not all arrived[/] once and in order: {due.total()} events were due on {len(streams)} "
                f"streams and {came.total()} came; {missing} are missing, {beyond} came twice or were not due"
                f"{'' if missing or beyond else ', and their order is another'}."
            )
        return right


def play(chat: Chat) -> bool:
    """Play the scenario; whether everything arrived that had to, once, in order, and nothing else."""
    lobby, kitchen = chat.rooms()[:2]
    in_lobby, in_kitchen = chat.stream_name(lobby), chat.stream_name(kitchen)
    of_lobby = chat.durable_streams.stream_name_from(lobby)
    inbox = Inbox()
    with ExitStack() as reading:
        with step("Connecting three readers"):
            for name in (in_lobby, in_kitchen, of_lobby):
                reading.enter_context(Reader(chat, name, inbox))
        out.print()
        story = Story(inbox)
        message, _ = story.tell(
            "Ada writes in the Lobby",
            lambda: chat.post(lobby.id, "Ada", "Hello"),
            lambda made: [(in_lobby, "insert", f"message/{made[0]}")],
        )
        key = f"message/{message}"
        story.tell("She corrects it", lambda: chat.edit(message, "Hello, world"), lambda _: [(in_lobby, "update", key)])
        story.tell(
            "It moves to the Kitchen",
            lambda: chat.move(message, kitchen.id),
            lambda _: [(in_lobby, "delete", key), (in_kitchen, "insert", key)],
        )
        story.tell("It is deleted there", lambda: chat.remove(message), lambda _: [(in_kitchen, "delete", key)])
        story.tell(
            "The Lobby gets another name",
            lambda: chat.rename_room(lobby.id, "Foyer" if lobby.name == "Lobby" else "Lobby"),
            lambda _: [(of_lobby, "update", f"room/{lobby.id}")],
        )
        story.tell(
            "A transaction is rolled back", lambda: _roll_back(chat, lobby.id), lambda _: [], commits=0, timed=False
        )
        story.tell(
            f"{BURST} messages, each a transaction of its own",
            lambda: [chat.post(lobby.id, "Ada", f"Message {number}")[0] for number in range(1, BURST + 1)],
            lambda made: [(in_lobby, "insert", f"message/{each}") for each in made],
            commits=BURST,
            timed=False,
        )
        with step("Stopping the stream server"):
            chat.let_stream_server_run(False)
        late, _ = story.tell(
            "Ada writes while it is away; then it returns",
            lambda: _meanwhile(chat, lambda: chat.post(lobby.id, "Ada", "Is anybody there?")),
            lambda made: [(in_lobby, "insert", f"message/{made[0]}")],
            timed=False,
        )
        story.tell(
            "And all is as before", lambda: chat.remove(late), lambda _: [(in_lobby, "delete", f"message/{late}")]
        )
        return story.sum_up()


def _fail_without_events(inbox: Inbox) -> NoReturn:
    fail(f"The reader was given nothing in {PATIENCE:g} s. Its last error: {inbox.last_error or 'none'}")


def _meanwhile(chat: Chat, does: Callable[[], T]) -> T:
    made = does()
    chat.let_stream_server_run(True)
    return made


def _roll_back(chat: Chat, room_id: int) -> None:
    with chat.sessions() as session:
        session.add(Message(room_id=room_id, author="Ada", body="Never said"))
        session.flush()
        session.rollback()


def _on(stream: str, events: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    return [event for event in events if event[0] == stream]


def _print_arrival(arrival: Arrival, took: str) -> None:
    _, operation, what = arrival.what
    colour = {"insert": "green", "update": "yellow", "delete": "red"}[operation]
    out.print(
        f"  [{colour}]{operation:6}[/] {what:12} {took:>8}  [dim]{arrival.stream}  offset …{arrival.offset[-6:]}  "
        f"txid {arrival.event['headers']['txid'][:8]}[/]"
    )
