"""`StreamFrom` of docs/snapshots.md: a StreamDB that follows only what comes after an offset."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.interop.conftest import Page, Writer

SNAPSHOTS = Path(__file__).parents[2] / "docs" / "snapshots.md"
MESSAGES = {"messages": ("message", "id")}


def source() -> str:
    """The class as the documentation has it."""
    (found,) = re.findall(r"^class StreamFrom .*?^}$", SNAPSHOTS.read_text(), re.DOTALL | re.MULTILINE)
    return str(found)


def insert(key: str, txid: str | None = None) -> dict[str, Any]:
    headers = {"operation": "insert"} | ({} if txid is None else {"txid": txid})
    return {"type": "message", "key": key, "value": {"body": f"message {key}"}, "headers": headers}


@pytest.mark.parametrize("live", [True, "sse", "long-poll"])
def test_a_stream_db_begins_at_an_offset_and_goes_on_by_itself(
    page: Page, writer: Writer, stream: str, live: bool | str
) -> None:
    """What was before never comes, what follows comes once, and no request is made in vain."""
    writer.create(stream)
    writer.append(stream, insert("1"), insert("2"))
    offset = page.read(stream)["offset"]
    writer.append(stream, insert("3"))

    address = page.address(stream)
    token = address["headers"]["Authorization"].removeprefix("Bearer ")
    page.node.do(
        "open_from",
        name="db",
        url=address["url"],
        token=token,
        offset=offset,
        collections=MESSAGES,
        source=source(),
        live=live,
    )
    assert [row["id"] for row in page.rows("messages")] == ["3"]
    for number in range(4, 10):
        writer.append(stream, insert(str(number), txid=f"t{number}"))
        page.await_txid(f"t{number}")
    assert [row["id"] for row in page.rows("messages")] == [str(number) for number in range(3, 10)]

    asked = page.node.do("asked", name="db")
    assert asked[0] == offset
    assert offset not in asked[2:], "it began again"
    assert "-1" not in asked
    before = len(asked)
    time.sleep(1)
    assert len(page.node.do("asked", name="db")) - before <= 1
