"""Tokens: who may read or write which stream, as ES256 JWTs (RFC 7519, RFC 7518 3.4).

One algorithm, pinned on both sides. A token names its key by `kid`; a key ring verifies with several keys while it
signs with one, so that keys rotate without a reader noticing. Keys are parsed once, and neither a key nor a token is
ever part of an error. No I/O but for reading key files at first use.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any, Final

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from .errors import ConfigurationError, ExpiredToken, InvalidToken, TokenError, UsageError
from .events import encode_json
from .settings import Settings, existing_file, read_pem, seconds

PERMISSIONS: Final = ("read", "write")
"""What a token may grant on its stream."""

LEEWAY: Final = 10.0
"""Seconds by which the clocks of the one who signs and the one who verifies may differ."""

MAX_TOKEN_LENGTH: Final = 8_192
"""Characters in a token; a longer one is refused unread."""

_ALGORITHM: Final = "ES256"
_SET_BY_ENCODE: Final = frozenset({"iss", "aud", "iat", "exp"})
_MAKE_KEYS: Final = "Make a key pair: broadcastable keys generate"
_PEM_BLOCK: Final = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----(.*?)-----END \1-----", re.DOTALL)


@dataclass(frozen=True)
class KeyPair:
    """A fresh ES256 key pair; the repr leaves the private half out.

    Attributes:
        private_pem: PKCS #8, not encrypted: for `Settings.signing_key`.
        public_pem: SubjectPublicKeyInfo: for `Settings.verify_keys` and whoever else checks our tokens.
        kid: RFC 7638 thumbprint of the key.
    """

    private_pem: str = field(repr=False)
    public_pem: str
    kid: str


def generate_key_pair() -> KeyPair:
    """Make a key pair for `Settings.signing_key`."""
    private = ec.generate_private_key(ec.SECP256R1())
    public = private.public_key()
    return KeyPair(
        private_pem=private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
        public_pem=public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode(),
        kid=thumbprint(public),
    )


def thumbprint(key: ec.EllipticCurvePublicKey) -> str:
    """The RFC 7638 thumbprint of *key*: the same text wherever it is computed."""
    required = {name: value for name, value in _jwk(key).items() if name in {"crv", "kty", "x", "y"}}
    canonical = json.dumps(required, separators=(",", ":"), sort_keys=True)
    return _base64url(hashlib.sha256(canonical.encode()).digest())


class Gatekeeper:
    """Signs and verifies the tokens of one `Settings`. Thread safe, task safe, and cheap to keep.

    Making one reads no key: a setting that is missing or wrong shows at first use. With `verify_keys` alone it verifies
    and cannot sign, which is what a gate in front of a stream server needs.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._max_life = seconds(settings.max_token_life)
        self._jws = jwt.PyJWS()
        self._server_token: _HeldToken | None = None
        self._renewing = threading.Lock()

    def encode(self, claims: Mapping[str, Any], expires_in: timedelta | float | None = None) -> str:
        """Sign *claims*, with `iss`, `aud` (when configured), `iat` and `exp` added.

        Args:
            claims: JSON-ready; may hold `nbf` (seconds), but none of the four that are added.
            expires_in: Life, a `timedelta` or seconds, at most `Settings.max_token_life`, rounded up to a whole second;
                `Settings.signed_stream_url_expires_in` when None.

        Raises:
            ConfigurationError: `signing_key` is missing, unreadable or no ES256 key.
            UsageError: A claim that is added here, or a life out of range.
            UnencodableValue: A claim without a JSON form.
        """
        if not _SET_BY_ENCODE.isdisjoint(claims):
            raise UsageError(f"{', '.join(sorted(_SET_BY_ENCODE & set(claims)))}: set by the gatekeeper, not by claims")
        life = seconds(self.settings.signed_stream_url_expires_in if expires_in is None else expires_in)
        if not 0 < life <= self._max_life:
            raise UsageError(f"expires_in is between 0 and max_token_life ({self._max_life:g} s); got {life:g} s")
        issued = int(time.time())
        payload = {**claims, "iss": self.settings.token_issuer, "iat": issued, "exp": issued + math.ceil(life)}
        if self.settings.token_audience is not None:
            payload["aud"] = self.settings.token_audience
        key, header = self._signing
        return self._jws.encode(encode_json(payload), key, _ALGORITHM, headers=header, json_encoder=_HeaderEncoder)

    def decode(self, token: str) -> dict[str, Any]:
        """The claims of *token*, once its signature, issuer, audience and times have been verified.

        Raises:
            ExpiredToken: Past its `exp` by more than `LEEWAY`.
            InvalidToken: Anything else that is wrong with it.
            ConfigurationError: No key is configured, or one is unreadable or no ES256 key.
        """
        ring = self._ring
        # The refusal is raised outside of the handlers: an error of the parser, kept as its context, holds the token.
        refusal: TokenError
        try:
            if len(token) > MAX_TOKEN_LENGTH:
                raise ValueError
            kid = self._jws.get_unverified_header(token).get("kid")
            claims: dict[str, Any] = jwt.decode(
                token,
                ring[kid],
                algorithms=[_ALGORITHM],
                issuer=self.settings.token_issuer,
                audience=self.settings.token_audience,
                leeway=LEEWAY,
                options={"require": ["iss", "iat", "exp"], "verify_sub": False, "verify_jti": False},
            )
            self._check_life(claims)
        except jwt.ExpiredSignatureError:
            refusal = ExpiredToken("The token has expired: fetch a new one")
        except (jwt.ImmatureSignatureError, _TooLong):
            refusal = InvalidToken("The token is not valid yet, or lives longer than max_token_life allows")
        except (jwt.InvalidIssuerError, jwt.InvalidAudienceError, jwt.MissingRequiredClaimError):
            refusal = InvalidToken("The token lacks a claim or is not meant for us: see token_issuer, token_audience")
        except KeyError:
            refusal = InvalidToken("The token names no key of ours: see signing_key and verify_keys")
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
            refusal = InvalidToken("The token is malformed or was tampered with")
        else:
            return claims
        raise refusal

    def server_token(self) -> str:
        """A token that may do everything, for our own calls to the stream server.

        The same one for half of `Settings.token_expiry`, so it always has the other half of its life before it.

        Raises:
            ConfigurationError: See `encode`.
        """
        held = self._server_token
        if held is not None and held.is_fresh(time.time()):
            return held.text
        with self._renewing:
            held = self._server_token
            now = time.time()
            if held is None or not held.is_fresh(now):
                life = seconds(self.settings.token_expiry)
                held = _HeldToken(self.encode({"server": True}, life), issued_at=now, renew_at=now + life / 2)
                self._server_token = held
            return held.text

    def jwks(self) -> dict[str, Any]:
        """The public keys that `decode` accepts, as a JWK Set (RFC 7517, 5), the signing key's first."""
        return {
            "keys": [
                {**_jwk(key), "kid": kid, "use": "sig", "alg": _ALGORITHM} for kid, key in self._named_keys.items()
            ]
        }

    @staticmethod
    def generate_key_pair() -> KeyPair:
        """See `tokens.generate_key_pair`."""
        return generate_key_pair()

    def _check_life(self, claims: Mapping[str, Any]) -> None:
        times = [claims[name] for name in ("iat", "exp")]
        if not all(isinstance(moment, int | float) for moment in times):
            raise ValueError
        if times[1] - times[0] > self._max_life + 1:  # a life is rounded up to a whole second
            raise _TooLong

    @cached_property
    def _signing(self) -> tuple[ec.EllipticCurvePrivateKey, dict[str, str]]:
        if not self.settings.signing_key:
            raise ConfigurationError(f"signing_key (BROADCASTABLE_SIGNING_KEY) is not set. {_MAKE_KEYS}")
        key = _load_key(self.settings.signing_key, "signing_key")
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigurationError(f"signing_key is a public key; signing takes the private one. {_MAKE_KEYS}")
        return key, {"kid": self.settings.signing_kid or thumbprint(key.public_key())}

    @cached_property
    def _named_keys(self) -> dict[str, ec.EllipticCurvePublicKey]:
        named: dict[str, ec.EllipticCurvePublicKey] = {}
        if self.settings.signing_key:
            key, header = self._signing
            named[header["kid"]] = key.public_key()
        for entry in self.settings.verify_keys:
            kid, text = _split_kid(entry)
            public = _public_half(_load_key(text, "verify_keys"))
            kid = kid or thumbprint(public)
            if named.setdefault(kid, public) != public:
                raise ConfigurationError(f"verify_keys: two different keys have the kid {kid!r}; give each its own")
        if not named:
            raise ConfigurationError(
                "Neither signing_key (BROADCASTABLE_SIGNING_KEY) nor verify_keys is set, so no token can be verified. "
                f"{_MAKE_KEYS}"
            )
        return named

    @cached_property
    def _ring(self) -> dict[Any, ec.EllipticCurvePublicKey]:
        # By thumbprint too: tokens from before the key was given a name of its own stay good.
        return {**{thumbprint(key): key for key in self._named_keys.values()}, **self._named_keys}


class _TooLong(Exception):
    """A token whose life is over `max_token_life`."""


@dataclass(frozen=True)
class _HeldToken:
    text: str
    issued_at: float
    renew_at: float

    def is_fresh(self, now: float) -> bool:
        # A clock that was set back makes the token one from the future.
        return self.issued_at <= now < self.renew_at


class _HeaderEncoder(json.JSONEncoder):
    """msgspec in place of the JSON module, whose set-up takes a tenth of the time of a signature."""

    def __init__(self, **_: Any) -> None:
        """Built by PyJWT once a token, so it prepares nothing."""

    def encode(self, o: Any) -> str:
        return encode_json(o).decode()


def _split_kid(entry: str) -> tuple[str | None, str]:
    """`kid=PEM` or `kid=path` in its parts; without `kid=` the key is known by its thumbprint."""
    head, begin, rest = entry.partition("-----BEGIN")
    if begin:
        return head.strip().removesuffix("=") or None, begin + rest
    kid, equals, path = entry.partition("=")
    return (kid, path) if equals and not existing_file(entry) else (None, entry)


def _load_key(key: str, setting: str) -> ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey:
    """The P-256 key in *key* (PEM text or path), private or public.

    Indented lines, Windows line ends, a PEM squeezed into one line and an EC PARAMETERS block before the key are fine.
    """
    text = read_pem(key, setting).decode("ascii", errors="replace")
    blocks = [block for block in _PEM_BLOCK.findall(text) if block[0] != "EC PARAMETERS"]
    if not blocks:
        raise ConfigurationError(f"{setting} holds no PEM block. {_MAKE_KEYS}")
    label, body = blocks[0]
    if "ENCRYPTED" in label or "ENCRYPTED" in body:
        raise ConfigurationError(f"{setting} is encrypted; give the key without a passphrase. {_MAKE_KEYS}")
    pem = f"-----BEGIN {label}-----\n{''.join(body.split())}\n-----END {label}-----\n".encode()
    loaded: object = None
    # Refused below, outside of any handler: the parser's error stays out of ours.
    with suppress(ValueError, TypeError, UnsupportedAlgorithm):
        loaded = load_pem_private_key(pem, password=None) if "PRIVATE" in label else load_pem_public_key(pem)
    if not isinstance(loaded, ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey):
        raise ConfigurationError(f"{setting} ({label}) is no readable EC key; ES256 needs one on P-256. {_MAKE_KEYS}")
    if not isinstance(loaded.curve, ec.SECP256R1):
        raise ConfigurationError(f"{setting} is a key on {loaded.curve.name}; ES256 needs one on P-256. {_MAKE_KEYS}")
    return loaded


def _public_half(key: ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey) -> ec.EllipticCurvePublicKey:
    return key.public_key() if isinstance(key, ec.EllipticCurvePrivateKey) else key


def _jwk(key: ec.EllipticCurvePublicKey) -> dict[str, str]:
    numbers = key.public_numbers()
    x, y = (_base64url(number.to_bytes(32, "big")) for number in (numbers.x, numbers.y))
    return {"kty": "EC", "crv": "P-256", "x": x, "y": y}


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
