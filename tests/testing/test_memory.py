"""`MemoryStreams` answers as a real stream server does, as far as an application can see."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator

import httpx
import pytest

from broadcastable.durable_streams import DurableStreams
from broadcastable.errors import ConfigurationError
from broadcastable.server import EmbeddedServer
from broadcastable.testing import drain, isolated_durable_streams
from broadcastable.testing.memory import MemoryStreams
from broadcastable.tokens import generate_key_pair

JSON = {"Content-Type": "application/json"}
SEEN = ("stream-up-to-date", "stream-closed", "producer-epoch", "producer-seq", "producer-expected-seq", "stream-ttl")


def produced(epoch: int, seq: int) -> dict[str, str]:
    return {**JSON, "Producer-Id": "p", "Producer-Epoch": str(epoch), "Producer-Seq": str(seq)}


CLOSE = {**JSON, "Stream-Closed": "true"}

CONVERSATIONS: dict[str, list[tuple[str, str, dict[str, str], bytes]]] = {
    "made twice": [("PUT", "", JSON, b""), ("PUT", "", JSON, b""), ("HEAD", "", {}, b"")],
    "made with another type": [("PUT", "", JSON, b""), ("PUT", "", {"Content-Type": "text/plain"}, b"")],
    "made with another lifetime": [
        ("PUT", "", {**JSON, "Stream-TTL": "60"}, b""),
        ("HEAD", "", {}, b""),
        ("PUT", "", JSON, b""),
    ],
    "never made": [
        ("HEAD", "", {}, b""),
        ("GET", "?offset=-1", {}, b""),
        ("POST", "", JSON, b"[1]"),
        ("DELETE", "", {}, b""),
    ],
    "appended and read": [
        ("PUT", "", JSON, b""),
        ("GET", "?offset=-1", {}, b""),
        ("POST", "", JSON, b'[{"a":1},{"a":2}]'),
        ("POST", "", JSON, b'{"a":3}'),
        ("POST", "", JSON, b'[[1],"x,y]"]'),
        ("GET", "?offset=-1", {}, b""),
        ("GET", "", {}, b""),
        ("GET", "?offset=now", {}, b""),
        ("GET", "?offset=nonsense", {}, b""),
    ],
    "appended wrongly": [
        ("PUT", "", JSON, b""),
        ("POST", "", JSON, b"[1,"),
        ("POST", "", JSON, b"[]"),
        ("POST", "", JSON, b""),
        ("POST", "", {"Content-Type": "text/plain"}, b"x"),
        ("GET", "?offset=-1", {}, b""),
    ],
    "appended by a producer": [
        ("PUT", "", JSON, b""),
        ("POST", "", produced(1, 0), b"[1]"),
        ("POST", "", produced(1, 0), b"[1]"),
        ("POST", "", produced(1, 1), b"[2]"),
        ("POST", "", produced(1, 0), b"[1]"),
        ("POST", "", produced(1, 3), b"[9]"),
        ("POST", "", produced(0, 2), b"[9]"),
        ("POST", "", produced(2, 1), b"[9]"),
        ("POST", "", produced(2, 0), b"[3]"),
        ("POST", "", {**JSON, "Producer-Id": "p"}, b"[9]"),
        ("GET", "?offset=-1", {}, b""),
    ],
    "begun by a producer above zero": [("PUT", "", JSON, b""), ("POST", "", produced(1, 4), b"[1]")],
    "closed": [
        ("PUT", "", JSON, b""),
        ("POST", "", JSON, b"[1]"),
        ("POST", "", CLOSE, b""),
        ("POST", "", CLOSE, b""),
        ("POST", "", JSON, b"[2]"),
        ("POST", "", CLOSE, b"[2]"),
        ("GET", "?offset=-1", {}, b""),
        ("HEAD", "", {}, b""),
    ],
    "closed with a last word": [
        ("PUT", "", JSON, b""),
        ("POST", "", CLOSE, b"[1]"),
        ("GET", "?offset=-1", {}, b""),
    ],
    "closed by a producer": [
        ("PUT", "", JSON, b""),
        ("POST", "", {**produced(1, 0), "Stream-Closed": "true"}, b"[1]"),
        ("POST", "", {**produced(1, 0), "Stream-Closed": "true"}, b"[1]"),
        ("POST", "", {**produced(1, 1), "Stream-Closed": "true"}, b"[1]"),
        ("POST", "", produced(1, 0), b"[1]"),
        ("GET", "?offset=-1", {}, b""),
    ],
    "made with a first word": [
        ("PUT", "", JSON, b'[{"a":1},2]'),
        ("PUT", "", JSON, b"[3]"),
        ("GET", "?offset=-1", {}, b""),
    ],
    "made with what is no JSON": [("PUT", "", JSON, b"[1,"), ("HEAD", "", {}, b"")],
    "made closed": [
        ("PUT", "", CLOSE, b"[1]"),
        ("PUT", "", CLOSE, b""),
        ("PUT", "", JSON, b""),
        ("POST", "", JSON, b"[2]"),
        ("GET", "?offset=-1", {}, b""),
    ],
    "with parameters of the media type": [
        ("PUT", "", JSON, b""),
        ("POST", "", {"Content-Type": "application/json; charset=utf-8"}, b"[1]"),
        ("POST", "", {"Content-Type": "Application/JSON"}, b"[2]"),
        ("PUT", "", {"Content-Type": "application/json; charset=utf-8"}, b""),
        ("GET", "?offset=-1", {}, b""),
    ],
    "without a media type": [
        ("PUT", "", JSON, b""),
        ("POST", "", {}, b"[1]"),
        ("GET", "?offset=-1", {}, b""),
    ],
    "no JSON for a browser": [
        ("PUT", "", JSON, b""),
        ("POST", "", JSON, b"NaN"),
        ("POST", "", JSON, b'["\xff"]'),
        ("POST", "", JSON, b'["\\ud800"]'),
        ("POST", "", JSON, b"[" * 100_000 + b"]" * 100_000),
        ("GET", "?offset=-1", {}, b""),
    ],
    "a name that is no UTF-8": [("PUT", "/%ff", JSON, b""), ("GET", "/%ff?offset=-1", {}, b"")],
    "deleted and made again": [
        ("PUT", "", JSON, b""),
        ("POST", "", JSON, b"[1]"),
        ("DELETE", "", {}, b""),
        ("GET", "?offset=-1", {}, b""),
        ("PUT", "", JSON, b""),
        ("GET", "?offset=-1", {}, b""),
    ],
}

Ask = Callable[[str, str, dict[str, str], bytes], httpx.Response]


@pytest.fixture
def memory() -> MemoryStreams:
    return MemoryStreams()


@pytest.fixture
def memory_client(memory: MemoryStreams) -> Iterator[httpx.Client]:
    with httpx.Client(transport=memory) as client:
        yield client


def talk(client: httpx.Client, base: str, conversation: list[tuple[str, str, dict[str, str], bytes]]) -> list[object]:
    stream = f"{base}/gid://app/Room/{uuid.uuid4()}/messages"
    heard: list[object] = []
    for method, query, headers, body in conversation:
        response = client.request(method, stream + query, headers=headers, content=body)
        told = {name: response.headers[name] for name in SEEN if name in response.headers}
        has_offset = "stream-next-offset" in response.headers
        read = response.json() if method == "GET" and response.status_code == 200 else None
        heard.append((method, query, response.status_code, told, has_offset, read))
    return heard


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_it_answers_as_a_real_server_does(
    conversation: list[tuple[str, str, dict[str, str], bytes]],
    memory: MemoryStreams,
    memory_client: httpx.Client,
    stream_server: EmbeddedServer,
) -> None:
    """Status, protocol headers and what is read are the same; the offsets themselves are each server's own."""
    authorization = {"Authorization": f"Bearer {stream_server.gatekeeper.server_token()}"}
    with httpx.Client(headers=authorization, trust_env=False) as client:
        expected = talk(client, stream_server.url, conversation)
    assert talk(memory_client, memory.url, conversation) == expected


@pytest.mark.parametrize(
    ("path", "server_url"),
    [
        ("/chat", "https://streams.example/chat"),
        ("chat/", "https://streams.example/chat/"),
        ("/chat room", "https://streams.example/chat%20room"),
        ("/", "https://streams.example"),
        ("", "https://streams.example/"),
        ("/v1/streams", ["http://a.example/v1/streams", "http://b.example/v1/streams"]),
    ],
)
def test_the_streams_are_where_the_application_has_them(path: str, server_url: str | list[str]) -> None:
    memory = MemoryStreams(path=path)
    key = generate_key_pair().private_pem
    with DurableStreams(server_url=server_url, signing_key=key, transport=memory) as application:
        application.broadcast_to("news", headline="Rain")
    assert memory.names() == ["news"]
    assert memory.events("news") == [{"headline": "Rain"}]


@pytest.mark.parametrize("path", ["/", "/chat"])
def test_an_isolated_instance_finds_them_there(path: str) -> None:
    memory = MemoryStreams(path=path)
    with isolated_durable_streams(memory) as isolated:
        isolated.broadcast_to("news", headline="Rain")
        isolated.broadcast_later_to("news", headline="Sun")
        drain(isolated)
    assert memory.events("news") == [{"headline": "Rain"}, {"headline": "Sun"}]


def test_a_request_for_another_path_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """Under another name its events would be there, and `events("news")` would be empty."""
    memory = MemoryStreams()
    key = generate_key_pair().private_pem
    with DurableStreams(server_url="https://streams.example/chat", signing_key=key, transport=memory) as application:
        with pytest.raises(ConfigurationError, match=r"under /v1/streams/ .* for /chat/news\. .*path="):
            application.broadcast_to("news", headline="Rain")
        with pytest.raises(AssertionError, match="see the log"), isolated_durable_streams():
            application.broadcast_later_to("news", headline="Rain")
            drain(application)
    assert "for /chat/news" in caplog.text
    assert memory.names() == []
