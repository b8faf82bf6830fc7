"""The command `doctor`: does everything that a broadcast passes through work, from here?"""

from __future__ import annotations

import email.utils
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

import httpx
import typer

from broadcastable.client import certificates_for
from broadcastable.errors import BroadcastableError
from broadcastable.names import shard_of
from broadcastable.tokens import LEEWAY

from .application import App, Json, durable_streams_of
from .console import err, out, print_json
from .faults import OF_SERVICES, first_line, service_fault

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

    Makes a stream of its own on each stream server and deletes it again. Exits 1 when something is wrong.
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
        probes = _probe_names(len(settings.server_urls))
        checks: list[tuple[str, Callable[[], str]]] = [("keys", lambda: _keys(durable_streams))]
        if settings.redis_url:
            checks.append(("redis", lambda: _redis(durable_streams)))
        if settings.outbox == "database":
            checks.append(("outbox tables", lambda: _tables(durable_streams)))
        # Without these nothing can be delivered, and a look at the workers would say the same once more.
        needed = [{"redis": "redis", "database": "outbox tables"}.get(settings.outbox, "")]
        for number, (url, probe) in enumerate(zip(settings.server_urls, probes, strict=True), 1):
            which = f" {number}" if len(probes) > 1 else ""
            needed.append(f"stream server{which}")
            checks.append((f"clock{which}", partial(_clock, url)))
            checks.append((needed[-1], partial(_stream_server, durable_streams, url, probe)))
        ready = True
        for name, check in checks:
            finding = yield from _looked_at(name, check)
            ready &= finding.well or name not in needed
        if ready:
            yield from _looked_at("worker", lambda: _worker(durable_streams, probes, patience))
        # Whatever came of it, the probes go.
        for probe in probes:
            _found("probe", partial(_delete, durable_streams, probe))


def _probe_names(servers: int) -> list[str]:
    """The name of a stream for each server, in their order: one that belongs to it."""
    names: dict[int, str] = {}
    while len(names) < servers:
        name = f"broadcastable/doctor/{uuid.uuid4().hex}"
        names.setdefault(shard_of(name, servers), name)
    return [names[number] for number in range(servers)]


def _looked_at(name: str, check: Callable[[], str]) -> Generator[Finding, None, Finding]:
    with err.status(f"Looking at {name}") if err.is_terminal else nullcontext():
        finding = _found(name, check)
    yield finding
    return finding


def _delete(durable_streams: DurableStreams, probe: str) -> str:
    return str(durable_streams.delete_stream(probe))


def _found(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, check())
    except (BroadcastableError, Ill) as error:
        return Finding(name, False, str(error))
    except OF_SERVICES as error:
        return Finding(name, False, service_fault(error))
    except Exception as error:  # of a library: a check says it, whatever it is
        return Finding(name, False, f"{type(error).__name__}: {first_line(error)}")


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
    finally:
        client.close()
    assert isinstance(info, dict)
    if info.get("maxmemory_policy") not in {None, "noeviction"} and int(info.get("maxmemory", 0)) > 0:
        raise Ill(f"maxmemory-policy is {info['maxmemory_policy']}: it may evict undelivered events. Set noeviction")
    return f"{info.get('server_name', 'redis')} {info.get('valkey_version') or info.get('redis_version')}"


def _tables(durable_streams: DurableStreams) -> str:
    waiting = durable_streams.outbox.pending()
    return f"there; {len(waiting)} streams wait"


def _clock(url: str) -> str:
    try:
        response = httpx.get(url, timeout=5, trust_env=False, verify=certificates_for(url))
    except httpx.HTTPError as error:
        raise Ill(
            f"The stream server at {url} is not reached ({error}), so its clock cannot be compared. Is it running, and "
            "is server_url (BROADCASTABLE_SERVER_URL) right?"
        ) from error
    date = response.headers.get("date")
    if date is None:
        return "the stream server does not tell its time"
    apart = abs(time.time() - email.utils.parsedate_to_datetime(date).timestamp())
    if apart > LEEWAY:
        raise Ill(f"{apart:.0f} s apart from the clock of {url}: tokens fail beyond {LEEWAY:g} s. Set both by NTP")
    return f"within {max(1.0, apart):.0f} s of the stream server's"


def _stream_server(durable_streams: DurableStreams, url: str, probe: str) -> str:
    started = time.perf_counter()
    durable_streams.ensure_stream_exists(probe)
    durable_streams.broadcast_to(probe, probe="now")
    if not _probes(durable_streams, probe, "now"):
        raise Ill(f"{url} took an event and does not give it back. Is something else answering in its place?")
    took = (time.perf_counter() - started) * 1_000
    return f"made a stream, appended and read in {took:.0f} ms, at {url}"


def _worker(durable_streams: DurableStreams, probes: Sequence[str], patience: float) -> str:
    started = time.perf_counter()
    for probe in probes:
        durable_streams.broadcast_later_to(probe, probe="later")
    missing = list(probes)
    while time.perf_counter() - started < patience:
        missing = [probe for probe in missing if not _probes(durable_streams, probe, "later")]
        if not missing:
            took = (time.perf_counter() - started) * 1_000
            shared = durable_streams.settings.outbox != "memory" and durable_streams.settings.redis_url
            return f"{'a worker' if shared else 'the worker in this process'} delivered an event in {took:.0f} ms"
        time.sleep(0.02)
    for probe in missing:
        durable_streams.outbox.drop(probe)
    to = "" if len(missing) == len(probes) else f" to {', '.join(_url_of(durable_streams, each) for each in missing)}"
    raise Ill(f"Nothing was delivered{to} in {patience:g} s. Is one running? dramatiq broadcastable.worker")


def _url_of(durable_streams: DurableStreams, stream: str) -> str:
    urls = durable_streams.settings.server_urls
    return urls[shard_of(stream, len(urls))]


def _probes(durable_streams: DurableStreams, probe: str, said: str) -> bool:
    return any(f'"{said}"'.encode() in event for event in durable_streams.client.read(probe).events)
