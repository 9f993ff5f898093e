"""From texts to RoBERTa's ids: ``<s> a </s>``, or ``<s> a </s></s> b </s>``."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers.implementations import ByteLevelBPETokenizer
from tokenizers.processors import RobertaProcessing

from loro_jax.errors import TrainingError

FIRST, LAST, PAD = "<s>", "</s>", "<pad>"
# Texts that are encoded together, by all cores.
_TOGETHER = 4096


class Encoded(NamedTuple):
    """Encoded rows, one after the other.

    Attributes:
        ids: ids of all rows, int32.
        starts: where each row starts, and where the last one ends, int64.
    """

    ids: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Number of ids of each row."""
        return np.diff(self.starts)

    def padded(self, rows: np.ndarray, length: int, pad_id: int) -> np.ndarray:
        """Returns some rows as an array (rows, length), int32, padded at the end."""
        result = np.full((len(rows), length), pad_id, np.int32)
        for i, row in enumerate(rows):
            own = self.ids[self.starts[row] : self.starts[row + 1]]
            result[i, : len(own)] = own
        return result


class PairTokenizer:
    """A tokenizer that encodes one or two texts as RoBERTa's does.

    Args:
        path: a directory with ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``; or a
            ``tokenizer.json``.

    Attributes:
        vocab_size: number of ids.
        first_id: id of ``<s>``.
        last_id: id of ``</s>``.
        pad_id: the padding id.
        fingerprint: identifies the mapping from text to ids.

    Raises:
        TrainingError: if there is no such file, it can't be read, or has no ``<s>``, ``</s>`` and
            ``<pad>``.
    """

    def __init__(self, path: str):
        self._path = path
        self._tokenizer, content = _load(pathlib.Path(path).expanduser())
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.first_id, self.last_id, self.pad_id = map(self._id, (FIRST, LAST, PAD))
        # Set here: the file of another model's tokenizer, or of a bare one, has other rules.
        self._tokenizer.post_processor = RobertaProcessing(
            (LAST, self.last_id), (FIRST, self.first_id)
        )
        self._tokenizer.no_padding()

    def _id(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise TrainingError(
                f"config.data.tokenizer: {self._path} has no {token}; expected RoBERTa's tokenizer."
            )
        return found

    def encode(self, rows: Sequence[tuple[str, ...]], max_length: int) -> Encoded:
        """Encodes rows of one or two texts.

        Args:
            rows: the texts.
            max_length: the most ids of a row; the longer text of a pair is cut first.

        Returns:
            The encoded rows.
        """
        self._tokenizer.enable_truncation(max_length, strategy="longest_first")
        parts = [_ids(self._tokenizer, rows[i : i + _TOGETHER]) for i in _starts(rows)]
        return Encoded(
            np.concatenate([np.zeros(0, np.int32), *(ids for part in parts for ids in part)]),
            np.cumsum([0, *(len(ids) for part in parts for ids in part)], dtype=np.int64),
        )


def _starts(rows: Sequence[object]) -> Iterable[int]:
    return range(0, len(rows), _TOGETHER)


def _ids(tokenizer: tokenizers.Tokenizer, rows: Sequence[tuple[str, ...]]) -> list[np.ndarray]:
    inputs = [row[0] if len(row) == 1 else row for row in rows]
    return [np.array(one.ids, np.int32) for one in tokenizer.encode_batch(inputs)]


def _load(path: pathlib.Path) -> tuple[tokenizers.Tokenizer, bytes]:
    """Loads a tokenizer; returns it and the bytes that define it."""
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        if not file.is_file() and (path / "vocab.json").is_file():
            return _from_vocabulary(path / "vocab.json", path / "merges.txt")
        content = file.read_bytes()
    except OSError as error:
        raise TrainingError(
            f"config.data.tokenizer: {file} can't be read ({error.strerror}); expected a directory "
            "with tokenizer.json, or vocab.json and merges.txt."
        ) from None
    try:
        return tokenizers.Tokenizer.from_str(content.decode("utf-8")), content
    except Exception as error:  # tokenizers raises bare exceptions
        raise TrainingError(
            f"config.data.tokenizer: {file} is no tokenizer.json ({_line(error)})."
        ) from None


def _from_vocabulary(
    vocabulary: pathlib.Path, merges: pathlib.Path
) -> tuple[tokenizers.Tokenizer, bytes]:
    """Makes the tokenizer of the first checkpoints, byte-level BPE."""
    content = vocabulary.read_bytes() + merges.read_bytes()
    try:
        made = ByteLevelBPETokenizer(str(vocabulary), str(merges))
        # In texts, they are tokens too, as in RoBERTa's own.
        known = json.loads(vocabulary.read_bytes())
        special = [token for token in (FIRST, PAD, LAST, "<unk>", "<mask>") if token in known]
        made.add_special_tokens([*special])
    except Exception as error:  # tokenizers raises bare exceptions
        raise TrainingError(
            f"config.data.tokenizer: {vocabulary} and {merges.name} can't be read ({_line(error)})."
        ) from None
    return made._tokenizer, content


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
