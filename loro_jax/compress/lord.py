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
    ridge = RIDGE * max(np.trace(C) / len(C), np.finfo(float).tiny)
    outputs = W @ C @ W.T + ridge * (W @ W.T)
    V = np.linalg.eigh((outputs + outputs.T) / 2)[1][:, ::-1][:, :rank]
    return balanced(V, V.T @ W)
