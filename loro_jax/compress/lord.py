"""LoRD: projection of the outputs on their principal directions (arXiv 2309.14021).

Y = W x has the second moment W C W^T, where C is that of the inputs. With its leading eigenvectors
V, W is approximated by V (V^T W). Of all matrices of this rank, it has the smallest squared error
of the outputs on the calibration text.

The paper subtracts the mean of the outputs and adds it to the bias. Our projections have no bias,
so the moment is not centred: directions in which the mean is large are kept.
"""

from __future__ import annotations

import numpy as np

from loro_jax.compress.moments import Moments
from loro_jax.compress.svd import Pair, balanced

# Added to the inputs' moment, relative to its mean diagonal entry: with fewer tokens than inputs,
# it decides between directions that the text says nothing about, by the weight.
RIDGE = 1e-6


def from_outputs(W: np.ndarray, rank: int, moments: Moments | None) -> Pair:
    """Returns the pair of LoRD, balanced.

    Args:
        W: the weight, (m, n).
        rank: at most min(m, n).
        moments: moments of its inputs.
    """
    assert moments is not None  # compress checked it
    C = moments.second
    n = len(C)
    ridge = RIDGE * max(np.trace(C) / n, np.finfo(float).tiny)
    C = C + ridge * np.eye(n)
    if len(W) <= n:
        V = _leading(W @ C @ W.T, rank)
    else:
        # The smaller problem: with C = L L^T, the eigenvectors are W L times those of L^T W^T W L.
        WL = W @ np.linalg.cholesky(C)
        V = np.linalg.qr(WL @ _leading(WL.T @ WL, rank))[0]
    return balanced(V, V.T @ W)


def _leading(M: np.ndarray, count: int) -> np.ndarray:
    """Returns the eigenvectors of a symmetric matrix with the largest eigenvalues, by columns."""
    return np.linalg.eigh((M + M.T) / 2)[1][:, ::-1][:, :count]
