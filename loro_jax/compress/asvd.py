"""Activation-aware SVD: columns of the weight are scaled by the size of their inputs.

ASVD (Yuan et al., arXiv 2312.05821): with S = diag(mean |x_i|)^alpha, W is approximated by the
truncated SVD of W S times S^-1, so that the error is smaller for large inputs. alpha is 0.5 there.

Whitening by the inputs' whole second moment (SVD-LLM, Wang et al., arXiv 2403.07378) minimises the
error of the outputs. Its product is that of lord.py: the truncated SVD of W C^(1/2) projects on the
leading eigenvectors of W C W^T.
"""

from __future__ import annotations

import numpy as np

from loro_jax.compress.moments import Moments
from loro_jax.compress.svd import Pair, balanced, truncated

ALPHA = 0.5

# Inputs that are always zero get this size, relative to the mean one.
_LEAST = 1e-6


def from_input_sizes(W: np.ndarray, rank: int, moments: Moments | None) -> Pair:
    """Returns the pair of ASVD.

    Args:
        W: the weight, (m, n).
        rank: at most min(m, n).
        moments: moments of its inputs.
    """
    assert moments is not None  # compress checked it
    sizes = moments.mean_size
    scale = np.maximum(sizes, _LEAST * max(sizes.mean(), np.finfo(float).tiny)) ** ALPHA
    B, A = truncated(W * scale, rank)
    return balanced(B, A / scale)
