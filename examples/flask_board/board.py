"""A board of cards in three columns: Flask and SQLite, with everything else inside the process.

$ pip install "broadcastable[server]" flask
$ python board.py
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from flask import Flask, Response, abort, g, request, send_file
from sqlalchemy import event
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

import broadcastable
from broadcastable import Broadcastable, streams_to
from broadcastable.server import embedded_server
from broadcastable.server.flask import streams_blueprint
from broadcastable.server.grants import Grant
from broadcastable.static import MODULE

HERE = Path(__file__).parent
COLUMNS = ("to do", "doing", "done")
TITLE = re.compile(r"[^\x00\ud800-\udfff]{1,200}")  # no half characters, which JSON can name and UTF-8 cannot hold
LARGEST_ID = 2**63 - 1  # of SQLite; its driver raises for what is beyond


class Base(DeclarativeBase):
    pass


class Card(Base, Broadcastable):
    __tablename__ = "cards"
    __streams__ = streams_to("board")  # one stream for the whole board

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(sa.String(200))
    column: Mapped[str] = mapped_column(sa.String(20), default=COLUMNS[0])
    place: Mapped[float] = mapped_column(default=0.0)


def may_follow(stream: str) -> Grant | None:
    """Everybody may follow the board, and nothing else. Your sign-in belongs here."""
    return Grant() if stream == "board" else None


def create_app(database_url: str | None = None) -> Flask:
    """The application; it makes its table when it is not there."""
    app = Flask(__name__)
    engine = sa.create_engine(database_url or os.environ.get("DATABASE_URL", f"sqlite:///{HERE / 'board.db'}"))
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA journal_mode=WAL"))
    Base.metadata.create_all(engine)
    open_session = sessionmaker(engine)
    app.register_blueprint(streams_blueprint(may_follow))

    def session() -> Session:
        if "session" not in g:
            g.session = open_session()
        return g.session

    @app.teardown_appcontext
    def close_session(error: BaseException | None) -> None:
        if "session" in g:
            g.session.close()

    def stored(card: Card) -> dict[str, Any]:
        session().flush()
        answer = {"id": card.id, "txid": broadcastable.txid(session())}
        session().commit()
        return answer

    def known(card_id: int) -> Card:
        card = session().get(Card, card_id) if card_id <= LARGEST_ID else None
        return card or abort(404)

    @app.get("/")
    def page() -> Response:
        return send_file(HERE / "page.html")

    @app.get("/broadcastable.js")
    def module() -> Response:
        return send_file(MODULE, mimetype="text/javascript")

    @app.get("/snapshot")
    def snapshot() -> Response:
        found = broadcastable.snapshot(session(), sa.select(Card), "board")
        return Response(found.json(), mimetype="application/json")

    @app.post("/cards")
    def add() -> tuple[dict[str, Any], int]:
        sent = _sent()
        card = Card(title=_title(sent), place=_next_place(session()))
        session().add(card)
        return stored(card), 201

    @app.patch("/cards/<int:card_id>")
    def change(card_id: int) -> dict[str, Any]:
        sent = _sent()
        card = known(card_id)
        if "title" in sent:
            card.title = _title(sent)
        if "column" in sent:
            if sent["column"] not in COLUMNS:
                abort(400)
            card.column = sent["column"]
            card.place = _next_place(session())
        return stored(card)

    @app.delete("/cards/<int:card_id>")
    def remove(card_id: int) -> dict[str, Any]:
        card = known(card_id)
        session().delete(card)
        return stored(card)

    @app.post("/cards/done/clear")
    def clear() -> dict[str, Any]:
        """Many rows, one transaction: the page sees them go together."""
        for card in session().scalars(sa.select(Card).where(Card.column == COLUMNS[-1])):
            session().delete(card)
        txid = broadcastable.confirm_txid(session(), "board")  # also when there was none to delete
        session().commit()
        return {"txid": txid}

    return app


def _sent() -> dict[str, Any]:
    sent = request.get_json()
    if not isinstance(sent, dict):
        abort(400)
    return sent


def _title(sent: dict[str, Any]) -> str:
    title = sent.get("title")
    if not isinstance(title, str) or TITLE.fullmatch(title) is None:
        abort(400)
    return title


def _next_place(session: Session) -> float:
    return (session.scalar(sa.select(sa.func.max(Card.place))) or 0.0) + 1.0


def main() -> None:
    """Run the board with a stream server beside it, both in this process: `python board.py`."""
    port, stream_port = int(os.environ.get("PORT", "8000")), int(os.environ.get("STREAM_PORT", "4437"))
    with embedded_server(port=stream_port, data_dir=HERE / "streams") as server:
        broadcastable.configure(server_url=server.url, signing_key=server.settings.signing_key)
        create_app().run(port=port, threaded=True)


if __name__ == "__main__":
    main()
