"""SLTrain as an adapter: ``dW = s B A + S``, S sparse on a fixed random support.

The form in which SLTrain fine-tunes (Han et al. 2024, arXiv 2406.02214): the pretrained weight
stays as it is. For S see :mod:`loro_jax.layers.sltrain`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.layers.adapters.adapter import Adapter
from loro_jax.layers.adapters.spec import AdapterSpec
from loro_jax.layers.common import Fixed
from loro_jax.layers.kernels import product
from loro_jax.layers.sltrain import (
    draw_support,
    entries_per_row,
    sparse_low_rank_product,
    sparse_matrix,
)
from loro_jax.lowrank import initialise

Array = jax.Array


class Sltrain(Adapter):
    """``dW = s B A + S`` with B (out x r), A (r x in) and trained entries of S, all zero but A.

    Example:
        >>> adapter = Sltrain(8, 6, AdapterSpec(rank=2, density=0.25), nnx.Rngs(0))
        >>> adapter.values.shape, float(jnp.abs(adapter(jnp.ones((4, 8)), None)).max())
        ((6, 2), 0.0)
    """

    uses = ("alpha", "rank_stabilised", "initialiser", "density")

    def __init__(self, in_features: int, out_features: int, spec: AdapterSpec, rngs: nnx.Rngs):
        B, A = initialise(
            rngs.params(), out_features, in_features, spec.rank, spec.initialiser or "lora"
        )
        self.B = nnx.Param(B.astype(spec.param_dtype))
        self.A = nnx.Param(A.astype(spec.param_dtype))
        shape = (out_features, entries_per_row(in_features, spec.density))
        self.values = nnx.Param(jnp.zeros(shape, spec.param_dtype))
        self.columns = Fixed(draw_support(rngs.params(), out_features, in_features, spec.density))
        self.scale = spec.scale

    def __call__(self, x: Array, base: nnx.Module) -> Array:
        """Maps (..., in) to (..., out); dW exists only during the product."""
        B, A, values = (part[...].astype(x.dtype) for part in (self.B, self.A, self.values))
        return sparse_low_rank_product(x, B, A, values, self.columns[...], self.scale)

    def weight(self, W: Array) -> Array:
        """Returns s B A + S."""
        S = sparse_matrix(self.values[...], self.columns[...], self.A.shape[-1])
        return self.scale * product(self.B[...], self.A[...]) + S

    @staticmethod
    def flops(m: int, n: int, rank: int) -> float:
        """Returns the operations per token: products with dW, and its gradient."""
        return 6.0 * m * n
