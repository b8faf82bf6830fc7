"""Whether a stream server is worth a try: when it gives no answer, one delivery at a time finds that out, not each.

A circuit breaker (Nygard, Release It!): closed while the server answers; open after requests without an answer; half
open for one delivery after each pause.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

FAILURES = 3
"""Requests in a row without an answer, from whichever threads, that open a circuit."""

PAUSE = 0.5
"""Seconds between two tries of a server that gives no answer."""


class Circuit:
    """What this process knows of one stream server. Thread safe.

    Args:
        server: The base URL, for the log.
        patience: Seconds after which a try is not waited for, and another one is let through.
    """

    def __init__(self, server: str, *, patience: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._server = server
        self._patience = patience
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._next_try = 0.0
        self.is_open = False

    @contextmanager
    def attempt(self) -> Iterator[bool]:
        """Whether a delivery may begin now. One that is let through an open circuit is the one that tries."""
        if not self.is_open:
            yield True
            return
        with self._lock:
            now = self._clock()
            until = None if now < self._next_try else now + self._patience
            if until is not None:
                self._next_try = until
        try:
            yield until is not None
        finally:
            with self._lock:
                # It had nothing to send, or was interrupted: somebody else may try at once.
                if until is not None and self._next_try == until:
                    self._next_try = self._clock()

    def answered(self) -> None:
        """The server has answered a request, with whatever."""
        if self._failures == 0:
            return
        with self._lock:
            self._failures, self._next_try = 0, 0.0
            was_open, self.is_open = self.is_open, False
        if was_open:
            log.info("The stream server at %s answers again", self._server)

    def unanswered(self, *, times: int = 1) -> None:
        """*times* requests in a row had no answer."""
        with self._lock:
            self._failures += times
            self._next_try = self._clock() + PAUSE
            opens = self._failures >= FAILURES and not self.is_open
            self.is_open = self.is_open or opens
        if opens:
            log.warning("The stream server at %s gives no answer; its streams wait until it does", self._server)
