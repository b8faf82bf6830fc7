"""The command `doctor`: does everything that a broadcast passes through work, from here?"""

from __future__ import annotations

import email.utils
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import httpx
import typer

from broadcastable.errors import BroadcastableError
from broadcastable.tokens import LEEWAY

from .application import App, Json, durable_streams_of
from .console import err, out, print_json

if TYPE_CHECKING:
    from broadcastable.durable_streams import DurableStreams


@dataclass(frozen=True)
class Finding:
    """What came of one check; *says* is the fix where it did not go well."""

    check: str
    well: bool
    says: str


class Ill(Exception):
    """The check did not go well; the text says what to do."""


def doctor(
    app: App = None,
    json: Json = False,
    patience: Annotated[
        float, typer.Option("--patience", min=0.1, metavar="SECONDS", help="How long a worker may take.")
    ] = 5.0,
) -> None:
    """Check settings, keys, clock, Redis, database tables, stream server and workers, and say how to mend each.

    Makes a stream of its own on the server and deletes it again. Exits 1 when something is wrong.
    """
    well = True
    for finding in _examine(app, patience):
        well &= finding.well
        if json:
            print_json({"check": finding.check, "ok": finding.well, "says": finding.says})
        else:
            mark = "[green]✓[/]" if finding.well else "[bold red]✗[/]"
            out.print(f"{mark} {finding.check:14} ", end="")
            out.print(finding.says, markup=False)
    raise typer.Exit(0 if well else 1)


def _examine(app: str | None, patience: float) -> Iterator[Finding]:
    try:
        durable_streams = durable_streams_of(app)
    except BroadcastableError as error:
        yield Finding("settings", False, str(error))
        return
    settings = durable_streams.settings
    yield Finding("settings", True, f"server {', '.join(settings.server_urls)}; outbox {settings.outbox}")
    with durable_streams:
        probe = f"broadcastable/doctor/{uuid.uuid4().hex}"
        checks: list[tuple[str, Callable[[], str]]] = [("keys", lambda: _keys(durable_streams))]
        if settings.redis_url:
            checks.append(("redis", lambda: _redis(durable_streams)))
        if settings.outbox == "database":
            checks.append(("outbox tables", lambda: _tables(durable_streams)))
        checks += [
            ("clock", lambda: _clock(durable_streams)),
            ("stream server", lambda: _stream_server(durable_streams, probe)),
            ("worker", lambda: _worker(durable_streams, probe, patience)),
        ]
        for name, check in checks:
            with err.status(f"Looking at {name}") if err.is_terminal else nullcontext():
                finding = _found(name, check)
            yield finding
            if name == "stream server" and not finding.well:
                return  # nothing can be delivered to it, so a worker shows nothing
        # Whatever came of it, the probe goes.
        _found("probe", lambda: str(durable_streams.delete_stream(probe)))


def _found(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, check())
    except (BroadcastableError, Ill) as error:
        return Finding(name, False, str(error))
    except Exception as error:  # of a database driver, of redis-py: a check says it, whatever it is
        return Finding(name, False, f"{type(error).__name__}: {error}")


def _keys(durable_streams: DurableStreams) -> str:
    gatekeeper = durable_streams.gatekeeper
    gatekeeper.decode(gatekeeper.encode({"stream": "doctor", "permissions": ["read"]}))
    keys = gatekeeper.jwks()["keys"]
    return f"signing with {keys[0]['kid']}, verifying with {len(keys)}"


def _redis(durable_streams: DurableStreams) -> str:
    import redis

    url = durable_streams.settings.redis_url
    assert url is not None
    client = redis.Redis.from_url(url, socket_connect_timeout=2, socket_timeout=2)
    try:
        info = client.info()
    except redis.RedisError as error:
        raise Ill(f"Not reached ({error}). Is it running, and is redis_url (BROADCASTABLE_REDIS_URL) right?") from error
    finally:
        client.close()
    assert isinstance(info, dict)
    if info.get("maxmemory_policy") not in {None, "noeviction"} and int(info.get("maxmemory", 0)) > 0:
        raise Ill(f"maxmemory-policy is {info['maxmemory_policy']}: it may evict undelivered events. Set noeviction")
    return f"{info.get('server_name', 'redis')} {info.get('valkey_version') or info.get('redis_version')}"


def _tables(durable_streams: DurableStreams) -> str:
    waiting = durable_streams.outbox.pending()
    return f"there; {len(waiting)} streams wait"


def _clock(durable_streams: DurableStreams) -> str:
    url = durable_streams.settings.server_urls[0]
    try:
        response = httpx.get(url, timeout=5, trust_env=False)
    except httpx.HTTPError as error:
        raise Ill(f"The stream server at {url} is not reached ({error}), so its clock cannot be compared") from error
    date = response.headers.get("date")
    if date is None:
        return "the stream server does not tell its time"
    apart = abs(time.time() - email.utils.parsedate_to_datetime(date).timestamp())
    if apart > LEEWAY:
        raise Ill(f"{apart:.0f} s apart from the stream server's: tokens fail beyond {LEEWAY:g} s. Set both by NTP")
    return f"within {max(1.0, apart):.0f} s of the stream server's"


def _stream_server(durable_streams: DurableStreams, probe: str) -> str:
    started = time.perf_counter()
    durable_streams.ensure_stream_exists(probe)
    durable_streams.broadcast_to(probe, probe="now")
    if not _probes(durable_streams, probe, "now"):
        raise Ill("It took an event and does not give it back. Is something else answering in its place?")
    return f"made a stream, appended and read in {(time.perf_counter() - started) * 1_000:.0f} ms"


def _worker(durable_streams: DurableStreams, probe: str, patience: float) -> str:
    started = time.perf_counter()
    durable_streams.broadcast_later_to(probe, probe="later")
    while time.perf_counter() - started < patience:
        if _probes(durable_streams, probe, "later"):
            took = (time.perf_counter() - started) * 1_000
            shared = durable_streams.settings.outbox != "memory" and durable_streams.settings.redis_url
            return f"{'a worker' if shared else 'the worker in this process'} delivered an event in {took:.0f} ms"
        time.sleep(0.02)
    durable_streams.outbox.drop(probe)
    raise Ill(f"Nothing was delivered in {patience:g} s. Is one running? dramatiq broadcastable.worker")


def _probes(durable_streams: DurableStreams, probe: str, said: str) -> bool:
    return any(f'"{said}"'.encode() in event for event in durable_streams.client.read(probe).events)
