"""The web application: `uvicorn chat.app:app`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import sqlalchemy as sa
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field
from sqlalchemy.ext.asyncio import AsyncSession

import broadcastable
from broadcastable import aio
from broadcastable.names import GID
from broadcastable.server.grants import Grant
from broadcastable.server.starlette import stream_routes, streams_lifespan

from .models import Message, Room, create_tables, engine, session
from .worker import throw_dice

PAGE = Path(__file__).parent / "page.html"


class NewRoom(BaseModel):
    name: str = Field(min_length=1, max_length=40)


class NewMessage(BaseModel):
    author: str = Field(min_length=1, max_length=40)
    text: str = Field(min_length=1, max_length=2_000)


class Change(BaseModel):
    text: str | None = Field(default=None, min_length=1, max_length=2_000)
    room_id: int | None = None


class Stored(BaseModel):
    """The id, and the txid that the page sees on the stream once it shows the row."""

    id: int
    txid: str


async def may_follow(request: Request, stream: str) -> Grant | None:
    """Who may read which stream. Here everybody may read all rooms; your sign-in belongs here."""
    return Grant() if stream == "rooms" or stream.startswith("gid://app/Room/") else None


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, object]]:
    await create_tables()
    async with streams_lifespan()(app) as state:
        yield state
    await engine.dispose()


app = FastAPI(lifespan=lifespan, routes=stream_routes(may_follow))
app.mount("/static", StaticFiles(packages=[("broadcastable", "static")]))
Db = Annotated[AsyncSession, Depends(session)]


@app.get("/")
async def page() -> FileResponse:
    return FileResponse(PAGE)


@app.get("/snapshot")
async def rooms_snapshot(db: Db) -> Response:
    """All rooms, and where to follow them."""
    found = await aio.snapshot(db, sa.select(Room).order_by(Room.name), "rooms")
    return Response(found.json(), media_type="application/json")


@app.get("/rooms/{room_id}/snapshot")
async def room_snapshot(room_id: int, db: Db) -> Response:
    """The last hundred messages of a room, and where to follow it."""
    last = sa.select(Message.id).where(Message.room_id == room_id).order_by(Message.id.desc()).limit(100)
    rows = sa.select(Message).where(Message.id.in_(last)).order_by(Message.id)
    found = await aio.snapshot(db, rows, GID("app", "Room", (str(room_id),)), "messages")
    return Response(found.json(), media_type="application/json")


@app.post("/rooms", status_code=201)
async def make_room(new: NewRoom, db: Db) -> Stored:
    room = Room(name=new.name)
    db.add(room)
    return await _stored(db, room)


@app.post("/rooms/{room_id}/messages", status_code=201)
async def post(room_id: int, new: NewMessage, db: Db) -> Stored:
    if await db.get(Room, room_id) is None:
        raise HTTPException(404)
    message = Message(room_id=room_id, author=new.author, text=new.text)
    db.add(message)
    stored = await _stored(db, message)
    if new.text == "/dice":
        throw_dice.send(room_id, new.author)  # after the commit: the worker must find the room
    return stored


@app.patch("/messages/{message_id}")
async def change(message_id: int, change: Change, db: Db) -> Stored:
    """Edit a message, or move it to another room: a delete there, an insert here, in one transaction."""
    message = await _message(db, message_id)
    if change.text is not None:
        message.text = change.text
    if change.room_id is not None:
        if await db.get(Room, change.room_id) is None:
            raise HTTPException(404)
        message.room_id = change.room_id
    return await _stored(db, message)


@app.delete("/messages/{message_id}")
async def remove(message_id: int, db: Db) -> Stored:
    message = await _message(db, message_id)
    await db.delete(message)
    return await _stored(db, message)


async def _message(db: AsyncSession, message_id: int) -> Message:
    message = await db.get(Message, message_id)
    if message is None:
        raise HTTPException(404)
    return message


async def _stored(db: AsyncSession, row: Room | Message) -> Stored:
    await db.flush()
    stored = Stored(id=row.id, txid=broadcastable.txid(db))
    await db.commit()
    return stored
