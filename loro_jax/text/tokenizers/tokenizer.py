"""Tokenizers: from text to ids and back.

``python -m loro_jax tokenizer SOURCE --out=FILE`` trains one.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import sentencepiece

from loro_jax.errors import TrainingError
from loro_jax.text.tokenizers.conversion import (
    from_bytes,
    from_sentencepiece,
    tokenizer_files,
    with_added_pieces,
    with_control_pieces,
)
from loro_jax.text.tokenizers.special_ids import Beside, SpecialIds, written_out
from loro_jax.text.tokenizers.tokenizer_json import HuggingFaceTokenizer


class Tokenizer(Protocol):
    """Interface of tokenizers.

    Attributes:
        vocab_size: number of ids.
        eos_id: the id that ends a document.
        eos_ids: all ids that end a generated text; ``eos_id`` is the first.
        pad_id: the padding id.
        bos_id: the beginning-of-text id; None: there is none.
        bos_ids: ids added before a prompt; usually ``bos_id`` alone.
        adds_bos: whether they are added by default.
        fingerprint: identifies the mapping from text to ids.
    """

    vocab_size: int
    eos_id: int
    eos_ids: tuple[int, ...]
    pad_id: int
    bos_id: int | None
    bos_ids: tuple[int, ...]
    adds_bos: bool
    fingerprint: str

    def encode(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Encodes texts without adding special ids; ``special``: special tokens become ids."""

    def encode_with_offsets(
        self, text: str, special: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Encodes a text; see :meth:`SpecialIds.encode_with_offsets`."""

    def encode_prompt(self, text: str, bos: bool | None = None, special: bool = False) -> list[int]:
        """Encodes a prompt; see :meth:`SpecialIds.encode_prompt`."""

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids; special ids and those outside the vocabulary are dropped."""

    def files(self) -> dict[str, bytes]:
        """Returns the tokenizer's files for other programs, contents by name."""


class SentencePieceTokenizer(SpecialIds):
    """A SentencePiece model file (T5's and LLaMA's format).

    Args:
        model: contents of the ``.model`` file.
        name: name in error messages.
        eos_id: the end-of-text id, or several; None: the model's.
        beside: special and added tokens from the files next to it; None: no such files.

    Raises:
        TrainingError: if the bytes are not a SentencePiece model, or has no known end of text.
    """

    def __init__(
        self,
        model: bytes,
        name: str,
        eos_id: int | Sequence[int] | None = None,
        beside: Beside | None = None,
    ):
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model or b"\0")
        except RuntimeError:
            raise TrainingError(
                f"config.data.tokenizer = {name!r} is not a SentencePiece model."
            ) from None
        self.name = name
        if beside is not None and beside.added:
            model = with_added_pieces(
                model, beside.added, {*beside.special, *beside.tokens.values()}
            )
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.vocab_size()
        tokens = {} if beside is None else beside.tokens
        found = self._named(tokens.get("eos"), self._processor.eos_id())
        # Ids from the config come first, then the name in the files next to the model, then the
        # model's.
        given = [eos_id] if isinstance(eos_id, int) else list(eos_id or ())
        self.eos_ids = tuple(given or [found])
        self.eos_id = self.eos_ids[0]
        if self.eos_id < 0:
            raise TrainingError(
                f"config.data.tokenizer = {name!r} has no end-of-text piece (eos); name an id with "
                "config.data.eos_id."
            )
        self._model = model
        own, inside = self._processor, [i for i in self.eos_ids if i < self.vocab_size]
        # An end-of-text piece of another type would be produced by its text in a document.
        if not all(own.is_control(i) or own.is_unknown(i) or own.is_byte(i) for i in inside):
            self._model = with_control_pieces(model, inside)
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        # LLaMA's models have no padding piece; padding is masked, so any id works.
        self.pad_id = max(self._named(tokens.get("pad"), self._processor.pad_id()), 0)
        bos = self._named(tokens.get("bos"), self._processor.bos_id())
        if bos >= 0:
            self.bos_id, self.bos_ids = bos, (bos,)
            # The model file doesn't say; LLaMA adds it, unless a file next to it says otherwise.
            says = None if beside is None else beside.adds_bos
            self.adds_bos = True if says is None else says
        self._control = {
            self._processor.id_to_piece(i): i
            for i in range(self.vocab_size)
            if self._processor.is_control(i)
        }
        self.fingerprint = hashlib.sha256(self._model).hexdigest()[:16]

    def _named(self, token: str | None, otherwise: int) -> int:
        """Returns the id of a piece, or ``otherwise`` if the model does not have it."""
        found = self._processor.unk_id() if token is None else self._processor.piece_to_id(token)
        return otherwise if found == self._processor.unk_id() else found

    def encode(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Encodes texts without adding special ids; ``special``: special tokens become ids."""
        if special:
            return [self._with_special(text) for text in texts]
        # The callers use threads already.
        return self._processor.encode(list(texts), num_threads=1)

    def _pieces(self, text: str) -> Any:
        """Returns the pieces of a text; each has an ``id`` and the ``surface`` it covers."""
        own: Any = self._processor
        old = getattr(own, "encode_as_immutable_proto", None)  # before sentencepiece 0.2.2
        return (own.encode_as_proto if old is None else old)(text).pieces

    def _with_special(self, text: str) -> list[int]:
        ids: list[int] = []
        for part, token in written_out(text, self._control):
            ids += self._processor.encode(part)
            ids += [] if token is None else [token]
        return ids

    def encode_with_offsets(
        self, text: str, special: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Encodes a text; see :meth:`SpecialIds.encode_with_offsets`."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        start = 0
        for part, token in written_out(text, self._control) if special else [(text, None)]:
            for piece in self._pieces(part):
                ids.append(piece.id)
                # Their own begin and end are in bytes or characters, by the library's version.
                offsets.append((start, start + len(piece.surface)))
                start = offsets[-1][1]
            if token is not None:
                ids.append(token)
                offsets.append((start, start + len(self._processor.id_to_piece(token))))
                start = offsets[-1][1]
        return ids, offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids; special pieces and ids outside the vocabulary are dropped."""
        # A model's padded vocabulary has ids that the tokenizer does not know.
        return self._processor.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def files(self) -> dict[str, bytes]:
        """Returns the model file, and a converted ``tokenizer.json`` with its config."""
        converted = from_sentencepiece(self._model)
        own = {"tokenizer.model": self._model}
        return own | tokenizer_files(
            converted, self.eos_id, self.pad_id, self.bos_id, self.adds_bos
        )


class ByteTokenizer(SpecialIds):
    """UTF-8 bytes: id = byte + 3, after pad 0, eos 1, unknown 2 (ByT5's numbering).

    Example:
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.encode(["Hi"]), tokenizer.decode([75, 108, 1])
        ([[75, 108]], 'Hi')
    """

    vocab_size = 259
    pad_id = 0
    eos_id = 1
    eos_ids: tuple[int, ...] = (1,)
    fingerprint = "bytes"
    name = "bytes"
    _NAMES: ClassVar = {"<pad>": 0, "</s>": 1, "<unk>": 2}

    def encode(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Encodes texts without end-of-text ids; ``special``: special tokens become ids."""
        names = self._NAMES if special else {}
        result = []
        for text in texts:
            ids: list[int] = []
            for part, token in written_out(text, names):
                ids += [byte + 3 for byte in part.encode("utf-8")]
                ids += [] if token is None else [token]
            result.append(ids)
        return result

    def encode_with_offsets(
        self, text: str, special: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Encodes a text; see :meth:`SpecialIds.encode_with_offsets`."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        start = 0
        for part, token in written_out(text, self._NAMES if special else {}):
            for place, character in enumerate(part, start):
                found = character.encode("utf-8")
                ids += [byte + 3 for byte in found]
                offsets += [(place, place + 1)] * len(found)
            start += len(part)
            if token is not None:
                length = next(len(name) for name, i in self._NAMES.items() if i == token)
                ids.append(token)
                offsets.append((start, start + length))
                start += length
        return ids, offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids; special and unknown ones are dropped, invalid bytes become U+FFFD."""
        kept = bytes(i - 3 for i in ids if 3 <= i < self.vocab_size)
        return kept.decode("utf-8", errors="replace")

    def files(self) -> dict[str, bytes]:
        """Returns a ``tokenizer.json`` of bytes, with its config."""
        return tokenizer_files(from_bytes(), self.eos_id, self.pad_id)


def load_tokenizer(
    name: str,
    eos_id: int | Sequence[int] | None = None,
    pad_id: int | None = None,
    sources: Mapping[int, str] | None = None,
) -> Tokenizer:
    """Loads the tokenizer that ``config.data.tokenizer`` names.

    Args:
        name: "embedded", "bytes", the path of a SentencePiece model, or that of a
            ``tokenizer.json`` or of a directory that holds either.
        eos_id: ``config.data.eos_id``: the end-of-text id; None: the tokenizer's. Of several, the
            first one ends documents, and any of them ends a generated text.
        pad_id: ``config.data.pad_id``: the padding id; None: the tokenizer's.
        sources: where end-of-text ids come from, for messages, if not from ``config.data.eos_id``.

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
    given = [eos_id] if isinstance(eos_id, int) else list(eos_id or ())
    tokenizer = _load(name, given, pad_id)
    if given:
        tokenizer.eos_id, tokenizer.eos_ids = given[0], tuple(dict.fromkeys(given))
    tokenizer.pad_id = tokenizer.pad_id if pad_id is None else pad_id
    # Checked here, because JAX clamps indices that are out of range without a word.
    checked = [("eos_id", one) for one in tokenizer.eos_ids] + [("pad_id", tokenizer.pad_id)]
    for field, value in checked:
        if not 0 <= value < tokenizer.vocab_size:
            known = (sources or {}).get(value) if field == "eos_id" else None
            raise TrainingError(
                f"{known or f'config.data.{field}'} = {value} is outside the vocabulary of "
                f"config.data.tokenizer = {name!r} (0 to {tokenizer.vocab_size - 1})."
            )
    return tokenizer


def vocabulary_size(name: str) -> int:
    """Returns the number of ids of the tokenizer that ``config.data.tokenizer`` names.

    Raises:
        TrainingError: if the file is missing or not a tokenizer.

    Example:
        >>> vocabulary_size("bytes")
        259
    """
    # Not every tokenizer says which ids end a text, or pad it; any will do.
    return _load(name, [0], 0).vocab_size


def _load(name: str, eos_ids: list[int], pad_id: int | None) -> Tokenizer:
    if name == "bytes":
        return ByteTokenizer()
    if name == "embedded":
        corpus = importlib.resources.files("loro_jax.text") / "corpus"
        return SentencePieceTokenizer((corpus / "tokenizer.model").read_bytes(), name, eos_ids)
    path = pathlib.Path(name).expanduser()
    try:
        path = _file_in(path) if path.is_dir() else path
        if path.suffix.lower() == ".json":
            return HuggingFaceTokenizer(path, name, eos_ids, pad_id)
        return SentencePieceTokenizer(path.read_bytes(), name, eos_ids, Beside(path.parent))
    except OSError as error:
        raise TrainingError(
            f"config.data.tokenizer = {name!r} can't be read ({error.strerror}); expected "
            '"embedded", "bytes", or the path of a SentencePiece model or a tokenizer.json.'
        ) from None


def _file_in(directory: pathlib.Path) -> pathlib.Path:
    """Finds the tokenizer in a directory: a tokenizer.json, or else a SentencePiece model."""
    usual = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
    found = [directory / name for name in usual if (directory / name).is_file()]
    found = found or sorted(directory.glob("*.model"))
    return found[0] if found else directory / "tokenizer.json"
