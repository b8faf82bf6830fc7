"""The Durable Streams protocol without I/O: a value becomes a request, a response becomes a result or an error.

Section numbers are those of the Durable Streams Protocol 1.0. Nothing here knows of connections, retries or tokens.
"""

from __future__ import annotations

import email.utils
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

import msgspec

from . import errors
from .names import stream_path
from .outbox import FrameId

JSON = "application/json"
BEGINNING = "-1"
"""The offset before the first event (protocol, 6)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRequest:
    """One HTTP request about one stream.

    Attributes:
        path: The stream's path below the server's base URL, encoded, with its query.
        repeatable: Sending it twice has the effect of sending it once, so an unanswered one may be sent again.
    """

    method: str
    stream: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    repeatable: bool = True


@dataclass(frozen=True, slots=True)
class StreamResponse:
    """An answer. `headers` is looked up without regard to case."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Created:
    """A stream that exists now: its tail offset, and whether this request made it."""

    offset: str
    new: bool


@dataclass(frozen=True, slots=True)
class Existing:
    """A JSON stream that was there before, and not as a PUT wanted it."""

    offset: str
    closed: bool


@dataclass(frozen=True, slots=True)
class Appended:
    """Events that are stored.

    Attributes:
        offset: The offset after them; None on a duplicate, whose answer carries none.
        duplicate: The server had this frame, or a later one of its producer, before (5.2.1).
    """

    offset: str | None
    duplicate: bool = False


@dataclass(frozen=True, slots=True)
class ReadPage:
    """Some events of a stream, in order; `next_offset` continues after them.

    Attributes:
        events: Each as JSON bytes, as the server wrote them.
        up_to_date: There was nothing more when the server answered.
    """

    events: tuple[bytes, ...]
    next_offset: str
    up_to_date: bool


def create_request(stream: str, *, ttl: int | None = None) -> StreamRequest:
    """PUT: make the stream unless it exists (5.1). *ttl* in whole seconds."""
    headers = {"Content-Type": JSON}
    if ttl is not None:
        headers["Stream-TTL"] = str(ttl)
    return StreamRequest(method="PUT", stream=stream, path=stream_path(stream), headers=headers)


def read_created(response: StreamResponse, stream: str) -> Created:
    """The result of `create_request`.

    Raises:
        StreamConflict: It exists and is closed, or has another content type or lifetime; `read_existing` says what.
        StreamError: Any other refusal, by its status.
    """
    if response.status in {200, 201, 204}:
        return Created(_next_offset(response, stream), response.status == 201)
    raise error_for(response, stream)


def read_existing(response: StreamResponse, stream: str) -> Existing:
    """What stands at *stream* where a PUT was refused as a conflict: the result of `head_request` (5.1, 5.4).

    Raises:
        StreamConflict: Something that is not JSON.
        StreamNotFound: It is gone by now.
    """
    offset = read_head(response, stream)
    content_type = response.headers.get("Content-Type", "")
    if content_type.partition(";")[0].strip().lower() != JSON:
        raise errors.StreamConflict(
            f"Stream {stream!r} exists and holds {content_type or 'bytes of no type'}, not JSON. Delete it, or use "
            "another name",
            stream=stream,
            status=409,
        )
    return Existing(offset, closed=_says_closed(response))


def append_request(stream: str, body: bytes, frame: FrameId | None = None) -> StreamRequest:
    """POST the JSON array *body* (5.2, 7.1); with *frame*, as an idempotent producer (5.2.1)."""
    headers = {"Content-Type": JSON}
    if frame is not None:
        headers |= {
            "Producer-Id": frame.producer_id,
            "Producer-Epoch": str(frame.epoch),
            "Producer-Seq": str(frame.seq),
        }
    return StreamRequest(
        method="POST",
        stream=stream,
        path=stream_path(stream),
        headers=headers,
        body=body,
        repeatable=frame is not None,
    )


def read_appended(response: StreamResponse, stream: str, *, produced: bool) -> Appended:
    """The result of `append_request`; *produced* says whether it had a frame.

    Raises:
        ProducerFenced, ProducerGap: The server's producer state differs from ours.
        StreamNotFound, StreamClosed, FrameTooLarge, StreamRefused, StreamUnavailable: By the status.
    """
    if response.status in {200, 201}:
        return Appended(_next_offset(response, stream))
    if response.status == 204:
        # With producer headers 204 means "had it before"; without them it is plain success (5.2, 5.2.1).
        return Appended(response.headers.get("Stream-Next-Offset"), duplicate=produced)
    raise error_for(response, stream)


def head_request(stream: str) -> StreamRequest:
    """HEAD: the tail offset (5.4)."""
    return StreamRequest(method="HEAD", stream=stream, path=stream_path(stream))


def read_head(response: StreamResponse, stream: str) -> str:
    """The tail offset.

    Raises:
        StreamNotFound: No such stream.
    """
    if response.status in {200, 204}:
        return _next_offset(response, stream)
    raise error_for(response, stream)


def read_request(stream: str, offset: str = BEGINNING) -> StreamRequest:
    """GET what follows *offset*, without waiting (5.5)."""
    return StreamRequest(method="GET", stream=stream, path=f"{stream_path(stream)}?{urlencode({'offset': offset})}")


def read_page(response: StreamResponse, stream: str) -> ReadPage:
    """The result of `read_request`.

    Raises:
        StreamNotFound: No such stream, or the offset is older than what is retained (410).
        StreamRefused: The offset is not one of this stream.
        StreamError: What the stream holds is no JSON.
    """
    if response.status in {200, 204}:
        next_offset = _next_offset(response, stream)
        try:
            events = msgspec.json.decode(response.body, type=tuple[msgspec.Raw, ...]) if response.body else ()
        except (msgspec.DecodeError, RecursionError) as error:
            raise errors.StreamError(
                f"Stream {stream!r} holds something that is no JSON array of events ({error}). Who else writes to it? "
                "Delete it, and have it made again",
                stream=stream,
                status=response.status,
            ) from error
        return ReadPage(
            tuple(bytes(event) for event in events),
            next_offset,
            response.headers.get("Stream-Up-To-Date", "").lower() == "true",
        )
    raise error_for(response, stream)


def is_json(body: bytes) -> bool:
    """Whether *body* is JSON that every reader can parse (RFC 8259): no NaN, no number without bounds, whole text."""
    try:
        msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def delete_request(stream: str) -> StreamRequest:
    """DELETE the stream and all its events (5.3)."""
    return StreamRequest(method="DELETE", stream=stream, path=stream_path(stream))


def read_deleted(response: StreamResponse, stream: str) -> bool:
    """Whether there was something to delete."""
    if response.status in {200, 202, 204}:
        return True
    if response.status in {404, 410}:
        return False
    raise error_for(response, stream)


def close_request(stream: str) -> StreamRequest:
    """POST without events and with `Stream-Closed`: nothing can be appended any more; readers learn it."""
    return StreamRequest(
        method="POST",
        stream=stream,
        path=stream_path(stream),
        headers={"Content-Type": JSON, "Stream-Closed": "true"},
        body=b"",
    )


def read_closed(response: StreamResponse, stream: str) -> str | None:
    """The final offset. Closing a closed stream is no error."""
    if response.status in {200, 204} or (response.status == 409 and _says_closed(response)):
        return response.headers.get("Stream-Next-Offset")
    raise error_for(response, stream)


def error_for(response: StreamResponse, stream: str) -> errors.StreamError:
    """The error that says what *response* means and what to do about it."""
    status, headers = response.status, response.headers
    about: dict[str, Any] = {"stream": stream, "status": status}
    if status in {404, 410}:
        return errors.StreamNotFound(f"The stream server has no stream {stream!r} ({status})", **about)
    if status == 403 and "Producer-Epoch" in headers:
        return errors.ProducerFenced(
            f"Stream {stream!r}: the server knows a newer producer epoch",
            epoch=int(headers["Producer-Epoch"]),
            stream=stream,
        )
    if status in {401, 403}:
        return errors.StreamForbidden(
            f"The stream server refused our token for {stream!r} ({status}). "
            "Do its verify key, issuer and audience match signing_key, token_issuer and token_audience?",
            **about,
        )
    if status == 409 and "Producer-Expected-Seq" in headers:
        return errors.ProducerGap(
            f"Stream {stream!r}: the server has not seen our earlier frames",
            expected=int(headers["Producer-Expected-Seq"]),
            stream=stream,
        )
    if status == 409 and _says_closed(response):
        return errors.StreamClosed(f"Stream {stream!r} is closed and takes no more events", **about)
    if status == 409:
        return errors.StreamConflict(
            f"Stream {stream!r} exists with another content type or lifetime (409). Delete it, or use another name",
            **about,
        )
    if status == 413:
        return errors.FrameTooLarge(
            f"The body is over the stream server's limit ({stream!r}). Lower max_frame_bytes, or send less", **about
        )
    if status == 429 or status >= 500:
        return errors.StreamUnavailable(
            f"The stream server cannot take a request for {stream!r} now ({status})",
            retry_after=retry_after(headers.get("Retry-After")),
            **about,
        )
    return errors.StreamRefused(f"The stream server refused a request for {stream!r} ({status})", **about)


def _next_offset(response: StreamResponse, stream: str) -> str:
    """The offset that every success carries (5.1 to 5.5); without it, it is somebody else's success."""
    offset = response.headers.get("Stream-Next-Offset")
    if not offset:
        raise errors.StreamUnavailable(
            f"What answers for stream {stream!r} is no Durable Streams server ({response.status} without "
            "Stream-Next-Offset). Is server_url right, and is a proxy or a maintenance page in the way?",
            stream=stream,
            status=response.status,
        )
    return offset


def _says_closed(response: StreamResponse) -> bool:
    return response.headers.get("Stream-Closed", "").lower() == "true"


def retry_after(value: str | None) -> float | None:
    """Seconds in a `Retry-After` header (RFC 9110, 10.2.3), or None when it is absent or makes no sense."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
