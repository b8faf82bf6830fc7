"""Every exception of the package, in one tree: the branch says who can act.

    BroadcastableError
    ├── ConfigurationError         the operator: a setting, a key, an extra
    │   └── MissingExtraError
    ├── UsageError                 the caller: an argument or a declaration
    │   ├── BlankStreamables
    │   ├── InvalidStreamName
    │   ├── UnsavedRecordError
    │   ├── UnknownModelError
    │   ├── UnknownPermission
    │   ├── UnencodableValue
    │   ├── DeclarationError
    │   ├── BulkStatementError
    │   └── StaleSnapshotError
    ├── TokenError                 whoever sent the token
    │   ├── InvalidToken
    │   └── ExpiredToken
    ├── StreamError                the network or the stream server; carries stream, status, retryable
    │   ├── StreamNotFound
    │   ├── StreamConflict
    │   ├── StreamClosed
    │   ├── StreamForbidden
    │   ├── StreamRefused
    │   │   └── FrameTooLarge
    │   ├── ProducerFenced
    │   ├── ProducerGap
    │   └── StreamUnavailable      retryable
    │       └── StreamTimeout      retryable, and nobody knows whether the request took effect
    └── OutboxError                the place where undelivered events wait
        └── OutboxFull

Each also inherits the builtin that people already catch. All of them survive pickling: they cross process borders.
"""

from __future__ import annotations

from typing import Any


class BroadcastableError(Exception):
    """Root of every error raised by broadcastable."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[BroadcastableError], args: tuple[Any, ...], state: dict[str, Any]) -> BroadcastableError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigurationError(BroadcastableError, ValueError):
    """A setting, key or installation is missing or wrong. The message names the setting and the way to mend it."""


class MissingExtraError(ConfigurationError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs an extra that is not installed. Install it: pip install 'broadcastable[{extra}]'"
        )


class UsageError(BroadcastableError, ValueError):
    """A call or a declaration that cannot be right whatever the network does."""


class BlankStreamables(UsageError):
    """Nothing was left of the streamables once blanks were dropped, where a stream is needed."""


class InvalidStreamName(UsageError):
    """A plain name or a whole stream name that no stream may have."""


class UnsavedRecordError(UsageError):
    """A transient or pending instance has no identity yet, so it names no stream."""


class UnknownModelError(UsageError, LookupError):
    """A gid names a model that is not a Broadcastable of this application."""


class UnknownPermission(UsageError):
    """A permission outside `PERMISSIONS`."""


class UnencodableValue(UsageError, TypeError):
    """A value that has no JSON form here."""


class DeclarationError(UsageError):
    """A `__streams__` declaration that does not fit its model; raised when mappers are configured."""


class BulkStatementError(UsageError):
    """A bulk statement on a model whose `__stream_bulk__` is "raise"."""


class StaleSnapshotError(UsageError):
    """`snapshot()` was given a session whose transaction may be older than the offset."""


class TokenError(BroadcastableError, PermissionError):
    """A token that grants nothing."""


class InvalidToken(TokenError):
    """Not ours, tampered with, from another environment, or malformed."""


class ExpiredToken(TokenError):
    """Ours once; past its `exp`."""


class StreamError(BroadcastableError):
    """A request to the stream server that did not succeed.

    Attributes:
        stream: The stream's name, or None when the request was not about one.
        status: The HTTP status, or None when there was no answer.
        retryable: Whether the same request may succeed later without a change.
    """

    retryable = False

    def __init__(self, message: str, *, stream: str | None = None, status: int | None = None) -> None:
        super().__init__(message)
        self.stream = stream
        self.status = status


class StreamNotFound(StreamError, LookupError):
    """404, or 410 for a deleted stream: provision it and send again."""


class StreamConflict(StreamError):
    """409: the stream exists with another content type. Closed is `StreamClosed`; another lifetime is no error."""


class StreamClosed(StreamError):
    """409 with `Stream-Closed`: the stream takes no more events (protocol, close)."""


class StreamForbidden(StreamError, PermissionError):
    """401 or 403: the server did not take our server token."""


class StreamRefused(StreamError):
    """400 and other 4xx: the server will never take this request."""


class FrameTooLarge(StreamRefused):
    """413: the body is over the server's limit."""


class ProducerFenced(StreamError):
    """403 with `Producer-Epoch`: the server knows a newer epoch (protocol, 5.2.1)."""

    def __init__(self, message: str, *, epoch: int, stream: str | None = None) -> None:
        super().__init__(message, stream=stream, status=403)
        self.epoch = epoch


class ProducerGap(StreamError):
    """409 with `Producer-Expected-Seq`: the server lost or never had our earlier frames (protocol, 5.2.1)."""

    def __init__(self, message: str, *, expected: int, stream: str | None = None) -> None:
        super().__init__(message, stream=stream, status=409)
        self.expected = expected


class StreamUnavailable(StreamError, ConnectionError):
    """Not reached, 429, 5xx, or a success that no stream server sent.

    `retry_after` is the server's own wish in seconds, if it had one.
    """

    retryable = True

    def __init__(
        self, message: str, *, stream: str | None = None, status: int | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message, stream=stream, status=status)
        self.retry_after = retry_after


class StreamTimeout(StreamUnavailable, TimeoutError):
    """The request went out and no answer came back: it may or may not have taken effect."""


class OutboxError(BroadcastableError):
    """The outbox could not take or give events."""


class OutboxFull(OutboxError):
    """The bounded in-process buffer is full; the batches were counted as dropped."""
