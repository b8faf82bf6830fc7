"""In front of a stream server: who may read and write what; and a stream server to embed.

`GatekeeperMiddleware` needs nothing but the core. The embedded server needs the extra `server`, and is imported when it
is first asked for. The glue for Starlette, FastAPI and Flask is in `server.starlette` and `server.flask`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .gatekeeper import GatekeeperMiddleware
from .grants import Grant
from .redaction import RedactTokens

if TYPE_CHECKING:
    from .embedded import EmbeddedServer, create_app, embedded_server, serve

__all__ = ["EmbeddedServer", "GatekeeperMiddleware", "Grant", "RedactTokens", "create_app", "embedded_server", "serve"]

_EMBEDDED = frozenset({"EmbeddedServer", "create_app", "embedded_server", "serve"})


def __getattr__(name: str) -> Any:
    if name not in _EMBEDDED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import embedded

    return getattr(embedded, name)
