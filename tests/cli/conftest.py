"""Runs commands in this process, where their settings can be overridden, and in others, as a person would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from broadcastable.cli.app import app

# What a background job of a shell has started inherits an ignored SIGINT; a person's command does not.
MAIN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from broadcastable.cli import main
main()
"""


@pytest.fixture
def run() -> Callable[..., Result]:
    """`run("keys", "show")` in this process; the result has `exit_code`, `stdout`, `stderr`."""

    def run(*arguments: str, **options: Any) -> Result:
        result = CliRunner().invoke(app, arguments, **options)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Command:
    """A command in a process of its own."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAIN, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding=environment.get("PYTHONIOENCODING", "utf-8"),
            env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "200", "NO_COLOR": "1", **environment},
        )

    def line(self, *, of: str = "stdout") -> str:
        """The next line it prints; the empty text when it has ended."""
        stream = getattr(self.process, of)
        text: str = stream.readline()
        return text.rstrip("\n")

    def end(self) -> tuple[int, str, str]:
        """Wait for its end; its exit code and the rest of what it printed."""
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@pytest.fixture
def start() -> Iterator[Callable[..., Command]]:
    """Starts commands in processes of their own; the keywords are their environment."""
    commands: list[Command] = []

    def start(*arguments: str, **environment: str) -> Command:
        commands.append(Command(*arguments, **environment))
        return commands[-1]

    yield start
    for command in commands:
        if command.process.poll() is None:
            command.process.kill()
        command.process.communicate()
