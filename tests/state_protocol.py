"""The Durable Streams State Protocol 1.0 as a JSON Schema, written from its text, and a tap that checks every event.

The section that a rule comes from stands beside it. Where the text says MUST, the schema refuses; what it leaves open
(a `value` beside a delete, 4.1.3) passes. Fields that the text does not name are refused: the published schema does so.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

import jsonschema
import pytest

from broadcastable.events import Batch, ChangeEvent

TEXT = {"type": "string", "minLength": 1}

CHANGE = {
    "type": "object",
    "required": ["type", "key", "headers"],  # 4.1
    "properties": {
        "type": TEXT,  # 5.1
        "key": TEXT,  # 5.1
        "value": True,  # 5.1, any JSON value
        "old_value": True,  # 5.1
        "headers": {
            "type": "object",
            "required": ["operation"],  # 4.1
            "properties": {
                "operation": {"enum": ["insert", "update", "delete"]},  # 5.1
                "txid": TEXT,  # 5.1
                "timestamp": {"type": "string", "format": "rfc3339"},  # 5.1
            },
            "additionalProperties": False,
        },
    },
    "additionalProperties": False,
    # 4.1.1 and 4.1.2: the value MUST be there; 4.1.3: it MAY be there.
    "if": {"properties": {"headers": {"properties": {"operation": {"enum": ["insert", "update"]}}}}},
    "then": {"required": ["value"]},
}

CONTROL = {
    "type": "object",
    "required": ["headers"],  # 4.2
    "properties": {
        "headers": {
            "type": "object",
            "required": ["control"],  # 4.2
            "properties": {
                "control": {"enum": ["snapshot-start", "snapshot-end", "reset"]},  # 5.2
                "offset": TEXT,  # 5.2
            },
            "additionalProperties": False,
        }
    },
    "additionalProperties": False,
}

SCHEMA = {"$schema": "https://json-schema.org/draft/2020-12/schema", "oneOf": [CHANGE, CONTROL]}

_RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", re.ASCII)
_formats = jsonschema.FormatChecker(formats=())


@_formats.checks("rfc3339")
def _is_rfc3339(value: object) -> bool:
    if not isinstance(value, str) or not _RFC3339.fullmatch(value):
        return False
    try:
        datetime.fromisoformat(value)
    except ValueError:
        return False
    return True


_change = jsonschema.Draft202012Validator(CHANGE, format_checker=_formats)
_message = jsonschema.Draft202012Validator(SCHEMA, format_checker=_formats)


def faults(message: Any) -> list[str]:
    """What the protocol has against *message*, a parsed JSON document; nothing when it is a message of the protocol."""
    return [error.message for error in _message.iter_errors(message)]


@functools.lru_cache(maxsize=2048)  # the tap and a test's own look ask about the same events
def faults_of_change(body: bytes) -> list[str]:
    """What the protocol has against *body* as one change message: bytes of strict JSON, no NaN, no doubled field."""
    try:
        message = json.loads(body.decode(), parse_constant=_refuse, object_pairs_hook=_distinct)
    except ValueError as error:
        return [f"not JSON: {error}"]
    return [error.message for error in _change.iter_errors(message)]


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError(f"a field comes twice among {[name for name, _ in pairs]}")
    return document


def is_meant_as_change(body: bytes) -> bool:
    """Whether *body* is a change message as this package writes them, well or badly made, and not free JSON."""
    return body.startswith(b'{"type":') and b'"headers":{"operation":' in body


class Tap:
    """Sees every change event that this process makes, whoever makes it, and keeps what is wrong with it.

    Explicit events are seen as they are encoded. Those of captured changes are put together from parts when their
    transaction ends, so they are seen in their batch, without which nothing goes anywhere: to the outbox, to a server
    or to a test's own delivery.
    """

    def __init__(self) -> None:
        self.seen = 0
        self.faults: list[tuple[bytes, list[str]]] = []

    def listening(self, encode: Callable[[ChangeEvent], bytes]) -> Callable[[ChangeEvent], bytes]:
        """*encode* with this tap behind it. It never raises: the code under test might swallow that."""

        def listened(event: ChangeEvent) -> bytes:
            body = encode(event)
            self._look_at(body)
            return body

        return listened

    def watching(self, make: Callable[..., None]) -> Callable[..., None]:
        """*make*, the initializer of `Batch`, with this tap behind it. It never raises either."""

        def watched(batch: Batch, *args: Any, **kwargs: Any) -> None:
            make(batch, *args, **kwargs)
            for body in batch.events:
                if is_meant_as_change(body):
                    self._look_at(body)

        return watched

    def _look_at(self, body: bytes) -> None:
        self.seen += 1
        wrong = faults_of_change(body)
        if wrong:
            self.faults.append((body, wrong))

    def check(self) -> None:
        """Fail the test when an event since the last check was no message of the protocol."""
        found, self.faults = self.faults, []
        if found:
            body, wrong = found[0]
            pytest.fail(f"{len(found)} events break the State Protocol; the first is {body!r}: {'; '.join(wrong)}")
