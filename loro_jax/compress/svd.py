"""Truncated SVD of the weight: the pair nearest to it in the Frobenius norm (Eckart and Young)."""

from __future__ import annotations

import numpy as np

from loro_jax.compress.moments import Moments

Pair = tuple[np.ndarray, np.ndarray]


def truncated(W: np.ndarray, rank: int) -> Pair:
    """Returns the balanced pair B, A nearest to a matrix.

    Args:
        W: the matrix, (m, n).
        rank: at most min(m, n).

    Returns:
        (B, A) with B^T B = A A^T, the singular values kept.

    Example:
        >>> B, A = truncated(np.diag([3.0, 2.0, 1.0]), 2)
        >>> np.round(B @ A, 6).diagonal().tolist()
        [3.0, 2.0, 0.0]
    """
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    root = np.sqrt(S[:rank])
    return U[:, :rank] * root, root[:, None] * Vt[:rank]


def balanced(B: np.ndarray, A: np.ndarray) -> Pair:
    """Returns the balanced pair with the same product.

    Example:
        >>> B, A = balanced(np.array([[4.0], [0.0]]), np.array([[1.0, 0.0]]))
        >>> float(np.abs(B).max()), float(np.abs(A).max())
        (2.0, 2.0)
    """
    Q, R = np.linalg.qr(B)
    left, right = truncated(R @ A, B.shape[1])
    return Q @ left, right


def from_weight(W: np.ndarray, rank: int, moments: Moments | None) -> Pair:
    """Returns the truncated SVD, whatever the inputs are."""
    del moments
    return truncated(W, rank)
