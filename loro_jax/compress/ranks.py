"""Ranks of pairs: a fraction of every matrix or of its energy, or one threshold over all spectra.

A matrix m x n has m n parameters, its pair of rank r has r (m + n). The layers of a projection,
such as q, share one form: either all of them are pairs or none is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from loro_jax.errors import TrainingError

Shapes = Mapping[str, tuple[int, int]]

# Ranks of the layers of each projection; None: it stays dense.
Ranks = dict[str, list[int] | None]

# Singular values below this fraction of the largest are rounding errors of a float32 matrix.
_ROUNDING = 1e-6

# Steps of a bisection, enough for the last bit of a threshold.
_STEPS = 60


def parameters(ranks: Ranks, shapes: Shapes, layers: int) -> int:
    """Counts the parameters of all projections.

    Args:
        ranks: ranks of the layers of each projection.
        shapes: (outputs, inputs) of each projection.
        layers: number of layers.

    Example:
        >>> parameters({"q": [1, 2], "v": None}, {"q": (4, 4), "v": (2, 4)}, layers=2)
        40
    """
    total = 0
    for name, found in ranks.items():
        m, n = shapes[name]
        total += layers * m * n if found is None else sum(found) * (m + n)
    return total


def fixed_ranks(rank: int, shapes: Shapes, layers: int) -> Ranks:
    """Returns one rank for all, or the smaller side of a matrix that has less."""
    return {name: [min(rank, *shape)] * layers for name, shape in shapes.items()}


def proportional_ranks(keep: float, shapes: Shapes, layers: int) -> Ranks:
    """Returns ranks at which each pair has the fraction ``keep`` of its matrix's parameters.

    Args:
        keep: the fraction, between 0 and 1.
        shapes: (outputs, inputs) of each projection.
        layers: number of layers.

    Raises:
        TrainingError: if it is less than half a rank for a projection.

    Example:
        >>> proportional_ranks(0.5, {"q": (64, 64)}, layers=2)
        {'q': [16, 16]}
    """
    ranks: Ranks = {}
    for name, (m, n) in shapes.items():
        rank = round(keep * m * n / (m + n))
        if rank < 1:
            raise TrainingError(_too_small(keep, (m + n) / (m * n)))
        ranks[name] = [rank] * layers
    return ranks


def energy_ranks(
    energy: float, shapes: Shapes, layers: int, spectra: Mapping[str, Sequence[np.ndarray]]
) -> Ranks:
    """Returns the lowest ranks at which each pair has a share of its matrix's energy.

    The energy is the sum of squared singular values; values that are rounding errors do not count,
    so that the share 1 gives the rank that a matrix has. A projection whose pairs would not have
    fewer parameters than its matrices stays dense.

    Args:
        energy: the share, above 0 and at most 1.
        shapes: (outputs, inputs) of each projection.
        layers: number of layers.
        spectra: singular values of each layer of each projection, descending.

    Example:
        >>> spectra = {"q": [np.array([3.0, 1.0, 0.1, 0.0]), np.array([1.0, 0.0, 0.0, 0.0])]}
        >>> energy_ranks(0.9, {"q": (4, 4)}, 2, spectra)  # 9 of 10.01
        {'q': [2, 1]}
        >>> energy_ranks(1.0, {"q": (4, 4)}, 2, spectra)  # 3 and 1: as many parameters
        {'q': None}
    """

    def rank(spectrum: np.ndarray) -> int:
        present = spectrum[spectrum > _ROUNDING * spectrum[0]].astype(np.float64)
        squares = np.cumsum(present**2)
        # Those before a value hold less than the share. One is kept of a matrix of zeros.
        return int(np.sum(squares < energy * squares[-1])) + 1 if len(present) else 1

    ranks: Ranks = {}
    for name, (m, n) in shapes.items():
        found = [rank(one) for one in spectra[name]]
        ranks[name] = None if sum(found) * (m + n) >= layers * m * n else found
    return ranks


def threshold_ranks(
    keep: float,
    shapes: Shapes,
    layers: int,
    spectra: Callable[[], Mapping[str, Sequence[np.ndarray]]],
) -> Ranks:
    """Returns ranks by one threshold over the normalised spectra of all matrices (WeLore).

    Singular values of each matrix are scaled to the range from 0 to 1; those below the threshold
    are left out, and at least one is kept. A projection whose pairs would have more parameters than
    its matrices stays dense. The threshold is the lowest one with at most ``keep`` of the
    parameters.

    WeLore (Jaiswal et al., arXiv 2407.11239) decides matrix by matrix, and makes a pair of one that
    keeps less than half of its singular values. For square matrices that is the same number of
    parameters.

    Args:
        keep: the fraction of the parameters, between 0 and 1.
        shapes: (outputs, inputs) of each projection.
        layers: number of layers.
        spectra: returns the singular values of each layer of each projection, descending.

    Raises:
        TrainingError: if one rank for each matrix has more parameters.
    """
    scaled = {name: [_scaled(one) for one in found] for name, found in spectra().items()}
    total = sum(layers * m * n for m, n in shapes.values())

    def at(threshold: float) -> Ranks:
        ranks: Ranks = {}
        for name, (m, n) in shapes.items():
            found = [max(int((one >= threshold).sum()), 1) for one in scaled[name]]
            ranks[name] = None if sum(found) * (m + n) >= layers * m * n else found
        return ranks

    low, high = 0.0, 1.0
    least = parameters(at(high), shapes, layers) / total
    if least > keep:
        raise TrainingError(_too_small(keep, least))
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if parameters(at(middle), shapes, layers) > keep * total:
            low = middle
        else:
            high = middle
    return at(high)


def _scaled(spectrum: np.ndarray) -> np.ndarray:
    """Returns singular values scaled to the range from 0 to 1; equal ones become 1."""
    spread = spectrum.max() - spectrum.min()
    return (spectrum - spectrum.min()) / spread if spread else np.ones_like(spectrum)


def _too_small(keep: float, least: float) -> str:
    return (
        f"keep = {keep:g} can't be met: pairs of rank 1 have {least:.3g} of the parameters; "
        "expected more than that."
    )
