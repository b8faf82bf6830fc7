"""What an application's token endpoint decides and answers; the same under every web framework."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from broadcastable.errors import InvalidStreamName, UsageError
from broadcastable.names import stream_name_from

NO_STORE = {"Cache-Control": "no-store"}
"""For answers that hold a token."""

KEYS_MAY_BE_KEPT = {"Cache-Control": "public, max-age=300"}
"""For the key set: announce a new key five minutes before it signs."""


@dataclass(frozen=True)
class Grant:
    """What an authorisation callable returns when the answer is yes; it returns None for no.

    Attributes:
        permissions: Some of `PERMISSIONS`.
        identity: Whom the token names, for logs and for whoever reads its claims.
        expires_in: Life of the token; `Settings.signed_stream_url_expires_in` when None.
    """

    permissions: Sequence[str] = ("read",)
    identity: object = None
    expires_in: timedelta | float | None = None

    def as_arguments(self) -> dict[str, Any]:
        """The keywords of `signed_stream_primitives`."""
        return {"permissions": self.permissions, "identity": self.identity, "expires_in": self.expires_in}


def asked_stream(values: Sequence[str]) -> str:
    """The stream in the values of the parameter `stream`.

    Raises:
        InvalidStreamName: None, several, a blank one, or a name that no stream may have.
    """
    name = stream_name_from(values[0]) if len(values) == 1 else ""
    if not name:
        raise InvalidStreamName("Ask for exactly one stream: ?stream=NAME")
    return name


def checked(grant: object) -> Grant | None:
    """*grant*, which an application's callable returned.

    Raises:
        UsageError: Something else than a `Grant` or None: True, for one, says not what is granted.
    """
    if grant is None or isinstance(grant, Grant):
        return grant
    raise UsageError(f"An authorisation callable returns a Grant, or None to refuse; got {type(grant).__name__}")
