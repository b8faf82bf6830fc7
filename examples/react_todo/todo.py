"""The application behind the page: FastAPI, SQLite, and a stream server in the same process.

$ pip install "broadcastable[server]" fastapi uvicorn
$ npm install && npm run build
$ python todo.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated
from uuid import UUID

import sqlalchemy as sa
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import broadcastable
from broadcastable import Broadcastable, streams_to
from broadcastable.server import embedded_server

HERE = Path(__file__).parent
DATA = Path(os.environ.get("TODO_DATA", HERE))


class Base(DeclarativeBase):
    pass


class Todo(Base, Broadcastable):
    __tablename__ = "todos"
    __streams__ = streams_to("todos")

    id: Mapped[UUID] = mapped_column(primary_key=True)  # chosen by the page
    text: Mapped[str] = mapped_column(sa.String(200))
    done: Mapped[bool] = mapped_column(default=False)
    at: Mapped[datetime] = mapped_column(default=lambda: datetime.now(UTC))


class NewTodo(BaseModel):
    id: UUID
    text: str = Field(min_length=1, max_length=200)


class Change(BaseModel):
    done: bool


class Stored(BaseModel):
    txid: str


engine = sa.create_engine(f"sqlite:///{DATA / 'todo.db'}")
app = FastAPI()


def session() -> Iterator[Session]:
    with Session(engine) as session:
        yield session


Db = Annotated[Session, Depends(session)]


@app.get("/api/snapshot")
def snapshot(db: Db) -> Response:
    """All todos, and the offset after which every change follows. Whoever may see them is decided here."""
    return Response(broadcastable.snapshot(db, sa.select(Todo), "todos").json(), media_type="application/json")


@app.post("/api/todos", status_code=201)
def add(new: NewTodo, db: Db) -> Stored:
    if db.get(Todo, new.id) is not None:
        raise HTTPException(409)
    db.add(Todo(id=new.id, text=new.text))
    return stored(db)


@app.patch("/api/todos/{todo_id}")
def tick(todo_id: UUID, change: Change, db: Db) -> Stored:
    known(db, todo_id).done = change.done
    return stored(db)


@app.delete("/api/todos/{todo_id}")
def remove(todo_id: UUID, db: Db) -> Stored:
    db.delete(known(db, todo_id))
    return stored(db)


@app.post("/api/todos/clear")
def clear(db: Db) -> Stored:
    for todo in db.scalars(sa.select(Todo).where(Todo.done)):
        db.delete(todo)
    return stored(db)


def known(db: Session, todo_id: UUID) -> Todo:
    todo = db.get(Todo, todo_id)
    if todo is None:
        raise HTTPException(404)
    return todo


def stored(db: Session) -> Stored:
    """Commit. The page waits for this txid, so it must come by even if nothing has changed."""
    db.flush()
    txid = broadcastable.confirm_txid(db, "todos")
    db.commit()
    return Stored(txid=txid)


def main() -> None:
    Base.metadata.create_all(engine)
    port, stream_port = int(os.environ.get("PORT", "8000")), int(os.environ.get("STREAM_PORT", "4437"))
    app.mount("/", StaticFiles(directory=HERE / "dist", html=True))
    with embedded_server(port=stream_port, data_dir=DATA / "streams") as server:
        broadcastable.configure(server_url=server.url, signing_key=server.settings.signing_key)
        uvicorn.run(app, port=port, log_level="warning")


if __name__ == "__main__":
    main()
