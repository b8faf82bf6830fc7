"""What a page needs, to be served as it is."""

from __future__ import annotations

from pathlib import Path

MODULE = Path(__file__).with_name("broadcastable.js")
"""The ES module for pages, `follow` and `Rows`: copy it, or serve it."""
