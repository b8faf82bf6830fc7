"""The token endpoint, the key set and the open streams, under Starlette, FastAPI and Flask, before a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from flask import Flask
from flask import request as flask_request
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request

from broadcastable.durable_streams import AsyncDurableStreams, DurableStreams, current, is_default
from broadcastable.errors import ConfigurationError, UsageError
from broadcastable.server import EmbeddedServer, Grant
from broadcastable.server.flask import streams_blueprint
from broadcastable.server.grants import checked
from broadcastable.server.starlette import durable_streams_of, stream_routes, streams_lifespan
from broadcastable.settings import override
from tests.server.serving import served

Get = Callable[..., Any]


def decide(user: str | None, stream: str) -> Grant | None:
    """Ada follows everything under rooms/, and writes to rooms/1."""
    if user != "ada" or not stream.startswith("rooms/"):
        return None
    return Grant(("read", "write") if stream == "rooms/1" else ("read",), identity=user, expires_in=30)


@pytest.fixture
def durable_streams(stream_server: EmbeddedServer) -> Iterator[DurableStreams]:
    with DurableStreams(stream_server.settings) as durable_streams:
        yield durable_streams


@contextmanager
def _starlette(authorise: Any, durable_streams: DurableStreams) -> Iterator[Get]:
    twin = AsyncDurableStreams(durable_streams)
    app = Starlette(routes=stream_routes(authorise, durable_streams=twin), lifespan=streams_lifespan(twin))
    with served(app) as base, httpx.Client(base_url=base) as client:
        yield client.get


@contextmanager
def _flask(authorise: Any, durable_streams: DurableStreams) -> Iterator[Get]:
    app = Flask(__name__)
    app.register_blueprint(streams_blueprint(authorise, durable_streams=durable_streams))

    def get(path: str, *, params: Any = None, headers: Any = None) -> Any:
        answer = client.get(path, query_string=params, headers=headers)
        return httpx.Response(answer.status_code, headers=list(answer.headers.items()), content=answer.data)

    with app.test_client() as client:
        yield get


def _in_starlette(request: Request, stream: str) -> Grant | None:
    return decide(request.headers.get("user"), stream)


async def _in_starlette_awaited(request: Request, stream: str) -> Grant | None:
    return decide(request.headers.get("user"), stream)


def _in_flask(stream: str) -> Grant | None:
    return decide(flask_request.headers.get("user"), stream)


@pytest.fixture(
    params=[(_starlette, _in_starlette), (_starlette, _in_starlette_awaited), (_flask, _in_flask)],
    ids=["starlette", "starlette, awaited", "flask"],
)
def get(request: pytest.FixtureRequest, durable_streams: DurableStreams) -> Iterator[Get]:
    framework, authorise = request.param
    with framework(authorise, durable_streams) as get:
        yield get


def test_the_token_that_is_granted_opens_the_stream(get: Get, durable_streams: DurableStreams) -> None:
    answer = get("/streams/token", params={"stream": "rooms/2"}, headers={"user": "ada"})
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    url, text = answer.json()["url"], answer.json()["token"]
    durable_streams.broadcast_to("rooms/2", hello="world")
    bearer = {"Authorization": f"Bearer {text}", "Content-Type": "application/json"}
    assert {"hello": "world"} in httpx.get(url, headers=bearer).json()
    assert httpx.post(url, headers=bearer, content=b"[1]").status_code == 403
    claims = durable_streams.gatekeeper.decode(text)
    assert claims["identity"] == "ada"
    assert claims["exp"] - claims["iat"] == 30


def test_the_permissions_that_are_granted_are_those_of_the_token(get: Get) -> None:
    granted = get("/streams/token", params={"stream": "rooms/1"}, headers={"user": "ada"}).json()
    bearer = {"Authorization": f"Bearer {granted['token']}", "Content-Type": "application/json"}
    assert httpx.post(granted["url"], headers=bearer, content=b"[1]").status_code == 204


def test_a_refusal_says_403_and_no_more(get: Get) -> None:
    for asked, user in (("rooms/1", "eve"), ("secrets", "ada"), ("rooms", "ada")):
        answer = get("/streams/token", params={"stream": asked}, headers={"user": user})
        assert (answer.status_code, answer.text) == (403, "")


@pytest.mark.parametrize(
    "params", [{}, {"stream": ""}, {"stream": ["rooms/1", "rooms/2"]}, {"stream": "rooms/../x"}, {"stream": "rooms//1"}]
)
def test_a_name_that_no_stream_may_have_is_400_and_asks_nobody(get: Get, params: Any) -> None:
    answer = get("/streams/token", params=params, headers={"user": "ada"})
    assert (answer.status_code, answer.text) == (400, "")


def test_the_key_set_verifies_the_tokens(get: Get, durable_streams: DurableStreams) -> None:
    answer = get("/.well-known/jwks.json")
    assert answer.json() == durable_streams.gatekeeper.jwks()
    assert "d" not in answer.json()["keys"][0]
    assert answer.headers["cache-control"] == "public, max-age=300"


@pytest.mark.parametrize("framework", [_starlette, _flask])
def test_without_a_callable_nobody_gets_a_token(framework: Any, durable_streams: DurableStreams) -> None:
    with framework(None, durable_streams) as get:
        assert get("/streams/token", params={"stream": "rooms/1"}, headers={"user": "ada"}).status_code == 403


def test_true_is_no_grant(durable_streams: DurableStreams) -> None:
    """It says not what is granted; an endpoint that guessed would guess too much or too little."""
    with pytest.raises(UsageError, match="Grant, or None"):
        checked(True)
    with _starlette(lambda request, stream: True, durable_streams) as get:
        assert get("/streams/token", params={"stream": "rooms/1"}).status_code == 500


def test_an_unknown_permission_is_the_application_s_error(durable_streams: DurableStreams) -> None:
    with _starlette(lambda request, stream: Grant(("admin",)), durable_streams) as get:
        assert get("/streams/token", params={"stream": "rooms/1"}).status_code == 500


@pytest.mark.parametrize(("framework", "authorise"), [(_starlette, _in_starlette), (_flask, _in_flask)])
def test_while_the_stream_server_is_away_the_answer_is_503(framework: Any, authorise: Any, signing_key: str) -> None:
    # Port 9 is for discarding; nothing listens there.
    nowhere = DurableStreams(server_url="http://127.0.0.1:9/v1/streams", signing_key=signing_key)
    with nowhere, framework(authorise, nowhere) as get:
        answer = get("/streams/token", params={"stream": "rooms/1"}, headers={"user": "ada"})
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"


def test_a_plain_callable_is_kept_off_the_event_loop(durable_streams: DurableStreams) -> None:
    def asks_the_database(request: Request, stream: str) -> Grant:
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        return Grant()

    with _starlette(asks_the_database, durable_streams) as get:
        assert get("/streams/token", params={"stream": "rooms/1"}).status_code == 200


# FastAPI


def test_a_handler_of_fastapi_gets_the_open_streams(stream_server: EmbeddedServer) -> None:
    """The lifespan opens those of the settings in force, and closes them at the end."""
    with override(server_url=stream_server.url, signing_key=stream_server.settings.signing_key):
        app = FastAPI(lifespan=streams_lifespan())
        opened: list[AsyncDurableStreams] = []

        @app.post("/say")
        async def say(streams: Annotated[AsyncDurableStreams, Depends(durable_streams_of)]) -> dict[str, str]:
            opened.append(streams)
            await streams.broadcast_to("fastapi", said="hello")
            return {"url": await streams.signed_stream_url("fastapi")}

        with served(app) as base:
            url = httpx.post(f"{base}/say").json()["url"]
            assert is_default(opened[0].sync)
            assert current() is opened[0].sync
        assert not is_default(opened[0].sync)
    assert {"said": "hello"} in httpx.get(url).json()


def test_streams_that_the_application_made_are_left_open(durable_streams: DurableStreams) -> None:
    with served(FastAPI(lifespan=streams_lifespan(AsyncDurableStreams(durable_streams)))):
        pass
    assert durable_streams.broadcast_to("fastapi", still=True)


def test_a_handler_without_the_lifespan_is_told_what_is_missing() -> None:
    connection = HTTPConnection({"type": "http", "state": {}})
    with pytest.raises(ConfigurationError, match="lifespan=streams_lifespan"):
        asyncio.run(durable_streams_of(connection))


def test_the_routes_are_fastapi_s_too(durable_streams: DurableStreams) -> None:
    twin = AsyncDurableStreams(durable_streams)
    app = FastAPI(routes=stream_routes(_in_starlette, durable_streams=twin), lifespan=streams_lifespan(twin))
    with served(app) as base, httpx.Client(base_url=base) as client:
        assert client.get("/.well-known/jwks.json").status_code == 200
        asked = {"params": {"stream": "rooms/1"}, "headers": {"user": "ada"}}
        assert client.get("/streams/token", **asked).status_code == 200
