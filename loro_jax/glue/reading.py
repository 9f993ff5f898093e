"""Reading of a task's rows from GLUE's own .tsv files, JSON lines, Parquet or tfds.

A folder holds one file per split, or the shards of one: ``train.tsv``, ``dev.tsv``,
``validation.jsonl``, ``train-00000-of-00001.parquet``. MRPC may be as Microsoft distributes it:
``msr_paraphrase_train.txt`` and GLUE's ``dev_ids.tsv``.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet

from loro_jax.errors import TrainingError
from loro_jax.glue.tasks import Columns, Task
from loro_jax.text.tfds_source import open_builder

# Names of files by split. "dev" is GLUE's.
_STEMS = {
    "train": ("train",),
    "validation": ("dev", "validation"),
    "validation_matched": ("dev_matched", "validation_matched"),
    "validation_mismatched": ("dev_mismatched", "validation_mismatched"),
}
_SUFFIXES = (".tsv", ".jsonl", ".json", ".parquet")
_MSR = ("msr_paraphrase_train.txt", "dev_ids.tsv")

# GLUE's own QQP has a few rows of too few columns, which its authors' reader leaves out.
_MOST_SHORT_ROWS = 0.01


class Rows(NamedTuple):
    """The rows of a split.

    Attributes:
        texts: one or two texts of each row.
        labels: numbers of the labels, int32, or scores, float32.
        notes: lines to show about what was left out.
    """

    texts: list[tuple[str, ...]]
    labels: np.ndarray
    notes: tuple[str, ...] = ()


def read_rows(task: Task, source: str, split: str, data_dir: str | None = None) -> Rows:
    """Reads a split of a task.

    Args:
        task: the task.
        source: GLUE's folder, the task's folder in it, or ``tfds:glue``.
        split: "train", or one of ``task.validation``.
        data_dir: directory of tensorflow-datasets; None: its default.

    Returns:
        The rows, in the order of the file.

    Raises:
        TrainingError: if there is no such file or more than one, or a column, a text or a label is
            missing or wrong; one line that names file and row.
    """
    if source.startswith("tfds:"):
        name, columns, rows = _tfds(task, source, split, data_dir)
        return _checked(task, name, columns, rows)
    folder = _folder(task, pathlib.Path(source).expanduser())
    files = _files(task, folder, split)
    if files is None:
        return _read_msr(task, folder, split)
    parts = [_read_file(task, file) for file in files]
    return Rows(
        [texts for part in parts for texts in part.texts],
        np.concatenate([part.labels for part in parts]),
        tuple(note for part in parts for note in part.notes),
    )


def _folder(task: Task, path: pathlib.Path) -> pathlib.Path:
    """Returns the task's folder in a directory, or the directory itself."""
    if not path.is_dir():
        raise TrainingError(
            f"config.data.source = {str(path)!r} is not a directory; expected that of {task.title} "
            "or of GLUE, or tfds:glue."
        )
    inner = sorted(one for one in path.iterdir() if one.name.lower() in task.folders)
    return inner[0] if inner and inner[0].is_dir() else path


def _files(task: Task, folder: pathlib.Path, split: str) -> list[pathlib.Path] | None:
    """Returns the files of a split; None: Microsoft's files of MRPC."""
    found: dict[str, list[pathlib.Path]] = {}
    for path in sorted(folder.iterdir()):
        for stem in _STEMS[split]:
            shard = re.fullmatch(rf"{re.escape(stem)}-\d+-of-\d+\.parquet", path.name)
            if shard or (path.stem == stem and path.suffix in _SUFFIXES):
                found.setdefault(f"{stem}-*" if shard else path.name, []).append(path)
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise TrainingError(
            f"{folder} holds {' and '.join(sorted(found))} for the split {split!r} of "
            f"{task.title}; expected one of them."
        )
    if task.name == "mrpc" and (folder / _MSR[0]).is_file():
        return None
    names = " or ".join(f"{stem}.tsv" for stem in _STEMS[split])
    raise TrainingError(
        f"{folder} holds no split {split!r} of {task.title}; expected {names} (or .jsonl, .json, "
        ".parquet)."
    )


def _read_file(task: Task, path: pathlib.Path) -> Rows:
    try:
        if path.suffix == ".parquet":
            table = pyarrow.parquet.read_table(path)
            return _checked(task, str(path), table.column_names, table.to_pylist())
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise TrainingError(f"{path} can't be read ({reason}).") from None
    if path.suffix == ".tsv":
        return _tsv(task, path, text, task.bare)
    return _checked(task, str(path), None, _json_lines(path, text))


def _tsv(task: Task, path: pathlib.Path, text: str, bare: Columns = ()) -> Rows:
    """Reads tab-separated values: no quoting, one row per line."""
    # Not str.splitlines: texts may hold other characters that it splits at.
    lines = [line.rstrip("\r") for line in text.split("\n")]
    if lines and not lines[-1]:
        lines.pop()
    if bare and not _is_header(task, lines):
        columns: list[str] = list(bare)
        first = 1
    else:
        columns = lines[0].split("\t") if lines else []
        first = 2
        lines = lines[1:]
    rows = [line.split("\t") for line in lines]
    short = [number for number, row in enumerate(rows, first) if len(row) < len(columns)]
    if len(short) > _MOST_SHORT_ROWS * len(rows):
        raise TrainingError(
            f"{path}: line {short[0]} has {len(rows[short[0] - first])} columns; expected "
            f"{len(columns)}, tab-separated ({', '.join(columns)})."
        )
    note = (
        f"{path}: {len(short)} of {len(rows)} rows have too few columns and are left out (the "
        f"first in line {short[0]})"
        if short
        else None
    )
    numbered = [
        (number, dict(zip(columns, row, strict=False)))
        for number, row in enumerate(rows, first)
        if len(row) >= len(columns)
    ]
    found = _checked(
        task,
        str(path),
        columns,
        (row for _, row in numbered),
        (f"line {number}" for number, _ in numbered),
    )
    return found._replace(notes=(note,) if note else ())


def _is_header(task: Task, lines: list[str]) -> bool:
    names = set(lines[0].split("\t")) if lines else set()
    return all(set(columns) & names for columns in (*task.texts, task.label))


def _json_lines(path: pathlib.Path, text: str) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TrainingError(f"{path}: line {number} is no JSON ({error}).") from None
        if not isinstance(row, dict):
            raise TrainingError(f"{path}: line {number} holds no JSON object.")
        yield row


def _read_msr(task: Task, folder: pathlib.Path, split: str) -> Rows:
    """Reads MRPC from Microsoft's training file, divided by GLUE's ids of the validation rows."""
    source, ids = (folder / name for name in _MSR)
    try:
        lines = source.read_text(encoding="utf-8-sig").split("\n")
        held_out = {tuple(line.split("\t")[:2]) for line in ids.read_text("utf-8").split("\n")}
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{folder}: {_MSR[0]} needs GLUE's {_MSR[1]} beside it ({error})."
        ) from None
    header = lines[0].rstrip("\r").split("\t")
    if header[:3] != ["Quality", "#1 ID", "#2 ID"]:
        raise TrainingError(
            f"{source}: the first line is {lines[0]!r}; expected Quality, #1 ID ..."
        )
    wanted = split != "train"
    kept = [line for line in lines[1:] if line and _in(line, held_out) == wanted]
    return _tsv(task, source, "\n".join([lines[0], *kept]))


def _in(line: str, ids: set[tuple[str, ...]]) -> bool:
    return tuple(line.split("\t")[1:3]) in ids


def _tfds(
    task: Task, source: str, split: str, data_dir: str | None
) -> tuple[str, list[str], Iterator[Mapping[str, Any]]]:
    """Opens a split of ``tfds:glue`` or ``tfds:glue/NAME``."""
    name = source if "/" in source else f"{source}/{task.name}"
    builder, sources = open_builder(name, "config.data.source", data_dir)
    if split not in sources:
        raise TrainingError(
            f"config.data.source = {name!r} has no split {split!r}; it has {', '.join(sources)}."
        )
    records = sources[split]

    def rows() -> Iterator[Mapping[str, Any]]:
        for index in range(len(records)):
            row = records[index]
            yield {
                column: value.decode("utf-8") if isinstance(value, bytes) else value
                for column, value in row.items()
            }

    return f"{name}, {split}", list(builder.info.features), rows()


def _checked(
    task: Task,
    name: str,
    columns: Iterable[str] | None,
    rows: Iterable[Mapping[str, Any]],
    places: Iterator[str] | None = None,
) -> Rows:
    """Picks a task's texts and label out of rows.

    Args:
        task: the task.
        name: name of the file, for messages.
        columns: names of the columns; None: the first row's.
        rows: values by column.
        places: where each row is, for messages; None: their numbers.
    """
    chosen: tuple[str, list[str]] | None = None
    texts: list[tuple[str, ...]] = []
    labels: list[float] = []
    for number, row in enumerate(rows, 1):
        place = f"row {number}" if places is None else next(places)
        if chosen is None:
            chosen = _columns(task, name, list(row if columns is None else columns))
        label, names = chosen
        found = tuple(row.get(column) for column in names)
        for column, text in zip(names, found, strict=True):
            if not isinstance(text, str):
                raise TrainingError(f"{name}, {place}: {column} = {text!r}; expected text.")
        texts.append(found)  # type: ignore[arg-type]  # each is a str, see above
        labels.append(_label(task, row.get(label), f"{name}, {place}: {label}"))
    if not texts:
        raise TrainingError(f"{name} holds no rows.")
    return Rows(texts, np.array(labels, np.float32 if task.regression else np.int32))


def _columns(task: Task, name: str, columns: list[str]) -> tuple[str, list[str]]:
    """Returns the names of the columns of the label and of the texts."""

    def pick(names: Columns, what: str) -> str:
        for one in names:
            if one in columns:
                return one
        raise TrainingError(
            f"{name} has no column {' or '.join(map(repr, names))} ({what} of {task.title}); it "
            f"has {', '.join(map(str, columns))}."
        )

    texts = [pick(names, "a text") for names in task.texts]
    return pick(task.label, "the label"), texts


def _label(task: Task, value: Any, where: str) -> float:
    """Returns the number of a label, or a score."""
    expected = "a number from 0 to 5"
    if task.labels:
        if isinstance(value, str) and value in task.labels:
            return task.labels.index(value)
        known = ", ".join(f"{number} ({name})" for number, name in enumerate(task.labels))
        expected = f"{known}"
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if task.labels:
        if number in range(len(task.labels)):
            return int(number)
        hidden = " (a test split, whose labels GLUE keeps hidden?)" if number == -1 else ""
        raise TrainingError(f"{where} = {value!r}; expected one of {expected}{hidden}.")
    if 0 <= number <= 5:
        return number
    raise TrainingError(f"{where} = {value!r}; expected {expected}.")
