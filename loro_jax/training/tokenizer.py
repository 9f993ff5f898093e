"""Tokenizers: text to ids and back."""

from __future__ import annotations

import hashlib
import importlib.resources
import pathlib
from collections.abc import Sequence
from typing import Protocol

import sentencepiece

from loro_jax.training.errors import TrainingError


class Tokenizer(Protocol):
    """What the data pipeline needs of a tokenizer.

    Attributes:
        vocab_size: number of ids.
        eos_id: the id that ends a document.
        pad_id: the id that fills a short sequence.
        fingerprint: changes when the mapping from text to ids does.
    """

    vocab_size: int
    eos_id: int
    pad_id: int
    fingerprint: str

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids."""


class SentencePieceTokenizer:
    """A SentencePiece model file (T5's and LLaMA's format).

    Args:
        model: contents of the ``.model`` file.
        name: what errors call it.

    Raises:
        TrainingError: if the bytes are no SentencePiece model, or it has no end-of-text piece.
    """

    def __init__(self, model: bytes, name: str):
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise TrainingError(
                f"config.data.tokenizer = {name!r} is not a SentencePiece model."
            ) from None
        self.vocab_size = self._processor.vocab_size()
        self.eos_id = self._processor.eos_id()
        if self.eos_id < 0:
            raise TrainingError(f"config.data.tokenizer = {name!r} has no end-of-text piece (eos).")
        # LLaMA's models have no padding piece; padding is masked, so any id will do.
        self.pad_id = max(self._processor.pad_id(), 0)
        self.fingerprint = hashlib.sha256(model).hexdigest()[:16]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""
        return self._processor.encode(list(texts))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special pieces vanish."""
        return self._processor.decode([int(i) for i in ids])


class ByteTokenizer:
    """UTF-8 bytes: id = byte + 3, behind pad 0, eos 1, unknown 2 (ByT5's numbering).

    Example:
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.encode(["Hi"]), tokenizer.decode([75, 108, 1])
        ([[75, 108]], 'Hi')
    """

    vocab_size = 259
    pad_id = 0
    eos_id = 1
    fingerprint = "bytes"

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""
        return [[byte + 3 for byte in text.encode("utf-8")] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special ids vanish, broken sequences turn into U+FFFD."""
        return bytes(i - 3 for i in ids if i >= 3).decode("utf-8", errors="replace")


def load_tokenizer(name: str) -> Tokenizer:
    """Loads the tokenizer that ``config.data.tokenizer`` names.

    Args:
        name: "embedded", "bytes", or the path of a SentencePiece model.

    Returns:
        A tokenizer.

    Raises:
        TrainingError: if the file is missing or not a tokenizer.

    Example:
        >>> tokenizer = load_tokenizer("embedded")
        >>> tokenizer.decode(tokenizer.encode(["Call for the captain!"])[0])
        'Call for the captain!'
    """
    if name == "bytes":
        return ByteTokenizer()
    if name == "embedded":
        corpus = importlib.resources.files("loro_jax.training") / "corpus"
        return SentencePieceTokenizer((corpus / "tokenizer.model").read_bytes(), name)
    try:
        model = pathlib.Path(name).expanduser().read_bytes()
    except OSError as error:
        raise TrainingError(
            f"config.data.tokenizer = {name!r} can't be read ({error.strerror}); expected "
            '"embedded", "bytes" or the path of a SentencePiece model.'
        ) from None
    return SentencePieceTokenizer(model, name)
