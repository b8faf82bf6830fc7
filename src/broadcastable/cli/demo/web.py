"""The demo's web application: thin handlers over `Chat`, and the files of the page."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from broadcastable import static
from broadcastable.errors import BroadcastableError

from .chat import LONGEST_BURST, Chat, NotInTheChat

_PAGE = Path(__file__).parent / "page"
_FILES = {
    "page.css": _PAGE / "page.css",
    "page.js": _PAGE / "page.js",
    "messages.js": _PAGE / "messages.js",
    "panel.js": _PAGE / "panel.js",
    "broadcastable.js": static.MODULE,
}
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
"""JSON can spell a half of a character, and no database keeps one."""
_NO_STORE = {"cache-control": "no-store"}


class _Refused(ValueError):
    """What was sent makes no sense; the text says why."""


def web_app(chat: Chat) -> Starlette:
    """The application that serves the page of *chat*."""

    async def index(request: Request) -> Response:
        return FileResponse(_PAGE / "index.html", headers=_NO_STORE)

    async def file(request: Request) -> Response:
        path = _FILES.get(request.path_params["name"])
        return Response(status_code=404) if path is None else FileResponse(path, headers=_NO_STORE)

    def rooms(request: Request, sent: Any) -> Any:
        return [{"id": room.id, "name": room.name, "stream": chat.stream_name(room)} for room in chat.rooms()]

    def make_room(request: Request, sent: Any) -> Any:
        return {"id": chat.make_room(_text(sent, "name", 40)).id}

    def snapshot(request: Request, sent: Any) -> Any:
        return _reachable(request, chat.snapshot(request.path_params["room"]))

    def token(request: Request, sent: Any) -> Any:
        return _reachable(request, chat.token(request.path_params["room"]))

    def post(request: Request, sent: Any) -> Any:
        message, txid = chat.post(request.path_params["room"], _text(sent, "author", 40), _text(sent, "body", 2_000))
        return {"id": message, "txid": txid}

    def burst(request: Request, sent: Any) -> Any:
        count = sent.get("count")
        if not isinstance(count, int) or not 1 <= count <= LONGEST_BURST:
            raise _Refused(f"count is between 1 and {LONGEST_BURST}.")
        chat.post_many(request.path_params["room"], _text(sent, "author", 40), count)
        return {}

    def change(request: Request, sent: Any) -> Any:
        message = request.path_params["message"]
        if "room_id" in sent:
            if not isinstance(sent["room_id"], int):
                raise _Refused("room_id is a number.")
            return {"txid": chat.move(message, sent["room_id"])}
        return {"txid": chat.edit(message, _text(sent, "body", 2_000))}

    def remove(request: Request, sent: Any) -> Any:
        return {"txid": chat.remove(request.path_params["message"])}

    def server(request: Request, sent: Any) -> Any:
        if request.method == "PUT":
            chat.let_stream_server_run(bool(sent.get("running")))
        return {"running": chat.stream_server_runs}

    return Starlette(
        routes=[
            Route("/", index),
            Route("/page/{name}", file),
            Route("/rooms", _json(rooms)),
            Route("/rooms", _json(make_room), methods=["POST"]),
            Route("/rooms/{room:int}/snapshot", _json(snapshot)),
            Route("/rooms/{room:int}/token", _json(token)),
            Route("/rooms/{room:int}/messages", _json(post), methods=["POST"]),
            Route("/rooms/{room:int}/burst", _json(burst), methods=["POST"]),
            Route("/messages/{message:int}", _json(change), methods=["PATCH"]),
            Route("/messages/{message:int}", _json(remove), methods=["DELETE"]),
            Route("/server", _json(server), methods=["GET", "PUT"]),
        ]
    )


def _json(handler: Callable[[Request, Any], Any]) -> Callable[[Request], Awaitable[Response]]:
    """Run *handler* in a thread, for the database blocks; JSON in, JSON out, errors as one sentence."""

    async def answer(request: Request) -> Response:
        try:
            sent = await _sent(request)
            return JSONResponse(await run_in_threadpool(handler, request, sent), headers=_NO_STORE)
        except NotInTheChat as error:
            return _error(404, error)
        except _Refused as error:
            return _error(400, error)
        except BroadcastableError as error:
            return _error(503, error)

    return answer


async def _sent(request: Request) -> Any:
    if request.method in {"GET", "HEAD"}:
        return {}
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
        raise _Refused("Only the demo's own page may change something.")
    try:
        sent = await request.json()
    except (ValueError, RecursionError) as error:
        raise _Refused("The body is JSON.") from error
    if not isinstance(sent, dict):
        raise _Refused("The body is a JSON object.")
    return sent


def _text(sent: dict[str, Any], name: str, longest: int) -> str:
    value = sent.get(name)
    if not isinstance(value, str) or not 1 <= len(value.strip()) <= longest or _LONE_SURROGATE.search(value):
        raise _Refused(f"{name} is a text of 1 to {longest} characters.")
    return value.strip()


def _reachable(request: Request, stream: dict[str, Any]) -> dict[str, Any]:
    """*stream* under the host name by which the page itself was reached: over a network it is not 127.0.0.1."""
    url = urlsplit(stream["url"])
    host = request.url.hostname or "127.0.0.1"
    netloc = f"[{host}]:{url.port}" if ":" in host else f"{host}:{url.port}"
    return {**stream, "url": url._replace(netloc=netloc).geturl()}


def _error(status: int, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=status, headers=_NO_STORE)
