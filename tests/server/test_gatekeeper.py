"""The gate: nothing gets through that should not, and what gets through is clean."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, unquote

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from broadcastable.errors import ConfigurationError
from broadcastable.names import stream_path
from broadcastable.server import GatekeeperMiddleware
from broadcastable.server.caddyfile import CaddySite, caddyfile
from broadcastable.settings import Settings
from broadcastable.tokens import Gatekeeper, generate_key_pair
from tests.server.attacks import MOUNT, STREAM, Attack, attacks, token
from tests.server.exchange import Exchange, Inside, forever

KEYS = generate_key_pair()
TARGET = f"{MOUNT}/{STREAM}".encode()


def bearer(text: str) -> tuple[bytes, bytes]:
    return b"authorization", f"Bearer {text}".encode("latin-1")


def gatekeeper() -> Gatekeeper:
    return Gatekeeper(Settings(signing_key=KEYS.private_pem))


def gate(inside: Any, **options: Any) -> GatekeeperMiddleware:
    return GatekeeperMiddleware(inside, gatekeeper(), **options)


def hold(app: Any, **request: Any) -> Exchange:
    return asyncio.run(asyncio.wait_for(Exchange(**request).with_app(app), 8))


async def until(true: Callable[[], bool]) -> None:
    """Let the loop turn until it is *true*, ten seconds at most."""
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110  # what is waited for has no event of its own
            await asyncio.sleep(0)


# What is refused


@pytest.mark.parametrize("attack", [pytest.param(attack, id=attack.name) for attack in attacks(KEYS)])
def test_no_attack_gets_through_or_learns_anything(attack: Attack) -> None:
    inside = Inside()
    got = hold(
        gate(inside),
        method=attack.method,
        path=attack.path.encode(),
        query=attack.query.encode(),
        headers=[(name.lower().encode(), value.encode()) for name, value in attack.all_headers],
    )
    assert inside.scopes == []
    assert got.status == attack.status
    assert got.text == ""
    assert {name for name, _ in got.sent[0]["headers"]} <= {b"cache-control", b"content-length", b"www-authenticate"}


def test_a_token_of_64_kib_is_refused_unread() -> None:
    inside = Inside()
    assert hold(gate(inside), path=TARGET, headers=[bearer("A" * 65_536)]).status == 401
    assert inside.scopes == []


def test_a_websocket_is_refused_even_with_a_good_token() -> None:
    inside = Inside()
    scope = {
        "type": "websocket",
        "path": TARGET.decode(),
        "query_string": f"token={token(KEYS)}".encode(),
        "headers": [],
    }
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(gate(inside)(scope, forever, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
    assert scope["query_string"] == b""


_PIECES = st.sampled_from(
    [
        "gid:",
        "",
        "app",
        "Room",
        "1",
        "2",
        "messages",
        ".",
        "..",
        "%2e",
        "%2E%2e",
        "%252e",
        "__ds",
        "%2F",
        "%00",
        "x",
        "é",
    ]
)
_STREAMS = (STREAM, "gid://app/Room/2", "gid://app/Room/1", "é/x", "x", "..", "")
_CLIENTS = {
    token(KEYS, stream=stream, permissions=permissions): (stream, permissions)
    for stream in _STREAMS
    for permissions in (["read"], ["write"], ["read", "write"])
}


def _spellings(name: str) -> st.SearchStrategy[str]:
    """*name* with some characters encoded, once, or, where hit again, twice: then it is another name."""

    def spell(places: list[int]) -> str:
        return "".join(
            quote(quote(c, safe="")) if places.count(i) > 1 else f"%{ord(c):02x}" if i in places and c < "\x80" else c
            for i, c in enumerate(name)
        )

    return st.lists(st.integers(0, max(len(name) - 1, 0)), max_size=4).map(spell)


_PATHS = st.one_of(
    st.sampled_from(_STREAMS).flatmap(_spellings),
    st.lists(_PIECES, max_size=7).map("/".join),
    st.text(max_size=40),
    st.binary(max_size=20).map(lambda raw: quote(raw)),
)
_TOKENS = st.one_of(
    st.sampled_from(sorted(_CLIENTS)),
    st.sampled_from(sorted(_CLIENTS)).flatmap(
        lambda good: st.integers(0, len(good) - 2).map(
            lambda i: good[:i] + ("A" if good[i] != "A" else "B") + good[i + 1 :]
        )
    ),
    st.text(max_size=60),
)
_MATCHING = st.sampled_from(sorted(_CLIENTS)).flatmap(
    lambda good: st.tuples(_spellings(_CLIENTS[good][0]), st.just(good))
)
_ANY_TOKEN_OF_OURS = st.tuples(_PATHS, st.sampled_from(sorted(_CLIENTS)))
_PAIRS = st.one_of(_MATCHING, _ANY_TOKEN_OF_OURS, st.tuples(_PATHS, _TOKENS))
_METHODS = st.sampled_from(["GET", "GET", "HEAD", "POST", "POST", "PUT", "DELETE", "OPTIONS", "get", "post"])


@pytest.fixture(scope="module")
def one_loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


_FUZZED_INSIDE = Inside()
_FUZZED = gate(_FUZZED_INSIDE)


@settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "2000")), deadline=None, suppress_health_check=list(HealthCheck)
)
@given(pair=_PAIRS, method=_METHODS, in_query=st.booleans())
def test_no_pair_of_path_and_token_gets_through_but_the_right_one(
    one_loop: asyncio.AbstractEventLoop, pair: tuple[str, str], method: str, in_query: bool
) -> None:
    """The oracle decodes with the standard library and knows only which tokens were made."""
    path, text = pair
    _FUZZED_INSIDE.scopes.clear()
    raw = f"{MOUNT}/{path}".encode("utf-8", "surrogatepass")
    carried = (
        {"query": f"token={quote(text, safe='')}".encode(errors="replace")}
        if in_query
        else {"headers": [bearer(text.encode("latin-1", "replace").decode("latin-1"))]}
    )
    got = one_loop.run_until_complete(Exchange(method=method, path=raw, **carried).with_app(_FUZZED))
    event("let in" if _FUZZED_INSIDE.scopes else f"refused with {got.status}")
    if _FUZZED_INSIDE.scopes:
        stream, permissions = _CLIENTS[text]
        assert method in {"GET": ["GET", "HEAD"], "POST": ["POST"]}[{"HEAD": "GET"}.get(method, method)]
        assert {"GET": "read", "HEAD": "read", "POST": "write"}[method] in permissions
        assert unquote(path, errors="strict") == stream
        assert not {"", ".", ".."} & (set(stream.split("/")) - ({""} if "://" in stream else set()))
        assert _FUZZED_INSIDE.scopes[0]["raw_path"] == f"{MOUNT}/{stream_path(stream)}".encode()
    else:
        assert got.status in {400, 401, 403, 404}


# What gets through


@pytest.mark.parametrize(
    "path",
    [
        STREAM,
        quote(STREAM, safe=""),
        quote(STREAM, safe="/"),
        STREAM.replace("Room", "%52oom"),
        STREAM.replace("/1/", "%2F1%2f"),
    ],
)
def test_every_spelling_of_a_path_reaches_the_app_as_one(path: str) -> None:
    inside = Inside()
    got = hold(gate(inside), path=f"{MOUNT}/{path}".encode(), headers=[bearer(token(KEYS))])
    assert got.status == 200
    assert inside.scopes[0]["path"] == f"{MOUNT}/{STREAM}"
    assert inside.scopes[0]["raw_path"] == f"{MOUNT}/{STREAM}".encode()


@pytest.mark.parametrize("name", ["комната/1", "100%", "a b", "gid://app/Room/a%2Fb", "x" * 512, "q=1&r=2;s", "naïve"])
def test_a_name_of_any_letters_is_the_one_in_its_token(name: str) -> None:
    inside = Inside()
    got = hold(gate(inside), path=f"{MOUNT}/{stream_path(name)}".encode(), headers=[bearer(token(KEYS, stream=name))])
    assert got.status == 200
    assert inside.scopes[0]["path"] == f"{MOUNT}/{name}"
    assert inside.scopes[0]["raw_path"] == f"{MOUNT}/{stream_path(name)}".encode()


def test_a_server_that_keeps_only_the_decoded_path_is_decoded_no_further() -> None:
    inside = Inside()
    exchange = Exchange(headers=[bearer(token(KEYS, stream="a%2Fb"))])
    exchange.scope.pop("raw_path")
    exchange.scope["path"] = f"{MOUNT}/a%2Fb"
    asyncio.run(exchange.with_app(gate(inside)))
    assert exchange.status == 200
    assert inside.scopes[0]["path"] == f"{MOUNT}/a%2Fb"


@pytest.mark.parametrize(
    ("query", "rest"),
    [
        ("token={}", b""),
        ("offset=-1&token={}&live=sse", b"offset=-1&live=sse"),
        ("%74oken={}&offset=%2D1", b"offset=%2D1"),
        ("offset=a+b&&x=token&token={}", b"offset=a+b&&x=token"),
    ],
)
def test_the_token_leaves_the_query_and_the_rest_stays_as_written(query: str, rest: bytes) -> None:
    inside = Inside()
    exchange = Exchange(path=TARGET, query=query.format(token(KEYS)).encode())
    asyncio.run(exchange.with_app(gate(inside)))
    assert exchange.status == 200
    assert inside.scopes[0]["query_string"] == rest
    assert exchange.scope["query_string"] == rest  # from which the server writes its log


def test_the_authorization_header_goes_no_further() -> None:
    inside = Inside()
    hold(gate(inside), path=TARGET, headers=[(b"accept", b"*/*"), bearer(token(KEYS))])
    assert inside.scopes[0]["headers"] == [(b"accept", b"*/*")]


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_a_server_token_may_do_everything_everywhere(method: str) -> None:
    inside = Inside()
    server = Gatekeeper(Settings(signing_key=KEYS.private_pem)).server_token()
    headers = [bearer(server), (b"stream-closed", b"true")]
    assert hold(gate(inside), method=method, path=MOUNT.encode() + b"/x", headers=headers).status == 200


@pytest.mark.parametrize(("method", "permission"), [("GET", "read"), ("HEAD", "read"), ("POST", "write")])
def test_a_permission_is_enough_for_its_method(method: str, permission: str) -> None:
    inside = Inside()
    headers = [bearer(token(KEYS, permissions=[permission]))]
    assert hold(gate(inside), method=method, path=TARGET, headers=headers).status == 200


def test_the_scheme_of_the_header_has_no_case() -> None:
    header = (b"Authorization", f"bEARER {token(KEYS)}".encode())
    assert hold(gate(Inside()), path=TARGET, headers=[header]).status == 200


def test_shared_caches_are_told_to_keep_nothing() -> None:
    inside = Inside(headers=[(b"Cache-Control", b"public, max-age=60"), (b"etag", b'"1"')])
    got = hold(gate(inside), path=TARGET, headers=[bearer(token(KEYS))])
    assert got.header("cache-control") == "private, max-age=60"
    assert got.header("etag") == '"1"'


# Bodies


def test_a_body_arrives_whole() -> None:
    inside = Inside()
    hold(gate(inside), method="POST", path=TARGET, headers=[bearer(token(KEYS))], body=[b"[1,", b"", b"2]"])
    assert inside.bodies == [b"[1,2]"]


@pytest.mark.parametrize(
    ("declared", "body"),
    [
        (b"11", []),  # refused before a byte of it has come
        (None, [b"x" * 6, b"x" * 5, b"x"]),
        (b"3", [b"x" * 11]),
    ],
)
def test_a_body_over_the_limit_is_413_declared_or_counted(declared: bytes | None, body: list[bytes]) -> None:
    inside = Inside()
    length = [] if declared is None else [(b"content-length", declared)]
    headers = [bearer(token(KEYS)), *length]
    got = hold(gate(inside, max_body=10), method="POST", path=TARGET, headers=headers, body=body)
    assert got.status == 413
    assert got.header("connection") == "close"
    assert inside.scopes == []


def test_a_body_of_the_limit_gets_through() -> None:
    inside = Inside()
    hold(gate(inside, max_body=10), method="POST", path=TARGET, headers=[bearer(token(KEYS))], body=[b"x" * 10])
    assert inside.bodies == [b"x" * 10]


def test_a_body_whose_sender_was_cut_off_never_reaches_the_app() -> None:
    inside = Inside()
    messages = iter([{"type": "http.request", "body": b"[1", "more_body": True}, {"type": "http.disconnect"}])
    exchange = Exchange(method="POST", path=TARGET, headers=[bearer(token(KEYS))])

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        exchange.sent.append(message)

    asyncio.run(gate(inside)(exchange.scope, receive, send))
    assert inside.scopes == []
    assert exchange.sent == []


# Reads that go on


class Waiting:
    """A stream server whose reads go on until they are cancelled; *begun* says whether the response has begun."""

    def __init__(self, *, begun: bool) -> None:
        self.running = 0
        self._begun = begun

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.running += 1
        try:
            if self._begun:
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": b"event", "more_body": True})
            await forever()
        finally:
            self.running -= 1


def soon(**changes: Any) -> str:
    """A token that expires within two seconds."""
    return token(KEYS, exp=int(time.time()) + 2, **changes)


def test_a_response_that_has_begun_ends_cleanly_when_its_token_expires() -> None:
    waiting = Waiting(begun=True)
    got = hold(gate(waiting), path=TARGET, query=b"offset=-1&live=sse", headers=[bearer(soon())])
    assert got.status == 200
    assert got.text == "event"
    assert got.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
    assert waiting.running == 0


def test_a_long_poll_is_answered_at_its_offset_when_its_token_expires() -> None:
    waiting = Waiting(begun=False)
    query = b"offset=00_07&live=long-poll&cursor=42"
    got = hold(gate(waiting), path=TARGET, query=query, headers=[bearer(soon())])
    assert got.status == 204
    assert got.header("stream-next-offset") == "00_07"
    assert got.header("stream-up-to-date") == "true"
    assert got.header("stream-cursor") == "42"
    assert waiting.running == 0


def test_a_read_from_an_offset_that_only_the_app_knows_is_401_when_its_token_expires() -> None:
    queries = (
        b"offset=now&live=long-poll",
        b"offset=-1&live=long-poll",
        b"offset=%0d%0aX:%20y&live=long-poll",
        b"offset=%E2%82%AC&live=long-poll",
        b"offset=00_07",
        b"",
    )

    async def read_all() -> list[Exchange]:
        app = gate(Waiting(begun=False))
        reads = [Exchange(path=TARGET, query=query, headers=[bearer(soon())]) for query in queries]
        return await asyncio.wait_for(asyncio.gather(*(read.with_app(app) for read in reads)), 8)

    assert [read.status for read in asyncio.run(read_all())] == [401] * len(queries)


@pytest.mark.parametrize("sends_more", [True, False])
def test_an_app_that_does_not_hear_of_the_end_sends_nothing_more(sends_more: bool) -> None:
    """As `asyncio.wait_for` of Python 3.11 does not, where an event comes in the same moment."""

    async def hard_of_hearing(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"early", "more_body": True})
        with suppress(asyncio.CancelledError):
            await forever()
        if sends_more:
            await send({"type": "http.response.body", "body": b"late", "more_body": True})
        await forever()

    gatekeeper = gate(hard_of_hearing)
    got = hold(gatekeeper, path=TARGET, query=b"live=sse", headers=[bearer(soon())])
    assert got.text == "early"
    assert got.sent[-1]["more_body"] is False
    assert gatekeeper.live_reads == 0


def test_a_reader_that_leaves_is_forgotten_at_once() -> None:
    waiting = Waiting(begun=True)
    gatekeeper = gate(waiting)
    exchange = Exchange(path=TARGET, headers=[bearer(token(KEYS))])

    async def leave() -> None:
        gone = asyncio.Event()

        async def receive() -> Any:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            exchange.sent.append(message)

        reading = asyncio.ensure_future(gatekeeper(exchange.scope, receive, send))
        await until(lambda: bool(exchange.sent))
        assert gatekeeper.live_reads == waiting.running == 1
        gone.set()
        await reading
        assert gatekeeper.live_reads == waiting.running == 0

    asyncio.run(leave())
    assert exchange.sent[-1]["more_body"] is True  # nobody is there to be told of an end


def test_an_error_of_the_app_is_the_server_s_to_see() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise LookupError("broken")

    for method in ("GET", "POST"):
        with pytest.raises(LookupError, match="broken"):
            hold(gate(broken), method=method, path=TARGET, headers=[bearer(token(KEYS))])


def test_keys_that_change_end_the_reads_of_the_old_ones_alone() -> None:
    new = generate_key_pair()
    waiting = Waiting(begun=True)
    gatekeeper = gate(waiting)

    async def rotate() -> None:
        old_reader = Exchange(path=TARGET, headers=[bearer(token(KEYS))])
        new_reader = Exchange(path=TARGET, headers=[bearer(token(new))])
        gatekeeper.use(Gatekeeper(Settings(signing_key=new.private_pem, verify_keys=(KEYS.public_pem,))))
        tasks = [asyncio.ensure_future(reader.with_app(gatekeeper)) for reader in (old_reader, new_reader)]
        await until(lambda: gatekeeper.live_reads == 2)
        gatekeeper.use(Gatekeeper(Settings(signing_key=new.private_pem)))
        await tasks[0]
        assert old_reader.sent[-1]["more_body"] is False
        assert gatekeeper.live_reads == 1
        refused = await Exchange(path=TARGET, headers=[bearer(token(KEYS))]).with_app(gatekeeper)
        assert refused.status == 401
        gatekeeper.end_reads()
        await tasks[1]

    asyncio.run(rotate())


def test_keys_that_change_while_a_read_is_let_in_end_it_too() -> None:
    """What another thread does between the verification and the read, done in the middle of the verification."""
    new = generate_key_pair()
    waiting = Waiting(begun=False)

    class Rotating(Gatekeeper):
        def decode(self, token: str) -> dict[str, Any]:
            claims = super().decode(token)
            app.use(Gatekeeper(Settings(signing_key=new.private_pem)))
            return claims

    app = GatekeeperMiddleware(waiting, Rotating(Settings(signing_key=KEYS.private_pem)))
    assert hold(app, path=TARGET, headers=[bearer(token(KEYS))]).status == 401
    assert waiting.running == app.live_reads == 0


# Verdicts


class Counting(Gatekeeper):
    """Counts the verifications."""

    count = 0

    def decode(self, token: str) -> dict[str, Any]:
        self.count += 1
        return super().decode(token)


def test_a_thousand_readers_that_come_back_cost_one_verification_each() -> None:
    counting = Counting(Settings(signing_key=KEYS.private_pem))
    app = GatekeeperMiddleware(Inside(), counting)
    tokens = [counting.encode({"stream": STREAM, "permissions": ["read"], "identity": str(n)}) for n in range(1_000)]

    async def read_all() -> None:
        for text in tokens:
            assert (await Exchange(path=TARGET, headers=[bearer(text)]).with_app(app)).status == 200

    for _ in range(3):
        asyncio.run(read_all())
    assert counting.count == 1_000


def test_verdicts_are_bounded_and_refused_tokens_take_no_room() -> None:
    counting = Counting(Settings(signing_key=KEYS.private_pem))
    app = GatekeeperMiddleware(Inside(), counting, remembered_tokens=2)
    first, second, third = (token(KEYS, identity=name) for name in "abc")
    for text in (first, second, "bad", first, "bad", third, first, second):
        hold(app, path=TARGET, headers=[bearer(text)])
    # first and second are verified, bad each time, third drives out second, which is verified anew.
    assert counting.count == 6


def test_a_remembered_token_is_forgotten_when_it_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    app = gate(Inside())
    text = token(KEYS)
    assert hold(app, path=TARGET, headers=[bearer(text)]).status == 200
    now = time.time()
    monkeypatch.setattr("broadcastable.server.verdicts.time", SimpleNamespace(time=lambda: now + 7_211))
    assert hold(app, path=TARGET, headers=[bearer(text)]).status == 401


# Pages of other origins

PAGE = "https://app.example.com"


def preflight(app: Any, origin: str = PAGE) -> Exchange:
    headers = [
        (b"origin", origin.encode()),
        (b"access-control-request-method", b"GET"),
        (b"access-control-request-headers", b"authorization"),
    ]
    return hold(app, method="OPTIONS", path=TARGET, headers=headers)


def test_a_preflight_of_an_allowed_page_needs_no_token() -> None:
    got = preflight(gate(Inside(), allowed_origins=[PAGE]))
    assert got.status == 204
    assert got.header("access-control-allow-origin") == PAGE
    assert got.header("access-control-allow-methods") == "GET, HEAD, POST"
    assert "Authorization" in (got.header("access-control-allow-headers") or "")
    assert got.header("vary") == "Origin"


@pytest.mark.parametrize("origin", ["https://app.example.com.evil.example", "http://app.example.com", "null", ""])
def test_a_preflight_of_another_page_is_refused_without_a_word(origin: str) -> None:
    got = preflight(gate(Inside(), allowed_origins=[PAGE]), origin)
    assert got.status == 403
    assert got.header("access-control-allow-origin") is None


def test_no_page_is_let_in_by_default() -> None:
    assert preflight(gate(Inside())).status == 403
    got = hold(gate(Inside()), path=TARGET, headers=[bearer(token(KEYS)), (b"origin", PAGE.encode())])
    assert got.status == 200
    assert got.header("access-control-allow-origin") is None


@pytest.mark.parametrize(("allowed", "said"), [([PAGE], PAGE), (["*"], "*")])
def test_a_page_may_read_the_protocol_s_headers_and_see_a_refusal(allowed: list[str], said: str) -> None:
    inside = Inside(headers=[(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", b"x")])
    app = gate(inside, allowed_origins=allowed)
    for headers, status in (([bearer(token(KEYS))], 200), ([], 401)):
        got = hold(app, path=TARGET, headers=[*headers, (b"origin", PAGE.encode())])
        assert got.status == status
        assert got.header("access-control-allow-origin") == said
        for name in (
            "Stream-Next-Offset",
            "Stream-Cursor",
            "Stream-Up-To-Date",
            "Stream-Closed",
            "Producer-Seq",
            "ETag",
        ):
            assert name in (got.header("access-control-expose-headers") or "").split(", ")
        assert got.header("access-control-allow-credentials") is None


@pytest.mark.parametrize("given", [PAGE, "https://App.Example.com", "HTTPS://app.example.com:443"])
def test_an_origin_may_be_written_otherwise_than_browsers_send_it(given: str) -> None:
    got = preflight(gate(Inside(), allowed_origins=[given]))
    assert got.header("access-control-allow-origin") == PAGE
    assert f'header Origin "{PAGE}"' in caddyfile(CaddySite(port=4437, origins=[given]), gatekeeper().jwks())


@pytest.mark.parametrize(
    "origin",
    [
        "app.example.com",
        f"{PAGE}/",
        f"{PAGE}/path",
        "https://*.example.com",
        "",
        "http://a b",
        f"{PAGE}}}",
        "https://é",
    ],
)
def test_something_that_is_no_origin_is_refused_at_once(origin: str) -> None:
    with pytest.raises(ConfigurationError, match="allowed_origins"):
        gate(Inside(), allowed_origins=[origin])


def test_one_text_in_place_of_several_origins_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="sequence"):
        gate(Inside(), allowed_origins=PAGE)


# Setting up


def test_a_missing_key_shows_when_the_server_starts() -> None:
    with pytest.raises(ConfigurationError, match="broadcastable keys generate"):
        GatekeeperMiddleware(Inside(), Gatekeeper(Settings()))


@pytest.mark.parametrize("mount", ["", "/", "v1/streams", "/v1/streams/"])
def test_a_mount_that_is_no_path_is_refused(mount: str) -> None:
    with pytest.raises(ConfigurationError, match="mount"):
        gate(Inside(), mount=mount)


async def _live(app: Any) -> list[str]:
    """Start *app* and shut it down as a server does; what it said."""
    said: list[str] = []
    messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        said.append(message["type"])

    await app({"type": "lifespan", "state": {}}, receive, send)
    return said


def test_the_gate_starts_and_stops_for_an_app_that_knows_no_lifespan() -> None:
    assert asyncio.run(_live(gate(Inside()))) == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_an_app_with_a_lifespan_has_its_own() -> None:
    from contextlib import asynccontextmanager

    from starlette.applications import Starlette

    seen: list[str] = []

    @asynccontextmanager
    async def lifespan(app: Any) -> Any:
        seen.append("up")
        yield
        seen.append("down")

    said = asyncio.run(_live(gate(Starlette(lifespan=lifespan))))
    assert said == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert seen == ["up", "down"]


def test_an_app_that_fails_to_start_is_not_said_to_have_started() -> None:
    async def failing(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no disk"})

    assert asyncio.run(_live(gate(failing))) == ["lifespan.startup.failed"]
