"""Settings: one frozen value, read from the environment in one place.

Precedence: an explicit argument, then `override()` in this context, then the process default made by `configure()`
or, failing that, by the environment. Nothing is read at import.
"""

from __future__ import annotations

import dataclasses
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from .errors import ConfigurationError, UsageError

OutboxKind = Literal["memory", "redis", "database"]
TxidSource = Literal["uuid", "postgres"]

ENV_PREFIX = "BROADCASTABLE_"


def seconds(value: timedelta | float) -> float:
    """The number of seconds in a `timedelta`, or the number itself.

    Raises:
        UsageError: It is neither.
    """
    try:
        return value.total_seconds() if isinstance(value, timedelta) else float(value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"A duration is a timedelta or a number of seconds; got {value!r}") from error


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that can be set. Each field is also `BROADCASTABLE_<FIELD>` in the environment.

    Durations are a `timedelta` or seconds.

    Attributes:
        server_url: Where this application reaches the stream server. A list (comma-separated in the environment)
            spreads the streams over several servers by a stable hash of the stream name.
        client_url: Where clients reach it; `server_url` when None.
        signing_key: ES256 private key: PEM text, or the path of a PEM file. Never shown in a repr.
        signing_kid: `kid` header of our tokens; the key's RFC 7638 thumbprint when None.
        verify_keys: Further public keys (PEM or path) that `decode` accepts, for rotation; `kid=PEM` or `kid=path`
            for a key whose tokens carry a `signing_kid` of their own. Of a private key the public half is used. Not
            in the repr either.
        token_issuer: `iss` claim, checked when a token is decoded.
        token_audience: `aud` claim, added and checked when set.
        token_expiry: Life of our own server tokens.
        signed_stream_url_expires_in: Default life of a client's token.
        max_token_life: Longest life of any token; one that lives longer is refused, whoever signed it.
        gid_app: The application's part of a gid.
        redis_url: Redis or Valkey: shared provisioned names, the redis outbox, Dramatiq's broker in the ready worker.
        database_url: A synchronous SQLAlchemy URL, for workers that relay the database outbox.
        outbox: Where undelivered events wait: "memory", "redis" or "database".
        namespace: Prefix of our Redis keys, Dramatiq queue and producer id; one for each set of streams.
        keys_as_strings: Whether primary and foreign keys travel as text, as the reference client needs.
        txid_from: "uuid", or "postgres" for `pg_current_xact_id()`.
        stream_ttl: `Stream-TTL` of streams that are made from now on; None keeps them. One that exists keeps the
            lifetime that it was made with.
        provisioned_for: How long Redis remembers that a stream exists.
        request_timeout: Limit of one request to the stream server, and of one attempt only.
        max_frame_bytes: Largest body of one append, 1 to 2**30.
        max_frame_events: Most events in one append, 1 to 100,000.
        memory_outbox_bytes: What the memory outbox, or the redis outbox's local retry buffer, may hold.
    """

    server_url: str | tuple[str, ...] = "http://localhost:4437/v1/streams"
    client_url: str | tuple[str, ...] | None = None
    signing_key: str | None = field(default=None, repr=False)
    signing_kid: str | None = None
    verify_keys: tuple[str, ...] = field(default=(), repr=False)
    token_issuer: str = "broadcastable"  # noqa: S105  no secret
    token_audience: str | None = None
    token_expiry: timedelta | float = 120.0
    signed_stream_url_expires_in: timedelta | float = 900.0
    max_token_life: timedelta | float = 86_400.0
    gid_app: str = "app"
    redis_url: str | None = field(default=None, repr=False)
    database_url: str | None = field(default=None, repr=False)
    outbox: OutboxKind = "memory"
    namespace: str = "broadcastable"
    keys_as_strings: bool = True
    txid_from: TxidSource = "uuid"
    stream_ttl: timedelta | float | None = None
    provisioned_for: timedelta | float = 86_400.0
    request_timeout: timedelta | float = 5.0
    max_frame_bytes: int = 1 << 20
    max_frame_events: int = 1_000
    memory_outbox_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        for name in ("server_url", "client_url", "verify_keys"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if isinstance(self.verify_keys, str | os.PathLike):
            object.__setattr__(self, "verify_keys", (self.verify_keys,))
        object.__setattr__(self, "verify_keys", tuple(_text_of(key, "verify_keys") for key in self.verify_keys))
        if self.signing_key is not None:
            object.__setattr__(self, "signing_key", _text_of(self.signing_key, "signing_key"))
        for url in (*self.server_urls, *self.client_urls):
            if not _is_plain_http(url):
                raise ConfigurationError(
                    f"server_url and client_url are http(s) URLs without a query, such as "
                    f"http://localhost:4437/v1/streams; got {url!r}"
                )
        if not self.server_urls:
            raise ConfigurationError("server_url names no server; give a URL such as http://localhost:4437/v1/streams")
        if len(self.client_urls) != len(self.server_urls):
            raise ConfigurationError("client_url must name as many servers as server_url, in the same order")
        if self.redis_url is not None and not _is_redis(self.redis_url):
            # Not quoted: it may hold a password.
            raise ConfigurationError("redis_url is a URL such as redis://localhost:6379/0, rediss:// or unix://")
        if self.database_url is not None and not _is_of_sqlalchemy(self.database_url):
            raise ConfigurationError(
                "database_url is a URL of SQLAlchemy, such as postgresql+psycopg://user:password@localhost/chat"
            )
        for name, allowed in (("outbox", get_args(OutboxKind)), ("txid_from", get_args(TxidSource))):
            if getattr(self, name) not in allowed:
                raise ConfigurationError(f"{name} is one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        if self.outbox == "redis" and not self.redis_url:
            raise ConfigurationError(
                'outbox="redis" needs redis_url (BROADCASTABLE_REDIS_URL), such as redis://localhost'
            )
        for name in (
            "token_expiry",
            "signed_stream_url_expires_in",
            "max_token_life",
            "provisioned_for",
            "request_timeout",
        ):
            if not 0 < seconds(getattr(self, name)) < math.inf:
                raise ConfigurationError(f"{name} is a positive duration; got {getattr(self, name)!r}")
        if self.stream_ttl is not None and not 1 <= seconds(self.stream_ttl) < math.inf:
            raise ConfigurationError(f"stream_ttl is a second or more, or None; got {self.stream_ttl!r}")
        for name in ("token_expiry", "signed_stream_url_expires_in"):
            if seconds(getattr(self, name)) > seconds(self.max_token_life):
                raise ConfigurationError(f"{name} is at most max_token_life ({seconds(self.max_token_life):g} s)")
        for name, most in (
            ("max_frame_bytes", 1 << 30),
            ("max_frame_events", 100_000),
            ("memory_outbox_bytes", 1 << 50),
        ):
            if not 1 <= getattr(self, name) <= most:
                raise ConfigurationError(f"{name} is between 1 and {most}; got {getattr(self, name)!r}")
        if not self.gid_app or not self.namespace:
            raise ConfigurationError("gid_app and namespace are not empty")

    @property
    def server_urls(self) -> tuple[str, ...]:
        """`server_url` as a tuple without trailing slashes."""
        return _urls(self.server_url)

    @property
    def client_urls(self) -> tuple[str, ...]:
        """`client_url` (or `server_url`) as a tuple without trailing slashes."""
        return _urls(self.client_url) if self.client_url is not None else self.server_urls

    def replace(self, **changes: Any) -> Settings:
        """A copy with *changes*; an unknown name raises `ConfigurationError`."""
        unknown = sorted(set(changes) - {f.name for f in dataclasses.fields(self)})
        if unknown:
            raise ConfigurationError(f"No such setting: {', '.join(unknown)}. See broadcastable.Settings")
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Settings from `BROADCASTABLE_*`; the only reader of the environment.

        Raises:
            ConfigurationError: A value that does not parse; the message names the variable.
        """
        source = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        for spec in dataclasses.fields(cls):
            text = source.get(ENV_PREFIX + spec.name.upper())
            if text is None or text == "":
                continue
            try:
                values[spec.name] = _PARSERS.get(spec.name, str)(text)
            except ValueError as error:
                raise ConfigurationError(f"{ENV_PREFIX}{spec.name.upper()}: {error}") from error
        return cls(**values)


def _text_of(key: object, setting: str) -> str:
    text = os.fspath(key) if isinstance(key, os.PathLike) else key
    if not isinstance(text, str):
        raise ConfigurationError(f"{setting} is PEM text or a path; got {type(text).__name__}")
    return text


def _urls(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return tuple(url.rstrip("/") for url in ((value,) if isinstance(value, str) else value))


def _is_plain_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        # An empty label, as in `a..b`, is found out by the resolver otherwise.
        return (
            parts.scheme in {"http", "https"}
            and bool(host.encode("idna"))
            and port != 0
            and not set(url) & set("?# \t\r\n")
        )
    except ValueError:
        return False


def _is_redis(url: str) -> bool:
    from redis.connection import parse_url

    try:
        parse_url(url)  # type: ignore[no-untyped-call]
    except ValueError:
        return False
    return True


def _is_of_sqlalchemy(url: str) -> bool:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        make_url(url)
    except (ArgumentError, ValueError):
        return False
    return True


def _boolean(text: str) -> bool:
    if text.lower() in {"1", "true", "yes", "on"}:
        return True
    if text.lower() in {"0", "false", "no", "off"}:
        return False
    raise ValueError(f"{text!r} is neither true nor false")


def _one_or_more(text: str) -> str | tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    return parts[0] if len(parts) == 1 else parts


def _several(text: str) -> tuple[str, ...]:
    # PEM text holds no comma, and neither should a path given here.
    return tuple(part.strip() for part in text.split(",") if part.strip())


_PARSERS: dict[str, Callable[[str], Any]] = {
    "server_url": _one_or_more,
    "client_url": _one_or_more,
    "verify_keys": _several,
    "keys_as_strings": _boolean,
    **dict.fromkeys(
        (
            "token_expiry",
            "signed_stream_url_expires_in",
            "max_token_life",
            "stream_ttl",
            "provisioned_for",
            "request_timeout",
        ),
        float,
    ),
    **dict.fromkeys(("max_frame_bytes", "max_frame_events", "memory_outbox_bytes"), int),
}


def existing_file(text: str) -> Path | None:
    """*text* as a path, when something is there; None also for what no path can be, such as the text of a key."""
    try:
        return Path(text) if text and Path(text).exists() else None
    except (OSError, ValueError):
        return None


def read_pem(key: str, setting: str) -> bytes:
    """The PEM text of *key*, which is PEM text itself or the path of a file.

    Raises:
        ConfigurationError: No such file, or it cannot be read. The message holds no key material.
    """
    if "-----BEGIN" in key:
        # A PEM in an environment variable often has its line ends written as \n.
        return key.replace("\\n", "\n").encode()
    try:
        return Path(key).read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no path"
        # Without a cause: it may quote the key.
        raise ConfigurationError(
            f"{setting} is neither PEM text nor a readable file ({reason}). "
            "Make a key pair: broadcastable keys generate"
        ) from None


_default: Settings | None = None
_pinned: Settings | None = None
_default_lock = threading.Lock()
_overridden: ContextVar[Settings | None] = ContextVar("broadcastable_settings", default=None)


def current_settings() -> Settings:
    """The settings in force here: `override()`, else `configure()`, else the environment as it was at first use."""
    global _default
    override = _overridden.get()
    if override is not None:
        return override
    if _pinned is not None:
        return _pinned
    if _default is None:
        with _default_lock:
            if _default is None:
                _default = Settings.from_env()
    return _default


def configure(**changes: Any) -> Settings:
    """Set the process default: the environment with *changes* on top. Call it once, where the application starts.

    Raises:
        ConfigurationError: An unknown setting or a value out of range.
    """
    global _default
    settings = Settings.from_env().replace(**changes)
    with _default_lock:
        _default = settings
    return settings


@contextmanager
def override(**changes: Any) -> Iterator[Settings]:
    """Change settings for this context (thread or task); the previous ones return at the end, also after an error."""
    settings = current_settings().replace(**changes)
    token = _overridden.set(settings)
    try:
        yield settings
    finally:
        _overridden.reset(token)


@contextmanager
def pinned(settings: Settings) -> Iterator[None]:
    """Put *settings* in place of the process default: in all threads, and whatever `configure()` says meanwhile.

    For tests, where an override would not reach the threads of a server that has started before; see `testing`.
    """
    global _pinned
    previous, _pinned = _pinned, settings
    try:
        yield
    finally:
        _pinned = previous
