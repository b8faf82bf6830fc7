"""Texts that must not change unseen. `UPDATE_GOLDEN=1 pytest tests/cli` writes them anew."""

from __future__ import annotations

import os
from pathlib import Path

DIRECTORY = Path(__file__).with_name("golden")


def check(name: str, text: str) -> None:
    """Compare *text* with the golden file *name*."""
    path = DIRECTORY / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, "utf-8")
    assert path.exists(), f"there is no golden file {path.name}: UPDATE_GOLDEN=1 makes it"
    assert text == path.read_text("utf-8")
