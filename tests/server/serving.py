"""An ASGI application on a free port, as users run it."""

from __future__ import annotations

import contextvars
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn


@contextmanager
def served(application: Any) -> Iterator[str]:
    """The URL of *application* while it is served, in this context: `override()` holds there too."""
    started = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            started.set()

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(application, log_level="error", ws="none", timeout_graceful_shutdown=5)
        server = Server(config)
        run = contextvars.copy_context().run
        thread = threading.Thread(target=run, args=(server.run,), kwargs={"sockets": [listening]})
        thread.start()
        try:
            assert started.wait(20)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
