"""The outbox in the application's own database: batches are written in the transaction that they tell of.

So they are there exactly when the rows are, and writers of one row, whom its lock puts in order, are in the same order
here. A frame *marks the rows it takes* and removes no others: a transaction that commits late with a lower id is
neither skipped nor deleted unsent.

Writers only insert, so writers of different rows never wait for each other, nor for a relay. Everything else is done
under a lock on the stream's row in `broadcastable_streams`, in short transactions of the relay's own connections.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec
import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.dialects import mysql, postgresql, sqlite

from broadcastable.events import Batch
from broadcastable.settings import Settings

from . import Advanced, BatchMark, Frame, FrameId, PendingStream, Rate
from .engines import Database, check, lends_its_pool, open_engine, sync_url
from .framing import Limits, events_that_fit, new_lease
from .rates import SECONDS, Tally, rate_of
from .rows import Stored, StreamState, put_id_of, row_of, split, stored
from .schema import MYSQL, ExactText, OutboxTables, now_ms, tables
from .statements import Statements, ids_on_postgresql

__all__ = ["DatabaseOutbox", "OutboxTables", "sync_url", "tables"]

ROWS_A_STATEMENT = 1_000
"""Rows that one INSERT, UPDATE or DELETE names."""

BYTES_A_STATEMENT = 4 << 20
"""Bytes of events after which an INSERT ends early: MariaDB refuses statements over `max_allowed_packet` (16 MiB)."""

IDS_KEPT_FOR = 10 * 60_000
"""Milliseconds for which the id of a batch given to `put` is remembered, so that a repeated put is applied once."""

STATE_KEPT_FOR = 6 * 86_400_000
"""Milliseconds for which an idle stream's row is kept: less than the seven days of a stream server's own memory."""

TIDY_EVERY = 600.0
"""Seconds between two removals of what is no longer kept, in each process that sweeps."""

LONGEST_ERROR = 10_000

ACKED = -1
"""The `frame` of a row that says what a process acked in a second: it has no stream, its `size` counts frames."""

T = TypeVar("T")


class DatabaseOutbox:
    """An `Outbox` in two tables of the application's database. Thread safe.

    Args:
        engine_or_url: The database, for the relay; an `Engine`'s pool is shared, except for SQLite, where the relay
            has connections of its own (`BEGIN IMMEDIATE`). A URL or engine of an asyncio driver stands for the same
            database through its synchronous driver. None in a process that only writes (`stage`).
        namespace: Beginning of the producer id.
        outbox_tables: What `tables` gave, when not the default.
        schema: The tables' schema, when *outbox_tables* is None.

    Raises:
        ConfigurationError: An in-memory SQLite database, which no worker could read, or a driver that is not installed.
    """

    transactional = True
    reserves = False

    def __init__(
        self,
        engine_or_url: Database | None,
        *,
        namespace: str,
        max_frame_bytes: int,
        max_frame_events: int,
        tables: OutboxTables | None = None,
        schema: str | None = None,
    ) -> None:
        found = tables or _own_tables(schema)
        self._batches = found.batches
        self._streams = found.streams
        self._limits = Limits(max_frame_bytes, max_frame_events)
        self._statements = Statements(found, self._limits)
        self._producer_id = f"{quote(namespace)}-database"
        self._database = engine_or_url
        # The tables are where the relay reads them. The caller's connection may lead other tables to a tenant's schema.
        lent = engine_or_url if isinstance(engine_or_url, sa.Engine) and lends_its_pool(engine_or_url) else None
        own = lent.get_execution_options().get("schema_translate_map") if lent is not None else None
        self._options = {"schema_translate_map": own or {}}
        self._opened: sa.Engine | None = None
        self._opened_by = 0
        self._opening = threading.Lock()
        self._tidy_at = time.monotonic() + TIDY_EVERY
        self._acked = Tally()
        check(engine_or_url)

    @classmethod
    def from_settings(cls, settings: Settings) -> DatabaseOutbox:
        """An outbox on `database_url`; without one it can write (`stage`) but not relay."""
        return cls(
            settings.database_url,
            namespace=settings.namespace,
            max_frame_bytes=settings.max_frame_bytes,
            max_frame_events=settings.max_frame_events,
        )

    # Writing

    def reserve(self, turn: str, streams: Collection[str]) -> None:
        """The rows' own locks keep the order: what is staged is written before the commit."""

    def withdraw(self, turn: str, streams: Collection[str]) -> list[str]:
        """Nothing was reserved."""
        return []

    def stage(self, connection: sa.Connection, batches: Sequence[Batch]) -> None:
        """See `Outbox.stage`. A statement holds at most 4 MiB of events, too; a larger batch has one of its own."""
        self._insert(connection, [row_of(batch) for batch in batches])

    def staged(self, streams: Sequence[str]) -> list[str]:
        """All of *streams*: only the database knows which have a wake-up queued, and the waker joins many into one."""
        return list(streams)

    def put(self, batches: Sequence[Batch]) -> list[str]:
        """See `Outbox.put`: a transaction of its own. About five statements."""
        if not batches:
            return []
        for _ in range(3):
            try:
                return self._put(batches)
            except (exc.IntegrityError, exc.OperationalError) as error:
                # The same ids, put at the same moment by somebody else, who has won: now they can be seen. MariaDB may
                # find that the two wait for each other, before it comes to that.
                if isinstance(error, exc.OperationalError) and not _is_deadlock(error):
                    raise
        return self._put(batches)

    def _put(self, batches: Sequence[Batch]) -> list[str]:
        given = {put_id_of(batch): batch for batch in batches}
        column = self._batches.c.put_id
        with self._transaction() as connection:
            for ids in _chunks(list(given)):
                for known in connection.scalars(sa.select(column).where(column.in_(ids))):
                    del given[known]
            # A row without a stream outlives the delivery, so that a repeated put finds its id.
            marks = [
                {"stream": "", "created_at": 0, "events": 0, "size": 0, "about": b"", "payload": b"", "put_id": put_id}
                for put_id in given
            ]
            self._insert(connection, marks)
            self._insert(connection, [row_of(batch) for batch in given.values()])
            return self._woken_by_put(connection, list(dict.fromkeys(batch.stream for batch in given.values())))

    def _woken_by_put(self, connection: sa.Connection, streams: Sequence[str]) -> list[str]:
        # One order of locks for all, so that no two puts wait for each other in a circle.
        wanting: set[str] = set()
        for some in _chunks(sorted(streams)):
            self._make_states(connection, some)
            # All are locked before any is judged: one whose worker finishes just now will want a wake-up after all.
            state = self._streams.c
            locked = sa.select(state.stream, state.woken_at, state.parked, state.not_before, now_ms().label("now"))
            found = connection.execute(locked.where(state.stream.in_(some)).order_by(state.stream).with_for_update())
            unwoken = [
                row.stream for row in found if row.woken_at is None and row.parked is None and row.not_before <= row.now
            ]
            self._mark_woken(connection, unwoken)
            wanting.update(unwoken)
        return [stream for stream in streams if stream in wanting]

    def _mark_woken(self, connection: sa.Connection, streams: Sequence[str]) -> None:
        if streams:
            state = self._streams
            connection.execute(sa.update(state).where(state.c.stream.in_(streams)).values(woken_at=now_ms()))

    def _insert(self, connection: sa.Connection, rows: Sequence[dict[str, Any]]) -> None:
        for some in _statements(rows):
            if len(some) == 1:
                connection.execute(self._statements.insert_one, some[0], execution_options=self._options)
            elif connection.dialect.name == "postgresql":
                # Arrays: a tenth of the work of a thousand VALUES for the driver, and one text for any number of rows.
                names = tuple(some[0])
                connection.execute(
                    self._insert_arrays(names),
                    {f"{name}_array": [row[name] for row in some] for name in names},
                    execution_options=self._options,
                )
            elif connection.dialect.insert_executemany_returning:
                # With RETURNING SQLAlchemy sends all rows in one statement, from a cached text.
                connection.execute(
                    sa.insert(self._batches).returning(self._batches.c.id),
                    some,
                    execution_options={**self._options, "insertmanyvalues_page_size": ROWS_A_STATEMENT},
                )
            else:
                connection.execute(sa.insert(self._batches).values(some), execution_options=self._options)

    def _insert_arrays(self, names: tuple[str, ...]) -> sa.Insert:
        rows = self._batches.c
        types = [postgresql.ARRAY(_plain(rows[name].type)) for name in names]
        arrays = [sa.cast(sa.bindparam(f"{name}_array"), kind) for name, kind in zip(names, types, strict=True)]
        columns = [sa.column(name, rows[name].type) for name in names]
        given = sa.func.unnest(*arrays).table_valued(*columns, with_ordinality="number", name="given")
        given = given.render_derived()
        ordered = sa.select(*(given.c[name] for name in names), sa.literal(0), now_ms()).order_by(given.c.number)
        return sa.insert(self._batches).from_select([*names, "frame", "put_at"], ordered, include_defaults=False)

    # Relaying

    def claim(self, stream: str, *, lease_for: float, lease: str | None = None) -> Frame | None:
        """See `Outbox.claim`. One transaction of three or four statements."""
        with self._transaction() as connection:
            state = self._locked(connection, stream)
            return None if state is None else self._claim(connection, state, lease_for, lease)

    def _locked(self, connection: sa.Connection, stream: str) -> StreamState | None:
        """The state of *stream*, locked, and made first if there is none but batches; None when there are none."""
        state = self._lock(connection, stream)
        if state is not None or not self._has_rows(connection, stream):
            return state
        self._make_states(connection, [stream])
        state = self._lock(connection, stream)
        if state is not None and state.frame == 0:
            # Under the lock, and not when somebody else has made the state and frozen a frame meanwhile.
            self._free(connection, stream)
        return state

    def _claim(
        self, connection: sa.Connection, state: StreamState, lease_for: float, lease: str | None
    ) -> Frame | None:
        if not state.is_free(lease):
            return None
        begun, count = state.count > 0, state.count
        rows = self._frozen_rows(connection, state) if begun else self._free_rows(connection, state)
        if sum(len(row.lengths) for row in rows) - state.skip < count:
            state, rows = self._begin_anew(connection, state)
            begun = False
        if not rows:
            return None
        given = lease if lease is not None and state.lease == lease else new_lease()
        held = {"lease": given, "leased_until": state.now + _milliseconds(lease_for), "woken_at": state.now}
        if begun:
            self._change(connection, state.stream, held)
        else:
            count = self._freeze(connection, state, rows, held)
        return self._frame(connection, state, rows, count, begun=begun, lease=given)

    def anchor(self, frame: Frame, offset: str) -> Frame:
        """See `Outbox.anchor`. One statement; a few when another worker was at the stream."""
        with self._transaction() as connection:
            found = {**_frozen(frame), "known": frame.anchor, "offset": offset}
            if connection.execute(self._statements.anchor, found).rowcount == 1:
                return replace(frame, anchor=offset)
            state = self._lock(connection, frame.stream)
            if state is None or not state.is_current(frame) or state.anchor != frame.anchor:
                return self._current(connection, frame, state)
            self._change(connection, frame.stream, {"anchor": offset})
            return replace(self._current(connection, frame, state, begun=frame.begun), anchor=offset)

    def ack(self, frame: Frame, *, offset: str | None, events: int | None = None) -> bool:
        """See `Outbox.ack`. One statement on PostgreSQL, elsewhere four; a few more when only part is acked."""
        with self._transaction() as connection:
            acked = self._ack(connection, frame, offset, events)
        if acked is not None:
            self._acked.add(acked[0])
        return acked is not None

    def advance(self, frame: Frame, *, offset: str | None, lease_for: float) -> Advanced:
        """See `Outbox.advance`. One transaction of three statements on PostgreSQL, elsewhere of six."""
        with self._transaction() as connection:
            acked = self._ack(connection, frame, offset, None)
            state = acked[1] if acked else self._locked(connection, frame.stream)
            following = None if state is None else self._claim(connection, state, lease_for, frame.lease)
            if following is None and state is not None and not state.is_leased(frame.lease):
                # Whoever puts a batch after this look waits for the lock, and then sees that a wake-up is wanted.
                self._change(connection, frame.stream, {"lease": None, "woken_at": None})
        if acked is not None:
            self._acked.add(acked[0])
        return Advanced(acked is not None, following)

    def _ack(
        self, connection: sa.Connection, frame: Frame, offset: str | None, events: int | None
    ) -> tuple[int, StreamState] | None:
        """The number of events acked, and the state after it, locked; None when *frame* was not current."""
        if connection.dialect.name == "postgresql" and events is None:
            found = connection.execute(self._statements.ack_on_postgresql, {**_frozen(frame), "offset": offset})
            if (acked_row := found.one_or_none()) is not None:
                return len(frame.events), StreamState(*acked_row)
        state = self._lock(connection, frame.stream)
        if state is None or not state.is_current(frame):
            return None
        acked = min(state.count, len(frame.events) if events is None else events)
        rest_id, rest = state.rest_id, state.rest
        if acked < state.count:
            rest_id, rest = self._cut(connection, state, acked)
        rows = self._batches.c
        taken = sa.select(rows.id).where(rows.stream == frame.stream, rows.frame == state.frame)
        self._delete(connection, [row_id for row_id in connection.scalars(taken) if row_id != rest_id])
        changes: dict[str, Any] = {"seq": state.seq + 1, "count": 0, "head_id": rest_id, "skip": rest, "parked": None}
        changes |= {"rest_id": None, "rest": 0} | ({} if offset is None else {"anchor": offset})
        self._change(connection, frame.stream, changes)
        return acked, replace(state, **changes)

    def renew(self, frame: Frame, *, above: int) -> Frame:
        """See `Outbox.renew`. Two to three statements."""
        with self._transaction() as connection:
            state = self._lock(connection, frame.stream)
            if state is None or not state.is_current(frame):
                return self._current(connection, frame, state)
            epoch = max(state.now, above + 1, state.epoch + 1)
            self._change(connection, frame.stream, {"epoch": epoch, "seq": 0})
            renewed = self._current(connection, frame, state, begun=frame.begun)
            return replace(renewed, id=FrameId(self._producer_id, epoch, 0))

    def shrink(self, frame: Frame, *, events: int) -> Frame:
        """See `Outbox.shrink`. A few statements."""
        with self._transaction() as connection:
            state = self._lock(connection, frame.stream)
            if state is None or not state.is_current(frame):
                return self._current(connection, frame, state)
            count = max(1, min(events, state.count))
            if count < state.count:
                rest_id, rest = self._cut(connection, state, count)
                changes: dict[str, Any] = {"count": count, "rest_id": rest_id, "rest": rest}
                self._change(connection, frame.stream, changes)
                state = replace(state, **changes)
            return self._current(connection, frame, state, begun=frame.begun)

    def release(self, frame: Frame, *, delay: float) -> None:
        """See `Outbox.release`. One statement."""
        state = self._streams
        with self._transaction() as connection:
            connection.execute(
                sa.update(state)
                .where(state.c.stream == frame.stream, state.c.lease == frame.lease)
                .values(
                    lease=None,
                    woken_at=None,
                    not_before=now_ms() + _milliseconds(delay) if delay > 0 else sa.literal(0),
                )
            )

    def finish(self, stream: str, *, lease: str | None) -> bool:
        """See `Outbox.finish`. Three statements."""
        with self._transaction() as connection:
            state = self._lock(connection, stream)
            if state is None:
                # Nobody made a state for it yet, so nobody delivers it; a batch may have come all the same.
                return self._has_rows(connection, stream)
            if state.is_leased(lease):
                return False
            again = state.is_free(lease) and self._has_rows(connection, stream)
            self._change(connection, stream, {"lease": None} if again else {"lease": None, "woken_at": None})
            return again

    def park(self, frame: Frame, error: str) -> None:
        """See `Outbox.park`. One statement."""
        state = self._streams
        with self._transaction() as connection:
            connection.execute(
                sa.update(state)
                .where(state.c.stream == frame.stream, state.c.count > 0)
                .where(state.c.epoch == frame.id.epoch, state.c.seq == frame.id.seq)
                .values(parked=error[:LONGEST_ERROR], lease=None, woken_at=None)
            )

    def retry(self, stream: str) -> bool:
        """See `Outbox.retry`. Three statements."""
        with self._transaction() as connection:
            state = self._lock(connection, stream)
            if state is not None:
                self._change(connection, stream, {"parked": None, "not_before": 0})
            return (state is not None and state.parked is not None) or self._has_rows(connection, stream)

    def drop(self, stream: str) -> int:
        """See `Outbox.drop`. Batches whose transactions are still open are not dropped. A few statements for each
        thousand batches, in one transaction."""
        rows = self._batches.c
        lost = 0
        with self._transaction() as connection:
            state = self._lock(connection, stream)
            # By rows that were seen, not by stream: what commits in between was neither counted nor meant.
            while found := connection.execute(
                sa.select(rows.id, rows.events).where(rows.stream == stream).limit(ROWS_A_STATEMENT)
            ).all():
                lost += sum(row.events for row in found)
                self._delete(connection, [row.id for row in found])
            if state is not None:
                lost -= state.skip
                changes: dict[str, Any] = {"epoch": max(state.now, state.epoch + 1), "seq": 0}
                changes |= dict.fromkeys(("count", "skip", "rest", "not_before"), 0)
                changes |= dict.fromkeys(("head_id", "rest_id", "anchor", "lease", "parked", "woken_at"))
                self._change(connection, stream, changes)
            return lost

    # Status

    def due(self, *, older_than: float = 1.0, limit: int = 1_000) -> list[str]:
        """See `Outbox.due`. Steps from stream to stream in the index, however many batches wait. Four statements, and
        one more after a second in which this process acked something."""
        with self._transaction() as connection:
            self._count_acked(connection)
            now: int = connection.execute(sa.select(now_ms())).scalar_one()
            old = now - _milliseconds(older_than)
            waiting = self._first_put()
            state = self._streams.c
            free = sa.and_(
                state.parked.is_(None),
                state.not_before <= now,
                sa.or_(state.lease.is_(None), state.leased_until <= now),
                sa.or_(state.woken_at.is_(None), state.woken_at <= old),
            )
            candidates = (
                sa.select(waiting.c.stream, state.stream.label("known"))
                .select_from(waiting.outerjoin(self._streams, state.stream == waiting.c.stream))
                .where(waiting.c.put_at <= old, sa.or_(state.stream.is_(None), free))
                # Those never woken go first, so that no stream waits for ever behind others that are woken in vain.
                .order_by(sa.func.coalesce(state.woken_at, 0), waiting.c.put_at)
                .limit(limit)
            )
            found = connection.execute(candidates).all()
            due: set[str] = set()
            self._make_states(connection, sorted(row.stream for row in found if row.known is None))
            for some in _chunks(sorted(row.stream for row in found)):
                # Another sweeper at the same rows is served as well by them as we are.
                ours = sa.select(state.stream).where(state.stream.in_(some), free).with_for_update(skip_locked=True)
                mine = list(connection.scalars(ours))
                self._mark_woken(connection, mine)
                due.update(mine)
        self._tidy()
        return [row.stream for row in found if row.stream in due]

    def _count_acked(self, connection: sa.Connection) -> None:
        frames, events = self._acked.take()
        if frames:
            # A row of its own, so that no two processes wait for each other. It goes with the ids of `put`.
            row = {"stream": "", "frame": ACKED, "created_at": 0, "events": events, "size": frames}
            self._insert(connection, [row | {"about": b"", "payload": b""}])

    def _first_put(self) -> sa.Subquery:
        """Each stream that has rows, and the `put_at` of its first free row, or of its first one when none is free."""
        rows = self._batches.c
        names = sa.select(sa.func.min(rows.stream).label("stream")).where(rows.stream > "").cte("names", recursive=True)
        following = sa.select(sa.func.min(rows.stream)).where(rows.stream > names.c.stream).scalar_subquery()
        names = names.union_all(sa.select(following).where(names.c.stream.is_not(None)))
        first = (
            sa.select(rows.put_at)
            .where(rows.stream == names.c.stream)
            .order_by(rows.frame, rows.id)
            .limit(1)
            .scalar_subquery()
        )
        return sa.select(names.c.stream, first.label("put_at")).where(names.c.stream.is_not(None)).subquery("waiting")

    def pending(self, stream: str | None = None) -> list[PendingStream]:
        """See `Outbox.pending`. One statement, which reads every batch's row but not its events."""
        rows, state = self._batches.c, self._streams.c
        counts = sa.select(
            rows.stream,
            sa.func.count().label("batches"),
            sa.cast(sa.func.sum(rows.events), sa.BigInteger).label("events"),
            sa.func.min(rows.created_at).label("oldest_at"),
        ).group_by(rows.stream)
        counted = counts.where(rows.stream > "" if stream is None else rows.stream == stream).subquery()
        statement = (
            sa.select(counted, state.skip, state.parked)
            .select_from(counted.outerjoin(self._streams, state.stream == counted.c.stream))
            .order_by(counted.c.oldest_at)
        )
        with self._transaction() as connection:
            return [
                PendingStream(row.stream, row.batches, int(row.events) - (row.skip or 0), row.oldest_at, row.parked)
                for row in connection.execute(statement)
            ]

    def rate(self) -> Rate:
        """See `Outbox.rate`. One statement."""
        rows = self._batches.c
        age = now_ms() - rows.put_at
        sums = sa.select(sa.func.sum(rows.size), sa.func.sum(rows.events)).where(
            rows.stream == "", rows.frame == ACKED, age.between(0, SECONDS * 1000)
        )
        with self._transaction() as connection:
            frames, events = connection.execute(sums).one()
        return rate_of(int(frames or 0), int(events or 0))

    def close(self) -> None:
        """Close the connections of the relay's own engine; the pool of an engine that was given stays as it is."""
        with self._opening:
            opened, self._opened = self._opened, None
        if opened is not None and not lends_its_pool(self._database):
            opened.dispose()

    # Rows of a stream

    def _free_rows(self, connection: sa.Connection, state: StreamState) -> list[Stored]:
        """Rows for a new frame: the one that was begun, then free ones by id, up to the first that is too much."""
        head: Iterable[Any] = ()
        if state.head_id is not None:
            head = connection.execute(self._statements.row, {"of_id": state.head_id})
        return stored([*head, *connection.execute(self._statements.free_rows, {"of_stream": state.stream})])

    def _frozen_rows(self, connection: sa.Connection, state: StreamState) -> list[Stored]:
        """Rows of the frozen frame, in its order."""
        found = connection.execute(
            self._statements.frozen_rows, {"of_stream": state.stream, "of_frame": state.frame}
        ).all()
        # What was begun goes first, also before a lower id that was committed later.
        return sorted(stored(found), key=lambda row: row.id != state.head_id)

    def _freeze(
        self, connection: sa.Connection, state: StreamState, rows: list[Stored], changes: dict[str, Any]
    ) -> int:
        """Mark the rows that fit a frame, drop the others from *rows*, and say so, with *changes*, in the state.

        Returns:
            How many events the frame has.
        """
        count = events_that_fit((row.lengths for row in rows), state.skip, self._limits)
        taken, rest_id, rest = split([(row.id, len(row.lengths)) for row in rows], state.skip, count)
        del rows[len(taken) :]
        frame = state.frame + 1
        changes = {**changes, "frame": frame, "count": count, "rest_id": rest_id, "rest": rest}
        if connection.dialect.name == "postgresql":
            marks = {"ids": taken, "new_frame": frame, "of_stream": state.stream}
            connection.execute(self._statements.freeze_on_postgresql, changes | marks)
        else:
            self._mark(connection, taken, frame)
            self._change(connection, state.stream, changes)
        return count

    def _mark(self, connection: sa.Connection, ids: Sequence[int], frame: int) -> None:
        for some in _chunks(ids):
            if connection.dialect.name in MYSQL:
                statement = sa.text(f"UPDATE {self._by_key(connection)} SET o.frame = :frame")  # noqa: S608 - no input
                connection.execute(statement, {"ids": _json(some), "frame": frame})
            else:
                among, given = self._among(connection, some)
                connection.execute(sa.update(self._batches).where(among).values(frame=frame), given)

    def _delete(self, connection: sa.Connection, ids: Sequence[int]) -> None:
        for some in _chunks(ids):
            if connection.dialect.name in MYSQL:
                statement = sa.text(f"DELETE o FROM {self._by_key(connection)}")
                connection.execute(statement, {"ids": _json(some)})
            else:
                among, given = self._among(connection, some)
                connection.execute(sa.delete(self._batches).where(among), given)

    def _among(
        self, connection: sa.Connection, ids: Sequence[int]
    ) -> tuple[sa.ColumnElement[bool], dict[str, Sequence[int]]]:
        column = self._batches.c.id
        if connection.dialect.name == "postgresql":
            return ids_on_postgresql(column), {"ids": ids}
        return column.in_(ids), {}

    def _by_key(self, connection: sa.Connection) -> str:
        # InnoDB locks every row that it reads on the way to those it changes, and waits for the uncommitted ones. For
        # id IN (...) it may read the whole table, so that the relay would wait for writers; a join goes by the key.
        table = connection.dialect.identifier_preparer.format_table(self._batches)
        ids = "JSON_TABLE(:ids, '$[*]' COLUMNS (id BIGINT PATH '$')) AS given"
        return f"{ids} STRAIGHT_JOIN {table} AS o FORCE INDEX (PRIMARY) ON o.id = given.id"

    def _free(self, connection: sa.Connection, stream: str) -> None:
        """Rows marked by a state that is gone."""
        rows = self._batches.c
        marked = sa.select(rows.id).where(rows.stream == stream, rows.frame != 0)
        self._mark(connection, list(connection.scalars(marked)), 0)

    def _begin_anew(self, connection: sa.Connection, state: StreamState) -> tuple[StreamState, list[Stored]]:
        """Somebody deleted rows that were being sent. What is left goes out under a new epoch."""
        changes: dict[str, Any] = {"epoch": max(state.now, state.epoch + 1), "seq": 0}
        changes |= dict.fromkeys(("count", "skip", "rest"), 0) | dict.fromkeys(("head_id", "rest_id"))
        self._free(connection, state.stream)
        self._change(connection, state.stream, changes)
        anew = replace(state, **changes)
        return anew, self._free_rows(connection, anew)

    def _cut(self, connection: sa.Connection, state: StreamState, count: int) -> tuple[int | None, int]:
        """Free the rows of the frozen frame behind its first *count* events; its new `rest_id` and `rest`."""
        rows = self._batches.c
        found = connection.execute(
            sa.select(rows.id, rows.events)
            .where(rows.stream == state.stream, rows.frame == state.frame)
            .order_by(rows.id)
        ).all()
        ordered = [(row.id, row.events) for row in sorted(found, key=lambda row: row.id != state.head_id)]
        taken, rest_id, rest = split(ordered, state.skip, count)
        self._mark(connection, [row_id for row_id, _ in ordered[len(taken) :]], 0)
        return rest_id, rest

    def _frame(
        self,
        connection: sa.Connection,
        state: StreamState,
        rows: Iterable[Stored],
        count: int,
        *,
        begun: bool,
        lease: str,
    ) -> Frame:
        events: list[bytes] = []
        marks: list[BatchMark] = []
        skip = state.skip
        for row in rows:
            wanted = row.lengths[skip : skip + count - len(events)]
            at = sum(row.lengths[:skip])
            payload = row.payload
            if payload is None:
                payload, at = self._slice(connection, row.id, at, sum(wanted)), 0
            for length in wanted:
                events.append(payload[at : at + length])
                at += length
            marks.append(BatchMark(row.about.id, row.about.txid, len(wanted), row.created_at, row.about.trace))
            skip = 0
        frame_id = FrameId(self._producer_id, state.epoch, state.seq)
        return Frame(state.stream, frame_id, tuple(events), tuple(marks), state.anchor, begun, lease)

    def _slice(self, connection: sa.Connection, row_id: int, at: int, length: int) -> bytes:
        rows = self._batches.c
        part = sa.func.substr(rows.payload, at + 1, length, type_=sa.LargeBinary)
        return bytes(connection.scalar(sa.select(part).where(rows.id == row_id)) or b"")

    def _current(
        self, connection: sa.Connection, frame: Frame, state: StreamState | None, *, begun: bool = True
    ) -> Frame:
        """What is frozen now, under the lease of *frame*; *frame* itself, begun, when nothing is."""
        if state is None or not state.count:
            return replace(frame, begun=True)
        rows = self._frozen_rows(connection, state)
        return self._frame(connection, state, rows, state.count, begun=begun, lease=frame.lease)

    # A stream's own row

    def _lock(self, connection: sa.Connection, stream: str) -> StreamState | None:
        """The stream's state and the time, locked until the end of the transaction; None when there is no state."""
        row = connection.execute(self._statements.lock, {"of_stream": stream}).one_or_none()
        return None if row is None else StreamState(*row)

    def _change(self, connection: sa.Connection, stream: str, changes: dict[str, Any]) -> None:
        connection.execute(self._statements.change, {**changes, "of_stream": stream})

    def _make_states(self, connection: sa.Connection, streams: Sequence[str]) -> None:
        """Begin a state for those of *streams* that have none; whoever else does the same at this moment may win."""
        for some in _chunks(streams):
            rows = [{"stream": stream, "epoch": now_ms()} for stream in some]
            connection.execute(_insert_unless_there(connection.dialect.name, self._streams).values(rows))

    def _has_rows(self, connection: sa.Connection, stream: str) -> bool:
        return connection.execute(self._statements.any_row, {"of_stream": stream}).first() is not None

    def _tidy(self) -> None:
        """Remove ids and states that are kept no longer, now and then."""
        if time.monotonic() < self._tidy_at:
            return
        self._tidy_at = time.monotonic() + TIDY_EVERY
        rows, state = self._batches.c, self._streams.c
        old_ids = sa.select(rows.id).where(rows.stream == "", rows.put_at < now_ms() - IDS_KEPT_FOR)
        waiting = sa.exists().where(rows.stream == state.stream)
        unused = sa.and_(state.leased_until < now_ms() - STATE_KEPT_FOR, state.parked.is_(None), ~waiting)
        while True:
            with self._transaction() as connection:
                ids = list(connection.scalars(old_ids.limit(ROWS_A_STATEMENT)))
                self._delete(connection, ids)
                streams = list(connection.scalars(sa.select(state.stream).where(unused).limit(ROWS_A_STATEMENT)))
                if streams:
                    # Asked again: since then one of them may have been claimed.
                    connection.execute(sa.delete(self._streams).where(state.stream.in_(streams), unused))
            if max(len(ids), len(streams)) < ROWS_A_STATEMENT:
                return

    # Connections

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        with self._engine().begin() as connection:
            yield connection

    def _engine(self) -> sa.Engine:
        with self._opening:
            if self._opened is not None and self._opened_by != os.getpid():
                # The parent goes on using its connections.
                self._opened.dispose(close=False)
                self._opened = None
            if self._opened is None:
                self._opened, self._opened_by = open_engine(self._database), os.getpid()
            return self._opened


def _own_tables(schema: str | None) -> OutboxTables:
    return tables(sa.MetaData(), schema=schema)


def _insert_unless_there(dialect: str, table: sa.Table) -> Any:
    if dialect == "postgresql":
        return postgresql.insert(table).on_conflict_do_nothing()
    if dialect == "sqlite":
        return sqlite.insert(table).on_conflict_do_nothing()
    # IGNORE would hide other mistakes, too.
    return mysql.insert(table).on_duplicate_key_update(stream=table.c.stream)


def _json(ids: Sequence[int]) -> str:
    return msgspec.json.encode(ids).decode()


def _is_deadlock(error: exc.DBAPIError) -> bool:
    """MariaDB's and MySQL's ER_LOCK_DEADLOCK; PostgreSQL's deadlock_detected."""
    original = error.orig
    return original is not None and (original.args[:1] == (1213,) or getattr(original, "sqlstate", None) == "40P01")


def _plain(column_type: sa.types.TypeEngine[Any]) -> sa.types.TypeEngine[Any]:
    return sa.String() if isinstance(column_type, ExactText) else column_type


def _frozen(frame: Frame) -> dict[str, Any]:
    """*frame* as the parameters of a statement that asks whether it is frozen, all of it."""
    of = {"of_stream": frame.stream, "of_count": len(frame.events)}
    return {**of, "of_epoch": frame.id.epoch, "of_seq": frame.id.seq}


def _chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), ROWS_A_STATEMENT):
        yield items[start : start + ROWS_A_STATEMENT]


def _statements(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """*rows* in portions for one INSERT each."""
    some: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        if some and (len(some) == ROWS_A_STATEMENT or size + row["size"] > BYTES_A_STATEMENT):
            yield some
            some, size = [], 0
        some.append(row)
        size += row["size"]
    if some:
        yield some


def _milliseconds(seconds: float) -> int:
    return max(0, round(seconds * 1000))
