"""OSFT's projection: ``y = x (U_high diag(S_high) V_high^T + B diag(S) A)^T``; B, S, A are trained.

The fixed directions are the strongest min(m, n) - r of the weight that it starts from. Gradients of
B and A have no part along them, whatever the optimizer. See :mod:`loro_jax.peers.osft`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.layers.common import Fixed, ProjectionSpec, by_rows, products_dtype, with_bias
from loro_jax.layers.dense import Dense
from loro_jax.layers.low_rank import LowRankLinear
from loro_jax.peers.osft import Split, split, with_projected_gradient

Array = jax.Array


class OsftLinear(LowRankLinear):
    """``y = x (U_high diag(S_high) V_high^T + B diag(S) A)^T``; the first term is fixed.

    Example:
        >>> projection = OsftLinear(64, 48, ProjectionSpec(kind="osft", rank=8), nnx.Rngs(0))
        >>> projection(jnp.ones((5, 64))).shape
        (5, 48)
        >>> projection.U_high.shape, projection.B.shape, projection.A.shape
        ((48, 40), (48, 8), (8, 64))
    """

    through_rank = False
    below_full_rank = True

    def __init__(self, in_features: int, out_features: int, spec: ProjectionSpec, rngs: nnx.Rngs):
        # For its checks and attributes; the factors that it draws, cheaply, are replaced below.
        factors = dataclasses.replace(spec, initialiser="auto")
        super().__init__(in_features, out_features, factors, rngs)
        assert spec.rank is not None  # make_projection chose this class by it
        # Dense's own draw, in float32: the parts are rounded, not W.
        whole = dataclasses.replace(spec, param_dtype=jnp.float32, use_bias=False)
        W = Dense(in_features, out_features, whole, rngs).W[...]
        parts = split(W, spec.rank).astype(spec.param_dtype)
        self.B[...], self.A[...] = parts.B, parts.A
        self.S = nnx.Param(parts.S)
        self.U_high, self.S_high = Fixed(parts.U_high), Fixed(parts.S_high)
        self.Vt_high = Fixed(parts.Vt_high)

    @by_rows
    def __call__(self, x: Array) -> Array:
        """Maps (..., in) to (..., out)."""
        parts = self.parts()
        # Gradients are projected in the dtype of the weights, not in that of the products.
        B = with_projected_gradient(parts.B, parts.U_high)
        A = with_projected_gradient(parts.A.mT, parts.Vt_high.mT).mT
        x = x.astype(products_dtype(self.dtype, x, parts.B))
        U, s, Vt, B, S, A = parts._replace(B=B, A=A).astype(x.dtype)
        y = ((x @ Vt.T) * s) @ U.T + ((x @ A.T) * S) @ B.T
        return with_bias(y, self.bias)

    def parts(self) -> Split:
        """Returns the arrays as the rules of the method take them, as they are stored."""
        high = (self.U_high[...], self.S_high[...], self.Vt_high[...])
        return Split(*high, self.B[...], self.S[...], self.A[...])

    @staticmethod
    def flops(m: int, n: int, spec: ProjectionSpec, tokens: float) -> float:
        """Returns the operations per token; gradients are projected once per pass."""
        assert spec.rank is not None  # make_projection chose this class by it
        kept = min(m, n) - spec.rank
        projected = 4.0 * kept * spec.rank * (m + n) / tokens
        return 4.0 * kept * (m + n) + LowRankLinear.flops(m, n, spec, tokens) + projected

    def weight(self) -> Array:
        """Returns the weight, (out, in), in float32 or wider."""
        return self.parts().weight()
