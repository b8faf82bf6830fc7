"""The embedded server over real HTTP: the protocol works, names of every kind do, and what was acknowledged stays."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from broadcastable.errors import ConfigurationError, MissingExtraError
from broadcastable.names import stream_path
from broadcastable.server import EmbeddedServer, create_app, embedded_server
from broadcastable.server.embedded import listen
from broadcastable.settings import Settings, override
from broadcastable.tokens import Gatekeeper, KeyPair, generate_key_pair
from tests.server.attacks import STREAM, Attack, attacks, token
from tests.server.reading import tail
from tests.server.serving import served

KEYS = generate_key_pair()


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with embedded_server(settings=Settings(signing_key=KEYS.private_pem), allowed_origins=()) as server:
        yield server


class Owner(httpx.Client):
    """A client with a server token; its URLs are the paths of streams, `gid://` included."""

    def __init__(self, url: str, gatekeeper: Gatekeeper) -> None:
        self._streams = url
        bearer = {"Authorization": f"Bearer {gatekeeper.server_token()}"}
        super().__init__(headers={**bearer, "Content-Type": "application/json"}, timeout=30)

    def build_request(self, method: str, url: Any, **options: Any) -> httpx.Request:
        return super().build_request(method, f"{self._streams}/{url}", **options)


def client_of(server: EmbeddedServer, gatekeeper: Gatekeeper | None = None) -> Owner:
    return Owner(server.url, gatekeeper or server.gatekeeper)


@pytest.fixture
def owner(server: EmbeddedServer) -> Iterator[Owner]:
    """An owner of the server of this module."""
    with client_of(server) as client:
        yield client


def until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not true():
        if time.monotonic() > deadline:
            pytest.fail(f"waited in vain for {what}")
        time.sleep(0.01)


# The protocol


def test_a_stream_is_created_appended_to_read_closed_and_deleted(owner: Owner) -> None:
    name = "smoke/all"
    created = owner.put(name)
    assert created.status_code == 201
    assert owner.put(name).status_code == 200
    assert owner.post(name, content=b'[{"n":1},{"n":2}]').status_code == 204
    read = owner.get(name, params={"offset": "-1"})
    assert read.json() == [{"n": 1}, {"n": 2}]
    assert read.headers["stream-up-to-date"] == "true"
    tail_offset = read.headers["stream-next-offset"]
    assert owner.head(name).headers["stream-next-offset"] == tail_offset
    assert owner.get(name, params={"offset": created.headers["stream-next-offset"]}).json() == [{"n": 1}, {"n": 2}]
    assert owner.get(name, params={"offset": tail_offset}).json() == []
    assert owner.post(name, headers={"Stream-Closed": "true"}).headers["stream-closed"] == "true"
    late = owner.post(name, content=b'[{"n":3}]')
    assert late.status_code == 409
    assert late.headers["stream-closed"] == "true"
    assert owner.delete(name).status_code == 204
    assert owner.get(name).status_code == 404


def test_a_producer_s_repeated_request_is_kept_once(owner: Owner) -> None:
    owner.put("smoke/producer")
    producer = {"Producer-Id": "p", "Producer-Epoch": "1", "Producer-Seq": "0"}
    first = owner.post("smoke/producer", content=b"[1]", headers=producer)
    again = owner.post("smoke/producer", content=b"[1]", headers=producer)
    assert (first.status_code, again.status_code) == (200, 204)
    gap = owner.post("smoke/producer", content=b"[1]", headers={**producer, "Producer-Seq": "5"})
    assert gap.status_code == 409
    assert gap.headers["producer-expected-seq"] == "1"
    assert owner.get("smoke/producer").json() == [1]


def test_what_a_server_refuses_has_its_status(owner: Owner) -> None:
    assert owner.post("smoke/missing", content=b"[1]").status_code == 404
    assert owner.head("smoke/missing").status_code == 404
    owner.put("smoke/json")
    assert owner.put("smoke/json", headers={"Content-Type": "text/plain"}).status_code == 409
    assert owner.post("smoke/json", content=b"{").status_code == 400
    assert owner.post("smoke/json", content=b"[]").status_code == 400
    assert owner.patch("smoke/json").status_code == 405
    assert owner.get("smoke/json", params={"live": "sse"}).status_code == 400


NOT_JSON = {
    "NaN": b"NaN",
    "infinity": b'{"a":Infinity}',
    "beyond a double": b"[1e999]",
    "a number of 5,000 digits": b"[1" + b"0" * 5_000 + b"]",
    "lone surrogate": b'"\\ud800"',
    "not UTF-8": b'["\xff"]',
    "byte order mark": b"\xef\xbb\xbf[1]",
    "nested without end": b"[" * 100_000 + b"]" * 100_000,
}


@pytest.mark.parametrize("declared", ["application/json", "Application/JSON; charset=utf-8"])
@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_not_json_is_400_and_never_reaches_a_reader(
    owner: Owner, body: bytes, method: str, declared: str
) -> None:
    """Python's own parser takes much of this, and then no browser can parse the stream any more."""
    name = f"strict/{uuid.uuid4()}"
    if method == "POST":
        owner.put(name)
        owner.post(name, content=b'["before"]')
    response = owner.request(method, name, content=body, headers={"Content-Type": declared})
    assert response.status_code == 400
    if method == "POST":
        assert owner.get(name).content == b'["before"]'
    else:
        assert owner.get(name).status_code == 404


def test_however_deep_a_body_is_nested_the_answer_is_no_500(owner: Owner) -> None:
    owner.put("strict/deep")
    statuses = [
        owner.post("strict/deep", content=b"[" * depth + b"]" * depth).status_code for depth in range(400, 1_100, 10)
    ]
    assert statuses == sorted(statuses)
    assert set(statuses) == {204, 400}


def test_a_body_that_is_not_declared_as_json_is_any_bytes(owner: Owner) -> None:
    declared = {"Content-Type": "application/octet-stream"}
    owner.put("strict/bytes", headers=declared)
    assert owner.post("strict/bytes", content=b"NaN\xff", headers=declared).status_code == 204
    assert owner.get("strict/bytes").content == b"NaN\xff"


def test_a_body_over_the_limit_is_413_with_a_length_and_in_chunks(owner: Owner) -> None:
    owner.put("smoke/large")
    large = b'["' + b"x" * (9 << 20) + b'"]'
    assert owner.post("smoke/large", content=large).status_code == 413
    pieces = (large[start : start + 65_536] for start in range(0, len(large), 65_536))
    # The server answers before it has read everything, and hangs up: a sender sees one or the other.
    with suppress(httpx.WriteError):
        assert owner.post("smoke/large", content=pieces).status_code == 413
    assert owner.get("smoke/large").json() == []


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        STREAM,
        "комната/сообщения",
        "部屋/1",
        "100% & more; a=b, (c)!",
        "gid://app/Room/a%2Fb",
        "gid://app/Room/%D0%BA",
        "с" * 400,
        "x" * 512,
    ],
)
def test_a_name_of_any_letters_has_a_stream_of_its_own(name: str, on_disk: bool, tmp_path: Path) -> None:
    with embedded_server(data_dir=tmp_path if on_disk else None) as server, client_of(server) as owner:
        path = stream_path(name)
        created = owner.put(path)
        assert created.status_code == 201
        assert created.headers["location"] == f"{server.url}/{path}"
        assert owner.post(path, content=json.dumps([name]).encode()).status_code == 204
        reader = server.gatekeeper.encode({"stream": name, "permissions": ["read"]})
        assert httpx.get(f"{server.url}/{path}", params={"token": reader}).json() == [name]
        assert owner.head(stream_path(name[:-1] + "z")).status_code == 404


def test_the_long_names_of_the_file_store_are_not_mixed_up(tmp_path: Path) -> None:
    with embedded_server(data_dir=tmp_path) as server, client_of(server) as owner:
        names = ["x" * 300, "x" * 301, "y" * 300]
        for name in names:
            assert owner.put(name).status_code == 201
            owner.post(name, content=json.dumps([name]).encode())
        assert [owner.get(name).json() for name in names] == [[name] for name in names]


@pytest.mark.parametrize("attack", [pytest.param(attack, id=attack.name) for attack in attacks(KEYS)])
def test_no_attack_gets_through_over_http(server: EmbeddedServer, attack: Attack) -> None:
    """Said on a bare socket: an HTTP client would tidy the path up."""
    with client_of(server) as owner:
        owner.put(STREAM)
        before = owner.head(STREAM).headers["stream-next-offset"]
        lines = [f"{attack.method} {attack.target} HTTP/1.1", "Host: localhost", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in attack.all_headers]
        lines += ["Content-Type: application/json", "Content-Length: 3", "", "[1]"]
        answer = said_on_a_socket(server.url, "\r\n".join(lines).encode())
        head, _, body = answer.partition(b"\r\n\r\n")
        if attack.method.isupper():
            assert int(head.split(b" ", 2)[1]) == attack.status
            assert body == b""
        else:  # no method at all to httptools, before the gate is asked
            assert int(head.split(b" ", 2)[1]) == 400
            assert body == b"Invalid HTTP request received."
        assert b"\r\nstream-" not in head.lower()
        assert owner.head(STREAM).headers["stream-next-offset"] == before


def said_on_a_socket(url: str, request: bytes) -> bytes:
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=20) as connection:
        connection.sendall(request)
        answer = b""
        while piece := connection.recv(65_536):
            answer += piece
    return answer


def test_a_token_of_64_kib_is_refused_over_http(server: EmbeddedServer) -> None:
    for header, query in ((f"Authorization: Bearer {'A' * 65_536}", ""), ("X: y", f"?token={'A' * 65_536}")):
        request = f"GET /v1/streams/{STREAM}{query} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{header}\r\n\r\n"
        status = int(said_on_a_socket(server.url, request.encode()).split(b" ", 2)[1])
        assert status in {400, 401, 414, 431}


def test_a_websocket_handshake_without_a_token_is_refused(server: EmbeddedServer) -> None:
    upgrade = "Connection: Upgrade, close\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA=="
    request = f"GET /v1/streams/{STREAM} HTTP/1.1\r\nHost: x\r\n{upgrade}\r\n\r\n"
    assert b" 401 " in said_on_a_socket(server.url, request.encode()).split(b"\r\n")[0]


def test_long_streams_are_found_into_by_bisection(owner: Owner) -> None:
    """The place that a reader asks for is found in log time; see `rakaia_streams.MemoryStore`."""
    from rakaia.store import StreamStore

    from broadcastable.server.rakaia_streams import MemoryStore

    assert MemoryStore._find_offset_index is not StreamStore._find_offset_index
    ours, theirs = MemoryStore(), StreamStore()
    for store in (ours, theirs):
        store.create("/s", content_type="application/json")
        store.append("/s", json.dumps(list(range(100))).encode())
    offsets = [message.offset for message in theirs._messages["/s"]]
    for offset in ["-1", "0000000000000000_0000000000000000", *offsets]:
        assert [m.data for m in ours.peek("/s", offset)] == [m.data for m in theirs.peek("/s", offset)]


# Readers


def sse_socket(url: str, text: str) -> socket.socket:
    """An SSE reader that has had its first bytes."""
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname, parts.port), timeout=20)
    request = f"GET {parts.path}?offset=-1&live=sse&token={text} HTTP/1.1\r\nHost: x\r\n\r\n"
    connection.sendall(request.encode())
    assert connection.recv(12) == b"HTTP/1.1 200"
    return connection


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_hundred_readers_that_left_cost_nothing(on_disk: bool, tmp_path: Path) -> None:
    with embedded_server(data_dir=tmp_path if on_disk else None) as server, client_of(server) as owner:
        owner.put(STREAM)
        text = server.gatekeeper.encode({"stream": STREAM, "permissions": ["read"]})
        readers = [sse_socket(f"{server.url}/{STREAM}", text) for _ in range(100)]
        assert server.middleware.live_reads == 100
        for reader in readers:
            reader.close()
        until(lambda: server.middleware.live_reads == 0, "the reads to be cancelled")
        before = time.process_time()
        time.sleep(1)  # a second in which there is nothing to do
        # Readers that are not let go hold a whole core here when the store polls.
        assert time.process_time() - before < 0.5


def test_a_stopping_server_lets_its_readers_go() -> None:
    with embedded_server() as server, client_of(server) as owner:
        owner.put(STREAM)
        text = server.gatekeeper.encode({"stream": STREAM, "permissions": ["read"]})
        reader = sse_socket(f"{server.url}/{STREAM}", text)
        server.stop()
        received = b""
        while piece := reader.recv(65_536):
            received += piece
        assert received.endswith(b"0\r\n\r\n")  # the end of a response, not a broken one
        reader.close()
        server.stop()  # twice is once


def test_an_sse_response_ends_when_its_token_expires(server: EmbeddedServer, owner: Owner) -> None:
    owner.put("expiring")
    owner.post("expiring", content=b"[1]")
    expiring = server.gatekeeper.encode({"stream": "expiring", "permissions": ["read"]}, 2)
    params = {"token": expiring, "offset": "-1", "live": "sse"}
    with httpx.stream("GET", f"{server.url}/expiring", params=params, timeout=30) as response:
        received = response.read()  # raises if the response were broken off
    assert b"data:[1]" in received


def test_keys_rotate_under_a_hundred_live_readers_and_no_event_is_lost_or_repeated() -> None:
    """Announce the new key, sign with it, drop the old one; readers renew tokens that live for two seconds at most."""
    old, new = generate_key_pair(), generate_key_pair()
    by_old = Settings(signing_key=old.private_pem)
    announced = Settings(signing_key=old.private_pem, verify_keys=(new.public_pem,))
    by_new = Settings(signing_key=new.private_pem, verify_keys=(old.public_pem,))
    only_new = Settings(signing_key=new.private_pem)
    total, readers = 60, 100

    async def rotate(server: EmbeddedServer) -> list[list[int]]:
        signer = [Gatekeeper(by_old)]
        tokens, renewed = [0] * readers, asyncio.Event()

        def fresh(reader: int) -> str:
            tokens[reader] += 1
            if min(tokens) > 1:
                renewed.set()
            return signer[0].encode({"stream": STREAM, "permissions": ["read"]}, 2)

        # Each request on a connection of its own, for one that idles may be closed just as it is used. One client for
        # each reader: a pool of a hundred connections takes its time to find one.
        no_pool = httpx.Limits(max_keepalive_connections=0)
        options = {"timeout": 30, "verify": ssl.create_default_context(), "limits": no_pool}

        async def read(reader: int) -> list[int]:
            got: list[int] = []
            async with httpx.AsyncClient(**options) as http:
                async for event, _ in tail(http, f"{server.url}/{STREAM}", partial(fresh, reader)):
                    got.append(event)
                    if event == total - 1:
                        return got
            raise AssertionError("a tail has no end")

        async with httpx.AsyncClient(**options) as http:

            async def write() -> None:
                steps = {10: announced, 25: by_new, 45: only_new}
                for n in range(total):
                    if n == total - 1:
                        await renewed.wait()  # nobody ends before a token has expired under it
                    if n in steps:
                        server.middleware.use(Gatekeeper(steps[n]))
                        signer[0] = Gatekeeper(steps[n])
                    bearer = {"Authorization": f"Bearer {signer[0].server_token()}"}
                    posted = await http.post(f"{server.url}/{STREAM}", json=[n], headers=bearer)
                    assert posted.status_code == 204
                    await asyncio.sleep(0.05)  # the pace of the writer, so that tokens expire under the readers

            await http.put(
                f"{server.url}/{STREAM}",
                headers={
                    "Authorization": f"Bearer {signer[0].server_token()}",
                    "Content-Type": "application/json",
                },
            )
            async with asyncio.timeout(90):
                *got, _ = await asyncio.gather(*map(read, range(readers)), write())
        return got

    with embedded_server(settings=by_old) as server:
        assert asyncio.run(rotate(server)) == [list(range(total))] * readers


# Keeping


class Process:
    """A stream server in a process of its own, which can be killed."""

    def __init__(self, keys: KeyPair, data_dir: Path | None) -> None:
        program = (
            "import sys; from broadcastable.server import serve; "
            "serve(port=0, data_dir=sys.argv[1] or None, on_listening=lambda url: print(url, flush=True))"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", program, str(data_dir or "")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "BROADCASTABLE_SIGNING_KEY": keys.private_pem},
        )
        assert self._process.stdout is not None
        self.lines: list[str] = []
        for line in self._process.stdout:
            self.lines.append(line)
            if line.startswith("http://"):
                self.url = line.strip()
                break
        else:
            pytest.fail("the server did not start: " + "".join(self.lines))
        self._draining = threading.Thread(target=self.lines.extend, args=(self._process.stdout,))
        self._draining.start()

    def end(self, number: int = signal.SIGTERM) -> int:
        if self._process.poll() is None:
            self._process.send_signal(number)
        status = self._process.wait(20)
        self._draining.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
        return status


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    """Starts processes; those that the test left running are ended."""
    started: list[Process] = []

    def start(keys: KeyPair, data_dir: Path | None) -> Process:
        started.append(Process(keys, data_dir))
        return started[-1]

    yield start
    for process in started:
        process.end()


def test_what_was_acknowledged_outlives_kill_9(start: Callable[..., Process], tmp_path: Path) -> None:
    """Eight writers and a server killed three times under them: each event that was answered for is there, once."""
    owner_keys = Gatekeeper(Settings(signing_key=KEYS.private_pem))
    acknowledged: dict[str, list[str]] = {f"kept/{n}": [] for n in range(8)}
    for round_ in range(3):
        process = start(KEYS, tmp_path)
        stop = threading.Event()

        def write(name: str, url: str, number: int, stop: threading.Event) -> None:
            bearer = {"Authorization": f"Bearer {owner_keys.server_token()}"}
            with httpx.Client(headers={**bearer, "Content-Type": "application/json"}, timeout=20) as http:
                count = 0
                while not stop.is_set():
                    event = f"{number}-{count}"
                    try:
                        http.put(f"{url}/{name}")
                        if http.post(f"{url}/{name}", json=[event]).status_code == 204:
                            acknowledged[name].append(event)
                    except httpx.TransportError:
                        continue
                    count += 1

        writers = [
            threading.Thread(target=write, args=(name, process.url, round_, stop), daemon=True) for name in acknowledged
        ]
        already = sum(map(len, acknowledged.values()))
        for writer in writers:
            writer.start()
        until(lambda already=already: sum(map(len, acknowledged.values())) > already + 60, "sixty acknowledged events")
        process.end(signal.SIGKILL)
        stop.set()
        for writer in writers:
            writer.join()
    process = start(KEYS, tmp_path)
    with httpx.Client(headers={"Authorization": f"Bearer {owner_keys.server_token()}"}, timeout=20) as http:
        for name, events in acknowledged.items():
            kept = http.get(f"{process.url}/{name}").json()
            missing = [event for event in events if event not in kept]
            assert missing == []
            assert [event for event in kept if event in set(events)] == events  # in order, each once
    assert process.end() in {0, -signal.SIGTERM}


def test_a_server_in_memory_begins_empty_and_takes_its_streams_again() -> None:
    settings = Settings(signing_key=KEYS.private_pem)
    with embedded_server(settings=settings) as server, client_of(server) as owner:
        owner.put("wiped")
        port = urlsplit(server.url).port or 0
    with embedded_server(settings=settings, port=port) as again, client_of(again) as owner:
        assert again.url == server.url
        assert owner.post("wiped", content=b"[1]").status_code == 404
        assert owner.put("wiped").status_code == 201
        assert owner.post("wiped", content=b"[1]").status_code == 204


def test_an_answer_in_two_pieces_does_not_wait_for_the_clients_acknowledgement() -> None:
    """By Nagle's algorithm the second piece would, for 40 ms: each PUT, and each event after a quiet moment."""
    listening = listen("127.0.0.1", 0)
    listening.listen()

    async def accepted() -> int:
        delays: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            sock = writer.get_extra_info("socket")
            delays.set_result(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        server = await asyncio.start_server(note, sock=listening)
        _, writer = await asyncio.open_connection(*listening.getsockname())
        found = await delays
        writer.close()
        server.close()
        return found

    assert asyncio.run(accepted()) == 1


def test_a_restart_on_the_same_directory_keeps_events_and_offsets(tmp_path: Path) -> None:
    settings = Settings(signing_key=KEYS.private_pem)
    with embedded_server(settings=settings, data_dir=tmp_path) as server, client_of(server) as owner:
        owner.put(STREAM)
        middle = owner.post(STREAM, content=b"[1]").headers["stream-next-offset"]
        owner.post(STREAM, content=b"[2]")
    with embedded_server(settings=settings, data_dir=tmp_path) as again, client_of(again) as owner:
        assert owner.get(STREAM).json() == [1, 2]
        assert owner.get(STREAM, params={"offset": middle}).json() == [2]


def test_a_server_killed_between_log_and_metadata_gives_no_offset_twice(tmp_path: Path) -> None:
    """The file store writes the log first; what it has written about it may be an append behind."""
    settings = Settings(signing_key=KEYS.private_pem)
    with embedded_server(settings=settings, data_dir=tmp_path) as server, client_of(server) as owner:
        owner.put(STREAM)
        owner.post(STREAM, content=b"[1]")
        (metadata,) = tmp_path.glob("*/meta.json")
        behind = metadata.read_bytes()
        end = owner.post(STREAM, content=b"[2, 3]").headers["stream-next-offset"]
    metadata.write_bytes(behind)
    with embedded_server(settings=settings, data_dir=tmp_path) as again, client_of(again) as owner:
        assert owner.head(STREAM).headers["stream-next-offset"] == end
        new_end = owner.post(STREAM, content=b"[4]").headers["stream-next-offset"]
        everything = owner.get(STREAM)
        assert (everything.json(), everything.headers["stream-next-offset"]) == ([1, 2, 3, 4], new_end)
        assert owner.get(STREAM, params={"offset": end}).json() == [4]
        assert owner.get(STREAM, params={"offset": new_end}).json() == []


# Logs


def test_no_token_reaches_a_log(start: Callable[..., Process]) -> None:
    """uvicorn's access log and errors, as `serve` and as `uvicorn --factory` write them."""
    good = token(KEYS)
    server = start(KEYS, None)
    urls = [f"{server.url}/{STREAM}?token={good}", f"{server.url}/{STREAM}?offset=-1&token=bad{good}&live=sse"]
    urls += [f"{server.url}/{STREAM}?token={good}&token={good}", f"{server.url}x?%74oken={good}"]
    with httpx.Client() as http:
        statuses = [http.get(url).status_code for url in urls]
        statuses.append(http.get(urls[0], headers={"Authorization": f"Bearer {good}"}).status_code)
    assert statuses == [404, 401, 400, 404, 400]
    server.end()
    log = "".join(server.lines)
    assert log.count('"GET /v1/streams') == 5
    assert "live=sse" in log
    assert_no_token(log, good)


def test_no_token_reaches_the_log_of_uvicorn_alone() -> None:
    good = token(KEYS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "--factory", "broadcastable.server:create_app", "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "BROADCASTABLE_SIGNING_KEY": KEYS.private_pem},
    )
    url = f"http://127.0.0.1:{port}/v1/streams/{STREAM}"

    def answers() -> bool:
        try:
            return httpx.get(url, params={"token": good, "offset": "-1"}).status_code == 404
        except httpx.ConnectError:
            return False

    try:
        until(answers, "uvicorn to listen")
    finally:
        process.terminate()
        log, _ = process.communicate(timeout=20)
    assert '"GET /v1/streams/gid%3A//app/Room/1/messages?offset=-1 HTTP/1.1" 404' in log
    assert_no_token(log, good)


def assert_no_token(log: str, text: str) -> None:
    for segment in text.split("."):
        assert segment not in log
    assert "token=ey" not in log


# Setting up


def test_without_a_signing_key_the_embedded_server_makes_a_pair_of_its_own() -> None:
    with embedded_server() as one, embedded_server() as other:
        assert one.settings.signing_key != other.settings.signing_key
        assert one.settings.server_url == one.url
        with client_of(other, one.gatekeeper) as stranger:
            assert stranger.put("x").status_code == 401


def test_the_settings_in_force_are_the_default(server: EmbeddedServer) -> None:
    with override(signing_key=KEYS.private_pem, token_audience="rooms"), embedded_server() as other:
        assert other.settings.token_audience == "rooms"
        assert other.gatekeeper.decode(other.gatekeeper.server_token())["aud"] == "rooms"


def test_a_port_in_use_is_one_clear_sentence(server: EmbeddedServer) -> None:
    port = urlsplit(server.url).port or 0
    with pytest.raises(ConfigurationError, match=rf"Port {port} on 127.0.0.1 is in use"), embedded_server(port=port):
        pass


@pytest.mark.parametrize(
    ("address", "reason"),
    [({"port": 70_000}, "between 0 and 65535"), ({"host": "no.such.host.invalid"}, "names no address")],
)
def test_an_impossible_address_is_one_clear_sentence(address: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason), embedded_server(**address):
        pass


def test_a_data_directory_that_cannot_be_used_is_one_clear_sentence(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigurationError, match="data directory"), embedded_server(data_dir=file / "data"):
        pass


def test_an_app_without_a_key_says_which_setting_is_missing() -> None:
    with pytest.raises(ConfigurationError, match="signing_key"):
        create_app(Settings())


def test_without_the_extra_the_error_says_how_to_install_it() -> None:
    program = (
        "import sys; sys.modules['rakaia'] = None\n"
        "from broadcastable.server import GatekeeperMiddleware\n"
        "try:\n    from broadcastable.server import embedded_server\n"
        "except ImportError as error:\n    print(type(error).__name__, error)"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.startswith(MissingExtraError.__name__)
    assert "broadcastable[server]" in printed


def test_it_mounts_in_an_application_of_fastapi() -> None:
    from fastapi import FastAPI

    application = FastAPI()
    application.mount("/v1/streams", create_app(Settings(signing_key=KEYS.private_pem)))
    with served(application) as base:
        url = f"{base}/v1/streams/{STREAM}"
        owner = {"Authorization": f"Bearer {token(KEYS, server=True)}", "Content-Type": "application/json"}
        assert httpx.put(url, headers=owner).status_code == 201
        assert httpx.post(url, headers=owner, content=b"[1]").status_code == 204
        assert httpx.get(url, params={"token": token(KEYS)}).json() == [1]
