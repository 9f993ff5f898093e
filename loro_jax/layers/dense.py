"""Dense projections: ``W`` (out x in), ``y = x W^T``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.layers.common import ProjectionSpec, by_rows, make_bias, products_dtype, with_bias

Array = jax.Array


class Dense(nnx.Module):
    """``y = x W^T`` with W (out x in), plus a bias where the spec asks for one.

    Args:
        in_features: size of the input's last axis.
        out_features: size of the output's last axis.
        spec: standard deviation of the entries and dtypes.
        rngs: NNX random streams; the ``params`` stream is used.
    """

    def __init__(self, in_features: int, out_features: int, spec: ProjectionSpec, rngs: nnx.Rngs):
        shape = (out_features, in_features)
        W = spec.initializer_range * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.W = nnx.Param(W.astype(spec.param_dtype))
        self.bias = nnx.data(make_bias(spec, out_features))
        self.dtype = spec.dtype
        self.precision = spec.precision

    @by_rows
    def __call__(self, x: Array) -> Array:
        """Maps (..., in) to (..., out)."""
        x = x.astype(products_dtype(self.dtype, x, self.W[...]))
        return self.rest(jnp.matmul(x, self.first().astype(x.dtype).T, precision=self.precision))

    def first(self) -> Array:
        """Returns the matrix that is applied to the input, in the dtype of the products."""
        return self.W[...].astype(self.W.dtype if self.dtype is None else self.dtype)

    def rest(self, y: Array) -> Array:
        """Maps ``x first^T`` to the output: adds the bias, if there is one."""
        return with_bias(y, self.bias)

    def weight(self) -> Array:
        """Returns the weight, (out, in)."""
        return self.W[...]
