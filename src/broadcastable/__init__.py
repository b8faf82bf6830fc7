"""Durable Streams for SQLAlchemy: every committed change reaches every subscriber, in commit order, exactly once."""

from __future__ import annotations

__version__ = "0.1.0"
