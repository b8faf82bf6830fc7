"""The rows that one bulk statement changes: read before and after, and told as if each had been changed by itself.

Which rows it changes does not show in the statement alone: criteria that the application's hooks add, and triggers of
the database have their say. So what is read before may be too much, and what became of each of these rows is asked of
the database afterwards: of RETURNING, else by primary key. A row is gone only if it is no longer there.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import IteratorResult, Result
from sqlalchemy.engine.result import SimpleResultMetaData
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import LoaderCriteriaOption, Session
from sqlalchemy.sql import dml

from .completion import report_failure
from .declarations import Plan, Route
from .recording import NOWHERE, Handle, Recording, RecordView, note_rewritten, notes_of
from .transactions import Change, EntityKey, buffers_of
from .upserts import Conflicts
from .values import Row, key_text

log = logging.getLogger(__name__)

Rows = dict[str, dict[str, Any]]
"""Rows by the text of their primary key."""

_PARAMETERS: Final = 30_000
"""Bound parameters in one statement: below the limits of SQLite (32,766) and PostgreSQL (65,535)."""

_OPTIONS_OF_RESULTS: Final = frozenset({"yield_per", "stream_results", "max_row_buffer"})

_LOCKING_GAPS: Final = frozenset({"mysql", "mariadb"})
"""Where FOR UPDATE of a row that is not there keeps others from inserting it, so that two upserts would deadlock."""


@dataclasses.dataclass(frozen=True)
class Call:
    """What `Session.execute` was called with; *run* is that method, bound to its session."""

    run: Callable[..., Any]
    statement: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, statement: Any = None) -> Any:
        return self.run(self.statement if statement is None else statement, *self.args, **self.kwargs)

    @property
    def params(self) -> Any:
        return self.args[0] if self.args else self.kwargs.get("params")

    @property
    def sets(self) -> list[Any] | None:
        """Several sets of parameters, the statement being executed once for each; None when there is at most one."""
        params = self.params
        return list(params) if params and isinstance(params, Sequence) and not isinstance(params, Mapping) else None

    @property
    def options(self) -> dict[str, Any]:
        return {**self.statement._execution_options, **(self.kwargs.get("execution_options") or {})}

    @property
    def flushes_first(self) -> bool:
        """Whether what waits in the session is to be written first; only an ORM statement has the option."""
        return bool(not self.is_orm or self.options.get("autoflush", True))

    @property
    def is_orm(self) -> bool:
        return bool(self.statement._propagate_attrs.get("compile_state_plugin") == "orm")

    @property
    def inserts_in_bulk(self) -> bool:
        """An ORM INSERT with its parameters apart, if only one set of them."""
        return bool(self.is_orm and self.params and self.options.get("dml_strategy", "auto") in {"auto", "bulk"})

    @property
    def names_rows_by_key(self) -> bool:
        """An ORM UPDATE by primary key, which is in the sets of parameters."""
        return (
            isinstance(self.statement, dml.Update)
            and isinstance(self.params, list)
            and "parententity" in self.statement.table._annotations
            and self.options.get("dml_strategy", "auto") in {"auto", "bulk"}
        )

    def bind_arguments(self, plan: Plan) -> dict[str, Any]:
        """As `Session.execute` itself would choose: a session with several databases may go by the statement."""
        return {"mapper": plan.mapper, "clause": self.statement, **(self.kwargs.get("bind_arguments") or {})}


class BulkRows:
    """Reads and records the rows of one bulk statement, or of one of the legacy methods, which have no *call*."""

    def __init__(self, session: Session, plan: Plan, call: Call | None = None) -> None:
        self.plan = plan
        self._session = session
        self._call = call
        self._options: dict[str, Any] = {}
        bind_arguments: dict[str, Any] = {"mapper": plan.mapper}
        if call is not None:
            self._options = {name: value for name, value in call.options.items() if name not in _OPTIONS_OF_RESULTS}
            bind_arguments = call.bind_arguments(plan)
            if call.flushes_first:
                session._autoflush()
        self._connection = session.connection(bind_arguments=bind_arguments)

    def insert(self, call: Call) -> Result[Any]:
        """Run an INSERT whose result tells the key of the one new row, as one with RETURNING would not."""
        result: Result[Any] = call()
        self.record({}, self.read([tuple(result.inserted_primary_key)], lock=False))  # type: ignore[attr-defined]
        return result

    def insert_returning(self, call: Call, conflicts: Conflicts | None = None) -> Result[Any]:
        """Run an INSERT and have its rows returned.

        Args:
            conflicts: By what rows are found that it may change. When None, and it may change some, what they were is
                not known.
        """
        before = self._in_conflict(conflicts or {})
        result, after = self._returning(call)
        self.record(before, after | self._again(before, after), known=conflicts is not None)
        return result

    def change(self, call: Call, *, returning: bool, moves_keys: bool = False) -> Result[Any]:
        """Run an UPDATE or DELETE with a WHERE clause.

        Args:
            returning: The database returns the rows of this UPDATE.
            moves_keys: It sets primary keys, so that a row which was not read before is one under a new key.
        """
        before: Rows = {}
        for given in call.sets or [call.params]:
            for key, row in self._matching(call.statement, given).items():
                before.setdefault(key, row)
        after: Rows = {}
        result: Result[Any]
        if returning:
            result, after = self._returning(call)
        else:
            result = call()
        # A row that another transaction made match in between is returned too; what it was is not known.
        self.record(before, after | self._again(before, after), known=moves_keys)
        return result

    def change_by_key(self, run: Callable[[], Any], parameters: Iterable[Any]) -> Any:
        """Run an UPDATE whose parameter sets name the rows by primary key."""
        key = self.plan.key
        identities = [
            tuple(each[name] for name in key)
            for each in parameters
            if isinstance(each, Mapping) and all(name in each for name in key)
        ]
        before = self.read(identities)
        result = run()
        self.record(before, self._again(before, {}))
        return result

    def read(self, identities: Iterable[Sequence[Any]], *, lock: bool = True) -> Rows:
        """The rows with these primary keys, as they are now.

        Args:
            lock: Until the transaction ends, where the database can. Where it repeats reads, that is also what shows
                the row as it is and not as it was.
        """
        cls = self.plan.mapper.class_
        known = {key_text(each): tuple(each) for each in identities if not any(part is None for part in each)}
        return self._having([getattr(cls, name) for name in self.plan.key], list(known.values()), lock=lock)

    def _again(self, before: Rows, after: Rows) -> Rows:
        """What became of those rows that the statement has not returned."""
        return self.read([self._identity(row) for key, row in before.items() if key not in after])

    def _in_conflict(self, conflicts: Conflicts) -> Rows:
        table = self.plan.mapper.local_table
        lock = self._connection.dialect.name not in _LOCKING_GAPS
        rows: Rows = {}
        for names, values in sorted(conflicts.items()):  # a table has its constraints in a set
            rows |= self._having([table.columns[name] for name in names], list(dict.fromkeys(values)), lock=lock)
        return rows

    def _having(self, columns: Sequence[Any], values: Sequence[tuple[Any, ...]], *, lock: bool) -> Rows:
        rows: Rows = {}
        step = _PARAMETERS // len(columns)
        for start in range(0, len(values), step):
            chunk = values[start : start + step]
            if len(columns) == 1:
                condition = columns[0].in_([each[0] for each in chunk])
            else:
                condition = sa.tuple_(*columns).in_(chunk)
            rows |= self._select(self._all().where(condition), lock=lock)
        return rows

    def _matching(self, statement: Any, params: Any) -> Rows:
        wanted = self._all()
        if statement.whereclause is not None:
            wanted = wanted.where(statement.whereclause)
        criteria = [each for each in statement._with_options if isinstance(each, LoaderCriteriaOption)]
        return self._select(wanted.options(*criteria), params, lock=True)

    def _all(self) -> Any:
        cls = self.plan.mapper.class_
        columns = [getattr(cls, name).label(f"c{index}") for index, name in enumerate(self.plan.names)]
        return sa.select(*columns)

    def _select(self, statement: sa.Select[Any], params: Any = None, *, lock: bool) -> Rows:
        """Through the connection: no hook of the application hides a row, and nothing is flushed."""
        if lock:
            statement = statement.with_for_update(of=list(self.plan.mapper.tables))
        found = self._connection.execute(statement, params, execution_options=self._options)
        return self._by_key(dict(zip(self.plan.names, values, strict=True)) for values in found)

    def _returning(self, call: Call) -> tuple[Result[Any], Rows]:
        plan = self.plan
        columns = [plan.mapper.attrs[name].columns[0] for name in plan.names]
        own = bool(call.statement._returning)
        result = call(call.statement.returning(*columns))
        found = result.all()
        rows = self._by_key(dict(zip(plan.names, values[-len(columns) :], strict=True)) for values in found)
        if not own:
            # What the ORM wraps in rows of its own has the cursor's result inside. Some drivers count rows only as they
            # are fetched, which SQLAlchemy does not wait for.
            plain = getattr(result, "raw", result)
            plain.rowcount = len(found)
            return plain, rows
        keys = list(result.keys())[: -len(columns)]
        asked_for = [tuple(values[: -len(columns)]) for values in found]
        return IteratorResult(SimpleResultMetaData(keys), iter(asked_for)), rows

    def _by_key(self, rows: Iterable[dict[str, Any]]) -> Rows:
        return {key_text(self._identity(row)): row for row in rows}

    def _identity(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in self.plan.key)

    def record(self, before: Rows, after: Rows, *, known: bool = True) -> None:
        """Note that the rows *before* became the rows *after*.

        Args:
            known: What is not in *before* was not there. Otherwise it may have been, and readers get an update.

        Raises:
            DBAPIError: Of a function of the application; the database may have given up the transaction.
        """
        buffers = buffers_of(self._session)
        level = buffers.level(self._session)
        level.remember_bind(self._session, self.plan.mapper, self._connection)
        recording = Recording(self._session, notes_of(buffers), level, buffers.delivery_for(self._session))
        changed = [
            key for key in dict.fromkeys((*before, *after)) if not self._is_same(before.get(key), after.get(key))
        ]
        note_rewritten(self._session, self.plan.mapper, [self._identity(after[key]) for key in changed if key in after])
        for route in self.plan.routes:
            told = _Told(recording, route)
            for key in changed:
                told.add(key, before.get(key), after.get(key), existed=not known)
            told.write()
        recording.notes.settle(self._session, buffers)
        buffers.added(self._session, has_locked=True)

    def _is_same(self, before: Row | None, after: Row | None) -> bool:
        if before is None or after is None:
            return False
        equal = self.plan.equal
        try:
            return all(equal[name](after[name], before[name]) is True for name in self.plan.names)
        except Exception as error:
            log.debug("%s: two of its values cannot be compared (%s)", self.plan.name, error)
            return False


Entry = tuple[str, Handle, EntityKey, Change]


class _Told:
    """What one route says of the rows of one statement.

    What leaves is written before what arrives, so that a key which changes hands ends up with its new owner.
    """

    def __init__(self, recording: Recording, route: Route) -> None:
        self._recording = recording
        self._route = route
        self._leaving: list[Entry] = []
        self._arriving: list[Entry] = []
        self._failures = 0

    def add(self, key: str, before: dict[str, Any] | None, after: dict[str, Any] | None, *, existed: bool) -> None:
        """Take note of one row, of both sides or of none: half of it would be a delete of a row that is there."""
        leaving = arriving = None
        try:
            if after is not None:
                arriving = self._arrival(key, after, existed=existed and before is None)
            if before is not None:
                leaving = self._departure(key, before, arriving)
        except DBAPIError:
            raise
        except Exception as error:
            self._failed(key, error)
            return
        if leaving is not None:
            self._leaving.append(leaving)
        if arriving is not None:
            self._arriving.append(arriving)

    def write(self) -> None:
        for key, handle, entity, change in (*self._leaving, *self._arriving):
            try:
                self._recording.add(self._route, handle, entity, change)
            except DBAPIError:
                raise
            except Exception as error:
                self._failed(key, error)

    def _arrival(self, key: str, row: dict[str, Any], *, existed: bool) -> Entry | None:
        recording, route = self._recording, self._route
        view = RecordView(route.plan, row)
        handle, entity = recording.place(route, view, row)
        if handle is NOWHERE:
            return None
        if route.value_of is not None:
            value = route.value_of(view, row, recording.keys_as_strings)
        else:
            value = route.plan.reader(keys_as_strings=recording.keys_as_strings)(row)
        return key, handle, entity, (existed, True, route.encode(entity[1], value), None, route.on)

    def _departure(self, key: str, row: dict[str, Any], arriving: Entry | None) -> Entry | None:
        recording, route = self._recording, self._route
        try:
            handle, entity = recording.place(route, RecordView(route.plan, row), row)
        except DBAPIError:
            raise
        except Exception as error:
            if arriving is None:
                raise
            # As in a flush: what cannot be told of the past is taken to be as it is now.
            log.debug("%s %s: where it was before is not known (%s)", route.plan.name, key, error)
            _, handle, entity, _ = arriving
        if handle is NOWHERE:
            return None
        return key, handle, entity, (True, False, None, recording.old_value(route, row), route.on)

    def _failed(self, key: str, error: Exception) -> None:
        report_failure(self._route.plan.name, key, self._route, error, first=not self._failures)
        self._failures += 1
