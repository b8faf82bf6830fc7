"""Readers of the file store while it is written: every event once, whatever the moment of the read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from broadcastable.server.embedded import EmbeddedServer, embedded_server

EVENTS = 30


def test_readers_that_poll_during_appends_are_given_every_event_once(tmp_path: Path) -> None:
    with embedded_server(data_dir=tmp_path) as server, httpx.Client(headers=_headers(server)) as client:
        url = f"{server.url}/rooms/1"
        client.put(url, headers={"Content-Type": "application/json"}).raise_for_status()
        with ThreadPoolExecutor(4) as readers:
            reading = [readers.submit(_follow, server, url) for _ in range(4)]
            for n in range(EVENTS):
                client.post(url, json=[n]).raise_for_status()
            for reader in reading:
                assert reader.result(30) == list(range(EVENTS))


def _headers(server: EmbeddedServer) -> dict[str, str]:
    return {"Authorization": f"Bearer {server.gatekeeper.server_token()}"}


def _follow(server: EmbeddedServer, url: str) -> list[int]:
    seen: list[int] = []
    offset = "-1"
    with httpx.Client(headers=_headers(server), timeout=30) as client:
        while len(seen) < EVENTS:
            answer = client.get(url, params={"offset": offset, "live": "long-poll"})
            seen += answer.json() if answer.status_code == 200 else []
            assert answer.headers["stream-next-offset"] >= offset or offset == "-1"
            offset = answer.headers["stream-next-offset"]
    return seen
