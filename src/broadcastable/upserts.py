"""Which rows that are there an INSERT may change, as far as its parameters tell.

ON CONFLICT, ON DUPLICATE KEY UPDATE and OR REPLACE find those rows by their unique keys. What is found here is
never too little, but may be too much: a partial index spares rows that have its columns' values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

import sqlalchemy as sa
from sqlalchemy.orm import Mapper
from sqlalchemy.sql import dml

Key: TypeAlias = tuple[str, ...]
"""The columns of a unique key, by their names in `Table.columns`."""

Conflicts: TypeAlias = dict[Key, list[tuple[Any, ...]]]
"""The values by which rows are found, for each unique key."""

_UNKNOWN: Final = object()


def changes_rows(statement: dml.Insert) -> bool:
    """Whether rows that were there before may be changed, or replaced."""
    return _has_prefix(statement, "REPLACE") or any(not _does_nothing(each) for each in _clauses(statement))


def skips_rows(statement: dml.Insert) -> bool:
    """Whether a row may be left out because of one that was there before."""
    return _has_prefix(statement, "IGNORE") or bool(_clauses(statement))


def conflicts_of(statement: dml.Insert, params: Any, mapper: Mapper[Any]) -> Conflicts | None:
    """By what the rows are found that may be changed; None when the parameters do not tell."""
    table = mapper.local_table
    if statement.select is not None or not isinstance(table, sa.Table):
        return None
    keys = _keys_in_conflict(statement, table)
    if keys is None:
        return None
    found: Conflicts = {key: [] for key in keys}
    for row in _rows_of(statement, params, mapper, table):
        for key in keys:
            values = tuple(row[name] if name in row else _value_when_absent(table, name) for name in key)
            if any(value is None for value in values):
                continue  # null is in conflict with nothing
            if any(value is _UNKNOWN for value in values):
                return None
            found[key].append(values)
    return found


def _has_prefix(statement: dml.Insert, word: str) -> bool:
    return any(word in str(prefix).upper() for prefix, _ in statement._prefixes)


def _clauses(statement: dml.Insert) -> Sequence[Any]:
    clause: Any = getattr(statement, "_post_values_clause", None)
    if clause is None:
        return ()
    # SQLAlchemy 2.1 makes a list of them, since SQLite takes several.
    return tuple(getattr(clause, "clauses", (clause,)))


def _does_nothing(clause: Any) -> bool:
    return bool(clause.__visit_name__ == "on_conflict_do_nothing")


# Keys


def _keys_in_conflict(statement: dml.Insert, table: sa.Table) -> set[Key] | None:
    wanted = [_key_of_clause(each, table) for each in _clauses(statement) if not _does_nothing(each)]
    if _has_prefix(statement, "REPLACE"):
        wanted.append(_unique_keys(table))
    keys: set[Key] = set()
    for each in wanted:
        if each is None:
            return None
        keys |= each
    return keys


def _key_of_clause(clause: Any, table: sa.Table) -> set[Key] | None:
    elements = getattr(clause, "inferred_target_elements", None)
    constraint = getattr(clause, "constraint_target", None)
    if elements is None and constraint is None:
        return _unique_keys(table)  # ON DUPLICATE KEY UPDATE
    if elements is None:
        return _key_named(table, constraint)
    names = [each if isinstance(each, str) else str(getattr(each, "key", "")) for each in elements]
    return {tuple(names)} if names and all(name in table.columns for name in names) else None


def _key_named(table: sa.Table, name: Any) -> set[Key] | None:
    named: list[Any] = [*table.constraints, *table.indexes]
    for each in named:
        if each is name or each.name == name:
            return _names(each) if isinstance(each, sa.Index | sa.UniqueConstraint | sa.PrimaryKeyConstraint) else None
    return _names(table.primary_key) if name == f"{table.name}_pkey" else None  # as PostgreSQL names it


def _unique_keys(table: sa.Table) -> set[Key] | None:
    unique: list[Any] = [table.primary_key]
    unique += [each for each in table.constraints if isinstance(each, sa.UniqueConstraint)]
    unique += [each for each in table.indexes if each.unique]
    keys: set[Key] = set()
    for each in unique:
        names = _names(each)
        if names is None:
            return None
        keys |= names
    return keys


def _names(key: sa.Index | sa.UniqueConstraint | sa.PrimaryKeyConstraint) -> set[Key] | None:
    if isinstance(key, sa.Index) and len(key.columns) != len(key.expressions):
        return None  # of an expression, which only the database computes
    return {tuple(column.key for column in key.columns)}


# Values


def _rows_of(statement: dml.Insert, params: Any, mapper: Mapper[Any], table: sa.Table) -> Iterator[dict[str, Any]]:
    sets = [{}] if not params else [params] if isinstance(params, Mapping) else params
    rows: list[Any] = [row for part in statement._multi_values for row in part] or [statement._values or {}]
    column_of = {}
    if "parententity" in statement.table._annotations:  # the ORM takes the attributes' names
        column_of = {each.key: each.columns[0].key for each in mapper.column_attrs}
    for given in sets:
        for row in rows:
            by_name = row if isinstance(row, Mapping) else dict(zip(table.columns, row, strict=False))
            items = [*by_name.items(), *given.items()]
            yield {
                column_of.get(name, name) if isinstance(name, str) else name.key: _plain(value, given)
                for name, value in items
            }


def _plain(value: Any, given: Mapping[str, Any]) -> Any:
    if isinstance(value, sa.BindParameter):
        return given.get(value.key, _UNKNOWN) if value.required else value.effective_value
    return _UNKNOWN if isinstance(value, sa.ClauseElement) or hasattr(value, "__clause_element__") else value


def _value_when_absent(table: sa.Table, name: str) -> Any:
    """What the database stores where nothing is given; None also where that is new, and in conflict with nothing."""
    column = table.columns[name]
    if column.default is not None and column.default.is_scalar:
        return column.default.arg  # type: ignore[attr-defined]
    if column.primary_key and len(table.primary_key.columns) == 1:
        return None
    return None if column.default is None and column.server_default is None else _UNKNOWN
