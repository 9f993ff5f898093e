"""Sequential reading of the parts of a source, resumable at any document.

A part is a file or a range of records and is always read from its beginning. All documents of a
source have one fixed order; an interrupted reading resumes from a :class:`Position`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from loro_jax.text.readers import Tally

# One document in a hundred is held out if no validation set is given.
VALIDATION_SHARE = 100

# Limits of a chunk: it ends when either is reached.
_CHUNK_DOCUMENTS = 256
_CHUNK_CHARACTERS = 1 << 20


class Part(NamedTuple):
    """A part of a source.

    Attributes:
        name: its name, usually a path.
        size: bytes or records; part of the part's identity.
        setting: the config field that names the source ("config.data.source").
        split: "train", "validation", or None: decided per document by a hash of its text.
        read: yields its texts and counts them in a tally.
    """

    name: str
    size: int
    setting: str
    split: str | None
    read: Callable[[Tally], Iterator[str]]


class Position(NamedTuple):
    """A position between two documents.

    Attributes:
        part: index of the part.
        documents: number of documents of that part before the position.
        counts: counts of the tallies, by setting, at the beginning of the part.
    """

    part: int
    documents: int
    counts: dict[str, Any]


class Chunk(NamedTuple):
    """Consecutive documents, encoded together.

    Attributes:
        splits: "train" or "validation", for each document.
        texts: the documents.
        end: the position after the last one.
    """

    splits: list[str]
    texts: list[str]
    end: Position


def digest(text: str) -> int:
    """Returns 64 bits of a text's hash."""
    whole = hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(whole[:8], "big")


class PartReader:
    """Reads parts.

    Args:
        parts: what to read, in this order.
        skip: whether to continue however many documents are bad.
        held_out: digests of texts that are excluded from the training split.

    Example:
        >>> part = Part("a", 2, "SOURCE", "train", lambda tally: iter(["one", "two"]))
        >>> [chunk.texts for chunk in PartReader([part], skip=False).chunks()]
        [['one', 'two']]
    """

    def __init__(self, parts: Sequence[Part], skip: bool, held_out: frozenset[int] = frozenset()):
        self._parts = parts
        self._held_out = held_out
        # Training and validation files may be named by different settings, and are judged apart.
        self._tallies = {part.setting: Tally(part.setting, skip) for part in parts}

    def chunks(self, start: Position | None = None) -> Iterator[Chunk]:
        """Yields all documents after a position (by default all), in order.

        Raises:
            TrainingError: from the tallies.
        """
        if start is not None:
            for setting, counts in start.counts.items():
                self._tallies[setting].restore(counts)
        first, passed = (0, 0) if start is None else (start.part, start.documents)
        for number in range(first, len(self._parts)):
            yield from self._chunks_of(number, passed if number == first else 0)
        for tally in self._tallies.values():
            tally.close()

    def _chunks_of(self, number: int, passed: int) -> Iterator[Chunk]:
        part = self._parts[number]
        # Counts at the beginning of the part: a resumed reading starts there, and counts what it
        # passes over again.
        counts = {setting: tally.counts() for setting, tally in self._tallies.items()}
        splits: list[str] = []
        texts: list[str] = []
        characters, seen = 0, 0
        for text in part.read(self._tallies[part.setting]):
            seen += 1
            # Compressed files can't be entered in the middle: passed documents are read, not
            # encoded.
            if seen <= passed:
                continue
            split = self._split(part, text)
            if split is None:
                continue
            splits.append(split)
            texts.append(text)
            characters += len(text)
            if len(texts) == _CHUNK_DOCUMENTS or characters >= _CHUNK_CHARACTERS:
                yield Chunk(splits, texts, Position(number, seen, counts))
                splits, texts, characters = [], [], 0
        if texts:
            yield Chunk(splits, texts, Position(number, seen, counts))

    def _split(self, part: Part, text: str) -> str | None:
        # Hashing takes time, so it is done only where it decides something.
        if part.split == "validation" or (part.split and not self._held_out):
            return part.split
        number = digest(text)
        if number in self._held_out:
            return None
        # By the text alone: copies of a document always fall into the same split, and order,
        # threads and interruptions don't matter.
        if part.split is None and number % VALIDATION_SHARE == 0:
            return "validation"
        return "train"

    def notes(self) -> list[str]:
        """Returns one line per setting on the documents that were skipped."""
        reports = [tally.report() for tally in self._tallies.values()]
        return [report for report in reports if report is not None]

    def bad(self) -> dict[str, int]:
        """Returns the number of bad documents by reason."""
        total: dict[str, int] = {}
        for tally in self._tallies.values():
            for reason, count in tally.bad.items():
                total[reason] = total.get(reason, 0) + count
        return total
