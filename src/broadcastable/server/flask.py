"""Flask: a blueprint for tokens and keys.

>>> app = Flask("chat")
>>> app.register_blueprint(streams_blueprint(may_follow))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from flask import Blueprint, Response, jsonify, request

from broadcastable.durable_streams import DurableStreams, current
from broadcastable.errors import InvalidStreamName, StreamUnavailable

from .grants import KEYS_MAY_BE_KEPT, NO_STORE, Grant, asked_stream, checked

Authorise: TypeAlias = Callable[[str], Grant | None]
"""Your decision, in the context of the request: a valid stream name, to a `Grant` or None."""


def streams_blueprint(
    authorise: Authorise | None = None, *, durable_streams: DurableStreams | None = None, name: str = "broadcastable"
) -> Blueprint:
    """`GET /streams/token?stream=NAME` and `GET /.well-known/jwks.json`.

    The first answers `{"url": ..., "token": ...}`, as `refreshToken` of our ES module takes it, and 400 for a name that
    no stream may have, 403 where *authorise* says no, 503 while the stream server cannot be reached.

    Args:
        authorise: Nobody gets a token when None.
        durable_streams: Signs and provisions; that of the settings in force when None.
        name: The blueprint's, for `url_for`.
    """
    blueprint = Blueprint(name, __name__)

    @blueprint.get("/streams/token")
    def token() -> Response:
        try:
            stream = asked_stream(request.args.getlist("stream"))
        except InvalidStreamName:
            return Response(status=400, headers=NO_STORE)
        grant = None if authorise is None else checked(authorise(stream))
        if grant is None:
            return Response(status=403, headers=NO_STORE)
        signer = durable_streams or current()
        try:
            url, text = signer.signed_stream_primitives(stream, **grant.as_arguments())
        except StreamUnavailable:
            return Response(status=503, headers={**NO_STORE, "Retry-After": "1"})
        answer = jsonify(url=url, token=text)
        answer.headers.update(NO_STORE)
        return answer

    @blueprint.get("/.well-known/jwks.json")
    def jwks() -> Response:
        answer = jsonify((durable_streams or current()).gatekeeper.jwks())
        answer.headers.update(KEYS_MAY_BE_KEPT)
        return answer

    return blueprint
