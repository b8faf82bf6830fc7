"""`status` and `outbox`: what waits, and what to do about it, on a real Valkey."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from broadcastable.durable_streams import current
from broadcastable.events import Batch
from broadcastable.outbox import Outbox
from broadcastable.server.embedded import EmbeddedServer
from broadcastable.settings import override
from broadcastable.sweeper import Sweeper
from broadcastable.tokens import generate_key_pair
from tests.services import free_port, wait_until

from .conftest import Command

Run = Callable[..., Any]
Start = Callable[..., Command]


@pytest.fixture
def outbox(valkey_url: str) -> Iterator[Outbox]:
    """The redis outbox of an application whose stream server is away."""
    with override(
        outbox="redis",
        redis_url=valkey_url,
        server_url=f"http://127.0.0.1:{free_port()}/v1/streams",
        signing_key=generate_key_pair().private_pem,
    ):
        yield current().outbox
        current().close()


def put(outbox: Outbox, stream: str, events: int = 1, batches: int = 1) -> None:
    outbox.put([Batch(stream=stream, events=(b'{"a":1}',) * events, txid="t") for _ in range(batches)])


def park(outbox: Outbox, stream: str, error: str) -> None:
    frame = outbox.claim(stream, lease_for=10)
    assert frame is not None
    outbox.park(frame, error)


def test_nothing_waits(outbox: Outbox, run: Run) -> None:
    result = run("status", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "outbox": "redis",
        "streams": 0,
        "batches": 0,
        "events": 0,
        "oldest_age_seconds": None,
        "frames_per_second": 0.0,
        "events_per_second": 0.0,
        "parked": [],
    }
    assert run("outbox", "list").stdout.strip() == "Nothing waits."


def test_what_waits_is_counted(outbox: Outbox, run: Run) -> None:
    put(outbox, "one", events=3, batches=2)
    put(outbox, "gid://app/Room/1")
    summary = json.loads(run("status", "--json").stdout)
    assert (summary["streams"], summary["batches"], summary["events"]) == (2, 3, 7)
    assert 0 <= summary["oldest_age_seconds"] < 60
    shown = run("status").stdout
    assert "7 events in 3 batches for 2 streams wait" in shown
    assert "gid://app/Room/1" in shown
    listed = [json.loads(line) for line in run("outbox", "list", "--json").stdout.splitlines()]
    assert {each["stream"]: each["events"] for each in listed} == {"one": 6, "gid://app/Room/1": 1}
    assert json.loads(run("outbox", "list", "Room/1", "--json").stdout)["batches"] == 1


def test_what_the_workers_deliver_is_shown(outbox: Outbox, run: Run, stream_server: EmbeddedServer) -> None:
    """They tell the store in their sweeps, so it is seen from a process that delivers nothing itself."""
    with override(server_url=stream_server.url, signing_key=stream_server.settings.signing_key):
        durable_streams = current()
        put(durable_streams.outbox, "status/one", events=3)
        sweeper = Sweeper(durable_streams.outbox, durable_streams.relay.deliver)
        sweeper.start()
        wait_until(lambda: outbox.rate().frames_per_second, what="the sweep after the delivery")
        sweeper.stop()
        assert sweeper.join(10)
        durable_streams.close()
    shown = run("status").stdout
    assert "0.3 events/s delivered in 0.1 frames/s" in shown
    summary = json.loads(run("status", "--json").stdout)
    assert (summary["frames_per_second"], summary["events_per_second"]) == (0.1, 0.3)


def test_a_parked_stream_is_shown_and_fails_the_command(outbox: Outbox, run: Run) -> None:
    put(outbox, "one")
    park(outbox, "one", "409: the stream is closed [sic]")
    result = run("status")
    assert result.exit_code == 1
    assert "parked: 409: the stream is closed [sic]" in result.stdout
    assert json.loads(run("status", "--json").stdout)["parked"][0]["stream"] == "one"


def test_watch_prints_it_again_and_again_where_there_is_no_terminal(
    outbox: Outbox, valkey_url: str, start: Start
) -> None:
    """Such as into `head`."""
    put(outbox, "one", events=3)
    watch = start(
        "status", "--watch", "--every", "0.1", BROADCASTABLE_OUTBOX="redis", BROADCASTABLE_REDIS_URL=valkey_url
    )
    for _ in range(3):
        while "3 events in 1 batches" not in watch.line():
            assert watch.process.poll() is None
    watch.process.send_signal(signal.SIGINT)
    code, _, err = watch.end()
    assert code == 0
    assert "Traceback" not in err


def test_retry_lets_a_parked_stream_go_on(outbox: Outbox, run: Run) -> None:
    put(outbox, "one")
    park(outbox, "one", "closed")
    assert run("outbox", "retry", "one").exit_code == 0
    assert outbox.pending()[0].parked is None
    assert run("outbox", "retry", "other").exit_code == 1


def test_drop_asks_first(outbox: Outbox, run: Run) -> None:
    put(outbox, "one", events=2)
    assert run("outbox", "drop", "one", input="n\n").exit_code == 1
    assert outbox.pending()[0].events == 2
    result = run("outbox", "drop", "one", "--yes")
    assert "2 events of one are thrown away" in result.stdout
    assert outbox.pending() == []
    assert run("outbox", "drop", "one", "--yes").exit_code == 1


def test_a_memory_outbox_is_said_to_be_out_of_sight(run: Run) -> None:
    with override(outbox="memory"):
        result = run("status")
        current().close()
    assert result.exit_code == 0
    assert "no other can look into" in result.stderr.replace("\n", " ")


def test_a_redis_that_is_away_is_one_sentence(run: Run) -> None:
    with override(outbox="redis", redis_url=f"redis://127.0.0.1:{free_port()}/0"):
        result = run("status")
        current().close()
    assert result.exit_code == 1
    assert "Not done." in result.stderr
