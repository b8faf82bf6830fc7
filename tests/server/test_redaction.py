"""The filter for the logs of others."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import httpx
import pytest

from broadcastable.server import RedactTokens

TOKEN = "eyJhbGciOiJFUzI1NiJ9.eyJzdHJlYW0iOiJ4In0.c2lnbmF0dXJl"  # of the form of one, and no more


@pytest.fixture
def log() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.addFilter(RedactTokens())
    logger = logging.getLogger("tests.redaction")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield logger, written
    logger.removeHandler(handler)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (f"GET /v1/streams/x?token={TOKEN}&offset=-1", ()),
        ("GET %s", (f"http://localhost/v1/streams/x?offset=-1&token={TOKEN}",)),
        ("HTTP Request: %s %s", ("GET", httpx.URL(f"http://localhost/x?offset=-1&token={TOKEN}"))),
        ("headers: %r", ({"Authorization": f"Bearer {TOKEN}", "offset": "offset=-1"},)),
        ("%(url)s", ({"url": f"/x?token={TOKEN}&offset=-1"},)),
        ("authorization: bearer %s offset=-1", (TOKEN,)),
        ("claims of %s at offset=-1", (TOKEN,)),
        (f"https://x/?TOKEN={TOKEN}#offset=-1", ()),
    ],
)
def test_a_token_is_taken_out_and_the_rest_stays(
    log: tuple[logging.Logger, io.StringIO], message: str, arguments: tuple[object, ...]
) -> None:
    logger, written = log
    logger.info(message, *arguments)
    line = written.getvalue()
    assert "[token]" in line
    assert "offset=-1" in line or "#" in message
    for segment in TOKEN.split("."):
        assert segment not in line


def test_a_line_without_a_token_is_left_alone(log: tuple[logging.Logger, io.StringIO]) -> None:
    logger, written = log
    logger.info("%s took %.2f s, %d tokens, %r", "deliver", 0.5, 3, None)
    assert written.getvalue() == "deliver took 0.50 s, 3 tokens, None\n"
