"""broadcastable outbox

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

import broadcastable.outbox.schema

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "broadcastable_outbox",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("stream", broadcastable.outbox.schema.ExactText(length=512), nullable=False),
        sa.Column("frame", sa.BigInteger(), nullable=False),
        sa.Column("put_at", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("events", sa.Integer(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column(
            "about",
            sa.LargeBinary().with_variant(mysql.LONGBLOB(), "mariadb").with_variant(mysql.LONGBLOB(), "mysql"),
            nullable=False,
        ),
        sa.Column(
            "payload",
            sa.LargeBinary().with_variant(mysql.LONGBLOB(), "mariadb").with_variant(mysql.LONGBLOB(), "mysql"),
            nullable=False,
        ),
        sa.Column("put_id", broadcastable.outbox.schema.ExactText(length=64), nullable=True),
        sa.PrimaryKeyConstraint("id"),
        mariadb_charset="utf8mb4",
        mariadb_engine="InnoDB",
        mysql_charset="utf8mb4",
        mysql_engine="InnoDB",
        sqlite_autoincrement=True,
    )
    op.create_index("ix_broadcastable_outbox_order", "broadcastable_outbox", ["stream", "frame", "id"], unique=False)
    op.create_index("ix_broadcastable_outbox_put_id", "broadcastable_outbox", ["put_id"], unique=True)
    op.create_table(
        "broadcastable_streams",
        sa.Column("stream", broadcastable.outbox.schema.ExactText(length=512), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("frame", sa.BigInteger(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("head_id", sa.BigInteger(), nullable=True),
        sa.Column("skip", sa.Integer(), nullable=False),
        sa.Column("rest_id", sa.BigInteger(), nullable=True),
        sa.Column("rest", sa.Integer(), nullable=False),
        sa.Column("anchor", sa.Text(), nullable=True),
        sa.Column("lease", sa.String(length=64), nullable=True),
        sa.Column("leased_until", sa.BigInteger(), nullable=False),
        sa.Column("not_before", sa.BigInteger(), nullable=False),
        sa.Column("parked", sa.Text(), nullable=True),
        sa.Column("woken_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("stream"),
        mariadb_charset="utf8mb4",
        mariadb_engine="InnoDB",
        mysql_charset="utf8mb4",
        mysql_engine="InnoDB",
    )


def downgrade() -> None:
    op.drop_table("broadcastable_streams")
    op.drop_index("ix_broadcastable_outbox_put_id", table_name="broadcastable_outbox")
    op.drop_index("ix_broadcastable_outbox_order", table_name="broadcastable_outbox")
    op.drop_table("broadcastable_outbox")
