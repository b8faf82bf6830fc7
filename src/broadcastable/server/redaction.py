"""A log filter that takes tokens out of what other libraries write: URLs of httpx, headers in a debug line."""

from __future__ import annotations

import logging
import re
from typing import Any

_TOKEN = re.compile(
    r"""((?:[?&]|\b)token=|\bbearer\s+)  # where one begins
        [^\s&"'<>%][^\s&"'<>]*          # up to the end of the parameter or the word; %s is no token
        | \bey[\w-]+\.[\w-]+\.[\w-]+    # or a bare JWT anywhere""",
    re.IGNORECASE | re.VERBOSE,
)


def redact(text: str) -> str:
    """*text* with every token in it replaced by `[token]`."""
    return _TOKEN.sub(lambda found: f"{found[1] or ''}[token]", text)


class RedactTokens(logging.Filter):
    """Add it to a handler, which sees the records of all loggers below: `handler.addFilter(RedactTokens())`.

    The gatekeeper takes the token out of a request before the server logs it, so this is for the logs of others.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite the record's texts; every record passes."""
        record.msg = _redacted(record.msg)
        if isinstance(record.args, tuple):
            record.args = tuple(map(_redacted, record.args))
        elif record.args:
            record.args = {name: _redacted(value) for name, value in record.args.items()}
        return True


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    # Objects that become text only when the line is written, such as httpx.URL.
    text = "" if value is None or isinstance(value, int | float) else str(value)
    cleaned = redact(text)
    return value if cleaned == text else cleaned
