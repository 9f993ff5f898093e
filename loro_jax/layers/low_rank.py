"""Low-rank projections: ``B`` (out x r) and ``A`` (r x in), ``y = (x A^T) B^T``; no ``W``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.layers.common import ProjectionSpec, by_rows, named
from loro_jax.linalg.precision import at_least_float32
from loro_jax.lowrank import initialise

Array = jax.Array


class LowRankLinear(nnx.Module):
    """``y = (x A^T) B^T`` with B (out x r) and A (r x in)."""

    # Whether y = up(down(x)); False for kinds that add other terms.
    through_rank = True
    # Whether the function depends only on the product B A.
    linear = True

    def __init__(self, in_features: int, out_features: int, spec: ProjectionSpec, rngs: nnx.Rngs):
        assert spec.rank is not None  # make_projection chose this class by it
        B, A = initialise(
            rngs.params(),
            out_features,
            in_features,
            spec.rank,
            spec.initialiser,
            spec.initializer_range,
        )
        self.B = nnx.Param(B.astype(spec.param_dtype))
        self.A = nnx.Param(A.astype(spec.param_dtype))
        self.dtype = spec.dtype

    @property
    def rank(self) -> int:
        """Inner dimension r."""
        return self.B.shape[-1]

    def first(self) -> Array:
        """Returns A, which is applied to the input, in the dtype of the products."""
        return self.A[...].astype(self.dtype)

    def rest(self, y: Array) -> Array:
        """Maps ``x A^T`` to the output."""
        return self.up(self.activated(y))

    def factors(self) -> tuple[Array, Array]:
        """Returns B and A in the dtype of the products."""
        return self.B[...].astype(self.dtype), self.A[...].astype(self.dtype)

    def down(self, x: Array) -> Array:
        """Maps (..., in) to the latent (..., r)."""
        # Named before the activation, which is cheap to recompute in the backward pass.
        return self.activated(named(x.astype(self.dtype) @ self.first().T))

    def activated(self, latent: Array) -> Array:
        """Returns ``x A^T`` unchanged; kinds with an activation override this."""
        return latent

    def up(self, latent: Array) -> Array:
        """Maps the latent (..., r) to (..., out)."""
        return latent @ self.B[...].astype(self.dtype).T

    @by_rows
    def __call__(self, x: Array) -> Array:
        """Maps (..., in) to (..., out) through the rank."""
        return self.up(self.down(x))

    def product(self) -> Array:
        """Returns B A, (out, in), in float32 or wider."""
        dtype = at_least_float32(self.B[...].dtype)
        B, A = self.B[...].astype(dtype), self.A[...].astype(dtype)
        # For merging and export: accelerators would round the inputs of the product otherwise.
        return jnp.matmul(B, A, precision=jax.lax.Precision.HIGHEST)

    @staticmethod
    def flops(m: int, n: int, spec: ProjectionSpec, tokens: float) -> float:
        """Returns the operations per token, forward and backward.

        Args:
            m: outputs.
            n: inputs.
            spec: specification, with a rank.
            tokens: tokens per pass, over which operations done once per pass are divided.
        """
        assert spec.rank is not None  # make_projection chose this class by it
        return 6.0 * spec.rank * (m + n)

    def weight(self) -> Array:
        """Returns the weight B A, (out, in), in float32 or wider."""
        return self.product()
