"""Streaming of texts or records from Parquet files, by row groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.parquet

from loro_jax.errors import TrainingError
from loro_jax.text.content import NotTextError, decoded
from loro_jax.text.records import Records
from loro_jax.text.tally import Tally

# Rows read at a time; all of them are in memory together, however long.
_ROWS = 256

# Types of columns that can hold text. Arrow may type an all-null column as "null".
_TEXTS = (
    *("string", "large_string", "string_view"),
    *("binary", "large_binary", "binary_view", "fixed_size_binary", "null"),
)

_LISTS = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")

# Errors that pyarrow raises for damaged, encrypted or unsupported files.
_ERRORS = (pyarrow.ArrowException, OSError, ValueError, RuntimeError, OverflowError)


def table_texts(path: str, tally: Tally, fields: Records) -> Iterator[tuple[str, str]]:
    """Yields places and texts of a table, in little more memory than one row group.

    Args:
        path: the file.
        tally: counts unreadable rows, row groups from a damaged row on, or tables.
        fields: makes documents of rows; names the columns that it reads.

    Yields:
        (place, text) of each row.

    Raises:
        TrainingError: from the tally, or if a column is missing or of another type.
    """
    try:
        # Read columns in pieces, not whole ahead of time.
        table = pyarrow.parquet.ParquetFile(
            path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
        )
        schema, groups = table.schema_arrow, table.num_row_groups
        rows = [table.metadata.row_group(i).num_rows for i in range(groups)]
    except _ERRORS as error:
        tally.add_lost(path, "the table", f"not readable as Parquet ({_line(error)})")
        return
    with table:
        for column, setting in fields.columns.items():
            _check_column(path, schema, column, setting, fields.kind)
        columns = [*fields.columns, *(name for name in fields.optional if name in schema.names)]
        start = 1
        for group, count in enumerate(rows):
            row = start
            for value in _rows(table, group, columns):
                if isinstance(value, _DamageError):
                    # Rows after a damaged one can't be located, so all of them count as bad.
                    left = max(start + count - row, 1)
                    tally.add_bad(path, f"row {row}", f"can't be read ({value})", left)
                    break
                try:
                    text = _document(value, fields)
                except NotTextError as error:
                    tally.add_bad(path, f"row {row}", str(error))
                else:
                    yield f"row {row}", text
                row += 1
            start += count


class _DamageError(Exception):
    """The rest of a row group can't be read."""


def _rows(
    table: pyarrow.parquet.ParquetFile, group: int, columns: list[str]
) -> Iterator[dict[str, Any] | _DamageError]:
    """Yields the rows of a row group; ends early with a ``_DamageError``."""
    done = 0
    for size in (_ROWS, 1):  # after an error, one by one up to the damaged row
        seen = 0
        batches = table.iter_batches(size, [group], columns=columns, use_threads=False)
        try:
            for batch in batches:
                seen += len(batch)
                # In the second pass over the row group, rows that were yielded before are left out.
                if seen > done:
                    rest = batch.slice(max(len(batch) - (seen - done), 0))
                    found = [_python(rest.column(name)) for name in columns]
                    yield from (
                        dict(zip(columns, row, strict=True)) for row in zip(*found, strict=True)
                    )
                    done = seen
        except _ERRORS as error:
            damage = _DamageError(_line(error))
        else:
            return
    yield damage


def _python(values: pyarrow.Array) -> list[Any]:
    """Converts values to Python; None for null."""
    try:
        return values.to_pylist()
    except UnicodeDecodeError:  # neither Parquet nor Arrow validates strings
        return [_bytes(value) for value in values]


def _bytes(value: pyarrow.Scalar) -> Any:
    """Returns the stored bytes of a string; of other values, their form in Python."""
    if isinstance(value, pyarrow.DictionaryScalar):
        value = value.value
    if hasattr(value, "as_buffer"):
        return value.as_buffer().to_pybytes() if value.is_valid else None
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return b"\xff"  # not UTF-8 somewhere within


def _document(row: dict[str, Any], fields: Records) -> str:
    for column in fields.columns:
        if row[column] is None:
            raise NotTextError(f"no {fields.kind} in the column {column!r}")
        if isinstance(row[column], bytes):
            row[column] = decoded(row[column])
    return fields.document(row)


def _check_column(path: str, schema: pyarrow.Schema, column: str, setting: str, holds: str) -> None:
    """Raises TrainingError unless there is exactly one such column, of the right type."""
    count = schema.names.count(column)
    if count != 1:
        raise TrainingError(
            f"{path} has {'several columns' if count else 'no column'} {column!r} "
            f"({setting}); it has {', '.join(schema.names)}."
        )
    kind = schema.field(column).type
    if holds != "text":
        if not any(getattr(pyarrow.types, f"is_{name}")(kind) for name in _LISTS):
            raise TrainingError(
                f"{path}: the column {column!r} ({setting}) holds {kind}; expected a {holds}."
            )
        return
    stored = getattr(kind, "storage_type", kind)
    if not _is_text(getattr(stored, "value_type", stored) if _is_dictionary(stored) else stored):
        raise TrainingError(
            f"{path}: the column {column!r} ({setting}) holds {kind}; expected "
            "strings, or bytes that are UTF-8."
        )


def _is_dictionary(kind: pyarrow.DataType) -> bool:
    return bool(pyarrow.types.is_dictionary(kind))


def _is_text(kind: pyarrow.DataType) -> bool:
    return any(getattr(pyarrow.types, f"is_{name}")(kind) for name in _TEXTS)


def _line(error: BaseException) -> str:
    """Returns an error's message as one printable line."""
    line = " ".join(str(error).split())[:200]
    return "".join(character if character.isprintable() else "?" for character in line)
