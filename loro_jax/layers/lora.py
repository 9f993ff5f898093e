"""LoRA: ``y = x W^T + (alpha / r) (x A^T) B^T``, W fixed (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx

from loro_jax.layers.common import Fixed, ProjectionSpec, by_rows, products_dtype, with_bias
from loro_jax.layers.dense import Dense
from loro_jax.layers.low_rank import LowRankLinear

Array = jax.Array


class LoraLinear(LowRankLinear):
    """``y = x W^T + (alpha / r) (x A^T) B^T`` with a fixed W; B starts at zero."""

    through_rank = False

    def __init__(self, in_features: int, out_features: int, spec: ProjectionSpec, rngs: nnx.Rngs):
        # B = 0: training starts from the function of W.
        adapter = dataclasses.replace(spec, initialiser="lora")
        super().__init__(in_features, out_features, adapter, rngs)
        W = Dense(in_features, out_features, spec, rngs).W[...]
        self.W = Fixed(W)
        self.scale = spec.alpha / self.A.shape[-2]

    @by_rows
    def __call__(self, x: Array) -> Array:
        """Maps (..., in) to (..., out)."""
        B, A = self.factors()
        x = x.astype(products_dtype(self.dtype, x, B))
        # Two thin products for each input; the sum W + s B A is formed only to merge.
        y = x @ self.W[...].astype(x.dtype).T + self.scale * ((x @ A.T) @ B.T)
        return with_bias(y, self.bias)

    @staticmethod
    def flops(m: int, n: int, spec: ProjectionSpec, tokens: float) -> float:
        """Returns the operations per token, without a gradient of the fixed weight."""
        return 4.0 * m * n + LowRankLinear.flops(m, n, spec, tokens)

    def weight(self) -> Array:
        """Returns the merged weight, (out, in), in float32 or wider."""
        return self.W[...] + self.scale * self.product()
