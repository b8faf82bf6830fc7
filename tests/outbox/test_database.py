"""What only the database store promises: the caller's transaction, late commits, and who never waits for whom."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import create_async_engine

from broadcastable.errors import ConfigurationError
from broadcastable.events import Batch
from broadcastable.outbox import database, engines
from broadcastable.outbox.database import DatabaseOutbox, sync_url, tables
from broadcastable.settings import Settings
from tests.conftest import BACKENDS
from tests.outbox.conftest import create_tables
from tests.outbox.workers import LONG, SHORT, batch, claim, claim_when_free, deliver, events_of
from tests.services import open_engine, wait_until

LIMITS: dict[str, Any] = {"namespace": "test", "max_frame_bytes": 1 << 20, "max_frame_events": 1_000}
OpenOutbox = Callable[..., DatabaseOutbox]
SERVERS = [backend for backend in BACKENDS if backend != "sqlite"]


@pytest.fixture
def url(database_url: str) -> str:
    create_tables(database_url)
    return database_url


@pytest.fixture
def app(url: str) -> Iterator[sa.Engine]:
    """The application's own engine."""
    engine = open_engine(url)
    yield engine
    engine.dispose()


@pytest.fixture
def open_outbox(url: str) -> Iterator[OpenOutbox]:
    opened: list[DatabaseOutbox] = []

    def open_it(**changes: Any) -> DatabaseOutbox:
        opened.append(DatabaseOutbox(url, **{**LIMITS, **changes}))
        return opened[-1]

    yield open_it
    for outbox in opened:
        outbox.close()


@pytest.fixture
def outbox(open_outbox: OpenOutbox) -> DatabaseOutbox:
    return open_outbox()


def on_servers(test: Callable[..., None]) -> Callable[..., None]:
    """For promises about two open transactions, of which SQLite allows one at a time."""
    return pytest.mark.parametrize("database_url", SERVERS, indirect=True)(test)


@pytest.fixture
def statements(app: sa.Engine) -> Iterator[list[str]]:
    """Statements of the application's engine."""
    seen: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        seen.append(statement)

    event.listen(app, "before_cursor_execute", note)
    yield seen
    event.remove(app, "before_cursor_execute", note)


# Staging


def test_staged_batches_appear_with_the_commit(app: sa.Engine, outbox: DatabaseOutbox) -> None:
    batches = [batch("s"), batch("s", "1", "2")]
    with app.connect() as connection:
        outbox.stage(connection, batches)
        if app.dialect.name != "sqlite":
            assert outbox.claim("s", lease_for=LONG) is None
        connection.commit()
    assert outbox.staged(["s", "t"]) == ["s", "t"]
    assert deliver(outbox, "s") == list(events_of(*batches))


def test_a_rollback_leaves_nothing(app: sa.Engine, outbox: DatabaseOutbox) -> None:
    with app.connect() as connection:
        outbox.stage(connection, [batch("s") for _ in range(5)])
        connection.rollback()
    with app.connect() as connection:
        outbox.stage(connection, [batch("t")])
        with connection.begin_nested() as savepoint:
            outbox.stage(connection, [batch("s")])
            savepoint.rollback()
        connection.commit()
    assert [each.stream for each in outbox.pending()] == ["t"]


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
@pytest.mark.parametrize("batches", [1, 3])
def test_a_connection_that_leads_to_a_tenants_schema_leads_the_outbox_nowhere(
    app: sa.Engine, open_outbox: OpenOutbox, batches: int
) -> None:
    """The relay reads one schema: that of its own engine."""
    with app.begin() as connection:
        connection.execute(sa.schema.CreateSchema("elsewhere"))
    outbox, leading = open_outbox(), {"schema_translate_map": {None: "elsewhere"}}
    for options in ({}, leading, {}):  # one after the other: all have the engine's one cache of statements
        with app.connect().execution_options(**options) as connection:
            outbox.stage(connection, [batch("s") for _ in range(batches)])
            connection.commit()
    assert [each.batches for each in outbox.pending()] == [3 * batches]

    metadata = sa.MetaData()
    tables(metadata)
    tenant = open_engine(app.url, execution_options=leading)
    metadata.create_all(tenant)
    of_tenant = DatabaseOutbox(tenant, **LIMITS)
    for engine in (app, tenant):
        with engine.begin() as connection:
            of_tenant.stage(connection, [batch("t") for _ in range(batches)])
    assert [(each.stream, each.batches) for each in of_tenant.pending()] == [("t", 2 * batches)]
    assert len(deliver(of_tenant, "t")) == 2 * batches
    tenant.dispose()


@pytest.mark.parametrize(("batches", "expected"), [(0, 0), (1, 1), (2, 1), (1_000, 1), (1_001, 2), (2_500, 3)])
def test_staging_is_one_statement_for_each_thousand_batches(
    app: sa.Engine, outbox: DatabaseOutbox, statements: list[str], batches: int, expected: int
) -> None:
    with app.begin() as connection:
        statements.clear()
        outbox.stage(connection, [batch(f"s/{number % 7}") for number in range(batches)])
        assert len(statements) == expected
        assert all(statement.startswith("INSERT INTO broadcastable_outbox") for statement in statements)
    assert sum(each.batches for each in outbox.pending()) == batches


def test_batches_of_one_call_keep_their_order(app: sa.Engine, outbox: DatabaseOutbox) -> None:
    batches = [batch("s") for _ in range(2_300)]
    with app.begin() as connection:
        outbox.stage(connection, batches)
    assert deliver(outbox, "s") == list(events_of(*batches))


def test_a_statement_never_grows_without_bound(app: sa.Engine, outbox: DatabaseOutbox, statements: list[str]) -> None:
    large = [batch("s", b'"' + b"x" * (1 << 20) + b'"') for _ in range(9)]
    with app.begin() as connection:
        statements.clear()
        outbox.stage(connection, large)
        assert len(statements) == 3
    assert deliver(outbox, "s") == list(events_of(*large))


@on_servers
def test_writers_of_one_stream_do_not_wait_for_each_other_nor_for_a_relay(
    app: sa.Engine, outbox: DatabaseOutbox
) -> None:
    outbox.put([batch("s")])
    with app.connect() as one, app.connect() as other, outbox._transaction() as relay:
        outbox._lock(relay, "s")
        for connection in (one, other):
            refuse_to_wait(connection)
            outbox.stage(connection, [batch("s") for _ in range(3)])
        other.commit()
        outbox.stage(one, [batch("s")])
        one.commit()
    assert len(deliver(outbox, "s")) == 8


@on_servers
@pytest.mark.parametrize("count", [1, 2, 3, 10, 100])
def test_a_relay_does_not_wait_for_writers(app: sa.Engine, outbox: DatabaseOutbox, count: int) -> None:
    """Whatever share of the table a frame is, and on every path that touches rows."""
    refuse_to_wait_for_locks(outbox)
    with app.connect() as open_before, app.connect() as open_after:
        outbox.stage(open_before, [batch(stream) for stream in "ast"])
        with app.begin() as connection:
            outbox.stage(connection, [batch("s", "1", "2") for _ in range(count)])
        outbox.stage(open_after, [batch(stream) for stream in "ast"])
        frame = outbox.anchor(claim(outbox, "s", lease_for=0), "0")
        frame = outbox.shrink(outbox.renew(frame, above=1), events=2 * count - 1)
        assert outbox.ack(frame, offset="1", events=1)
        frame = claim(outbox, "s")
        outbox.park(frame, "no")
        outbox.retry("s")
        frame = claim(outbox, "s")
        assert len(frame.events) == 2 * count - 1
        outbox.due(older_than=0)
        outbox.put([batch("s")])
        assert outbox.ack(frame, offset="2")
        assert outbox.drop("s") == 1
        assert not outbox.finish("s", lease=frame.lease)
        outbox.put([batch("s")])
        frame = outbox.anchor(claim(outbox, "s"), "3")
        assert outbox.advance(frame, offset="4", lease_for=LONG).following is None
        open_before.commit()
        open_after.commit()
    assert len(deliver(outbox, "s")) == 2


def refuse_to_wait_for_locks(outbox: DatabaseOutbox) -> None:
    engine = outbox._engine()
    wish = "SET lock_timeout = '1s'" if engine.dialect.name == "postgresql" else "SET innodb_lock_wait_timeout = 1"

    @event.listens_for(engine, "begin")
    def refuse(connection: sa.Connection) -> None:
        connection.exec_driver_sql(wish)


def refuse_to_wait(connection: sa.Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET LOCAL lock_timeout = '1s'")
    else:
        connection.exec_driver_sql("SET innodb_lock_wait_timeout = 1")


# Late commits


@on_servers
def test_a_late_commit_with_a_lower_id_is_neither_skipped_nor_lost(app: sa.Engine, outbox: DatabaseOutbox) -> None:
    slow, quick = batch("s", '"slow"'), batch("s", '"quick"')
    with app.connect() as slow_one:
        outbox.stage(slow_one, [slow])
        with app.begin() as quick_one:
            outbox.stage(quick_one, [quick])
        frame = claim(outbox, "s", lease_for=SHORT)
        assert frame.events == quick.events
        slow_one.commit()
    again = claim_when_free(outbox, "s")
    assert (again.id, again.events) == (frame.id, frame.events), "the late one must not enter a frozen frame"
    assert outbox.ack(again, offset="1")
    assert outbox.finish("s", lease=again.lease)
    assert deliver(outbox, "s") == list(slow.events)


@on_servers
def test_a_late_commit_does_not_enter_the_middle_of_a_batch(app: sa.Engine, open_outbox: OpenOutbox) -> None:
    outbox = open_outbox(max_frame_events=4)
    with app.connect() as slow_one:
        outbox.stage(slow_one, [batch("s", '"late"')])
        outbox.put([batch("s", *"12345")])
        frame = claim(outbox, "s")
        assert frame.events == (b"1", b"2", b"3", b"4")
        slow_one.commit()
    outbox.ack(frame, offset="1")
    frame = claim(outbox, "s", lease=frame.lease, lease_for=SHORT)
    assert frame.events == (b"5", b'"late"')
    assert claim_when_free(outbox, "s", lease_for=0).events == frame.events, "frozen in that order, not by id"
    outbox.ack(outbox.shrink(frame, events=1), offset="2")
    assert deliver(outbox, "s") == [b'"late"']


@on_servers
def test_writers_of_one_row_are_delivered_in_the_order_of_its_lock(app: sa.Engine, outbox: DatabaseOutbox) -> None:
    """8 writers count one row up and stage what they wrote; a relay delivers beside them."""
    metadata = sa.MetaData()
    counter = sa.Table("counter", metadata, sa.Column("id", sa.Integer, primary_key=True), sa.Column("n", sa.Integer))
    metadata.create_all(app)
    with app.begin() as connection:
        connection.execute(counter.insert(), {"id": 1, "n": 0})

    def write() -> None:
        for _ in range(25):
            with app.begin() as connection:
                connection.execute(counter.update().values(n=counter.c.n + 1))
                n = connection.scalar(sa.select(counter.c.n))
                outbox.stage(connection, [batch("s", str(n))])

    writers = [threading.Thread(target=write) for _ in range(4)]
    for thread in writers:
        thread.start()
    delivered: list[bytes] = []
    wait_until(lambda: delivered.extend(deliver(outbox, "s")) or len(delivered) >= 100, within=60, what="all events")
    for thread in writers:
        thread.join()
    assert delivered == [str(n).encode() for n in range(1, 101)]


# The relay's side


@on_servers
def test_a_sweeper_does_not_wait_for_a_stream_that_another_holds(url: str, outbox: DatabaseOutbox) -> None:
    outbox.put([batch("held"), batch("free")])
    wait_until(lambda: len(outbox.due(older_than=SHORT)) == 2, what="both to be old enough")
    with outbox._transaction() as other:
        outbox._lock(other, "held")
        found: list[str] = []
        sweeper = threading.Thread(
            target=lambda: wait_until(lambda: found.extend(outbox.due(older_than=SHORT)) or found, what="a stream")
        )
        sweeper.start()
        sweeper.join(10)
        assert not sweeper.is_alive()
        assert set(found) == {"free"}


@on_servers
def test_the_relay_reads_what_is_committed_whatever_the_applications_isolation_level_is(url: str) -> None:
    """Under REPEATABLE READ a relay that waited for a lock would not see what its holder wrote."""
    app = sa.create_engine(url, isolation_level="REPEATABLE READ")
    outbox = DatabaseOutbox(app, **LIMITS)
    with outbox._transaction() as connection:
        assert connection.get_isolation_level() == "READ COMMITTED"
    with app.connect() as connection:
        assert connection.get_isolation_level() == "REPEATABLE READ"
        outbox.stage(connection, [batch("s")])
        connection.commit()
    assert len(deliver(outbox, "s")) == 1
    outbox.close()
    app.dispose()


def test_two_claims_that_both_make_the_streams_state_do_not_both_win(app: sa.Engine, outbox: DatabaseOutbox) -> None:
    for round_number in range(10):
        stream = f"s/{round_number}"
        with app.begin() as connection:
            staged = batch(stream)
            outbox.stage(connection, [staged])
        barrier = threading.Barrier(4)
        frames: list[Any] = []

        def work(stream: str = stream, barrier: threading.Barrier = barrier, frames: list[Any] = frames) -> None:
            barrier.wait()
            frames.append(outbox.claim(stream, lease_for=LONG))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(frame is not None for frame in frames) == [False, False, False, True]
        (frame,) = (frame for frame in frames if frame is not None)
        assert frame.events == staged.events
        # Those who came later must not take the winner's rows out of its frame.
        renewed = outbox.renew(frame, above=0)
        assert renewed.events == frame.events
        assert outbox.ack(renewed, offset="1")


def test_claims_that_find_no_state_do_not_free_what_another_froze_meanwhile(
    app: sa.Engine, outbox: DatabaseOutbox, open_outbox: OpenOutbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker makes the state and has delivered a part of the batch between this one's two looks."""
    other = open_outbox(max_frame_events=2)
    with app.begin() as connection:
        outbox.stage(connection, [batch("s", *"12345")])
    has_rows = outbox._has_rows

    def has_rows_and_is_slow(connection: sa.Connection, stream: str) -> bool:
        found = has_rows(connection, stream)
        connection.commit()  # nothing is locked yet, so this lets the other one in on SQLite as well
        frame = claim(other, stream)
        other.ack(frame, offset="1")
        other.release(frame, delay=0)
        return found

    monkeypatch.setattr(outbox, "_has_rows", has_rows_and_is_slow)
    with outbox._engine().connect() as connection, monkeypatch.context() as patch:
        patch.setattr(outbox, "_transaction", lambda: nullcontext(connection))
        frame = claim(outbox, "s")
        connection.commit()
    assert frame.events == (b"3", b"4", b"5")


def test_the_epoch_is_the_databases_time(outbox: DatabaseOutbox) -> None:
    outbox.put([batch("s")])
    assert abs(claim(outbox, "s").id.epoch / 1000 - time.time()) < 30


def test_a_lost_state_means_a_higher_epoch_and_no_lost_event(app: sa.Engine, outbox: DatabaseOutbox) -> None:
    outbox.put([batch("s"), batch("s")])
    before = claim(outbox, "s")
    time.sleep(0.002)  # the database's clock moves on; its epochs count milliseconds
    with app.begin() as connection:
        connection.execute(sa.delete(tables(sa.MetaData()).streams))
    after = claim(outbox, "s")
    assert after.id.epoch > before.id.epoch
    assert (after.id.seq, after.events, after.anchor) == (0, before.events, None)


def test_rows_that_somebody_deleted_do_not_stop_the_stream(app: sa.Engine, outbox: DatabaseOutbox) -> None:
    first, second = batch("s"), batch("s")
    outbox.put([first, second])
    frame = claim(outbox, "s", lease_for=SHORT)
    rows = tables(sa.MetaData()).batches
    with app.begin() as connection:
        lowest = connection.scalar(sa.select(sa.func.min(rows.c.id)).where(rows.c.stream == "s"))
        connection.execute(sa.delete(rows).where(rows.c.id == lowest))
    after = claim_when_free(outbox, "s")
    assert after.events == second.events
    assert after.id.epoch > frame.id.epoch
    assert not outbox.ack(frame, offset="1")
    assert outbox.ack(after, offset="1")


def test_acked_rows_are_removed(app: sa.Engine, outbox: DatabaseOutbox) -> None:
    with app.begin() as connection:
        outbox.stage(connection, [batch("s") for _ in range(1_200)])
    deliver(outbox, "s")
    with app.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(tables(sa.MetaData()).batches)) == 0


def test_a_batch_much_larger_than_a_frame_is_read_in_slices(app: sa.Engine, open_outbox: OpenOutbox) -> None:
    outbox = open_outbox(max_frame_bytes=10_000)
    large = batch("s", *(f'"{number:04}{"ü" * 50}"' for number in range(1_000)))
    after = batch("s")
    with app.begin() as connection:
        outbox.stage(connection, [large, after])
    frames = []
    lease = None
    while (frame := outbox.claim("s", lease_for=LONG, lease=lease)) is not None:
        frames.append(frame)
        lease = frame.lease
        outbox.ack(frame, offset=None)
    assert sum((frame.events for frame in frames), ()) == events_of(large, after)
    assert len(frames) > 10
    assert [sum(mark.events for mark in frame.batches) for frame in frames] == [len(frame.events) for frame in frames]


def test_a_reader_with_other_limits_than_the_writer_had_obeys_its_own(open_outbox: OpenOutbox) -> None:
    open_outbox().put([batch("s", *"1234567"), batch("s", *"89")])
    small = open_outbox(max_frame_events=3)
    sizes = []
    lease = None
    while (frame := small.claim("s", lease_for=LONG, lease=lease)) is not None:
        sizes.append([mark.events for mark in frame.batches])
        lease = frame.lease
        small.ack(frame, offset=None)
    assert sizes == [[3], [3], [1, 2]]


def test_what_is_kept_for_a_time_is_removed_after_it(
    url: str, app: sa.Engine, outbox: DatabaseOutbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tables(sa.MetaData())

    def rows() -> tuple[int | None, int | None]:
        with app.connect() as connection:
            return tuple(
                connection.scalar(sa.select(sa.func.count()).select_from(t)) for t in (found.batches, found.streams)
            )

    outbox.put([batch("s"), batch("waiting"), batch("parked")])
    outbox.park(claim(outbox, "parked"), "no")
    deliver(outbox, "s")
    monkeypatch.setattr(outbox, "_tidy_at", 0.0)
    outbox.due()
    assert rows() == (6, 3), "two batches, three ids and what was acked; all states"
    monkeypatch.setattr(database, "IDS_KEPT_FOR", -60_000)
    monkeypatch.setattr(database, "STATE_KEPT_FOR", -60_000)
    monkeypatch.setattr(outbox, "_tidy_at", 0.0)
    outbox.due()
    assert rows() == (2, 2), "what waits or is parked stays"


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_due_steps_through_the_index_and_reads_no_table(app: sa.Engine, outbox: DatabaseOutbox) -> None:
    with app.begin() as connection:
        outbox.stage(connection, [batch(f"s/{number % 5}") for number in range(3_000)])
    with app.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM ANALYZE broadcastable_outbox")
        waiting = outbox._first_put()
        query = sa.select(waiting).compile(app, compile_kwargs={"literal_binds": True})
        plan = "\n".join(connection.exec_driver_sql(f"EXPLAIN {query}".replace("%", "%%")).scalars())
    assert "Seq Scan on broadcastable_outbox" not in plan
    assert "ix_broadcastable_outbox_order" in plan


# Engines and URLs


@on_servers
def test_a_relay_goes_on_after_the_database_hung_up(
    app: sa.Engine, outbox: DatabaseOutbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server's restart, or its patience with idle connections, costs no delivery."""
    monkeypatch.setattr(engines, "ASKED_AFTER", 0.0)
    outbox.put([batch("s")])
    assert hang_up(app) >= 1
    assert len(deliver(outbox, "s")) == 1


def hang_up(app: sa.Engine) -> int:
    """End all other connections to the database; how many there were."""
    with app.connect() as connection:
        if app.dialect.name == "postgresql":
            others = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database() "
            return len(connection.exec_driver_sql(others + "AND pid <> pg_backend_pid()").all())
        listed = "SELECT id FROM information_schema.processlist WHERE db = DATABASE() AND id <> CONNECTION_ID()"
        ids = connection.exec_driver_sql(listed).scalars().all()
        for connection_id in ids:
            connection.exec_driver_sql(f"KILL {connection_id}")
        return len(ids)


def test_an_engine_of_the_application_lends_its_pool(url: str, app: sa.Engine) -> None:
    outbox = DatabaseOutbox(app, **LIMITS)
    outbox.put([batch("s")])
    assert len(deliver(outbox, "s")) == 1
    outbox.close()
    with app.connect() as connection:
        assert connection.scalar(sa.select(1)) == 1
    assert (outbox._engine().pool is app.pool) == (app.dialect.name != "sqlite")
    outbox.close()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("sqlite+aiosqlite:///a.db", "sqlite:///a.db"),
        ("postgresql+asyncpg://u:p@h/d", "postgresql+psycopg://u:p@h/d"),
        ("mysql+aiomysql://u:p@h/d", "mysql+pymysql://u:p@h/d"),
        ("mysql+asyncmy://u:p@h/d", "mysql+pymysql://u:p@h/d"),
        ("mariadb+aiomysql://u:p@h/d", "mariadb+pymysql://u:p@h/d"),
        ("postgresql+psycopg://u:p@h/d", "postgresql+psycopg://u:p@h/d"),
        ("sqlite+aiosqlite:///file:x?mode=memory&cache=shared", "sqlite:///file:x?mode=memory&cache=shared"),
    ],
)
def test_an_asyncio_url_stands_for_its_synchronous_driver(given: str, expected: str) -> None:
    assert sync_url(given) == sa.make_url(expected)


@pytest.mark.parametrize("url", ["postgresql+psycopg2://h/d", "mysql+mysqldb://h/d", "postgresql+nosuch://h/d"])
def test_a_driver_that_is_missing_is_named(url: str) -> None:
    with pytest.raises(ConfigurationError, match=sa.make_url(url).drivername.replace("+", r"\+")):
        DatabaseOutbox(url, **LIMITS)


@pytest.mark.parametrize(
    "url", ["sqlite://", "sqlite:///:memory:", "sqlite+aiosqlite://", "sqlite:///file:x?mode=memory&uri=true"]
)
def test_an_sqlite_database_in_memory_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="file"):
        DatabaseOutbox(url, **LIMITS)


def test_an_asyncio_engine_stands_for_its_synchronous_driver(tmp_path: Any) -> None:
    path = tmp_path / "a.db"
    create_tables(f"sqlite:///{path}")
    outbox = DatabaseOutbox(create_async_engine(f"sqlite+aiosqlite:///{path}"), **LIMITS)
    outbox.put([batch("s")])
    assert len(deliver(outbox, "s")) == 1
    outbox.close()


def test_a_process_that_only_writes_needs_no_url(app: sa.Engine, outbox: DatabaseOutbox) -> None:
    writer = DatabaseOutbox.from_settings(Settings(outbox="database"))
    with app.begin() as connection:
        writer.stage(connection, [batch("s")])
    assert writer.staged(["s"]) == ["s"]
    with pytest.raises(ConfigurationError, match="BROADCASTABLE_DATABASE_URL"):
        writer.claim("s", lease_for=LONG)
    assert len(deliver(outbox, "s")) == 1


def test_settings_say_where_the_database_is(url: str) -> None:
    outbox = DatabaseOutbox.from_settings(Settings(outbox="database", database_url=url, namespace="shop"))
    outbox.put([batch("s")])
    assert claim(outbox, "s").id.producer_id == "shop-database"
    outbox.close()


def test_tables_may_be_in_a_schema(postgres_url: str) -> None:
    metadata = sa.MetaData()
    found = tables(metadata, schema="events")
    assert tables(metadata, schema="events") == found, "a second call finds them"
    engine = sa.create_engine(postgres_url)
    with engine.begin() as connection:
        connection.execute(sa.schema.CreateSchema("events"))
        metadata.create_all(connection)
    for outbox in (DatabaseOutbox(engine, **LIMITS, schema="events"), DatabaseOutbox(engine, **LIMITS, tables=found)):
        outbox.put([batch("s")])
        assert len(deliver(outbox, "s")) == 1
    engine.dispose()


def test_a_forked_child_does_not_use_its_parents_connections(url: str, outbox: DatabaseOutbox) -> None:
    outbox.put([batch("s")])
    child = os.fork()
    if child == 0:
        try:
            frame = claim(outbox, "s")
            outbox.ack(frame, offset="1")
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert outbox.pending() == []


def test_an_awkward_id_is_still_one_id(outbox: DatabaseOutbox) -> None:
    for batch_id in ("x" * 5_000, "ü", "A", "a", "a "):
        outbox.put([Batch(stream="s", events=(b"1",), txid="t", id=batch_id)])
        outbox.put([Batch(stream="s", events=(b"1",), txid="t", id=batch_id)])
    assert [mark.id for mark in claim(outbox, "s").batches] == ["x" * 5_000, "ü", "A", "a", "a "]


def test_the_same_id_put_by_two_at_the_same_moment_is_applied_once(outbox: DatabaseOutbox) -> None:
    for _ in range(10):
        once = batch("s")
        barrier = threading.Barrier(2)

        def put(once: Batch = once, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            outbox.put([once])

        threads = [threading.Thread(target=put) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert deliver(outbox, "s") == [once.events[0]]
