"""The `dramatiq` command as in production, with its own processes, and what it is to know and has delivered."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from broadcastable.durable_streams import DurableStreams
from broadcastable.settings import Settings
from tests.services import wait_until

ONE = ("-p", "1", "-t", "4")
"""One process of four threads."""


class Command:
    """A `dramatiq` command, with its worker processes in a process group of their own."""

    def __init__(self, log: Path, environment: dict[str, str], *arguments: str) -> None:
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dramatiq", *arguments],
                env=os.environ | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait_until_ready(self) -> Command:
        wait_until(
            lambda: "ready for action" in self.output or self._process.poll() is not None, within=60, what="the boot"
        )
        assert self._process.poll() is None, self.output
        return self

    def kill(self) -> None:
        """SIGKILL for the command and its workers."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def terminate(self) -> int:
        """SIGTERM as from a deploy; the exit status."""
        self._process.terminate()
        return self._process.wait(30)

    def wait(self) -> int:
        return self._process.wait(60)


def environment_of(settings: Settings) -> dict[str, str]:
    """*settings* for a worker."""
    values = {
        "REDIS_URL": settings.redis_url,
        "SERVER_URL": settings.server_urls[0],
        "SIGNING_KEY": settings.signing_key,
        "OUTBOX": settings.outbox,
        "NAMESPACE": settings.namespace,
        "DATABASE_URL": settings.database_url,
    }
    return {f"BROADCASTABLE_{name}": value for name, value in values.items() if value}


def numbers_in(streams: DurableStreams, stream: str) -> list[int]:
    """The `n` of every event on *stream*."""
    events: list[bytes] = []
    offset = "-1"
    while True:
        page = streams.client.read(stream, offset)
        events.extend(page.events)
        offset = page.next_offset
        if page.up_to_date:
            return [json.loads(event)["n"] for event in events]
