"""LoRA-SB: a trained core between fixed factors that the first gradient chooses.

Source: Ponkshe et al. 2024, arXiv 2411.19557.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.layers.adapters.adapter import Adapter
from loro_jax.layers.adapters.spec import AdapterSpec
from loro_jax.layers.common import Fixed
from loro_jax.linalg.batching import one_by_one
from loro_jax.linalg.precision import at_least_float32, matmul

Array = jax.Array


class LoraSB(Adapter):
    """``dW = B R A`` with a trained R (r x r); B (out x r) and A (r x in) are fixed.

    B has orthonormal columns and A orthonormal rows. Therefore the gradient of R, B^T G A^T, is the
    full gradient G projected to their spaces, and so is the change of dW. There is no scale:
    ``alpha`` is not used.

    B and A pick random outputs and inputs at first, and R = 0. Before training, give it the mean
    gradient of its weight by :func:`loro_jax.layers.adapters.start_from_gradients` (a run does so):
    B R A then is the truncated SVD of Adam's first step on the full weight, and dW is not 0.

    Example:
        >>> adapter = LoraSB(8, 6, AdapterSpec(kind="lora_sb", rank=2), nnx.Rngs(0))
        >>> adapter.from_gradient(jnp.ones((6, 8)), 0.5)
        >>> bool(jnp.allclose(adapter.weight(jnp.zeros((6, 8))), -0.5, atol=1e-6))
        True
    """

    uses = ("start_sequences",)
    starts_from_gradient = True

    def __init__(self, in_features: int, out_features: int, spec: AdapterSpec, rngs: nnx.Rngs):
        r, dtype = spec.rank, spec.param_dtype
        self.R = nnx.Param(jnp.zeros((r, r), dtype))
        rows = jax.random.permutation(rngs.params(), out_features)[:r]
        columns = jax.random.permutation(rngs.params(), in_features)[:r]
        self.B = Fixed(jax.nn.one_hot(rows, out_features, dtype=dtype).T)
        self.A = Fixed(jax.nn.one_hot(columns, in_features, dtype=dtype))

    def __call__(self, x: Array, base: nnx.Module) -> Array:
        """Maps (..., in) to (..., out) through the rank."""
        B, R, A = (v[...].astype(x.dtype) for v in (self.B, self.R, self.A))
        return ((x @ A.T) @ R.T) @ B.T

    def weight(self, W: Array) -> Array:
        """Returns B R A."""
        B, A = self.factors()
        return matmul(B, A)

    def factors(self) -> tuple[Array, Array]:
        """Returns B R and A, in float32 or wider."""
        B, R, A = (v[...].astype(at_least_float32(v[...].dtype)) for v in (self.B, self.R, self.A))
        return matmul(B, R), A

    def from_gradient(self, G: Array, rate: float) -> None:
        """Starts from the truncated SVD of ``-rate * sign(G)``, G (..., out, in)."""
        rank = self.R.shape[-1]

        def truncated(step: Array) -> tuple[Array, Array, Array]:
            U, s, Vt = jnp.linalg.svd(step, full_matrices=False)
            return U[:, :rank], jnp.diag(s[:rank]), Vt[:rank]

        step = -rate * jnp.sign(G.astype(at_least_float32(G.dtype)))
        found = one_by_one(truncated, G.ndim - 2)(step)
        for variable, value in zip((self.B, self.R, self.A), found, strict=True):
            variable[...] = value.astype(variable.dtype)

    @staticmethod
    def flops(m: int, n: int, rank: int) -> float:
        """Returns the operations per token: fixed thin factors, and the core."""
        return 4.0 * rank * (m + n) + 6.0 * rank * rank
