"""The discrete cosine transform as a matrix."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def cosine_transform(m: int, n: int, dtype: Any = jnp.float32) -> Array:
    """Returns the first m rows and n columns of the orthonormal DCT-II of size max(m, n).

    Args:
        m: number of rows, which are the frequencies.
        n: number of columns.
        dtype: of the matrix, float32 or wider.

    Example:
        >>> T = cosine_transform(3, 5)
        >>> bool(jnp.allclose(T @ T.T, jnp.eye(3), atol=1e-6))
        True
    """
    size = max(m, n)
    row, column = jnp.arange(m, dtype=jnp.int32)[:, None], jnp.arange(n, dtype=jnp.int32)
    # Reduced as whole numbers: the cosine of a large angle would be inaccurate.
    quarters = (row * (2 * column + 1)) % (4 * size)
    T = math.sqrt(2 / size) * jnp.cos(quarters.astype(dtype) * (math.pi / (2 * size)))
    return jnp.where(row == 0, T * math.sqrt(0.5), T).astype(dtype)
