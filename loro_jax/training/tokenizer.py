"""Tokenizers: text to ids and back.

``python -m loro_jax.training.tokenizer train SOURCE --out=FILE`` trains one.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import sentencepiece
import tokenizers

from loro_jax.training.errors import TrainingError
from loro_jax.training.tokenizer_conversion import (
    from_bytes,
    from_sentencepiece,
    tokenizer_files,
)


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

    def files(self) -> dict[str, bytes]:
        """Contents, by name, of the files that other programs read this tokenizer from."""


class SentencePieceTokenizer:
    """A SentencePiece model file (T5's and LLaMA's format).

    Args:
        model: contents of the ``.model`` file.
        name: what errors call it.
        eos_id: the end-of-text id; None: the model's.

    Raises:
        TrainingError: if the bytes are no SentencePiece model, or nothing says what ends a text.
    """

    def __init__(self, model: bytes, name: str, eos_id: int | None = None):
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise TrainingError(
                f"config.data.tokenizer = {name!r} is not a SentencePiece model."
            ) from None
        self._model = model
        self.vocab_size = self._processor.vocab_size()
        self.eos_id = self._processor.eos_id() if eos_id is None else eos_id
        if self.eos_id < 0:
            raise TrainingError(
                f"config.data.tokenizer = {name!r} has no end-of-text piece (eos); name an id with "
                "config.data.eos_id."
            )
        # LLaMA's models have no padding piece; padding is masked, so any id will do.
        self.pad_id = max(self._processor.pad_id(), 0)
        self.fingerprint = hashlib.sha256(model).hexdigest()[:16]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""
        # The callers have threads of their own.
        return self._processor.encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special pieces vanish."""
        return self._processor.decode([int(i) for i in ids])

    def files(self) -> dict[str, bytes]:
        """The model file and, made of it, a ``tokenizer.json`` with its config."""
        converted = from_sentencepiece(self._model)
        own = {"tokenizer.model": self._model}
        return own | tokenizer_files(converted, self.eos_id, self.pad_id)


class HuggingFaceTokenizer:
    """A ``tokenizer.json`` of Hugging Face's tokenizers library.

    Its special tokens are written nowhere in the file itself: they come from the arguments, or from
    ``tokenizer_config.json`` beside it, or are found by their usual names.

    Args:
        path: the file.
        name: what errors call it.
        eos_id: the end-of-text id; None: find it.
        pad_id: the padding id; None: find it, or take the end-of-text id (padding is masked).

    Raises:
        TrainingError: if the file is no tokenizer, or its end-of-text token can't be told.
    """

    def __init__(self, path: pathlib.Path, name: str, eos_id: int | None, pad_id: int | None):
        content = path.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception:  # the library raises nothing narrower
            raise TrainingError(
                f"config.data.tokenizer = {name!r} is not a tokenizer.json."
            ) from None
        self._content = content
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A text that holds the characters of a special token must not end a document.
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        beside = _special_tokens(path.with_name("tokenizer_config.json"))
        if eos_id is None:
            eos_id = self._find([beside.get("eos_token"), *_USUAL_EOS])
        if eos_id is None:
            raise TrainingError(
                f"config.data.tokenizer = {name!r} does not say which token ends a text; name its "
                "id with config.data.eos_id."
            )
        self.eos_id: int = eos_id
        if pad_id is None:
            pad_id = self._find([beside.get("pad_token"), *_USUAL_PAD])
        self.pad_id: int = eos_id if pad_id is None else pad_id
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]

    def _find(self, tokens: list[str | None]) -> int | None:
        ids = (self._tokenizer.token_to_id(token) for token in tokens if token is not None)
        return next((found for found in ids if found is not None), None)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [one.ids for one in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special tokens vanish."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def files(self) -> dict[str, bytes]:
        """The file as it was read, with a config that names its special tokens."""
        made = tokenizer_files(self._tokenizer, self.eos_id, self.pad_id)
        return made | {"tokenizer.json": self._content}


# In the order in which they are looked for.
_USUAL_EOS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[SEP]")
_USUAL_PAD = ("<pad>", "<|pad|>", "[PAD]")


def _special_tokens(path: pathlib.Path) -> dict[str, str]:
    """Special tokens by role; none where the file is missing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        raise TrainingError(f"{path}, beside the tokenizer, can't be read as JSON.") from None
    found: dict[str, str] = {}
    for role in ("eos_token", "pad_token"):
        token: Any = content.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[role] = token
    return found


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

    def files(self) -> dict[str, bytes]:
        """A ``tokenizer.json`` of bytes, with its config."""
        return tokenizer_files(from_bytes(), self.eos_id, self.pad_id)


def load_tokenizer(name: str, eos_id: int | None = None, pad_id: int | None = None) -> Tokenizer:
    """Loads the tokenizer that ``config.data.tokenizer`` names.

    Args:
        name: "embedded", "bytes", the path of a SentencePiece model, or that of a
            ``tokenizer.json`` or of a directory that holds one.
        eos_id: ``config.data.eos_id``: the id that ends a document; None: the tokenizer's own.
        pad_id: ``config.data.pad_id``: the id that fills a short sequence; None: its own.

    Returns:
        A tokenizer.

    Raises:
        TrainingError: if the file is missing or not a tokenizer, or an id is outside its
            vocabulary.

    Example:
        >>> tokenizer = load_tokenizer("embedded")
        >>> tokenizer.decode(tokenizer.encode(["Call for the captain!"])[0])
        'Call for the captain!'
    """
    tokenizer = _load(name, eos_id, pad_id)
    tokenizer.eos_id = tokenizer.eos_id if eos_id is None else eos_id
    tokenizer.pad_id = tokenizer.pad_id if pad_id is None else pad_id
    for field in ("eos_id", "pad_id"):
        value = getattr(tokenizer, field)
        if not 0 <= value < tokenizer.vocab_size:
            raise TrainingError(
                f"config.data.{field} = {value} is outside the vocabulary of config.data.tokenizer "
                f"= {name!r} (0 to {tokenizer.vocab_size - 1})."
            )
    return tokenizer


def _load(name: str, eos_id: int | None, pad_id: int | None) -> Tokenizer:
    if name == "bytes":
        return ByteTokenizer()
    if name == "embedded":
        corpus = importlib.resources.files("loro_jax.training") / "corpus"
        return SentencePieceTokenizer((corpus / "tokenizer.model").read_bytes(), name, eos_id)
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    try:
        if path.suffix == ".json":
            return HuggingFaceTokenizer(path, name, eos_id, pad_id)
        return SentencePieceTokenizer(path.read_bytes(), name, eos_id)
    except OSError as error:
        raise TrainingError(
            f"config.data.tokenizer = {name!r} can't be read ({error.strerror}); expected "
            '"embedded", "bytes", or the path of a SentencePiece model or a tokenizer.json.'
        ) from None


if __name__ == "__main__":
    from loro_jax.training.tokenizer_training import main

    sys.exit(main(sys.argv[1:]))
