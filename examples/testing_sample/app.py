"""A chat over HTTP: what is written here is seen by every reader of a room's stream.

$ broadcastable keys generate
$ export BROADCASTABLE_SIGNING_KEY=signing_key.pem
$ broadcastable server &
$ uvicorn app:app
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from database import engine, session_of_request
from fastapi import Depends, FastAPI, HTTPException
from models import Base, Message, Room
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession

from broadcastable import aio, txid


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield
    await aio.close()
    await engine.dispose()


app = FastAPI(lifespan=lifespan)

SessionOfRequest = Annotated[AsyncSession, Depends(session_of_request)]


class NewRoom(BaseModel):
    name: str


class NewMessage(BaseModel):
    author: str
    text: str
    draft: bool = False


class Accepted(BaseModel):
    id: int
    txid: str


@app.post("/rooms", status_code=201)
async def open_room(new: NewRoom, session: SessionOfRequest) -> Accepted:
    room = Room(name=new.name)
    session.add(room)
    return await _committed(room, session)


@app.get("/rooms/{room_id}")
async def enter(room_id: int, session: SessionOfRequest) -> dict[str, str]:
    """Where to read the room's messages, for as long as the token lives."""
    room = await _room(room_id, session)
    return {"name": room.name, "messages": await aio.signed_stream_url(room, "messages")}


@app.post("/rooms/{room_id}/messages", status_code=201)
async def post(room_id: int, new: NewMessage, session: SessionOfRequest) -> Accepted:
    room = await _room(room_id, session)
    message = Message(room=room, author=new.author, text=new.text, draft=new.draft)
    session.add(message)
    return await _committed(message, session)


@app.put("/messages/{message_id}")
async def edit(message_id: int, new: NewMessage, session: SessionOfRequest) -> Accepted:
    message = await session.get(Message, message_id)
    if message is None:
        raise HTTPException(404)
    message.author, message.text, message.draft = new.author, new.text, new.draft
    return await _committed(message, session)


@app.post("/rooms/{room_id}/typing", status_code=204, response_model=None)
async def typing(room_id: int, author: str, session: SessionOfRequest) -> None:
    """Nothing is stored: who types is worth telling, and not worth a row."""
    room = await _room(room_id, session)
    await aio.broadcast_to(room, "typing", author=author)


@app.delete("/rooms/{room_id}", status_code=204, response_model=None)
async def close_room(room_id: int, session: SessionOfRequest) -> None:
    room = await _room(room_id, session)
    await session.delete(room)
    room.broadcast_later_to("messages", closed=True)
    await session.commit()


async def _room(room_id: int, session: AsyncSession) -> Room:
    room = await session.get(Room, room_id)
    if room is None:
        raise HTTPException(404)
    return room


async def _committed(record: Room | Message, session: AsyncSession) -> Accepted:
    # The page waits for this id on the stream before it shows the change as done.
    mark = txid(session)
    await session.commit()
    return Accepted(id=record.id, txid=mark)
