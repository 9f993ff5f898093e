"""Sources of documents, as named by ``config.data.source``.

The embedded corpus, local files and tensorflow-datasets, as lists of parts; several sources may be
mixed with weights.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import importlib.resources
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from loro_jax.errors import TrainingError
from loro_jax.text.config import DataConfig
from loro_jax.text.documents import Part, digest
from loro_jax.text.prepared import is_prepared, read_manifest
from loro_jax.text.readers import Tally, read_documents
from loro_jax.text.records import Records, records_of
from loro_jax.text.tfds_source import tfds_parts


class Weighted(NamedTuple):
    """One of several sources.

    Attributes:
        source: the source, as in ``config.data.source``.
        weight: unnormalised share of the training sequences.
    """

    source: str
    weight: float


def weighted_sources(source: str) -> list[Weighted]:
    """Parses ``SOURCE,WEIGHT;SOURCE,WEIGHT;...``; anything without a semicolon is one source.

    Args:
        source: ``config.data.source``.

    Returns:
        The sources.

    Raises:
        TrainingError: if one of several sources has no positive weight.

    Example:
        >>> weighted_sources("wiki/*.jsonl,3;books/*.txt,1")[0]
        Weighted(source='wiki/*.jsonl', weight=3.0)
    """
    if ";" not in source:
        return [Weighted(source, 1.0)]
    found = []
    for part in filter(str.strip, source.split(";")):
        # The last comma: a glob may contain others.
        name, _, weight = part.strip().rpartition(",")
        try:
            found.append(Weighted(name.strip(), float(weight)))
        except ValueError:
            found.append(Weighted("", 0.0))
        if not found[-1].source or not 0 < found[-1].weight < float("inf"):
            raise TrainingError(
                f"config.data.source = {source!r}: {part.strip()!r} is not SOURCE,WEIGHT with a "
                "weight above 0 (several sources are separated by semicolons)."
            )
    return found


def source_parts(source: str, config: DataConfig) -> tuple[list[Part], frozenset[int]]:
    """Lists the parts of one source, validation first.

    Args:
        source: "embedded", "tfds:NAME", or a glob of files.
        config: the data group of a run's config; its ``validation``, if given, replaces the
            validation split of the source.

    Returns:
        (parts, digests of the validation texts, which must not be trained on).

    Raises:
        TrainingError: if files are missing or can't be read.

    Example:
        >>> parts, _ = source_parts("embedded", DataConfig())
        >>> [(part.name, part.split) for part in parts]
        [('embedded valid.txt', 'validation'), ('embedded train.txt', 'train')]
    """
    if source.startswith("tfds:"):
        parts = tfds_parts(source, config)
    elif source == "embedded":
        if config.format != "text":
            raise TrainingError(
                f'config.data.source = "embedded" holds texts; expected config.data.format = '
                f'"text", but it is {config.format!r}.'
            )
        parts = [_embedded("valid.txt", "validation"), _embedded("train.txt", "train")]
    else:
        parts = _file_parts(source, "config.data.source", config, None)
    if config.validation is None:
        return parts, frozenset()
    held_out = validation_parts(config.validation, config)
    tally = Tally("config.data.validation", skip=True)  # bad ones are reported on encoding
    digests = frozenset(digest(text) for part in held_out for text in part.read(tally))
    # The source's own validation split is neither trained on nor evaluated.
    others = [part._replace(split="train") for part in parts if part.split != "validation"]
    return [*held_out, *others], digests


def validation_parts(pattern: str, config: DataConfig) -> list[Part]:
    """Lists the files that ``config.data.validation`` names."""
    return _file_parts(pattern, "config.data.validation", config, "validation")


def shares_text(source: str, other: str) -> bool:
    """Returns whether two sources have a file or dataset in common.

    Prepared directories count as the sources they were written from.

    Args:
        source: a source, as in ``config.data.source``.
        other: another source.

    Returns:
        Whether they share one, as far as their files still exist.

    Example:
        >>> shares_text("embedded", "embedded,1;none/*.txt,3")
        True
    """
    return bool(_origins(source) & _origins(other))


def _origins(source: str) -> set[str]:
    found = set()
    for entry in weighted_sources(source):
        found.add(entry.source)
        # Resolved, because one file may be named in several ways.
        found.update(map(os.path.realpath, _matching(entry.source)))
        if is_prepared(entry.source):
            with contextlib.suppress(TrainingError):  # unfinished
                manifest = read_manifest(pathlib.Path(entry.source).expanduser())
                found |= _origins(manifest["request"]["source"])
    return found


_NAMES = {"train": "training", "validation": "validation"}


def no_document(split: str) -> str:
    """Returns the end of the error for a source without any document for a split."""
    hint = " (name validation files with config.data.validation)" if split == "validation" else ""
    return (
        f"leaves no {_NAMES[split]} document; expected text in documents separated by blank lines, "
        f"one JSON object per line, or a table{hint}."
    )


def _embedded(name: str, split: str) -> Part:
    file = importlib.resources.files("loro_jax.text") / "corpus" / name
    text = file.read_text(encoding="utf-8")

    def read(tally: Tally) -> Iterator[str]:
        for paragraph in text.split("\n\n"):
            if paragraph.strip():
                tally.good += 1
                yield paragraph

    return Part(f"embedded {name}", len(text), "config.data.source", split, read)


def _file_parts(pattern: str, setting: str, config: DataConfig, split: str | None) -> list[Part]:
    """Lists all matching files as parts, sorted by name."""
    paths = _matching(pattern)
    if not paths:
        raise TrainingError(
            f'{setting} = {pattern!r} matches no file; expected "embedded", "tfds:NAME", a '
            "prepared directory, or a glob of .txt, .jsonl or .parquet files."
        )
    whole = config.text_files == "documents"
    records = records_of(config)
    return [
        Part(
            path,
            os.path.getsize(path),
            setting,
            split,
            functools.partial(_read_file, path, config.text_field, whole, records),
        )
        for path in paths
    ]


def _matching(pattern: str) -> list[str]:
    """Returns the file of this name, or the files that a glob matches, sorted by name."""
    expanded = str(pathlib.Path(pattern).expanduser())
    if os.path.isfile(expanded):  # a name may hold brackets
        return [expanded]
    # glob's order is that of the file system, and differs between machines.
    return [path for path in sorted(glob.glob(expanded, recursive=True)) if os.path.isfile(path)]


def _read_file(
    path: str, text_field: str, whole: bool, records: Records | None, tally: Tally
) -> Iterator[str]:
    return read_documents(path, tally, text_field, whole, records)
