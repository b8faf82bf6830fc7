"""Programs of an example, run as a reader would run them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import httpx

EXAMPLES = Path(__file__).parents[2] / "examples"
DEADLINE = 30.0

T = TypeVar("T")


@contextmanager
def running(*command: str, directory: Path, environ: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m` *command* in *directory*, ended with SIGTERM; what it prints goes to *log*."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(directory), **environ},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def until(condition: Callable[[], T | None], log: Path) -> T:
    """What *condition* gives once it gives something; the log is shown when that takes too long."""
    deadline = time.monotonic() + DEADLINE
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"It did not happen in {DEADLINE:g} s. The log:\n{log.read_text()}")
        time.sleep(0.05)


def answers(client: httpx.Client, path: str) -> bool:
    try:
        return client.get(path).status_code == 200
    except httpx.TransportError:
        return False
