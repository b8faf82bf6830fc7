"""The worker of the embedded default: Dramatiq's StubBroker and a worker with a few threads, inside the application.

Nothing is global: no broker is set, and nothing starts before the first wake-up.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import multiprocessing.util
import os
import queue
import threading
import time
import weakref

import dramatiq
from dramatiq.brokers.stub import StubBroker
from dramatiq.common import dq_name

from .delivery import Delivering, DeliveryMiddleware
from .wakeups import enqueue, queue_name

log = logging.getLogger(__name__)

THREADS = 4

EXIT_GRACE = 3.0
"""Seconds that the interpreter's exit waits for deliveries under way. A killed process waits for nothing."""

# How long a worker's idle thread takes to see that it should stop.
_IDLE_MILLISECONDS = 100


class InProcessWorker:
    """Delivers the streams of one `DurableStreams` by threads of this process.

    Thread safe. A forked child begins anew with its own threads at its first wake-up. All threads are daemons; what is
    under way when the interpreter exits gets *exit_grace* seconds.

    Args:
        durable_streams: Whose streams; its relay is called from *threads* threads.
        exit_grace: Seconds that exit may take; 0 does not wait.
    """

    def __init__(self, durable_streams: Delivering, *, threads: int = THREADS, exit_grace: float = EXIT_GRACE) -> None:
        self._durable_streams = durable_streams
        self._threads = threads
        self._exit_grace = exit_grace
        self._reset()
        _workers.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._broker: StubBroker | None = None
        self._worker: dramatiq.Worker | None = None
        self._middleware = DeliveryMiddleware(self._durable_streams)

    @property
    def broker(self) -> StubBroker:
        """The broker to send wake-ups to. Starts the worker when there is none yet."""
        with self._lock:
            if self._broker is None:
                self._broker, self._worker = self._start()
            return self._broker

    def _start(self) -> tuple[StubBroker, dramatiq.Worker]:
        broker = StubBroker(middleware=[self._middleware])
        worker = dramatiq.Worker(broker, worker_threads=self._threads, worker_timeout=_IDLE_MILLISECONDS)
        worker.start()
        atexit.register(self._exit)
        if multiprocessing.parent_process() is not None:
            # A child of multiprocessing may leave without running atexit; this it does run.
            multiprocessing.util.Finalize(None, self._exit, exitpriority=0)
        return broker, worker

    def drain(self, timeout: float) -> bool:
        """Wait until nothing is pending but parked streams; False when *timeout* seconds were not enough.

        With an outbox that other processes share, their batches count too.
        """
        deadline = time.monotonic() + timeout
        while True:
            if not self._wait_until_idle(deadline):
                return False
            left = [pending.stream for pending in self._durable_streams.outbox.pending() if pending.parked is None]
            if not left:
                return True
            if time.monotonic() >= deadline:
                return False
            enqueue(self.broker, self._durable_streams.settings.namespace, left)
            time.sleep(min(0.05, max(0.0, deadline - time.monotonic())))  # for one that another worker holds

    def _wait_until_idle(self, deadline: float) -> bool:
        """Whether every wake-up queued in this process has been seen to before *deadline*."""
        with self._lock:
            broker = self._broker
        if broker is None:
            return True
        name = queue_name(self._durable_streams.settings.namespace)
        return all(_join(broker.queues[each], deadline) for each in (name, dq_name(name)))

    def close(self, timeout: float = EXIT_GRACE) -> None:
        """Stop the threads, each after the stream it is at; wait up to *timeout* seconds. May be used again."""
        with self._lock:
            worker, self._broker, self._worker = self._worker, None, None
        if worker is None:
            return
        atexit.unregister(self._exit)
        self._middleware.shutdown_grace = timeout
        worker.stop(timeout=int(timeout * 1000))

    def _exit(self) -> None:
        if self._durable_streams.settings.outbox == "memory":
            drained = self.drain(self._exit_grace)
        else:  # what stays behind is kept by the store, and may wait for other processes
            drained = self._wait_until_idle(time.monotonic() + self._exit_grace)
        if not drained:
            log.warning("The process ends before all streams are delivered (waited %.1f s)", self._exit_grace)
        self.close(timeout=0)


def _join(waiting: queue.Queue[bytes], deadline: float) -> bool:
    # StubBroker.join() starts a thread, which an exiting interpreter may not (Python 3.12).
    with waiting.all_tasks_done:
        return waiting.all_tasks_done.wait_for(
            lambda: not waiting.unfinished_tasks, max(0.0, deadline - time.monotonic())
        )


_workers: weakref.WeakSet[InProcessWorker] = weakref.WeakSet()


def _begin_anew_in_child() -> None:
    for worker in _workers:
        worker._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew_in_child)
