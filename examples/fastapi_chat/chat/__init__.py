"""A chat with rooms: FastAPI and PostgreSQL, streamed by broadcastable with the database outbox.

All that differs between machines is in `BROADCASTABLE_*`; see the README for the list.
"""

from __future__ import annotations

import broadcastable

settings = broadcastable.configure(outbox="database")
