"""Bone's variant BAT: ``dW`` mixes the columns of W within blocks (Kang 2024, arXiv 2409.15371)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.layers.adapters.adapter import Adapter, weight_of
from loro_jax.layers.adapters.spec import AdapterSpec
from loro_jax.linalg.precision import at_least_float32, matmul

Array = jax.Array


class Bone(Adapter):
    """``dW_IJ = W_IJ b_I + b_I`` for the r x r blocks of W, with trained b (out / r, r, r).

    All blocks of one row of blocks share a matrix b_I, which is zero at first; unlike that of
    :class:`Miss` the change depends on W. W is filled up with zeros to whole blocks if r does not
    divide its sides. There is no scale: ``alpha`` is not used.

    Each call forms dW, which takes r products with W's entries, and multiplies by it.

    Example:
        >>> adapter = Bone(8, 6, AdapterSpec(kind="bone", rank=2), nnx.Rngs(0))
        >>> adapter.b.shape, float(jnp.abs(adapter.weight(jnp.ones((6, 8)))).max())
        ((3, 2, 2), 0.0)
    """

    uses = ()

    def __init__(self, in_features: int, out_features: int, spec: AdapterSpec, rngs: nnx.Rngs):
        r = spec.rank
        self.b = nnx.Param(jnp.zeros((-(-out_features // r), r, r), spec.param_dtype))

    def __call__(self, x: Array, base: nnx.Module) -> Array:
        """Maps (..., in) to (..., out) by dW."""
        return x @ self.weight(weight_of(base)).astype(x.dtype).T

    def weight(self, W: Array) -> Array:
        """Returns the change of each block."""
        return mixed(self.b[...], W)

    @staticmethod
    def flops(m: int, n: int, rank: int) -> float:
        """Returns the operations per token: those of a dense dW; forming it is not counted."""
        return 6.0 * m * n


def mixed(b: Array, W: Array) -> Array:
    """Returns ``W_IJ b_I + b_I`` for all blocks of W, in float32 or wider.

    Args:
        b: (..., ceil(m / r), r, r).
        W: (..., m, n).

    Example:
        >>> mixed(jnp.full((1, 1, 1), 0.5), jnp.array([[2.0, 4.0]])).tolist()
        [[1.5, 2.5]]
    """
    r, (m, n) = b.shape[-1], W.shape[-2:]
    dtype = at_least_float32(jnp.promote_types(b.dtype, W.dtype))
    leading = W.shape[:-2]
    filled = jnp.pad(W, [(0, 0)] * len(leading) + [(0, -m % r), (0, -n % r)]).astype(dtype)
    rows, columns = filled.shape[-2] // r, filled.shape[-1] // r
    # The axes of a block next to each other: (rows, columns of blocks, r, r).
    blocks = filled.reshape(*leading, rows, r, columns, r).swapaxes(-3, -2)
    b = b.astype(dtype)[..., :, None, :, :]
    changed = matmul(blocks, b) + b
    return changed.swapaxes(-3, -2).reshape(filled.shape)[..., :m, :n]
