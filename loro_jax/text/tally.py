"""Counts of documents that were read, and of those that could not be."""

from __future__ import annotations

import collections
from typing import Any

from loro_jax.errors import TrainingError

# Share of bad documents above which reading stops, unless they are to be skipped.
MOST_BAD = 0.001


class Tally:
    """Counts good and bad documents, and stops reading if too many are bad.

    Args:
        setting: the config field that names the files ("config.data.source").
        skip: whether to continue however many are bad.

    Attributes:
        good: documents read.
        bad: numbers of bad documents by reason.
        first: file, place and reason of the first bad document, or None.

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
        """Counts one unreadable document, or several from a place on.

        Raises:
            TrainingError: if too many documents are bad, of the first thousand or of all so far.
        """
        self._count(path, place, reason, count)
        self._judge(at_least=round(1 / MOST_BAD))

    def add_lost(self, path: str, place: str, reason: str) -> None:
        """Counts all documents after a place from which a file can't be read as one bad document.

        Raises:
            TrainingError: unless bad documents are skipped, because their number is unknown.
        """
        self._count(path, place, reason)
        self._stop()

    def close(self) -> None:
        """Checks the share of bad documents at the end.

        Raises:
            TrainingError: if too many documents are bad.
        """
        self._judge()

    def counts(self) -> dict[str, Any]:
        """Returns the counts in a JSON-compatible form."""
        return {"good": self.good, "bad": dict(self.bad), "first": self.first}

    def restore(self, counts: dict[str, Any]) -> None:
        """Restores counts returned by :meth:`counts`."""
        self.good, self.first = counts["good"], counts["first"]
        self.bad = collections.Counter(counts["bad"])

    def report(self) -> str | None:
        """Returns a line on the skipped documents; None if there are none."""
        if not self.bad:
            return None
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.bad.most_common())
        total = self.good + self.bad.total()
        return f"{self._setting}: skipped {self.bad.total()} of {total} documents ({reasons})"

    def _count(self, path: str, place: str, reason: str, count: int = 1) -> None:
        self.bad[reason] += count
        self.first = self.first or f"{path}, {place}: {reason}"

    def _judge(self, at_least: int = 0) -> None:
        # While reading, the share is of a thousand documents at least: one early bad document is
        # not yet too many.
        if self.bad.total() > MOST_BAD * max(self.good + self.bad.total(), at_least):
            self._stop()

    def _stop(self) -> None:
        if not self._skip:
            raise TrainingError(
                f"{self._setting}: {self.first} ({self.bad.total()} bad of "
                f"{self.good + self.bad.total()} documents so far; {MOST_BAD:.1%} is allowed, or "
                'any number with config.data.bad_documents = "skip").'
            )
