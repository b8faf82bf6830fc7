"""Migrations of the chat application. The database is `-x url=...`, else DATABASE_URL."""

from __future__ import annotations

import os

import sqlalchemy as sa
from alembic import context
from chat_app import Base

url = context.get_x_argument(as_dictionary=True).get("url") or os.environ.get("DATABASE_URL", "sqlite:///chat.db")


def run_offline() -> None:
    context.configure(url=url, target_metadata=Base.metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()


def run_online() -> None:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        context.configure(connection=connection, target_metadata=Base.metadata)
        with context.begin_transaction():
            context.run_migrations()


if context.is_offline_mode():
    run_offline()
else:
    run_online()
