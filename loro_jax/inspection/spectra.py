"""Singular values of pairs and dense matrices, and what is read off them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

# The SVD of a dense matrix with a larger smaller side is computed in float32, in half the time;
# its singular values are then accurate to 1e-6 of the largest.
_FLOAT64_SIDE = 1024


def of_pair(B: np.ndarray, A: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Computes the singular values of a pair's product and of its factors, in float64.

    Ranks that are zero in both factors are padding, and are left out. Of factors that are not
    finite, all are NaN.

    Args:
        B: (m, r).
        A: (r, n).

    Returns:
        (those of B A, those of B, those of A), each in descending order.

    Example:
        >>> product, left, right = of_pair(np.diag([3.0, 2.0, 0.0]), np.diag([2.0, 1.0, 0.0]))
        >>> np.round(product, 6).tolist(), np.round(left, 6).tolist()
        ([6.0, 2.0], [3.0, 2.0])
    """
    B, A = np.asarray(B, np.float64), np.asarray(A, np.float64)
    if not (np.isfinite(B).all() and np.isfinite(A).all()):
        nothing = np.full(min(*B.shape, *A.shape), np.nan)
        return nothing, nothing, nothing
    used = B.any(axis=0) | A.any(axis=1)
    if used.any():
        B, A = B[:, used], A[used]
    # Orthonormal factors do not change singular values: those of B A are those of R_B R_A^T, which
    # is r x r.
    R_B: Any = np.linalg.qr(B, mode="r")
    R_A: Any = np.linalg.qr(A.T, mode="r")
    found = [np.linalg.svd(M, compute_uv=False) for M in (R_B @ R_A.T, R_B, R_A)]
    return found[0], found[1], found[2]


def of_dense(W: np.ndarray) -> np.ndarray:
    """Computes the singular values of a dense matrix, in descending order, as float64."""
    dtype = np.float64 if min(W.shape) <= _FLOAT64_SIDE else np.float32
    return np.linalg.svd(np.asarray(W, dtype), compute_uv=False).astype(np.float64)


def condition(values: np.ndarray) -> float:
    """Returns the largest singular value over the smallest; infinite if the smallest is zero.

    Example:
        >>> condition(np.array([3.0, 2.0])), condition(np.array([1.0, 0.0]))
        (1.5, inf)
    """
    return float(values[0] / values[-1]) if values[-1] > 0 else math.inf


def norm(values: np.ndarray) -> float:
    """Returns the Frobenius norm."""
    return float(np.linalg.norm(values))


def stable_rank(values: np.ndarray) -> float:
    """Returns the squared Frobenius norm over the squared spectral norm; 0 for a zero matrix.

    Example:
        >>> stable_rank(np.array([2.0, 2.0, 0.0]))
        2.0
    """
    return 0.0 if values[0] == 0 else float(np.sum((values / values[0]) ** 2))


def rank_of_energy(values: np.ndarray, share: float = 0.99) -> int:
    """Returns how many singular values hold this share of the squared Frobenius norm.

    Example:
        >>> rank_of_energy(np.array([10.0, 1.0, 0.1]))
        1
    """
    squares = np.cumsum(values**2)
    return int(np.searchsorted(squares, share * squares[-1])) + 1 if squares[-1] > 0 else 0
