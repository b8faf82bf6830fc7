"""Starlette and FastAPI: routes for tokens and keys, a lifespan, and a dependency.

>>> app = FastAPI(lifespan=streams_lifespan(), routes=stream_routes(may_follow))
>>> Streams = Annotated[AsyncDurableStreams, Depends(durable_streams_of)]
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeAlias

from starlette.concurrency import run_in_threadpool
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from broadcastable.durable_streams import AsyncDurableStreams, current_async, discard, is_default
from broadcastable.errors import ConfigurationError, InvalidStreamName, StreamUnavailable

from .grants import KEYS_MAY_BE_KEPT, NO_STORE, Grant, asked_stream, checked

Authorise: TypeAlias = Callable[[Request, str], Grant | Awaitable[Grant | None] | None]
"""Your decision: the request and a valid stream name, to a `Grant` or None. Plain ones run in a thread."""


def stream_routes(
    authorise: Authorise | None = None, *, durable_streams: AsyncDurableStreams | None = None
) -> list[BaseRoute]:
    """`GET /streams/token?stream=NAME` and `GET /.well-known/jwks.json`.

    The first answers `{"url": ..., "token": ...}`, as `refreshToken` of our ES module takes it, and 400 for a name that
    no stream may have, 403 where *authorise* says no, 503 while the stream server cannot be reached.

    Args:
        authorise: Nobody gets a token when None.
        durable_streams: Signs and provisions; that of the settings in force when None.
    """

    async def token(request: Request) -> Response:
        try:
            stream = asked_stream(request.query_params.getlist("stream"))
        except InvalidStreamName:
            return Response(status_code=400, headers=NO_STORE)
        grant = await _decision(authorise, request, stream)
        if grant is None:
            return Response(status_code=403, headers=NO_STORE)
        signer = durable_streams or current_async()
        try:
            url, text = await signer.signed_stream_primitives(stream, **grant.as_arguments())
        except StreamUnavailable:
            return Response(status_code=503, headers={**NO_STORE, "Retry-After": "1"})
        return JSONResponse({"url": url, "token": text}, headers=NO_STORE)

    async def jwks(request: Request) -> Response:
        return JSONResponse((durable_streams or current_async()).gatekeeper.jwks(), headers=KEYS_MAY_BE_KEPT)

    return [Route("/streams/token", token), Route("/.well-known/jwks.json", jwks)]


async def _decision(authorise: Authorise | None, request: Request, stream: str) -> Grant | None:
    if authorise is None:
        return None
    if inspect.iscoroutinefunction(authorise):
        return checked(await authorise(request, stream))
    decided = await run_in_threadpool(authorise, request, stream)
    return checked(await decided if inspect.isawaitable(decided) else decided)


def streams_lifespan(
    durable_streams: AsyncDurableStreams | None = None,
) -> Callable[[Any], AbstractAsyncContextManager[dict[str, Any]]]:
    """The `lifespan` of an application whose handlers use `durable_streams_of`; it closes the clients at the end.

    Args:
        durable_streams: That of the settings in force at start-up when None. Of one that you made, the connections of
            the event loop are closed, and the synchronous twin is left to you.
    """

    @asynccontextmanager
    async def lifespan(application: Any) -> AsyncIterator[dict[str, Any]]:
        opened = durable_streams or current_async()
        try:
            yield {"durable_streams": opened}
        finally:
            await opened.close()
            if is_default(opened.sync):
                await asyncio.to_thread(discard, opened.sync)

    return lifespan


async def durable_streams_of(connection: HTTPConnection) -> AsyncDurableStreams:
    """FastAPI dependency: the `AsyncDurableStreams` that `streams_lifespan` opened."""
    try:
        opened: AsyncDurableStreams = connection.state.durable_streams
    except AttributeError:
        raise ConfigurationError(
            "The application was started without streams_lifespan(): FastAPI(lifespan=streams_lifespan())"
        ) from None
    return opened
