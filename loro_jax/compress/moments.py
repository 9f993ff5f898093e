"""Moments of the inputs of a projection."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """Moments of a projection's inputs x over the calibration text.

    Attributes:
        second: mean of ``x x^T``, float64 (n, n).
        mean_size: mean of ``|x|``, float64 (n,).
    """

    second: np.ndarray
    mean_size: np.ndarray


def output_error(W: np.ndarray, product: np.ndarray, moments: Moments) -> float:
    """Returns the relative error of the outputs, ``|(W - B A) x| / |W x|`` in root mean square.

    Args:
        W: the weight, (m, n).
        product: its approximation B A.
        moments: moments of its inputs.

    Example:
        >>> W, half = np.diag([1.0, 2.0]), np.diag([1.0, 0.0])
        >>> output_error(W, half, Moments(np.diag([4.0, 0.0]), np.array([2.0, 0.0])))
        0.0
    """

    def squared(M: np.ndarray) -> float:
        return max(float(np.sum((M @ moments.second) * M)), 0.0)

    whole = squared(W)
    return float(np.sqrt(squared(W - product) / whole)) if whole else 0.0
