"""The command `tail`: a stream's events in the terminal, as they come."""

from __future__ import annotations

import json as json_module
import re
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import typer
from rich.text import Text

from broadcastable import jitter
from broadcastable.client import certificates_for
from broadcastable.errors import StreamNotFound, StreamUnavailable
from broadcastable.names import shard_of
from broadcastable.protocol import StreamResponse, error_for, read_request

from .application import App, Json, durable_streams_of, stream_named
from .console import err, fail, out, print_json

if TYPE_CHECKING:
    from broadcastable.durable_streams import DurableStreams

COLOURS = {"insert": "green", "update": "yellow", "upsert": "yellow", "delete": "red"}
LONGEST_PAUSE = 10.0

_LINE_END = re.compile(rb"\r\n|\r|\n")
_UNPRINTED = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def tail(
    stream: Annotated[str, typer.Argument(metavar="STREAM|MODEL/ID", help="Such as Room/1/messages, or a plain name.")],
    offset: Annotated[
        str, typer.Option("--offset", help="Where to begin: an offset, -1 for the first event, now for the next one.")
    ] = "now",
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Go on, or stop at the present end.")] = True,
    app: App = None,
    json: Json = False,
) -> None:
    """Print a stream's events as they come, each with the offset after it, until Ctrl+C.

    With the last offset printed it goes on exactly where it was: --offset OFFSET. With --json each line is
    {"offset": ..., "event": ...}; events that arrived together share their offset. After an outage it reconnects and
    goes on by itself.
    """
    durable_streams = durable_streams_of(app)
    name = stream_named(stream, durable_streams)
    try:
        end = durable_streams.client.head(name)
    except StreamNotFound:
        fail(f"There is no stream {name!r} yet. It is made by its first event, or when a token for it is signed.")
    offset = end if offset == "now" else offset
    if not json:
        err.print(f"[dim]{name} from {offset}; Ctrl+C ends it[/]" if follow else f"[dim]{name} from {offset}[/]")
    try:
        for events, reached in _events(durable_streams, name, offset, follow=follow):
            offset = reached
            for event in events:
                if json:
                    print_json({"offset": offset, "event": event})
                else:
                    out.print(_line(event, offset))
    except KeyboardInterrupt:
        if not json:
            err.print(f"\n[dim]Go on with: broadcastable tail '{stream}' --offset {offset}[/]")
        raise typer.Exit(0) from None


def _events(
    durable_streams: DurableStreams, stream: str, offset: str, *, follow: bool
) -> Iterator[tuple[list[Any], str]]:
    """Events and the offset after them: first all that there are, then what comes."""
    while True:
        page = durable_streams.client.read(stream, offset)
        offset = page.next_offset
        yield [json_module.loads(event) for event in page.events], offset
        if page.up_to_date:
            break
    failures = 0
    while follow:
        try:
            for events, reached, closed in _live(durable_streams, stream, offset):
                failures, offset = 0, reached
                if events:
                    yield events, offset
                if closed:
                    err.print("[dim]The stream is closed.[/]")
                    return
        except (httpx.TransportError, StreamUnavailable):
            pause = min(LONGEST_PAUSE, 0.25 * 2**failures) * jitter.between(0.5, 1)
            err.print(f"[yellow]The stream server is away[/]; next try in {pause:.1f} s")
            failures += 1
            time.sleep(pause)


def _live(durable_streams: DurableStreams, stream: str, offset: str) -> Iterator[tuple[list[Any], str, bool]]:
    """One event-stream response (protocol, 5.8): events, the offset after them, and whether that was the end."""
    urls = durable_streams.settings.server_urls
    url = f"{urls[shard_of(stream, len(urls))]}/{read_request(stream, offset).path}&live=sse"
    headers = {"Authorization": f"Bearer {durable_streams.gatekeeper.server_token()}"}
    timeout = httpx.Timeout(90, connect=5)
    with httpx.stream(
        "GET", url, headers=headers, timeout=timeout, trust_env=False, verify=certificates_for(url)
    ) as response:
        if response.status_code != 200:
            response.read()
            raise error_for(StreamResponse(response.status_code, response.headers, response.content), stream)
        held: list[Any] = []
        for kind, data in _server_sent(_lines(response.iter_bytes())):
            parsed = json_module.loads(data)
            if kind == "data":
                held += parsed if isinstance(parsed, list) else [parsed]
            elif kind == "control":
                yield held, parsed["streamNextOffset"], bool(parsed.get("streamClosed"))
                held = []


def _server_sent(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    kind = ""
    data: list[str] = []
    for line in lines:
        if line == "":
            if data:
                yield kind, "\n".join(data)
            kind, data = "", []
        elif line.startswith("event:"):
            kind = line.removeprefix("event:").strip()
        elif line.startswith("data:"):
            data.append(line.removeprefix("data:").removeprefix(" "))


def _lines(pieces: Iterable[bytes]) -> Iterator[str]:
    """The lines of an event stream. They end with CR, LF or CRLF alone (HTML, 9.2.5), and JSON may hold U+2028."""
    rest, ended_with_cr = b"", False
    for piece in pieces:
        # A CR ended its line when it came; an LF that comes later is the other half of it.
        text = piece.removeprefix(b"\n") if ended_with_cr else piece
        ended_with_cr = text.endswith(b"\r")
        *whole, rest = _LINE_END.split(rest + text)
        for line in whole:
            yield line.decode("utf-8", "replace")


def _line(event: Any, offset: str) -> Text:
    """*event* on one line: a change event in columns, and anything else as the JSON that it is."""
    headers = event["headers"] if isinstance(event, dict) and {"type", "key", "headers"} <= event.keys() else None
    if not isinstance(headers, dict) or "operation" not in headers:
        headers = {}
    operation = _printed(headers.get("operation", "event"))
    line = Text()
    line.append(_printed(headers.get("timestamp", ""))[11:23].ljust(12), style="dim")
    line.append(f" {operation:7}", style=COLOURS.get(operation, "cyan"))
    if headers:
        line.append(_printed(f"{event['type']}/{event['key']} "), style="bold")
        line.append(_json(event["value"]) if "value" in event else "")
    else:
        line.append(_json(event))
    line.append(f"  {_printed(offset)}", style="dim")
    if "txid" in headers:
        line.append(f"  {_printed(headers['txid'])}", style="dim")
    return line


def _json(value: Any) -> str:
    return _printed(json_module.dumps(value, ensure_ascii=False))


def _printed(value: Any) -> str:
    """The text of *value* with what would command the terminal spelt out: whoever may append may write it."""
    return _UNPRINTED.sub(lambda found: f"\\u{ord(found[0]):04x}", str(value))
