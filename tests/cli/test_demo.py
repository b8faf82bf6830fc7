"""`demo --once`, and what the demo says when it cannot start. Its page is tested in a browser."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest

from broadcastable.cli.demo.scenario import Arrival, Inbox, Story
from broadcastable.tokens import generate_key_pair

from .conftest import Command

Start = Callable[..., Command]


def test_once_plays_everything_to_a_reader_that_is_not_ours(start: Start) -> None:
    """108 events on three streams through the published client, over an outage too."""
    code, out, err = start("demo", "--once").end()
    assert code == 0, out + err
    assert "All arrived: 107 commits, 108 events on 3 streams, each once and in order" in out
    assert "nothing came" in out
    assert "Traceback" not in err


def test_it_goes_on_with_the_data_of_the_last_time(start: Start, tmp_path: Any) -> None:
    for _ in range(2):
        code, out, err = start("demo", "--once", "--data-dir", str(tmp_path / "kept")).end()
        assert code == 0, out + err


def arrival(operation: str, key: int, stream: str = "room") -> Arrival:
    event = {"type": "message", "key": str(key), "headers": {"operation": operation, "txid": "0" * 36}}
    return Arrival(stream, event, "0", 1e12)


@pytest.mark.parametrize(
    "arrived",
    [
        [],
        [arrival("insert", 1)],
        [arrival("insert", 2), arrival("insert", 1)],
        [arrival("insert", 1), arrival("insert", 1), arrival("insert", 2)],
        [arrival("insert", 1), arrival("insert", 2), arrival("update", 2)],
        [arrival("insert", 1), arrival("insert", 2, "other")],
    ],
    ids=["nothing", "one missing", "out of order", "one twice", "one too many", "on another stream"],
)
def test_the_scenario_fails_unless_all_arrive_once_and_in_order(
    arrived: list[Arrival], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broadcastable.cli.demo.scenario.PATIENCE", 0.05)
    inbox = Inbox()
    story = Story(inbox)
    due = [("room", "insert", "message/1"), ("room", "insert", "message/2")]
    story.tell("Two messages", lambda: inbox.put(arrived), lambda _: due)
    assert story.sum_up() is False


def test_a_port_in_use_is_one_sentence(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = start("demo", "--no-open", "--port", str(port)).end()
    assert code == 1
    assert f"Port {port} on 127.0.0.1 is in use" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("missing", ["rakaia", "uvicorn", "starlette"])
def test_a_missing_extra_is_one_sentence(missing: str, start: Start, tmp_path: Any) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{missing!r}] = None\n")
    code, _, err = start("demo", "--no-open", PYTHONPATH=str(tmp_path)).end()
    assert code == 1
    assert "pip install 'broadcastable[" in err
    assert "Traceback" not in err


def test_a_missing_reader_is_one_sentence(start: Start, tmp_path: Any) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['durable_streams'] = None\n")
    code, _, err = start("demo", "--once", PYTHONPATH=str(tmp_path)).end()
    assert code == 1
    assert "pip install 'broadcastable[demo]'" in err


@pytest.mark.parametrize("key", ["nowhere.pem", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----"])
def test_a_key_that_is_of_no_use_is_one_sentence(key: str, start: Start) -> None:
    code, _, err = start("demo", "--no-open", BROADCASTABLE_SIGNING_KEY=key).end()
    assert code == 1
    assert "keys generate" in err
    assert "Traceback" not in err


def test_a_key_of_the_environment_is_used(start: Start) -> None:
    code, out, err = start("demo", "--once", BROADCASTABLE_SIGNING_KEY=generate_key_pair().private_pem).end()
    assert code == 0, out + err
