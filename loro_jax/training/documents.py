"""Documents: texts of a corpus, split into training and validation.

Three sources (``config.data.source``): the embedded corpus, local files, and prepared
tensorflow-datasets.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.resources
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from loro_jax.training.config import DataConfig
from loro_jax.training.errors import TrainingError
from loro_jax.training.readers import Tally, read_documents

# One document in a hundred validates where the user names no validation files.
VALIDATION_SHARE = 100


class Corpus(NamedTuple):
    """Training and validation documents.

    Attributes:
        train: random-access sequence of texts.
        validation: likewise; disjoint from ``train``.
        in_memory: whether ``train`` is small enough to hold all of its tokens.
        notes: what the user should know about the reading.
    """

    train: Sequence[str]
    validation: Sequence[str]
    in_memory: bool
    notes: tuple[str, ...] = ()


def load_corpus(config: DataConfig) -> Corpus:
    """Reads the corpus that ``config.source`` names.

    Args:
        config: the data group of a run's config.

    Returns:
        Disjoint training and validation documents, neither of them empty.

    Raises:
        TrainingError: if files are missing, unreadable or hold no text.

    Example:
        >>> corpus = load_corpus(DataConfig())
        >>> corpus.train[0]
        'TREASURE ISLAND'
    """
    if config.source.startswith("tfds:"):
        return _tfds_corpus(config)
    notes: list[str | None] = []
    if config.source == "embedded":
        folder = importlib.resources.files("loro_jax.training") / "corpus"
        train = _paragraphs((folder / "train.txt").read_text(encoding="utf-8"))
        validation = _paragraphs((folder / "valid.txt").read_text(encoding="utf-8"))
    else:
        train, note = _read_files(config.source, "config.data.source", config)
        notes.append(note)
        validation = []
    if config.validation is not None:
        validation, note = _read_files(config.validation, "config.data.validation", config)
        notes.append(note)
        held_out = set(validation)
        train = [text for text in train if text not in held_out]
    elif not validation:
        train, validation = _split_by_hash(train)
    for name, texts in (("training", train), ("validation", validation)):
        if not texts:
            raise TrainingError(
                f"config.data.source = {config.source!r} leaves no {name} document; expected text "
                "in documents separated by blank lines, or one JSON object a line"
                + (" (name validation files with config.data.validation)." if train else ".")
            )
    return Corpus(train, validation, in_memory=True, notes=tuple(filter(None, notes)))


def _paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]


def _read_files(pattern: str, setting: str, config: DataConfig) -> tuple[list[str], str | None]:
    """Texts of all files that match, in the order of their names; and what was skipped."""
    paths = sorted(glob.glob(str(pathlib.Path(pattern).expanduser()), recursive=True))
    if not paths:
        raise TrainingError(
            f'{setting} = {pattern!r} matches no file; expected "embedded", "tfds:NAME" or a glob '
            "of .txt, .jsonl or .parquet files."
        )
    tally = Tally(setting, skip=config.bad_documents == "skip")
    whole = config.text_files == "documents"
    texts = [
        text for path in paths for text in read_documents(path, tally, config.text_field, whole)
    ]
    tally.close()
    return texts, tally.report()


def _split_by_hash(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits by each document's own text, so that equal documents end on the same side."""
    train: list[str] = []
    validation: list[str] = []
    for text in texts:
        digest = hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).digest()
        held_out = int.from_bytes(digest[:8], "big") % VALIDATION_SHARE == 0
        (validation if held_out else train).append(text)
    if not validation and len(train) > 1:
        validation.append(train.pop())
    return train, validation


class _TfdsTexts(Sequence[str]):
    """The text field of a tfds data source, by index."""

    def __init__(self, source: Any, text_field: str):
        self._source = source
        self._field = text_field

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        text = self._source[index][self._field]
        return text.decode("utf-8", errors="replace") if isinstance(text, bytes) else str(text)


def _tfds_corpus(config: DataConfig) -> Corpus:
    import tensorflow_datasets as tfds  # heavy, and needed here alone

    name = config.source.removeprefix("tfds:")
    try:
        builder = tfds.builder(name, data_dir=config.data_dir, file_format="array_record")
        sources = builder.as_data_source()
    except Exception as error:  # tfds raises a different class for each thing that can be missing
        reason = str(error).strip().split("\n")[0]
        raise TrainingError(
            f"config.data.source = {config.source!r} can't be opened in data_dir = "
            f"{config.data_dir!r} ({reason}). Prepare it once with: tfds build {name} "
            "--file_format=array_record"
            + (f" --data_dir={config.data_dir}" if config.data_dir else "")
        ) from None
    if config.text_field not in builder.info.features:
        raise TrainingError(
            f"config.data.source = {config.source!r} has no field {config.text_field!r} "
            f"(config.data.text_field); it has {', '.join(builder.info.features)}."
        )
    for split in ("train", "validation"):
        if split not in sources:
            raise TrainingError(
                f"config.data.source = {config.source!r} has no split {split!r}; it has "
                f"{', '.join(sources)}."
            )
    return Corpus(
        _TfdsTexts(sources["train"], config.text_field),
        _TfdsTexts(sources["validation"], config.text_field),
        in_memory=False,
    )
