"""What a page needs, to be served as it is: `MODULE` is the path of `broadcastable.js`."""

from __future__ import annotations

from pathlib import Path

MODULE = Path(__file__).with_name("broadcastable.js")
