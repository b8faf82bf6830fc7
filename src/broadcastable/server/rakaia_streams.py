"""rakaia-streams, an ASGI stream server, as we embed it: what it lacks on long streams and unusual names, supplied.

Memory for development and tests; JSON lines on disk to keep a demo's data. Neither is for load.
"""

from __future__ import annotations

import asyncio
import hashlib
from bisect import bisect_right
from operator import attrgetter
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rakaia.jsonl_store import JsonlStreamStore
from rakaia.protocol_server import ServerOptions, create_app
from rakaia.store import StreamStore

from broadcastable.errors import ConfigurationError

from .asgi import App, Message, Receive, Scope, Send
from .strict_json import with_strict_json

# Also the pause after which a silent SSE response says that it lives; proxies give up after 60 s or so.
_LONG_POLL_SECONDS = 15.0
_LONGEST_DIRECTORY = 200


class MemoryStore(StreamStore):
    """rakaia's memory store, finding a reader's place by bisection.

    As shipped each wake-up of each reader walks the whole stream: with 10,000 events of history one event took 1.2 s to
    reach 1,000 readers (measured), and 0.08 s with this. Offsets of this store sort as text.
    """

    _events_of: asyncio.AbstractEventLoop | None = None

    def new_messages_event(self, path: str) -> asyncio.Event:
        # An event belongs to the loop that first waited for it, and a server that was started again has a new loop.
        loop = asyncio.get_running_loop()
        if loop is not self._events_of:
            self._notify_events.clear()
            self._events_of = loop
        return super().new_messages_event(path)

    def _find_offset_index(self, stream: Any, offset: str) -> int:
        messages = self._messages.get(stream.path, [])
        index = bisect_right(messages, offset, key=attrgetter("offset"))
        return index if index < len(messages) else -1


class FileStore(JsonlStreamStore):
    """rakaia's file store, one call at a time.

    As shipped each call runs in a thread of its own, and an append shows its events before it shows the new tail. A
    reader in between is told an offset before the one that it has, and is given the same events again (measured: 1 of
    5 readers that were catching up); or, without news, the tail after an append that it has not seen.

    And it believes its metadata, which it writes after the log. Killed between the two, it would give the offsets of
    its last events again, and a reader would be given those events for ever (measured: by 12 kills under load). So the
    log is asked, the first time that a stream is used.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._compared: set[str] = set()

    async def run_sync(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    def _load_meta(self, path: str) -> Any:
        meta = super()._load_meta(path)
        if meta is not None and path not in self._compared:
            last = self._last_in_log(path)
            if last > meta.head:
                meta.head = last
                self._save_meta(path, meta)
            self._compared.add(path)
        return meta

    def _last_in_log(self, path: str) -> int:
        for segment in reversed(self._segments(path)):
            ids = [int(record["id"]) for record in self._read_segment(segment)]
            if ids:
                return max(ids)
        return 0  # a segment may hold nothing but the torn line of an append that was cut short


def rakaia_app(data_dir: Path | None = None) -> App:
    """A Durable Streams server without any authentication: put it behind a gatekeeper.

    Args:
        data_dir: Where the streams are kept, made when it is missing; in memory when None.

    Raises:
        ConfigurationError: The directory cannot be made or written.
    """
    store = MemoryStore() if data_dir is None else _file_store(data_dir)
    app = create_app(store, ServerOptions(long_poll_timeout=_LONG_POLL_SECONDS, enable_fault_injection=False))
    on_disk = data_dir is not None

    async def with_the_path_as_sent(scope: Scope, receive: Receive, send: Send) -> None:
        """Key the stream by its encoded path: rakaia fails on a header with the decoded one where it is not Latin."""
        if scope["type"] != "http":
            return
        path = scope["raw_path"].decode("ascii")
        origin = f"{scope.get('scheme', 'http')}://{_host(scope)}"

        async def say_where(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name, value) for name, value in message["headers"] if name != b"location"]
                if len(headers) < len(message["headers"]):
                    headers.append((b"location", (origin + path).encode("latin-1")))
                message = {**message, "headers": headers}
            await send(message)

        await app({**scope, "path": _directory_for(path) if on_disk else path}, receive, say_where)

    return with_strict_json(with_the_path_as_sent)


def _file_store(data_dir: Path) -> FileStore:
    try:
        return FileStore(data_dir)
    except OSError as error:
        raise ConfigurationError(f"The data directory {data_dir} cannot be used: {error.strerror}") from error


def _directory_for(path: str) -> str:
    """A stream is a directory on disk, named by its quoted path, or by a digest of it where that is too long a name.

    No stream's path holds a question mark, so no digest is another stream's path.
    """
    return path if len(quote(path, safe="")) <= _LONGEST_DIRECTORY else f"?{hashlib.sha256(path.encode()).hexdigest()}"


def _host(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"host":
            return str(value.decode("latin-1"))
    host, port = scope.get("server") or ("localhost", 80)
    return f"{host}:{port}"
