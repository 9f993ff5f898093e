"""LOST's projection: factors with an activation between them, and some whole columns beside them.

``y = g B silu(A x) + (1 - g) W_s x[I]`` (Li et al., "LOST: Low-rank and Sparse Pre-training for
Large Language Models", 2025, arXiv 2508.02668). All of it is made from one dense matrix W0, drawn
as a dense projection is: B and A are its truncated SVD, balanced; the columns of the residual
``C = W0 - B A`` with the largest norms are the input channels I, which the factors reproduce worst;
and ``W_s = W0[:, I]``. B, A and W_s are trained; I and g are fixed.

I is sorted, and has the same number of channels in all layers, so that a model's stacked layers
have one shape. Where B A is all of W0 (r = min(m, n)) the residual is rounding error, and I is
arbitrary.

A projection costs one SVD of W0 when a model is initialised, and none when it is restored. The
defaults, g = 0.7 and 1% of the channels, are those reported for the authors' runs. Their
code was not at hand: what the paper leaves open is not compared with it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.layers.cola import ColaLinear
from loro_jax.layers.common import Fixed, ProjectionSpec, by_rows, products_dtype, with_bias
from loro_jax.layers.dense import Dense
from loro_jax.layers.low_rank import LowRankLinear
from loro_jax.layers.sltrain import entries_per_row
from loro_jax.linalg.precision import matmul
from loro_jax.lowrank import from_dense

Array = jax.Array


def largest_columns(C: Array, count: int) -> Array:
    """Returns which columns of a matrix have the largest L2 norms.

    Args:
        C: (m, n).
        count: number of columns, at most n.

    Returns:
        Their indices, int32 (count,), ascending.

    Example:
        >>> largest_columns(jnp.array([[1.0, -3.0, 0.0, 2.0], [0.0, 1.0, 1.0, 2.0]]), 2).tolist()
        [1, 3]
    """
    norms = jnp.linalg.vector_norm(C, axis=-2)
    return jnp.sort(jax.lax.top_k(norms, count)[1]).astype(jnp.int32)


class LostLinear(ColaLinear):
    """``y = g B silu(A x) + (1 - g) W_s x[I]`` with g and I fixed.

    Example:
        >>> spec = ProjectionSpec(kind="lost", rank=2, lost_channels=0.05)
        >>> projection = LostLinear(64, 48, spec, nnx.Rngs(0))
        >>> projection(jnp.ones((5, 64))).shape
        (5, 48)
        >>> projection.W_s.shape, projection.channels.shape
        ((48, 4), (4,))
    """

    through_rank = False

    def __init__(self, in_features: int, out_features: int, spec: ProjectionSpec, rngs: nnx.Rngs):
        # For its checks and attributes; the factors that it draws, cheaply, are replaced below.
        factors = dataclasses.replace(spec, initialiser="auto")
        super().__init__(in_features, out_features, factors, rngs)
        assert spec.rank is not None  # make_projection chose this class by it
        if not 0 < spec.lost_channels <= 1 or not 0 <= spec.lost_gamma <= 1:
            raise ValueError(
                "LostLinear: expected lost_channels above 0 and at most 1, and lost_gamma between "
                f"0 and 1, but they are {spec.lost_channels} and {spec.lost_gamma}."
            )
        # Dense's own draw, in float32: the parameters are rounded only when all are known.
        whole = dataclasses.replace(spec, param_dtype=jnp.float32, use_bias=False)
        W0 = Dense(in_features, out_features, whole, rngs).W[...]
        B, A = from_dense(W0, spec.rank)
        count = entries_per_row(in_features, spec.lost_channels)
        channels = largest_columns(W0 - matmul(B, A), count)
        self.B[...] = B.astype(spec.param_dtype)
        self.A[...] = A.astype(spec.param_dtype)
        self.W_s = nnx.Param(W0[:, channels].astype(spec.param_dtype))
        self.channels = Fixed(channels)
        self.gamma = spec.lost_gamma

    @by_rows
    def __call__(self, x: Array) -> Array:
        """Maps (..., in) to (..., out)."""
        x = x.astype(products_dtype(self.dtype, x, self.A[...]))
        # g and 1 - g scale what is narrower than the output.
        latent, chosen = self.gamma * self.down(x), (1 - self.gamma) * self.chosen(x)
        B, W_s = self.B[...].astype(x.dtype), self.W_s[...].astype(x.dtype)
        y = jnp.matmul(latent, B.T, precision=self.precision)
        y += jnp.matmul(chosen, W_s.T, precision=self.precision)
        return with_bias(y, self.bias)

    def chosen(self, x: Array) -> Array:
        """Returns the channels I of the input, (..., number of channels)."""
        # What is known of I makes the gradient of x a plain scatter.
        return x.at[..., self.channels[...]].get(
            unique_indices=True, indices_are_sorted=True, mode="promise_in_bounds"
        )

    @staticmethod
    def flops(m: int, n: int, spec: ProjectionSpec, tokens: float) -> float:
        """Returns the operations per token, forward and backward."""
        channels = entries_per_row(n, spec.lost_channels)
        return 6.0 * m * channels + LowRankLinear.flops(m, n, spec, tokens)
