"""A process that dies by its own hand at a named step, for the kills that chance would seldom hit.

`CHAOS_KILL_AT` names the step and how many times to pass it first: `after append:3`.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Callable
from typing import Any


class Death:
    """Comes at one step. Thread safe; does nothing when the environment names none."""

    def __init__(self) -> None:
        self._wanted, _, passes = os.environ.get("CHAOS_KILL_AT", "").partition(":")
        self._left = int(passes or 0)
        self._lock = threading.Lock()

    def at(self, owner: Any, name: str, *, step: str | None = None) -> None:
        """Let it come before or after any call of the method *name* of *owner*, by the name of *step*."""
        setattr(owner, name, self.around(getattr(owner, name), step or name))

    def around(self, method: Callable[..., Any], step: str) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._pass(f"before {step}")
            result = method(*args, **kwargs)
            self._pass(f"after {step}")
            return result

        return call

    def _pass(self, step: str) -> None:
        if step != self._wanted:
            return
        with self._lock:
            self._left -= 1
            if self._left < 0:
                os.killpg(os.getpgid(0), signal.SIGKILL)
