"""examples/flask_board: its own tests, and the whole of it over HTTP."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx

from tests.services import free_port

from .processes import EXAMPLES, answers, running, until

HERE = EXAMPLES / "flask_board"


def test_its_own_tests_pass(tmp_path: Path):
    shutil.copytree(HERE, tmp_path / "board", ignore=shutil.ignore_patterns("board.db*", "streams", "__pycache__"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "."],
        cwd=tmp_path / "board",
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "16 passed" in done.stdout


def test_a_card_travels_from_request_to_reader_and_survives_a_restart(tmp_path: Path):
    """The page's rows are the snapshot and what follows it; the streams are on disk, so it reads on after a restart."""
    board = tmp_path / "board"
    shutil.copytree(HERE, board, ignore=shutil.ignore_patterns("board.db*", "streams", "__pycache__"))
    log = tmp_path / "log"
    port = free_port()
    environ = {"PORT": str(port), "STREAM_PORT": str(free_port())}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        with running("board", directory=board, environ=environ, log=log):
            until(lambda: answers(client, "/snapshot"), log)
            snapshot = client.get("/snapshot").json()
            card = client.post("/cards", json={"title": "Water the plants"}).json()
            moved = client.patch(f"/cards/{card['id']}", json={"column": "doing"}).json()

            events = until(lambda: following(snapshot, 2), log)

            assert [event["headers"]["txid"] for event in events] == [card["txid"], moved["txid"]]
            assert events[1]["value"]["column"] == "doing"
            assert client.get("/").status_code == client.get("/broadcastable.js").status_code == 200
            assert client.get("/streams/token?stream=other").status_code == 403

        with running("board", directory=board, environ=environ, log=log):
            until(lambda: answers(client, "/snapshot"), log)
            again = client.get("/snapshot").json()
            assert again["url"] == snapshot["url"]
            assert httpx.get(snapshot["url"], params={"offset": "-1", "token": snapshot["token"]}).status_code == 401
            client.delete(f"/cards/{card['id']}")

            (deleted,) = until(lambda: following(again, 1), log)

            assert [event["value"]["title"] for event in again["events"]] == ["Water the plants"]
            assert (deleted["key"], deleted["headers"]["operation"]) == (str(card["id"]), "delete")
            whole = httpx.get(again["url"], params={"offset": "-1", "token": again["token"]}).json()
            assert [event["headers"]["operation"] for event in whole] == ["insert", "update", "delete"]


def following(snapshot: dict[str, str], count: int) -> list[dict[str, dict[str, str]]] | None:
    params = {"offset": snapshot["offset"], "token": snapshot["token"]}
    events: list[dict[str, dict[str, str]]] = httpx.get(snapshot["url"], params=params).raise_for_status().json()
    return events if len(events) == count else None
