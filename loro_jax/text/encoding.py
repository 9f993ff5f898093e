"""Parallel encoding of texts to ids, in order."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from loro_jax.errors import TrainingError
from loro_jax.text.documents import Chunk
from loro_jax.text.marked import Marked, counted_tokens, mark
from loro_jax.text.tokenizers.tokenizer import Tokenizer


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def token_dtype(vocab_size: int, marked: bool = False) -> Any:
    """Returns the dtype of ids: uint16 up to 65,536, or uint32; int32 if they may be marked."""
    if marked:
        return np.int32
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def encode_document(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Encodes one document, closed by the end-of-text id, int32 (n,); marked if the text is."""
    return _encode([text], tokenizer)[0]


def encode_chunks(
    chunks: Iterable[Chunk], tokenizer: Tokenizer, threads: int = 0, bos: bool = False
) -> Iterator[tuple[Chunk, list[np.ndarray]]]:
    """Encodes chunks in several threads (tokenizers release Python's GIL).

    Args:
        chunks: chunks of documents.
        tokenizer: their tokenizer.
        threads: number of threads; 0: one per core.
        bos: whether each text begins with the beginning-of-text ids. (A prompt with its answer
            does if the tokenizer adds them, a rendered chat never does.)

    Yields:
        Each chunk, in order, with the ids of its documents, each closed by the end-of-text id and
        of dtype :func:`token_dtype`; those of :class:`Marked` texts are marked.

    Raises:
        TrainingError: if the tokenizer yields an id outside its vocabulary.
    """
    threads = threads or available_cores()
    dtype = token_dtype(tokenizer.vocab_size)
    begin = tokenizer.bos_ids if bos else ()
    waiting: collections.deque[tuple[Chunk, Future[list[np.ndarray]]]] = collections.deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="encode") as pool:
        try:
            for chunk in chunks:
                waiting.append((chunk, pool.submit(_encode, chunk.texts, tokenizer, dtype, begin)))
                # Bounded, so that reading does not run ahead of encoding until memory is full.
                # Results are taken in the order in which they were submitted.
                if len(waiting) > 2 * threads:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            # Also when the consumer stops early: this runs when the generator is closed.
            pool.shutdown(cancel_futures=True)


def _encode(
    texts: list[str],
    tokenizer: Tokenizer,
    dtype: Any = np.int32,
    begin: tuple[int, ...] = (),
) -> list[np.ndarray]:
    documents = []
    if any(isinstance(text, Marked) for text in texts):
        return [_encode_marked(text, tokenizer) for text in texts]
    for ids in tokenizer.encode(texts):
        # In int64, so that a wrong id is found by check_ids before a narrow dtype would wrap it.
        document = np.empty(len(begin) + len(ids) + 1, np.int64)
        document[: len(begin)] = begin
        document[len(begin) : -1] = ids
        document[-1] = tokenizer.eos_id
        check_ids(document, tokenizer.vocab_size, "the tokenizer's output")
        documents.append(document.astype(dtype))
    return documents


def _encode_marked(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Encodes a text with spans, int32; tokens outside the spans are marked as context."""
    if not isinstance(text, Marked):
        return encode_document(text, tokenizer)
    # As one text: cut at the spans, other tokens would result than in a prompt.
    found, offsets = tokenizer.encode_with_offsets(text, special=text.rendered)
    counted = counted_tokens(offsets, text.spans)
    ids = np.array(found, np.int64)
    if not text.rendered:
        begin = tokenizer.bos_ids if tokenizer.adds_bos else ()
        ids = np.concatenate([np.array(begin, np.int64), ids, [tokenizer.eos_id]])
        counted = np.concatenate([np.zeros(len(begin), bool), counted, [True]])
    check_ids(ids, tokenizer.vocab_size, "the tokenizer's output")
    return mark(ids, counted)


def check_ids(ids: np.ndarray, vocab_size: int, place: str) -> None:
    """Raises TrainingError for an id outside the vocabulary, which JAX would not report."""
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        wrong = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        raise TrainingError(
            f"token id {wrong} in {place} is outside the vocabulary of config.data.tokenizer "
            f"(0 to {vocab_size - 1})."
        )
