"""An account of the documents that were read, and of those that could not be."""

from __future__ import annotations

import collections
from typing import Any

from loro_jax.errors import TrainingError

# Share of bad documents beyond which reading stops, unless told to go on.
MOST_BAD = 0.001


class Tally:
    """Counts good and bad documents, and stops the reading when too many are bad.

    Args:
        setting: what errors call the files ("config.data.source").
        skip: whether to go on however many are bad.

    Attributes:
        good: documents read.
        bad: counts of bad ones by reason.
        first: file, place and reason of the first bad one, or None.

    Example:
        >>> tally = Tally("config.data.source", skip=True)
        >>> tally.add_bad("a.jsonl", "line 3", "not a JSON object")
        >>> tally.close()
        >>> tally.report()
        'config.data.source: skipped 1 of 1 documents (1 not a JSON object)'
    """

    def __init__(self, setting: str, skip: bool):
        self._setting = setting
        self._skip = skip
        self.good = 0
        self.bad: collections.Counter[str] = collections.Counter()
        self.first: str | None = None

    def add_bad(self, path: str, place: str, reason: str, count: int = 1) -> None:
        """Counts a document that could not be read, or several from a place on.

        Raises:
            TrainingError: if this makes too many of the first thousand, or of all since.
        """
        self._count(path, place, reason, count)
        self._judge(at_least=round(1 / MOST_BAD))

    def add_lost(self, path: str, place: str, reason: str) -> None:
        """Counts, as one, all documents behind a place from where a file can't be read.

        Raises:
            TrainingError: unless all is skipped: nobody knows how many they are.
        """
        self._count(path, place, reason)
        self._stop()

    def close(self) -> None:
        """Judges all that has been read.

        Raises:
            TrainingError: if too much of it was bad.
        """
        self._judge()

    def counts(self) -> dict[str, Any]:
        """All it has counted, as JSON takes it."""
        return {"good": self.good, "bad": dict(self.bad), "first": self.first}

    def restore(self, counts: dict[str, Any]) -> None:
        """Goes back to what :meth:`counts` returned."""
        self.good, self.first = counts["good"], counts["first"]
        self.bad = collections.Counter(counts["bad"])

    def report(self) -> str | None:
        """A line on what was skipped; None if nothing was."""
        if not self.bad:
            return None
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.bad.most_common())
        total = self.good + self.bad.total()
        return f"{self._setting}: skipped {self.bad.total()} of {total} documents ({reasons})"

    def _count(self, path: str, place: str, reason: str, count: int = 1) -> None:
        self.bad[reason] += count
        self.first = self.first or f"{path}, {place}: {reason}"

    def _judge(self, at_least: int = 0) -> None:
        if self.bad.total() > MOST_BAD * max(self.good + self.bad.total(), at_least):
            self._stop()

    def _stop(self) -> None:
        if not self._skip:
            raise TrainingError(
                f"{self._setting}: {self.first} ({self.bad.total()} bad of "
                f"{self.good + self.bad.total()} documents so far; {MOST_BAD:.1%} may be, or any "
                'number with config.data.bad_documents = "skip").'
            )
