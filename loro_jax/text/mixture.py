"""The corpus of a run: sources opened, mixed, and split into training and validation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from loro_jax.errors import TrainingError
from loro_jax.text.config import DataConfig
from loro_jax.text.documents import Part, PartReader
from loro_jax.text.encoding import check_ids, encode_chunks, token_dtype
from loro_jax.text.marked import is_counted, plain_ids
from loro_jax.text.packing import EncodedTexts, Row, consecutive_rows, padded_row
from loro_jax.text.prepared import is_prepared, open_prepared
from loro_jax.text.readers import Tally
from loro_jax.text.shards import TokenShards, make_shard
from loro_jax.text.sources import (
    no_document,
    source_parts,
    validation_parts,
    weighted_sources,
)
from loro_jax.text.tfds_source import tfds_texts
from loro_jax.text.tokenizers.tokenizer import Tokenizer

# Most validation documents used per source: enough for ten million tokens.
MAX_VALIDATION_DOCUMENTS = 50_000


class TrainingSource(NamedTuple):
    """One of the mixed sources.

    Attributes:
        name: name in error messages.
        documents: ids of its training documents, each closed by the end-of-text id. Either
            :class:`TokenShards`, or encoded on access.
        weight: unnormalised fraction of the sequences.
    """

    name: str
    documents: Sequence[np.ndarray]
    weight: float


class Corpus(NamedTuple):
    """Training and validation tokens of a run.

    Attributes:
        train: training sources.
        validation_tokens: the fixed validation set, int32 (S, L + 1).
        validation_mask: float32 (S, L).
        train_stream: the training tokens in order (N,), or None if several sources or a large
            one make it meaningless or too long.
        pad_id: the padding id.
        vocab_size: number of ids of the tokenizer.
        fingerprint: identifies the tokens, or the dataset they are read from.
        notes: messages for the user, such as skipped documents.
    """

    train: tuple[TrainingSource, ...]
    validation_tokens: np.ndarray
    validation_mask: np.ndarray
    train_stream: np.ndarray | None
    pad_id: int
    vocab_size: int
    fingerprint: str
    notes: tuple[str, ...]


class _Source(NamedTuple):
    """An opened source; ``validation`` is None if ``config.data.validation`` replaces it."""

    train: Sequence[np.ndarray]
    validation: Sequence[np.ndarray] | None
    fingerprint: str
    notes: Sequence[str]
    in_memory: bool = False


def load_corpus(data: DataConfig, sequence_length: int, tokenizer: Tokenizer) -> Corpus:
    """Opens the corpus of a run, and reads and encodes it if necessary.

    Args:
        data: the data group of the run's config, ``config.data`` in error messages.
        sequence_length: tokens per sequence of the validation set, L.
        tokenizer: the run's tokenizer.

    Returns:
        The corpus. Training and validation documents are disjoint, unless
        ``config.data.validation`` overlaps with a "tfds:" or prepared source, whose texts are not
        compared.

    Raises:
        TrainingError: if files are missing, unreadable or have no text, or a prepared directory
            was written with another tokenizer.
    """
    weighted = weighted_sources(data.source)
    # A record whose prompt fills a sequence alone has nothing to train on.
    longest = sequence_length + 1 if data.shape == "padded" and data.format != "text" else None
    opened = [_open(entry.source, data, tokenizer, longest) for entry in weighted]
    notes = [note for source in opened for note in source.notes]
    validation = [source.validation for source in opened if source.validation is not None]
    # It replaces the validation splits of all sources.
    if data.validation is not None:
        parts = validation_parts(data.validation, data)
        reader = PartReader(parts, data.bad_documents == "skip")
        held_out, dropped = _encoded(reader, data, tokenizer, longest)
        validation = [held_out["validation"]]
        notes += reader.notes() + _dropped_note("config.data.validation", dropped)
    for entry, source in zip(weighted, opened, strict=True):
        if not len(source.train):
            reasons = "".join(f" ({note})" for note in source.notes)
            raise TrainingError(
                f"config.data.source = {entry.source!r} {no_document('train')}{reasons}"
            )
    tokens, mask = _validation_set(data, sequence_length, validation, tokenizer)
    train = tuple(
        TrainingSource(entry.source, source.train, entry.weight)
        for entry, source in zip(weighted, opened, strict=True)
    )
    # The n-gram models are fitted on one stream that fits in memory.
    alone = opened[0].train if len(opened) == 1 and opened[0].in_memory else None
    # A run resumes only with the same training tokens and the same validation set.
    identity = [tokenizer.fingerprint, *(source.fingerprint for source in opened), _hash(tokens)]
    return Corpus(
        train,
        tokens,
        mask,
        plain_ids(alone.stream()) if isinstance(alone, TokenShards) else None,
        tokenizer.pad_id,
        tokenizer.vocab_size,
        hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16],
        tuple(notes),
    )


def _open(source: str, config: DataConfig, tokenizer: Tokenizer, longest: int | None) -> _Source:
    skip = config.bad_documents == "skip"
    if is_prepared(source):
        prepared = open_prepared(source, tokenizer, skip, config.format)
        return _Source(
            prepared.train,
            prepared.validation if config.validation is None else None,
            prepared.fingerprint,
            prepared.notes,
        )
    if source.startswith("tfds:"):
        # Read and encoded by index while training: nothing is done in advance.
        train, validation, identity = tfds_texts(source, config, Tally("config.data.source", skip))
        return _Source(
            EncodedTexts(train, tokenizer),
            EncodedTexts(validation, tokenizer) if config.validation is None else None,
            json.dumps(identity),
            [],
        )
    parts, held_out = source_parts(source, config)
    # load_corpus reads config.data.validation once, for all sources.
    own: list[Part] = [part for part in parts if part.setting == "config.data.source"]
    reader = PartReader(own, skip, held_out)
    splits, dropped = _encoded(reader, config, tokenizer, longest)
    return _Source(
        splits["train"],
        splits["validation"] if config.validation is None else None,
        _hash(splits["train"].stream()),
        reader.notes() + _dropped_note("config.data.source", dropped),
        in_memory=True,
    )


def _hash(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()[:16]


def _encoded(
    reader: PartReader, config: DataConfig, tokenizer: Tokenizer, longest: int | None
) -> tuple[dict[str, TokenShards], int]:
    """Encodes all documents of a reader in memory, by split.

    Args:
        reader: reads the documents.
        config: the data group of a run's config.
        tokenizer: the run's tokenizer.
        longest: documents without a scored token among their first ``longest`` ones, of which the
            first is only an input, are dropped; None: none is.

    Returns:
        (the documents, number of those dropped).
    """
    documents: dict[str, list[np.ndarray]] = {"train": [], "validation": []}
    dropped = 0
    for chunk, encoded in encode_chunks(reader.chunks(), tokenizer, config.threads):
        for split, ids in zip(chunk.splits, encoded, strict=True):
            if longest is not None and not is_counted(ids[1:longest]).any():
                dropped += 1
            else:
                documents[split].append(ids)
    if config.validation is None and not documents["validation"] and len(documents["train"]) > 1:
        # Too few documents for one in a hundred: hold out the last one.
        documents["validation"].append(documents["train"].pop())
    dtype = token_dtype(tokenizer.vocab_size, marked=config.format != "text")
    splits = {
        split: TokenShards([make_shard(found, dtype, split)]) for split, found in documents.items()
    }
    return splits, dropped


def _dropped_note(setting: str, count: int) -> list[str]:
    if not count:
        return []
    return [
        f"{setting}: dropped {count:,} records whose prompts leave no room for a token of the "
        "answer in config.sequence_length"
    ]


def _validation_set(
    data: DataConfig, length: int, sources: list[Sequence[np.ndarray]], tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Builds the fixed validation set, with equal parts per source if its size is limited."""
    # Rounded up; the surplus is cut off below. 0 stays 0: no limit.
    limit = -(-data.max_eval_sequences // len(sources))
    rows: list[Row] = []
    for documents in sources:
        if not len(documents):
            raise TrainingError(f"config.data.source = {data.source!r} {no_document('validation')}")
        rows += _validation_rows(data, length, documents, limit, tokenizer.pad_id)
    rows = rows[: data.max_eval_sequences or len(rows)]
    tokens = np.stack([row.tokens for row in rows])
    check_ids(tokens, tokenizer.vocab_size, "the validation set")
    mask = np.stack([row.mask for row in rows])
    if not mask.any():
        raise TrainingError(
            f"config.data.source = {data.source!r}: the validation set has no token to "
            "predict (its documents are empty)."
        )
    return tokens, mask


def _validation_rows(
    data: DataConfig, length: int, documents: Sequence[np.ndarray], limit: int, pad_id: int
) -> list[Row]:
    if data.shape == "padded":
        count = min(len(documents), limit or MAX_VALIDATION_DOCUMENTS)
        return [padded_row(documents[i], length, pad_id) for i in range(count)]
    # Only as many documents are encoded as the limit needs.
    stream = np.concatenate(list(_enough(documents, limit * length + 1 if limit else None)))
    rows = consecutive_rows(stream, length, pad_id)
    return rows[: limit or len(rows)]


def _enough(documents: Sequence[np.ndarray], tokens: int | None) -> Iterator[np.ndarray]:
    """Yields documents until they hold the given number of tokens."""
    total = 0
    for i in range(min(len(documents), MAX_VALIDATION_DOCUMENTS)):
        yield documents[i]
        total += len(documents[i])
        if tokens is not None and total >= tokens:
            return
