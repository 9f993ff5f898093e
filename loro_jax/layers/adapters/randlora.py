"""RandLoRA: fixed random bases with trained scales, of full rank.

Source: Albert et al., ICLR 2025, arXiv 2502.00987.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.layers.adapters.adapter import Adapter
from loro_jax.layers.adapters.spec import AdapterSpec
from loro_jax.layers.common import Fixed
from loro_jax.linalg.precision import at_least_float32, matmul

Array = jax.Array


class RandLora(Adapter):
    """``dW = s sum_i B_i diag(l_i) A diag(g_i)`` over k = ceil(min(out, in) / r) random bases.

    B_i (the longer side x r) and A (r x the shorter side) are fixed; l (r x k), zero at first, and
    g (k x the shorter side), at first 1 / the longer side, are trained. A matrix with fewer
    outputs than inputs is changed by the transpose of this. ``s = alpha / (r sqrt(k))``, and rsLoRA
    divides by the root of r instead. k is the least number of bases with which dW reaches full
    rank (as in PEFT; the authors' code has one more where r divides the shorter side). A smaller r
    means more bases and more trained parameters.

    No layer stores bases: each computes them from the seed in every call, so that all layers share
    them without sharing an array. This holds in stacks of layers, on any mesh, and in checkpoints,
    which hold the seed alone. Bases of different shapes are parts of the same infinite ones:
    entries are uniform with variance 1, and each row of A and column of B is drawn by its number.
    Memory and operations during a call are those of a dense matrix.

    Example:
        >>> adapter = RandLora(8, 6, AdapterSpec(kind="randlora", rank=4), nnx.Rngs(0))
        >>> adapter.l.shape, adapter.g.shape, float(jnp.abs(adapter(jnp.ones((4, 8)), None)).max())
        ((4, 2), (2, 6), 0.0)
    """

    uses = ("alpha", "rank_stabilised")

    def __init__(self, in_features: int, out_features: int, spec: AdapterSpec, rngs: nnx.Rngs):
        short, long = sorted((in_features, out_features))
        r, k = spec.rank, bases_of(short, spec.rank)
        self.l = nnx.Param(jnp.zeros((r, k), spec.param_dtype))
        self.g = nnx.Param(jnp.full((k, short), 1 / long, spec.param_dtype))
        self.seed = Fixed(jnp.asarray(spec.seed, jnp.uint32))
        self.scale = spec.scale / math.sqrt(k)
        self.shape = (out_features, in_features)

    def __call__(self, x: Array, base: nnx.Module) -> Array:
        """Maps (..., in) to (..., out) through r k numbers."""
        m, n = self.shape
        B, A = self._factors()
        B, A = B.astype(x.dtype), A.astype(x.dtype)
        y = (x @ A.T) @ B.T if n <= m else (x @ B) @ A
        return self.scale * y

    def weight(self, W: Array) -> Array:
        """Returns the sum over the bases."""
        m, n = self.shape
        B, A = self._factors()
        return self.scale * (matmul(B, A) if n <= m else matmul(A.mT, B.mT))

    def _factors(self) -> tuple[Array, Array]:
        """Returns B (long, r k) and the scaled A (..., r k, short), in float32 or wider."""
        B, A = bases(self.seed[...].reshape(-1)[0], *self.shape, self.l.shape[-2])
        return B, scaled(self.l[...], self.g[...], A)

    @staticmethod
    def flops(m: int, n: int, rank: int) -> float:
        """Returns the operations per token: two factors, of which one has a gradient."""
        inner = rank * bases_of(min(m, n), rank)
        return 4.0 * inner * (m + n) + 2.0 * inner * min(m, n)


def bases_of(short: int, rank: int) -> int:
    """Returns k, the least number of bases of a rank that make up a matrix of full rank."""
    return -(-short // rank)


def bases(seed: Array | int, m: int, n: int, rank: int) -> tuple[Array, Array]:
    """Draws the bases of a matrix.

    Args:
        seed: fixes them.
        m: outputs.
        n: inputs.
        rank: r.

    Returns:
        B (long, r k), whose columns i, i + k, i + 2 k, ... are B_i, and A (r, short), in float32.

    Example:
        >>> B, A = bases(0, 6, 8, 4)
        >>> wide_B, wide_A = bases(0, 12, 16, 4)
        >>> B.shape, bool((B == wide_B[:8, :8]).all()), bool((A == wide_A[:, :6]).all())
        ((8, 8), True, True)
    """
    short, long = sorted((m, n))
    key = jax.random.key(seed, impl="threefry2x32")
    # Parts of longer vectors only by this option, which is JAX's default.
    with jax.threefry_partitionable(True):
        B = _vectors(jax.random.fold_in(key, 0), rank * bases_of(short, rank), long)
        A = _vectors(jax.random.fold_in(key, 1), rank, short)
    return B.T, A


def scaled(l: Array, g: Array, A: Array) -> Array:  # noqa: E741
    """Returns ``diag(l_i) A diag(g_i)`` for all bases, (..., r k, short), row j of i at j k + i.

    Args:
        l: (..., r, k).
        g: (..., k, short).
        A: (r, short).
    """
    dtype = at_least_float32(l.dtype)
    rows = l.astype(dtype)[..., :, :, None] * A[:, None, :] * g.astype(dtype)[..., None, :, :]
    return rows.reshape(*l.shape[:-2], -1, A.shape[-1])


def _vectors(key: Array, count: int, size: int) -> Array:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))
    bound = math.sqrt(3.0)  # a variance of 1
    draw = lambda key: jax.random.uniform(key, (size,), jnp.float32, -bound, bound)  # noqa: E731
    return jax.vmap(draw)(keys)
