"""SLTrain's weight: a low-rank product plus a sparse matrix on a fixed random support.

``W = (alpha / r) B A + S`` (Han et al., "SLTrain: a sparse plus low-rank approach for parameter and
memory efficient pretraining", NeurIPS 2024, arXiv 2406.02214, equation 1 and Algorithm 1). The
support of S is drawn once; its entries are trained.

W exists only during a product: the forward pass saves factors and entries, and the backward pass
forms W again. The authors scatter the entries into W and gather their gradients from dL/dW. Here no
scatter is needed: the support is stratified, with k entries per row, of which the j-th is at a
random column in the j-th of k equal stretches of columns. So each column has a fixed entry index,
and W is formed by a comparison that XLA fuses with the following operations. The marginal
probability of every entry is the same as for a uniform support; two entries of a row just never
share a stretch.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from loro_jax.layers.common import Fixed, ProjectionSpec, by_rows, products_dtype, with_bias
from loro_jax.layers.low_rank import LowRankLinear


def entries_per_row(n: int, density: float) -> int:
    """Returns k, the number of a row's n columns in the support, rounded up."""
    # Rounded first: 0.07 * 100 is 7.000000000000001, which would make 8 entries.
    return math.ceil(round(density * n, 6))


def stretches(n: int, k: int) -> np.ndarray:
    """Returns the stretch of each of n columns, 0 to k - 1, int32 (n,)."""
    return ((np.arange(n, dtype=np.int64) * k) // n).astype(np.int32)


def draw_support(key: jax.Array, m: int, n: int, density: float) -> jax.Array:
    """Draws the columns of a support.

    Args:
        key: a random key.
        m: number of rows of the matrix.
        n: number of columns.
        density: fraction of its entries in the support.

    Returns:
        Columns, int32 (m, k), ascending in each row, uniform within their stretches.

    Raises:
        ValueError: if the density is not between 0 and 1.

    Example:
        >>> import jax
        >>> draw_support(jax.random.key(0), 4, 100, density=0.03).shape
        (4, 3)
    """
    if not 0 < density <= 1:
        raise ValueError(f"draw_support: density must be above 0 and at most 1, but is {density}.")
    k = entries_per_row(n, density)
    # The first column and the width of each stretch; widths differ by one if k does not divide n.
    first = np.searchsorted(stretches(n, k), np.arange(k))
    widths = np.diff(np.append(first, n))
    offsets = jax.random.randint(key, (m, k), 0, jnp.asarray(widths), jnp.int32)
    return jnp.asarray(first, jnp.int32) + offsets


def sparse_matrix(values: jax.Array, columns: jax.Array, n: int) -> jax.Array:
    """Returns S as a dense matrix.

    Args:
        values: its entries, (m, k).
        columns: the column of each, int32 (m, k), from :func:`draw_support`.
        n: number of columns.

    Returns:
        The matrix, (m, n), of the values' dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> sparse_matrix(jnp.array([[5.0, 7.0]]), jnp.array([[1, 2]]), 4).tolist()
        [[0.0, 5.0, 7.0, 0.0]]
    """
    # Each column's stretch is known at compile time, so this only repeats entries.
    stretch = stretches(n, values.shape[-1])
    here = columns[..., stretch] == jnp.arange(n, dtype=columns.dtype)
    return jnp.where(here, values[..., stretch], 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def sparse_low_rank_product(
    x: jax.Array,
    B: jax.Array,
    A: jax.Array,
    values: jax.Array,
    columns: jax.Array,
    scale: float,
) -> jax.Array:
    """Returns ``y = x (scale B A + S)^T``.

    Args:
        x: inputs, (..., n).
        B: (m, r).
        A: (r, n).
        values: entries of S, (m, k).
        columns: their columns, int32 (m, k), from :func:`draw_support`.
        scale: alpha / r.

    Returns:
        Outputs, (..., m).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> columns = draw_support(jax.random.key(0), 6, 8, density=0.25)
        >>> x, values = jnp.ones((3, 8)), jnp.ones((6, 2))
        >>> B, A = jnp.ones((6, 2)), jnp.ones((2, 8))
        >>> sparse_low_rank_product(x, B, A, values, columns, 0.5)[0, 0]
        Array(10., dtype=float32)
    """
    return x @ _weight(B, A, values, columns, scale).T


def _weight(
    B: jax.Array, A: jax.Array, values: jax.Array, columns: jax.Array, scale: float
) -> jax.Array:
    return scale * (B @ A) + sparse_matrix(values, columns, A.shape[-1])


def _forward(
    x: jax.Array,
    B: jax.Array,
    A: jax.Array,
    values: jax.Array,
    columns: jax.Array,
    scale: float,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    y = sparse_low_rank_product(x, B, A, values, columns, scale)
    return y, (x, B, A, values, columns)


def _backward(
    scale: float, saved: tuple[jax.Array, ...], dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, None]:
    x, B, A, values, columns = saved
    # W again, from its parts: saved in the forward pass it would take a dense model's memory.
    dx = dy @ _weight(B, A, values, columns, scale)
    dW = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    # The full gradient exists only here; entries and factors all take theirs from it.
    dvalues = jnp.take_along_axis(dW, columns, axis=-1)
    return dx, scale * (dW @ A.T), scale * (B.T @ dW), dvalues, None


sparse_low_rank_product.defvjp(_forward, _backward)


class SparseLowRankLinear(LowRankLinear):
    """``y = x ((alpha / r) B A + S)^T``; S is sparse, B starts at zero."""

    through_rank = False

    def __init__(self, in_features: int, out_features: int, spec: ProjectionSpec, rngs: nnx.Rngs):
        # B = 0: at first the weight is S alone.
        factors = dataclasses.replace(spec, initialiser="lora")
        super().__init__(in_features, out_features, factors, rngs)
        # As in the authors' code: uniform, PyTorch's default for linear layers.
        shape = (out_features, entries_per_row(in_features, spec.density))
        bound = in_features**-0.5
        values = jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
        self.values = nnx.Param(values.astype(spec.param_dtype))
        self.columns = Fixed(draw_support(rngs.params(), out_features, in_features, spec.density))
        self.scale = spec.alpha / self.A.shape[-2]

    @by_rows
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., in) to (..., out); W exists only during the product."""
        B, A = self.factors()
        x = x.astype(products_dtype(self.dtype, x, B))
        values = self.values[...].astype(x.dtype)
        y = sparse_low_rank_product(x, B, A, values, self.columns[...], self.scale)
        return with_bias(y, self.bias)

    @staticmethod
    def flops(m: int, n: int, spec: ProjectionSpec, tokens: float) -> float:
        """Returns the operations per token: W is formed twice, and its gradient once."""
        assert spec.rank is not None  # make_projection chose this class by it
        return 6.0 * m * n + 8.0 * m * n * spec.rank / tokens

    def weight(self) -> jax.Array:
        """Returns the weight, (out, in), in float32 or wider."""
        S = sparse_matrix(self.values[...], self.columns[...], self.A.shape[-1])
        return self.scale * self.product() + S
