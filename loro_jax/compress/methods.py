"""The table of the methods that make pairs of dense matrices.

A method is an entry here and, if it has its own rule for the pairs, a file of this folder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from loro_jax.compress.asvd import from_input_sizes
from loro_jax.compress.lord import from_outputs
from loro_jax.compress.moments import Moments
from loro_jax.compress.svd import Pair, from_weight


class Method(NamedTuple):
    """A method.

    Attributes:
        summary: what it does.
        pair: (W, rank, moments of its inputs) -> (B, A).
        needs_text: whether it needs these moments, which a text gives.
        by_spectrum: whether one threshold over all spectra chooses the ranks.
    """

    summary: str
    pair: Callable[[np.ndarray, int, Moments | None], Pair]
    needs_text: bool = False
    by_spectrum: bool = False


METHODS = {
    "svd": Method("truncated SVD of each weight", from_weight),
    "welore": Method("truncated SVD, ranks by the weights' spectra", from_weight, by_spectrum=True),
    "asvd": Method("SVD of weights scaled by their inputs' sizes", from_input_sizes, True),
    "lord": Method("principal directions of the outputs", from_outputs, True),
    "lord_welore": Method("lord, with the ranks of welore", from_outputs, True, True),
}
