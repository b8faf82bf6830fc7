"""Which stream a request is about: the path on the wire, decoded exactly once, under the rule book of stream names."""

from __future__ import annotations

from urllib.parse import unquote_to_bytes

from broadcastable.errors import InvalidStreamName
from broadcastable.names import stream_path, validate_stream_name

from .asgi import Scope


def wire_path(scope: Scope) -> bytes:
    """The path as it was sent, percent signs and all.

    Where a server kept only the decoded path it is encoded again, so that it is decoded once and not twice.
    """
    raw = scope.get("raw_path")
    if raw is None:
        return b"/" + stream_path(scope["path"].removeprefix("/")).encode()
    return bytes(raw).partition(b"?")[0]


def stream_in(path: bytes) -> str:
    """The stream name in *path*, the part of a request's path behind the mount and its slash.

    One percent-decoding: `%2e%2e` is `..` and refused, `%252e` is the text `%2e` and names another stream than `.`.

    Raises:
        InvalidStreamName: No stream can have this name, or it is not UTF-8.
    """
    try:
        name = unquote_to_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidStreamName("The path is not UTF-8") from None
    validate_stream_name(name)
    return name


def readdressed(scope: Scope, mount: str, stream: str) -> dict[str, object]:
    """The two paths of a scope for *stream*, written in the one canonical way, however the client wrote it."""
    return {"path": f"{mount}/{stream}", "raw_path": f"{mount}/{stream_path(stream)}".encode("ascii")}
