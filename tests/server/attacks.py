"""The attack table: requests that must not get through, each with the status that refuses it.

Every gate is held against the same table: the middleware, the embedded server over HTTP, and the generated Caddyfile.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jwt

from broadcastable.tokens import KeyPair, generate_key_pair

MOUNT = "/v1/streams"
STREAM = "gid://app/Room/1/messages"
ISSUER = "broadcastable"


@dataclass(frozen=True)
class Attack:
    """A request with *token* in its Authorization header; `path` is as it stands on the request line."""

    name: str
    status: int
    token: str | None = None
    method: str = "GET"
    path: str = f"{MOUNT}/{STREAM}"
    query: str = ""
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def target(self) -> str:
        return f"{self.path}?{self.query}" if self.query else self.path

    @property
    def all_headers(self) -> list[tuple[str, str]]:
        bearer = [] if self.token is None else [("Authorization", f"Bearer {self.token}")]
        return [*bearer, *self.headers]


def token(keys: KeyPair, *, kid: str | None = None, **changes: Any) -> str:
    """A token for `STREAM` with every right, any claim changed, or left out when None."""
    now = int(time.time())
    claims = {
        "iss": ISSUER,
        "iat": now,
        "exp": now + 7_200,
        "stream": STREAM,
        "permissions": ["read", "write"],
        **changes,
    }
    claims = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(claims, keys.private_pem, "ES256", headers={"kid": kid or keys.kid})


def attacks(keys: KeyPair) -> Iterator[Attack]:
    """Every attack on a gate that verifies with *keys*, knows no audience, and guards `STREAM` among others."""
    yield from attacks_by_token(keys)
    yield from _attacks_by_right(keys)
    yield from _attacks_by_path(keys)
    yield from _attacks_by_place(keys)


def _base64url(value: object) -> str:
    return jwt.utils.base64url_encode(json.dumps(value).encode()).decode()


def attacks_by_token(keys: KeyPair) -> Iterator[Attack]:
    """Those that whoever verifies tokens refuses, whatever comes after."""
    now = int(time.time())
    good = token(keys)
    head, body, signature = good.split(".")
    stranger = generate_key_pair()
    forged = _base64url({"iss": ISSUER, "iat": now, "exp": now + 7_200, "server": True})
    hs256 = f"{_base64url({'alg': 'HS256', 'kid': keys.kid})}.{body}"
    mac = hmac.new(keys.public_pem.encode(), hs256.encode(), hashlib.sha256).digest()
    yield Attack("no token", 401)
    yield Attack("expired", 401, token(keys, iat=now - 600, exp=now - 60))
    yield Attack("expired server token", 401, token(keys, iat=now - 600, exp=now - 60, server=True))
    yield Attack("not yet valid", 401, token(keys, nbf=now + 3_600))
    yield Attack("other issuer", 401, token(keys, iss="someone"))
    yield Attack("no issuer", 401, token(keys, iss=None))
    yield Attack("other audience", 401, token(keys, aud="others"))
    yield Attack("no expiry", 401, token(keys, exp=None))
    yield Attack("life of a year", 401, token(keys, exp=now + 31_536_000))
    yield Attack("unknown kid", 401, token(stranger))
    yield Attack("our kid, another key", 401, token(stranger, kid=keys.kid))
    yield Attack("alg none", 401, f"{_base64url({'alg': 'none', 'kid': keys.kid})}.{body}.")
    yield Attack("HS256 with the public key", 401, f"{hs256}.{jwt.utils.base64url_encode(mac).decode()}")
    yield Attack("tampered payload", 401, f"{head}.{forged}.{signature}")
    yield Attack("no signature", 401, f"{head}.{body}.")
    yield Attack("three dots", 401, "...")
    yield Attack("empty", 401, "")
    yield Attack("only a scheme", 401, None, headers=(("Authorization", "Bearer"),))
    yield Attack("another scheme", 401, None, headers=(("Authorization", f"Basic {good}"),))
    yield Attack("another parameter", 401, None, query=f"access_token={good}")
    yield Attack("null bytes in the token", 401, None, query="token=%00%00." + good)


def _attacks_by_right(keys: KeyPair) -> Iterator[Attack]:
    read, write = token(keys, permissions=["read"]), token(keys, permissions=["write"])
    both = token(keys)
    yield Attack("read token on POST", 403, read, "POST")
    yield Attack("write-only token on GET", 403, write)
    yield Attack("write-only token on HEAD", 403, write, "HEAD")
    yield Attack("no permissions", 403, token(keys, permissions=[]))
    yield Attack("permissions left out", 403, token(keys, permissions=None))
    yield Attack("permissions as a text", 403, token(keys, permissions="read"))
    yield Attack("permission of another name", 403, token(keys, permissions=["READ"]))
    yield Attack("permission of no name on PUT", 403, token(keys, permissions=[None]), "PUT")
    yield Attack("server as a text", 403, token(keys, stream=None, server="true"))
    yield Attack("server as one", 403, token(keys, stream=None, server=1))
    yield Attack("no stream", 403, token(keys, stream=None))
    yield Attack("list of streams", 403, token(keys, stream=[STREAM]))
    for method in ("PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "get", "Post", "PROPFIND"):
        yield Attack(f"client token on {method}", 403, both, method)
        yield Attack(f"no token on {method}", 401, None, method)
    yield Attack("client closes the stream", 403, both, "POST", headers=(("Stream-Closed", "true"),))
    yield Attack(
        "preflight of a page that is not let in",
        403,
        None,
        "OPTIONS",
        headers=(("Origin", "https://evil.example"), ("Access-Control-Request-Method", "GET")),
    )


def _attacks_by_path(keys: KeyPair) -> Iterator[Attack]:
    good = token(keys)
    server = token(keys, stream=None, permissions=None, server=True)
    other = {
        "sibling": "gid://app/Room/2/messages",
        "child": f"{STREAM}/1",
        "parent": "gid://app/Room/1",
        "one character more": f"{STREAM}x",
        "one character less": STREAM[:-1],
        "token's stream inside": f"x/{STREAM}",
        "other case": STREAM.replace("Room", "room"),
        "double encoded letter": STREAM.replace("Room", "%2552oom"),
        "double encoded slash": STREAM.replace("Room/1", "Room%252F1"),
        "double encoded dots": "gid://app/Room/2/%252e%252e/1/messages",
        "parameter": f"{STREAM};x=1",
        "space": f"{STREAM}%20",
        "full width letter": STREAM.replace("R", "%EF%BC%B2"),
        "combining mark": f"{STREAM}%CC%81",
    }
    for name, path in other.items():
        yield Attack(f"other stream: {name}", 403, good, path=f"{MOUNT}/{path}")
    impossible = {
        "dots": "gid://app/Room/2/../1/messages",
        "encoded dots": "gid://app/Room/2/%2e%2e/1/messages",
        "half encoded dots": "gid://app/Room/2/.%2E/1/messages",
        "one dot": "gid://app/Room/./1/messages",
        "encoded dot": "gid://app/Room/%2e/1/messages",
        "double slash": "gid://app/Room//1/messages",
        "encoded double slash": "gid://app/Room%2F%2F1/messages",
        "triple slash": "gid:///app/Room/1/messages",
        "leading slash": f"/{STREAM}",
        "trailing slash": f"{STREAM}/",
        "reserved": "__ds/subscriptions",
        "reserved, encoded": "%5F_ds/subscriptions",
        "null byte": f"{STREAM}%00",
        "null byte and more": f"{STREAM}%00/x",
        "line end": f"{STREAM}%0d%0aX: y",
        "backslash": "gid:%5C%5Capp%5CRoom%5C1%5Cmessages",
        "encoded question mark": f"{STREAM}%3Ftoken=x",
        "encoded fragment": f"{STREAM}%23x",
        "not UTF-8": f"{STREAM}%ff",
        "overlong dot": "gid://app/Room/2/%c0%ae%c0%ae/1/messages",
        "surrogate": f"{STREAM}%ed%a0%80",
        "too long": "x" * 513,
        "nothing": "",
    }
    for name, path in impossible.items():
        # A space cannot stand on a request line; the rest is as the attacker writes it.
        yield Attack(f"no stream's name: {name}", 400, good, path=f"{MOUNT}/{path.replace(' ', '%20')}")
        yield Attack(
            f"no stream's name, by the server: {name}", 400, server, path=f"{MOUNT}/{path.replace(' ', '%20')}"
        )
    for name, path in {
        "the mount itself": MOUNT,
        "the root": "/",
        "a neighbour of the mount": f"{MOUNT}x/{STREAM}",
        "another case": f"/V1/STREAMS/{STREAM}",
        "encoded mount": f"/v1/%73treams/{STREAM}",
        "encoded slash behind the mount": f"{MOUNT}%2F{STREAM}",
        "double slash before it": f"/{MOUNT}/{STREAM}",
        "dots into it": f"/x/..{MOUNT}/{STREAM}",
    }.items():
        yield Attack(f"outside: {name}", 404, server, path=path)


def _attacks_by_place(keys: KeyPair) -> Iterator[Attack]:
    good = token(keys)
    yield Attack("token in both places", 400, good, query=f"token={good}")
    yield Attack("two token parameters", 400, None, query=f"token={good}&token={good}")
    yield Attack("two token parameters, one encoded", 400, None, query=f"token={good}&%74oken={good}")
    yield Attack("a good and an empty parameter", 400, None, query=f"token={good}&token=")
    yield Attack("two Authorization headers", 400, good, headers=(("Authorization", f"Bearer {good}"),))
