"""The token of a request: where it may be, and that it goes no further."""

from __future__ import annotations

from urllib.parse import unquote_plus

from .asgi import Headers, Scope, header_values


class AmbiguousToken(Exception):
    """More than one token (RFC 6750, 2: clients must not use more than one way at a time)."""


def take_token(scope: Scope) -> str | None:
    """The token of the request, from `Authorization: Bearer` or `?token=`; None when there is none.

    Changes *scope*: the token leaves its query string at once, for a server writes its access log from the scope that
    it gave us. Headers are left to `without_credentials`; no server logs them.

    Raises:
        AmbiguousToken: Both ways, or one of them twice.
    """
    tokens, rest = _split_query(scope["query_string"])
    if tokens:
        scope["query_string"] = rest
    for value in header_values(scope, b"authorization"):
        kind, _, text = value.decode("latin-1").partition(" ")
        if kind.lower() == "bearer":
            tokens.append(text.strip(" "))
    if len(tokens) > 1:
        raise AmbiguousToken
    return tokens[0] if tokens else None


def without_credentials(scope: Scope) -> Headers:
    """The headers of the request without `Authorization`."""
    return [(key, value) for key, value in scope["headers"] if key.lower() != b"authorization"]


def _split_query(query: bytes) -> tuple[list[str], bytes]:
    if b"token" not in query and b"%" not in query:
        return [], query
    tokens: list[str] = []
    rest: list[bytes] = []
    for part in query.split(b"&"):
        name, _, value = part.partition(b"=")
        if unquote_plus(name.decode("latin-1")) == "token":
            tokens.append(unquote_plus(value.decode("latin-1")))
        else:
            rest.append(part)
    return tokens, b"&".join(rest)
