"""The process that commits: `python -m tests.chaos.app WRITERS ROOMS`, until killed. Settings from the environment.

SIGTERM ends it in order: transactions are finished and handed over. It may die at a named step of a commit, too.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time

import sqlalchemy as sa
from sqlalchemy.orm import Session

import broadcastable
from broadcastable.settings import current_settings
from tests.chaos.dying import Death
from tests.chaos.models import Commit, Message, Room

ended = threading.Event()


def write_on(engine: sa.Engine, rooms: int, pause: float) -> None:
    chance = random.Random()
    while not ended.is_set():
        try:
            with Session(engine) as session:
                write(session, chance, rooms)
        except sa.exc.DBAPIError as error:
            # Deadlocks of two moves are the application's to repeat.
            print(f"{type(error).__name__}: {error.orig}", file=sys.stderr)
        time.sleep(pause * chance.random() * 2)


def write(session: Session, chance: random.Random, rooms: int) -> None:
    room = session.get_one(Room, chance.randint(1, rooms), with_for_update=True)
    room.number += 1
    here = sa.select(Message).where(Message.room_id == room.id)
    message = session.scalars(here.order_by(sa.func.random()).limit(1)).first()
    touched = {room.id}
    action = chance.random()
    if message is None or action < 0.5:
        for _ in range(chance.choice((1, 1, 1, 5))):
            session.add(Message(room_id=room.id, number=room.number, writer=str(os.getpid()), body="x" * 40))
    elif action < 0.75:
        message.number, message.body = room.number, f"edited {room.number}"
    elif action < 0.85:
        other = session.get_one(Room, chance.randint(1, rooms), with_for_update=True)
        if other is not room:
            other.number += 1
        message.room_id, message.number = other.id, other.number
        touched.add(other.id)
    else:
        session.delete(message)
    if action > 0.97:
        session.flush()
        session.rollback()
    else:
        txid = broadcastable.txid(session)
        session.add_all(Commit(txid=txid, room_id=room_id, process=os.getpid()) for room_id in touched)
        session.commit()


def main() -> None:
    writers, rooms = int(sys.argv[1]), int(sys.argv[2])
    url = current_settings().database_url
    assert url is not None
    engine = sa.create_engine(url, pool_size=writers)
    death = Death()
    death.at(engine.dialect, "do_commit", step="commit")
    for step in ("reserve", "put", "stage", "staged"):
        death.at(type(broadcastable.durable_streams.current().outbox), step)
    threads = [
        threading.Thread(target=write_on, args=(engine, rooms, float(os.environ["CHAOS_PAUSE"])), daemon=True)
        for _ in range(writers)
    ]
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    for thread in threads:
        thread.start()
    print("writing", flush=True)
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
