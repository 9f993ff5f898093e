"""Dense projections: ``W`` (out x in), ``y = x W^T``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.layers.common import ProjectionSpec, by_rows

Array = jax.Array


class Dense(nnx.Module):
    """``y = x W^T`` with W (out x in)."""

    def __init__(self, in_features: int, out_features: int, spec: ProjectionSpec, rngs: nnx.Rngs):
        shape = (out_features, in_features)
        W = spec.initializer_range * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.W = nnx.Param(W.astype(spec.param_dtype))
        self.dtype = spec.dtype

    @by_rows
    def __call__(self, x: Array) -> Array:
        """Maps (..., in) to (..., out)."""
        return x.astype(self.dtype) @ self.first().T

    def first(self) -> Array:
        """Returns the matrix that is applied to the input, in the dtype of the products."""
        return self.W[...].astype(self.dtype)

    def rest(self, y: Array) -> Array:
        """Maps ``x first^T`` to the output: they are equal."""
        return y

    def weight(self) -> Array:
        """Returns the weight, (out, in)."""
        return self.W[...]
