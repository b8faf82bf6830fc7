"""A stream is provisioned once: by how many threads and processes whatever, as long as Redis is there."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import redis

from broadcastable.client import AsyncStreamClient, StreamClient
from broadcastable.errors import StreamUnavailable
from broadcastable.provisioner import OURS, Claim, Forget, StreamProvisioner, arun, run
from broadcastable.settings import Settings
from broadcastable.tokens import Gatekeeper
from tests import services
from tests.core.origin import Origin, answer

ROOM = "gid://app/Room/1/messages"


class CountingServer:
    """A server over real sockets that answers every PUT with 201 and counts them."""

    def __init__(self) -> None:
        self.puts: list[str] = []
        counting = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                counting.puts.append(self.path)
                self.send_response(201)
                self.send_header("Stream-Next-Offset", "0")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/streams"

    def __enter__(self) -> CountingServer:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def counting_server() -> Iterator[CountingServer]:
    with CountingServer() as server:
        yield server


def ensure_in_threads(settings: Settings, threads: int, names: list[str]) -> None:
    client = StreamClient(settings, Gatekeeper(settings))
    provisioner = StreamProvisioner(settings)
    start = threading.Barrier(threads)

    def ensure() -> None:
        start.wait()
        for name in names:
            run(provisioner.ensure(name), client, provisioner)

    workers = [threading.Thread(target=ensure) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    client.close()
    provisioner.close()


def test_fifty_threads_make_one_put(counting_server: CountingServer, settings: Settings) -> None:
    ensure_in_threads(settings.replace(server_url=counting_server.url), 50, [ROOM])
    assert counting_server.puts == ["/v1/streams/" + ROOM]


def test_four_processes_of_fifty_threads_that_share_redis_make_one_put_for_each_stream(
    counting_server: CountingServer, settings: Settings, valkey_url: str
) -> None:
    names = [f"gid://app/Room/{n}" for n in range(5)]
    shared = settings.replace(server_url=counting_server.url, redis_url=valkey_url)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=ensure_in_threads, args=(shared, 50, names)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(counting_server.puts) == ["/v1/streams/" + name for name in names]


def test_a_hundred_tasks_make_one_put(origin: Origin, settings: Settings) -> None:
    async def main() -> None:
        client = AsyncStreamClient(settings, Gatekeeper(settings), transport=origin.transport())
        provisioner = StreamProvisioner(settings)
        await asyncio.gather(*(arun(provisioner.ensure(ROOM), client, provisioner) for _ in range(100)))
        await client.close()

    asyncio.run(main())
    assert origin.count("PUT") == 1


def test_the_oldest_names_are_forgotten_when_there_are_too_many(
    origin: Origin, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broadcastable.provisioner.LOCAL_NAMES", 3)
    client = StreamClient(settings, Gatekeeper(settings), transport=origin.transport())
    provisioner = StreamProvisioner(settings)
    for number in (1, 2, 3, 4, 4, 3, 2, 1):
        run(provisioner.ensure(f"gid://app/Room/{number}"), client, provisioner)
    assert origin.count("PUT") == 5
    provisioner.close()


def test_redis_that_is_down_costs_a_put_and_nothing_else(
    origin: Origin, settings: Settings, valkey_server: services.Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings.replace(redis_url=valkey_server.url)
    valkey_server.kill()
    client = StreamClient(settings, Gatekeeper(settings), transport=origin.transport())
    provisioner = StreamProvisioner(settings)
    run(provisioner.ensure(ROOM), client, provisioner)
    run(provisioner.ensure(ROOM), client, provisioner)
    assert origin.count("PUT") == 1
    assert len(caplog.records) == 1
    provisioner.close()


def test_a_name_that_another_process_forgot_is_asked_for_again(
    origin: Origin, settings: Settings, valkey_url: str
) -> None:
    settings = settings.replace(redis_url=valkey_url)
    client = StreamClient(settings, Gatekeeper(settings), transport=origin.transport())
    first, second = StreamProvisioner(settings), StreamProvisioner(settings)
    run(first.ensure(ROOM), client, first)
    run(second.ensure(ROOM), client, second)
    assert origin.count("PUT") == 1
    run(first.forget(ROOM), client, first)
    second.reset()
    run(second.ensure(ROOM), client, second)
    assert origin.count("PUT") == 2
    first.close()
    second.close()


def test_what_redis_is_told_is_forgotten_in_time(origin: Origin, settings: Settings, valkey_url: str) -> None:
    """Else a stream that expired would be taken to be there for ever, and Redis would fill up."""
    settings = settings.replace(redis_url=valkey_url, provisioned_for=60, request_timeout=2)
    client = StreamClient(settings, Gatekeeper(settings), transport=origin.transport())
    provisioner = StreamProvisioner(settings)
    with redis.Redis.from_url(valkey_url) as store:
        assert provisioner.shared(Claim(ROOM)) == OURS
        (key,) = store.keys("*")
        assert 0 < store.pttl(key) <= 4_000  # a claim whose process died holds up nobody for long
        provisioner.shared(Forget(ROOM))
        assert not store.keys("*")
        run(provisioner.ensure(ROOM), client, provisioner)
        (key,) = store.keys("*")
        assert 50 < store.ttl(key) <= 60
    provisioner.close()


def test_servers_do_not_share_names(origin: Origin, settings: Settings, valkey_url: str) -> None:
    """Two environments on one Redis each provision for themselves."""
    for url in ("http://one.test/v1/streams", "http://two.test/v1/streams"):
        here = settings.replace(server_url=url, redis_url=valkey_url)
        client = StreamClient(here, Gatekeeper(here), transport=origin.transport())
        provisioner = StreamProvisioner(here)
        run(provisioner.ensure(ROOM), client, provisioner)
        provisioner.close()
    assert origin.count("PUT") == 2


def test_a_failed_put_is_not_remembered(origin: Origin, settings: Settings, valkey_url: str) -> None:
    settings = settings.replace(redis_url=valkey_url)
    client = StreamClient(settings, Gatekeeper(settings), transport=origin.transport())
    provisioner = StreamProvisioner(settings)
    origin.faulty_methods = {"PUT"}
    origin.faults.extend([answer(503)] * 3)
    with pytest.raises(StreamUnavailable):
        run(provisioner.ensure(ROOM), client, provisioner)
    run(provisioner.ensure(ROOM), client, provisioner)
    assert ROOM in origin.streams
    provisioner.close()


def test_a_stream_with_a_lifetime_is_asked_for_again_before_it_expires(origin: Origin, settings: Settings) -> None:
    provisioner = StreamProvisioner(settings.replace(stream_ttl=3600))
    assert provisioner._remember_for == 1800
