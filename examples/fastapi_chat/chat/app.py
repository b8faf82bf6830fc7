"""The web application: `uvicorn chat.app:app`."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import sqlalchemy as sa
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

import broadcastable
from broadcastable import aio
from broadcastable.server.grants import Grant
from broadcastable.server.starlette import stream_routes, streams_lifespan

from . import settings
from .models import Message, Room, Session, create_tables, engine, session
from .worker import throw_dice

PAGE = Path(__file__).parent / "page.html"
MESSAGES_OF_A_ROOM = re.compile(rf"gid://{re.escape(settings.gid_app)}/Room/([1-9][0-9]{{0,8}})/messages")

# What PostgreSQL can hold: an INTEGER, and text without the character of code 0.
RowId = Annotated[int, Field(ge=1, lt=2**31)]
Name = Annotated[str, Field(min_length=1, max_length=40, pattern=r"^[^\x00]*$")]
Text = Annotated[str, Field(min_length=1, max_length=2_000, pattern=r"^[^\x00]*$")]


class NewRoom(BaseModel):
    name: Name


class NewMessage(BaseModel):
    author: Name
    text: Text


class Change(BaseModel):
    text: Text | None = None
    room_id: RowId | None = None


class Stored(BaseModel):
    """The id, and the txid that the page sees on the stream once it shows the row."""

    id: int
    txid: str


async def may_follow(request: Request, stream: str) -> Grant | None:
    """Who may read which stream. Here everybody may read the rooms that there are; your sign-in belongs here.

    Compare the whole name: whoever is given a token for a stream is given the stream too, made if it is not there.
    """
    if stream == "rooms":
        return Grant()
    named = MESSAGES_OF_A_ROOM.fullmatch(stream)
    if named is None:
        return None
    async with Session() as db:
        return Grant() if await db.get(Room, int(named[1])) is not None else None


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
async def room_snapshot(room_id: RowId, db: Db) -> Response:
    """The last hundred messages of a room, and where to follow it."""
    room = await _room(db, room_id)
    last = sa.select(Message.id).where(Message.room_id == room_id).order_by(Message.id.desc()).limit(100)
    rows = sa.select(Message).where(Message.id.in_(last)).order_by(Message.id)
    found = await aio.snapshot(db, rows, room, "messages")
    return Response(found.json(), media_type="application/json")


@app.post("/rooms", status_code=201)
async def make_room(new: NewRoom, db: Db) -> Stored:
    room = Room(name=new.name)
    db.add(room)
    try:
        return await _stored(db, room)
    except IntegrityError:
        raise HTTPException(409, "There is a room of this name; choose another") from None


@app.post("/rooms/{room_id}/messages", status_code=201)
async def post(room_id: RowId, new: NewMessage, db: Db) -> Stored:
    await _room(db, room_id)
    message = Message(room_id=room_id, author=new.author, text=new.text)
    db.add(message)
    stored = await _stored(db, message)
    if new.text == "/dice":
        throw_dice.send(room_id, new.author)  # after the commit: the worker must find the room
    return stored


@app.patch("/messages/{message_id}")
async def change(message_id: RowId, change: Change, db: Db) -> Stored:
    """Edit a message, or move it to another room: a delete there, an insert here, in one transaction."""
    message = await _message(db, message_id)
    if change.text is not None:
        message.text = change.text
    if change.room_id is not None:
        await _room(db, change.room_id)
        message.room_id = change.room_id
    return await _stored(db, message)


@app.delete("/messages/{message_id}")
async def remove(message_id: RowId, db: Db) -> Stored:
    message = await _message(db, message_id)
    await db.delete(message)
    return await _stored(db, message)


async def _room(db: AsyncSession, room_id: int) -> Room:
    room = await db.get(Room, room_id)
    if room is None:
        raise HTTPException(404)
    return room


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
