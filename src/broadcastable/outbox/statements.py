"""The statements that a relay repeats for every frame, built once: building one takes longer than the database does.

Parameters: `of_stream` names the stream; the others are those of the text.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from .framing import Limits
from .schema import OutboxTables, now_ms


class Statements:
    """The relay's statements on the tables of one outbox. Immutable."""

    def __init__(self, tables: OutboxTables, limits: Limits) -> None:
        rows, state = tables.batches.c, tables.streams.c
        of_stream = sa.bindparam("of_stream", type_=state.stream.type)
        its_state, its_rows = state.stream == of_stream, rows.stream == of_stream

        # What is larger than a frame is read in slices, once it is known which.
        payload = sa.case((rows.size <= limits.max_bytes, rows.payload), else_=None)
        columns = (rows.id, rows.created_at, rows.about, payload.label("payload"))

        self.insert_one = sa.insert(tables.batches).inline()
        """One row, whose id nobody asks for."""

        now = now_ms().label("now")
        self.lock = sa.select(tables.streams, now).where(its_state).with_for_update()
        """The columns of a `StreamState`, locked until the end of the transaction."""

        self.change = sa.update(tables.streams).where(its_state)
        """Sets the columns of the stream's state that are given as further parameters."""

        self.any_row = sa.select(rows.id).where(its_rows).limit(1)

        self.row = sa.select(*columns).where(rows.id == sa.bindparam("of_id"))
        """Columns of a `Stored`, as in the next two."""

        self.frozen_rows = sa.select(*columns).where(its_rows, rows.frame == sa.bindparam("of_frame")).order_by(rows.id)

        first = (
            sa.select(rows.id, rows.size, rows.events)
            .where(its_rows, rows.frame == 0)
            .order_by(rows.id)
            .limit(limits.max_events)
            .subquery("first")
        )
        bytes_before = sa.func.sum(first.c.size).over(order_by=first.c.id) - first.c.size
        events_before = sa.func.sum(first.c.events).over(order_by=first.c.id) - first.c.events
        summed = sa.select(first.c.id, bytes_before.label("bytes"), events_before.label("events")).subquery("summed")
        self.free_rows = (
            sa.select(*columns)
            .join(summed, summed.c.id == rows.id)
            .where(summed.c.bytes < limits.max_bytes, summed.c.events < limits.max_events)
            .order_by(rows.id)
        )
        """Free rows by id, up to the first that is too much for a frame."""

        is_frozen = sa.and_(
            its_state,
            state.count == sa.bindparam("of_count"),
            state.epoch == sa.bindparam("of_epoch"),
            state.seq == sa.bindparam("of_seq"),
        )
        self.anchor = (
            sa.update(tables.streams)
            .where(is_frozen, state.anchor.is_not_distinct_from(sa.bindparam("known", type_=state.anchor.type)))
            .values(anchor=sa.bindparam("offset"))
        )
        """Changes one row if that very frame is frozen, `of_count` events of it, and its anchor is `known`."""

        acked = (
            sa.update(tables.streams)
            .where(is_frozen)
            .values(
                seq=state.seq + 1,
                count=0,
                head_id=state.rest_id,
                skip=state.rest,
                rest_id=None,
                rest=0,
                parked=None,
                anchor=sa.func.coalesce(sa.bindparam("offset", type_=state.anchor.type), state.anchor),
            )
            .returning(tables.streams, now)
            .cte("acked")
        )
        removed = (
            sa.delete(tables.batches)
            .where(its_rows, rows.frame == acked.c.frame, rows.id.is_distinct_from(acked.c.head_id))
            .cte("removed")
        )
        self.ack_on_postgresql = sa.select(acked).add_cte(removed)
        """Locks and acks that very frame, all `of_count` events of it; the `StreamState` after it, if it was frozen.

        Whoever had the lock before it changed the state or did not: if it did, the epoch, the number or the count is
        another one now, and nothing is removed.
        """

        marked = sa.update(tables.batches).where(ids_on_postgresql(rows.id)).values(frame=sa.bindparam("new_frame"))
        self.freeze_on_postgresql = self.change.add_cte(marked.cte("marked"))
        """`change`, and the rows `ids` are marked with `new_frame`."""


def ids_on_postgresql(column: sa.ColumnElement[int]) -> sa.ColumnElement[bool]:
    """*column* is among `ids`. One array: a thousand parameters take the driver longer than the server its work."""
    return column == sa.any_(sa.bindparam("ids", type_=postgresql.ARRAY(sa.BigInteger)))
