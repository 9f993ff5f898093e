"""Prepared tensorflow-datasets, read by record index, without TensorFlow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from loro_jax.errors import TrainingError
from loro_jax.text.config import DataConfig
from loro_jax.text.content import TEXT_MARK, NotTextError
from loro_jax.text.documents import VALIDATION_SHARE, Part
from loro_jax.text.marked import Marked
from loro_jax.text.readers import Tally
from loro_jax.text.records import Records, TextField, records_of

# Records per part.
_PART_RECORDS = 100_000


class TfdsTexts(Sequence[str]):
    """Sequence of the texts of some records.

    Args:
        records: a tfds data source.
        indices: indices of the records.
        fields: makes documents of records; names the features that it reads.
        name: name in error messages.
        tally: counts good and bad records.
    """

    def __init__(
        self, records: Any, indices: Sequence[int], fields: Records, name: str, tally: Tally
    ):
        self._records = records
        self._indices = indices
        self._fields = fields
        self._name = name
        self._tally = tally

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: Any) -> Any:
        """Returns the text; an empty one for a bad record, unless the tally stops reading."""
        index = self._indices[place]
        return _text(self._records, index, self._fields, self._name, self._tally) or ""


def tfds_texts(
    source: str, config: DataConfig, tally: Tally
) -> tuple[TfdsTexts, TfdsTexts, dict[str, Any]]:
    """Opens training and validation texts, accessible by index.

    If the dataset has no validation split, every hundredth record is held out.

    Args:
        source: "tfds:NAME".
        config: the data group of a run's config.
        tally: counts good and bad records.

    Returns:
        (training texts, validation texts, an identity of the dataset).

    Raises:
        TrainingError: if the dataset has no ArrayRecord files, or no such field.
    """
    fields = records_of(config) or TextField(config.text_field)
    builder, sources = _open(source, config, fields)
    records = sources["train"]
    train: Sequence[int] = range(len(records))
    validation: Sequence[int]
    held_out = sources.get("validation")
    if held_out is None:
        # By index, not by hash, which would need to read every record.
        held_out, validation = records, range(0, len(records), VALIDATION_SHARE)
        train = _AllBut(len(records), VALIDATION_SHARE)
    else:
        validation = range(len(held_out))
    identity = {"dataset": builder.info.full_name, "records": [len(train), len(validation)]}
    return (
        TfdsTexts(records, train, fields, f"{source}, train", tally),
        TfdsTexts(held_out, validation, fields, f"{source}, validation", tally),
        identity,
    )


def tfds_parts(source: str, config: DataConfig) -> list[Part]:
    """Lists the parts of both splits, validation first, or of the only split.

    Args:
        source: "tfds:NAME".
        config: the data group of a run's config.

    Returns:
        The parts.

    Raises:
        TrainingError: as in :func:`tfds_texts`.
    """
    fields = records_of(config) or TextField(config.text_field)
    _, sources = _open(source, config, fields)
    parts = []
    for split in ("validation", "train"):
        records = sources.get(split, ())
        for start in range(0, len(records), _PART_RECORDS):
            indices = range(start, min(start + _PART_RECORDS, len(records)))
            name = f"{source}, {split}[{indices.start}:{indices.stop}]"
            parts.append(
                Part(
                    name,
                    len(indices),
                    "config.data.source",
                    # Without an official split, each document is assigned by its hash.
                    split if "validation" in sources else None,
                    _reader(records, indices, fields, name),
                )
            )
    return parts


def _reader(records: Any, indices: range, fields: Records, name: str) -> Any:
    def read(tally: Tally) -> Iterator[str]:
        for index in indices:
            text = _text(records, index, fields, name, tally)
            if text is not None and text.strip():
                yield text

    return read


def _text(records: Any, index: int, fields: Records, name: str, tally: Tally) -> str | None:
    try:
        row = records[index]
        values = {field: row[field] for field in fields.columns}
    except Exception as error:  # ArrayRecord's reader raises various errors for a missing file
        reason = str(error).strip().split("\n")[0][:200]
        tally.add_bad(name, f"record {index}", f"can't be read ({reason})")
        return None
    try:
        for field, value in values.items():
            if not isinstance(value, str | bytes):
                raise NotTextError(f"no text in the field {field!r}")
        text = fields.document(values)
    except NotTextError as error:
        tally.add_bad(name, f"record {index}", str(error))
        return None
    tally.good += 1
    return text if isinstance(text, Marked) else text.lstrip(TEXT_MARK)


class _AllBut(Sequence[int]):
    """The numbers from 0 to ``count`` without the multiples of ``step``."""

    def __init__(self, count: int, step: int):
        self._count = count - -(-count // step)
        self._step = step

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: Any) -> Any:
        # Of every `step` numbers the first, a multiple of it, is left out.
        return place + place // (self._step - 1) + 1


def open_builder(source: str, field: str, data_dir: str | None) -> tuple[Any, Any]:
    """Opens a prepared dataset.

    Args:
        source: "tfds:NAME".
        field: the config's field that holds it, for messages.
        data_dir: directory of tensorflow-datasets; None: its default.

    Returns:
        (the builder, its data sources by split).

    Raises:
        TrainingError: if it has no ArrayRecord files.
    """
    import tensorflow_datasets as tfds  # slow to import, only needed here

    name = source.removeprefix("tfds:")
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        return builder, builder.as_data_source()
    except Exception as error:  # tfds raises different classes for different missing things
        reason = str(error).strip().split("\n")[0]
        raise TrainingError(
            f"{field} = {source!r} can't be opened in data_dir = {data_dir!r} ({reason}). "
            f"Prepare it once with: tfds build {name} --file_format=array_record"
            + (f" --data_dir={data_dir}" if data_dir else "")
        ) from None


def _open(source: str, config: DataConfig, fields: Records) -> tuple[Any, Any]:
    if fields.kind != "text":
        raise TrainingError(
            f"config.data.source = {source!r}: config.data.format = {config.format!r} reads .jsonl "
            "and .parquet files; expected one of these."
        )
    builder, sources = open_builder(source, "config.data.source", config.data_dir)
    for field, setting in fields.columns.items():
        if field not in builder.info.features:
            raise TrainingError(
                f"config.data.source = {source!r} has no field {field!r} "
                f"({setting}); it has {', '.join(builder.info.features)}."
            )
    if "train" not in sources:
        raise TrainingError(
            f"config.data.source = {source!r} has no split 'train'; it has {', '.join(sources)}."
        )
    return builder, sources
