"""From documents to batches of token ids: a function of (seed, step) alone.

Grain shuffles, batches and prefetches; its iterator's state is saved with every checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from loro_jax.training.config import Config
from loro_jax.training.documents import Corpus
from loro_jax.training.errors import TrainingError
from loro_jax.training.tokenizer import Tokenizer
from models.loss import Batch

# Documents read from a large source for its validation set: enough for ten million tokens.
MAX_VALIDATION_DOCUMENTS = 50_000


class TokenisedCorpus(NamedTuple):
    """A corpus as the step sees it.

    Attributes:
        train: Grain dataset of single sequences: dicts of ``tokens`` int32 (L + 1,) and ``mask``
            float32 (L,), endlessly repeated and shuffled anew in each epoch.
        validation_tokens: int32 (S, L + 1), the fixed validation set.
        validation_mask: float32 (S, L).
        train_stream: the training tokens in order, int32 (N,), or None for a large source.
        sequences_per_epoch: training sequences in one pass over the corpus.
        notes: what the user should know about the reading.
    """

    train: grain.MapDataset
    validation_tokens: np.ndarray
    validation_mask: np.ndarray
    train_stream: np.ndarray | None
    sequences_per_epoch: int
    notes: tuple[str, ...]


def tokenise(config: Config, corpus: Corpus, tokenizer: Tokenizer) -> TokenisedCorpus:
    """Cuts a corpus into training and validation sequences.

    Args:
        config: the run's config (``data``, ``sequence_length``, ``seed``, ``model.vocab_size``).
        corpus: its documents.
        tokenizer: its tokenizer.

    Returns:
        The sequences.

    Raises:
        TrainingError: if the tokenizer has more ids than the model, or the corpus is too small
            for one sequence, or "packed" is asked of a source that does not fit into memory.
    """
    if tokenizer.vocab_size > config.model.vocab_size:
        raise TrainingError(
            f"config.model.vocab_size = {config.model.vocab_size} is smaller than the vocabulary "
            f"of config.data.tokenizer = {config.data.tokenizer!r}, which has "
            f"{tokenizer.vocab_size} ids."
        )
    if config.data.shape == "packed" and not corpus.in_memory:
        raise TrainingError(
            f'config.data.shape = "packed" needs a source that fits into memory, but '
            f'config.data.source = {config.data.source!r} may not; use "padded".'
        )
    length = config.sequence_length
    held_out = min(len(corpus.validation), MAX_VALIDATION_DOCUMENTS)
    validation = [corpus.validation[i] for i in range(held_out)]
    if config.data.shape == "padded":
        train_stream = None
        texts = grain.MapDataset.source(corpus.train)
        sequences = (
            texts.seed(config.seed)
            .shuffle()
            .repeat()
            .map(lambda text: _padded_sequence(text, tokenizer, length))
        )
        epoch = len(corpus.train)
        rows = [_padded_sequence(text, tokenizer, length) for text in validation]
        val_tokens = np.stack([row["tokens"] for row in rows])
        val_mask = np.stack([row["mask"] for row in rows])
    else:
        train_stream = token_stream(corpus.train, tokenizer)
        val_tokens, val_mask = _windows(
            token_stream(validation, tokenizer), length, tokenizer.pad_id
        )
        if len(train_stream) <= length:
            raise TrainingError(
                f"config.data.source = {config.data.source!r} has {len(train_stream)} training "
                f"tokens, fewer than one sequence of config.sequence_length = {length} needs."
            )
        sequences, epoch = _packed_sequences(train_stream, length, config.seed)
    limit = config.data.max_eval_sequences or len(val_tokens)
    return TokenisedCorpus(
        sequences, val_tokens[:limit], val_mask[:limit], train_stream, epoch, corpus.notes
    )


def token_stream(texts: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    """All documents as one stream of ids, each closed by the end-of-text id, int32 (N,)."""
    chunks = [np.asarray([*ids, tokenizer.eos_id], np.int32) for ids in tokenizer.encode(texts)]
    return np.concatenate(chunks)


def _packed_sequences(stream: np.ndarray, length: int, seed: int) -> tuple[grain.MapDataset, int]:
    """Windows of the stream in random order, cut at another offset in each epoch."""
    count = max((len(stream) - length) // length, 1)
    spare = len(stream) - 1 - count * length

    def window(index: int, place: int) -> dict[str, np.ndarray]:
        offsets = np.random.default_rng((seed, index // count))
        start = place * length + int(offsets.integers(min(length, spare + 1)))
        tokens = stream[start : start + length + 1]
        return {"tokens": tokens, "mask": np.ones(length, np.float32)}

    order = grain.MapDataset.range(count).seed(seed).shuffle().repeat()
    return order.map_with_index(window), count


def _padded_sequence(text: str, tokenizer: Tokenizer, length: int) -> dict[str, np.ndarray]:
    ids = [*tokenizer.encode([text])[0], tokenizer.eos_id][: length + 1]
    tokens = np.full(length + 1, tokenizer.pad_id, np.int32)
    tokens[: len(ids)] = ids
    mask = np.zeros(length, np.float32)
    mask[: len(ids) - 1] = 1.0
    return {"tokens": tokens, "mask": mask}


def _windows(stream: np.ndarray, length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Consecutive windows that predict every token but the first, the last one padded."""
    count = -(-(len(stream) - 1) // length)
    padded = np.full(count * length + 1, pad_id, np.int32)
    padded[: len(stream)] = stream
    mask = np.zeros(count * length, np.float32)
    mask[: len(stream) - 1] = 1.0
    tokens = np.stack([padded[i * length : (i + 1) * length + 1] for i in range(count)])
    return tokens, mask.reshape(count, length)


def train_iterator(config: Config, corpus: TokenisedCorpus) -> grain.DatasetIterator:
    """An iterator over training batches, one a step, whose state can be saved and restored."""
    batches = corpus.train.batch(config.batch_size)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=max(config.data.prefetch, 1))
    if config.data.prefetch == 0:
        options = grain.ReadOptions(num_threads=0)
    return iter(batches.to_iter_dataset(options))


def to_batch(tokens: np.ndarray, mask: np.ndarray) -> Batch:
    """Inputs and targets of rows of L + 1 tokens."""
    return Batch(inputs=tokens[:, :-1], targets=tokens[:, 1:], mask=mask)


def validation_batches(corpus: TokenisedCorpus, batch_size: int) -> list[Batch]:
    """The validation set in batches of one shape; the last is filled up with masked rows."""
    tokens, mask = corpus.validation_tokens, corpus.validation_mask
    filler = -len(tokens) % batch_size
    tokens = np.concatenate([tokens, np.repeat(tokens[:1], filler, axis=0)])
    mask = np.concatenate([mask, np.zeros((filler, mask.shape[1]), np.float32)])
    return [
        to_batch(tokens[i : i + batch_size], mask[i : i + batch_size])
        for i in range(0, len(tokens), batch_size)
    ]
