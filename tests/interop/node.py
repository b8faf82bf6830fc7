"""Node processes that the tests talk to, and a page made of the published clients."""

from __future__ import annotations

import itertools
import json
import queue
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def node() -> str:
    """The path of Node, once its packages are there too; nothing is skipped without them."""
    found = shutil.which("node")
    if found is None or not (HERE / "node_modules").is_dir():
        raise RuntimeError("The interop tests need Node 20 and its packages: npm install --prefix tests/interop")
    return found


class NodeProcess:
    """One of the scripts beside this file. Commands may overlap: one that waits does not hold up the others."""

    def __init__(self, script: str) -> None:
        self._process = subprocess.Popen(
            [node(), str(HERE / script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._numbers = itertools.count()
        self._answers: dict[int, queue.Queue[dict[str, Any]]] = {}
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            self._answers[message["id"]].put(message)
        for waiting in list(self._answers.values()):
            waiting.put({"error": "the Node process has ended"})

    def begin(self, command: str, **options: Any) -> queue.Queue[dict[str, Any]]:
        """Send a command without waiting for its answer; see `end`."""
        number = next(self._numbers)
        answer = self._answers[number] = queue.Queue()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"id": number, "command": command, **options}) + "\n")
        self._process.stdin.flush()
        return answer

    def end(self, answer: queue.Queue[dict[str, Any]], timeout: float = 30.0) -> Any:
        """What the script answered; an error that it answered is raised."""
        message = answer.get(timeout=timeout)
        if "error" in message:
            raise NodeError(message["error"])
        return message["result"]

    def do(self, command: str, *, timeout: float = 30.0, **options: Any) -> Any:
        """Send a command and wait for its answer."""
        return self.end(self.begin(command, **options), timeout)

    def close(self) -> None:
        """End the process: it leaves when its input ends, or is killed after ten seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join()
        self._process.stdout.close()


class NodeError(Exception):
    """An error that the script answered, as its name and message."""
