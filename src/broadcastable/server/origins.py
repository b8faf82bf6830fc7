"""Cross-origin requests (the CORS protocol of the Fetch standard): which pages may talk to the streams."""

from __future__ import annotations

import re
from collections.abc import Iterable

from broadcastable.errors import ConfigurationError

from .asgi import Headers

EXPOSED = (
    "Stream-Next-Offset, Stream-Cursor, Stream-Up-To-Date, Stream-Closed, Stream-SSE-Data-Encoding, Stream-TTL, "
    "Stream-Expires-At, Producer-Epoch, Producer-Seq, Producer-Expected-Seq, Producer-Received-Seq, ETag, Retry-After"
)
"""Response headers that a page may read: those of the protocol."""

REQUEST_HEADERS = (
    "Authorization, Content-Type, If-None-Match, Cache-Control, Last-Event-ID, Stream-Seq, Stream-Closed, Producer-Id, "
    "Producer-Epoch, Producer-Seq"
)
_CLIENT_METHODS = "GET, HEAD, POST"  # the others need a server token, which no page has
PREFLIGHT_SECONDS = "600"

_ORIGIN = re.compile(r"(https?)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([0-9]+))?")
_PORTS = {"http": "80", "https": "443"}


class Origins:
    """The origins whose pages are let in: texts like `https://example.com`, or `*` for every page.

    Raises:
        ConfigurationError: Something that is no origin, such as one with a path.

    Attributes:
        allowed: Each as browsers send it: in small letters, without the port that its scheme implies.
    """

    def __init__(self, allowed: Iterable[str]) -> None:
        if isinstance(allowed, str):
            raise ConfigurationError(f"allowed_origins is a sequence of origins; got the text {allowed!r}")
        self.allowed = tuple(dict.fromkeys(_as_browsers_send(origin) for origin in allowed))
        self._any = "*" in self.allowed

    def headers_for(self, origin: bytes | None) -> Headers:
        """What to add to the response of a request with the header `Origin: <origin>`."""
        if self._any:
            return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", EXPOSED.encode())]
        if not self.allowed:
            return []
        vary = (b"vary", b"Origin")
        if origin is None or not self._allows(origin):
            return [vary]
        return [
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", EXPOSED.encode()),
            vary,
        ]

    def preflight(self, origin: bytes) -> Headers | None:
        """The headers that answer a preflight from *origin*; None when its pages are not let in."""
        if not self._any and not self._allows(origin):
            return None
        return [
            (b"access-control-allow-methods", _CLIENT_METHODS.encode()),
            (b"access-control-allow-headers", REQUEST_HEADERS.encode()),
            (b"access-control-max-age", PREFLIGHT_SECONDS.encode()),
            *self.headers_for(origin),
        ]

    def _allows(self, origin: bytes) -> bool:
        return origin.decode("latin-1").lower() in self.allowed


def _as_browsers_send(origin: str) -> str:
    if origin == "*":
        return origin
    found = _ORIGIN.fullmatch(origin.lower())
    if found is None:
        raise ConfigurationError(
            f"allowed_origins holds {origin!r}; an origin is scheme, host and port alone, such as https://example.com "
            "(a host of other letters in its xn-- form), or '*' for every page"
        )
    scheme, host, port = found.groups()
    return f"{scheme}://{host}" + ("" if port is None or port == _PORTS[scheme] else f":{port}")
