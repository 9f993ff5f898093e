"""Documents of which only some tokens are scored: trained on, and counted in a perplexity.

A text marks its scored characters by spans. Its ids mark the other tokens, its context, by their
sign: -1 - id instead of id. So everything that stores, cuts or joins documents treats both alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Span = tuple[int, int]


class Marked(str):
    """A document of which only some spans are scored.

    Args:
        text: the document.
        spans: (start, end) of each, in characters.
        rendered: whether a chat template has written it: special tokens in it become their ids, and
            no end-of-text token is added. Otherwise it is plain text, whose end-of-text token is
            scored.

    Example:
        >>> document = Marked("1 + 1 = 2", [(8, 9)])
        >>> document == "1 + 1 = 2", document.spans
        (True, ((8, 9),))
    """

    spans: tuple[Span, ...]
    rendered: bool

    def __new__(cls, text: str, spans: Iterable[Span], rendered: bool = False) -> Marked:
        """Creates a document."""
        document = super().__new__(cls, text)
        document.spans = tuple(spans)
        document.rendered = rendered
        return document


def counted_tokens(offsets: Sequence[Span], spans: Sequence[Span]) -> np.ndarray:
    """Returns whether each token overlaps a span, bool (n,).

    Args:
        offsets: (start, end) of each token, in characters.
        spans: the scored spans.

    Example:
        >>> counted_tokens([(0, 2), (2, 5), (5, 6)], [(4, 6)]).tolist()
        [False, True, True]
    """
    starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    # A character of several tokens may leave all but one of them without width.
    ends = np.maximum(ends, starts + 1)
    counted = np.zeros(len(starts), bool)
    for start, end in spans:
        counted |= (starts < end) & (ends > start)
    return counted


def mark(ids: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Marks the tokens that are context, by the sign of their ids, int32."""
    return np.where(counted, ids, ~ids).astype(np.int32)


def plain_ids(ids: Any) -> Any:
    """Returns ids without marks; the array itself if it has none."""
    return ids if np.asarray(ids).dtype.kind == "u" else np.where(ids < 0, ~ids, ids)


def is_counted(ids: np.ndarray) -> np.ndarray:
    """Returns whether each token is scored, bool."""
    return ids >= 0
